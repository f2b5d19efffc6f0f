"""Gramian weights that are kept for the steps in which none are solved for."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mtbalance._checks import averages_rows
from mtbalance._remembered import TaskChange
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Weighting

_NEVER = 2**31
_LARGEST = 10.0
"""Kept weights are at most so many times the number of rows. Larger ones belong to rows that nearly
vanish, alone or together: they are right on the day of solving, whose rows are as small as they are
large, and make the same rows of an ordinary length everything there is on the next."""


class KeptWeights:
    """The last weights that a Gramian strategy gave to the weighted rows of each group.

    Args:
        tasks: All tasks.
        groups: The number of groups of shared parameters.
    """

    def __init__(self, tasks: tuple[str, ...], groups: int) -> None:
        self._tasks = tasks
        self._groups = groups
        self.reset()

    def reset(self) -> None:
        """Forget them."""
        self.age = _NEVER
        """Steps since they were solved for, that one included."""
        self.solutions: dict[int, Tensor] = {}
        self._of: tuple[str, ...] = ()
        self._fit: bool | None = None

    def keep(self, tasks: tuple[str, ...], solutions: Mapping[int, Tensor | None]) -> None:
        """Keep the solutions of this step, each of shape (m,), by the number of their group."""
        self.solutions = {group: s for group, s in solutions.items() if s is not None}
        self._of = tasks
        self._fit = None  # found out when it is asked for: looking waits for the device
        self.age = 1 if self.solutions else _NEVER

    def serve(self, tasks: Collection[str], every: int) -> bool:
        """Return whether they fit other rows than theirs, and are young and of these tasks.

        Args:
            tasks: The tasks.
            every: They must be younger than so many steps.
        """
        return self.age < every and tuple(tasks) == self._of and self._fit_other_rows()

    def cover(self, groups: Collection[int]) -> bool:
        """Return whether there are some for all of these groups."""
        return self.solutions.keys() >= set(groups)

    def _fit_other_rows(self) -> bool:
        """Return whether they are weights for rows of whatever length, and not of that day's."""
        if self._fit is None:
            largest = _LARGEST * len(self._of)
            self._fit = all(float(s.abs().max()) <= largest for s in self.solutions.values())
        return self._fit

    def as_tensor(self) -> Tensor:
        """Return everything as one tensor, shape (1 + groups * K,), infinity for nothing."""
        state = torch.full(
            (self._groups, len(self._tasks)), math.inf, dtype=torch.float64, device="cpu"
        )
        if not self._fit_other_rows():  # no step will use them, and NaN would look like damage
            return torch.cat([state.new_tensor([float(_NEVER)]), state.reshape(-1)])
        columns = [self._tasks.index(task) for task in self._of]
        for group, solution in self.solutions.items():
            state[group, columns] = solution.detach().to(state)
        return torch.cat([state.new_tensor([float(self.age)]), state.reshape(-1)])

    def load(self, state: Tensor) -> None:
        """Undo :meth:`as_tensor`."""
        state = state.cpu()
        if len(state) != 1 + self._groups * len(self._tasks):
            raise ValueError(
                f"the saved state must belong to {self._groups} groups of shared parameters, but "
                f"has {(len(state) - 1) // len(self._tasks)}."
            )
        if not (1 <= state[0] < math.inf and bool((state > -math.inf).all())):
            raise ValueError(
                "the saved state must have kept weights that are numbers and at least 1 step old, "
                f"but got {state[1:].tolist()}, {float(state[0]):g} steps old. It was damaged."
            )
        self.reset()
        self.age = int(state[0])
        for group, row in enumerate(state[1:].reshape(self._groups, -1)):
            found = torch.isfinite(row)
            if bool(found.any()):
                self.solutions[group] = row[found]
                self._of = tuple(
                    task for task, known in zip(self._tasks, found.tolist(), strict=True) if known
                )


def kept_of(numbers: Sequence[float], change: TaskChange) -> list[float]:
    """Return what ``KeptWeights.as_tensor`` gave, for other tasks.

    Weights that were solved with a task that is removed are weights of nothing.
    """
    count = len(change.old)
    rows = [numbers[first : first + count] for first in range(1, len(numbers), count)]
    removed = [n for n, task in enumerate(change.old) if task not in change.new]
    if any(row[n] < math.inf for row in rows for n in removed):
        return [float(_NEVER), *[math.inf] * (len(rows) * len(change.new))]
    return [numbers[0], *(number for row in rows for number in change.pick(row, math.inf))]


def check_every(
    every: int, weighting: Weighting, gradient: GradientStrategy, *, sharded: bool
) -> None:
    """Raise if weights that are kept would do nothing, or not what is promised."""
    if every == 1:
        return
    if gradient.row_means is not None:
        raise averages_rows("`every` must be 1", f"{every}", gradient)
    if not gradient.by_gramian or weighting.needs_gradients:
        raise ValueError(
            "`every` must be 1 unless a GramianStrategy meets a weighting that needs no "
            f"per-task gradients, but got {every} with "
            f"{type(weighting).__name__} and {type(gradient).__name__}."
        )
    if gradient.further_batches:
        raise ValueError(
            f"`every` must be 1 with {type(gradient).__name__}, which learns from the further "
            f"batches of every step, but got {every}."
        )
    if sharded:
        raise ValueError(
            f"`every` must be 1 with sharded parameters, but got {every}. Their "
            "backward passes cannot be confined to some of the parameters."
        )
