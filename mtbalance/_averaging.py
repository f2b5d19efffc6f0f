"""Means of rows over steps become a direction: the strategy gets them in place of the rows.

With g the raw rows of the step, w their weights and M what is remembered, the means are
keep * M + gain * w * g. They are never all there at once: blocks of columns hold them for inner
products and for strategies that see columns, and a combination of them is one of M and g. What is
remembered follows when the step has been written, in place.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._blocks import column_blocks
from mtbalance._direction import Outcome, by_columns
from mtbalance._gramians import HIGHEST, LOWEST, WIDE, exponents_of, shifted
from mtbalance._row_means import Mixing, RowMeans
from mtbalance._row_state import RowState
from mtbalance._rows import Rows, combine, is_finite, plus_multiple
from mtbalance._shards import sum_over_shards
from mtbalance._table import Part, Table
from mtbalance.gradient._base import GradientStrategy


class Mix(NamedTuple):
    """Makes means of a block of columns, remembered rows above raw ones."""

    keep: Tensor
    """What remembered rows, k of them, are multiplied by, shape (k,)."""
    gains: Tensor
    """What raw rows, m of them, are multiplied by, shape (m,)."""
    places: Tensor | None
    """To which of the remembered rows they are added, shape (m,); None if k is m."""

    @property
    def raw_rows(self) -> int:
        return len(self.gains)

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and the raw rows; the former take the place of what is remembered."""
        means, raw = matrix[: len(self.keep)], matrix[len(self.keep) :]
        means.mul_(self.keep.to(matrix)[:, None])
        gains = self.gains.to(matrix)[:, None]
        if self.places is None:
            means.addcmul_(raw, gains)
        else:
            means.index_add_(0, self.places.to(matrix.device), raw * gains)
        return means, raw

    def times(self, factors: Tensor) -> "Mix":
        """Return what makes means times factors, shape (k,)."""
        own = factors if self.places is None else factors[self.places.to(factors.device)]
        return self._replace(keep=self.keep * factors, gains=self.gains * own.to(self.gains))


class Whose(NamedTuple):
    """Whose rows some are."""

    tasks: Sequence[int]
    """The numbers of the tasks, in order."""
    group: int
    """The number of the group of parameters."""


def with_remembered(table: Table, strategy: GradientStrategy, tasks: Sequence[int]) -> Table:
    """Return the table with the parameters that no task reaches, but some mean does.

    Args:
        table: The rows of a step.
        strategy: A strategy that has means.
        tasks: The numbers of the tasks that are there.
    """
    means = _means_of(strategy)
    known = {id(leaf) for leaf in table.everything().leaves}
    groups, gramians = dict(table.groups), dict(table.gramians)
    exponents = dict(table.exponents)
    for number in means.rows.groups():
        leaves = means.rows.leaves(means.at_hand(tasks, number), number)
        more = [leaf for leaf in leaves if id(leaf) not in known and leaf.requires_grad]
        if not more:
            continue
        m = len(table.losses)
        part = groups.get(number, Part([], [[] for _ in range(m)]))
        rows = [[*row, *itertools.repeat(None, len(more))] for row in part.rows]
        groups[number] = Part([*part.leaves, *more], rows)
        gramians.setdefault(number, torch.zeros_like(table.gramian))
        if exponents:
            largest = [max(powers) for powers in zip(*table.exponents.values(), strict=True)]
            exponents.setdefault(number, largest)
    return table._replace(groups=groups, gramians=gramians, exponents=exponents)


def direction_of_means(
    strategy: GradientStrategy,
    part: Part,
    whose: Whose,
    weights: Tensor,
    scale: float,
    power: int,
    *,
    looks: bool,
) -> Outcome:
    """Ask the strategy for the direction of one group by the means of its rows.

    Args:
        strategy: The strategy, to which these tasks and this group belong.
        part: The parameters and the raw rows, times the loss scale.
        whose: Whose rows they are.
        weights: The weights of the tasks, shape (m,).
        scale: The loss scale.
        power: As for ``direction_of``.
        looks: Whether rows are known to be finite; if not, means only move by finite ones.
    """
    means = _means_of(strategy)
    mixing = means.mixing(weights)
    weights = weights.to(mixing.gain.dtype)  # where they are: nobody waits for them
    gains = mixing.gain.to(weights.device) * (weights / scale)
    hand = means.at_hand(*whose)
    mix = _mix_of(mixing, gains, whose.tasks, hand)
    rows = [*means.rows.rows(part.leaves, hand, whose.group), *part.rows]
    gramian, cross = _in_range(part.leaves, rows, mix, power)
    if looks or is_finite(gramian):
        means.remember(mixing)
        _change_when_written(means.rows, part, whose, mixing.keep, gains)
    if mix.places is not None:
        strategy.take(torch.tensor(hand, device=gramian.device), whose.group)
    combination = strategy.coefficients(gramian)
    if combination is not None:
        mix = mix.times(scale * combination.to(mix.keep))
        direction = combine(rows, torch.cat([mix.keep, mix.gains]), part.leaves)
        return Outcome(direction, cross.to(combination) @ combination / scale)
    factors = strategy.row_factors(gramian)
    factors = torch.ones_like(mix.keep) if factors is None else factors.to(mix.keep)
    mix = mix.times(scale * factors)
    copies = [list(row) for row in rows]  # to be emptied
    direction, progress = by_columns(strategy, part.leaves, copies, mix, 0, power)
    return Outcome(direction, progress / scale**2)


