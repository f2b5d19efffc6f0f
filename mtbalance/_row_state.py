"""What strategies remember of rows: one tensor per task and parameter, as large as the rows.

Nothing is written to before a step is: what the step is to change waits, with the rows that it
takes, and is made in place at the end, or forgotten with the step. So a step that writes nothing
has nothing to put back, and no copy is needed for it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mtbalance._remembered import TaskChange, moved, own_state
from mtbalance._rows import at_least_float32
from mtbalance._shards import like_sharded, local, spread_of

Place = tuple[int, str]
"""The number of a group of parameters, and the name of one in it, as :func:`in_a_key` has it."""
_ALONE = "rows"
_MADE = "made"


class Log(Protocol):
    """Knows the parameters by names that hold in another process, too."""

    @property
    def finds_all(self) -> bool:
        """Whether all parameters are known from the start."""

    def knows(self, leaf: Tensor) -> bool:
        """Return whether a parameter is one of them, and has not been replaced."""

    def found(self) -> Mapping[Place, Tensor]:
        """Return the parameters that are known, by the names that a loaded state has for them."""

    def saved_as(self) -> Mapping[int, Place]:
        """Return the names that a state has for them that is saved now, by their identity."""

    def still_missing(self) -> Mapping[Place, Place]:
        """Return what names change of parameters that have not been found since a state was loaded.

        From those of the loaded state to those of one that is saved now.
        """


class _Held:
    """What is remembered of a parameter's rows, by the number of the task."""

    def __init__(self, leaf: Tensor, group: int) -> None:
        self.leaf = leaf
        self.group = group
        self.of_tasks: dict[int, Tensor] = {}

    def is_of(self, group: int | None) -> bool:
        """Return whether it is of this group, or of whatever it is."""
        return group is None or self.group == group


