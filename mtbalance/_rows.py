"""Rows: per-task gradients as autograd returns them, and arithmetic on them.

*Rows* are one sequence per task with one tensor per parameter, in the same order for every task,
None where the task does not reach the parameter. They are never concatenated: whatever needs more
than one number per row reads them in blocks of columns, so that the memory on top of the rows is
bounded.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Rows = Sequence[Sequence[Tensor | None]]

_BLOCK_COLUMNS = {"cpu": 2**18, "cuda": 2**22}
"""Columns per block. On the CPU, fewer cost more in calls than they save in cache misses."""


def flat(tensor: Tensor) -> Tensor:
    """View (or copy) a tensor as a real vector of its entries in logical order."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def column_blocks(rows: Rows, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Yield the matrix of all rows as consecutive blocks of shape (m, n).

    A block is only valid until the next one is asked for. A parameter that a task does not reach is
    a stretch of zeros in its row. Blocks do not mix devices.

    Args:
        rows: The rows, m of them.
        dtype: The blocks' dtype; by default that of the rows, and at least float32.
    """
    block: Tensor | None = None
    filled = 0
    total = sum(max(0 if t is None else t.numel() for t in ts) for ts in zip(*rows, strict=True))
    for tensors in zip(*rows, strict=True):
        vectors = [None if tensor is None else flat(tensor) for tensor in tensors]
        reached = next((vector for vector in vectors if vector is not None), None)
        if reached is None:
            continue
        wanted = dtype or torch.promote_types(reached.dtype, torch.float32)
        if block is not None and (block.device, block.dtype) != (reached.device, wanted):
            yield block[:, :filled]
            block = None
        if block is None:
            size = min(total, _BLOCK_COLUMNS.get(reached.device.type, 2**22))
            block = torch.empty(len(rows), size, dtype=wanted, device=reached.device)
            filled = 0
        start = 0
        while start < len(reached):
            stop = min(len(reached), start + block.shape[1] - filled)
            for row, vector in zip(block, vectors, strict=True):
                target = row[filled : filled + stop - start]
                target.zero_() if vector is None else target.copy_(vector[start:stop])
            filled += stop - start
            start = stop
            if filled == block.shape[1]:
                yield block
                filled = 0
    if block is not None and filled:
        yield block[:, :filled]


def gramian_of(rows: Rows) -> Tensor:
    """Return the inner products of the rows, shape (m, m), accumulated in float64.

    float64 holds the squares of every float32 and bfloat16 number, so nothing over- or underflows,
    and small combinations of large rows keep their length.
    """
    total = None
    for block in column_blocks(rows, torch.float64):
        product = block @ block.T
        total = product if total is None else total + product.to(total.device)
    return torch.zeros(len(rows), len(rows), dtype=torch.float64) if total is None else total


def inner_products(rows: Rows, vector: Sequence[Tensor | None]) -> Tensor:
    """Return the inner product of each row with ``vector``, shape (m,), in float64."""
    kept = [i for i, part in enumerate(vector) if part is not None]
    total = torch.zeros(len(rows), dtype=torch.float64)
    parts = [[row[i] for i in kept] for row in (*rows, vector)]
    for block in column_blocks(parts, torch.float64):
        total = total.to(block.device) + block[:-1] @ block[-1]
    return total


def combine(rows: Rows, coefficients: Sequence[float]) -> list[Tensor | None]:
    """Return the combination of the rows, one new tensor per parameter, in the rows' dtype.

    Low precision is accumulated in float32. None where no row reaches the parameter.
    """
    directions = []
    for tensors in zip(*rows, strict=True):
        total: Tensor | None = None
        reached: Tensor | None = None
        for tensor, coefficient in zip(tensors, coefficients, strict=True):
            if tensor is None:
                continue
            if total is None or reached is None:
                reached = tensor
                total = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * coefficient
            else:
                total.add_(tensor, alpha=coefficient)
        directions.append(total if total is None or reached is None else total.to(reached.dtype))
    return directions


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite (waits for the device)."""
    return bool(torch.isfinite(tensor).all())


def all_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether every entry of every tensor is finite (waits for the device once)."""
    parts = [t._values() if t.is_sparse else t for t in tensors if t is not None and t.numel()]
    if not parts:
        return True
    norms = [torch.linalg.vector_norm(part).to(parts[0].device).float() for part in parts]
    # A norm may overflow where no entry does: look closer then.
    return is_finite(torch.stack(norms)) or all(is_finite(part) for part in parts)


def stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Stack scalars on the first one's device, in their common dtype and at least float32."""
    dtype = torch.float32
    for scalar in scalars:
        dtype = torch.promote_types(dtype, scalar.dtype)
    return torch.stack([scalar.to(scalars[0].device, dtype) for scalar in scalars])


def sum_of(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Add float64 tensors up on the first one's device; zeros of ``shape`` if there are none."""
    if not tensors:
        return torch.zeros(shape, dtype=torch.float64)
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).sum(0)
