"""Rows: per-task gradients as autograd returns them, and arithmetic on them.

*Rows* are one sequence per task with one tensor per parameter, in the same order for every task,
None where the task does not reach the parameter. They are never concatenated: whatever needs more
than one number per row reads them in blocks of columns, so that the memory on top of the rows is
bounded.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

Rows = Sequence[Sequence[Tensor | None]]

_BLOCK_COLUMNS = {"cpu": 2**17}
"""Columns per block. On the CPU, fewer cost more in calls than they save in cache misses."""
_BLOCK_COLUMNS_ELSEWHERE = 2**22
ONE_THREAD = 2**15
"""Up to so many entries PyTorch uses one thread of the CPU. Others take as long to wait for as they
save, and where other programs keep them busy, a hundred times as long."""
CACHED_COLUMNS = {"cpu": ONE_THREAD}
"""Columns per block for what makes temporaries of a block's size, which then stay in the cache."""
_TOGETHER = ONE_THREAD
"""Entries of small parameters that are combined together."""
_SMALL = 2**13
"""Up to this many columns, joining rows and converting them later takes a third of the time."""


class Piece(NamedTuple):
    """A stretch of one parameter's entries."""

    parameter: int
    start: int
    stop: int


class Strip(NamedTuple):
    """Consecutive columns of all rows, as they are read: one parameter, or small ones joined."""

    parameters: list[tuple[int, int]]
    """Number, and last column (excluded), of each parameter."""
    vectors: list[Tensor | None]
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


def flat(tensor: Tensor) -> Tensor:
    """View (or copy) a tensor as a real vector of its entries in logical order."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of dense tensors of one dtype and device as one vector."""
    vector: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return vector


