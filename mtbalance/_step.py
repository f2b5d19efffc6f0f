"""What happens to the losses of a step, once it is known who takes it and where it is balanced.

One question is left, and asked here: whether the coefficients of the losses are known before their
gradients are, as for a plain sum and for weights that are kept from an earlier step. Then backward
passes of combinations serve; else there is one for each task, and a table of their rows. Nothing is
written before everything is known: an error in a strategy leaves no trace.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mtbalance._averaging import Whose, direction_of_means, with_remembered
from mtbalance._batches import Across, FurtherBatches
from mtbalance._company import Company, Validation
from mtbalance._direction import Outcome, direction_of
from mtbalance._finite import Length, NonFinite, may_overflow
from mtbalance._kept import KeptWeights
from mtbalance._known import Pass, in_passes
from mtbalance._places import AtParameters, Divided, Place
from mtbalance._reach import ReachLog
from mtbalance._record import GroupFigures, Record
from mtbalance._rows import stacked
from mtbalance._scaling import scale_of
from mtbalance._seen import Seen
from mtbalance._table import Table, table_of
from mtbalance._task_gradients import Row, TaskGradients
from mtbalance._watch import ScaledLossWatch
from mtbalance._weighed import Weighed, Weigher, unless_written, write_nothing
from mtbalance._writing import hooks_when_written, write
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Step, Weighting


class Setting(NamedTuple):
    """Who takes a step, where, and with what."""

    company: Company
    place: Place
    weighting: Weighting
    gradient: GradientStrategy
    policy: NonFinite
    every: int
    """In how many steps Gramian weights are solved for once."""
    validation: Validation | None
    scaler: GradScaler | None
    watch: ScaledLossWatch
    batches: Sequence[Validation] = ()

    @property
    def one_pass_serves(self) -> bool:
        """Whether one ordinary pass of the weighted sum is all that a step needs."""
        # To drop a task, its own gradient must be known.
        return self.gradient.is_sum and not self.looks_ahead and not self.policy.drops

    @property
    def combines(self) -> bool:
        """Whether nothing but Gramians and combinations is made of the rows, which all are here."""
        strategy, company = self.gradient, self.company
        by_products = (strategy.by_gramian or strategy.is_sum) and strategy.row_means is None
        alone = company.size == 1 and company.task_passes is None
        return by_products and alone and not self.looks_ahead and not self.batches

    @property
    def looks_ahead(self) -> bool:
        """Whether the weighting is to look at per-task gradients in this step."""
        return self.weighting.needs_gradients and not self.weighting.rests

    @property
    def remembering(self) -> tuple[Weighting | GradientStrategy, ...]:
        """The strategies that may remember something of a step."""
        gradient = self.gradient
        return (self.weighting, gradient) if gradient.remembers else (self.weighting,)

    @property
    def at_parameters(self) -> bool:
        """Whether tasks are balanced at the shared parameters.

        Features are no group of these, and weights at them go with the features of one step.
        """
        return isinstance(self.place, AtParameters)


class Steps:
    """Takes steps, and keeps what one leaves to the next.

    Args:
        tasks: All tasks.
        log: What tasks have reached.
        kept: Gramian weights for the steps in which none are solved for.
    """

    def __init__(self, tasks: tuple[str, ...], log: ReachLog, kept: KeptWeights) -> None:
        self._tasks = tasks
        self._log = log
        self._kept = kept
        self._weigher = Weigher(tasks)

    @hooks_when_written()
    def take(self, seen: Seen, setting: Setting) -> Record:
        """Take the step of losses that all processes know of."""
        policy = setting.policy
        ended = policy.ended("loss", seen.finite, seen.nonfinite)
        if ended is not None:
            return ended
        attempt = functools.partial(unless_written, setting.remembering)
        if setting.one_pass_serves:
            leaves = self._leaves(seen, setting.company)
            return attempt(lambda: self._with_known(seen, setting, {}, leaves))
        fit = setting.at_parameters and not seen.nonfinite
        if fit and self._kept.serve(seen.losses, setting.every):
            groups, rest = self._divided(seen, setting.company)
            if self._kept.cover(groups):
                record = attempt(lambda: self._with_known(seen, setting, groups, rest))
                if not (policy.drops and record.skipped):
                    return record
        if setting.combines:
            setting = setting._replace(place=setting.place.for_combinations(seen))
        rows = setting.place.rows(seen, setting.company, setting.scaler)
        return attempt(lambda: self._with_rows(rows, seen, setting))

    @hooks_when_written()
    def take_accumulated(self, pending: TaskGradients, seen: Seen, setting: Setting) -> Record:
        """Take the step of losses whose backward passes have been made; what is pending empties."""
        rows = pending.released([task for task in self._tasks if task in seen.finite_here])
        ended = setting.policy.ended("loss", seen.finite, seen.nonfinite)
        if ended is not None:
            return ended
        return unless_written(setting.remembering, lambda: self._with_rows(rows, seen, setting))

    def _divided(self, seen: Seen, company: Company) -> Divided:
        """Divide what the losses reach today, which need not be what they have reached before."""
        if seen.agreement is None:  # else it has been noted with what the other processes tell
            self._log.note_again(seen.here)
        return self._log.divide(self._leaves(seen, company))

    def _leaves(self, seen: Seen, company: Company) -> list[Tensor]:
        """Return all leaves that passes of combinations write to, or raise if none is shared."""
        leaves = company.leaves(seen)
        self._log.check_reached(seen.here or seen.losses, leaves)
        return leaves

    def _with_known(
        self, seen: Seen, setting: Setting, kept: dict[int, list[Tensor]], rest: list[Tensor]
    ) -> Record:
        """Make one pass of the weighted sum, and one per group with weights of an earlier step.

        Args:
            seen: The losses.
            setting: Who takes the step, and with what.
            kept: The leaves of each group that kept weights serve for.
            rest: All other leaves.
        """
        company, policy = setting.company, setting.policy
        scale = scale_of(setting.scaler, next(iter(seen.losses.values())))
        weighed = self._weigh(seen.losses, setting)
        weights = weighed.weights
        passes = [Pass(rest, weights)]
        for number, leaves in kept.items():
            passes.append(Pass(leaves, weights * self._kept.solutions[number].to(weights)))
        # If the sum is not finite, rows tell which task is to be dropped: graphs must last.
        again = bool(kept) and policy.drops and scale is None
        again = again or setting.place.retains
        if in_passes(passes, seen, weighed, scale, company, looks=policy.looks, again=again):
            record = Record(
                tuple(seen.losses),
                dict(seen.losses),
                weighed.by_name,
                absent=policy.absent(seen.losses),
                groups=policy.no_figures,
                all_tasks=policy.tasks,
            )
        elif scale is not None:
            write_nothing(setting.weighting)
            record = policy.overflow(seen.losses, (), ())
        else:
            record = policy.ended_by_sum(seen.losses)
        if not kept:
            return record
        self._kept.age += 1
        combinations = {n: each.coefficients for n, each in zip(kept, passes[1:], strict=True)}
        return _reused(record, combinations)

    def _with_rows(self, rows: Iterable[Row], seen: Seen, setting: Setting) -> Record:
        """Weigh and balance the gradients of single tasks."""
        company, place, policy = setting.company, setting.place, setting.policy
        further = self._further(setting) if setting.batches else None
        across: Across | None = None
        if further is not None and len(setting.batches) > 1:
            across = further.with_each_other(list(seen.finite))  # gone before the rows are made
        gradients = company.gather(seen, rows, place.dtype)
        scale = scale_of(setting.scaler)
        table = table_of(gradients, self._tasks, place, scale)
        table, bad, lengths = policy.rows(table, place, company, scale)
        if bad and scale is not None:
            # Most likely the scale is too large: let scaler.step() see it and skip.
            _pass_on(table, place, seen)
            write_nothing(setting.weighting)
            return policy.overflow(table.losses, tuple(bad), table.nonfinite)
        if bad:
            table = table.without(bad)
            ended = policy.ended("gradient", table.losses, table.nonfinite)
            if ended is not None:
                return ended
        if further is not None:
            across = across or further.with_rows(table.groups, list(table.losses))
            found = _with_across(table, across, seen, setting, scale)
            if isinstance(found, Record):
                return found
            table = found
        step = None
        if setting.looks_ahead:
            step = company.step(_ahead(table, setting, scale))
        weighed = self._weigh(table.losses, setting, step)
        del step  # rows go one by one as directions are made of them
        if setting.gradient.row_means is not None:
            table = with_remembered(table, setting.gradient, _numbers_of(table, setting))
        outcomes = _outcomes(table, weighed, setting, scale)
        bad_now = _write(outcomes, table, lengths, weighed, seen, setting, scale)
        if bad_now is not None and scale is not None:
            return policy.overflow(table.losses, (), table.nonfinite)
        if bad_now is not None:
            return policy.ended_unwritten(bad_now, table.losses, table.nonfinite)
        if setting.at_parameters:
            solutions = {number: outcome.solution for number, outcome in outcomes.items()}
            self._kept.keep(tuple(table.losses), solutions)
        return _record(outcomes, table, weighed, setting)

    def _further(self, setting: Setting) -> FurtherBatches:
        company, place, policy = setting.company, setting.place, setting.policy
        return FurtherBatches(setting.batches, self._tasks, company, place, policy, setting.scaler)

    def _weigh(
        self, losses: Mapping[str, Tensor], setting: Setting, step: Step | None = None
    ) -> Weighed:
        weighting, looks = setting.weighting, setting.policy.looks
        return self._weigher.weigh(weighting, losses, self._log.parameters, step, looks=looks)


def _reused(record: Record, combinations: Mapping[int, Tensor]) -> Record:
    """Return the record of a step that kept weights served in, by the number of their group."""
    return replace(
        record,
        combination=next(iter(combinations.values())) if len(combinations) == 1 else None,
        groups={
            name: GroupFigures(record.tasks, record.weights, combination=combinations.get(number))
            for number, name in enumerate(record.groups)
        },
        reused=True,
    )


def _with_across(
    table: Table, across: Across, seen: Seen, setting: Setting, scale: float | None
) -> Table | Record:
    """Return the table with products of two batches, of the tasks that are finite in all of them.

    Or the record of the step, if it ends here.
    """
    policy = setting.policy
    for what, bad in (("loss", across.bad_losses), ("gradient", across.bad_gradients)):
        found = [task for task in table.losses if task in bad]
        if found and what == "gradient" and scale is not None:
            _pass_on(table, setting.place, seen, math.nan)
            write_nothing(setting.weighting)
            return policy.overflow(table.losses, tuple(found), table.nonfinite)
        if found:
            table = table.without(found)
            ended = policy.ended(f"{what} in `batches`", table.losses, table.nonfinite)
            if ended is not None:
                return ended
    return table._replace(across=across.of(table.losses, table.groups))


def _ahead(table: Table, setting: Setting, scale: float | None) -> Step:
    """Return what there is to look at before the losses are weighed."""
    leaves, rows = table.everything()
    losses = stacked(list(table.losses.values()))
    balanced = sum(len(part.leaves) for part in table.groups.values())
    return Step(leaves, rows, scale or 1.0, setting.validation, losses, table.norms, balanced)


def _outcomes(
    table: Table, weighed: Weighed, setting: Setting, scale: float | None
) -> dict[int, Outcome]:
    """Return the direction of each group, whose rows are then empty."""
    if setting.gradient.row_means is not None:
        return _outcomes_of_means(table, weighed, setting, scale)
    unscale = 1.0 if scale is None else 1.0 / scale
    outcomes = {}
    for number, part in table.groups.items():
        gramian, power = table.gramian_of_group(number)
        with setting.gradient.only(weighed.active, number):
            outcomes[number] = direction_of(
                setting.gradient,
                part.leaves,
                part.rows,
                gramian,
                weighed.weights,
                unscale,
                setting.place.first,
                power,
                table.across.get(number),
                combine=setting.place.combine,
            )
    return outcomes


def _numbers_of(table: Table, setting: Setting) -> list[int]:
    """Return the numbers of the tasks whose rows are in the table."""
    return [setting.policy.tasks.index(task) for task in table.losses]


def _outcomes_of_means(
    table: Table, weighed: Weighed, setting: Setting, scale: float | None
) -> dict[int, Outcome]:
    """Return the direction of each group by means over steps, which wait for the step's end."""
    tasks = _numbers_of(table, setting)
    outcomes = {}
    for number, part in table.groups.items():
        _, power = table.gramian_of_group(number)
        with setting.gradient.only(weighed.active, number):
            outcomes[number] = direction_of_means(
                setting.gradient,
                part,
                Whose(tasks, number),
                weighed.weights,
                scale or 1.0,
                power,
                looks=setting.policy.looks,
            )
    return outcomes


