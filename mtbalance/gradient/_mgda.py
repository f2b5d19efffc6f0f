import torch
from torch import Tensor

from mtbalance._active_set import minimize_linear_plus_norm
from mtbalance._gramians import (
    ZERO_ROW,
    Arithmetic,
    Number,
    UnitRows,
    unit_rows,
    vanishes,
    weights_of_pair,
    weights_on_cpu,
)
from mtbalance._pivoting import FEW, minimize_by_pivoting, minimize_for_few

from ._base import Preference, PreferringStrategy


class MGDA(PreferringStrategy):
    r"""Take the shortest convex combination of the gradients, by which every task gains.

    .. math::
        d = m \sum_i w_i g_i, \qquad w = \operatorname*{argmin}_{w \ge 0, \; \sum_i w_i = 1}
        \Bigl| \sum_i w_i g_i \Bigr|,

    where :math:`g_i` are the m task gradients. No task gains less than
    :math:`\langle g_i, d \rangle = |d|^2 / m`, and all that count (:math:`w_i > 0`) gain as much:
    of all directions of its length d helps the worst-off task the most. If no direction helps every
    task (a Pareto-stationary point), d is zero.

    With preferences :math:`p_i` it is the gain over the preference that is equal: w makes the
    combination of the rows :math:`g_i / p_i` the shortest, and

    .. math::
        d = m \, \max_j p_j \sum_i w_i \frac{g_i}{p_i}, \qquad
        \langle g_i, d \rangle \ge p_i \frac{|d|^2}{m \max_j p_j}.

    Solved exactly for the Gramian in float64: in closed form for two tasks, else by pivoting
    between sets of tasks that count, until the duality gap is closed.

    Args:
        preference: One positive number per task, :math:`p_i`: a mapping from task name, or a
            sequence in the order of the tasks. Only their ratios count. None, for 1 each, is the
            paper's choice (there on the scale of one gradient, without the m).
        ignore_zero_rows: Whether a task whose gradient is zero is left out, and not counted in m.
            Otherwise d is zero as long as there is one, which is what the formula says: this task
            cannot gain. Choose True if a gradient is zero where labels are missing. Source of
            False: the formula.

    Note:
        The authors' code stops when a step changes the weights by less than 1e-5, which leaves
        errors of 1 to 10 % in the direction, and keeps both weights of two tasks at 0.001 or more,
        which lets a gradient 1000 times longer have half a say. It also scales gradients by norms
        or losses on demand, which here is the weighting's part. With three or more tasks, a
        combination shorter than about 1e-7 of its parts (as much as float32 gradients are rounded
        by) is not told from zero by the Gramian: then all weights are zero.

    References:
        Desideri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
        Comptes Rendus Mathematique 350, 2012, https://doi.org/10.1016/j.crma.2012.03.014. Sener and
        Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, equation (3),
        https://arxiv.org/abs/1810.04650.

    Example:
        >>> import torch
        >>> MGDA()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # 2 (9/10, 0) + 2 (0, 3/10)
        tensor([1.8000, 0.6000])
    """

    def __init__(
        self, preference: Preference | None = None, *, ignore_zero_rows: bool = False
    ) -> None:
        super().__init__(preference)
        self.ignore_zero_rows = ignore_zero_rows

    @property
    def growth(self) -> float:
        # The shortest combination is at most as long as each row, and m times that than their sum.
        return self.largest_preference / self.smallest_preference

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2:
            return weights_of_pair(self._weights_of_pair, gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        rows = unit_rows(gramian)
        found = rows.numbers
        weights = torch.zeros(m, dtype=torch.float64, device="cpu")
        if len(found) == 0:
            return weights + 1
        if len(found) < m and not self.ignore_zero_rows:
            weights += m / (m - len(found))
            weights[found] = 0
            return weights
        preferences = self.preferences(gramian)[found]
        shares = _shares(rows, rows.norms / preferences)
        weights[found] = len(found) * shares * (preferences.max() / preferences)
        return weights

    def _weights_of_pair(
        self, a: Number, h: Number, b: Number, of: Arithmetic[Number]
    ) -> tuple[Number, Number]:
        r"""Return the weights of two tasks in closed form, without branches.

        The shortest point of the line through both, :math:`(b - h, a - h) / (a + b - 2 h)`, in
        units of the rows over their preferences; where one of these is negative, the other task
        counts alone.
        """
        where = of.where
        p, q = self.pair_of_preferences()
        largest = of.larger(a, b)
        scale = where(largest > 0, largest, 1.0)
        a, h, b = a / scale, h / scale, b / scale
        x, y = of.positive(p * (b * p - h * q)), of.positive(q * (a * q - h * p))
        total = x + y
        some = where(total > 0, total, 1.0)
        x, y = where(total > 0, x / some, 0.5), where(total > 0, y / some, 0.5)
        x, y = 2 * max(p, q) / p * x, 2 * max(p, q) / q * y
        if self.ignore_zero_rows:
            has_a, has_b = a > ZERO_ROW**2, b > ZERO_ROW**2
            x, y = where(has_b, x, 1.0), where(has_a, y, 1.0)
            x, y = where(has_a, x, where(has_b, 0.0, x)), where(has_b, y, where(has_a, 0.0, y))
        return x, y

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"ignore_zero_rows={self.ignore_zero_rows}"]
        return ", ".join(filter(None, parts))


def _shares(rows: UnitRows, norms: Tensor) -> Tensor:
    """Return the weights, shape (k,), with a sum of 1, of the shortest convex combination.

    All are zero where it cannot be told from zero by the Gramian.

    Args:
        rows: The directions of the rows that are combined.
        norms: Their lengths.
    """
    sizes = norms.min() / norms
    zero = torch.zeros_like(sizes)
    if len(sizes) <= FEW:
        few = minimize_for_few(rows.cosines.tolist(), zero.tolist(), 1.0, sizes.tolist())
        if few is not None:
            shares = sizes * torch.tensor(few, dtype=torch.float64, device="cpu")
            return shares / shares.sum()
    y = minimize_by_pivoting(rows.cosines, zero, 1.0, sizes)
    if y is None:
        start = 1 / (len(sizes) * sizes)
        y = minimize_linear_plus_norm(rows.cosines, zero, 1.0, sizes, start, may_vanish=True)
    return zero if y is None or vanishes(y, rows.cosines) else sizes * y
