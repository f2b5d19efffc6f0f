"""Parameters that each process holds a shard of (``torch.distributed.fsdp.fully_shard``).

Their rows hold this process's shard alone, an ordinary tensor. What is elementwise needs nothing
more; inner products are added up over the processes that hold the other shards.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtbalance._rows import Rows

_MODULE = "torch.distributed.tensor"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is spread over a mesh of processes."""
    module = sys.modules.get(_MODULE)  # there is no such tensor before somebody imports it
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is."""
    module = sys.modules.get(_MODULE)
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return held


def like_sharded(part: Tensor | None, leaf: Tensor) -> Tensor | None:
    """Return the tensor, spread as ``leaf`` is, of which this process holds ``part``."""
    if part is None or not is_sharded(leaf):
        return part
    mesh, placements = spread_of(leaf)
    whole: Tensor = sys.modules[_MODULE].DTensor.from_local(
        part, mesh, placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )
    return whole


def spread_of(leaf: Tensor) -> Any:
    """Return a sharded tensor's mesh of processes and how each of its dimensions parts it."""
    if not is_sharded(leaf):
        return None
    return leaf.device_mesh, leaf.placements  # type: ignore[attr-defined]


def sum_over_shards(
    leaves: Sequence[Tensor], rows: Rows, product: Callable[[Rows], Tensor]
) -> Tensor:
    """Return the sum over all columns, those of other processes included, of a product of rows.

    Args:
        leaves: What the rows are gradients of.
        rows: This process's part of the rows.
        product: Maps rows to a tensor, additively in their columns.
    """
    if not any_sharded(leaves):
        return product(rows)
    kinds: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        kinds.setdefault(spread_of(leaf), []).append(number)
    parts = []
    for spread, numbers in kinds.items():
        part = product([[row[number] for number in numbers] for row in rows])
        if spread is not None:
            mesh, placements = spread
            part = part.to(mesh.device_type)  # nothing in a shard leaves it on the CPU
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(part, group=mesh.get_group(dimension))
        parts.append(part)
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


def offset_of(leaf: Tensor) -> int:
    """Return how many entries of a sharded leaf lie before this process's shard."""
    if not is_sharded(leaf):
        return 0
    mesh, placements = spread_of(leaf)
    before, rows = 0, leaf.shape[0] if leaf.ndim else 1
    for dimension, placement in enumerate(placements):
        if not placement.is_shard():
            continue
        if type(placement).__name__ != "Shard" or placement.dim != 0:
            raise ValueError(
                "a parameter must be sharded on its first dimension for a strategy that draws per "
                f"coordinate, but is sharded as {placements}."
            )
        # As torch.chunk parts them: each but the last ones holds as many, rounded up.
        most = -(-rows // mesh.size(dimension))
        skipped = min(most * mesh.get_local_rank(dimension), rows)
        before += skipped
        rows = min(most, rows - skipped)
    return before * (leaf.numel() // max(leaf.shape[0], 1)) if before else 0
