import math

from torch import Tensor

from mtbalance._gramians import (
    ZERO_ROW,
    Arithmetic,
    Number,
    unit_rows,
    weights_of_pair,
    weights_on_cpu,
)
from mtbalance._projections import project_each_on_dual_cone

from ._base import PreferringStrategy


class UPGrad(PreferringStrategy):
    r"""Project each task's gradient so that it conflicts with no task, then add the projections.

    With the dual cone of the m task gradients, the set of directions that conflict with none,

    .. math::
        d = \sum_i p_i \, \pi(g_i), \qquad
        \pi(x) = \operatorname*{argmin}_{y} |y - x| \quad \text{subject to} \quad
        \langle g_j, y \rangle \ge 0 \text{ for all } j,

    where :math:`p_i` is the preference of task i. As the dual cone is convex, d is in it too: no
    task is in conflict with the result. Where no pair of tasks conflicts, d is the sum of the
    :math:`p_i g_i`. Making one task's gradient longer makes its term longer and changes nothing
    else.

    Every projection is :math:`g_i + \sum_j \lambda_{ij} g_j` with multipliers :math:`\lambda_{ij}
    \ge 0`, and needs the Gramian alone. Solved exactly for the Gramian in float64: in closed form
    for two tasks, else by pivoting, for all tasks together.

    Args:
        preference: One positive number per task, :math:`p_i`: a mapping from task name, or a
            sequence in the order of the tasks. Only their ratios count: they are scaled to a mean
            of 1. None, for 1 each, is the paper's choice (there on the scale of the mean, 1 / m).

    Note:
        The authors' code divides the Gramian by its trace, adds 1e-4 to its diagonal and hands it
        to a solver for quadratic programs, which leaves conflicts of up to 2 %, or any conflict
        with tasks whose gradient is 100 times shorter than the others'; if the trace is below 1e-4,
        it projects nothing. Here nothing is added, and no scale is special. A task whose gradient
        is zero changes nothing. With two tasks this is PCGrad.

    References:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, section 3,
        https://arxiv.org/abs/2406.16232.

    Example:
        >>> import torch
        >>> UPGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))  # (1/2, 1/2) + (0, 1)
        tensor([0.5000, 1.5000])
    """

    @property
    def growth(self) -> float:
        return self.largest_preference  # a projection on a cone shortens

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2:
            return weights_of_pair(self._weights_of_pair, gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        weights = self.preferences(gramian)
        rows = unit_rows(gramian)
        lengths = weights[rows.numbers] * rows.norms
        added = lengths @ project_each_on_dual_cone(rows.cosines)
        return weights.index_add(0, rows.numbers, added / rows.norms)

    def _weights_of_pair(
        self, a: Number, h: Number, b: Number, of: Arithmetic[Number]
    ) -> tuple[Number, Number]:
        """Return p - min(h, 0) q / a and q - min(h, 0) p / b, but p or q for a zero row."""
        p, q = self.pair_of_preferences()
        conflict = of.positive(-h)
        least = ZERO_ROW**2 * of.larger(a, b)
        return (
            p + conflict * q / of.where(a > least, a, math.inf),
            q + conflict * p / of.where(b > least, b, math.inf),
        )
