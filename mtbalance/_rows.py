"""Rows: per-task gradients as autograd returns them, and arithmetic on them.

*Rows* are one sequence per task with one tensor per parameter, in the same order for every task,
None where the task does not reach the parameter. They are never concatenated: whatever needs more
than one number per row reads them in blocks of columns, so that the memory on top of the rows is
bounded.
"""

import functools
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


class Block(NamedTuple):
    """Consecutive columns of the matrix of all rows."""

    matrix: Tensor
    """Shape (m, n). Valid until the next block is asked for."""
    pieces: list[Piece]
    """Which entries of which parameters the columns are."""


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
    total = columns_in(rows)
    found: Iterable[_Vectors] = _vectors_of(rows, release=release)
    if total <= _SMALL:
        found = list(found)
        block = _joined(found, dtype)
        if block is not None and total <= columns.get(block.matrix.device.type, total):
            yield block
            return
    yield from _filled(found, len(rows), total, dtype, columns)


def _joined(found: Sequence["_Vectors"], dtype: torch.dtype | None) -> Block | None:
    """Return all columns as one block; None if there are none, or of several kinds."""
    kinds = {(v.device, v.dtype) for _, _, vectors in found for v in vectors if v is not None}
    if len(kinds) != 1:
        return None
    ((_, own),) = kinds
    lines: list[list[Tensor]] = [[] for _ in found[0].of_tasks]
    for _, reached, vectors in found:
        for line, vector in zip(lines, vectors, strict=True):
            line.append(torch.zeros_like(reached) if vector is None else vector)
    matrix = torch.stack([torch.cat(line) for line in lines])
    pieces = [Piece(parameter, 0, len(reached)) for parameter, reached, _ in found]
    return Block(matrix.to(dtype or at_least_float32(own)), pieces)


def _filled(
    found: Iterable["_Vectors"],
    count: int,
    total: int,
    dtype: torch.dtype | None,
    columns: Mapping[str, int],
) -> Iterator[Block]:
    """Yield blocks that are filled parameter by parameter: ``count`` rows, ``total`` columns."""
    matrix: Tensor | None = None
    lines: Sequence[Tensor] = ()
    pieces: list[Piece] = []
    filled = 0
    for parameter, reached, vectors in found:
        wanted = dtype or at_least_float32(reached.dtype)
        if matrix is None or (matrix.device, matrix.dtype) != (reached.device, wanted):
            if matrix is not None and filled:
                yield Block(matrix[:, :filled], pieces)
            most = columns.get(reached.device.type, _BLOCK_COLUMNS_ELSEWHERE)
            matrix = torch.empty(count, min(total, most), dtype=wanted, device=reached.device)
            lines, pieces, filled = matrix.unbind(), [], 0
        start = 0
        while start < len(reached):
            stop = min(len(reached), start + matrix.shape[1] - filled)
            for line, vector in zip(lines, vectors, strict=True):
                target = line[filled : filled + stop - start]
                target.zero_() if vector is None else target.copy_(vector[start:stop])
            pieces.append(Piece(parameter, start, stop))
            filled += stop - start
            start = stop
            if filled == matrix.shape[1]:
                yield Block(matrix, pieces)
                pieces, filled = [], 0
    if matrix is not None and filled:
        yield Block(matrix[:, :filled], pieces)


class _Vectors(NamedTuple):
    """A parameter that a task reaches."""

    parameter: int
    reached: Tensor
    """One of its vectors."""
    of_tasks: list[Tensor | None]


def _vectors_of(rows: Rows, *, release: bool) -> Iterator[_Vectors]:
    """Yield the vectors of each parameter that a task reaches."""
    for parameter, tensors in enumerate(zip(*rows, strict=True)):
        vectors = [None if tensor is None else flat(tensor) for tensor in tensors]
        del tensors
        if release:
            for row in rows:
                row[parameter] = None  # type: ignore[index]
        reached = _first(vectors)
        if reached is not None:
            yield _Vectors(parameter, reached, vectors)


def columns_of(tensor: Tensor | None) -> int:
    """Return how many real numbers a tensor holds."""
    return 0 if tensor is None else tensor.numel() * (2 if tensor.is_complex() else 1)


def columns_in(rows: Rows) -> int:
    """Return how many columns the matrix of all rows has."""
    return sum(max(map(columns_of, tensors)) for tensors in zip(*rows, strict=True))


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
    if coefficients.device.type == "cpu":
        numbers: Sequence[float | Tensor] = coefficients.tolist()
    else:
        numbers = coefficients.unbind()
    directions: list[Tensor | None] = []
    for start, stop in _stretches(rows):
        tensors = [row[start:stop] for row in rows]
        if release:
            for row in rows:
                if isinstance(row, list):
                    row[start:stop] = [None] * (stop - start)
        of_dtype = map(_first, zip(*tensors, strict=True)) if like is None else like[start:stop]
        for total, tensor in zip(_combined(tensors, numbers), of_dtype, strict=True):
            if total is not None and tensor is not None and total.dtype != tensor.dtype:
                total = total.to(tensor.dtype)  # noqa: PLW2901
            directions.append(total)
    return directions


def _first(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor is not None), None)


def _stretches(rows: Rows) -> Iterator[tuple[int, int]]:
    """Yield stretches of consecutive parameters: large ones alone, small ones together."""
    start = entries = 0
    tensors = max(rows, key=len, default=())
    for number, tensor in enumerate(tensors):
        size = 0 if tensor is None else tensor.numel()
        if number > start and entries + size > _TOGETHER:
            yield start, number
            start, entries = number, 0
        entries += size
    if start < len(tensors):
        yield start, len(tensors)


def _combined(tensors: Rows, numbers: Sequence[float | Tensor]) -> Sequence[Tensor | None]:
    """Return the combination of the rows of some parameters, in the dtypes they add up in."""
    alike = _alike(tensors)
    if alike is not None and isinstance(numbers[0], float):
        totals = torch._foreach_mul(alike[0], numbers[0])
        for row, number in zip(alike[1:], numbers[1:], strict=True):
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


def _alike(rows: Rows) -> list[list[Tensor]] | None:
    """Return the rows if all is there, dense, and of one dtype that numbers add up in."""
    found = [[tensor for tensor in row if tensor is not None] for row in rows]
    kinds = {(tensor.dtype, tensor.layout) for row in found for tensor in row}
    if len(kinds) != 1 or any(len(f) < len(row) for f, row in zip(found, rows, strict=True)):
        return None
    ((dtype, layout),) = kinds
    return found if layout is torch.strided and dtype is at_least_float32(dtype) else None


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
        joined = end_to_end(small)
        norms.append(torch.linalg.vector_norm(joined, dtype=at_least_float32(joined.dtype)))
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
