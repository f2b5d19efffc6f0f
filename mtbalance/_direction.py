"""Weighted rows of one group of parameters become a direction."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mtbalance._blocks import CACHED_COLUMNS, Piece, column_blocks
from mtbalance._rows import (
    ONE_THREAD,
    Rows,
    are_ones,
    at_least_float32,
    columns_of,
    first_of,
    flat,
    shaped,
    sum_of,
)
from mtbalance._shards import any_sharded, local, offset_of, sum_over_shards
from mtbalance.gradient._base import GradientStrategy


class Outcome(NamedTuple):
    """What a gradient strategy made of the rows of one group."""

    direction: list[Tensor | None]
    """One tensor per parameter: of a sharded one, this process's shard."""
    progress: Tensor
    """Inner products of the raw gradients with the direction, shape (m,), float64; divided by what
    the Gramian was divided by."""
    combination: Tensor | None = None
    """Coefficients of the raw gradients, shape (m,), where they are the same for all columns."""
    solution: Tensor | None = None
    """What a Gramian strategy gave for the weighted rows, shape (m,)."""


class Combines(Protocol):
    """Combines rows, which it may empty."""

    def __call__(
        self,
        rows: Rows,
        coefficients: Tensor,
        like: Sequence[Tensor] | None = None,
        *,
        release: bool = False,
    ) -> list[Tensor | None]:
        """Return the combination of rows, as ``_rows.combine`` does for whole gradients."""


