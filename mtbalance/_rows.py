"""Rows: per-task gradients as autograd returns them, and arithmetic on them.

*Rows* are one sequence per task with one tensor per parameter, in the same order for every task,
None where the task does not reach the parameter. They are never concatenated: whatever needs more
than one number per row reads them in blocks of columns (``_blocks``), so that the memory on top of
the rows is bounded.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

Rows = Sequence[Sequence[Tensor | None]]

ONE_THREAD = 2**15
"""Up to so many entries PyTorch uses one thread of the CPU. Others take as long to wait for as they
save, and where other programs keep them busy, a hundred times as long."""
TOGETHER = ONE_THREAD
"""Entries of small parameters that are read, or combined, together."""
_SMALL = 2**13
"""Up to this many entries, tensors are joined before their length is asked for."""

Kind = tuple[torch.dtype, torch.layout, torch.device]
"""What tensors must have in common to be joined."""


class Layout(NamedTuple):
    """What there is in rows. To look takes time for each tensor of each row."""

    sizes: list[int]
    """How many columns each parameter has in the matrix of all rows."""
    kinds: set[Kind]
    """Of what kinds the tensors are."""
    complete: bool
    """Whether each row has a tensor for each parameter."""

    @property
    def kind(self) -> torch.dtype | None:
        """The dtype of all tensors, if these are dense and of one kind."""
        return _one_kind(self.kinds)


class TaskRows(list[list[Tensor | None]]):
    """The rows of a step, which nobody changes until they are emptied: they are looked at once."""

    @functools.cached_property
    def layout(self) -> Layout:
        """What is in them."""
        return _layout(self)

    def forget(self) -> None:
        """Look again the next time, as some have been emptied."""
        vars(self).pop("layout", None)


def layout_of(rows: Rows) -> Layout:
    """Return what there is in rows."""
    return rows.layout if isinstance(rows, TaskRows) else _layout(rows)


def _layout(rows: Rows) -> Layout:
    complete = not any(tensor is None for row in rows for tensor in row)
    first = rows[0] if complete and rows else first_of(rows)
    return Layout(list(map(columns_of, first)), _kinds_of(rows), complete)


def _kinds_of(rows: Rows) -> set[Kind]:
    """Return the kinds of all tensors in the rows."""
    return {(t.dtype, t.layout, t.device) for row in rows for t in row if t is not None}


def kind_of(rows: Rows) -> torch.dtype | None:
    """Return the dtype of tensors that are dense and of one kind; else None."""
    return _one_kind(_kinds_of(rows))


def _one_kind(kinds: set[Kind]) -> torch.dtype | None:
    if len(kinds) != 1:
        return None
    ((dtype, layout, _),) = kinds
    return dtype if layout is torch.strided else None


def flat(tensor: Tensor) -> Tensor:
    """View (or copy) a tensor as a real vector of its entries in logical order."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of dense tensors of one dtype and device as one real vector."""
    vector: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat(vector) if vector.is_complex() else vector


def shaped(
    vector: Tensor, like: Tensor, dtype: torch.dtype | None = None, *, copy: bool = False
) -> Tensor:
    """Undo :func:`flat`: give a vector the shape, dtype (unless given) and device of ``like``."""
    if like.is_complex():
        if copy:  # first: what is no pair of numbers in memory cannot be seen as complex
            vector, copy = vector.clone(memory_format=torch.contiguous_format), False
        vector = torch.view_as_complex(vector.reshape(*like.shape, 2))
    return vector.reshape(like.shape).to(like.device, dtype or like.dtype, copy=copy)


