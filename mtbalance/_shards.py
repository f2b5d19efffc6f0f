"""Parameters that each process holds a shard of (``torch.distributed.fsdp.fully_shard``).

Their rows hold this process's shard alone, an ordinary tensor. What is elementwise needs nothing
more; inner products are added up over the processes that hold the other shards.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtbalance._names import alive
from mtbalance._rows import Rows

_MODULE = "torch.distributed.tensor"
_FSDP = "torch.distributed.fsdp"
_HOLDER = f"{_FSDP}._fully_shard._fsdp_param"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is spread over a mesh of processes."""
    module = sys.modules.get(_MODULE)  # there is no such tensor before somebody imports it
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is."""
    module = sys.modules.get(_MODULE)
    return module is not None and any(
        issubclass(kind, module.DTensor) for kind in set(map(type, tensors))
    )


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


def refuse_unsharded(leaves: Iterable[Tensor], *, given: bool) -> None:
    """Raise if graphs end in whole parameters that FSDP, either of it, has made of shards.

    It reduces what a backward pass accumulates there, and lets them go. Gradients that are captured
    never reach the shards.

    Args:
        leaves: What losses reach.
        given: Whether what is shared is given, or to be inferred.
    """
    fsdp = sys.modules.get(_FSDP)  # there are none before somebody imports it
    if fsdp is None:
        return
    leaves = list(leaves)
    flat = [leaf.numel() for leaf in leaves if isinstance(leaf, fsdp.FlatParameter)]
    if flat:
        raise TypeError(
            "the losses must not be those of FullyShardedDataParallel, but they reach a flat "
            f"parameter of it ({flat[0]} entries), in which what is shared cannot be told from the "
            "rest. Shard the model with torch.distributed.fsdp.fully_shard instead, and give the "
            "sharded modules as `shared`."
        )
    unsharded = _unsharded(fsdp)
    shapes = [tuple(leaf.shape) for leaf in leaves if id(leaf) in unsharded]
    if shapes:
        what = "what is given was not sharded" if given else "nothing is given"
        raise ValueError(
            "`shared` must be given, and sharded, where fully_shard has sharded the model, but "
            f"{what}: the losses reach whole parameters (one of shape {shapes[0]}), which are "
            "gathered for a pass and let go again. Shard the shared modules, and then make the "
            "Balancer, with shared=, before the first forward pass."
        )


def _unsharded(fsdp: Any) -> set[int]:
    """Return the identities of all whole parameters that ``fully_shard`` has ever gathered.

    Modules hold them, if at all, only for a while, and their storage comes and goes.
    """
    # It gives each sharded module a class of its own, so that others need not look further.
    if not (hasattr(fsdp, "FSDPModule") and fsdp.FSDPModule.__subclasses__()):
        return set()
    holders = alive(sys.modules[_HOLDER].FSDPParam)  # an error if it moves, not a wrong gradient
    gathered = (getattr(holder, "_unsharded_param", None) for holder in holders)
    return {id(parameter) for parameter in gathered if parameter is not None}


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
