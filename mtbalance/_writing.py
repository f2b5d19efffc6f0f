"""Writing to ``.grad``: accumulating, and keeping or throwing away what a pass has written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtbalance._rows import all_finite
from mtbalance._shards import any_sharded, like_sharded, local


def add_to_grad(leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
    """Accumulate into ``.grad``, as ``Tensor.backward`` does; the tensors become the leaves'."""
    for leaf, direction in zip(leaves, directions, strict=True):
        if direction is None:
            continue
        if leaf.grad is None:
            leaf.grad = _laid_out(direction, leaf)
        else:
            with torch.no_grad():
                leaf.grad.add_(direction)


def _laid_out(direction: Tensor, leaf: Tensor) -> Tensor:
    """Return the direction in the memory layout of its leaf, in which autograd accumulates."""
    if direction.layout is not torch.strided or direction.stride() == leaf.stride():
        return direction
    return torch.empty_like(leaf.detach()).copy_(direction)


def write(leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
    """Accumulate directions, of sharded leaves this process's shards, into ``.grad``."""
    if any_sharded(leaves):
        directions = [like_sharded(d, f) for d, f in zip(directions, leaves, strict=True)]
    add_to_grad(leaves, directions)


class FreshGrad:
    """What a backward pass has put into ``.grad`` since ``fresh_grad`` began."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self.kept = False

    def is_finite(self) -> bool:
        """Return whether all of it is finite (waits for the device)."""
        written = [leaf.grad for leaf in self._leaves]
        return all_finite([None if grad is None else local(grad) for grad in written])

    def take(self) -> list[Tensor | None]:
        """Return what has been written since the last call, and empty ``.grad`` again."""
        taken = [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        return taken

    def keep(self) -> None:
        """Let it be accumulated; otherwise it is thrown away."""
        self.kept = True


@contextmanager
def fresh_grad(leaves: Sequence[Tensor]) -> Iterator[FreshGrad]:
    """Let a backward pass write into empty ``.grad``; then accumulate that, or throw it away."""
    earlier = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    fresh = FreshGrad(leaves)
    try:
        yield fresh
    finally:
        for leaf, old in zip(leaves, earlier, strict=True):
            new = leaf.grad if fresh.kept else None
            if old is not None:
                leaf.grad = old
                add_to_grad([leaf], [new])
            else:
                leaf.grad = new