class RowState(nn.Module):
    """One tensor per task, group of parameters and parameter, of its shape.

    At least float32, which casts leave alone; made when there is something to remember. Of a
    sharded parameter it is this process's shard, and the saved state holds tensors that are spread
    as the parameter is. Alone, without a Balancer, all columns are one parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, _Held] = {}  # by the identity of the parameter
        self._unplaced: dict[str, Tensor] = {}  # until the parameter is found; and alone
        self._made: Tensor | None = None  # loaded, until all parameters are known
        self._log: Log | None = None
        self._tasks = 0
        self._changes: list[Callable[[], None]] = []

    # By identity, which copying and pickling change.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": list(self._held.values()), "_changes": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._held = {id(held.leaf): held for held in state["_held"]}

    def know(self, log: Log, tasks: int) -> None:
        """Get to know the parameters by name, and how many tasks there are.

        Raises:
            RuntimeError: If it knows those of another Balancer already.
        """
        if self._log is not None and self._log is not log:
            raise RuntimeError(
                "a strategy that remembers rows must belong to one Balancer, but is in two. Make a "
                "new one for each."
            )
        self._log, self._tasks = log, tasks

    # --- reading ----------------------------------------------------------------------------------

    def rows(
        self, leaves: Sequence[Tensor], tasks: Sequence[int], group: int | None = None
    ) -> list[list[Tensor | None]]:
        """Return what is remembered of some parameters, one list per task; it is not a copy.

        Args:
            leaves: The parameters.
            tasks: The tasks, by number.
            group: The number of the parameters' group; None for whatever it is.
        """
        if self._log is None:  # by their turn: nobody knows their names
            keys = [[_key((0, str(n)), task) for n in range(len(leaves))] for task in tasks]
            return [[self._unplaced.get(key) for key in row] for row in keys]
        self.find()
        nothing: dict[int, Tensor] = {}
        held = [self._held.get(id(leaf)) for leaf in leaves]
        tensors = [h.of_tasks if h is not None and h.is_of(group) else nothing for h in held]
        for leaf, of_tasks in zip(leaves, tensors, strict=True):
            for task, tensor in of_tasks.items():
                if tensor.device != leaf.device:  # the model has been moved without its Balancer
                    of_tasks[task] = tensor.to(leaf.device)
        return [[of_tasks.get(task) for of_tasks in tensors] for task in tasks]

    def groups(self) -> list[int]:
        """Return the numbers of the groups of which something is remembered."""
        self.find()
        return sorted({held.group for held in self._held.values()})

    def leaves(self, tasks: Collection[int], group: int) -> list[Tensor]:
        """Return the parameters of a group of which something is remembered of these tasks."""
        return [
            held.leaf
            for held in self._held.values()
            if held.group == group
            and not held.of_tasks.keys().isdisjoint(tasks)
            and (self._log is None or self._log.knows(held.leaf))
        ]

    def alone(self, task: int, group: int, row: Tensor) -> Tensor | None:
        """Return what is remembered of a task's rows that are of no Balancer's.

        Args:
            task: The number of the task.
            group: The number of the group.
            row: One of its rows, shape (p,).

        Raises:
            ValueError: If it is of rows with another number of columns.
        """
        found = self._unplaced.get(_key((group, _ALONE), task))
        if found is not None and found.shape != row.shape:
            raise ValueError(
                f"`gradients` must have {found.numel()} columns, as those that the strategy "
                f"remembers, but got {row.numel()}. Call reset(), or make a new one."
            )
        return None if found is None else found.to(row.device)

    def remember_alone(self, task: int, group: int, row: Tensor) -> None:
        """Remember a row of a task that is of no Balancer's."""
        self._unplaced[_key((group, _ALONE), task)] = row

    # --- writing ----------------------------------------------------------------------------------

    def when_written(self, change: Callable[[], None]) -> None:
        """Make a change once the step is written, and not at all if it is not."""
        self._changes.append(change)

    def end_step(self, *, written: bool) -> None:
        """Make the changes that wait if the step has been written; forget them in any case."""
        changes, self._changes = self._changes, []
        if written:
            with torch.no_grad():
                for change in changes:
                    change()

    def change(
        self,
        leaves: Sequence[Tensor],
        tasks: Sequence[int],
        rows: Sequence[Sequence[Tensor | None]],
        of_row: Callable[[Tensor | None, Tensor | None, int], Tensor | None],
        group: int | None = None,
    ) -> None:
        """Replace what is remembered of some parameters by what a function makes of it.

        Args:
            leaves: The parameters.
            tasks: The tasks, by number.
            rows: The rows of these tasks.
            of_row: Gets what is remembered, if anything, the row's tensor, if any, and the number
                of the row; may write to the first, and returns what is to be remembered.
            group: As for :meth:`rows`.
        """
        old = self.rows(leaves, tasks, group)
        for place, leaf in enumerate(leaves):
            held = self._held.get(id(leaf))
            if self._log is not None and (held is None or not held.is_of(group)):
                held = self._hold(leaf, group or 0)
            for number, (task, row) in enumerate(zip(tasks, rows, strict=True)):
                new = of_row(old[number][place], row[place], number)
                if new is not None and held is not None:
                    held.of_tasks[task] = new
                elif new is not None:
                    self._unplaced[_key((0, str(place)), task)] = new

    def _hold(self, leaf: Tensor, group: int) -> _Held:
        log = self._log
        if log is not None and id(leaf) not in self._held:  # what has been replaced is let go
            self._held = {key: held for key, held in self._held.items() if log.knows(held.leaf)}
        held = self._held[id(leaf)] = _Held(leaf, group)
        return held

    def reset(self) -> None:
        """Remember nothing."""
        self._held, self._unplaced, self._made, self._changes = {}, {}, None, []

    # --- saving and loading -----------------------------------------------------------------------

    def find(self) -> None:
        """Give what has been loaded to the parameters that are known by now."""
        if not self._unplaced or self._log is None:
            return
        found = self._log.found()
        if self._log.finds_all:
            self._forget_what_is_not_made(found)
        for key in list(self._unplaced):
            place, task = _place_in(key)
            leaf = found.get(place)
            if leaf is not None:
                part = _part_for(leaf, self._unplaced.pop(key), place)
                held = self._held.get(id(leaf)) or self._hold(leaf, place[0])
                held.of_tasks[task] = part

    def check_state(self, state: Mapping[str, object]) -> None:
        """Raise ValueError if what was saved, by name, is nothing to go on with."""
        found = self._log.found() if self._log is not None else {}
        made = state.get(_MADE)
        if made is not None and self._log is not None and self._log.finds_all:
            shape = len(found), self._tasks
            if not isinstance(made, Tensor) or made.shape != shape:
                raise ValueError(
                    f"the saved state of rows must belong to {shape[0]} parameters and {shape[1]} "
                    f"tasks, but got {made!r}. Give the Balancer the same groups."
                )
        for key, saved in state.items():
            if key == _MADE:
                continue
            number = isinstance(saved, Tensor) and (saved.is_floating_point() or saved.is_complex())
            if not isinstance(saved, Tensor) or not number or not _is_key(key):
                raise ValueError(
                    "the saved state of rows must be tensors of floating-point numbers by group, "
                    f"task and parameter, but got {saved!r} as {key!r}. Load what `state_dict()` "
                    "returned."
                )
            place, task = _place_in(key)
            if place not in found and self._log is not None and self._log.finds_all:
                raise ValueError(
                    "the saved state of rows must belong to the shared parameters, but has "
                    f"{_named(place)}, which is none of them. Give the Balancer the same groups."
                )
            if self._tasks and task >= self._tasks:
                raise ValueError(
                    f"the saved state of rows must belong to {self._tasks} tasks, but has one of "
                    f"task number {task}. Give the Balancer the same tasks."
                )
            if place in found:
                _part_for(found[place], saved, place)
            if not bool(torch.isfinite(local(saved)).all()):
                raise ValueError(
                    f"the saved state of rows must hold finite numbers, but {_named(place)} does "
                    "not. It was damaged, or saved after a step that went wrong."
                )

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what to load, with other tasks, of what was saved, by name."""
        number = {n: change.new.index(t) for n, t in enumerate(change.old) if t in change.new}
        new = [n for n, task in enumerate(change.new) if task not in change.old]
        carried: dict[str, object] = {}
        made = state.get(_MADE)
        for key, saved in state.items():
            if key == _MADE or not _is_key(key):
                continue
            (group, name), task = _place_in(key)
            if change.places is not None:
                if name not in change.places:
                    continue
                name = change.places[name]
            if task in number:
                carried[_key((group, name), number[task])] = saved
            if isinstance(made, Tensor) and isinstance(saved, Tensor):  # a tensor for everyone
                for each in new:
                    carried[_key((group, name), each)] = torch.zeros_like(saved)
        if isinstance(made, Tensor):
            carried[_MADE] = change.along(1, made, made.new_zeros(()))
        return carried

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.find()
        log = self._log
        if log is not None and log.finds_all:
            destination.update({prefix + key: tensor for key, tensor in self._all(log).items()})
            return
        missing: Mapping[Place, Place] = {}
        if log is not None:
            missing, names = log.still_missing(), log.saved_as()
            for key, held in self._held.items():
                if key in names:
                    for task, tensor in sorted(held.of_tasks.items()):
                        destination[prefix + _key(names[key], task)] = tensor
        elif self._made is not None:
            destination[prefix + _MADE] = self._made
        for name, tensor in self._unplaced.items():
            place, task = _place_in(name)
            if log is None or place in missing:
                destination[prefix + _key(missing.get(place, place), task)] = tensor

    def _all(self, log: Log) -> dict[str, Tensor]:
        """Return what is saved of parameters that are all known: as much before the first step.

        What has not been made is zero then, for loaders that want tensors to load into, and a table
        says so, one number per parameter and task.
        """
        saved: dict[str, Tensor] = {}
        found = log.found()
        made = torch.zeros(len(found), self._tasks, dtype=torch.uint8, device="cpu")
        for number, (place, leaf) in enumerate(found.items()):
            held = self._held.get(id(leaf))
            of_tasks = {} if held is None else held.of_tasks
            for task in range(self._tasks):
                tensor = of_tasks.get(task)
                made[number, task] = tensor is not None
                if tensor is None and leaf.requires_grad:
                    dtype = at_least_float32(leaf.dtype)
                    tensor = torch.zeros_like(local(leaf.detach()), dtype=dtype)
                whole = like_sharded(tensor, leaf)
                if whole is not None:
                    saved[_key(place, task)] = whole
        return {**saved, _MADE: made}

    def _forget_what_is_not_made(self, found: Collection[Place]) -> None:
        """Drop what has been loaded and stands for nothing."""
        if self._made is None:
            return
        for place, row in zip(found, self._made.tolist(), strict=True):
            for task, made in enumerate(row):
                if not made:
                    self._unplaced.pop(_key(place, task), None)
        self._made = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        del rest
        own = own_state(state_dict, prefix)
        self.check_state(own)
        self.reset()
        self._unplaced = {
            key: saved.detach().clone() for key, saved in own.items() if isinstance(saved, Tensor)
        }
        self._made = self._unplaced.pop(_MADE, None)
        self.find()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        for tensors in (self._unplaced, *(held.of_tasks for held in self._held.values())):
            for key, tensor in tensors.items():  # type: ignore[attr-defined]
                tensors[key] = moved(fn, tensor, tensor.dtype)  # type: ignore[index]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __getattr__(self, name: str) -> Any:
        # What walks through a model by the names in its state finds something here.
        return None if name == _MADE or _is_key(name) else super().__getattr__(name)


def name_rows(owner: nn.Module, log: Log, tasks: int) -> None:
    """Let all that remembers rows know the parameters by name."""
    for module in owner.modules():
        if isinstance(module, RowState):
            module.know(log, tasks)


def in_a_key(name: str) -> str:
    """Return a parameter's name without dots, which are not for the keys of a state."""
    return quote(name, safe="").replace(".", "/")


