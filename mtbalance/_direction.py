"""Weighted rows of one group of parameters become a direction."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._jacobian import direct_by_columns
from mtbalance._rows import Rows, columns_of, combine, sum_of
from mtbalance._shards import is_sharded, local, offset_of, sum_over_shards
from mtbalance.gradient._base import GradientStrategy, GramianStrategy


class Outcome(NamedTuple):
    """What a gradient strategy made of the rows of one group."""

    direction: list[Tensor | None]
    """One tensor per parameter: of a sharded one, this process's shard."""
    progress: Tensor
    """Inner products of the raw gradients with the direction, shape (m,), float64."""
    combination: Tensor | None = None
    """Coefficients of the raw gradients, shape (m,), where they are the same for all columns."""
    solution: Tensor | None = None
    """What a Gramian strategy gave for the weighted rows, shape (m,)."""


def direction_of(
    strategy: GradientStrategy,
    leaves: Sequence[Tensor],
    rows: Rows,
    gramian: Tensor,
    weights: Tensor,
    unscale: float,
    first: int = 0,
) -> Outcome:
    """Ask the gradient strategy for the direction of one group.

    Args:
        strategy: The strategy.
        leaves: The parameters.
        rows: The raw rows, m of them, times the loss scale; they are emptied where that saves
            memory.
        gramian: Inner products of the raw rows over all processes, without the loss scale.
        weights: The weights of the tasks, shape (m,).
        unscale: One over the loss scale.
        first: The number of the rows' first column here, counted over all processes.
    """
    weights = weights.to(gramian)
    if strategy.is_sum:
        solution = torch.ones_like(weights)
    elif isinstance(strategy, GramianStrategy):
        solution = strategy.solve(gramian * weights * weights[:, None])
    else:
        direction, progress = _by_columns(strategy, leaves, rows, weights, first)
        return Outcome(direction, progress * unscale**2)
    combination = weights * solution
    direction = combine(rows, combination, leaves, release=True)
    return Outcome(direction, gramian @ combination, combination, solution)


def _by_columns(
    strategy: GradientStrategy,
    leaves: Sequence[Tensor],
    rows: Rows,
    weights: Tensor,
    first: int,
) -> tuple[list[Tensor | None], Tensor]:
    strategy.start()
    held = [local(leaf.detach()) for leaf in leaves]
    if not any(map(is_sharded, leaves)):
        return direct_by_columns(
            strategy.on_columns,
            rows,
            weights,
            held,
            in_blocks=strategy.coordinatewise,
            first=first,
        )
    if not strategy.coordinatewise:
        raise TypeError(
            "the gradient strategy must be coordinatewise or a GramianStrategy for sharded "
            f"parameters, but {type(strategy).__name__} needs whole rows."
        )
    # Each leaf for itself: its columns here are a stretch of the columns of all processes.
    direction: list[Tensor | None] = []
    progress: list[Tensor] = []
    for place, leaf in enumerate(leaves):
        (piece,), products = direct_by_columns(
            strategy.on_columns,
            [[row[place]] for row in rows],
            weights,
            [held[place]],
            first=first + offset_of(leaf),
        )
        direction.append(piece)
        progress.append(sum_over_shards([leaf], [[products]], lambda rows: rows[0][0]))  # type: ignore[arg-type, return-value]
        first += columns_of(leaf)
    return direction, sum_of(progress, (len(weights),))