def _mix_of(mixing: Mixing, gains: Tensor, tasks: Sequence[int], hand: Sequence[int]) -> Mix:
    """Return what makes the means of those at hand, of which these tasks are there.

    Others keep their means as they are.
    """
    if len(hand) == len(tasks):
        return Mix(mixing.keep.to(gains.device), gains, None)
    places = torch.tensor([hand.index(task) for task in tasks], device=gains.device)
    keep = torch.ones(len(hand), dtype=mixing.keep.dtype, device=gains.device)
    keep[places] = mixing.keep.to(gains.device)
    return Mix(keep, gains, places)


def _means_of(strategy: GradientStrategy) -> RowMeans:
    means = strategy.row_means
    if means is None:
        raise TypeError(f"{type(strategy).__name__} has no means of rows.")
    return means


def _change_when_written(
    state: RowState, part: Part, whose: Whose, keep: Tensor, gains: Tensor
) -> None:
    """Let means follow the rows once the step is written."""
    rows = [list(row) for row in part.rows]
    # On the CPU as numbers: no kernel is launched for them.
    kept, gained = ([*v.tolist()] if v.is_cpu else [*v.unbind()] for v in (keep, gains))

    def of_row(old: Tensor | None, row: Tensor | None, number: int) -> Tensor | None:
        if old is not None:
            old.mul_(kept[number])
        if row is None:
            return old
        return plus_multiple(old, row.to_dense() if row.is_sparse else row, gained[number])

    state.when_written(
        functools.partial(state.change, part.leaves, whose.tasks, rows, of_row, whose.group)
    )


def _in_range(leaves: Sequence[Tensor], rows: Rows, mix: Mix, power: int) -> tuple[Tensor, Tensor]:
    """Return the Gramian of the means and the raw rows' products with them, over powers of two.

    The first over whatever takes it into the range of float64, which float64 rows may leave; the
    second over that of the table.
    """
    wide = any(t is not None and t.dtype in WIDE for row in rows for t in row)
    # Raw rows that are all zero have a power, too, out of which their means would be.
    own = power if wide else 0
    gramian, cross = _products(leaves, rows, mix, own)
    if wide:
        largest = float(gramian.diagonal().max())
        if largest == largest and not LOWEST < largest < HIGHEST:
            own += exponents_of([largest])[0]
            gramian, cross = _products(leaves, rows, mix, own)
    if own == power:
        return gramian, cross
    return gramian, shifted(cross, [[2 * (own - power)] * cross.shape[1]] * len(cross))


def _products(leaves: Sequence[Tensor], rows: Rows, mix: Mix, power: int) -> tuple[Tensor, Tensor]:
    within = functools.partial(_products_within, mix=mix, power=power)
    products = sum_over_shards(leaves, rows, within)
    gramian, cross = products[: len(mix.keep)], products[len(mix.keep) :]
    return torch.tril(gramian) + torch.tril(gramian, -1).T, cross


def _products_within(rows: Rows, *, mix: Mix, power: int) -> Tensor:
    """Return inner products of means, and of raw rows, with means, shape (k + m, k)."""
    total: Tensor | None = None
    for block in column_blocks(rows, torch.float64):
        if power:
            block.matrix.mul_(2.0**-power)
        means, _ = mix(block.matrix)
        product = block.matrix @ means.T
        total = product if total is None else total + product.to(total.device)
    if total is None:
        k = len(mix.keep)
        return torch.zeros(k + mix.raw_rows, k, dtype=torch.float64, device="cpu")
    return total
