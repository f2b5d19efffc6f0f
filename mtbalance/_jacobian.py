"""Per-task gradients of the parameters that losses reach, and writing directions to ``.grad``."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from mtbalance._rows import Rows, all_finite, column_blocks, flat


class Reach(NamedTuple):
    """What the graphs of some losses hold."""

    leaves: list[Tensor]
    """Every leaf that some loss reaches, in an order that the graphs decide."""
    shares_graph: list[bool]
    """Per loss, whether a later loss needs a part of its graph."""


def reach_of(losses: Sequence[Tensor]) -> Reach:
    """Walk the graphs of the losses once."""
    owner: dict[Node, int] = {}
    leaves: dict[int, Tensor] = {}
    shares_graph = [False] * len(losses)
    for number in reversed(range(len(losses))):
        loss = losses[number]
        if loss.grad_fn is None:
            leaves.setdefault(id(loss), loss)
        stack = [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None:
                continue
            if node in owner:
                is_leaf = hasattr(node, "variable")
                shares_graph[number] |= owner[node] != number and not is_leaf
                continue
            owner[node] = number
            if hasattr(node, "variable"):
                leaves.setdefault(id(node.variable), node.variable)
            stack.extend(child for child, _ in node.next_functions)
    return Reach(list(leaves.values()), shares_graph)


def task_gradients(losses: Sequence[Tensor], reach: Reach) -> Iterator[Sequence[Tensor | None]]:
    """Yield, per loss, its gradient for each leaf, and free its graph once nobody needs it."""
    for loss, shares_graph in zip(losses, reach.shares_graph, strict=True):
        yield torch.autograd.grad(loss, reach.leaves, retain_graph=shares_graph, allow_unused=True)


class TaskGradients:
    """What has been accumulated for one step: per task, its loss and its gradient for each leaf."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self.nonfinite: set[str] = set()
        self._gradients: dict[str, dict[int, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.losses or self.nonfinite)

    def add(
        self, task: str, loss: Tensor, leaves: Sequence[Tensor], row: Sequence[Tensor | None]
    ) -> None:
        """Add a loss and its gradients. Tensors that come from autograd are never written to."""
        if task in self.nonfinite:
            return
        self.losses[task] = self.losses[task] + loss if task in self.losses else loss
        gradients = self._gradients.setdefault(task, {})
        for leaf, gradient in zip(leaves, row, strict=True):
            if gradient is not None:
                self.leaves.setdefault(id(leaf), leaf)
                earlier = gradients.get(id(leaf))
                gradients[id(leaf)] = gradient if earlier is None else earlier + gradient

    def mark_nonfinite(self, tasks: Collection[str]) -> None:
        """Take tasks out of the step."""
        self.nonfinite.update(tasks)
        for task in tasks:
            self.losses.pop(task, None)
            self._gradients.pop(task, None)

    def leaves_of(self, task: str) -> list[Tensor]:
        """Return the leaves that a task reaches."""
        return [self.leaves[key] for key in self._gradients[task]]

    def rows(self, tasks: Sequence[str], leaves: Sequence[Tensor]) -> Rows:
        """Return the gradients of these tasks for these leaves."""
        return [[self._gradients[task].get(id(leaf)) for leaf in leaves] for task in tasks]


def direct_by_columns(
    strategy: Callable[[Tensor], Tensor], rows: Rows, weights: Tensor, *, coordinatewise: bool
) -> tuple[list[Tensor | None], Tensor]:
    """Apply a strategy to the weighted rows as a matrix, or block by block of its columns.

    Args:
        strategy: Maps a matrix (m, n) to a direction (n,).
        rows: The raw rows, m of them.
        weights: Their weights, shape (m,).
        coordinatewise: Whether the strategy may be asked for blocks of columns.

    Returns:
        The direction, one tensor per parameter, and its inner products with the raw rows, (m,).
    """
    pieces, products = [], []
    for block in column_blocks(rows) if coordinatewise else [_matrix(rows)]:
        piece = strategy(block * weights.to(block)[:, None])
        products.append(block @ piece.to(block.dtype))
        pieces.append(piece)
    device = pieces[0].device
    direction = torch.cat([piece.to(device) for piece in pieces])
    progress = torch.stack([product.to(device).double() for product in products]).sum(0)
    reached = [next((g for g in gs if g is not None), None) for gs in zip(*rows, strict=True)]
    sizes = [0 if g is None else flat(g).numel() for g in reached]
    parts = zip(torch.split(direction, sizes), reached, strict=True)
    return [None if like is None else _shaped(part, like) for part, like in parts], progress


def _matrix(rows: Rows) -> Tensor:
    """Return all rows as one matrix (m, p) on the first parameter's device."""
    blocks = [block.clone() for block in column_blocks(rows)]
    return torch.cat([block.to(blocks[0].device) for block in blocks], 1)


def _shaped(vector: Tensor, like: Tensor) -> Tensor:
    """Undo ``flat``."""
    vector = vector.to(like.device)
    if like.is_complex():
        vector = torch.view_as_complex(vector.reshape(*like.shape, 2))
    return vector.reshape(like.shape).to(like.dtype)


@torch.no_grad()
def add_to_grad(leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
    """Accumulate into ``.grad``, as ``Tensor.backward`` does; the tensors become the leaves'."""
    for leaf, direction in zip(leaves, directions, strict=True):
        if direction is None:
            continue
        if leaf.grad is None:
            leaf.grad = direction
        else:
            leaf.grad.add_(direction)


class FreshGrad:
    """What a backward pass has put into ``.grad`` since ``fresh_grad`` began."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self.kept = False

    def is_finite(self) -> bool:
        """Return whether all of it is finite (waits for the device)."""
        return all_finite([leaf.grad for leaf in self._leaves])

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
