from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mtbalance._active_set import shortest_with_products
from mtbalance._checks import (
    check_fraction,
    check_named_primary,
    check_numbers,
    count_fallback,
    numbers_in_order,
)
from mtbalance._gramians import (
    RESOLUTION,
    ZERO_ROW,
    Arithmetic,
    Number,
    norm_of,
    numbers_of_pair,
    unit_rows,
    vanishes,
    weights_of_pair,
    weights_on_cpu,
)

from ._base import PrimaryStrategy


class PCD(PrimaryStrategy):
    r"""Stay as near to the primary task's gradient as the others' least progress allows.

    With the primary task p, and each task's gradient over its usual length,

    .. math::
        \tilde d = \operatorname*{argmin}_{x} \tfrac12 |x - \tilde g_p|^2
        \quad \text{subject to} \quad
        \langle \tilde g_j, x \rangle \ge \tau_j |\tilde g_j|^2 \text{ for all } j \ne p,
        \qquad
        \tilde g_i = \frac{g_i}{\sqrt{v_i}},
        \qquad
        d = m \, |g_p| \frac{\tilde d}{|\tilde d|},

    where m is the number of tasks, :math:`v_i` the mean of :math:`|g_i|^2` up to this step, in
    which each step counts :math:`\beta` times as much as the next, and :math:`\tau_j` the share
    that task j is to get of what a step along :math:`\tilde g_j` would do for it, to first order.
    Where the primary task's own gradient does that much for each, it is followed. How long the
    gradients of a task are as a rule changes nothing about where d points; it is as long as the
    primary task's, but for the factor m.

    The minimum is :math:`\tilde g_p + \sum_j \mu_j \tilde g_j` with multipliers :math:`\mu_j \ge
    0`, and needs the Gramian alone. Solved exactly for the Gramian in float64: in closed form for
    two tasks, else as a non-negative least-squares problem by pivoting.

    Args:
        primary: The name of the primary task, or its number in the order of the tasks.
        tau: :math:`\tau_j`, between 0 (no task is to be set back) and 1. One number, or one per
            other task: a mapping from task name, or a sequence in the order of the tasks without
            the primary one. Source of 0.02: the paper.
        beta: :math:`\beta`, at least 0 (lengths of this step alone) and below 1. Source of 0.999:
            the paper.

    Note:
        The factor m is an addition to the paper, whose direction is as long as :math:`g_p`: so m
        equal gradients g give m g, as a sum does, and the learning rate is that of other
        strategies. Only tasks with a gradient count in it. Where :math:`g_p` is zero, or
        :math:`\tilde d` is (an opposite task with :math:`\tau = 0`), d is zero, as in the paper. If
        other tasks oppose the primary one, :math:`\tilde d` may be short and the step against its
        gradient: for :math:`g_2 = -g_1` it is :math:`m g_2`, however small :math:`\tau`.

        The Gramian knows combinations of unit vectors that are as short as s to a relative
        1e-16 / s^2. The direction is as uncertain where what is asked for takes multipliers of some
        1 / s: one of 8 tasks with s = 1e-4 was off by 2e-9.

        Three or more tasks may ask for what excludes each other, as two do whose gradients are
        opposite. All but the primary task are then left out, as in the authors' package, and a
        fallback is counted. That is decided by the directions of these tasks and what they ask for,
        whatever the primary gradient is: they exclude each other if no vector of up to some 1e7
        times the largest of the :math:`\tau_j |\tilde g_j|` does for all what is asked, which is as
        much as a Gramian can tell.

        The authors' code adds 1e-8 to :math:`v_i`; that is left out here, and matters for gradients
        shorter than about 1e-3 only, which it would make count for less. The means of absent tasks
        and of those whose gradient is zero stay as they are. Where the primary task is absent,
        there is nothing to stay near to, and d is the plain sum. Each group of parameters of a
        Balancer has means of its own.

    References:
        Varam and AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for
        Hierarchical Multi-Objective Optimization", TMLR 2026, https://arxiv.org/abs/2606.29521.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
        >>> PCD(primary=0, tau=0.75)(gradients)  # along (1, 3/4), and 2 * 5 long
        tensor([8., 6.])
        >>> PCD(primary=0, tau=0.75)(torch.tensor([[5.0, 0.0], [4.0, 3.0]]))  # has 4/5 already
        tensor([10.,  0.])
    """

    def __init__(
        self,
        primary: str | int,
        tau: float | Mapping[str, float] | Sequence[float] = 0.02,
        beta: float = 0.999,
    ) -> None:
        super().__init__(primary)
        check_named_primary(primary, "Without one, use DualProj.")
        self.tau = (
            check_numbers("tau", tau, check_fraction)
            if isinstance(tau, Mapping | Sequence)
            else check_fraction("tau", tau)
        )
        self.beta = check_fraction("beta", beta)
        if self.beta == 1:
            raise ValueError("`beta` must be below 1, but got 1. A mean must take something in.")
        self._taus: list[float] = []
        self.lengths = self.per_task()
        """Roots of the means of squared norms."""
        self.seen = self.per_task()
        """How much of a mean is what has been seen, which is 1 - beta^n after n steps."""

    @property
    def growth(self) -> float | None:
        return None if self.tasks is None else float(len(self.tasks))

    def learn(self, tasks: Sequence[str]) -> None:
        super().learn(tasks)
        others = [task for number, task in enumerate(tasks) if number != self._number]
        taus = (
            [self.tau] * len(others)
            if isinstance(self.tau, float)
            else numbers_in_order("tau", self.tau, others)
        )
        self._taus = [*taus[: self._number], 0.0, *taus[self._number :]]

    def weights(self, gramian: Tensor) -> Tensor:
        gramian = gramian.detach()
        is_primary = self.is_primary(gramian)
        ratios = self._over_usual_lengths(gramian)
        if len(gramian) == 1:
            return torch.ones_like(gramian[0])
        asked = ratios * self._shares(gramian)
        if len(gramian) == 2:
            return self._weights_of_two(gramian, is_primary, ratios, asked)
        beside = is_primary.cpu(), ratios.cpu(), asked.cpu()
        return weights_on_cpu(partial(self._weights_of_more, *beside), gramian)

    def _weights_of_more(
        self, is_primary: Tensor, ratios: Tensor, asked: Tensor, gramian: Tensor
    ) -> Tensor:
        if not is_primary.any():
            return torch.ones_like(ratios)
        weights = torch.zeros_like(ratios)
        rows = unit_rows(gramian)
        found, cosines = rows.numbers, rows.cosines
        own = is_primary[found]
        if not own.any():
            return weights
        own_length = ratios[is_primary]
        coefficients = torch.where(own, own_length, 0.0)
        others, asked = (~own).nonzero()[:, 0], asked[found][~own]
        among = cosines[others][:, others]
        lacking = asked - own_length * cosines[own][0, others]
        if (lacking > 0).any():
            # If no two conflict, their sum, times enough, does for each what is asked.
            excluded = (among < 0).any() and shortest_with_products(among, asked) is None
            added = None if excluded else shortest_with_products(among, lacking)
            if added is None:
                count_fallback(self, "what the other tasks ask for excludes each other")
            else:
                coefficients[others] = added
        if vanishes(coefficients, cosines):
            return weights
        factor = len(found) * rows.norms[own] / norm_of(coefficients, cosines)
        weights[found] = coefficients * (factor / rows.norms)
        return weights

    def _weights_of_two(
        self, gramian: Tensor, is_primary: Tensor, ratios: Tensor, asked: Tensor
    ) -> Tensor:
        """Return the weights of two tasks without waiting for a device."""
        order = is_primary.logical_not().long()  # the primary task first
        formula = partial(_weights_of_pair, ratios[order], asked[order])
        weights = weights_of_pair(formula, gramian[order][:, order])
        weights = torch.where(is_primary.any(), weights[order], 1.0)
        return weights + 0 * gramian.diagonal().sum()  # comparisons pass NaN by

    def _over_usual_lengths(self, gramian: Tensor) -> Tensor:
        """Return the lengths that the rows have over their usual ones, 0 of a zero row.

        What is usual moves. Shape (m,), beside the Gramian, without waiting for a device.
        """
        lengths, seen = self.lengths.read(gramian), self.seen.read(gramian)
        squares = gramian.diagonal().clamp_min(0).to(lengths)
        alive = (squares > ZERO_ROW**2 * squares.max()) & squares.isfinite()
        more = seen * self.beta + (1 - self.beta)
        share = (1 - self.beta) / more
        moved = ((1 - share) * lengths * lengths + share * squares).sqrt()
        self.lengths.write(torch.where(alive, moved, lengths))
        self.seen.write(torch.where(alive, more, seen))
        ratios = torch.where(alive, squares.sqrt() / torch.where(alive, moved, 1.0), 0.0)
        return ratios.to(gramian)

    def _shares(self, gramian: Tensor) -> Tensor:
        """Return the tau of each row, shape (m,), beside the Gramian; of the primary task any."""
        if isinstance(self.tau, float):
            return torch.full_like(gramian[0], self.tau)
        return gramian.new_tensor(self._taus)[self.numbers_of_rows(gramian)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}, beta={self.beta}"


