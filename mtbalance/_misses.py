"""Errors told in words of the user's code, where it is unusual: what a graph holds, and where."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import Node

from mtbalance._graphs import reach_of

_MISSED = " must reach a shared parameter"
_REENTRANT = "CheckpointFunctionBackward"
_TANGENTS = (
    "per-task gradients must have no tangents of forward-mode differentiation, but have some "
    "inside of forward_ad.dual_level(). Balance the losses after it."
)


@contextmanager
def told_from_graphs(losses: object) -> Iterator[None]:
    """Name in an error what graphs hold instead of shared parameters, or besides gradients."""
    try:
        yield
    except ValueError as error:
        who, missed, what = str(error).partition(_MISSED)
        if missed and isinstance(losses, Mapping):
            named = [loss for task, loss in losses.items() if repr(task) in who]
            why = next(filter(None, map(_reason, named)), None)
            if why is not None and "are frozen" not in what:
                error.args = (f"{who}{missed}, but {why}",)
        raise
    except NotImplementedError as error:
        if "forward AD" in str(error):
            error.args = (_TANGENTS,)
        raise


def _reason(loss: Tensor) -> str | None:
    """Return why a loss may reach no parameter, and the remedy; None if its graph does not tell."""
    if _holds(loss, _REENTRANT):
        return (
            f"its graph ends in re-entrant activation checkpointing ({_REENTRANT}), which hides "
            "the parameters behind it. Call torch.utils.checkpoint with use_reentrant=False."
        )
    plain = [leaf for leaf in reach_of([loss]).leaves if not isinstance(leaf, nn.Parameter)]
    if plain:
        return (
            f"reaches {len(plain)} tensors that are no parameters (one of shape "
            f"{tuple(plain[0].shape)}), as with torch.func.functional_call. Give those that are "
            "shared as `shared`, the same in every step, or call the module with its parameters."
        )
    return None


def _holds(loss: Tensor, name: str) -> bool:
    """Return whether the graph of a loss holds an operation of that name."""
    seen: set[Node | None] = {None, loss.grad_fn}
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == name:
            return True
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return False
