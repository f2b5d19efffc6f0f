import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from mtbalance._checks import check_count

from ._base import GradientStrategy


class TrimmedMean(GradientStrategy):
    r"""Leave the largest and the smallest entries of each coordinate out, and average the others.

    With the m entries of a coordinate in order, :math:`x_{(1)} \le \dots \le x_{(m)}`, on the scale
    of the sum,

    .. math:: d = \frac{m}{m - 2 t} \sum_{i = t + 1}^{m - t} x_{(i)}.

    The method is made for gradients of one loss that come from machines some of which lie. Between
    tasks it is a baseline: outliers are ignored, however useful they are.

    Args:
        trim: How many entries t are left out at each end, at least 0, which is the plain sum. More
            than 2 t tasks are needed.

    Note:
        The paper gives t as a fraction of m. Where absent tasks leave 2 t or fewer, as many are
        left out as leave one or two: d is m times the median. TorchJD returns the mean, a factor m
        less, and raises there. An entry that is not finite is no outlier but an error, and makes
        its coordinate NaN; there it is trimmed like others, and training goes on.

    References:
        Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
        2018, Definition 2, https://arxiv.org/abs/1803.01498.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0], [-90.0, 3.0]])
        >>> TrimmedMean(trim=1)(gradients)  # 4 times the means of 1 and 2, and of 1 and 3
        tensor([6., 8.])
    """

    coordinatewise = True

    def __init__(self, trim: int) -> None:
        super().__init__()
        self.trim = check_count("trim", trim, 0)

    @property
    def growth(self) -> float:
        # Of k entries kept, beyond those of either sign lie t more, at least as large: they are at
        # most k / (k + t) of the sum of all sizes. That is m / (m - t) times as much after scaling,
        # which is largest for the fewest tasks, 2 t + 1.
        return (2 * self.trim + 1) / (self.trim + 1)

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Check that there are tasks enough.

        Raises:
            ValueError: If there are not.
        """
        if len(tasks) <= 2 * self.trim:
            raise ValueError(
                f"`trim` must be less than half the number of tasks, {len(tasks)}, but got "
                f"{self.trim}."
            )
        return super().bind(tasks, groups)

    def forward(self, gradients: Tensor) -> Tensor:
        m = len(gradients)
        trim = min(self.trim, (m - 1) // 2)
        rows = list(gradients.to(torch.promote_types(gradients.dtype, torch.float32)).unbind(0))
        if trim:
            _sort(rows)
        kept = rows[trim : m - trim]
        # From both ends inwards, so that turning all signs turns that of the sum, to the last bit.
        half, is_odd = divmod(len(kept), 2)
        parts = [low + high for low, high in zip(kept[:half], kept[: -half - 1 : -1], strict=True)]
        parts += kept[half : half + is_odd]
        total = functools.reduce(torch.add, parts) * (m / len(kept))
        if trim:  # what is not finite is at an end now, and comes out
            total = total + 0 * rows[0] + 0 * rows[-1]
        return total.to(gradients.dtype)

    def extra_repr(self) -> str:
        return f"trim={self.trim}"


def _sort(rows: list[Tensor]) -> None:
    """Bring each coordinate of the rows in order; next to NaN, all of it may turn NaN.

    By exchanging neighbours: whole rows at a time, ten times as fast as sorting short columns.
    """
    for step in range(len(rows)):
        for i in range(step % 2, len(rows) - 1, 2):
            low, high = rows[i], rows[i + 1]
            rows[i], rows[i + 1] = torch.minimum(low, high), torch.maximum(low, high)