def _write(
    outcomes: dict[int, Outcome],
    table: Table,
    lengths: Mapping[str, Length],
    weighed: Weighed,
    seen: Seen,
    setting: Setting,
    scale: float | None,
) -> str | None:
    """Accumulate directions, sums of what is not balanced, and slopes of learned weights.

    Returns:
        What is not finite, if anything: nothing is written then, or, under a loss scale, for the
        scaler to see. Finite rows do not tell, as a sum may be more than its dtype holds.
    """
    policy = setting.policy
    bad: str | None = None

    def accepts(gradients: Sequence[Tensor | None]) -> bool:
        nonlocal bad
        if not policy.accepts(gradients):
            bad = "gradient below `features`"
        return bad is None or scale is not None

    rest = (table.rest.leaves, table.rest.sum(weighed.weights, release=True))
    parts = [(table.groups[number].leaves, o.direction) for number, o in outcomes.items()]
    if (
        policy.looks
        and may_overflow(outcomes, table, lengths, weighed, setting.gradient, scale or 1.0)
        and not policy.accepts_directions([*parts, rest], setting.company)
    ):
        bad = "direction"
        if scale is None:
            return bad
    for balanced, direction in parts:
        if not setting.place.write(balanced, direction, seen, accepts):
            return bad
    write(*rest)
    if bad is None:
        weighed.write(scale)
    else:
        write_nothing(setting.weighting)
    return bad


