import torch
from torch import Tensor

from mtbalance._checks import check_finite
from mtbalance._gramians import (
    RESOLUTION,
    ZERO_ROW,
    Arithmetic,
    Number,
    off_the_others,
    unit_rows,
    weights_of_pair,
    weights_on_cpu,
)

from ._base import GramianStrategy

_DEPENDENT = 2e-12
"""Of two unit rows, (1 + c) / (1 - c) for the cosine c up to which they count as opposite."""


class GradOPS(GramianStrategy):
    r"""Project each task's gradient that is in conflict off the span of all others, then add.

    .. math::
        d = \sum_i w_i g_i', \qquad
        g_i' = \begin{cases}
        g_i - \Pi_i g_i & \text{if } \langle g_i, g_j \rangle < 0 \text{ for some } j \\
        g_i & \text{else}
        \end{cases}

    for the m task gradients :math:`g_i`, where :math:`\Pi_i` projects on the span of all
    :math:`g_j`, :math:`j \ne i`. A gradient that was projected moves no other task, one that was
    not is in conflict with none: no task is in conflict with d. The weights go by how much each
    task gains from the plain sum of these,

    .. math::
        w_i = \frac{m r_i^\alpha}{\sum_j r_j^\alpha}, \qquad
        r_i = \Bigl\langle \sum_j g_j', \frac{g_i}{|g_i|} \Bigr\rangle \ge 0.

    What is left of a gradient is a combination of rows by a row of the inverse of the Gramian,
    which is all that is needed.

    Args:
        alpha: :math:`\alpha`, any finite number. With 0, every weight is 1; below 0, tasks count
            for more that are behind, above 0 those that are ahead. 0 is the paper's base form.

    Note:
        The projection and the plain sum are the paper's. The form of the exponent is our reading of
        its section 3, where :math:`r_i` is divided by the mean of all; that cancels. A task of
        which nothing is left and that gains nothing (:math:`r_i = 0`) has no weight and does not
        count in m.

        Nothing is left of a gradient in the span of the others: two opposite gradients give zero,
        and with more tasks than parameters all that conflict are lost. In the span are gradients
        of which a combination of unit vectors is shorter than 1e-6 (times the root of m).
        Gradients that are orthogonal up to the rounding of their float64 inner product are not in
        conflict, and gain nothing from each other. With three or more tasks, the direction jumps
        where two begin to conflict. A task whose gradient is zero changes nothing. With two tasks
        and alpha = 0 this is PCGrad.

    References:
        Zhu et al., "Gradient Deconfliction via Orthogonal Projections onto Subspaces For
        Multi-task Learning", WSDM 2025, section 3, https://arxiv.org/abs/2503.03438.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
        >>> GradOPS()(gradients)  # (1/2, 1/2, 0) + (0, 1, 0) + (0, 0, 2)
        tensor([0.5000, 1.5000, 2.0000])
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        self.alpha = check_finite("alpha", alpha)

    @property
    def growth(self) -> float | None:
        return 1.0 if self.alpha == 0 else None  # a projection shortens

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) == 2 and self.alpha == 0:
            return weights_of_pair(_weights_of_pair, gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        weights = torch.ones_like(gramian[0])
        rows = unit_rows(gramian)
        conflicts = (rows.cosines < -RESOLUTION).any(1)
        any_conflict = bool(conflicts.any())
        if len(rows.numbers) == 0 or not (any_conflict or self.alpha):
            return weights
        lengths = rows.norms / rows.norms.max()
        left = torch.eye(len(lengths), dtype=torch.float64, device="cpu")
        squares = torch.ones_like(lengths)
        if any_conflict:
            remainders = off_the_others(rows.cosines)
            left = torch.where(conflicts[:, None], remainders.coefficients, left)
            squares = torch.where(conflicts, remainders.squared_lengths, 1.0)
        if self.alpha:
            # Rows that were projected help nobody else, and those that were not oppose nobody.
            helps = ~conflicts[:, None] & (rows.cosines > RESOLUTION)
            help_of = torch.where(helps, rows.cosines, 0.0)
            gains = lengths @ help_of.fill_diagonal_(0) + lengths * squares
            lengths = lengths * self._shares(gains)
        weights[rows.numbers] = (lengths @ left) * (rows.norms.max() / rows.norms)
        return weights

    def _shares(self, gains: Tensor) -> Tensor:
        """Return the weights of remainders, shape (k,), for what tasks gain from their sum."""
        gaining = gains > 0
        logarithms = self.alpha * torch.where(gaining, gains, 1.0).log()
        shares = logarithms.masked_fill(~gaining, -torch.inf).softmax(0)
        return torch.where(gaining.any(), shares * gaining.sum(), 0.0)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def _weights_of_pair(
    a: Number, h: Number, b: Number, of: Arithmetic[Number]
) -> tuple[Number, Number]:
    """Return 1 - h / a and 1 - h / b where two rows conflict, but 0 where they are opposite."""
    zero = ZERO_ROW**2 * of.larger(a, b)
    both = of.where(a > zero, b, 0.0) > zero
    a, b = of.where(both, a, 1.0), of.where(both, b, 1.0)
    cosine = of.where(both, h / of.sqrt(a) / of.sqrt(b), 0.0)
    conflict = of.where(cosine < -RESOLUTION, -h, 0.0)
    opposite = 1 + cosine <= _DEPENDENT * (1 - cosine)
    return of.where(opposite, 0.0, 1 + conflict / a), of.where(opposite, 0.0, 1 + conflict / b)
