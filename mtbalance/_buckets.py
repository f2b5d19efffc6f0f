"""Gradients that travel between processes together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtbalance._rows import columns_of, flat, shaped

_BUCKET_BYTES = 25 * 2**20
"""Gradients go round in buckets of this size, as in DistributedDataParallel."""


class Bucket:
    """Gradients of one task that go round together, in one flat tensor."""

    def __init__(
        self,
        leaves: list[Tensor],
        gradients: list[Tensor | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.leaves = leaves
        self._dtype = None if leaves[0].is_complex() else dtype
        self._sizes = [columns_of(leaf) for leaf in leaves]
        first = leaves[0].detach()
        real = torch.view_as_real(first) if first.is_complex() else first
        self._flat = real.new_empty(sum(self._sizes), dtype=self._dtype or real.dtype)
        for part, gradient in zip(torch.split(self._flat, self._sizes), gradients, strict=True):
            part.zero_() if gradient is None else part.copy_(flat(gradient))

    def send(self, group: "torch.distributed.ProcessGroup | None") -> None:
        """Start to add it up over the ranks."""
        self._work = torch.distributed.all_reduce(self._flat, group=group, async_op=True)

    def receive(self, count: int) -> list[Tensor | None]:
        """Wait, and return the means over ``count`` ranks, as views."""
        self._work.wait()
        self._flat.div_(count)
        return [
            shaped(part, leaf, self._dtype)
            for part, leaf in zip(torch.split(self._flat, self._sizes), self.leaves, strict=True)
        ]


def buckets(leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the leaves in groups of one device and dtype and about the same number of bytes."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    filled: dict[tuple[torch.device, torch.dtype], int] = {}
    for leaf in leaves:
        kind = leaf.device, leaf.dtype
        kinds.setdefault(kind, []).append(leaf)
        filled[kind] = filled.get(kind, 0) + leaf.nbytes
        if filled[kind] >= _BUCKET_BYTES:
            del filled[kind]
            yield kinds.pop(kind)
    yield from kinds.values()
