r"""Gradients of linear layers' weights as their factors, which may be smaller than the gradients.

A layer that takes n vectors of d numbers to vectors of k has a weight with d k entries. Its
gradient is a product, :math:`g_i = D_i^T X`, of the layer's inputs :math:`X`, shape (n, d), which
all tasks have in common, and the task's gradient :math:`D_i` of the outputs, shape (n, k). Inner
products are :math:`\langle g_i, g_j \rangle = \langle D_i, X X^T D_j \rangle`, and a combination of
gradients is the product of the same combination of the :math:`D_i`. So where the Gramian and the
combination are all that is asked for, no gradient of a single task is ever made: with few vectors
in a batch, that saves half of each backward pass, and the memory of the rows. The identity is that
of norms of per-example gradients (Goodfellow, arXiv 1510.01799).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from mtbalance._gramians import near_one
from mtbalance._graphs import leaf_of, nodes_of
from mtbalance._passes import task_gradients

_READS = 64
"""As how many products an entry of a row counts that is written, and read for the Gramian and for
the combination: measured on a CPU."""
_CALLS = 2**21
"""As how many products the calls count that factors take: some 35 microseconds."""
_BLOCK = 2**18
"""So many entries of outputs' gradients are multiplied at once, in float64."""
TELLS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
"""Whether this version of PyTorch tells if looking at what is saved makes hooks compute it anew."""
_LAYERS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self")}
"""What multiplies by a weight: as which argument, and as what the inputs are saved."""


class Use(NamedTuple):
    """One of the places in the graphs where a weight is multiplied by."""

    node: Node
    inputs: Tensor
    """Shape (n, d)."""
    transposed: bool
    """Whether the weight has shape (k, d), as that of ``torch.nn.Linear``, and not (d, k)."""