def _record(
    outcomes: dict[int, Outcome], table: Table, weighed: Weighed, setting: Setting
) -> Record:
    place, policy = setting.place, setting.policy
    dropped = policy.ordered(table.nonfinite)
    progress = {
        number: place.over_all(o.progress) if o.combination is None else o.progress
        for number, o in outcomes.items()
    }
    combinations = [outcome.combination for outcome in outcomes.values()]
    total, scaled = table.sum_of_progress(progress)
    tasks, weights = tuple(table.losses), weighed.by_name
    groups = dict(policy.no_figures)
    for number, name in enumerate(groups if setting.at_parameters else ()):
        if number in outcomes:
            part = table.only(number)
            products, in_range = part.sum_of_progress({number: progress[number]})
            combination = outcomes[number].combination
            groups[name] = GroupFigures(
                tasks, weights, part.gramian, products, combination, in_range
            )
    return Record(
        tasks,
        weighed.losses,
        weights,
        gramian=table.gramian,
        progress=total,
        scaled=scaled,
        combination=combinations[0] if len(combinations) == 1 else None,
        absent=policy.absent([*table.losses, *dropped]),
        nonfinite=dropped,
        dropped=dropped,
        groups=groups,
        all_tasks=policy.tasks,
    )


def _pass_on(table: Table, place: Place, seen: Seen, factor: float = 1.0) -> None:
    """Accumulate the plain sum of the rows, not finite as it is, or times a factor that is not."""
    ones = torch.full((len(table.losses),), factor, device="cpu")
    for leaves, rows in table.groups.values():
        place.write(leaves, place.combine(rows, ones, leaves), seen, lambda _: True)
    write(table.rest.leaves, table.rest.sum(ones))
