"""Backward passes: gradients of single losses, and of combinations, for given leaves."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from mtbalance._graphs import free, reach_of
from mtbalance._products import inner_products
from mtbalance._rows import Rows, all_finite, joined, sum_of
from mtbalance._shards import local
from mtbalance._writing import fresh_grad

_SMALL = 2**10
"""Up to this many entries, calls are all that products of a leaf's gradients cost."""
_TOGETHER = 2**8
"""How many gradients of small leaves are joined at once."""
_MANY_ROWS = 16
"""Of so many rows, zeros for those without a gradient of a leaf cost more than a product apart."""


def gradient_of(
    losses: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    factors: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Return the gradient of the sum of ``factors * losses`` for each input, in one pass."""
    if not inputs:
        return []
    try:
        gradients = torch.autograd.grad(
            losses,
            inputs,  # type: ignore[arg-type]  # of both kinds
            factors,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        raise _explained(error) from error.__cause__
    if getattr(forward_ad, "_current_level", 0) >= 0:
        _check_tangents(gradients)
    return list(gradients)


def _check_tangents(gradients: Sequence[Tensor | None]) -> None:
    """Raise if gradients have tangents, which nothing that is made of them could keep."""
    found = [g for g in gradients if g is not None]
    if any(forward_ad.unpack_dual(g).tangent is not None for g in found):  # type: ignore[no-untyped-call]
        raise ValueError(
            "per-task gradients must have no tangents of forward-mode differentiation, but have "
            "some inside of forward_ad.dual_level(). Balance the losses after it."
        )


def task_gradients(
    losses: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    shares_graph: Sequence[bool],
) -> Iterator[list[Tensor | None]]:
    """Yield, per loss, its gradient for each input, and free its graph once nobody needs it."""
    for loss, shares in zip(losses, shares_graph, strict=True):
        yield gradient_of([loss], inputs, retain_graph=shares)


class BatchedPasses:
    """Backward passes of several tasks at once, vectorised by ``torch.func.vmap``.

    One pass over a chunk of tasks launches the kernels of one task: it saves time where launching
    them is what takes it, on a GPU with small batches.

    It goes through the graphs of all of them for each, with zeros where a task has no part; zero
    times an infinite slope of another task is NaN. So a chunk whose gradients are not all finite is
    repeated task by task, as is one with an operation that cannot be vectorised: the graph lives
    until that is known.

    Args:
        chunk: How many tasks go together.
        looks: Whether it matters whose gradients are not finite, which takes looking at them.
    """

    def __init__(self, chunk: int, *, looks: bool = True) -> None:
        self.chunk = chunk
        self._looks = looks
        self._works: bool | None = None
        """Whether they work. None: not tried yet, or failed once after that; False: never again."""

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
            rows = self._chunk(losses[part], inputs, on_fallback)
            if rows is None:
                yield from task_gradients(losses[part], inputs, shares_graph[part])
            else:
                if not shares_graph[-1]:  # the last graph of all is shared where they are to last
                    free(losses[part], losses[part.stop :])
                yield from rows

    def _chunk(
        self,
        losses: Sequence[Tensor],
        inputs: Sequence[Tensor],
        on_fallback: Callable[[str], None],
    ) -> list[list[Tensor | None]] | None:
        """Return the gradients of a chunk; None if its tasks must be passed one by one."""
        if self._works is False or len(losses) == 1:
            return None
        try:
            gradients = _batched(losses, inputs)
        except Exception as error:  # noqa: BLE001  # whatever vmap makes of an operation
            problem = next(iter(str(error).splitlines()), type(error).__name__)
        else:
            self._works = True
            if self._looks and not all_finite(gradients):
                return None
            return _unbatched(gradients, losses, inputs)
        self._works = None if self._works else False
        # Now, while the graph is whole: where warnings are errors, the step can be taken again.
        on_fallback(
            f"the backward pass cannot be vectorised over tasks and runs one by one ({problem})"
        )
        return None


def _batched(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of all losses for each input, stacked; the graph stays."""
    unit = torch.eye(len(losses), dtype=losses[0].dtype, device=losses[0].device)
    factors = [unit[i].to(loss) for i, loss in enumerate(losses)]
    return torch.autograd.grad(
        losses, inputs, factors, retain_graph=True, allow_unused=True, is_grads_batched=True
    )


def _unbatched(
    gradients: Sequence[Tensor | None], losses: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """Return the gradients per loss, with None where a loss does not reach an input, not zeros."""
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

    Each large leaf's gradient is multiplied as it arrives and let go, so that these never exist
    together. Those of small leaves are joined, as they cost calls and not memory.

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
    large = [number for number in wanted if leaves[number].numel() > _SMALL]
    handles = [
        leaves[number].register_hook(functools.partial(multiply, number))  # type: ignore[no-untyped-call]
        for number in large
    ]
    try:
        gradients = gradient_of([loss], [leaves[number] for number in wanted])
    finally:
        for handle in handles:
            handle.remove()
    small = {
        number: gradient
        for number, gradient in zip(wanted, gradients, strict=True)
        if gradient is not None and leaves[number].numel() <= _SMALL
    }
    return sum_of(products + list(_products_of_small(small, rows, factors)), (len(rows),))


def _products_of_small(
    gradients: Mapping[int, Tensor], rows: Rows, factors: Sequence[float]
) -> Iterator[Tensor]:
    """Yield inner products of the rows with gradients (by their leaf), those of many at once."""
    alike: dict[object, tuple[Sequence[int], list[int]]] = {}
    for number, gradient in gradients.items():
        there: Sequence[int] = range(len(rows))
        if len(rows) >= _MANY_ROWS:
            there = [i for i in there if rows[i][number] is not None]
        sparse = any(t is not None and t.is_sparse for t in (gradient, *(r[number] for r in rows)))
        kind = (factors[number], gradient.dtype, gradient.device, *there)
        alike.setdefault(number if sparse else kind, (there, []))[1].append(number)
    for there, numbers in alike.values():
        for start in range(0, len(numbers) if there else 0, _TOGETHER):
            part = numbers[start : start + _TOGETHER]
            slopes: Sequence[Tensor | None] = [gradients[number] for number in part]
            lines: Rows = [[rows[i][number] for number in part] for i in there]
            if len(part) > 1:  # one alone may be sparse
                *vectors, vector = joined([*lines, slopes])
                lines, slopes = [[each] for each in vectors], [vector]
            products = factors[part[0]] * inner_products(lines, slopes)
            if len(there) < len(rows):
                whole = products.new_zeros(len(rows))
                products = whole.index_copy_(0, torch.tensor(there, device=whole.device), products)
            yield products


def _explained(error: RuntimeError) -> RuntimeError:
    """Return an error that names the setting where a compiled model has given its buffers away."""
    if "donated buffer" not in str(error):
        return error
    clearer = RuntimeError(
        "the model is compiled with donated buffers, which allow one backward pass only, but "
        "this combination of strategies makes one per task. Set "
        "torch._functorch.config.donated_buffer = False before the compiled model's first call."
    )
    clearer.__cause__ = error
    return clearer
