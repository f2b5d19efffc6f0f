from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import check_positive, check_saved
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting, add_to_means, task_vector

_MAX_RATIO = 1e3


class DWA(Weighting):
    r"""Dynamic weight average: more weight for tasks whose loss falls more slowly.

    .. math::
        r_i = \frac{\bar L_i(t-1)}{\bar L_i(t-2)}, \qquad
        w_i = m \, \frac{e^{r_i / T}}{\sum_j e^{r_j / T}},

    where :math:`\bar L_i(t)` is the mean of the raw loss over epoch t. A task that has not two
    epochs behind it has a ratio of 1, so that the first two epochs are unweighted. Weights sum to
    the number of active tasks.

    Call :meth:`end_epoch` (or ``Balancer.end_epoch``) after each epoch. Losses count in training
    mode only.

    Args:
        temperature: T, positive; large values give equal weights. Source: 2 in the paper.

    Note:
        The softmax is shifted by its maximum (the authors' overflows above a ratio of 1400), ratios
        end at 1000, 0/0 counts as 1, and an epoch without a task leaves that task's means as they
        are. The reference code of El Nahhas et al. (2024) mixes the running means of the two tasks
        up.

    References:
        Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation
        (7), https://arxiv.org/abs/1803.10704.

    Example:
        >>> import torch
        >>> weighting = DWA(temperature=2.0)
        >>> for losses in ([4.0, 4.0], [2.0, 4.0]):  # the first task halves its loss
        ...     _ = weighting(torch.tensor(losses))
        ...     weighting.end_epoch()
        >>> weighting(torch.tensor([1.0, 1.0]))
        tensor([0.8756, 1.1244])
    """

    _narrowest: ClassVar[torch.dtype] = torch.float64

    mean: Tensor
    count: Tensor
    last: Tensor
    before_last: Tensor
    epochs: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def setup(self) -> None:
        # Of the current epoch and the two before it. In float32, the rounding of each step adds up
        # to as much as differences between epochs are.
        for name in ("mean", "last", "before_last"):
            self.register_buffer(name, task_vector(0.0, self.num_tasks, dtype_of_sums()))
        for name in ("count", "epochs"):  # steps in this epoch, and epochs behind it, per task
            self.register_buffer(name, torch.zeros(self.num_tasks, dtype=torch.long))

    def check_state(self, state: Mapping[str, object]) -> None:
        means = ("mean", "last", "before_last")
        check_saved(self, state, counts=("count", "epochs"), finite=means)

    def forward(self, losses: Tensor) -> Tensor:
        if self.training:
            add_to_means(self.mean, self.count, losses.detach(), self.active)
        return self._weights().to(losses.dtype) * losses

    def _weights(self) -> Tensor:
        last, before = self.last[self.active], self.before_last[self.active]
        ratio = torch.where(before == 0, torch.where(last == 0, 1.0, _MAX_RATIO), last / before)
        ratio = torch.where(self.epochs[self.active] > 1, ratio, 1.0)
        ratio = ratio.clamp(-_MAX_RATIO, _MAX_RATIO)
        return len(ratio) * torch.softmax(ratio / self.temperature, 0)

    def end_epoch(self) -> None:
        """Close an epoch: its means become the last ones, for every task that was active in it."""
        seen = self.count > 0
        self.before_last = torch.where(seen, self.last, self.before_last)
        self.last = torch.where(seen, self.mean, self.last)
        self.epochs += seen
        self.mean.zero_()
        self.count.zero_()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
