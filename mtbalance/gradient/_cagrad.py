import math
from typing import Literal

import torch
from torch import Tensor

from mtbalance._active_set import minimize_linear_plus_norm, project_on_dual_cone
from mtbalance._checks import check_at_least, check_choice
from mtbalance._gramians import (
    RESOLUTION,
    ZERO_ROW,
    Arithmetic,
    Number,
    UnitRows,
    norm_of,
    unit_rows,
    vanishes,
    weights_of_pair,
    weights_on_cpu,
)
from mtbalance._pivoting import FEW, dot, minimize_by_pivoting, minimize_for_few

from ._base import GramianStrategy

_LEAST_SQUARED_SINE = 1e-20
"""Below the resolution of a float64 Gramian (its square root is 1e-10), and not zero."""


class CAGrad(GramianStrategy):
    r"""Help the worst-off task the most, while staying close to the mean gradient.

    With the mean :math:`g_0` of the m task gradients, the direction solves

    .. math::
        \max_d \min_i \langle g_i, d \rangle \quad \text{subject to} \quad |d - g_0| \le c |g_0|.

    Its dual lives on the probability simplex and needs the Gramian alone: for the weights w that
    minimise :math:`\langle g_w, g_0 \rangle + c |g_0| |g_w|`, with :math:`g_w = \sum_i w_i g_i`,

    .. math:: d = \frac{m}{s} \Bigl( g_0 + c |g_0| \frac{g_w}{|g_w|} \Bigr),

    with the divisor s chosen by ``rescale``. Solved exactly for the Gramian in float64: in closed
    form for two tasks, else by pivoting between sets of tasks that count, until the duality gap is
    closed.

    Args:
        c: Radius of the ball as a fraction of the mean gradient's length, at least 0; 0 gives the
            plain sum. From 1 on, no task is ever in conflict with the result, but nothing
            guarantees convergence to a minimum of the mean loss. Source of 0.4: the paper's NYUv2
            experiments.
        rescale: Divisor s: 0 for 1, 1 for 1 + c^2, 2 for 1 + c. Source of 1: the authors' trainers.

    Note:
        The authors' code stops SciPy's SLSQP at an absolute 1e-6 and adds 1e-8 under its roots,
        which moves the direction by up to 100 % where gradients are small. Where some combination
        of the rows vanishes and the best worst case is 0, the maximiser is not unique; here it is
        the projection of the mean on the cone of directions that conflict with no task (the
        authors' code returns the mean plus noise). A task whose gradient is zero counts in the mean
        and is otherwise left out.

        With c above 1, rows that are opposite up to a small angle are told apart by the Gramian's
        last digits. The direction is then off, and conflicts with a task, by about the rounding of
        float64 over the angle's square: 2e-8 of its length at 1e-4, 1e-6 at 1e-5, 1e-4 at 1e-6.

    References:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021,
        Algorithm 1 and equation (4), https://arxiv.org/abs/2110.14048.

    Example:
        >>> import torch
        >>> CAGrad(c=0.5, rescale=0)(torch.eye(2))  # by symmetry 1 + c times the sum
        tensor([1.5000, 1.5000])
    """

    def __init__(self, c: float = 0.4, rescale: Literal[0, 1, 2] = 1) -> None:
        super().__init__()
        self.c = check_at_least("c", c, 0)
        check_choice("rescale", rescale, [0, 1, 2])
        self.rescale = rescale

    @property
    def growth(self) -> float:
        return (1 + self.c) / self._divisor

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2:
            return weights_of_pair(self._weights_of_pair, gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        if len(gramian) <= FEW:
            weights = self._weights_of_few(gramian.tolist())
            if weights is not None:
                return torch.tensor(weights, dtype=torch.float64, device="cpu")
        return (1 + len(gramian) * self._pull(gramian)) / self._divisor

    @property
    def _divisor(self) -> float:
        return [1, 1 + self.c * self.c, 1 + self.c][self.rescale]

    def _weights_of_pair(
        self, a: Number, h: Number, b: Number, of: Arithmetic[Number]
    ) -> tuple[Number, Number]:
        r"""Return the weights of two tasks in closed form, without branches.

        Where both count, d points to the foot of the perpendicular from zero to the line through
        both, :math:`(b - h, a - h) / D` with :math:`D = a + b - 2 h`; added to the mean is

        .. math::
            \frac{(\rho (b - h) - (a - b) / 2, \; \rho (a - h) + (a - b) / 2)}{D},
            \qquad \rho^2 = c^2 + (c^2 - 1) \frac{(a - b)^2}{4 (a b - h^2)}.

        If one of these is negative, or :math:`\rho^2` is, the task with the shorter gradient counts
        alone.
        """
        where, positive, sqrt = of.where, of.positive, of.sqrt
        scale = of.larger(a, b)
        scale = where(scale > 0, scale, 1.0)
        a, h, b = a / scale, h / scale, b / scale
        has_a, has_b = a > ZERO_ROW**2, b > ZERO_ROW**2
        c_squared = self.c * self.c
        radius = self.c / 2 * sqrt(positive(a + 2 * h + b))
        half = (a - b) / 2
        determinant = of.larger(a * b - h * h, _LEAST_SQUARED_SINE * a * b)
        determinant = where(determinant > 0, determinant, 1.0)
        rho = sqrt(positive(c_squared + (c_squared - 1) * half * half / determinant))
        x, y = rho * (b - h) - half, rho * (a - h) + half
        x, y = where(has_a, x, 0.0), where(has_a, y, 1.0)
        x, y = where(has_b, x, 1.0), where(has_b, y, 0.0)
        # Rows that are equal have neither positive: any weights will do.
        x, y = where(y > 0, positive(x), 1.0), where(x > 0, positive(y), 1.0)

        apart = x * x * a + y * y * b
        squared_length = apart + 2 * x * y * h
        pull = radius / sqrt(where(squared_length > 0, squared_length, 1.0))
        # Opposite rows: the projection of the mean on the cone of directions without conflict.
        kink = squared_length <= RESOLUTION * apart
        x = where(kink, positive(-a - h) / (2 * where(has_a, a, 1.0)), pull * x)
        y = where(kink, positive(-b - h) / (2 * where(has_b, b, 1.0)), pull * y)
        return (1 + 2 * x) / self._divisor, (1 + 2 * y) / self._divisor

    def _weights_of_few(self, gramian: list[list[float]]) -> list[float] | None:
        """Return the weights of tasks that all have a gradient, if the fast way leads there."""
        norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(gramian)]
        largest, smallest = max(norms), min(norms)
        if smallest <= ZERO_ROW * largest:
            return None
        cosines = [
            [g / (n * x) for g, x in zip(row, norms, strict=True)]
            for row, n in zip(gramian, norms, strict=True)
        ]
        mean = [n / largest for n in norms]
        linear = [dot(row, mean) for row in cosines]
        radius = self.c * math.sqrt(max(dot(mean, linear), 0.0))
        sizes = [smallest / n for n in norms]
        step = minimize_for_few(cosines, linear, radius, sizes) if radius else [0.0] * len(norms)
        if step is None:
            return None
        return [(1 + s / x) / self._divisor for s, x in zip(step, mean, strict=True)]

    def _pull(self, gramian: Tensor) -> Tensor:
        """Return the coefficients, shape (m,), of what is added to the mean gradient."""
        m = len(gramian)
        rows = unit_rows(gramian)
        pull = torch.zeros(m, dtype=torch.float64, device="cpu")
        if len(rows.numbers) == 0:
            return pull
        mean = rows.norms / rows.norms.max()  # in units of the largest norm, times m
        linear = rows.cosines @ mean
        radius = self.c * math.sqrt(max(float(mean @ linear), 0.0))
        if radius == 0:
            return pull
        sizes = rows.norms.min() / rows.norms
        y = minimize_by_pivoting(rows.cosines, linear, radius, sizes)
        if y is None or vanishes(y, rows.cosines):
            step = self._step_near_the_kink(rows, mean, linear, radius, sizes, y)
        else:
            step = y * (radius / norm_of(y, rows.cosines))
        pull[rows.numbers] = step / (m * mean)
        return pull

    def _step_near_the_kink(
        self,
        rows: UnitRows,
        mean: Tensor,
        linear: Tensor,
        radius: float,
        sizes: Tensor,
        vanishing: Tensor | None,
    ) -> Tensor:
        """Return the step from the mean where some combination vanishes, or the face was not found.

        Args:
            rows: The rows that are not zero.
            mean: Their mean's coefficients; the step is in the same units.
            linear: Inner products of the mean with the unit rows.
            radius: Of the ball.
            sizes: Inverse norms, the largest of which is 1.
            vanishing: Weights of a combination that vanishes, if known.
        """
        multipliers = project_on_dual_cone(rows.cosines, mean)
        distance = norm_of(multipliers, rows.cosines)
        # If the ball does not reach the dual cone, the optimum is negative; starting from a
        # negative value keeps away from the kink, whose value is zero.
        reaches = distance <= radius
        if reaches:
            if vanishing is None:
                nearest = minimize_by_pivoting(rows.cosines, torch.zeros_like(linear), 1.0, sizes)
                if nearest is not None and vanishes(nearest, rows.cosines):
                    vanishing = nearest
            if vanishing is not None:
                return multipliers
            step, start = multipliers, 1 / sizes
        else:
            face = multipliers.nonzero()[:, 0].tolist()
            y = minimize_by_pivoting(rows.cosines, linear, radius, sizes, face)
            if y is not None and not vanishes(y, rows.cosines):
                return y * (radius / norm_of(y, rows.cosines))
            step, start = multipliers * (radius / distance), multipliers
        y = minimize_linear_plus_norm(
            rows.cosines, linear, radius, sizes, start / (sizes @ start), may_vanish=reaches
        )
        if y is None:
            return step
        return self._better(rows, linear, radius, y * (radius / norm_of(y, rows.cosines)), step)

    def _better(
        self, rows: UnitRows, linear: Tensor, radius: float, walked: Tensor, step: Tensor
    ) -> Tensor:
        """Return the better of two steps: near the kink, rounding may hide it from the walk."""
        worst = [float((rows.norms * (linear + rows.cosines @ s)).min()) for s in (walked, step)]
        slack = 1e-12 * float(rows.norms.max()) * radius / self.c
        return walked if worst[0] >= worst[1] - slack else step

    def extra_repr(self) -> str:
        return f"c={self.c}, rescale={self.rescale}"