def shaped(vector: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Undo :func:`flat`: give a vector the shape, dtype (unless given) and device of ``like``."""
    vector = vector.to(like.device)
    if like.is_complex():
        vector = torch.view_as_complex(vector.reshape(*like.shape, 2))
    return vector.reshape(like.shape).to(dtype or like.dtype)


@functools.cache  # a dictionary answers in a third of the time
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that numbers of ``dtype`` are added up in."""
    return torch.promote_types(dtype, torch.float32)


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
    sizes = columns_of_each(rows)
    total = sum(sizes)
    strips: Iterable[Strip] = _strips_of(rows, sizes, release=release)
    if total <= _SMALL:
        strips = list(strips)
        block = _of_one_strip(strips, dtype)
        if block is not None and total <= columns.get(block.matrix.device.type, total):
            yield block
            return
    yield from _filled(strips, len(rows), total, dtype, columns)


def _of_one_strip(strips: Sequence[Strip], dtype: torch.dtype | None) -> Block | None:
    """Return all columns as one block, if they are one strip."""
    vectors = [v for v in strips[0].vectors if v is not None] if len(strips) == 1 else []
    if not vectors or len(vectors) < len(strips[0].vectors):
        return None
    matrix = torch.stack(vectors).to(dtype or at_least_float32(vectors[0].dtype))
    return Block(matrix, [(strips[0].parameters, 0, matrix.shape[1])])


def _filled(
    strips: Iterable[Strip],
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


def _strips_of(rows: Rows, sizes: Sequence[int], *, release: bool) -> Iterator[Strip]:
    """Yield all columns: of large parameters one by one, of small ones together.

    Copying one costs as much as joining a dozen.

    Args:
        rows: The rows.
        sizes: How many columns each parameter has.
        release: Whether to empty the rows on the way.
    """
    for start, stop in _stretches(sizes):
        lines = _taken(rows, start, stop, release=release)
        there = [number for number in range(stop - start) if sizes[start + number]]
        counts = [sizes[start + number] for number in there]
        if there and sum(counts) <= _TOGETHER and _kind_of(lines) is not None:
            parameters = [start + number for number in there]
            lasts = itertools.accumulate(counts)
            vectors = joined([[line[number] for number in there] for line in lines])
            yield Strip(list(zip(parameters, lasts, strict=True)), vectors)
            continue
        for number, count in zip(there, counts, strict=True):
            found = [line[number] for line in lines]
            yield Strip([(start + number, count)], [None if t is None else flat(t) for t in found])


def joined(lines: Rows) -> list[Tensor | None]:
    """Return the entries of parameters of one kind in each row, with zeros where it has none."""
    reached = first_of(lines)
    return [
        flat(
            end_to_end(
                [
                    torch.zeros_like(one) if tensor is None else tensor
                    for tensor, one in zip(line, reached, strict=True)
                    if one is not None
                ]
            )
        )
        for line in lines
    ]


def first_of(rows: Rows) -> list[Tensor | None]:
    """Return a tensor of each parameter; None where no row reaches it."""
    found = list(rows[0]) if rows else []
    for row in rows[1:]:
        found = [tensor if one is None else one for one, tensor in zip(found, row, strict=True)]
    return found


def columns_of(tensor: Tensor | None) -> int:
    """Return how many real numbers a tensor holds."""
    return 0 if tensor is None else tensor.numel() * (2 if tensor.is_complex() else 1)


def columns_of_each(rows: Rows) -> list[int]:
    """Return how many columns each parameter has in the matrix of all rows."""
    return list(map(columns_of, first_of(rows)))


def coefficients_of(vector: Tensor) -> Sequence[float | Tensor]:
    """Return coefficients as numbers, or as they are on a device, which need not be waited for."""
    numbers: Sequence[float | Tensor] = vector.tolist() if vector.is_cpu else vector.unbind()
    return numbers


def combine(
    rows: Rows,
    coefficients: Tensor,
    like: Sequence[Tensor] | None = None,
    *,
    release: bool = False,
) -> list[Tensor | None]:
    """Return the combination of the rows, one new tensor per parameter.

    Low precision is accumulated in float32. Waits for no device.

    Args:
        rows: The rows, m of them.
        coefficients: Shape (m,), on the CPU or on the rows' device.
        like: Tensors whose dtypes the result gets; by default that of the rows.
        release: Whether to empty the rows, which are lists then, on the way: each parameter's make
            room for its direction.

    Returns:
        One tensor per parameter; None where no row reaches it.
    """
    numbers = coefficients_of(coefficients)
    directions: list[Tensor | None] = []
    for start, stop in _stretches(columns_of_each(rows)):
        lines = _taken(rows, start, stop, release=release)
        of_dtype = first_of(lines) if like is None else like[start:stop]
        for total, tensor in zip(_combined(lines, numbers), of_dtype, strict=True):
            if total is not None and tensor is not None and total.dtype != tensor.dtype:
                total = total.to(tensor.dtype)  # noqa: PLW2901
            directions.append(total)
    return directions


def _stretches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield stretches of consecutive parameters: large ones alone, small ones together."""
    start = entries = 0
    for number, size in enumerate(sizes):
        if number > start and entries + size > _TOGETHER:
            yield start, number
            start, entries = number, 0
        entries += size
    if start < len(sizes):
        yield start, len(sizes)


def _taken(rows: Rows, start: int, stop: int, *, release: bool) -> Rows:
    """Return a stretch of the rows, and empty these there if that is asked for."""
    lines = [row[start:stop] for row in rows]
    if release:
        for row in rows:
            if isinstance(row, list):
                row[start:stop] = [None] * (stop - start)
    return lines


def _combined(tensors: Rows, numbers: Sequence[float | Tensor]) -> Sequence[Tensor | None]:
    """Return the combination of the rows of some parameters, in the dtypes they add up in."""
    kind = _kind_of(tensors)
    found = [[tensor for tensor in row if tensor is not None] for row in tensors]
    whole = all(len(f) == len(row) for f, row in zip(found, tensors, strict=True))
    adds_up = kind is not None and kind is at_least_float32(kind)
    if whole and adds_up and isinstance(numbers[0], float):
        totals = torch._foreach_mul(found[0], numbers[0])
        for row, number in zip(found[1:], numbers[1:], strict=True):
            torch._foreach_add_(totals, row, alpha=float(number))
        return totals
    directions: list[Tensor | None] = []
    for column in zip(*tensors, strict=True):
        total: Tensor | None = None
        for tensor, number in zip(column, numbers, strict=True):
            if tensor is not None:
                total = plus_multiple(total, tensor, number)
        directions.append(total)
    return directions


def kinds_of(rows: Rows) -> set[tuple[torch.dtype, torch.layout, torch.device]]:
    """Return what tensors must have in common to be joined, of all in the rows."""
    return {(t.dtype, t.layout, t.device) for row in rows for t in row if t is not None}


def _kind_of(rows: Rows) -> torch.dtype | None:
    """Return the dtype of tensors that are dense, of one dtype and on one device; else None."""
    kinds = kinds_of(rows)
    if len(kinds) != 1:
        return None
    ((dtype, layout, _),) = kinds
    return dtype if layout is torch.strided else None


def with_room_for(total: Tensor, addend: Tensor) -> Tensor:
    """Return a gradient in the layout that its sum with another one has, as autograd adds them.

    Sparse and dense are dense together, which no sparse tensor can be told to hold.
    """
    return total.to_dense() if total.is_sparse and not addend.is_sparse else total


def plus_multiple(total: Tensor | None, tensor: Tensor, number: float | Tensor) -> Tensor:
    """Return total + number * tensor, into ``total`` where there is one."""
    dtype = at_least_float32(tensor.dtype)
    factor = number
    if isinstance(number, Tensor):
        factor = number.to(tensor.device, dtype)
    if total is None:
        return tensor.to(dtype) * factor
    total = with_room_for(total, tensor)
    if isinstance(factor, Tensor):
        if tensor.is_sparse:  # which `addcmul_` does not take
            return total.add_(tensor.to(dtype) * factor)
        return total.addcmul_(tensor.to(dtype), factor)
    return total.add_(tensor, alpha=factor)


def finite_entries(vector: Tensor) -> list[bool]:
    """Return which entries of a short vector are finite (waits for the device).

    Its numbers are read in any case, and Python's look at each costs less than two more kernels.
    """
    return list(map(math.isfinite, vector.tolist()))


def numbers_of(scalars: Sequence[Tensor]) -> list[float]:
    """Return scalars as numbers (waits for their device, once).

    On the CPU each is read as it is: stacking them takes several times as long.
    """
    if all(scalar.is_cpu for scalar in scalars):
        return [scalar.item() for scalar in scalars]
    numbers: list[float] = stacked([scalar.detach() for scalar in scalars]).tolist()
    return numbers


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite (waits for the device)."""
    return bool(torch.isfinite(tensor).all())


def length_of(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return a length that all entries together do not exceed, or None if there are none.

    It is not finite if some entry is not, or if it is more than float32 holds. Many small tensors
    are joined first: a norm of each would take several times as long.
    """
    small: list[Tensor] = []
    others: list[Tensor] = []
    for tensor in tensors:
        size = 0 if tensor is None else tensor.numel()
        if tensor is None or size == 0:
            continue
        joins = size <= _SMALL and tensor.layout is torch.strided
        if joins and (not small or tensor.device == small[0].device):
            small.append(tensor)
        else:
            others.append(tensor._values() if tensor.is_sparse else tensor)
    norms = list(torch._foreach_norm(others)) if others else []
    if small:
        vector = end_to_end(small)
        norms.append(torch.linalg.vector_norm(vector, dtype=at_least_float32(vector.dtype)))
    if len(norms) < 2:
        return norms[0].float() if norms else None
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).sum()


def all_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether every entry of every tensor is finite (waits for the device once)."""
    length = length_of(tensors)
    # A length may overflow where no entry does: look closer then.
    return (
        length is None
        or math.isfinite(length.item())
        or all(
            is_finite(t._values() if t.is_sparse else t)
            for t in tensors
            if t is not None and t.numel()
        )
    )


def stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Stack scalars on the first one's device, in their common dtype and at least float32."""
    dtype = torch.float32
    for scalar in scalars:
        dtype = torch.promote_types(dtype, scalar.dtype)
    return torch.stack([scalar.to(scalars[0].device, dtype) for scalar in scalars])


def sum_of(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Add float64 tensors up on the first one's device; zeros of ``shape`` if there are none."""
    if not tensors:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).sum(0)
