"""What stands between a loss and the shared parameters, in words of the user's code."""

from collections.abc import Iterable

from torch import Tensor, nn

from mtbalance._graphs import nodes_of

_REENTRANT = "CheckpointFunctionBackward"


def hidden_by(losses: Iterable[Tensor], leaves: Iterable[Tensor]) -> str | None:
    """Return why losses may reach no shared parameter, and the remedy; None if nothing tells.

    Args:
        losses: The losses, as far as their graphs are there.
        leaves: What they reach.
    """
    if any(node.name() == _REENTRANT for node in nodes_of(list(losses))):
        return (
            f"its graph ends in re-entrant activation checkpointing ({_REENTRANT}), which hides "
            "the parameters behind it. Call torch.utils.checkpoint with use_reentrant=False."
        )
    plain = [leaf for leaf in leaves if not isinstance(leaf, nn.Parameter)]
    if plain:
        return (
            f"reaches {len(plain)} tensors that are no parameters (one of shape "
            f"{tuple(plain[0].shape)}), as with torch.func.functional_call. Give those that are "
            "shared as `shared`, the same in every step, or call the module with its parameters."
        )
    return None
