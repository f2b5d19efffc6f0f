"""What happens to the losses of a step, once it is known who takes it and where it is balanced.

One question is left, and asked here: whether the coefficients of the losses are known before their
gradients are, as for a plain sum and for weights that are kept from an earlier step. Then backward
passes of combinations serve; else there is one for each task, and a table of their rows. Nothing is
written before everything is known: an error in a strategy leaves no trace.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mtbalance._company import Company, Validation
from mtbalance._direction import Outcome, direction_of
from mtbalance._finite import NonFinite
from mtbalance._kept import KeptWeights
from mtbalance._known import Part, in_passes
from mtbalance._places import AtParameters, Place
from mtbalance._reach import ReachLog
from mtbalance._record import Record
from mtbalance._rows import combine, sum_of
from mtbalance._scaling import scale_of
from mtbalance._seen import Seen
from mtbalance._table import Table, table_of
from mtbalance._task_gradients import Row
from mtbalance._weighed import Weighed, Weigher
from mtbalance._writing import write
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Weighting


class Setting(NamedTuple):
    """Who takes a step, where, and with what."""

    company: Company
    place: Place
    weighting: Weighting
    gradient: GradientStrategy
    validation: Validation | None = None
    scaler: GradScaler | None = None


class Steps:
    """Takes steps, and keeps what one leaves to the next.

    Args:
        tasks: All tasks.
        policy: What becomes of losses and gradients that are not finite.
        log: What tasks have reached.
        kept: Gramian weights for the steps in which none are solved for.
        every: In how many steps they are solved for once.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        policy: NonFinite,
        log: ReachLog,
        kept: KeptWeights,
        every: int,
    ) -> None:
        self._tasks = tasks
        self._policy = policy
        self._log = log
        self._kept = kept
        self._every = every
        self._weigher = Weigher(tasks, looks=policy.looks)

    def one_pass_serves(self, weighting: Weighting, gradient: GradientStrategy) -> bool:
        """Return whether one ordinary pass of the weighted sum is all that a step needs."""
        # To drop a task, its own gradient must be known.
        return gradient.is_sum and not weighting.needs_gradients and not self._policy.drops

    def take(self, seen: Seen, setting: Setting) -> Record:
        """Take the step of losses that all processes know of."""
        if self.one_pass_serves(setting.weighting, setting.gradient):
            ended = self._policy.ended("loss", seen.losses, seen.nonfinite)
            return ended or self._with_known(seen, setting, None)
        ended = self._policy.ended("loss", seen.finite, seen.nonfinite)
        if ended is not None:
            return ended
        fit = self._keeps(setting) and not seen.nonfinite
        if fit and self._kept.serve(seen.losses, self._every):
            return self._with_known(seen, setting, self._kept.solutions)
        rows = setting.place.rows(seen, setting.company, setting.scaler)
        return self._with_rows(rows, seen, setting)

    def take_accumulated(self, rows: Iterable[Row], seen: Seen, setting: Setting) -> Record:
        """Take the step of losses whose backward passes have been made."""
        ended = self._policy.ended("loss", seen.finite, seen.nonfinite)
        return ended or self._with_rows(rows, seen, setting)

    @staticmethod
    def _keeps(setting: Setting) -> bool:
        """Return whether weights are kept: those at features belong to the features of one step."""
        return isinstance(setting.place, AtParameters)

    def _with_known(self, seen: Seen, setting: Setting, kept: dict[int, Tensor] | None) -> Record:
        """Make one pass of the weighted sum, or one per group with weights of an earlier step."""
        company = setting.company
        scale = scale_of(setting.scaler, next(iter(seen.losses.values())))
        weighed = self._weigher.weigh(setting.weighting, seen.losses, self._log.parameters)
        parts = [Part(company.leaves(seen), weighed.weights)]
        if kept is not None:
            groups, rest = self._log.divide(parts[0].leaves)
            parts = [Part(rest, weighed.weights)]
            for number, leaves in groups.items():
                parts.append(Part(leaves, weighed.weights * kept[number].to(weighed.weights)))
        if in_passes(parts, seen, weighed, scale, company, looks=self._policy.looks):
            record = Record(
                tuple(seen.losses),
                dict(seen.losses),
                weighed.by_name,
                absent=self._policy.absent(seen.losses),
            )
        else:
            record = self._policy.ended_by_sum(seen.losses)
        if kept is None:
            return record
        self._kept.age += 1
        combination = parts[1].coefficients if len(parts) == 2 else None
        return replace(record, combination=combination, reused=True)

    def _with_rows(self, rows: Iterable[Row], seen: Seen, setting: Setting) -> Record:
        """Weigh and balance the gradients of single tasks."""
        company, place = setting.company, setting.place
        scale = scale_of(setting.scaler)
        gradients = company.gather(seen, rows, place.dtype)
        table = table_of(gradients, self._tasks, place, scale)
        bad = self._policy.rows(table, company)
        if bad and scale is not None:
            # Most likely the scale is too large: let scaler.step() see it and skip.
            _pass_on(table, place, seen)
            names, absent = tuple(table.losses), self._absent(table)
            losses = dict(table.losses)
            return Record(names, losses, absent=absent, nonfinite=tuple(bad), overflow=True)
        if bad:
            table = table.without(bad)
            ended = self._policy.ended("gradient", table.losses, table.nonfinite)
            if ended is not None:
                return ended
        weighed = self._weigh(table, scale, setting)
        outcomes = _outcomes(table, weighed, setting, scale)
        if self._keeps(setting):
            solutions = {number: outcome.solution for number, outcome in outcomes.items()}
            self._kept.keep(tuple(table.losses), solutions)
        _write(outcomes, table, weighed, seen, place, scale)
        dropped = self._policy.ordered(table.nonfinite)
        return _record(outcomes, table, weighed, place, dropped, self._absent(table))

    def _weigh(self, table: Table, scale: float | None, setting: Setting) -> Weighed:
        step = None
        if setting.weighting.needs_gradients:
            leaves, rows = table.everything()
            step = setting.company.step(leaves, rows, scale or 1.0, setting.validation)
        return self._weigher.weigh(setting.weighting, table.losses, self._log.parameters, step)

    def _absent(self, table: Table) -> tuple[str, ...]:
        return self._policy.absent([*table.losses, *table.nonfinite])


