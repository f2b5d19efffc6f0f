"""Per-task gradients of one step, as they come and add up."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtbalance._names import outermost_modules
from mtbalance._rows import TaskRows, at_least_float32, with_room_for


class Row(NamedTuple):
    """One task's loss of this process, detached, and its gradient for each leaf."""

    task: str
    loss: Tensor
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor | None]


def converted(row: list[Tensor | None], dtype: torch.dtype | None) -> list[Tensor | None]:
    """Return gradients in the dtype that they are kept in, emptying the list of the others."""
    if dtype is not None:
        for number, gradient in enumerate(row):
            if gradient is not None and not gradient.is_complex():
                row[number] = gradient.to(dtype)
    return row


class TaskGradients:
    """What has been gathered for one step: per task, its loss and its gradient for each leaf.

    Args:
        nonfinite: Tasks that have no part in the step.
    """

    def __init__(self, nonfinite: Collection[str] = ()) -> None:
        self.losses: dict[str, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self.nonfinite = set(nonfinite)
        self.from_models: list[Tensor] = []
        """In a copy, the leaves that were in modules when it was made."""
        self._gradients: dict[str, dict[int, Tensor]] = {}

    # By identity, which copying and pickling change: the rows of a copy are those of its leaves.
    def __getstate__(self) -> dict[str, Any]:
        held = set()
        if self.leaves:
            held = {id(p) for module in outermost_modules() for p in module.parameters()}
        numbers = {key: number for number, key in enumerate(self.leaves)}
        return {
            "losses": self.losses,
            "nonfinite": self.nonfinite,
            "leaves": list(self.leaves.values()),
            "from_models": [leaf for key, leaf in self.leaves.items() if key in held],
            "rows": {
                task: {numbers[key]: gradient for key, gradient in row.items()}
                for task, row in self._gradients.items()
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        leaves = list(state["leaves"])
        self.losses, self.nonfinite = state["losses"], state["nonfinite"]
        self.from_models = state["from_models"]
        self.leaves = {id(leaf): leaf for leaf in leaves}
        self._gradients = {
            task: {id(leaves[number]): gradient for number, gradient in row.items()}
            for task, row in state["rows"].items()
        }

    def __bool__(self) -> bool:
        return bool(self.losses or self.nonfinite)

    def add(self, row: Row) -> None:
        """Add a loss and its gradients. Tensors that come from autograd are never written to.

        Sums are at least float32, whatever gradients are kept in: of a thousand small terms most
        would be lost in bfloat16.
        """
        task, loss, leaves, row_gradients = row
        if task in self.nonfinite:
            return
        self.losses[task] = self.losses[task] + loss if task in self.losses else loss
        new = {id(leaf): g for leaf, g in zip(leaves, row_gradients, strict=True) if g is not None}
        if not new.keys() <= self.leaves.keys():
            self.leaves.update({id(leaf): leaf for leaf in leaves if id(leaf) in new})
        gradients = self._gradients.setdefault(task, {})
        for key in gradients.keys() & new.keys():
            gradient, total = new.pop(key), gradients[key]
            total = total.to(at_least_float32(total.dtype))
            gradients[key] = with_room_for(total, gradient) + gradient
        gradients.update(new)

    def mark_nonfinite(self, tasks: Collection[str]) -> None:
        """Take tasks out of the step."""
        self.nonfinite.update(tasks)
        for task in tasks:
            self.losses.pop(task, None)
            self._gradients.pop(task, None)

    def are_of(self, task: str, known: AbstractSet[int]) -> bool:
        """Return whether a task reaches no leaf but those whose identities are given."""
        return self._gradients[task].keys() <= known

    def leaves_of(self, task: str) -> list[Tensor]:
        """Return the leaves that a task reaches."""
        return [self.leaves[key] for key in self._gradients[task]]

    def reaches(self, task: str, leaves: Iterable[Tensor]) -> bool:
        """Return whether a task reaches any of these leaves."""
        gradients = self._gradients[task]
        return any(id(leaf) in gradients for leaf in leaves)

    def rows(self, tasks: Sequence[str], leaves: Sequence[Tensor]) -> TaskRows:
        """Return the gradients of these tasks for these leaves."""
        keys = list(map(id, leaves))
        return TaskRows(list(map(self._gradients[task].get, keys)) for task in tasks)

    def sparse_rows(
        self, tasks: Sequence[str], leaves: Sequence[Tensor]
    ) -> list[dict[int, Tensor]]:
        """Return what there is of the same, by the number of the leaf."""
        numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        found = []
        for task in tasks:
            row = self._gradients[task]
            there = sorted(numbers[key] for key in row.keys() & numbers.keys())
            found.append({number: row[id(leaves[number])] for number in there})
        return found

    def released(self, tasks: Sequence[str]) -> Iterator[Row]:
        """Yield the rows of these tasks, and forget each."""
        for task in tasks:
            gradients = self._gradients.pop(task)
            leaves = [self.leaves[key] for key in gradients]
            yield Row(task, self.losses[task], leaves, list(gradients.values()))
            del gradients

    def clear(self) -> None:
        """Begin anew."""
        for held in (self.losses, self.leaves, self.nonfinite, self.from_models, self._gradients):
            held.clear()

    def forget(self) -> None:
        """Leave the gradients to the rows that have been asked for."""
        self._gradients.clear()
