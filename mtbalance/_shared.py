"""What the user says is shared: modules and parameters, in groups."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

Shared = nn.Module | Tensor | Iterable["nn.Module | Tensor"]


def named_groups(shared: Shared | Mapping[str, Shared]) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of each group, by name, in the order given, each once.

    Args:
        shared: Modules or parameters, one or several, or a mapping from group name to these.
    """
    if isinstance(shared, Mapping) and not isinstance(shared, nn.Module):
        groups = {str(name): _named_parameters(members) for name, members in shared.items()}
    else:
        groups = {"shared": _named_parameters(shared)}
    owner: dict[int, str] = {}
    for group, parameters in groups.items():
        if not parameters:
            raise ValueError(
                f"`shared` must hold parameters, but got none in group {group!r}. "
                "Leave it out to let the Balancer infer what is shared."
            )
        for name, parameter in parameters.items():
            other = owner.setdefault(id(parameter), group)
            if other != group:
                raise ValueError(
                    f"`shared` must hold each parameter in one group, but {name!r} is in "
                    f"{other!r} and {group!r}. Tied weights belong to one group."
                )
    return groups


def _named_parameters(members: Shared) -> dict[str, Tensor]:
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, member in _numbered(members):
        if isinstance(member, nn.Module):
            for name, parameter in member.named_parameters():
                found.setdefault(id(parameter), (f"{prefix}{name}", parameter))
        elif isinstance(member, Tensor):
            if not member.is_leaf:
                raise ValueError(
                    "`shared` must hold parameters, but got a tensor that was computed from others "
                    f"(shape {tuple(member.shape)}). Give the parameter itself."
                )
            found.setdefault(id(member), (f"{prefix}parameter", member))
        else:
            raise TypeError(
                f"`shared` must hold modules and parameters, but got {type(member).__name__}."
            )
    return dict(found.values())


def _numbered(members: object) -> Iterator[tuple[str, object]]:
    """Yield the members, each with a prefix for the names in it."""
    if isinstance(members, nn.Module | Tensor):
        yield "", members
    elif isinstance(members, Iterable) and not isinstance(members, str | bytes):
        for number, member in enumerate(members):
            yield f"{number}.", member
    else:
        raise TypeError(
            f"`shared` must hold modules and parameters, but got {type(members).__name__}."
        )
