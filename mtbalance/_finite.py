"""What becomes of losses and gradients that are not finite."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._company import Company
from mtbalance._direction import Outcome
from mtbalance._places import Place
from mtbalance._record import GroupFigures, Record
from mtbalance._rows import all_finite, length_of, numbers_of
from mtbalance._table import Table
from mtbalance._weighed import Weighed
from mtbalance.gradient._base import GradientStrategy

_SAFE = 1e20
"""Up to here, directions fit into every dtype but float16, and so do the terms they are added up
of: where rows nearly cancel, these are larger by some ten orders of magnitude."""


class Length(NamedTuple):
    """How long the raw gradient of a task is at most, the same in all processes."""

    balanced: float
    rest: float


class NonFinite:
    """The policy for what is not finite; looking for it waits for the device.

    Args:
        policy: The Balancer's ``nonfinite``.
        tasks: All tasks.
        groups: The names of the groups of shared parameters, where they have been given some.
    """

    def __init__(self, policy: str, tasks: tuple[str, ...], groups: Sequence[str] = ()) -> None:
        self.looks = policy != "propagate"
        self.raises = policy == "raise"
        self.drops = policy == "drop"
        self._skips = policy == "skip"
        self.tasks = tasks
        self.no_figures = {name: GroupFigures() for name in groups}
        """What a step that takes no per-task gradients knows of each group."""

    def losses(self, losses: Mapping[str, Tensor]) -> list[str]:
        """Name the tasks whose loss, in this process, is not finite."""
        if not self.looks or not losses:
            return []
        numbers = zip(losses, numbers_of(list(losses.values())), strict=True)
        return [name for name, number in numbers if not math.isfinite(number)]

    def rows(
        self, table: Table, place: Place, company: Company, scale: float | None
    ) -> tuple[Table, list[str], dict[str, Length]]:
        """Name the tasks whose gradient of a shared or of any other parameter is not finite.

        Of several processes, each has inputs of its own that require a gradient, which the others
        do not know of: those are not looked at.

        Args:
            table: The rows.
            place: Where they are balanced.
            company: The processes.
            scale: The loss scale that is on the rows, if any.

        Returns:
            The table with Gramians that float64 holds, the tasks' names, and how long the gradients
            of each are.
        """
        if not self.looks:
            return table, [], {}
        known = [company.knows(leaf) for leaf in table.rest.leaves]
        rest = [[row[number] for number in row if known[number]] for row in table.rest.rows]
        squares, others = _numbers_of(table, company, rest)
        none = [0.0] * len(others)  # where nothing is balanced
        totals = list(map(sum, zip(none, *squares.values(), strict=True)))
        held = table.in_range(squares, place, scale)
        finite = [math.isfinite(total) for total in totals]
        if not all(finite):  # or out of the range of float64: then these are other numbers
            squares, _ = _numbers_of(held, company)
            finite = [all(map(math.isfinite, each)) for each in zip(*squares.values(), strict=True)]
        # A length may overflow where no entry does: look closer then.
        bad = [
            name
            for name, good, other, row in zip(table.losses, finite, others, rest, strict=True)
            if not good or (not math.isfinite(other) and not company.everywhere(all_finite(row)))
        ]
        lengths = [
            Length(max(s, 0.0) ** 0.5, other) for s, other in zip(totals, others, strict=True)
        ]
        return held, bad, dict(zip(table.losses, lengths, strict=True))

    def accepts(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether gradients may be written, which are the same in all processes."""
        return not self.looks or all_finite(gradients)

    def accepts_directions(
        self,
        parts: Iterable[tuple[Sequence[Tensor], Sequence[Tensor | None]]],
        company: Company,
    ) -> bool:
        """Return whether directions may be written, of which processes may have parts.

        As with rows, what other processes do not know of is not looked at.

        Args:
            parts: Leaves, and a direction for each.
            company: The processes.
        """
        pairs = itertools.chain(*(zip(*part, strict=True) for part in parts))
        known = [direction for leaf, direction in pairs if company.knows(leaf)]
        bad = torch.tensor([float(not all_finite(known))], device="cpu")
        return company.numbers_over_parts([bad]) == [[0.0]]

    def ended(
        self,
        what: str,
        losses: Mapping[str, Tensor],
        nonfinite: Collection[str],
    ) -> Record | None:
        """Return the record of a step that ends here, or raise; None if it goes on.

        Args:
            what: What is not finite, a loss or a gradient.
            losses: Losses of the tasks that are left.
            nonfinite: The tasks that are not.
        """
        bad = self.ordered(nonfinite)
        if bad and self.raises:
            raise FloatingPointError(_message(what, bad))
        if bad and self._skips:
            return self._skipped(losses, bad)
        if losses:
            return None
        return Record(
            (),
            {},
            absent=self.absent(bad),
            nonfinite=bad,
            dropped=bad,
            groups=self.no_figures,
            all_tasks=self.tasks,
        )

    def ended_by_sum(self, losses: Mapping[str, Tensor]) -> Record:
        """Return the record of a step whose sum of gradients is not finite, or raise."""
        if self.raises:
            raise FloatingPointError(
                f"the gradients of the tasks {', '.join(map(repr, losses))} must be finite, "
                "but their sum holds NaN or infinity though the losses do not. "
                "nonfinite='drop' takes them one by one and tells which it is."
            )
        return self._skipped(losses, ())

    def ended_unwritten(
        self, what: str, losses: Mapping[str, Tensor], earlier: Collection[str]
    ) -> Record:
        """Return the record of a step that was not written as it is not finite, or raise.

        Args:
            what: What is not finite though the gradients of the tasks are.
            losses: Losses of the tasks.
            earlier: Tasks whose loss or gradient was not, and that have no part in it.
        """
        if self.raises:
            raise FloatingPointError(
                f"the {what} must be finite, but holds NaN or infinity though the gradients of the "
                f"tasks {', '.join(map(repr, losses))} do not. nonfinite='skip' leaves out such a "
                "step, as 'drop' does where no task is to blame; numbers above what a dtype holds "
                "(65504 in float16) need smaller losses, or parameters in float32."
            )
        return self._skipped(losses, self.ordered(earlier))

    def overflow(
        self, losses: Mapping[str, Tensor], found: tuple[str, ...], earlier: Collection[str]
    ) -> Record:
        """Return the record of a step whose gradients are passed on for a gradient scaler to see.

        Args:
            losses: Losses of the tasks whose gradients are passed on.
            found: The tasks among them whose gradients are not finite.
            earlier: Tasks whose loss was not, and that have no part in it.
        """
        return Record(
            tuple(losses),
            dict(losses),
            absent=self.absent([*losses, *earlier]),
            nonfinite=self.ordered({*found, *earlier}),
            dropped=self.ordered(earlier),
            overflow=True,
            groups=self.no_figures,
            all_tasks=self.tasks,
        )

    def _skipped(self, losses: Mapping[str, Tensor], nonfinite: tuple[str, ...]) -> Record:
        names = self.ordered(losses)
        return Record(
            names,
            dict(losses),
            absent=self.absent([*names, *nonfinite]),
            nonfinite=nonfinite,
            skipped=True,
            groups=self.no_figures,
            all_tasks=self.tasks,
        )

    def absent(self, present: Collection[str]) -> tuple[str, ...]:
        """Return the tasks that are not present."""
        there = frozenset(present)
        return tuple(task for task in self.tasks if task not in there)

    def ordered(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return the tasks in the order of the Balancer."""
        return tuple(task for task in self.tasks if task in tasks)


def _numbers_of(
    table: Table, company: Company, rest: Sequence[Sequence[Tensor]] = ()
) -> tuple[dict[int, list[float]], list[float]]:
    """Return the diagonal of each group's Gramian, and a length for each row of ``rest``."""
    vectors = [gramian.diagonal() for gramian in table.gramians.values()]
    if rest:
        lengths = [length_of(row) for row in rest]
        # As many numbers in each process, whether or not it holds a part of any other parameter.
        none = torch.zeros((), device=vectors[0].device if vectors else "cpu")
        found = [none if length is None else length.to(none.device) for length in lengths]
        vectors.append(torch.stack(found))
    lines = company.numbers_over_parts(vectors)
    others = lines.pop() if rest else []
    return dict(zip(table.gramians, lines, strict=True)), others


def _message(what: str, names: Collection[str]) -> str:
    """Return what an error says of these tasks."""
    return (
        f"the {what} of task {', '.join(map(repr, names))} must be finite, but holds NaN or "
        "infinity. nonfinite='drop' leaves the task out of such a step, 'skip' leaves the step out."
    )


def may_overflow(
    outcomes: Mapping[int, Outcome],
    table: Table,
    lengths: Mapping[str, Length],
    weighed: Weighed,
    strategy: GradientStrategy,
    scale: float,
) -> bool:
    """Return whether a direction may be more than its leaf holds, judged by the rows' lengths.

    Waits for no device, unless the strategy does not say how its directions grow.
    """
    sizes = [lengths[task] for task in table.losses]
    weights = weighed.numbers
    rest = _total(weights, [size.rest for size in sizes])
    if not rest <= _largest(table.rest.leaves):
        return True
    balanced = [size.balanced * scale for size in sizes]
    # A subclass gives directions of its own.
    growth = strategy.growth if "growth" in vars(type(strategy)) else None
    for number, outcome in outcomes.items():
        if growth is not None:
            bound = growth * _total(weights, balanced)
        elif outcome.combination is not None:
            bound = _total(outcome.combination.tolist(), balanced)
        else:
            return True
        if not bound <= _largest(table.groups[number].leaves):
            return True
    return False


def _total(coefficients: Iterable[float], lengths: Iterable[float]) -> float:
    return sum(abs(c) * length for c, length in zip(coefficients, lengths, strict=True))


def _largest(leaves: Iterable[Tensor]) -> float:
    """Return a length up to which every leaf holds each entry of a gradient."""
    return min((_SAFE, *(torch.finfo(dtype).max / 2 for dtype in {leaf.dtype for leaf in leaves})))