def _key(place: Place, task: int) -> str:
    group, name = place
    return f"{group}/{task}/{name}"


def _place_in(key: str) -> tuple[Place, int]:
    """Return the place and the task that a key is of."""
    group, task, name = key.split("/", 2)
    return (int(group), name), int(task)


def _is_key(key: str) -> bool:
    parts = key.split("/", 2)
    return len(parts) == 3 and all(part.isdecimal() for part in parts[:2])


def _named(place: Place) -> str:
    return f"{place[1].replace('/', '.')!r} of group number {place[0]}"


def _part_for(leaf: Tensor, saved: Tensor, place: Place) -> Tensor:
    """Return what this process holds of a saved tensor that belongs to a parameter, or raise."""
    if saved.shape != leaf.shape:
        raise ValueError(
            f"the saved state of rows must have the shapes of the parameters, but {_named(place)} "
            f"has shape {tuple(saved.shape)}, and the parameter {tuple(leaf.shape)}. It is that of "
            "another model."
        )
    if spread_of(saved) != spread_of(leaf):
        raise ValueError(
            "the saved state of rows must be spread over processes as the parameters are, but "
            f"{_named(place)} is spread as {spread_of(saved)}, and the parameter as "
            f"{spread_of(leaf)}. Load it with torch.distributed.checkpoint."
        )
    return local(saved).to(local(leaf.detach()).device)
