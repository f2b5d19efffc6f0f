"""What strategies remember: numbers that casts leave precise, and state per task and group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class TaskChange:
    """Which tasks a saved state is of, and which it is to be of."""

    old: tuple[str, ...]
    """The tasks that it is of, in order."""
    new: tuple[str, ...]
    """Those that it is to be of."""
    places: Mapping[str, str] | None = None
    """The new places in an inferred split of what is shared, by the old ones; None where what is
    shared was given, so that parameters go by name."""

    def pick(self, entries: Sequence[_Entry], start: _Entry) -> list[_Entry]:
        """Return one entry per new task: its old one, or that with which it starts."""
        of_task = dict(zip(self.old, entries, strict=True))
        return [of_task.get(task, start) for task in self.new]

    def along(self, axis: int, saved: Tensor, start: Tensor) -> Tensor:
        """Return a tensor with one entry per task along an axis, for the new tasks.

        Args:
            axis: The axis.
            saved: Of the old tasks.
            start: What new tasks start with; of the shape of the result, or one that expands to it.
        """
        stay = [task for task in self.new if task in self.old]
        shape = (*saved.shape[:axis], len(self.new), *saved.shape[axis + 1 :])
        old = torch.tensor([self.old.index(task) for task in stay], device=saved.device)
        new = torch.tensor([self.new.index(task) for task in stay], device=saved.device)
        found = start.detach().to(saved).expand(shape).clone()
        return found.index_copy_(axis, new, saved.detach().index_select(axis, old))


class TaskState(nn.Module):
    """Numbers that a gradient strategy remembers of each task, or pair of tasks, in each group.

    A buffer of shape (groups, K, ...) for all K tasks, in float64 where the device has it, which
    casts leave alone. It is empty until it is bound: a Balancer does that; alone, the first rows
    do, or a state that is loaded. What is read and written belongs to the tasks whose rows are at
    hand, in one group, so that absent tasks and other groups keep theirs.

    Args:
        axes: 1 for a number per task, 2 for one per ordered pair of tasks.
        start: What each is before anything has been remembered; may be NaN for nothing.
    """

    values: Tensor

    def __init__(self, axes: int = 1, start: float = 0.0) -> None:
        super().__init__()
        self.axes = axes
        self.start = start
        self._of: tuple[tuple[str, ...], int] | None = None
        self._alone = False
        self.active: Tensor | slice = slice(None)
        self.group = 0
        device = torch.get_default_device()
        self.register_buffer("values", self._fresh(0, 0, device))

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Make room for these tasks, in so many groups.

        Raises:
            RuntimeError: If there is room for others already.
        """
        asked = tuple(tasks), groups
        if self._of is not None and self._of != asked:
            raise RuntimeError(
                "what a gradient strategy remembers must belong to one set of tasks and groups, "
                f"but is of {self._of[0]} in {self._of[1]} and was asked for {asked[0]} in "
                f"{groups}. Make a new strategy."
            )
        if self._of is None:
            self._of, self._alone = asked, False
            self.values = self._fresh(groups, len(tasks), self.values.device)
        return self

    def take(self, active: Tensor | slice, group: int) -> None:
        """Belong to the tasks with these numbers, in this group."""
        self.active, self.group = active, group

    def read(self, rows: Tensor) -> Tensor:
        """Return a copy of what is remembered of the m rows at hand, shape (m, ...).

        Args:
            rows: The rows or their Gramian, or anything else with m entries.
        """
        if self._of is None:
            self._bind_alone(1, len(rows), rows.device)
        found = self.values[self.group][self._places()]
        if len(found) != len(rows):
            raise ValueError(
                f"`gradients` must have one row for each of the {len(found)} tasks that the "
                f"strategy remembers, but got {len(rows)}. Call reset(), or make a new one."
            )
        return found.detach().clone()

    def write(self, values: Tensor) -> None:
        """Remember something else of the rows at hand, shape (m, ...)."""
        with torch.no_grad():
            self.values[self.group][self._places()] = values.detach().to(self.values)

    def reset(self) -> None:
        """Remember nothing; alone, not even how many rows there were."""
        if self._alone:
            self._of, self._alone = None, False
            self.values = self._fresh(0, 0, self.values.device)
        else:
            self.values.fill_(self.start)

    def check_state(self, state: Mapping[str, object]) -> None:
        """Raise ValueError if what was saved, by name, is nothing to go on with."""
        saved = state.get("values")
        if saved is None:
            return
        shape = tuple(saved.shape) if isinstance(saved, Tensor) else None
        if not isinstance(saved, Tensor) or not saved.is_floating_point():
            raise ValueError(
                "the saved state of a gradient strategy must be a tensor of floating-point "
                f"numbers, but got {saved!r}. Load what `state_dict()` returned."
            )
        if self._of is not None and saved.numel() and saved.shape != self.values.shape:
            raise ValueError(
                f"the saved state of the gradient strategy must belong to {len(self._of[0])} tasks "
                f"in {self._of[1]} groups of shared parameters, shape {tuple(self.values.shape)}, "
                f"but has shape {shape}. Give the Balancer the same groups."
            )
        legal = saved.isfinite() | (saved.isnan() if self.start != self.start else False)
        if saved.ndim != 1 + self.axes or not bool(legal.all()):
            raise ValueError(
                f"the saved state of a gradient strategy must hold finite numbers in {self.axes} + "
                f"1 dimensions, but got {saved.tolist()}. It was damaged, or saved after a step "
                "that went wrong."
            )

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what to load, with other tasks, of what was saved, by name."""
        saved = state.get("values")
        axes = range(1, 1 + self.axes)
        if not isinstance(saved, Tensor) or not saved.numel():  # before anything was remembered
            return dict(state)
        if saved.ndim != len(axes) + 1 or {saved.shape[a] for a in axes} != {len(change.old)}:
            raise ValueError(
                "the saved state of a gradient strategy must belong to its tasks, "
                f"{', '.join(change.old)}, but has shape {tuple(saved.shape)}. It was damaged."
            )
        start = saved.new_full((), self.start)
        for axis in axes:
            saved = change.along(axis, saved, start)
        return {**state, "values": saved}

    def _places(self) -> tuple[Tensor | slice, ...]:
        active = self.active
        if isinstance(active, slice):
            return (slice(None),) * self.axes
        active = active.to(self.values.device)
        return (active,) if self.axes == 1 else (active[:, None], active)

    def _fresh(self, groups: int, count: int, device: torch.device) -> Tensor:
        shape = (groups, *[count] * self.axes)
        return torch.full(shape, self.start, dtype=dtype_of_sums(device), device=device)

    def _bind_alone(self, groups: int, count: int, device: torch.device) -> None:
        self._of, self._alone = (tuple(map(str, range(count))), groups), True
        self.values = self._fresh(groups, count, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        return super()._apply(  # type: ignore[no-untyped-call, no-any-return]
            lambda tensor: moved(fn, tensor, tensor.dtype), recurse
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = own_state(state_dict, prefix)
        self.check_state(own)
        saved = own.get("values")
        if isinstance(saved, Tensor) and not saved.numel():  # saved before anything was remembered
            if self._of is not None:
                self.values.fill_(self.start)
            state_dict = {**state_dict, f"{prefix}values": self.values}
        elif isinstance(saved, Tensor) and self._of is None:
            self._bind_alone(len(saved), saved.shape[1], self.values.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.values.shape)}"


def not_carried(owner: object, name: str, change: TaskChange) -> ValueError:
    """Return the error that nobody knows what other tasks make of something saved."""
    kind = type(owner).__name__
    return ValueError(
        f"{kind} must know what becomes of {name!r} in its saved state when the tasks change from "
        f"{', '.join(change.old)} to {', '.join(change.new)}, but does not. Start with a new "
        f"{kind}, or override its `carried`."
    )


def check_states(owner: nn.Module, state: Mapping[str, object], prefix: str) -> None:
    """Raise ValueError if what was saved of a module, or one within, is nothing to go on with.

    Args:
        owner: The module; those within say for themselves, with ``check_state``.
        state: What was saved.
        prefix: Of the module's own names in it.
    """
    for name, module in owner.named_modules(prefix=prefix.removesuffix(".")):
        check = getattr(module, "check_state", None)
        if check is not None:
            check(own_state(state, f"{name}."))


def own_state(state_dict: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Return what a module saved under a prefix, that of the modules in it left out."""
    named = {key[len(prefix) :]: v for key, v in state_dict.items() if key.startswith(prefix)}
    return {name: value for name, value in named.items() if "." not in name}


def dtype_of_sums(device: torch.device | None = None) -> torch.dtype:
    """Return the widest floating-point dtype of a device, by default of the default one."""
    device = device or torch.get_default_device()
    return torch.float32 if device.type == "mps" else torch.float64


def moved(fn: Callable[[Tensor], Tensor], tensor: Tensor, narrowest: torch.dtype) -> Tensor:
    """Move or cast a tensor as ``fn`` does, but to no narrower floating-point dtype than that."""
    try:
        new = fn(tensor)
    except TypeError:
        if tensor.dtype != torch.float64:
            raise
        return fn(tensor.float())  # to a device that has no float64
    if new.dtype == tensor.dtype or not new.is_floating_point():
        return new
    dtype = torch.promote_types(new.dtype, narrowest)
    if dtype == torch.float64:
        dtype = dtype_of_sums(new.device)
    return new if dtype == new.dtype else tensor.to(new.device, dtype)
