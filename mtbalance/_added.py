"""What is added up and not balanced: tasks' own heads, of which each task reaches few."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from mtbalance._rows import coefficients_of, combine, plus_multiple


class Added(NamedTuple):
    """Leaves that are not balanced, and what there is of the tasks' gradients of them.

    Most tasks have no gradient of most of these: lists of all would grow as the square of the
    number of tasks.
    """

    leaves: list[Tensor]
    rows: list[dict[int, Tensor]]
    """One per task: its gradients by the number of their leaf, without their loss scale taken
    away; emptied as they are added up."""

    def without(self, numbers: Collection[int]) -> "Added":
        """Return it without some of the rows, and without leaves that only these reach."""
        rows = [row for number, row in enumerate(self.rows) if number not in numbers]
        reached = sorted(set().union(*rows))
        new = {old: number for number, old in enumerate(reached)}
        return Added(
            [self.leaves[old] for old in reached],
            [{new[old]: gradient for old, gradient in row.items()} for row in rows],
        )

    def line(self, number: int) -> list[Tensor | None]:
        """Return one row with a place for each leaf."""
        return list(map(self.rows[number].get, range(len(self.leaves))))

    def sum(self, weights: Tensor, *, release: bool = False) -> list[Tensor | None]:
        """Return the weighted sum of the rows, a new tensor for each leaf, in its dtype.

        Low precision is accumulated in float32. Waits for no device.

        Args:
            weights: Shape (m,), on the CPU or on the rows' device.
            release: Whether to empty the rows on the way.
        """
        if all(len(row) == len(self.leaves) for row in self.rows):
            lines = [self.line(number) for number in range(len(self.rows))]
            if release:
                for row in self.rows:
                    row.clear()
            return combine(lines, weights, self.leaves, release=release)
        totals: list[Tensor | None] = [None] * len(self.leaves)
        for row, weight in zip(self.rows, coefficients_of(weights), strict=True):
            for number in list(row):
                gradient = row.pop(number) if release else row[number]
                totals[number] = plus_multiple(totals[number], gradient, weight)
        pairs = zip(totals, self.leaves, strict=True)
        return [None if total is None else total.to(leaf.dtype) for total, leaf in pairs]
