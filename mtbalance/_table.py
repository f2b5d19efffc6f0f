"""The rows of one step, divided into what is balanced and what is not, and their inner products."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mtbalance._places import Place
from mtbalance._rows import sum_of
from mtbalance._task_gradients import TaskGradients


class Part(NamedTuple):
    """Some leaves, and the tasks' gradients of them."""

    leaves: list[Tensor]
    rows: list[list[Tensor | None]]
    """One per task, without their loss scale taken away; emptied as directions are made of them."""

    def without(self, numbers: Collection[int]) -> "Part":
        """Return it without some of the rows, and without leaves that only these reach."""
        rows = [row for number, row in enumerate(self.rows) if number not in numbers]
        reached = [any(g is not None for g in gradients) for gradients in zip(*rows, strict=True)]
        return Part(
            list(itertools.compress(self.leaves, reached)),
            [list(itertools.compress(row, reached)) for row in rows],
        )


class Table(NamedTuple):
    """The rows of one step: made once, as the Gramians of what is balanced are."""

    losses: Mapping[str, Tensor]
    """The losses of the m active tasks, by name, in the order of the rows."""
    groups: dict[int, Part]
    """What is balanced, by the number of its group."""
    rest: Part
    """What is added up."""
    gramians: dict[int, Tensor]
    """Per group, the inner products of the rows over all processes, without the loss scale."""
    nonfinite: frozenset[str]
    """Tasks that were left out."""

    @property
    def gramian(self) -> Tensor:
        """The inner products over all that is balanced, shape (m, m)."""
        return sum_of(list(self.gramians.values()), (len(self.losses), len(self.losses)))

    def without(self, tasks: Collection[str]) -> "Table":
        """Return the table without the rows (and columns of the Gramians) of some tasks."""
        gone = [number for number, task in enumerate(self.losses) if task in tasks]
        kept = [number for number, task in enumerate(self.losses) if task not in tasks]
        parts = {number: part.without(gone) for number, part in self.groups.items()}
        groups = {number: part for number, part in parts.items() if part.leaves}
        return Table(
            {task: loss for task, loss in self.losses.items() if task not in tasks},
            groups,
            self.rest.without(gone),
            {number: self.gramians[number][kept][:, kept] for number in groups},
            self.nonfinite.union(tasks),
        )

    def everything(self) -> Part:
        """Return all leaves as one part."""
        parts = [*self.groups.values(), self.rest]
        leaves = [leaf for part in parts for leaf in part.leaves]
        rows = [
            [gradient for part in parts for gradient in part.rows[number]]
            for number in range(len(self.losses))
        ]
        return Part(leaves, rows)


def table_of(
    gradients: TaskGradients, tasks: Sequence[str], place: Place, scale: float | None
) -> Table:
    """Return the table of the gathered gradients, which it then holds alone.

    Args:
        gradients: The gradients of one step, from all processes together.
        tasks: All tasks, in order.
        place: Where they are balanced.
        scale: The loss scale that is on the gradients, if any.
    """
    losses = {task: gradients.losses[task] for task in tasks if task in gradients.losses}
    names = list(losses)
    divided, rest = place.divide(gradients)
    groups = {n: Part(leaves, gradients.rows(names, leaves)) for n, leaves in divided.items()}
    others = Part(rest, gradients.rows(names, rest))
    gradients.forget()
    gramians = {n: place.gramian(part.leaves, part.rows) for n, part in groups.items()}
    if scale is not None:
        unscale = (1 / scale) ** 2
        gramians = {number: gramian * unscale for number, gramian in gramians.items()}
    return Table(losses, groups, others, gramians, frozenset(gradients.nonfinite))
