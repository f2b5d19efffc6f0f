import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_count, check_saved
from mtbalance._remembered import TaskChange, dtype_of_sums
from mtbalance._rows import at_least_float32

from ._base import Weighting, task_vector


class GO4Align(Weighting):
    r"""Bring losses to one size, less of those that have been large, with one weight per group.

    In each step, over the m active tasks,

    .. math::
        p_i \propto p_i \, e^{-\eta L_i}, \qquad
        \gamma_i = p_i \, \frac{\sum_j L_j}{L_i}, \qquad
        w_i = \text{mean of } \gamma \text{ over the group of task } i,

    where p sums to 1 and starts at 1 / m, and the groups are those of the numbers :math:`\gamma`
    with the least squared distances from their means (k-means). Without groups, every weighted loss
    is :math:`p_i \sum_j L_j`: they sum to the sum of the losses, and equal losses have weights
    of 1. The weights are constants for the model: no derivative goes through them.

    p remembers the losses of all steps: :math:`-\log p_i` grows by :math:`\eta` times how far the
    losses of task i are, over time, above those of the others. So :math:`\eta` belongs to the scale
    of the losses and the length of the training. Only the tasks of a step share out what they have
    of p; that of a task which is absent stays. Losses count in training mode only.

    Losses must not be negative. A negative one makes the weights NaN, at which a Balancer raises. A
    loss of 0, or below the least normal number, has the weight 0 and is in no group.

    Args:
        groups: The number of groups, at least 1. 1 gives all tasks the same weight, and m or more
            each task its own. Source of the default: none fits all; 2 is the least that groups.
        eta: :math:`\eta`, at least 0; 0 leaves p equal. Source: the authors' code.

    Note:
        The groups are the best ones, found by dynamic programming on the sorted numbers, and of
        several equally good ones those with the smaller group at the large numbers: nothing is
        drawn, and nothing depends on the order of the tasks. They are chosen anew in each step, so
        that weights jump where a task changes its group. A step waits for m numbers from the
        device, and takes time as m squared times the number of groups.

    References:
        Shen, Wang, Xiao, van Noord and Worring, "GO4Align: Group Optimization for Multi-Task
        Alignment", NeurIPS 2024, https://arxiv.org/abs/2404.06486.

    Example:
        >>> import torch
        >>> weighting = GO4Align(groups=2, eta=0.0)
        >>> weighting(torch.tensor([1.0, 8.0, 9.0]))  # 18/3 / (1, 8, 9), the last two together
        tensor([6.0000, 5.6667, 6.3750])
    """

    asks_of_losses: ClassVar[str] = "It divides by them: losses must be at least 0."
    _narrowest: ClassVar[torch.dtype] = torch.float64

    log_share: Tensor

    def __init__(self, groups: int = 2, eta: float = 1e-4) -> None:
        super().__init__()
        self.groups = check_count("groups", groups)
        self.eta = check_at_least("eta", eta, 0)

    def setup(self) -> None:
        start = -math.log(self.num_tasks)
        self.register_buffer("log_share", task_vector(start, self.num_tasks, dtype_of_sums()))

    def check_state(self, state: Mapping[str, object]) -> None:
        check_saved(self, state, finite=("log_share",))

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what to load, with other tasks: shares that began as those of so many."""
        share = state.get("log_share")
        if isinstance(share, Tensor):
            begun = math.log(len(change.old)) - math.log(len(change.new))
            state = {**state, "log_share": share.detach() + begun}
        return super().carried(state, change)

    def forward(self, losses: Tensor) -> Tensor:
        wide = losses.detach().to(dtype_of_sums(losses.device))
        if self.training:
            self._share_out(wide)
        least = torch.finfo(at_least_float32(losses.dtype)).tiny
        vanished = (wide >= 0) & (wide < least)
        shares = torch.log_softmax(self.log_share[self.active].to(wide), 0)
        scaled = (shares + wide.sum().log() - wide.log()).exp()
        # Those that are 0 below are in no group.
        scaled = scaled.clamp(torch.finfo(wide.dtype).tiny, torch.finfo(losses.dtype).max)
        scaled = scaled.masked_fill(vanished & wide.isfinite().all(), 0)
        return losses.new_tensor(_grouped(scaled.tolist(), self.groups)) * losses

    def _share_out(self, losses: Tensor) -> None:
        """Take from the tasks with finite losses what they have of p, and share it out anew."""
        finite = torch.isfinite(losses)
        before = self.log_share[self.active]
        after = before - self.eta * losses.to(before)
        total, now = (
            torch.logsumexp(logs.masked_fill(~finite, -torch.inf), 0) for logs in (before, after)
        )
        self.log_share[self.active] = torch.where(finite, after + (total - now), before)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eta={self.eta}"


def _grouped(numbers: Sequence[float], groups: int) -> list[float]:
    """Return, for each number, the mean of its group; zeros are in none, and NaN makes all NaN."""
    if any(map(math.isnan, numbers)):
        return [math.nan] * len(numbers)
    order = sorted((i for i, number in enumerate(numbers) if number), key=numbers.__getitem__)
    ends = _ends_of_groups([numbers[i] for i in order], groups)
    means = [0.0] * len(numbers)
    for first, last in zip([0, *ends], ends, strict=False):
        members = order[first:last]
        mean = math.fsum(numbers[i] / len(members) for i in members)
        for i in members:
            means[i] = mean
    return means


def _ends_of_groups(numbers: Sequence[float], groups: int) -> list[int]:
    """Return where each of the groups of sorted numbers ends, with least squared distances."""
    count = len(numbers)
    groups = min(groups, count)
    # By a power of two, so that squares stay in range and equal costs equal.
    power = math.frexp(numbers[-1])[1] if numbers else 0
    points = [math.ldexp(number, -power) for number in numbers]
    # The least cost of the numbers before an end in so many groups, and where the last one begins.
    least = [[math.inf] * (count + 1) for _ in range(groups + 1)]
    begins = [[0] * (count + 1) for _ in range(groups + 1)]
    least[0][0] = 0.0
    for end in range(1, count + 1):
        mean = cost = 0.0
        for first in reversed(range(end)):  # one more number in the last group
            change = points[first] - mean
            mean += change / (end - first)
            cost += change * (points[first] - mean)
            for group in range(1, groups + 1):
                total = least[group - 1][first] + cost
                if total < least[group][end]:
                    least[group][end], begins[group][end] = total, first
    ends = [count] if count else []
    for group in range(groups, 1, -1):
        ends.append(begins[group][ends[-1]])
    return ends[::-1]
