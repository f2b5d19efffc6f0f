from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from mtbalance._checks import check_count, count_fallback
from mtbalance._gramians import RESOLUTION

from ._base import GramianStrategy


class Krum(GramianStrategy):
    r"""Follow the tasks whose gradients are nearest to those of most others.

    Of m gradients, of which f may be anything, each is scored by its squared distances to the
    m - f - 2 that are nearest to it, :math:`N_i`. The s gradients S with the lowest scores are
    averaged, on the scale of the sum:

    .. math::
        d = \frac{m}{s} \sum_{i \in S} g_i, \qquad
        \text{score}_i = \sum_{j \in N_i} |g_i - g_j|^2.

    The method is made for gradients of one loss that come from machines some of which lie. Between
    tasks it is a baseline: outliers are ignored, however useful they are.

    Args:
        byzantine: How many gradients f may be anything, at least 0. The paper's guarantee takes
            more than 2 f + 2 tasks, the scores at least f + 3.
        selected: How many gradients s are averaged, at least 1. Source of 1: Krum itself; more are
            the paper's Multi-Krum.

    Note:
        Scores that tie go by the number of the task, as in the paper: the lower ones are selected.
        They tie if they differ by less than the rounding of distances in a float64 Gramian, about
        4e-15 of the squared norms. With one neighbour each, m = f + 3, the nearest two always do.
        TorchJD returns the mean, a factor m less, scores by distances that are not squared, and
        leaves ties to chance.

        Where absent tasks leave fewer than f + 3, nobody can be scored, and d is the plain sum,
        which is counted as a fallback. Where they leave at most s, all are selected.

    References:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        NeurIPS 2017.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-90.0, 50.0]])
        >>> Krum(byzantine=1)(gradients)  # (1, 1) is as near to each as these to it: the first wins
        tensor([4., 0.])
    """

    def __init__(self, byzantine: int, selected: int = 1) -> None:
        super().__init__()
        self.byzantine = check_count("byzantine", byzantine, 0)
        self.selected = check_count("selected", selected)

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Check that there are tasks enough.

        Raises:
            ValueError: If there are not.
        """
        if len(tasks) < self.byzantine + 3:
            raise ValueError(
                f"`byzantine` must be at most 3 less than the number of tasks, {len(tasks)}, but "
                f"got {self.byzantine}. All but `byzantine` + 2 gradients are compared with each."
            )
        if len(tasks) < self.selected:
            raise ValueError(
                f"`selected` must be at most the number of tasks, {len(tasks)}, but got "
                f"{self.selected}."
            )
        return super().bind(tasks, groups)

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        nearest = m - self.byzantine - 2
        if nearest < 1:
            if m > 1:
                count_fallback(self, f"{m} gradients are fewer than {self.byzantine} + 3")
            return torch.ones_like(gramian[0])
        squares = gramian.detach().diagonal()
        sums = squares + squares[:, None]
        distances = (sums - 2 * gramian.detach()).clamp_min(0).fill_diagonal_(torch.inf)
        neighbours = distances.argsort(dim=1, stable=True)[:, :nearest]
        scores = distances.gather(1, neighbours).sum(1)
        rounding = RESOLUTION * sums.gather(1, neighbours).sum(1)

        selected = min(self.selected, m)
        last = scores.argsort(stable=True)[selected - 1 : selected]
        excess = scores - scores.gather(0, last)
        ties = excess.abs() <= rounding + rounding.gather(0, last)
        better = (excess < 0) & ~ties
        chosen = better | (ties & (ties.cumsum(0) <= selected - better.sum()))
        return chosen.to(gramian) * (m / selected) + 0 * squares.sum()  # comparisons pass NaN by

    def extra_repr(self) -> str:
        return f"byzantine={self.byzantine}, selected={self.selected}"
