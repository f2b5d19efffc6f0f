import math

from torch import Tensor

from mtbalance._active_set import project_on_dual_cone
from mtbalance._gramians import (
    ZERO_ROW,
    Arithmetic,
    Number,
    unit_rows,
    weights_of_pair,
    weights_on_cpu,
)

from ._base import PreferringStrategy


class DualProj(PreferringStrategy):
    r"""Take of all directions that conflict with no task the one nearest to the sum.

    .. math::
        d = \operatorname*{argmin}_{y} \Bigl| y - \sum_i p_i g_i \Bigr|
        \quad \text{subject to} \quad \langle g_j, y \rangle \ge 0 \text{ for all } j,

    where :math:`g_i` are the m task gradients and :math:`p_i` their preferences: the projection of
    the (preferred) sum on the dual cone of the gradients. Where the sum conflicts with no task, d
    is the sum.

    The projection is :math:`\sum_i (p_i + \lambda_i) g_i` with multipliers :math:`\lambda_i \ge 0`,
    which vanish for every task that still gains from d, and needs the Gramian alone. Solved exactly
    for the Gramian in float64: in closed form for two tasks, else by pivoting.

    Args:
        preference: One positive number per task, :math:`p_i`: a mapping from task name, or a
            sequence in the order of the tasks. Only their ratios count: they are scaled to a mean
            of 1. None for 1 each: the plain sum is projected.

    Note:
        In the paper on gradient episodic memory the projected gradient is that of the current task,
        and the others only constrain; as an aggregation of all tasks' gradients it is from Quinton
        and Rey. Their code divides the Gramian by its trace, adds 1e-4 to its diagonal and projects
        nothing if the trace is below 1e-4; here nothing is added, and no scale is special. A task
        whose gradient is zero changes nothing.

    References:
        Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
        section 3, https://arxiv.org/abs/1706.08840. Quinton and Rey, "Jacobian Descent for
        Multi-Objective Optimization", 2024, https://arxiv.org/abs/2406.16232.

    Example:
        >>> import torch
        >>> DualProj()(torch.tensor([[1.0, 0.0], [-2.0, 2.0]]))  # of (-1, 2)
        tensor([0., 2.])
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
        if len(rows.numbers) == 0:
            return weights
        lengths = rows.norms / rows.norms.max()
        added = project_on_dual_cone(rows.cosines, weights[rows.numbers] * lengths)
        return weights.index_add(0, rows.numbers, added / lengths)

    def _weights_of_pair(
        self, a: Number, h: Number, b: Number, of: Arithmetic[Number]
    ) -> tuple[Number, Number]:
        """Return max(p, -h q / a) and max(q, -h p / b), but p or q for a zero row.

        The sum's product with the first row is p a + q h; where that is negative, what is lacking,
        over a, is added to p. It cannot be negative for both rows.
        """
        p, q = self.pair_of_preferences()
        conflict = of.positive(-h)
        least = ZERO_ROW**2 * of.larger(a, b)
        x = conflict * q / of.where(a > least, a, math.inf)
        y = conflict * p / of.where(b > least, b, math.inf)
        return p + of.positive(x - p), q + of.positive(y - q)
