from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import (
    check_count,
    check_numbers,
    check_positive,
    check_saved,
    numbers_in_order,
)
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting, add_to_means, logarithms, task_vector


class STCH(Weighting):
    r"""Smooth Tchebycheff: make the loss that is worst against its nadir the objective, smoothly.

    With a nadir :math:`z_i` for each loss, its mean over one early epoch,

    .. math::
        \text{objective} = m \mu \log \sum_i \exp \frac{\log (L_i / z_i)}{\mu}, \qquad
        w_i = \frac{m \, p_i}{L_i}, \qquad
        p_i = \frac{(L_i / z_i)^{1 / \mu}}{\sum_j (L_j / z_j)^{1 / \mu}},

    over the m active tasks. Until their nadirs are known, the objective is :math:`\sum_i \log L_i`,
    with weights :math:`1 / L_i`, which are those of the formula at the nadir: weights do not jump.
    They do not sum to the number of tasks, but the weighted losses :math:`w_i L_i` do. The
    objective may be negative: never stop or schedule on it.

    Call :meth:`end_epoch` (or ``Balancer.end_epoch``) after each epoch. Each task counts the epochs
    in which it was active, from 0; its mean loss in number ``warmup_epochs`` becomes its nadir at
    the end of that, or, where the mean is 0, that in the next one in which it is not. A step with a
    task that has no nadir is one of the warm-up for all. Losses count in training mode only.

    Losses must not be negative. A negative one makes the weights NaN, at which a Balancer raises. A
    loss of 0 is out of the objective: p and its weight are 0.

    Args:
        mu: Smoothing, positive; towards 0 the worst task takes all, and large values leave the
            warm-up's weights. Source: 1 in the authors' multi-task code.
        nadir: One positive number per task, a mapping from task name or a sequence in the order of
            the tasks. They are configuration, and not saved; there is no warm-up then. None for the
            means of an epoch, which are.
        warmup_epochs: Number of the epoch whose means are the nadir, counted from 0, so that one
            more is spent on logarithms. Source: 4 in the authors' multi-task code.

    Note:
        The authors' form for multi-task learning. The paper's is :math:`\mu \log \sum_i \exp
        (\lambda_i (L_i - z_i^*) / \mu)`, with preferences and the ideal point :math:`z^*` in place
        of the nadir. The authors add 1e-20 inside the logarithms, and leave a term out of the value
        that has no part in the gradient.

    References:
        Lin, Zhang, Yang, Liu, Wang and Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective
        Optimization", ICML 2024, https://arxiv.org/abs/2402.19078.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> weighting = STCH(nadir=[1.0, 2.0])  # ratios of 1 and 2: p is 1/3 and 2/3
        >>> weighting(losses).sum().backward()
        >>> losses.grad
        tensor([0.6667, 0.3333])
    """

    asks_of_losses: ClassVar[str] = "It takes their logarithms: losses must be at least 0."
    _narrowest: ClassVar[torch.dtype] = torch.float64

    nadir: Tensor
    mean: Tensor
    count: Tensor
    epochs: Tensor

    def __init__(
        self,
        mu: float = 1.0,
        nadir: Mapping[str, float] | Sequence[float] | None = None,
        warmup_epochs: int = 4,
    ) -> None:
        super().__init__()
        self.mu = check_positive("mu", mu)
        self.given = None if nadir is None else check_numbers("nadir", nadir, check_positive)
        self.warmup_epochs = check_count("warmup_epochs", warmup_epochs, 0)

    def setup(self) -> None:
        if self.given is not None:
            numbers = numbers_in_order("nadir", self.given, self.tasks or ())
            vector = task_vector(numbers, self.num_tasks, dtype_of_sums())
            self.register_buffer("nadir", vector, persistent=False)
            return
        # 0 where it is not known, and the mean and the number of steps of the current epoch.
        for name in ("nadir", "mean"):
            self.register_buffer(name, task_vector(0.0, self.num_tasks, dtype_of_sums()))
        for name in ("count", "epochs"):
            self.register_buffer(name, torch.zeros(self.num_tasks, dtype=torch.long))

    def check_state(self, state: Mapping[str, object]) -> None:
        counts = ("count", "epochs", "nadir")
        check_saved(self, state, counts=counts, finite=("mean", "nadir"))

    def forward(self, losses: Tensor) -> Tensor:
        if self.training and self.given is None:
            add_to_means(self.mean, self.count, losses.detach(), self.active)
        logs = logarithms(losses)
        nadir = self.nadir[self.active]
        known = (nadir > 0).all()
        ratios = logs - torch.where(known, nadir, 1.0).log()
        zero = losses.detach() == 0
        ratios = ratios.masked_fill(zero & ~zero.all(), -torch.inf)
        worst = ratios.detach().max()  # taken off before mu can take what it divides out of range
        smooth = worst + self.mu * torch.logsumexp((ratios - worst) / self.mu, 0)
        return torch.where(known, smooth, logs).to(losses.dtype)

    def end_epoch(self) -> None:
        """Close an epoch: its mean becomes the nadir of each task that was waiting for it."""
        if self.given is not None:
            return
        seen = self.count > 0
        due = (self.nadir == 0) & (self.epochs >= self.warmup_epochs) & (self.mean > 0)
        self.nadir = torch.where(due, self.mean, self.nadir)
        self.epochs += seen
        self.mean.zero_()
        self.count.zero_()

    def extra_repr(self) -> str:
        return f"mu={self.mu}, nadir={self.given}, warmup_epochs={self.warmup_epochs}"