def direction_of(
    strategy: GradientStrategy,
    leaves: Sequence[Tensor],
    rows: Rows,
    gramian: Tensor,
    weights: Tensor,
    unscale: float,
    first: int = 0,
    power: int = 0,
    across: Tensor | None = None,
    *,
    combine: Combines,
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
        power: The power of two that rows were divided by for the Gramian.
        across: Inner products of the raw rows of two batches, where the strategy is told these.
        combine: Combines raw rows where it gives coefficients.
    """
    weights = weights.to(gramian)
    weighted = gramian.clone() if are_ones(weights) else gramian * weights * weights[:, None]
    if across is None:
        solution = strategy.coefficients(weighted)
    else:
        between = across.to(gramian) * weights * weights[:, None]
        solution = strategy.coefficients(weighted, between)
    if solution is None:
        factors = strategy.row_factors(weighted)
        weights = weights if factors is None else weights * factors
        weighted_rows = Weighted(weights)
        direction, progress = by_columns(strategy, leaves, rows, weighted_rows, first, power)
        return Outcome(direction, progress * unscale**2)
    combination = weights * solution
    direction = combine(rows, combination, leaves, release=True)
    return Outcome(direction, gramian @ combination, combination, solution)


class Prepares(Protocol):
    """Makes what a strategy gets of a block of columns, which it may write to."""

    @property
    def raw_rows(self) -> int:
        """The number m of raw rows."""

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the strategy gets, and the raw rows, shape (m, n)."""


class Weighted:
    """Lets a strategy get the raw rows times weights.

    Args:
        weights: Shape (m,).
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._none = are_ones(weights)
        self.raw_rows = len(weights)

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self._none:
            return matrix, matrix
        return matrix * self._weights.to(matrix)[:, None], matrix


def by_columns(
    strategy: GradientStrategy,
    leaves: Sequence[Tensor],
    rows: Rows,
    prepared: Prepares,
    first: int,
    power: int,
) -> tuple[list[Tensor | None], Tensor]:
    """Return the direction of a strategy that sees columns, and the products with raw rows.

    The rows are lists that are emptied on the way; all else is as for :func:`direct_by_columns`.
    """
    strategy.start()
    held = [local(leaf.detach()) for leaf in leaves]
    if not any_sharded(leaves):
        return direct_by_columns(
            strategy.on_columns,
            rows,
            prepared,
            held,
            in_blocks=strategy.coordinatewise,
            first=first,
            power=power,
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
            prepared,
            [held[place]],
            first=first + offset_of(leaf),
            power=power,
        )
        direction.append(piece)
        progress.append(sum_over_shards([leaf], [[products]], lambda rows: rows[0][0]))  # type: ignore[arg-type, return-value]
        first += columns_of(leaf)
    return direction, sum_of(progress, (prepared.raw_rows,))


def direct_by_columns(
    strategy: Callable[[Tensor, int], Tensor],
    rows: Rows,
    prepared: Prepares,
    like: Sequence[Tensor],
    *,
    in_blocks: bool = True,
    first: int = 0,
    power: int = 0,
) -> tuple[list[Tensor | None], Tensor]:
    """Apply a strategy to the prepared rows as a matrix, or block by block of its columns.

    Args:
        strategy: Maps a matrix (m, n) and the number of its first column to a direction (n,).
        rows: The rows, lists that are emptied on the way.
        prepared: Makes of a block of them what the strategy gets.
        like: Tensors of the shapes and dtypes of the result.
        in_blocks: Whether the strategy may be asked for blocks of columns.
        first: The number of the first column.
        power: What power of two rows and direction are divided by for their inner products.

    Returns:
        The direction by parameter, and its inner products with the raw rows, shape (m,).
    """
    direction = _Direction(like, [tensor is not None for tensor in first_of(rows)])
    progress: list[Tensor] = []
    for matrix, pieces in _blocks(rows, in_blocks=in_blocks):
        seen, raw = prepared(matrix)
        columns = strategy(seen, first)
        first += matrix.shape[1]
        progress.append(_products(raw, columns, power))
        direction.add(columns, pieces)
    return direction.by_parameter, sum_of(progress, (prepared.raw_rows,))


class _Direction:
    """A direction that is put together parameter by parameter, from pieces that come in order.

    Args:
        like: Tensors of the shapes and dtypes of the result.
        reached: Whether any row reaches each.
    """

    def __init__(self, like: Sequence[Tensor], reached: Sequence[bool]) -> None:
        self._like = like
        self._begun: dict[int, Tensor] = {}
        # What has no entries (a shard may) has no columns, but a direction nevertheless.
        self.by_parameter: list[Tensor | None] = [
            torch.zeros_like(tensor) if found and not tensor.numel() else None
            for tensor, found in zip(like, reached, strict=True)
        ]

    def add(self, columns: Tensor, pieces: Sequence[Piece]) -> None:
        """Add the next columns, shape (n,), and say whose they are."""
        split = torch.split(columns, [stop - start for _, start, stop in pieces])
        for (parameter, start, stop), values in zip(pieces, split, strict=True):
            like = self._like[parameter]
            size = columns_of(like)
            if len(values) == size:
                self.by_parameter[parameter] = shaped(values, like, copy=True)
                continue
            if start == 0:
                self._begun[parameter] = _empty(like)
            self._begun[parameter][start:stop].copy_(values)
            if stop == size:
                self.by_parameter[parameter] = shaped(self._begun.pop(parameter), like)


def _products(matrix: Tensor, columns: Tensor, power: int) -> Tensor:
    """Return the inner products of rows with a direction, each over a power of two, in float64."""
    if power == 0:
        columns = columns.to(matrix)
        if matrix.device.type != "cpu" or matrix.numel() <= ONE_THREAD:
            return (matrix @ columns).double()
        width = max(1, ONE_THREAD // len(matrix))
        parts = zip(torch.split(matrix, width, 1), torch.split(columns, width), strict=True)
        return torch.stack([part @ piece for part, piece in parts]).sum(0, dtype=torch.float64)
    factor = 2.0**-power
    return (matrix.double() * factor) @ (columns.double() * factor)


def _empty(like: Tensor) -> Tensor:
    """Return room for a direction, as real numbers in the sum's dtype until all of it is there."""
    whole = flat(like.detach())
    return torch.empty_like(whole, dtype=at_least_float32(whole.dtype))


def _blocks(rows: Rows, *, in_blocks: bool) -> Iterator[tuple[Tensor, list[Piece]]]:
    """Yield blocks of columns, or all of them as one matrix on the first one's device."""
    if in_blocks:
        for block in column_blocks(rows, columns=CACHED_COLUMNS, release=True):
            yield block.matrix, block.pieces
        return
    # One block per device and dtype, none of which is written to again.
    devices = {t.device.type for row in rows for t in row if t is not None}
    blocks = list(column_blocks(rows, columns=dict.fromkeys(devices, sys.maxsize), release=True))
    if blocks:
        device = blocks[0].matrix.device
        matrices = [block.matrix.to(device) for block in blocks]
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
        yield matrix, [piece for block in blocks for piece in block.pieces]