class Layer(NamedTuple):
    """A weight, and all its uses in the graphs of a step."""

    edges: list[GradientEdge]
    """The outputs of each use."""
    sizes: list[int]
    """How many vectors went through each."""
    inputs: Tensor
    """All of them, shape (n, d)."""
    outputs: int
    """How many numbers an output has."""
    transposed: bool

    def factor(self, slopes: Sequence[Tensor | None]) -> Tensor | None:
        """Return a task's gradient of all outputs, shape (n, k); None if it reaches none of them.

        Args:
            slopes: Its gradients of each use's outputs.
        """
        if len(slopes) == 1 or all(slope is None for slope in slopes):
            return slopes[0]
        return torch.cat(
            [
                self.inputs.new_zeros(size, self.outputs) if slope is None else slope
                for size, slope in zip(self.sizes, slopes, strict=True)
            ]
        )

    def gradient(self, factor: Tensor) -> Tensor:
        """Return the gradient of the weight whose factor is given."""
        with torch.autocast(factor.device.type, enabled=False):
            return factor.T @ self.inputs if self.transposed else self.inputs.T @ factor

    def gramian(self, factors: Sequence[Tensor | None], exponents: Sequence[int] = ()) -> Tensor:
        """Return the inner products of the gradients with these factors, shape (m, m), float64.

        Exact but for rounding in float64: nearer to the products of gradients that are never
        rounded to float32 than those of such gradients are.

        Args:
            factors: One per task.
            exponents: What powers of two to divide each gradient by, as in ``gramian_of``.
        """
        inputs, power = self.inputs.double(), 0
        if self.inputs.dtype == torch.float64:  # whose squares float64 need not hold
            inputs, power = near_one(inputs)
        shifts = [power - exponent for exponent in exponents or [0] * len(factors)]
        halves = [2.0 ** (shift // 2) for shift in shifts]
        rests = [2.0 ** (shift - shift // 2) for shift in shifts]
        none = inputs.new_zeros(()).expand(len(inputs), self.outputs)
        kernel = inputs @ inputs.T
        total = kernel.new_zeros(len(factors), len(factors))
        width = max(1, _BLOCK // (len(factors) * len(inputs)))
        for start in range(0, self.outputs, width):
            stop = min(start + width, self.outputs)
            block = kernel.new_empty(len(factors), len(inputs), stop - start)
            for number, factor in enumerate(factors):
                block[number] = (none if factor is None else factor)[:, start:stop]
            if any(shifts):  # in two steps: such a power of two may itself be out of range
                for powers in (halves, rests):
                    block *= block.new_tensor(powers)[:, None, None]
            total += block.flatten(1) @ (kernel @ block).flatten(1).T
        return (total + total.T) / 2


def layers_of(losses: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[int, Layer]:
    """Return the layers whose weights' gradients are cheaper as factors, by the weights' identity.

    They are found in the graphs, whatever modules these come from: PyTorch's products of a matrix
    with a weight, or its transpose. A weight that is used in any other way, too, is left out.

    Args:
        losses: The losses, with their graphs.
        weights: Parameters that may pay, and whose gradients nobody but the Gramian and the
            combination asks for.
    """
    wanted = {id(weight): weight for weight in weights}
    layers = {}
    for key, uses in _uses_of(wanted, losses).items():
        weight, found = wanted[key], [use for use in uses if use is not None]
        if len(found) < len(uses) or len({use.transposed for use in found}) > 1:
            continue
        sizes = [len(use.inputs) for use in found]
        if not pays(weight, sum(sizes), found[0].inputs.shape[1], len(losses)):
            continue
        inputs = [use.inputs for use in found]
        layers[key] = Layer(
            [GradientEdge(use.node, 0) for use in found],
            sizes,
            inputs[0] if len(inputs) == 1 else torch.cat(inputs),
            weight.numel() // inputs[0].shape[1],
            found[0].transposed,
        )
    return layers


def pays(weight: Tensor, vectors: int, inputs: int, tasks: int) -> bool:
    """Return whether factors of a weight's gradients take a tenth less time than the gradients.

    Counted in products of two numbers in float32; in float64 one counts as two.

    Args:
        weight: The weight.
        vectors: How many vectors are multiplied by it.
        inputs: How many numbers each of these has.
        tasks: How many tasks there are.
    """
    size = weight.numel()
    if not size or not vectors:  # a layer without inputs, or a batch without vectors
        return False
    outputs = size // inputs
    rows = tasks * size * (vectors + _READS)
    kernel = 2 * vectors * vectors * (inputs + tasks * outputs)
    factors = kernel + 2 * _READS * tasks * vectors * outputs + size * (vectors + _READS // 2)
    return 10 * (factors + _CALLS) < 9 * rows


def may_pay(weight: Tensor, tasks: int) -> bool:
    """Return whether factors might serve for a parameter, judged by itself."""
    return (
        weight.dim() == 2
        and pays(weight, 1, weight.shape[1], tasks)  # most do not, and no more is asked of them
        and TELLS
        and weight.device.type == "cpu"  # elsewhere nothing has been measured
        and weight.dtype in (torch.float32, torch.float64)
        and weight.layout is torch.strided
        and type(weight) in (torch.nn.Parameter, Tensor)
        and not weight._backward_hooks  # which want to see gradients
    )


def _uses_of(
    weights: Mapping[int, Tensor], losses: Sequence[Tensor]
) -> dict[int, list[Use | None]]:
    """Return the uses of each weight, in an order that the graphs decide; None for other ones."""
    parents: dict[Node, list[tuple[Node, int]]] = {}
    leaves: dict[Node, int] = {}
    for node in nodes_of(losses):
        for argument, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            leaf = leaf_of(child)
            if leaf is not None and id(leaf) in weights:
                leaves[child] = id(leaf)
            if leaf is not None or type(child).__name__ == "TBackward0":
                parents.setdefault(child, []).append((node, argument))
    uses: dict[int, list[Use | None]] = {}
    for node, key in leaves.items():
        for parent, argument in parents[node]:
            flipped = type(parent).__name__ == "TBackward0"
            users = parents[parent] if flipped else [(parent, argument)]
            found = [_use_in(*user, transposed=flipped) for user in users]
            uses.setdefault(key, []).extend(found)
    return uses


def _use_in(node: Node, argument: int, *, transposed: bool) -> Use | None:
    """Return the use of a weight as an argument of an operation; None if it is no plain product."""
    place, name = _LAYERS.get(type(node).__name__, (None, ""))
    if argument != place or getattr(node, "_saved_alpha", 1) != 1:
        return None
    if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        return None
    inputs = getattr(node, f"_saved_{name}").detach()
    return Use(node, inputs, transposed) if inputs.layout is torch.strided else None


def passes_of(
    layers: Mapping[int, Layer],
    losses: Sequence[Tensor],
    leaves: Sequence[Tensor],
    shares_graph: Sequence[bool],
) -> Iterator[list[Tensor | None]]:
    """Yield what ``task_gradients`` does, but factors for the weights of these layers."""
    inputs: list[Tensor | GradientEdge] = []
    for leaf in leaves:
        layer = layers.get(id(leaf))
        inputs += [leaf] if layer is None else layer.edges
    for gradients in task_gradients(losses, inputs, shares_graph):
        left = iter(gradients)
        row = []
        for leaf in leaves:
            layer = layers.get(id(leaf))
            if layer is None:
                row.append(next(left))
            else:
                row.append(layer.factor(list(itertools.islice(left, len(layer.edges)))))
        yield row
