import math

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_choice
from mtbalance._linalg import (
    minimize_linear_plus_norm,
    minimize_on_segment,
    norm_of,
    project_on_dual_cone,
    unit_rows,
)

from ._base import GramianStrategy


class CAGrad(GramianStrategy):
    r"""Help the worst-off task the most, while staying close to the mean gradient.

    With the mean :math:`g_0` of the m task gradients, the direction solves

    .. math::
        \max_d \min_i \langle g_i, d \rangle \quad \text{subject to} \quad |d - g_0| \le c |g_0|.

    Its dual lives on the probability simplex and needs the Gramian alone: for the weights w that
    minimise :math:`\langle g_w, g_0 \rangle + c |g_0| |g_w|`, with :math:`g_w = \sum_i w_i g_i`,

    .. math:: d = \frac{m}{s} \Bigl( g_0 + c |g_0| \frac{g_w}{|g_w|} \Bigr),

    with the divisor s chosen by ``rescale``. Solved exactly: in closed form for two tasks, else by
    an active-set method.

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

    References:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021,
        Algorithm 1 and equation (4), https://arxiv.org/abs/2110.14048.

    Example:
        >>> import torch
        >>> CAGrad(c=0.5, rescale=0)(torch.eye(2))  # by symmetry 1 + c times the sum
        tensor([1.5000, 1.5000])
    """

    def __init__(self, c: float = 0.4, rescale: int = 1) -> None:
        super().__init__()
        self.c = check_at_least("c", c, 0)
        check_choice("rescale", rescale, [0, 1, 2])
        self.rescale = rescale

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        pull = self._pull_of_pair(gramian) if m == 2 else None
        if pull is None:
            pull = self._pull(gramian)
        divisor = [1, 1 + self.c * self.c, 1 + self.c][self.rescale]
        return (1 + m * pull) / divisor

    def _pull_of_pair(self, gramian: Tensor) -> Tensor | None:
        """Return what :meth:`_pull` does, for two tasks; None if the closed form does not hold."""
        (a, h), (_, b) = gramian.tolist()
        scale = max(a, b)
        if min(a, b) <= 1e-24 * scale or self.c == 0:
            return None
        a, h, b = a / scale, h / scale, b / scale
        radius = self.c * math.sqrt(max(a + 2 * h + b, 0)) / 2
        w = minimize_on_segment(a, h, b, radius) if radius > 0 else None
        if w is None:
            return None
        length = math.sqrt(w[0] * w[0] * a + 2 * w[0] * w[1] * h + w[1] * w[1] * b)
        return torch.tensor(w, dtype=torch.float64) * (radius / length)

    def _pull(self, gramian: Tensor) -> Tensor:
        """Return the coefficients, shape (m,), of what is added to the mean gradient."""
        m = len(gramian)
        pull = torch.zeros(m, dtype=torch.float64)
        rows = unit_rows(gramian)
        if len(rows.numbers) == 0:
            return pull
        mean = rows.norms / rows.norms.max()  # in units of the largest norm, times m
        mean_length = norm_of(mean, rows.cosines)
        radius = self.c * mean_length
        if radius == 0:
            return pull
        multipliers = project_on_dual_cone(rows.cosines, mean)
        distance = norm_of(multipliers, rows.cosines)
        sizes = rows.norms.min() / rows.norms
        # If the ball does not reach the dual cone, the optimum is negative; starting from a
        # negative value keeps away from the kink, whose value is zero.
        reaches = distance <= radius
        start = 1 / sizes if reaches else multipliers
        y = minimize_linear_plus_norm(
            rows.cosines,
            rows.cosines @ mean,
            radius,
            sizes,
            start / (sizes @ start),
            may_vanish=reaches,
        )
        step = multipliers if reaches else multipliers * (radius / distance)
        if y is not None:
            # Near the kink rounding may hide it: take the better of its answer and the walk's.
            walked = y * (radius / norm_of(y, rows.cosines))
            worst = [
                float((rows.norms * (rows.cosines @ (mean + s))).min()) for s in (walked, step)
            ]
            if worst[0] >= worst[1] - 1e-12 * float(rows.norms.max()) * mean_length:
                step = walked
        pull[rows.numbers] = step * rows.norms.max() / (m * rows.norms)
        return pull

    def extra_repr(self) -> str:
        return f"c={self.c}, rescale={self.rescale}"
