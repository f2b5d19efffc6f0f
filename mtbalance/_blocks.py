"""The matrix of all rows, in blocks of columns, so that memory on top of the rows is bounded."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._rows import (
    ONE_THREAD,
    TOGETHER,
    Layout,
    Rows,
    at_least_float32,
    flat,
    joined,
    kind_of,
    layout_of,
    stretches,
    taken,
)

_BLOCK_COLUMNS = {"cpu": 2**17}
"""Columns per block. On the CPU, fewer cost more in calls than they save in cache misses."""
_BLOCK_COLUMNS_ELSEWHERE = 2**22
CACHED_COLUMNS = {"cpu": ONE_THREAD}
"""Columns per block for what makes temporaries of a block's size, which then stay in the cache."""
_FEW = 2**13
"""Up to this many columns, joining all rows and converting them later takes a third of the time."""


class Piece(NamedTuple):
    """A stretch of one parameter's entries."""

    parameter: int
    start: int
    stop: int


class Strip(NamedTuple):
    """Consecutive columns of all rows, as they are read: one parameter, or small ones joined."""

    parameters: list[tuple[int, int]]
    """Number, and last column (excluded), of each parameter."""
    vectors: Sequence[Tensor | None]
    """The columns of each row; None for zeros."""


class Block(NamedTuple):
    """Consecutive columns of the matrix of all rows."""

    matrix: Tensor
    """Shape (m, n). Valid until the next block is asked for."""
    stretches: list[tuple[list[tuple[int, int]], int, int]]
    """The parameters of each strip in it, and which of their columns."""

    @property
    def pieces(self) -> list[Piece]:
        """Which entries of which parameters the columns are."""
        found = []
        for parameters, start, stop in self.stretches:
            first = 0
            for parameter, last in parameters:
                if first < stop and start < last:
                    piece = Piece(parameter, max(start - first, 0), min(stop, last) - first)
                    found.append(piece)
                first = last
        return found


def column_blocks(
    rows: Rows,
    dtype: torch.dtype | None = None,
    columns: Mapping[str, int] = _BLOCK_COLUMNS,
    *,
    release: bool = False,
) -> Iterator[Block]:
    """Yield the matrix of all rows as consecutive blocks of columns.

    A parameter that a task does not reach is a stretch of zeros in its row; one that no task
    reaches has no columns. Blocks do not mix devices.

    Args:
        rows: The rows, m of them.
        dtype: The blocks' dtype; by default that of the rows, and at least float32.
        columns: The largest number of columns by kind of device.
        release: Whether to empty the rows, which are lists then, as they have been read.
    """
    layout = layout_of(rows)
    total = sum(layout.sizes)
    if total <= _FEW and layout.kind is not None:
        ((_, _, device),) = layout.kinds
        if 0 < total <= columns.get(device.type, total):
            lines = taken(rows, 0, len(layout.sizes), release=release)
            yield _of_all(lines, layout, dtype)
            return
    strips = _strips_of(rows, layout, release=release)
    yield from _filled(strips, len(rows), total, dtype, columns)


def _of_all(rows: Rows, layout: Layout, dtype: torch.dtype | None) -> Block:
    """Return all columns, few and of one kind, as one block."""
    matrix = torch.stack(joined(rows, complete=layout.complete))
    lasts = itertools.accumulate(layout.sizes)
    places = zip(enumerate(lasts), layout.sizes, strict=True)
    parameters = [place for place, size in places if size]
    stretches = [(parameters, 0, matrix.shape[1])]
    return Block(matrix.to(dtype or at_least_float32(matrix.dtype)), stretches)


def _filled(
    strips: Iterator[Strip],
    count: int,
    total: int,
    dtype: torch.dtype | None,
    columns: Mapping[str, int],
) -> Iterator[Block]:
    """Yield blocks that are filled strip by strip: ``count`` rows, ``total`` columns."""
    matrix: Tensor | None = None
    lines: Sequence[Tensor] = ()
    stretches: list[tuple[list[tuple[int, int]], int, int]] = []
    filled = 0
    for parameters, vectors in strips:
        reached = next(vector for vector in vectors if vector is not None)
        wanted = dtype or at_least_float32(reached.dtype)
        if matrix is None or (matrix.device, matrix.dtype) != (reached.device, wanted):
            if matrix is not None and filled:
                yield Block(matrix[:, :filled], stretches)
            most = columns.get(reached.device.type, _BLOCK_COLUMNS_ELSEWHERE)
            matrix = torch.empty(count, min(total, most), dtype=wanted, device=reached.device)
            lines, stretches, filled = matrix.unbind(), [], 0
        start = 0
        while start < len(reached):
            stop = min(len(reached), start + matrix.shape[1] - filled)
            for line, vector in zip(lines, vectors, strict=True):
                target = line[filled : filled + stop - start]
                target.zero_() if vector is None else target.copy_(vector[start:stop])
            stretches.append((parameters, start, stop))
            filled += stop - start
            start = stop
            if filled == matrix.shape[1]:
                yield Block(matrix, stretches)
                stretches, filled = [], 0
    if matrix is not None and filled:
        yield Block(matrix[:, :filled], stretches)


def _strips_of(rows: Rows, layout: Layout, *, release: bool) -> Iterator[Strip]:
    """Yield all columns: of large parameters one by one, of small ones together.

    Copying one costs as much as joining a dozen.

    Args:
        rows: The rows.
        layout: Of the rows.
        release: Whether to empty the rows on the way.
    """
    sizes = layout.sizes
    for start, stop in stretches(sizes):
        lines = taken(rows, start, stop, release=release)
        there = [number for number in range(stop - start) if sizes[start + number]]
        counts = [sizes[start + number] for number in there]
        if there and sum(counts) <= TOGETHER and (layout.kind or kind_of(lines)) is not None:
            parameters = [start + number for number in there]
            lasts = itertools.accumulate(counts)
            vectors = joined(lines, complete=layout.complete)
            yield Strip(list(zip(parameters, lasts, strict=True)), vectors)
            continue
        for number, count in zip(there, counts, strict=True):
            found = [line[number] for line in lines]
            yield Strip([(start + number, count)], [None if t is None else flat(t) for t in found])
