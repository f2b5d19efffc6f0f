"""From trainings to a table: rates chosen, ranks, differences from the baseline, intervals."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, t

from examples.digits.costs import Cost
from examples.digits.methods import BASELINE, SINGLE
from examples.digits.setting import TASKS
from examples.digits.study import Done, Job, Plan
from examples.digits.training import Measured

LEVEL = 0.95
SCORE = "score"
MEASURES = (*TASKS, SCORE)
"""Accuracies in percent, ink's error in grey values, the mean of accuracies and R² in points."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over repetitions and how far it can be trusted.

    Args:
        mean: Of the repetitions.
        half: Half the width of the t interval; NaN for one repetition.
    """

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    @property
    def verdict(self) -> int:
        """1 above zero, -1 below zero, 0 if the interval does not say."""
        return int(self.low > 0) - int(self.high < 0)


def t_interval(values: Sequence[float] | Values, level: float = LEVEL) -> Interval:
    """Return the t interval of a mean.

    Args:
        values: One per repetition.
        level: Of the interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return Interval(float(sample.mean()), math.nan)
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return Interval(float(sample.mean()), float(t.ppf((1 + level) / 2, len(sample) - 1)) * error)


@dataclass(frozen=True)
class Outcome:
    """What a method does in the tests of all repetitions, at the rates that validation chose.

    Args:
        method: Its name.
        values: Of each of MEASURES, one number per repetition; empty if the method failed.
        rates: Chosen, one per repetition (three for the reference).
        failed: Why the method failed in a repetition at every rate; empty if it did not.
    """

    method: str
    values: Mapping[str, Values]
    rates: tuple[float, ...]
    failed: str = ""


def chosen(candidates: Sequence[Done]) -> Done | None:
    """Return the training with the highest score in validation; the first of equals.

    Args:
        candidates: One per rate. Failed ones do not count.

    Returns:
        None if all failed.
    """
    best, highest = None, -math.inf
    for done in candidates:
        if done.validation is not None and done.validation.score > highest:
            best, highest = done, done.validation.score
    return best


def outcomes(plan: Plan, trainings: Sequence[Done]) -> list[Outcome]:
    """Return what comes of the reference, which is first, and of every method.

    Args:
        plan: The study.
        trainings: All of its trainings.
    """
    known = {done.job: done for done in trainings}
    found = []
    for method in (SINGLE, *plan.methods):
        parts = [f"{SINGLE}:{task}" for task in TASKS] if method == SINGLE else [method]
        tests, rates, failed = [], [], ""
        for seed in range(plan.seeds):
            several = []
            for part in parts:
                candidates = [known[Job(part, seed, rate)] for rate in plan.setting.rates]
                best = chosen(candidates)
                if best is None or best.test is None:
                    failed = failed or candidates[0].error
                else:
                    several.append(best.test)
                    rates.append(best.job.rate)
            tests.append(_together(several))
        values = {} if failed else dict(zip(MEASURES, np.array(tests).T, strict=True))
        found.append(Outcome(method, values, tuple(rates), failed))
    return found


def _together(several: Sequence[Measured]) -> list[float]:
    """Return MEASURES of networks that have learned different tasks, or of one that all."""

    def of(name: str) -> float:
        known = [value for each in several if not math.isnan(value := getattr(each, name))]
        return known[0] if known else math.nan

    upper, lower, ink, explained = map(of, ("upper_left", "lower_right", "ink", "explained"))
    return [100 * upper, 100 * lower, ink, 100 * (upper + lower + explained) / 3]


def mean_ranks(several: Sequence[Outcome]) -> Values:
    """Return each method's rank, averaged over the tasks, in each repetition.

    Args:
        several: The methods that are ranked. The best is 1; equals share the mean of their ranks.

    Returns:
        ``(methods, repetitions)``.
    """
    ranks = []
    for task in TASKS:
        table = np.stack([outcome.values[task] for outcome in several])
        ranks.append(rankdata(table if task == "ink" else -table, axis=0))
    mean: Values = np.mean(ranks, axis=0)
    return mean


@dataclass(frozen=True)
class Row:
    """A method in the table.

    Args:
        method: Its name.
        measured: Each of MEASURES, with an interval of its own.
        differences: From the baseline, repetition by repetition, with an interval of its own.
        corrected: The difference of the score; all of the table's hold together.
        rank: Mean rank over the tasks; None for the reference.
        cost: Of a step.
        rates: How often each was chosen.
        failed: Why there are no numbers; empty otherwise.
    """

    method: str
    measured: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    corrected: Interval | None
    rank: Interval | None
    cost: Cost | None
    rates: Mapping[float, int]
    failed: str


@dataclass(frozen=True)
class Table:
    """The study's result.

    Args:
        reference: A network per task.
        rows: The methods by mean rank; failed ones are last.
        comparisons: With the baseline, for which intervals are corrected.
        plan: The study.
    """

    reference: Row
    rows: tuple[Row, ...]
    comparisons: int
    plan: Plan

    @property
    def baseline(self) -> Row:
        """The row of equal weights and the plain sum."""
        return next(row for row in self.rows if row.method == BASELINE)

    @property
    def compared(self) -> list[Row]:
        """The methods that have numbers and are not the baseline."""
        return [row for row in self.rows if not row.failed and row.method != BASELINE]


def tabulate(plan: Plan, trainings: Sequence[Done], costs: Mapping[str, Cost]) -> Table:
    """Return the table of a study.

    Args:
        plan: The study.
        trainings: All of its trainings.
        costs: Of the methods' steps.

    Raises:
        ValueError: If the baseline or the reference failed: there is nothing to compare with.
    """
    reference, *methods = outcomes(plan, trainings)
    ranked = [outcome for outcome in methods if not outcome.failed]
    base = next(outcome for outcome in methods if outcome.method == BASELINE)
    for outcome in (reference, base):
        if outcome.failed:
            raise ValueError(f"{outcome.method!r}, to compare with, failed: {outcome.failed}")
    ranks = {
        outcome.method: t_interval(row)
        for outcome, row in zip(ranked, mean_ranks(ranked), strict=True)
    }
    comparisons = len(ranked)  # the reference is one, the baseline is none
    level = 1 - (1 - LEVEL) / comparisons

    def row(outcome: Outcome) -> Row:
        apart = {key: each - base.values[key] for key, each in outcome.values.items()}
        compared = bool(apart) and outcome.method != BASELINE
        return Row(
            outcome.method,
            {key: t_interval(each) for key, each in outcome.values.items()},
            {key: t_interval(each) for key, each in apart.items()},
            t_interval(apart[SCORE], level) if compared else None,
            ranks.get(outcome.method),
            costs.get(outcome.method),
            dict(sorted(Counter(outcome.rates).items())),
            outcome.failed,
        )

    rows = [row(outcome) for outcome in methods]
    rows.sort(key=lambda row: row.rank.mean if row.rank else math.inf)
    return Table(row(reference), tuple(rows), comparisons, plan)
