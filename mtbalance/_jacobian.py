"""Per-task gradients of the parameters that losses reach, and writing directions to ``.grad``."""

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from mtbalance._rows import (
    CACHED_COLUMNS,
    Piece,
    Rows,
    all_finite,
    at_least_float32,
    column_blocks,
    flat,
    inner_products,
    shaped,
    sum_of,
)
from mtbalance._shards import local

# --- what the graphs hold -------------------------------------------------------------------------


_LeafNode = type(
    torch.ones((), requires_grad=True, device="cpu").view(()).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
)
"""What stands for a leaf in a graph."""


class Reach(NamedTuple):
    """What the graphs of some losses hold."""

    leaves: list[Tensor]
    """Every leaf that some loss reaches, in an order that the graphs decide."""
    shares_graph: list[bool]
    """Per loss, whether a later loss needs a part of its graph."""


def reach_of(losses: Sequence[Tensor], until: Sequence[Tensor] = ()) -> Reach:
    """Walk the graphs of the losses once.

    Args:
        losses: The losses.
        until: Tensors in the graphs beyond which not to look.
    """
    owner: dict[Node, int] = {}
    leaves: dict[int, Tensor] = {}
    shares_graph = [False] * len(losses)
    ends = {tensor.grad_fn for tensor in until}
    for number in reversed(range(len(losses))):
        loss = losses[number]
        if loss.grad_fn is None:
            leaves.setdefault(id(loss), loss)
        stack = [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in ends:
                continue
            is_leaf = type(node) is _LeafNode
            if node in owner:
                shares_graph[number] |= owner[node] != number and not is_leaf
                continue
            owner[node] = number
            if is_leaf:
                leaf = node.variable  # type: ignore[attr-defined]
                leaves.setdefault(id(leaf), leaf)
            else:
                stack += [child for child, _ in node.next_functions]
    return Reach(list(leaves.values()), shares_graph)


# --- backward passes ------------------------------------------------------------------------------


def gradient_of(
    losses: Sequence[Tensor],
    inputs: Sequence[Tensor],
    factors: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Return the gradient of the sum of ``factors * losses`` for each input, in one pass."""
    if not inputs:
        return []
    with _explained():
        gradients = torch.autograd.grad(
            losses, inputs, factors, retain_graph=retain_graph, allow_unused=True
        )
    return list(gradients)


def task_gradients(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], shares_graph: Sequence[bool]
) -> Iterator[list[Tensor | None]]:
    """Yield, per loss, its gradient for each input, and free its graph once nobody needs it."""
    for loss, shares in zip(losses, shares_graph, strict=True):
        yield gradient_of([loss], inputs, retain_graph=shares)


class BatchedPasses:
    """Backward passes of several tasks at once, vectorised by ``torch.func.vmap``.

    One pass over a chunk of tasks launches the kernels of one task: it saves time where launching
    them is what takes it, on a GPU with small batches.

    Args:
        chunk: How many tasks go together.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._works: bool | None = None

    def __call__(
        self,
        losses: Sequence[Tensor],
        inputs: Sequence[Tensor],
        shares_graph: Sequence[bool],
        on_fallback: Callable[[str], None],
    ) -> Iterator[list[Tensor | None]]:
        """Yield what :func:`task_gradients` does, in the same order.

        ``on_fallback`` is told why, when an operation in the graph cannot be vectorised.
        """
        for start in range(0, len(losses), self.chunk):
            part = slice(start, start + self.chunk)
            batch = None
            if self._works is not False and len(losses[part]) > 1:
                batch = self._try(losses[part], inputs, on_fallback, any(shares_graph[part]))
            if batch is None:
                yield from task_gradients(losses[part], inputs, shares_graph[part])
            else:
                yield from batch

    def _try(
        self,
        losses: Sequence[Tensor],
        inputs: Sequence[Tensor],
        on_fallback: Callable[[str], None],
        shares_graph: bool,  # noqa: FBT001
    ) -> list[list[Tensor | None]] | None:
        unit = torch.eye(len(losses), dtype=losses[0].dtype, device=losses[0].device)
        factors = [unit[i].to(loss) for i, loss in enumerate(losses)]
        try:
            with _explained():
                gradients = torch.autograd.grad(
                    losses,
                    inputs,
                    factors,
                    # Until it has worked once, the graph must survive for the passes one by one.
                    retain_graph=shares_graph or self._works is None,
                    allow_unused=True,
                    is_grads_batched=True,
                )
        except RuntimeError as error:
            if self._works:
                raise
            self._works = False
            on_fallback(
                "the backward pass cannot be vectorised over tasks and runs one by one "
                f"({str(error).splitlines()[0]})"
            )
            return None
        self._works = True
        # The batched pass gives zeros where a single one says that a loss does not reach an input.
        reached = [{id(leaf) for leaf in reach_of([loss]).leaves} for loss in losses]
        return [
            [
                gradient[i] if gradient is not None and id(leaf) in reached[i] else None
                for leaf, gradient in zip(inputs, gradients, strict=True)
            ]
            for i in range(len(losses))
        ]


def sharded_task_gradients(
    losses: Sequence[Tensor], leaves: Sequence[Tensor], shares_graph: Sequence[bool]
) -> Iterator[list[Tensor | None]]:
    """Yield, per loss, this process's part of its gradient for each sharded (or other) leaf.

    Sharded parameters are not in the graph: what shards them (``fully_shard``) puts whole ones
    there, and after a backward pass the averaged gradient's shard into ``.grad``, where this looks.
    """
    with fresh_grad(leaves) as fresh:
        for loss, shares in zip(losses, shares_graph, strict=True):
            torch.autograd.backward(loss, retain_graph=shares)
            yield [None if g is None else local(g) for g in fresh.take()]


def products_with_gradient(
    loss: Tensor, leaves: Sequence[Tensor], rows: Rows, factors: Sequence[float]
) -> Tensor:
    """Return the inner product of each row with the gradient of a loss, shape (m,), float64.

    Each leaf's gradient is multiplied as it arrives and let go, so that all of them never exist
    together.

    Args:
        loss: The loss.
        leaves: What the rows are gradients of.
        rows: The rows, m of them.
        factors: A factor for each leaf; leaves with 0 are left out.
    """
    products: list[Tensor] = []

    def multiply(number: int, gradient: Tensor) -> Tensor | None:
        part = inner_products([[row[number]] for row in rows], [gradient.detach()])
        products.append(factors[number] * part)
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    wanted = [number for number, factor in enumerate(factors) if factor != 0]
    handles = [
        leaves[number].register_hook(functools.partial(multiply, number))  # type: ignore[no-untyped-call]
        for number in wanted
    ]
    try:
        gradient_of([loss], [leaves[number] for number in wanted])
    finally:
        for handle in handles:
            handle.remove()
    return sum_of(products, (len(rows),))


@contextmanager
def _explained() -> Iterator[None]:
    """Name the setting where a compiled model has given its buffers away."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "the model is compiled with donated buffers, which allow one backward pass only, but "
            "this combination of strategies makes one per task. Set "
            "torch._functorch.config.donated_buffer = False before the compiled model's first call."
        ) from error


# --- rows of one step -----------------------------------------------------------------------------


def converted(row: list[Tensor | None], dtype: torch.dtype | None) -> list[Tensor | None]:
    """Return gradients in the dtype that they are kept in, emptying the list of the others."""
    if dtype is not None:
        for number, gradient in enumerate(row):
            if gradient is not None and not gradient.is_complex():
                row[number] = gradient.to(dtype)
    return row


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
        self,
        task: str,
        loss: Tensor,
        leaves: Sequence[Tensor],
        row: Sequence[Tensor | None],
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

    def rows(self, tasks: Sequence[str], leaves: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Return the gradients of these tasks for these leaves."""
        return [[self._gradients[task].get(id(leaf)) for leaf in leaves] for task in tasks]

    def take(self, task: str, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """Return one task's gradients for these leaves, and forget that task's."""
        gradients = self._gradients.pop(task)
        return [gradients.get(id(leaf)) for leaf in leaves]

    def forget(self) -> None:
        """Leave the gradients to the rows that have been asked for."""
        self._gradients.clear()


# --- directions -----------------------------------------------------------------------------------


def direct_by_columns(
    strategy: Callable[[Tensor, int], Tensor],
    rows: Rows,
    weights: Tensor,
    like: Sequence[Tensor],
    *,
    in_blocks: bool = True,
    first: int = 0,
) -> tuple[list[Tensor | None], Tensor]:
    """Apply a strategy to the weighted rows as a matrix, or block by block of its columns.

    Args:
        strategy: Maps a matrix (m, n) and the number of its first column to a direction (n,).
        rows: The raw rows, m of them, lists that are emptied on the way.
        weights: Their weights, shape (m,).
        like: Tensors of the shapes and dtypes of the result.
        in_blocks: Whether the strategy may be asked for blocks of columns.
        first: The number of the first column.

    Returns:
        The direction, one tensor per parameter, and its inner products with the raw rows, (m,).
    """
    parts: list[Tensor | None] = [None] * len(like)
    reached = [any(t is not None for t in tensors) for tensors in zip(*rows, strict=True)]
    progress = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    unweighted = weights.device.type == "cpu" and bool((weights == 1).all())
    for matrix, pieces in _blocks(rows, in_blocks=in_blocks):
        weighted = matrix if unweighted else matrix * weights.to(matrix)[:, None]
        columns = strategy(weighted, first)
        first += matrix.shape[1]
        progress = progress.to(matrix.device) + (matrix @ columns.to(matrix)).double()
        sizes = [stop - start for _, start, stop in pieces]
        for (parameter, start, stop), values in zip(
            pieces, torch.split(columns, sizes), strict=True
        ):
            part = parts[parameter]
            if part is None:
                # As real numbers in the sum's dtype, until all of it is there.
                whole = flat(like[parameter].detach())
                parts[parameter] = part = torch.empty_like(
                    whole, dtype=at_least_float32(whole.dtype)
                )
            part[start:stop].copy_(values)
    # What has no entries (a shard may) has no columns, but a direction nevertheless.
    directions = [
        shaped(part, tensor) if part is not None else torch.zeros_like(tensor) if found else None
        for part, tensor, found in zip(parts, like, reached, strict=True)
    ]
    return directions, progress


def _blocks(rows: Rows, *, in_blocks: bool) -> Iterator[tuple[Tensor, list[Piece]]]:
    """Yield blocks of columns, or all of them as one matrix on the first one's device."""
    if in_blocks:
        yield from column_blocks(rows, columns=CACHED_COLUMNS, release=True)
        return
    # One block per device and dtype, none of which is written to again.
    devices = {t.device.type for row in rows for t in row if t is not None}
    blocks = list(column_blocks(rows, columns=dict.fromkeys(devices, sys.maxsize), release=True))
    if blocks:
        device = blocks[0].matrix.device
        matrices = [block.matrix.to(device) for block in blocks]
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
        yield matrix, [piece for block in blocks for piece in block.pieces]


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
