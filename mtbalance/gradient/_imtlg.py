from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice, count_fallback
from mtbalance._gramians import (
    ZERO_ROW,
    Arithmetic,
    Number,
    equiangular,
    unit_rows,
    weights_of_pair,
    weights_on_cpu,
)

from ._base import GramianStrategy

_LEAST_SUM = 1e-12
"""Weights whose sum is a smaller part of their sizes have none that they could be divided by."""


class IMTLG(GramianStrategy):
    r"""Weigh the gradients so that the direction has the same projection on each of them.

    With the unit vectors :math:`u_i = g_i / |g_i|` of the m task gradients and their cosines
    :math:`C_{ij} = \langle u_i, u_j \rangle`,

    .. math::
        d = m \sum_i \frac{v_i}{|\sum_j v_j|} g_i, \qquad v_i = \frac{(C^{-1} 1)_i}{|g_i|},

    so that :math:`\langle u_i, d \rangle` is the same for every task: 1 over the size of the sum,
    times m. Weights may be negative. For two tasks they are :math:`2 |g_2| / (|g_1| + |g_2|)` and
    :math:`2 |g_1| / (|g_1| + |g_2|)`, whatever the angle.

    Args:
        normalize: ``"absolute"`` as above: no projection is negative. ``"official"`` to divide by
            the sum of the :math:`v_j` itself, as the paper does, so that the weights sum to m.
            Where the sum is negative, which happens from three tasks on, that direction is the
            opposite one: every task loses.

    Note:
        The direction may be much longer than the gradients, as the sum of the :math:`v_j` may be
        small. If it vanishes (is below 1e-12 of the sum of their sizes), nothing can be divided by
        it. Then d is the projection of the sum of the gradients on the same line, as in ConFIG;
        ``fallbacks`` counts such steps.

        If the gradients depend on each other, the inverse is the Moore-Penrose inverse of C, which
        makes projections equal in the sense of least squares. That of the Gramian and the paper's
        inverse of a matrix of differences, which is singular then, give other directions. Dependent
        are gradients of which a combination of unit vectors is shorter than 1e-6 (times the root of
        m). A task whose gradient is zero changes nothing, and does not count in m.

        The Gramian knows combinations of unit vectors that are as short as s to a relative
        1e-16 / s^2, so that the direction is as uncertain where gradients are nearly dependent.

    References:
        Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.1,
        https://openreview.net/forum?id=IMPnRXEWpvr.

    Example:
        >>> import torch
        >>> IMTLG()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # weights 3/2 and 1/2
        tensor([1.5000, 1.5000])
    """

    def __init__(self, normalize: Literal["absolute", "official"] = "absolute") -> None:
        super().__init__()
        check_choice("normalize", normalize, ["absolute", "official"])
        self.normalize = normalize

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2:
            return weights_of_pair(_weights_of_pair, gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        weights = torch.ones(len(gramian), dtype=torch.float64, device="cpu")
        rows = unit_rows(gramian)
        if len(rows.numbers) == 0:
            return weights
        x = equiangular(rows.cosines, torch.ones_like(rows.norms))
        shares = x.coefficients * (rows.norms.min() / rows.norms)
        total = float(shares.sum())
        if abs(total) > _LEAST_SUM * float(shares.abs().sum()):
            divisor = total if self.normalize == "official" else abs(total)
            weights[rows.numbers] = len(shares) * shares / divisor
            return weights
        count_fallback(self, "the weights sum to zero: their direction gets the length of ConFIG")
        projection = float((rows.norms / rows.norms.min()) @ x.products)
        factor = projection / x.squared_length if x.squared_length > 0 else 0.0
        weights[rows.numbers] = factor * shares
        return weights

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}"


def _weights_of_pair(
    a: Number, h: Number, b: Number, of: Arithmetic[Number]
) -> tuple[Number, Number]:
    """Return 2 n2 / (n1 + n2) and 2 n1 / (n1 + n2) for the norms n1, n2; 1 if one is zero."""
    del h
    least = ZERO_ROW**2 * of.larger(a, b)
    has_a, has_b = a > least, b > least
    one, other = of.sqrt(of.where(has_a, a, 1.0)), of.sqrt(of.where(has_b, b, 1.0))
    x, y = 2 / (1 + one / other), 2 / (1 + other / one)
    return (
        of.where(has_a, of.where(has_b, x, 1.0), 1.0),
        of.where(has_b, of.where(has_a, y, 1.0), 1.0),
    )