def _weights_of_pair(
    ratios: Tensor, asked: Tensor, a: Number, h: Number, b: Number, of: Arithmetic[Number]
) -> tuple[Number, Number]:
    r"""Return the weights of a primary task and one other.

    The multiplier is :math:`\mu = \max(\tau |\tilde g_2| - |\tilde g_1| c, 0)` for the cosine c,
    and where it is not zero, :math:`|\tilde d|^2 = |\tilde g_1|^2 (1 - c^2) + \tau^2
    |\tilde g_2|^2`.
    """
    length, _ = numbers_of_pair(ratios)
    _, least = numbers_of_pair(asked)
    zero = ZERO_ROW**2 * of.larger(a, b)
    has_a, has_b = a > zero, b > zero
    x, y = of.sqrt(of.where(has_a, a, 1.0)), of.sqrt(of.where(has_b, b, 1.0))
    c = of.where(has_b, h / x / y, 1.0)
    c = of.where(c > 1, 1.0, of.where(c < -1, -1.0, c))
    more = of.positive(least - length * c)
    across = length * length * (1 - c) * (1 + c) + least * least
    squared_length = of.where(more > 0, across, length * length)
    stands = squared_length > 2 * RESOLUTION * (length + more) * (length + more)
    count = of.where(has_b, 2.0, 1.0)
    factor = count / of.sqrt(of.where(stands, squared_length, 1.0))
    factor = of.where(stands, of.where(has_a, factor, 0.0), 0.0)
    return factor * length, factor * more * (x / y)
