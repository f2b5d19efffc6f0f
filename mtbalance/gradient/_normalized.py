from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice
from mtbalance._gramians import ZERO_ROW, gramian_in_range
from mtbalance._rows import at_least_float32, combine, is_finite

from ._base import GradientStrategy, WrappingStrategy


class Normalized(WrappingStrategy):
    r"""Bring all task gradients to one length before a strategy gets them.

    .. math:: d = \text{strategy}(t\, u_1, \dots, t\, u_m), \qquad u_i = \frac{g_i}{|g_i|}

    with :math:`g_i` the gradient of task i, already times its weight, and t the common length. A
    row that vanishes next to the longest (1e-30 of it) has no direction: it is taken for zero, and
    does not count in t. The gradients of a task are one row, over all parameters that are balanced
    together; each group has lengths of its own.

    Whatever factor a loss or its weight has is lost, but for what it adds to t: with this around
    the gradient strategy, a weighting decides about the length of the step and about parameters of
    single tasks alone.

    Args:
        strategy: Any gradient strategy, which then gets rows of one length. The costs are its own:
            lengths are read off the Gramian, and rows are not written to.
        scale: What t is of the lengths: their ``"mean"``, by which m equal rows still give what
            the strategy gives for them, so that the learning rate may stay; their ``"max"``, as in
            DB-MTL; or their ``"min"``.

    References:
        Chen et al., "GradNorm", ICML 2018, https://arxiv.org/abs/1711.02257, for the mean; Lin et
        al., "Dual-Balancing for Multi-Task Learning", https://arxiv.org/abs/2308.12029, equation
        (3), for the maximum of the lengths with ``Sum``.

    Example:
        >>> import torch
        >>> from mtbalance.gradient import Sum
        >>> Normalized(Sum())(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([2., 2.])
    """

    def __init__(
        self, strategy: GradientStrategy, scale: Literal["mean", "max", "min"] = "mean"
    ) -> None:
        super().__init__(strategy)
        check_choice("scale", scale, ["mean", "max", "min"])
        self.scale = scale
        self.by_gramian = strategy.by_gramian or strategy.is_sum
        self.coordinatewise = strategy.coordinatewise and not self.by_gramian

    @property
    def growth(self) -> float | None:
        # Of the "max", the sum of the lengths may grow as many times as there are rows.
        return None if self.scale == "max" else self.strategy.growth

    def _factors(self, gramian: Tensor) -> Tensor:
        """Return what brings each row to the common length; 0 for those without a direction."""
        gramian = gramian.detach().double()
        lengths = gramian.diagonal().clamp_min(0).sqrt()
        alive = lengths > ZERO_ROW * lengths.max()
        if self.scale == "max":
            length = lengths.max()
        elif self.scale == "min":
            length = torch.where(alive, lengths, torch.inf).min()
        else:  # divided by the largest, lengths cannot add up to more than float64 holds
            largest = torch.where(alive.any(), lengths.max(), 1.0)
            length = (lengths / largest * alive).sum() / alive.sum().clamp_min(1) * largest
        return torch.where(alive, length / torch.where(alive, lengths, 1.0), 0.0)

    def row_factors(self, gramian: Tensor) -> Tensor:
        factors = self._factors(gramian)
        inner = self.strategy.row_factors(gramian * factors * factors[:, None])
        return factors if inner is None else factors * inner

    def coefficients(self, gramian: Tensor, across: Tensor | None = None) -> Tensor | None:
        if not self.by_gramian:
            return None
        factors = self._factors(gramian)
        products = [p * factors * factors[:, None] for p in (gramian, across) if p is not None]
        solution = self.strategy.coefficients(*products)
        return None if solution is None else factors * solution

    def on_columns(self, gradients: Tensor, first: int) -> Tensor:
        return self.strategy.on_columns(gradients, first)

    def forward(self, gradients: Tensor) -> Tensor:
        gramian = gramian_in_range(gradients)
        if not is_finite(gramian):
            return torch.full_like(gradients[0], torch.nan)
        solution = self.coefficients(gramian)
        if solution is not None:
            (direction,) = combine([[row] for row in gradients.detach()], solution)
            return torch.zeros_like(gradients[0]) if direction is None else direction
        factors = self._factors(gramian)
        wide = gradients.to(at_least_float32(gradients.dtype))
        return self.strategy.forward(wide * factors.to(wide)[:, None]).to(gradients.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"
