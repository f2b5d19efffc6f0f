from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_saved, count_fallback
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting, adam, logarithms, task_vector


class FAMO(Weighting):
    r"""Fast adaptive multitask optimization: lower all losses by the same factor.

    .. math::
        w_i = m \, \frac{z_i / L_i}{\sum_j z_j / L_j}, \qquad z = \operatorname{softmax}(\xi),

    over the m active tasks, where the logits :math:`\xi` start at 0 and follow what each step has
    done to the losses of its own batch, from :math:`L` to :math:`L^+`:

    .. math::
        \delta_i = \log L_i - \log L_i^+, \qquad
        \xi \leftarrow \operatorname{Adam}\Bigl(\xi, \;
            z_i \bigl(\delta_i - \sum_j z_j \delta_j\bigr) + \gamma \xi_i\Bigr),

    so that tasks which fell by a smaller factor than others gain weight. Call
    ``balancer.after_step(losses)`` after ``optimizer.step()``, with a function that returns the
    losses of the same batch, in each step: that costs one forward pass more, and no backward pass.
    Weights sum to the number of active tasks; the objective :math:`\sum_i w_i L_i` is m times the
    weighted harmonic mean of the losses, with weights held constant.

    Losses must not be negative. A negative one makes the weights NaN, at which a Balancer raises.
    A loss of 0 is out of the objective and of the comparison: its weight is 0, and its logit stays.
    The logits are a buffer, which Adam moves in here: they need no other optimizer. An absent task
    leaves its logit and moments as they are.

    Args:
        gamma: Decay of the logits towards 0, at least 0, as the weight decay of
            ``torch.optim.Adam``. Source: 0.01 in the authors' code; the paper's Algorithm 2 has
            0.001.
        lr: Learning rate of Adam on the logits, at least 0. Source: the authors' code.

    Note:
        The authors' weights sum to 1. Their objective, :math:`c \sum_i z_i \log L_i` with
        :math:`c = 1 / \sum_j z_j / L_j` held constant, has the same gradient, but may be negative,
        and they add 1e-8 to each loss. They subtract a known minimum of each loss first; subtract
        it from the loss that you give, whose gradient is the same. They cut gradients to a norm of
        1; that is left to the training loop. Where a loss after the step is not finite, or
        negative, the logits stay (``fallbacks`` counts such steps).

    References:
        Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023,
        Algorithm 1, https://arxiv.org/abs/2306.03792.

    Example:
        >>> import torch
        >>> weighting = FAMO()
        >>> weighting(torch.tensor([1.0, 3.0]))  # weights of 3/2 and 1/2
        tensor([1.5000, 1.5000])
        >>> weighting.after_step(torch.tensor([0.5, 3.0]))  # only the first has fallen
        >>> weighting.logits
        tensor([-0.0250,  0.0250], dtype=torch.float64)
    """

    needs_after_step: ClassVar[bool] = True
    asks_of_losses: ClassVar[str] = "It takes their logarithms: losses must be at least 0."
    _narrowest: ClassVar[torch.dtype] = torch.float64

    logits: Tensor
    before: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    def __init__(self, gamma: float = 0.01, lr: float = 0.025) -> None:
        super().__init__()
        self.gamma = check_at_least("gamma", gamma, 0)
        self.lr = check_at_least("lr", lr, 0)

    def setup(self) -> None:
        # `before` holds the losses of a step until it is looked back at, and 0 else.
        for name in ("logits", "before", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, task_vector(0.0, self.num_tasks, dtype_of_sums()))
        self.register_buffer("steps", torch.zeros(self.num_tasks, dtype=torch.long))

    def check_state(self, state: Mapping[str, object]) -> None:
        finite = ("logits", "before", "exp_avg")
        check_saved(self, state, counts=("steps", "exp_avg_sq"), finite=finite)

    def forward(self, losses: Tensor) -> Tensor:
        raw = losses.detach()
        if self.training:
            known = torch.where(torch.isfinite(raw), raw, 0.0)
            self.before[self.active] = known.to(self.before.dtype)
        zero = raw == 0
        pulls = self.logits[self.active] - logarithms(raw)
        pulls = pulls.masked_fill(zero & ~zero.all(), -torch.inf)
        return (len(raw) * torch.softmax(pulls, 0)).to(losses.dtype) * losses

    def after_step(self, losses: Tensor) -> None:
        """Move the logits by one step of Adam, after the change of the losses in the last step."""
        if not self.training:
            return
        before, after = self.before[self.active].clone(), losses.detach().to(self.before)
        self.before[self.active] = 0
        logs = logarithms(after)
        if not bool(torch.isfinite(logs).all()):
            count_fallback(self, "a loss after the step is not finite, or below 0: weights stay")
            return
        counted = (before > 0) & (after > 0)
        numbers = torch.arange(self.num_tasks, device=before.device)[self.active][counted]
        self._adam((logarithms(before) - logs)[counted], numbers)

    def _adam(self, change: Tensor, numbers: Tensor) -> None:
        logits = self.logits[numbers]
        shares = torch.softmax(logits, 0)
        slope = shares * (change - (shares * change).sum()) + self.gamma * logits
        moments = self.exp_avg, self.exp_avg_sq, self.steps
        self.logits[numbers] -= adam(self.lr, slope, *moments, numbers)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, lr={self.lr}"
