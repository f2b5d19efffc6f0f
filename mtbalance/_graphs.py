"""What the graphs of losses hold: the leaves that they reach, and parts that several need."""

import functools
import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.parallel import distributed

_LeafNode = type(
    torch.ones((), requires_grad=True, device="cpu").view(()).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
)
"""What stands for a leaf in a graph."""


_Sink = getattr(getattr(distributed, "_DDPSink", None), "_backward_cls", None)
"""What ``DistributedDataParallel`` with ``find_unused_parameters`` leads all outputs of a model
through: each as it is, though they are outputs of one operation."""


_Edge = tuple[Node | None, int]
_Visit = tuple[Node, int]


class Reach(NamedTuple):
    """What the graphs of some losses hold."""

    leaves: list[Tensor]
    """Every leaf that some loss reaches, in an order that the graphs decide."""
    shares_graph: list[bool]
    """Per loss, whether a later loss needs a part of its graph."""


def nodes_of(losses: Sequence[Tensor], known: Collection[Node] = ()) -> Collection[Node]:
    """Return the nodes in the graphs of losses, without looking beyond known ones.

    In an order that the graphs decide.
    """
    found: dict[Node, None] = {}
    stack = [loss.grad_fn for loss in losses]
    while stack:
        node = stack.pop()
        if node is not None and node not in found and node not in known:
            found[node] = None
            stack += [child for child, _ in node.next_functions]
    return found.keys()


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf that a node stands for; None if it stands for an operation."""
    return node.variable if type(node) is _LeafNode else None  # type: ignore[attr-defined]


def is_computed_from(tensor: Tensor, other: Tensor) -> bool:
    """Return whether the graph of a tensor holds another one, which is no leaf."""
    own = tensor.grad_fn  # which outputs of one operation have in common
    return other.grad_fn is not own and other.grad_fn in nodes_of([tensor])


def reach_of(losses: Sequence[Tensor], until: Sequence[Tensor] = ()) -> Reach:
    """Walk the graphs of the losses once.

    Args:
        losses: The losses.
        until: Tensors in the graphs beyond which not to look.
    """
    owner: dict[Node, int] = {}
    leaves: dict[int, Tensor] = {}
    shares_graph = [False] * len(losses)
    ends = {(tensor.grad_fn, tensor.output_nr) for tensor in until}
    through: set[tuple[Node, int]] = set()
    for number in reversed(range(len(losses))):
        loss = losses[number]
        if loss.grad_fn is None:
            leaves.setdefault(id(loss), loss)
        stack = [(loss.grad_fn, loss.output_nr)]
        while stack:
            node, output = stack.pop()
            if node is None or (ends and (node, output) in ends):
                continue
            kind = type(node)
            if node in owner:
                shares_graph[number] |= owner[node] != number and kind is not _LeafNode
                if kind is not _Sink:
                    continue
            owner.setdefault(node, number)
            if kind is _LeafNode:
                leaf = node.variable  # type: ignore[attr-defined]
                leaves[id(leaf)] = leaf
            elif kind is not _Sink:
                stack += node.next_functions
            elif (node, output) not in through:
                through.add((node, output))
                stack.append(node.next_functions[output])
    return Reach(list(leaves.values()), shares_graph)


def leaves_of_each(losses: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return, per loss, the leaves that it alone reaches, and those that several losses reach.

    Nodes are visited once, or twice where losses have them in common, however many losses there
    are. To know which of the common ones a loss reaches would take a walk for each.
    """
    owner: dict[_Visit, int] = {}
    met: list[_Visit] = []
    for number, loss in enumerate(losses):
        stack: list[_Edge] = [(loss.grad_fn, loss.output_nr)]
        while stack:
            visit = _visit_of(*stack.pop())
            if visit is None or owner.get(visit) == number:
                continue
            if visit in owner:
                met.append(visit)
            else:
                owner[visit] = number
                stack += _below(visit)
    common: set[_Visit] = set()
    while met:
        visit = met.pop()
        if visit not in common:
            common.add(visit)
            met += filter(None, itertools.starmap(_visit_of, _below(visit)))
    shared = [leaf for node, _ in common if (leaf := leaf_of(node)) is not None]
    found = [[*shared] if loss.grad_fn else [loss] for loss in losses]
    for visit, number in owner.items():
        leaf = leaf_of(visit[0])
        if leaf is not None and visit not in common:
            found[number].append(leaf)
    return found


def _visit_of(node: Node | None, output: int) -> _Visit | None:
    """Return what a walk has seen when it has come to an output of a node; None without a node."""
    if node is None:
        return None
    return (node, output) if type(node) is _Sink else (node, 0)


def _below(visit: _Visit) -> Sequence[_Edge]:
    """Return where a walk goes on from what it has come to."""
    node, output = visit
    further = node.next_functions
    return further if type(node) is not _Sink else further[output : output + 1]


def free(losses: Sequence[Tensor], later: Sequence[Tensor] = ()) -> None:
    """Let go of what the graphs of losses have saved, as a pass that does not retain them does.

    What hooks of the user keep instead (``saved_tensors_hooks``) stays as long as the losses do.

    Args:
        losses: Losses whose passes have been made.
        later: Losses whose passes are to come: what their graphs hold stays.
    """
    for node in nodes_of(losses, nodes_of(later)):
        for name in _saved_by(type(node)):
            saved: Any = ()
            with suppress(RuntimeError):  # freed already, by another pass
                saved = getattr(node, name)
            for each in saved if isinstance(saved, tuple) else (saved,):
                with suppress(RuntimeError):  # nothing is there, or a hook of the user
                    each.register_hooks(_forget, _second_pass)


@functools.cache
def _saved_by(kind: type[Node]) -> list[str]:
    """Return the names of what nodes of a kind have saved for their backward passes."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _forget(_: Tensor) -> None:
    """Stand for a saved tensor."""


def _second_pass(_: None) -> NoReturn:
    raise RuntimeError(
        "backward passes must be made once per graph, but this is the second time: the Balancer "
        "has freed it, as Tensor.backward does."
    )


def compiled_outputs_of(loss: Tensor) -> dict[Node, set[int]]:
    """Return which outputs of each compiled function a loss is computed from."""
    found: dict[Node, set[int]] = {}
    known: set[Node | None] = {None}
    stack = [(loss.grad_fn, loss.output_nr)]
    while stack:
        node, output = stack.pop()
        if node is not None and type(node).__name__ == "CompiledFunctionBackward":
            found.setdefault(node, set()).add(output)
        if node not in known:
            known.add(node)
            stack += node.next_functions  # type: ignore[union-attr]
    return found
