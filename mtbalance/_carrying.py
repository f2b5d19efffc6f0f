"""A Balancer's saved state for other tasks: what stays is kept by name, what is new starts."""

import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtbalance._balancer import Balancer
from mtbalance._checks import check_kind
from mtbalance._kept import kept_of
from mtbalance._remembered import TaskChange, own_state
from mtbalance._state import as_bytes, content_of

_EXTRA = "_extra_state"


def with_tasks(
    state_dict: Mapping[str, Any], balancer: Balancer, *, prefix: str = ""
) -> dict[str, Any]:
    """Return a saved state as a Balancer with other tasks loads it.

    Tasks go by name. What was remembered of those that stay is kept, in whatever order they are
    now. A new one is as one that has been absent from every step. Of a removed one, nothing is
    left: also not that it shared parameters, nor kept weights (``every``) that were solved with it.

    The state of the optimizer that moves learned weights is yours; see "A task more, a task less"
    in the recipes of the documentation.

    Args:
        state_dict: What ``state_dict()`` of the Balancer, or of a model that holds it, returned.
        balancer: A Balancer with the new tasks and new, equal strategies in equal groups. Nothing
            happens to it.
        prefix: What the Balancer's keys in ``state_dict`` begin with, such as ``"balancer."``.

    Returns:
        A new state, to be loaded with ``load_state_dict``; all but the Balancer's is as it was.

    Raises:
        ValueError: If it is no state of a Balancer, is older than names in it, has no task in
            common with the Balancer, or a strategy cannot take what it remembers to other tasks.

    Example:
        >>> from mtbalance import make_balancer
        >>> old = make_balancer("uncert+cagrad", tasks=("a", "b"))
        >>> new = make_balancer("uncert+cagrad", tasks=("b", "c"))
        >>> new.load_state_dict(with_tasks(old.state_dict(), new))
        <All keys matched successfully>
    """
    check_kind("balancer", balancer, Balancer)
    carried: dict[str, Any] = OrderedDict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        carried._metadata = metadata  # type: ignore[attr-defined]
    key = prefix + _EXTRA
    content = _content_at(carried, key)
    change = _change(content, balancer.tasks)
    carried[key] = _carried(content, change)
    _carry_modules(carried, balancer, change, prefix)
    return carried


def _content_at(state_dict: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what a Balancer saved besides its strategies."""
    if key not in state_dict:
        raise ValueError(
            f"`state_dict` must hold a Balancer's state, but has no {key!r}. Give `prefix` the "
            "beginning of its keys, such as 'balancer.'."
        )
    return content_of(state_dict[key])


def _carry_modules(
    carried: dict[str, Any], balancer: Balancer, change: TaskChange, prefix: str
) -> None:
    """Let every module say what is to be loaded of what it saved."""
    for name, module in balancer.named_modules(prefix=prefix.removesuffix(".")):
        carry = getattr(module, "carried", None)
        if carry is not None:
            own = own_state(carried, f"{name}.")
            new = carry(own, change)
            for each in own:
                del carried[f"{name}.{each}"]
            carried.update({f"{name}.{each}": value for each, value in new.items()})


def _change(content: Mapping[str, Any], tasks: tuple[str, ...]) -> TaskChange:
    """Return which tasks a state is of, and which it is to be of."""
    old = tuple(content["tasks"])
    if set(old).isdisjoint(tasks):
        raise ValueError(
            f"`state_dict` must have a task in common with the Balancer ({', '.join(tasks)}), but "
            f"is of {', '.join(old)}. A fresh Balancer knows as much."
        )
    if content.get("split") is None:
        return TaskChange(old, tasks)
    stay, places = set(old) & set(tasks), {}
    reached = [stay & set(known) for known in content["split"]]
    for number, by in enumerate(reached):
        if len(by) > 1:  # others have no rows: they are not shared
            places[str(number)] = str(sum(map(bool, reached[:number])))
    return TaskChange(old, tasks, places)


def _carried(content: dict[str, Any], change: TaskChange) -> Tensor:
    """Return what a Balancer saves besides its strategies, for other tasks."""
    count = len(change.old)
    numbers = content["numbers"]
    counts, kept = numbers[: 2 + 2 * count], numbers[2 + 2 * count :]
    active, dropped = counts[2 : 2 + count], counts[2 + count :]
    numbers = [
        *counts[:2],
        *change.pick(active, 0.0),
        *change.pick(dropped, 0.0),
        *kept_of(kept, change),
    ]
    split = content.get("split")
    if split is not None:
        left = [{task: k for task, k in known.items() if task in change.new} for known in split]
        split = [known for known in left if known]
    due = str(content.get("due", "")).ljust(count, "0")
    return as_bytes(
        {
            **content,
            "tasks": change.new,
            "split": split,
            "due": "".join(change.pick(due, "0")),
            "numbers": struct.pack(f"<{len(numbers)}d", *numbers).hex(),
        }
    )