def _outcomes(
    table: Table, weighed: Weighed, setting: Setting, scale: float | None
) -> dict[int, Outcome]:
    """Return the direction of each group, whose rows are then empty."""
    unscale = 1.0 if scale is None else 1.0 / scale
    return {
        number: direction_of(
            setting.gradient,
            part.leaves,
            part.rows,
            table.gramians[number],
            weighed.weights,
            unscale,
            setting.place.first,
        )
        for number, part in table.groups.items()
    }


def _write(
    outcomes: dict[int, Outcome],
    table: Table,
    weighed: Weighed,
    seen: Seen,
    place: Place,
    scale: float | None,
) -> None:
    """Accumulate directions, sums of what is not balanced, and slopes of learned weights."""
    for number, outcome in outcomes.items():
        place.write(table.groups[number].leaves, outcome.direction, seen)
    leaves, rows = table.rest
    write(leaves, combine(rows, weighed.weights, leaves, release=True))
    weighed.write(scale)


def _record(
    outcomes: dict[int, Outcome],
    table: Table,
    weighed: Weighed,
    place: Place,
    dropped: tuple[str, ...],
    absent: tuple[str, ...],
) -> Record:
    progress = [
        place.over_all(o.progress) if o.combination is None else o.progress
        for o in outcomes.values()
    ]
    combinations = [outcome.combination for outcome in outcomes.values()]
    return Record(
        tuple(table.losses),
        weighed.losses,
        weighed.by_name,
        gramian=table.gramian,
        progress=sum_of(progress, (len(table.losses),)),
        combination=combinations[0] if len(combinations) == 1 else None,
        absent=absent,
        nonfinite=dropped,
        dropped=dropped,
    )


def _pass_on(table: Table, place: Place, seen: Seen) -> None:
    """Accumulate the plain sum of the rows, not finite as it is."""
    ones = torch.ones(len(table.losses), device="cpu")
    for leaves, rows in table.groups.values():
        place.write(leaves, combine(rows, ones), seen)
    write(table.rest.leaves, combine(table.rest.rows, ones))