@functools.cache  # a dictionary answers in a third of the time
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that numbers of ``dtype`` are added up in."""
    return torch.promote_types(dtype, torch.float32)


def joined(lines: Rows, *, complete: bool = False) -> list[Tensor]:
    """Return the entries of parameters of one kind in each row, with zeros where it has none.

    Args:
        lines: The rows.
        complete: Whether each is known to have all.
    """
    if complete:
        return list(map(end_to_end, lines))  # type: ignore[arg-type]  # no None is left
    reached = first_of(lines)
    return [
        end_to_end(
            [
                torch.zeros_like(one) if tensor is None else tensor
                for tensor, one in zip(line, reached, strict=True)
                if one is not None
            ]
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
    layout = layout_of(rows)
    directions: list[Tensor | None] = []
    for start, stop in stretches(layout.sizes):
        lines = taken(rows, start, stop, release=release)
        of_dtype = first_of(lines) if like is None else like[start:stop]
        for total, tensor in zip(_combined(lines, numbers, layout), of_dtype, strict=True):
            if total is not None and tensor is not None and total.dtype != tensor.dtype:
                total = total.to(tensor.dtype)  # noqa: PLW2901
            directions.append(total)
    return directions


def stretches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield stretches of consecutive parameters: large ones alone, small ones together."""
    start = entries = 0
    for number, size in enumerate(sizes):
        if number > start and entries + size > TOGETHER:
            yield start, number
            start, entries = number, 0
        entries += size
    if start < len(sizes):
        yield start, len(sizes)


def taken(rows: Rows, start: int, stop: int, *, release: bool) -> Rows:
    """Return a stretch of the rows, and empty these there if that is asked for."""
    lines = [row[start:stop] for row in rows]
    if release:
        for row in rows:
            if isinstance(row, list):
                row[start:stop] = [None] * (stop - start)
        if isinstance(rows, TaskRows):
            rows.forget()
    return lines


def _combined(
    tensors: Rows, numbers: Sequence[float | Tensor], layout: Layout
) -> Sequence[Tensor | None]:
    """Return the combination of the rows of some parameters, in the dtypes they add up in.

    Args:
        tensors: The rows of these parameters.
        numbers: One per row.
        layout: Of the rows of all parameters.
    """
    kind = layout.kind or kind_of(tensors)
    whole = layout.complete or not any(tensor is None for row in tensors for tensor in row)
    adds_up = kind is not None and kind is at_least_float32(kind)
    if whole and adds_up and isinstance(numbers[0], float):
        first, *others = cast("Sequence[list[Tensor]]", tensors)
        totals = torch._foreach_mul(first, numbers[0])
        for row, number in zip(others, numbers[1:], strict=True):
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
    if total is None and not isinstance(factor, Tensor) and factor == 1:
        return tensor.to(dtype, copy=True)
    if total is None:
        return tensor.to(dtype) * factor
    total = with_room_for(total, tensor)
    if isinstance(factor, Tensor):
        if tensor.is_sparse:  # which `addcmul_` does not take
            return total.add_(tensor.to(dtype) * factor)
        return total.addcmul_(tensor.to(dtype), factor)
    return total.add_(tensor, alpha=factor)


def are_ones(vector: Tensor) -> bool:
    """Return whether numbers on the CPU are all 1; elsewhere nobody waits to know."""
    return vector.is_cpu and all(number == 1 for number in vector.tolist())


def finite_entries(vector: Tensor) -> list[bool]:
    """Return which entries of a short vector are finite (waits for the device).

    Its numbers are read in any case, and Python's look at each costs less than two more kernels.
    """
    return list(map(math.isfinite, vector.tolist()))


def lists_of(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Return the numbers in short vectors (waits for their device, once).

    On the CPU each is read as it is: joining them takes several times as long.
    """
    away = next((vector for vector in vectors if not vector.is_cpu), None)
    if away is None:
        return [vector.tolist() for vector in vectors]
    numbers = iter(torch.cat([vector.to(away) for vector in vectors]).tolist())
    return [list(itertools.islice(numbers, len(vector))) for vector in vectors]


def numbers_of(scalars: Sequence[Tensor]) -> list[float]:
    """Return scalars as numbers, as :func:`lists_of` does vectors."""
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
