import math
from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice, count_fallback
from mtbalance._gramians import (
    RESOLUTION,
    ZERO_ROW,
    Arithmetic,
    Number,
    numbers_of_pair,
    unit_rows,
    weights_of_pair,
    weights_on_cpu,
)
from mtbalance._newton import STATIONARY, balance_gains

from ._base import Preference, PreferringStrategy

_NEARLY_OPPOSITE = 4 * RESOLUTION
"""Two unit rows of which the mean's squared length is half of this cannot be told from opposite."""


class NashMTL(PreferringStrategy):
    r"""Find the direction that the tasks would agree on as the players of a bargaining game.

    The Nash bargaining solution maximises the product of what the m tasks gain,
    :math:`\prod_i \langle g_i, d \rangle^{p_i}`, over directions of one length. With the Gramian G
    of the task gradients and preferences p (1 each by default, as in the paper),

    .. math:: d = s \sum_i a_i g_i, \qquad a > 0, \quad (G a)_i = p_i / a_i,

    so that each task gets the share :math:`a_i \langle g_i, d \rangle` that it is to have, and how
    long its gradient is does not matter for where d points. The length of d before the factor s is
    :math:`\sqrt{\sum_i p_i}`, whatever the gradients. Solved exactly by Newton's method on the
    Gramian of the unit rows; in closed form for two tasks.

    Args:
        scale: Factor s: ``"sum"`` for the root of the Frobenius norm of G, with which m equal rows
            give m times the row, or ``"official"`` for 1. Source of ``"sum"``: the scale of the
            other strategies, so that the learning rate stays.
        preference: One positive number per task: a mapping from task name, or a sequence in the
            order of the tasks. None for no preference.

    Note:
        The authors' code clips the gradient to a length of 1 after this, which with their scale
        always applies: it amounts to normalised gradient descent. Their solver is stopped after at
        most 20 steps, keeps the weights of the step before when it fails, and leaves equal weights
        where the gradients are shorter than about 0.03. Preferences are those of AuxiNash.

        A task whose gradient is zero gains nothing from any direction; it is left out and gets the
        weight 0. Where a convex combination of the other rows vanishes, or cannot be told from zero
        by the Gramian, no direction serves all of them, and all weights are 0: MGDA's answer, the
        shortest convex combination, vanishes. It is counted as a fallback (but for two tasks on an
        accelerator, which is not waited for). So is an answer that is not known to be right to 1e-5
        of d's length, with weights of 0, too: seen for preferences 1e8 apart. Rows that nearly
        cancel, up to an angle t, are told apart to float64's rounding over t squared.

    References:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, Claim 3.1,
        https://arxiv.org/abs/2202.01017. Preferences: Shamsian et al., "Auxiliary Learning as an
        Asymmetric Bargaining Game", ICML 2023, https://arxiv.org/abs/2301.13501.

    Example:
        >>> import torch
        >>> NashMTL("official")(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))  # of length sqrt(2)
        tensor([1., 1.])
    """

    def __init__(
        self, scale: Literal["sum", "official"] = "sum", preference: Preference | None = None
    ) -> None:
        super().__init__(preference)
        check_choice("scale", scale, ["sum", "official"])
        self.scale = scale

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2:
            if gramian.is_cpu:
                self._count_opposite(gramian.tolist())
            return self._weights_of_pair(gramian, self.preferences(gramian))
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        preferences = self.preferences(gramian)
        rows = unit_rows(gramian)
        if len(rows.numbers) == 0:
            return preferences
        weights = torch.zeros_like(preferences)
        balance = balance_gains(rows.cosines, preferences[rows.numbers].log(), 1.0)
        if isinstance(balance, str):
            count_fallback(self, balance)
            return weights
        weights[rows.numbers] = balance.x * math.exp(balance.log_scale) / rows.norms
        if self.scale == "sum":
            largest = rows.norms.max()
            weights *= (gramian / largest**2).norm().sqrt() * largest
        return weights

    def _count_opposite(self, gramian: list[list[float]]) -> None:
        (a, h), (_, b) = gramian
        both = min(a, b) > ZERO_ROW**2 * max(a, b)
        if both and 1 + h / (math.sqrt(a) * math.sqrt(b)) <= _NEARLY_OPPOSITE:
            count_fallback(self, STATIONARY)

    def _weights_of_pair(self, gramian: Tensor, preferences: Tensor) -> Tensor:
        r"""Return the weights of two tasks in closed form, without branches.

        With :math:`x_i = a_i |g_i|` and the cosine r, :math:`x_1^2 + r x_1 x_2 = p` and
        :math:`x_2^2 + r x_1 x_2 = q`, so that :math:`t = x_1 x_2` solves
        :math:`(1 - r^2) t^2 + r (p + q) t = p q`.
        """
        p, q = numbers_of_pair(preferences)
        to_sum = self.scale == "sum"

        def pair(a: Number, h: Number, b: Number, of: Arithmetic[Number]) -> tuple[Number, Number]:
            where, positive, sqrt = of.where, of.positive, of.sqrt
            scale = of.larger(a, b)
            scale = where(scale > 0, scale, 1.0)
            root = sqrt(scale)
            a, h, b = a / scale, h / scale, b / scale
            has_a, has_b = a > ZERO_ROW**2, b > ZERO_ROW**2
            n, o = sqrt(where(has_a, a, 1.0)), sqrt(where(has_b, b, 1.0))
            cosine = h / (n * o)
            squared_sine = positive(n * n * o * o - h * h) / (n * n * o * o)
            linear = cosine * (p + q)
            bent = sqrt(linear * linear + 4 * squared_sine * p * q)
            agree = linear >= 0
            t = where(agree, 2 * p * q, bent - linear) / where(
                agree, linear + bent, where(squared_sine > 0, 2 * squared_sine, 1.0)
            )
            first = p >= q  # the larger of x by its root, and the other without cancellation
            larger = sqrt(positive(where(first, p, q) - cosine * t))
            other = t / where(larger > 0, larger, 1.0)
            factor = sqrt(sqrt(a * a + 2 * h * h + b * b)) if to_sum else 1 / root
            x, y = (
                where(first, larger, other) * factor / n,
                where(first, other, larger) * factor / o,
            )
            opposite = 1 + cosine <= _NEARLY_OPPOSITE
            x, y = where(opposite, 0.0, x), where(opposite, 0.0, y)
            x, y = where(has_b, x, sqrt(p) * factor / n), where(has_b, y, 0.0)
            x, y = where(has_a, x, 0.0), where(has_a, y, sqrt(q) * factor / o)
            nothing = a + b <= 0
            # Comparisons pass NaN by.
            bad = 0 * (a + b)
            return where(nothing, p, x) + bad, where(nothing, q, y) + bad

        return weights_of_pair(pair, gramian)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"
