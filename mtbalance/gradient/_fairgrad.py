import math
from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice, check_positive, count_fallback
from mtbalance._gramians import UnitRows, unit_rows, weights_on_cpu
from mtbalance._newton import Balance, balance_gains

from ._base import GramianStrategy

_LARGEST_LOG = math.log(1e38)
"""Weights are to fit into the rows' dtype, float32 as a rule."""


class FairGrad(GramianStrategy):
    r"""Share out what the tasks gain by alpha-fairness, as bandwidth is shared in networks.

    Among directions of one length, d maximises :math:`\sum_i u_i^{1 - \alpha} / (1 - \alpha)` of
    the gains :math:`u_i = \langle g_i, d \rangle` (the sum of their logarithms for alpha = 1).
    With the Gramian G of the m task gradients,

    .. math:: d = s \sum_i w_i g_i, \qquad w > 0, \quad (G w)_i = w_i^{-1 / \alpha}.

    For alpha near 0 d points along the plain sum, projected so that no task loses; 1 is NashMTL,
    proportional fairness; 2 minimises the potential delay; the larger it is, the more d helps the
    task that gains least. Solved exactly by Newton's method on the Gramian of the unit rows.

    Args:
        alpha: Kind of fairness, positive. Source of 1: the authors' code, and the choice for which
            lengths of single gradients do not matter.
        scale: Factor s: ``"sum"`` for a length of d of :math:`\sqrt{m |G|_F}` for every alpha,
            which is that of NashMTL and with which m equal rows give m times the row; or
            ``"official"`` for 1. Source of ``"sum"``: the scale of the other strategies, so that
            the learning rate stays.

    Note:
        The official length grows with the power (1 - alpha) / (1 + alpha) of the gradients' (up to
        weights of 1e38); the authors' trainers multiply it by m and clip it to 1. Their solver,
        SciPy's least squares from equal weights, is off by a few percent where gradients are about
        1e-3 long, and altogether below 1e-6.

        A task whose gradient is zero gains nothing from any direction; it is left out (of m, too)
        and gets the weight 0. Where a convex combination of the other rows vanishes, or cannot be
        told from zero by the Gramian, no direction serves all of them, and all weights are 0, as
        MGDA's answer, the shortest convex combination, vanishes; that is counted as a fallback. So
        is an answer that is not known to be right to 1e-5 of d's length, with weights of 0, too:
        seen in a few of a hundred steps for norms ten decades apart and alpha far from 1.
        Rows that nearly cancel, up to an angle t, are told apart to float64's rounding over t
        squared.

    References:
        Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation (4) and
        Algorithm 1, https://arxiv.org/abs/2402.15638.

    Example:
        >>> import torch
        >>> FairGrad(alpha=3.0, scale="official")(torch.tensor([[1.0, 0.0], [0.0, 16.0]]))
        tensor([1.0000, 0.2500])
    """

    def __init__(self, alpha: float = 1.0, scale: Literal["sum", "official"] = "sum") -> None:
        super().__init__()
        self.alpha = check_positive("alpha", alpha)
        check_choice("scale", scale, ["sum", "official"])
        self.scale = scale

    def weights(self, gramian: Tensor) -> Tensor:
        return weights_on_cpu(self._solve, gramian)

    def _solve(self, gramian: Tensor) -> Tensor:
        rows = unit_rows(gramian)
        if len(rows.numbers) == 0:
            return torch.ones_like(gramian[0])
        weights = torch.zeros_like(gramian[0])
        # In units of the largest norm, x_i = w_i |g_i| has (C x)_i = |g_i|^(q - 1) x_i^(-q).
        power = 1 / self.alpha
        relative = rows.norms / rows.norms.max()
        balance = balance_gains(rows.cosines, (power - 1) * relative.log(), power)
        if isinstance(balance, str):
            count_fallback(self, balance)
            return weights
        weights[rows.numbers] = balance.x / relative * self._factor(rows, gramian, balance)
        return weights

    def _factor(self, rows: UnitRows, gramian: Tensor, balance: Balance) -> float:
        """Return by what to multiply the weights, for rows in units of the largest norm."""
        largest = float(rows.norms.max())
        if self.scale == "official":
            units = -2 * self.alpha / (1 + self.alpha) * math.log(largest)
            most = _LARGEST_LOG - float((balance.x * largest / rows.norms).max().log())
            return math.exp(max(-700.0, min(balance.log_scale + units, most)))
        squared = float(balance.x @ rows.cosines @ balance.x)
        spread = float((gramian / largest**2).norm())
        return math.sqrt(len(balance.x) * spread / squared)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, scale={self.scale!r}"
