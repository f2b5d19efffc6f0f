"""What the graphs of losses hold: the leaves that they reach, and parts that several need."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

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


def is_computed_from(tensor: Tensor, other: Tensor) -> bool:
    """Return whether the graph of a tensor holds another one, which is no leaf."""
    seen: set[Node | None] = {tensor.grad_fn}  # outputs of one operation have it in common
    stack: list[Node | None] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions if node is not None else ():
            if child is other.grad_fn:
                return True
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return False


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
