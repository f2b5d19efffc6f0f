"""Writing to ``.grad``: accumulating, and keeping or throwing away what a pass has written.

Hooks on accumulated gradients (``Tensor.register_post_accumulate_grad_hook``) are called here and
nowhere else: once per step, when all of it is written. Autograd would call them in each pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mtbalance._rows import all_finite, with_room_for
from mtbalance._shards import any_sharded, like_sharded, local

_hooked: ContextVar[dict[int, Tensor] | None] = ContextVar("hooked", default=None)
"""Leaves with hooks that have got a gradient in the step that is being taken."""


@contextmanager
def hooks_when_written() -> Iterator[None]:
    """Call the hooks of what is written inside at the end; none of them after an error."""
    hooked: dict[int, Tensor] = {}
    token = _hooked.set(hooked)
    try:
        yield
    finally:
        _hooked.reset(token)
    for leaf in hooked.values():
        for hook in list(_hooks_of(leaf).values()):
            with torch.no_grad():  # as in a backward pass
                hook(leaf)


def _hooks_of(leaf: Tensor) -> dict[int, Any]:
    """Return the hooks that autograd calls when it has accumulated a gradient."""
    return leaf._post_accumulate_grad_hooks or {}


def _note_written(hooked: Sequence[Tensor]) -> None:
    """Note that leaves with hooks have got a gradient."""
    noted = _hooked.get()
    if noted is not None:
        noted.update((id(leaf), leaf) for leaf in hooked)


def add_to_grad(leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
    """Accumulate into ``.grad``, as ``Tensor.backward`` does; the tensors become the leaves'."""
    hooked = []
    for leaf, direction in zip(leaves, directions, strict=True):
        if direction is None:
            continue
        earlier = leaf.grad
        if earlier is None:
            leaf.grad = _laid_out(direction, leaf)
        else:
            with torch.no_grad():
                total = with_room_for(earlier, direction).add_(direction)
            if total is not earlier:
                leaf.grad = _laid_out(total, leaf)
        if leaf._post_accumulate_grad_hooks:
            hooked.append(leaf)
    _note_written(hooked)


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
        if any_sharded(self._leaves):
            written = [None if grad is None else local(grad) for grad in written]
        return all_finite(written)

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
    suspended = [(leaf, hooks, dict(hooks)) for leaf in leaves if (hooks := _hooks_of(leaf))]
    for _, hooks, _ in suspended:
        hooks.clear()  # and not another dictionary: handles that remove a hook know this one
    try:
        yield fresh
    finally:
        for _, hooks, saved in suspended:
            hooks.update(saved)
        if fresh.kept:
            _note_written([leaf for leaf, _, _ in suspended if leaf.grad is not None])
        for leaf, old in zip(leaves, earlier, strict=True):
            if old is not None or not fresh.kept:
                new, leaf.grad = leaf.grad, old
                add_to_grad([leaf], [new if fresh.kept else None])
