from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice, check_fraction
from mtbalance._gramians import (
    RESOLUTION,
    ZERO_ROW,
    Arithmetic,
    Number,
    numbers_of_pair,
    weights_of_pair,
    weights_on_cpu,
)

from ._base import Preference, PreferringStrategy


class AlignedMTL(PreferringStrategy):
    r"""Replace the task gradients by the nearest ones that are orthogonal and equally long.

    With the Gramian of the m task gradients, :math:`G = V \Lambda V^T`, over its eigenvalues
    :math:`\lambda` that are not zero, and preferences p (1 each by default),

    .. math:: d = \sum_i (B p)_i \, g_i, \qquad B = \sqrt{s} \, V \Lambda^{-1/2} V^T,

    where s is the least, the (lower) median or the mean eigenvalue, chosen by ``scale``. The rows
    of :math:`B J` have the Gramian :math:`B G B = s I` on the range of G; with full rank and equal
    preferences, :math:`|d|^2 = m s`. Two tasks have a closed form.

    Args:
        scale: ``"min"``, ``"median"`` or ``"rmse"``. Source of ``"min"``: the paper's equation (9),
            for which no step is longer than that of the sum.
        rtol: Eigenvalues of at most this fraction of the largest count as zero, from 0 to 1. None
            for 16 times float64's rounding for each row: what the Gramian can tell from zero.
        preference: One positive number per task: a mapping from task name, or a sequence in the
            order of the tasks. None for no preference.

    Note:
        With ``"min"`` the length of the direction is that of the weakest one that counts, so that
        it jumps where an eigenvalue becomes zero: rows that are dependent up to the rounding of
        their own dtype, say, make a very short direction. The authors' code takes m times float32's
        rounding for ``rtol`` in every dtype (pass ``rtol=m * 1.2e-7`` for the same), which takes
        tasks whose gradients are about 2000 times shorter than the longest for absent. The result
        may conflict with a task, even of two. A task whose gradient is zero gets the weight 0.

    References:
        Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
        Algorithm 1, https://arxiv.org/abs/2305.19000.

    Example:
        >>> import torch
        >>> AlignedMTL()(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))  # both shortened to 3
        tensor([3., 3.])
    """

    def __init__(
        self,
        scale: Literal["min", "median", "rmse"] = "min",
        rtol: float | None = None,
        preference: Preference | None = None,
    ) -> None:
        super().__init__(preference)
        check_choice("scale", scale, ["min", "median", "rmse"])
        self.scale = scale
        self.rtol = None if rtol is None else check_fraction("rtol", rtol)

    @property
    def growth(self) -> float | None:
        if self.scale != "min":
            return None  # a short row alone in its direction may get any weight
        # s <= lambda for each eigenvalue: |d|^2 <= p^T G p, the squared length of sum_i p_i g_i.
        if self.preference is None:
            return 1.0
        given = self.preference
        numbers = list(given.values()) if isinstance(given, dict) else list(given)
        return max(numbers) * len(numbers) / sum(numbers)

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2:
            return self._weights_of_pair(gramian, self.preferences(gramian))
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        preferences = self.preferences(gramian)
        squared_norms = gramian.diagonal()
        alive = squared_norms > ZERO_ROW**2 * squared_norms.max()
        if not alive.any():
            return preferences
        weights = torch.zeros_like(preferences)
        gramian = gramian[alive][:, alive] / squared_norms.max()
        weights[alive] = self._aligned(gramian, preferences[alive])
        return weights

    def _aligned(self, gramian: Tensor, preferences: Tensor) -> Tensor:
        """Return the weights of rows that are not zero."""
        values, vectors = _eigen(gramian)
        kept = values > self._rtol(len(gramian)) * values[-1]
        kept[-1] = True
        values, vectors = values[kept], vectors[:, kept]
        if self.scale == "min":
            s = values[0]
        else:
            s = values.median() if self.scale == "median" else values.mean()
        weights: Tensor = (vectors * (s / values).sqrt()) @ (vectors.T @ preferences)
        return weights

    def _rtol(self, m: int) -> float:
        return RESOLUTION * m if self.rtol is None else self.rtol

    def _weights_of_pair(self, gramian: Tensor, preferences: Tensor) -> Tensor:
        r"""Return the weights of two tasks in closed form, without branches.

        With :math:`\delta = \sqrt{\det G}` and the eigenvalues :math:`\lambda \ge \mu`, the root of
        G is :math:`(G + \delta I) / (\sqrt\lambda + \sqrt\mu)` and :math:`\delta^2 = \lambda \mu`,
        so that :math:`\delta G^{-1/2}` is the adjugate of the root. Where :math:`\mu` counts as
        zero, B is the projector on the other eigenvector, :math:`(G - \mu I) / (\lambda - \mu)`.
        """
        p, q = numbers_of_pair(preferences)
        rtol, is_rmse = self._rtol(2), self.scale == "rmse"

        def pair(a: Number, h: Number, b: Number, of: Arithmetic[Number]) -> tuple[Number, Number]:
            where, positive, sqrt = of.where, of.positive, of.sqrt
            scale = of.larger(a, b)
            scale = where(scale > 0, scale, 1.0)
            a, h, b = a / scale, h / scale, b / scale
            determinant = positive(a * b - h * h)
            high = (a + b + sqrt((a - b) * (a - b) + 4 * h * h)) / 2
            high = where(high > 0, high, 1.0)
            low = determinant / high
            alone = low <= rtol * high
            delta, gap = sqrt(determinant), where(high > low, high - low, 1.0)
            # sqrt(s) / delta is 1 / sqrt(high) for s = low, the median of two as well.
            stretch = 1 / ((sqrt(high) + sqrt(low)) * sqrt(high))
            if is_rmse:
                stretch = stretch * sqrt((a + b) / (2 * where(alone, 1.0, low)))
            x = where(alone, ((a - low) * p + h * q) / gap, stretch * ((b + delta) * p - h * q))
            y = where(alone, ((b - low) * q + h * p) / gap, stretch * ((a + delta) * q - h * p))
            nothing = a + b <= 0
            return where(nothing, p, x), where(nothing, q, y)

        return weights_of_pair(pair, gramian)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}, rtol={self.rtol}"


def _eigen(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a Gramian, shape (k,), in rising order, and its eigenvectors.

    ``eigh`` knows all eigenvalues up to the rounding of the largest, so hardly those of short rows.
    The Cholesky factor of the rows in falling order of their lengths is as exact for each row, and
    its squared singular values are the eigenvalues.
    """
    order = gramian.diagonal().argsort(descending=True)
    factor, info = torch.linalg.cholesky_ex(gramian[order][:, order])
    if int(info) != 0:  # dependent rows
        values, vectors = torch.linalg.eigh(gramian)
        return values, vectors
    vectors, roots, _ = torch.linalg.svd(factor)
    return roots.flip(0).square(), vectors.flip(1)[order.argsort()]
