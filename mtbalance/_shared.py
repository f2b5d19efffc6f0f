"""What the user says is shared: modules and parameters, in groups."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mtbalance._engines import refuse_engines
from mtbalance._record import OF_TASKS
from mtbalance._shards import any_sharded
from mtbalance.weighting._base import Weighting

Shared = nn.Module | Tensor | Iterable["nn.Module | Tensor"]
Groups = dict[str, dict[str, Tensor]]
"""Parameters by the name of their group and their own, in the order given."""

_Members = list[tuple[str, "nn.Module | Tensor"]]
"""Modules and parameters, each with a prefix for the names in it."""


class SharedParts:
    """The shared parameters: of a module, those that it holds at the moment.

    Modules change between steps, by adapters, parametrizations, or assigned or replaced parameters.
    Sharded ones are taken as they were at first: during a step they hold others for a while.

    Args:
        shared: Modules or parameters, one or several, or a mapping from group name to these; None
            where what is shared is to be inferred.
    """

    def __init__(self, shared: Shared | Mapping[str, Shared] | None) -> None:
        self.names: tuple[str, ...] = ()
        """Those that the user has given to the groups, if any."""
        if shared is None:
            self._members: dict[str, _Members] = {}
        elif isinstance(shared, Mapping) and not isinstance(shared, nn.Module):
            self.names = _checked_names(shared)
            self._members = {name: _numbered(members) for name, members in shared.items()}
        else:
            self._members = {"shared": _numbered(shared)}
        self._resolve()
        self.sharded = any_sharded(p for held in self.groups.values() for p in held.values())
        """Whether some of them are."""

    def __getstate__(self) -> dict[str, Any]:
        return {"_members": self._members, "names": self.names, "sharded": self.sharded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What else there is, is made anew when asked for: a copied module may not be complete yet.
        self.__dict__.update(state, _groups=None)

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self._members)

    @property
    def given(self) -> bool:
        """Whether the user has said what is shared."""
        return bool(self._members)

    @property
    def groups(self) -> Groups:
        """The parameters of each group."""
        if self._groups is None:
            self._resolve()
        return self._groups or {}

    @property
    def number_of(self) -> dict[int, int]:
        """The number of each parameter's group, by the parameter's identity."""
        if self._groups is None:
            self._resolve()
        return self._numbers

    @property
    def frozen(self) -> bool:
        """Whether none of them requires a gradient."""
        parameters = itertools.chain(*(held.values() for held in self.groups.values()))
        return not any(parameter.requires_grad for parameter in parameters)

    def renew(self) -> bool:
        """Look at the modules again, and return whether they hold other parameters than before."""
        before = None if self._groups is None else self._numbers
        if before is not None and (self.sharded or self._identities() == self._known):
            return False
        self._resolve()
        if not self.sharded and any(map(_is_sharded_module, self._modules)):
            raise RuntimeError(
                "`shared` must hold modules that are sharded already, but they have been sharded "
                "since the Balancer was made. Make it after fully_shard."
            )
        return self.given and before != self._numbers

    def _resolve(self) -> None:
        groups = {name: _named_parameters(members) for name, members in self._members.items()}
        _check_groups(groups)
        self._groups: Groups | None = groups
        self._numbers = {
            id(parameter): number
            for number, parameters in enumerate(groups.values())
            for parameter in parameters.values()
        }
        members = [member for _, member in itertools.chain(*self._members.values())]
        outer = [member for member in members if isinstance(member, nn.Module)]
        # Held, as the groups are, so that nobody else is given an identity of theirs.
        self._modules = list(dict.fromkeys(itertools.chain(*(m.modules() for m in outer))))
        self._held: list[dict[str, Any]] = []
        for module in self._modules:
            self._held += [module._parameters, module._modules]
        self._known = self._identities()

    def _identities(self) -> list[int]:
        """Return what tells whether anything in the modules has been replaced, quickly."""
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._held))))


def _is_sharded_module(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` has been applied: it adds a base class."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _checked_names(groups: Mapping[str, Shared]) -> tuple[str, ...]:
    """Return the names of the groups, if there are any and each can stand before a figure's."""
    if not groups:
        raise ValueError(f"`shared` must hold parameters, but got {groups!r}.")
    for name in groups:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"`shared` must have non-empty strings as names of groups, but got {name!r}."
            )
        if "/" in name or name in OF_TASKS:
            raise ValueError(
                "`shared` must name groups without '/' and not as the figures of a record "
                f"({', '.join(OF_TASKS)}), but got {name!r}. A group's figures are logged as "
                "'trunk/cosine/a/b'."
            )
    return tuple(groups)


def _check_groups(groups: Groups) -> None:
    """Raise if a group is empty, or a parameter in two of them."""
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


def _named_parameters(members: _Members) -> dict[str, Tensor]:
    """Return the parameters of a group, by name, each once, but for those of weightings in it."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, member in members:
        if isinstance(member, nn.Module):
            weightings = [each for each in member.modules() if isinstance(each, Weighting)]
            learned = {id(parameter) for each in weightings for parameter in each.parameters()}
            for name, parameter in member.named_parameters():
                if id(parameter) not in learned:
                    found.setdefault(id(parameter), (f"{prefix}{name}", parameter))
        else:
            found.setdefault(id(member), (f"{prefix}parameter", member))
    return dict(found.values())


def _numbered(members: object) -> _Members:
    """Return the members, each with a prefix for the names in it, or raise if there are others."""
    if isinstance(members, nn.Module | Tensor):
        numbered: Iterator[tuple[str, object]] = iter([("", members)])
    elif isinstance(members, Iterable) and not isinstance(members, str | bytes):
        numbered = ((f"{number}.", member) for number, member in enumerate(members))
    else:
        numbered = iter([("", members)])
    checked: _Members = []
    for prefix, member in numbered:
        refuse_engines([member])
        if not isinstance(member, nn.Module | Tensor):
            raise TypeError(
                f"`shared` must hold modules and parameters, but got {type(member).__name__}."
            )
        if isinstance(member, Tensor) and not member.is_leaf:
            raise ValueError(
                "`shared` must hold parameters, but got a tensor that was computed from others "
                f"(shape {tuple(member.shape)}). Give the parameter itself."
            )
        checked.append((prefix, member))
    return checked
