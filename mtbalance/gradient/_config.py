import torch
from torch import Tensor

from mtbalance._gramians import (
    ZERO_ROW,
    Arithmetic,
    Number,
    equiangular,
    unit_rows,
    weights_of_pair,
    weights_on_cpu,
)

from ._base import PreferringStrategy


class ConFIG(PreferringStrategy):
    r"""Take the direction that makes the same angle with every task's gradient.

    With the unit vectors :math:`u_i = g_i / |g_i|` of the m task gradients, the rows of U,

    .. math::
        x = U^+ p, \qquad d = \Bigl( \sum_i \Bigl\langle g_i, \frac{x}{|x|} \Bigr\rangle \Bigr)
        \frac{x}{|x|},

    where :math:`p_i` is the preference of task i and :math:`U^+` the Moore-Penrose inverse: x is
    the shortest vector with :math:`\langle u_i, x \rangle = p_i` for every task, and d the
    projection of the sum of the gradients on its line. How long one task's gradient is changes
    nothing about the angles. If the gradients are independent, no task is in conflict with d.

    It is the Gramian that decides: with the cosines :math:`C = U U^\top`, x is the combination of
    the :math:`u_i` with the coefficients :math:`C^+ p`. For two tasks without a preference, d is
    :math:`\frac{|g_1| + |g_2|}{2} (u_1 + u_2)`.

    Args:
        preference: One positive number per task, :math:`p_i`: a mapping from task name, or a
            sequence in the order of the tasks. The cosines of the tasks with d are in the ratio of
            these, and only their ratios count. None, for 1 each, is the paper's choice.

    Note:
        If the gradients depend on each other, there may be no such x; then it is that of least
        squares, which may conflict with a task, and d is zero if no x comes nearer than zero (two
        opposite gradients). Lengths then decide whether d points along x or against it: it follows
        the sum of the gradients, which tasks in conflict with x turn round if theirs are long
        enough. With one parameter, d is the plain sum. Dependent are gradients of which a
        combination of unit vectors is shorter than 1e-6 (times the root of m), a limit that the
        authors' code leaves to PyTorch. A task whose gradient is zero changes nothing.

        The Gramian knows combinations of unit vectors that are as short as s to a relative
        1e-16 / s^2, so that the direction is as uncertain where gradients are nearly dependent. So
        it is where hardly any vector agrees with all: among four gradients in a plane, where the x
        of least squares has inner products of 0.004 instead of 1, it was off by 6e-12. There, the
        last digits of the gradients themselves decide as much.

    References:
        Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
        ICLR 2025, equations (2) and (3), https://arxiv.org/abs/2408.11104.

    Example:
        >>> import torch
        >>> ConFIG()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # equal angles, (1 + 3) / 2 each
        tensor([2., 2.])
    """

    @property
    def growth(self) -> float:
        return 1.0  # a projection of the sum shortens

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2 and self.preference is None:
            return weights_of_pair(_weights_of_pair, gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        preferences = self.preferences(gramian)
        rows = unit_rows(gramian)
        weights = torch.ones_like(preferences)
        if len(rows.numbers) == 0:
            return weights
        x = equiangular(rows.cosines, preferences[rows.numbers])
        lengths = rows.norms / rows.norms.max()
        factor = float(lengths @ x.products) / x.squared_length if x.squared_length > 0 else 0.0
        weights[rows.numbers] = factor * x.coefficients / lengths
        return weights


def _weights_of_pair(
    a: Number, h: Number, b: Number, of: Arithmetic[Number]
) -> tuple[Number, Number]:
    """Return (1 + n2 / n1) / 2 and (1 + n1 / n2) / 2 for the norms n1, n2; 1 if one is zero."""
    del h  # whatever the angle is, the bisector halves it
    least = ZERO_ROW**2 * of.larger(a, b)
    has_a, has_b = a > least, b > least
    one, other = of.sqrt(of.where(has_a, a, 1.0)), of.sqrt(of.where(has_b, b, 1.0))
    x, y = (1 + other / one) / 2, (1 + one / other) / 2
    return (
        of.where(has_a, of.where(has_b, x, 1.0), 1.0),
        of.where(has_b, of.where(has_a, y, 1.0), 1.0),
    )
