"""The rows of one step, divided into what is balanced and what is not, and their inner products."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mtbalance._added import Added
from mtbalance._gramians import are_held, exponents_of, shifted
from mtbalance._places import Place
from mtbalance._record import Scaled
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
    rest: Added
    """What is added up."""
    gramians: dict[int, Tensor]
    """Per group, the inner products of the rows over all processes, without the loss scale."""
    nonfinite: frozenset[str]
    """Tasks that were left out."""
    exponents: Mapping[int, Sequence[int]] = {}
    """Per group, what powers of two the rows are divided by in ``gramians``; empty unless float64
    does not hold their squares."""
    across: Mapping[int, Tensor] = {}
    """Per group, the inner products of the rows of two independent batches, shape (m, m), as a
    strategy with further batches wants them; set when it is known which rows go on."""

    @property
    def gramian(self) -> Tensor:
        """The inner products over all that is balanced, shape (m, m)."""
        products, exponents = self.scaled_gramian
        if not exponents:
            return products
        return shifted(products, [[one + other for other in exponents] for one in exponents])

    @property
    def scaled_gramian(self) -> tuple[Tensor, list[int]]:
        """The same of rows over powers of two, and these powers, if float64 needs any."""
        shape = (len(self.losses), len(self.losses))
        if not self.exponents:
            return sum_of(list(self.gramians.values()), shape), []
        largest = [max(powers) for powers in zip(*self.exponents.values(), strict=True)]
        parts = [
            _divided(gramian, self.exponents[number], largest)
            for number, gramian in self.gramians.items()
        ]
        return sum_of(parts, shape), largest

    @property
    def norms(self) -> Tensor:
        """The lengths of the rows over all that is balanced, without the loss scale, (m,)."""
        products, exponents = self.scaled_gramian
        lengths = products.diagonal().clamp_min(0).sqrt()
        return shifted(lengths, exponents) if exponents else lengths

    def sum_of_progress(self, progress: Mapping[int, Tensor]) -> tuple[Tensor, Scaled | None]:
        """Return the sum of what each group's Gramian gave, and what float64 holds if not that.

        Args:
            progress: Inner products of the raw gradients with the direction, by group, shape (m,).
        """
        shape = (len(self.losses),)
        if not self.exponents:
            return sum_of(list(progress.values()), shape), None
        powers = {number: max(self.exponents[number]) for number in progress}
        largest = max(powers.values())
        parts = [
            shifted(products, [2 * (powers[number] - largest)] * len(products))
            for number, products in progress.items()
        ]
        total = sum_of(parts, shape)
        products, exponents = self.scaled_gramian
        scaled = Scaled(products, exponents, total)
        return shifted(total, [2 * largest] * len(total)), scaled

    def gramian_of_group(self, number: int) -> tuple[Tensor, int]:
        """Return the Gramian of a group's rows over one power of two, and that power, mostly 0.

        Rows that vanish next to the longest may be zero in it.
        """
        gramian, exponents = self.gramians[number], self.exponents.get(number)
        if exponents is None:
            return gramian, 0
        largest = max(exponents)
        return _divided(gramian, exponents, [largest] * len(exponents)), largest

    def only(self, number: int) -> "Table":
        """Return the table with nothing balanced but one group."""
        return self._replace(
            groups={number: self.groups[number]},
            gramians={number: self.gramians[number]},
            exponents={number: self.exponents[number]} if self.exponents else {},
        )

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
            {n: [e[row] for row in kept] for n, e in self.exponents.items() if n in groups},
        )

    def in_range(
        self, squares: Mapping[int, Sequence[float]], place: Place, scale: float | None
    ) -> "Table":
        """Return the table with Gramians that float64 holds: this one, unless rows are float64.

        Args:
            squares: Per group, the squared norms of the rows by its Gramian; the same numbers in
                all processes, which must decide alike.
            place: Where the rows are balanced.
            scale: The loss scale that is on them, if any.
        """
        if all(map(are_held, squares.values())):
            return self
        exponents = {number: exponents_of(norms) for number, norms in squares.items()}
        return self._replace(
            gramians=_gramians_of(self.groups, place, scale, exponents), exponents=exponents
        )

    def everything(self) -> Part:
        """Return all leaves as one part."""
        parts = list(self.groups.values())
        leaves = [leaf for part in parts for leaf in part.leaves] + self.rest.leaves
        rows = [
            [gradient for part in parts for gradient in part.rows[number]] + self.rest.line(number)
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
    others = Added(rest, gradients.sparse_rows(names, rest))
    gradients.forget()
    gramians = _gramians_of(groups, place, scale)
    return Table(losses, groups, others, gramians, frozenset(gradients.nonfinite))


def _gramians_of(
    groups: Mapping[int, Part],
    place: Place,
    scale: float | None,
    exponents: Mapping[int, Sequence[int]] = {},
) -> dict[int, Tensor]:
    """Return the Gramian of each group, without the loss scale, of rows over powers of two."""
    gramians = {
        number: place.gramian(part.leaves, part.rows, exponents.get(number, ()))
        for number, part in groups.items()
    }
    if scale is None:
        return gramians
    unscale = (1 / scale) ** 2
    return {number: gramian * unscale for number, gramian in gramians.items()}


def _divided(gramian: Tensor, exponents: Sequence[int], larger: Sequence[int]) -> Tensor:
    """Return a Gramian of rows over larger powers of two than these."""
    factors = gramian.new_tensor([2.0 ** (x - y) for x, y in zip(exponents, larger, strict=True)])
    return gramian * factors * factors[:, None]
