"""Choices, ranks and intervals against SciPy and loops over their definitions."""

import csv
import io
import itertools
import math

import numpy as np
import pytest
from scipy.stats import quantile_test, ttest_1samp, ttest_rel

from examples.digits import costs
from examples.digits.costs import Cost, median_interval
from examples.digits.methods import SINGLE
from examples.digits.page import comma_separated
from examples.digits.results import (
    SCORE,
    Interval,
    Outcome,
    chosen,
    mean_ranks,
    outcomes,
    t_interval,
    tabulate,
)
from examples.digits.setting import TASKS
from tests.digits._small import TINY, done, plan_of

METHODS = ("pcgrad", "mgda", "dwa", "famo")
SEEDS = 4


def drawn(failing=(), seed=0, methods=METHODS):
    """A study with numbers from a generator; those of a seed have much in common."""
    rng = np.random.default_rng(seed)
    plan = plan_of(*methods, seeds=SEEDS)
    common = rng.normal(0, 0.05, SEEDS)
    trainings = []
    for job in plan.jobs:
        values = [0.8, 0.7, 0.3, 0.6] + common[job.seed] + rng.normal(0, 0.01, 4)
        test = np.round(values + rng.normal(0, 0.01, 4), 6).tolist()
        error = "ValueError: no" if job.method in failing else ""
        trainings.append(
            done(job.method, job.seed, job.rate, values.round(6).tolist(), test, error)
        )
    return plan, trainings


def by_hand(plan, trainings, method):
    """The test's numbers of a method, chosen and put together in a loop: (seeds, 4)."""
    rows = []
    for seed in range(plan.seeds):
        own = [d for d in trainings if (d.job.method, d.job.seed) == (method, seed)]
        means = [
            (d.validation.upper_left + d.validation.lower_right + d.validation.explained) / 3
            for d in own
        ]
        test = own[means.index(max(means))].test
        rows.append(
            [
                100 * test.upper_left,
                100 * test.lower_right,
                test.ink,
                100 * (test.upper_left + test.lower_right + test.explained) / 3,
            ]
        )
    return np.array(rows)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.9995])
@pytest.mark.parametrize("count", [2, 5, 30])
def test_intervals_are_those_of_scipy(level, count):
    sample = np.random.default_rng(count).normal(3, 2, count)
    expected = ttest_1samp(sample, 0).confidence_interval(level)
    interval = t_interval(sample, level)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(np.mean(sample))


def test_one_repetition_has_no_interval():
    interval = t_interval([3.0])
    assert interval.mean == 3
    assert math.isnan(interval.half)
    assert interval.verdict == 0


@pytest.mark.parametrize(
    ("mean", "half", "verdict"), [(1, 0.9, 1), (-1, 0.9, -1), (1, 1, 0), (-1, 2, 0), (0, 0, 0)]
)
def test_verdicts(mean, half, verdict):
    assert Interval(mean, half).verdict == verdict


def test_a_table_against_loops_and_scipy():
    plan, trainings = drawn()
    table = tabulate(plan, trainings, {})
    base = by_hand(plan, trainings, "sum")
    assert table.comparisons == 5  # four methods and the reference
    for row in table.compared:
        own = by_hand(plan, trainings, row.method)
        for column, key in enumerate((*TASKS, SCORE)):
            assert row.measured[key].mean == pytest.approx(own[:, column].mean())
            paired = ttest_rel(own[:, column], base[:, column])
            expected = paired.confidence_interval(0.95)
            assert row.differences[key].low == pytest.approx(expected.low)
            assert row.differences[key].high == pytest.approx(expected.high)
        together = paired.confidence_interval(1 - 0.05 / 5)
        assert (row.corrected.low, row.corrected.high) == pytest.approx(
            (together.low, together.high)
        )


def test_the_reference_is_three_networks_with_rates_of_their_own():
    plan, trainings = drawn()
    reference = outcomes(plan, trainings)[0]
    assert len(reference.rates) == 3 * SEEDS
    for seed in range(SEEDS):
        best = []
        for task, of in zip(TASKS, ("upper_left", "lower_right", "explained"), strict=True):
            own = [d for d in trainings if (d.job.method, d.job.seed) == (f"{SINGLE}:{task}", seed)]
            best.append(max(own, key=lambda d: getattr(d.validation, of)).test)
        assert reference.values["upper-left"][seed] == pytest.approx(100 * best[0].upper_left)
        assert reference.values["lower-right"][seed] == pytest.approx(100 * best[1].lower_right)
        assert reference.values["ink"][seed] == best[2].ink
        shares = best[0].upper_left + best[1].lower_right + best[2].explained
        assert reference.values[SCORE][seed] == pytest.approx(100 * shares / 3)


def test_validation_alone_chooses_and_the_first_of_equals():
    good, bad = (0.9, 0.9, 0.1, 0.9), (0.5, 0.5, 0.5, 0.5)
    first = done("mgda", 0, 0.01, bad, test=good)
    second = done("mgda", 0, 0.03, good, test=bad)
    assert chosen([first, second]) is second
    assert chosen([second, done("mgda", 0, 0.1, good)]) is second
    assert chosen([done("mgda", 0, 0.1, (), error="no"), first]) is first
    assert chosen([done("mgda", 0, 0.1, (), error="no")]) is None


def outcome(method, upper, lower, ink):
    return Outcome(method, dict(zip(TASKS, map(np.array, (upper, lower, ink)), strict=True)), ())


def test_ranks_with_ties_by_hand():
    several = [
        outcome("a", [90.0, 80.0], [50.0, 50.0], [0.2, 0.1]),
        outcome("b", [90.0, 70.0], [60.0, 50.0], [0.3, 0.1]),
        outcome("c", [80.0, 90.0], [60.0, 50.0], [0.1, 0.1]),
    ]
    expected = [  # upper, lower, ink: less is better
        [(1.5 + 3 + 2) / 3, (2 + 2 + 2) / 3],
        [(1.5 + 1.5 + 3) / 3, (3 + 2 + 2) / 3],
        [(3 + 1.5 + 1) / 3, (1 + 2 + 2) / 3],
    ]
    np.testing.assert_allclose(mean_ranks(several), expected)


def test_ranks_against_counting():
    """A rank is one more than those that are better, and half of those that are equal."""
    rng = np.random.default_rng(1)
    several = [outcome(str(i), *rng.integers(0, 4, (3, 6)).astype(float)) for i in range(7)]
    found = mean_ranks(several)
    for i, seed in itertools.product(range(7), range(6)):
        ranks = []
        for task, sign in zip(TASKS, (1, 1, -1), strict=True):
            column = [sign * each.values[task][seed] for each in several]
            better = sum(value > column[i] for value in column)
            ranks.append(better + (column.count(column[i]) + 1) / 2)
        assert found[i, seed] == pytest.approx(np.mean(ranks))


def test_rows_go_by_mean_rank_and_failures_are_last():
    plan, trainings = drawn(failing=("mgda",))
    table = tabulate(plan, trainings, {})
    ranks = [row.rank.mean for row in table.rows[:-1]]
    assert ranks == sorted(ranks)
    assert sum(ranks) == pytest.approx(1 + 2 + 3 + 4)
    failed = table.rows[-1]
    assert (failed.method, failed.failed, failed.rank) == ("mgda", "ValueError: no", None)
    assert table.comparisons == 4
    assert "mgda" not in [row.method for row in table.compared]


def test_a_method_fails_if_no_rate_works_in_one_repetition():
    plan, trainings = drawn()
    broken = [
        done(d.job.method, d.job.seed, d.job.rate, (), error="ValueError: here")
        if (d.job.method, d.job.seed) == ("famo", 2)
        else d
        for d in trainings
    ]
    assert tabulate(plan, broken, {}).rows[-1].failed == "ValueError: here"
    partly = [
        done("famo", 2, 0.01, (), error="no")
        if (d.job.method, d.job.seed, d.job.rate) == ("famo", 2, 0.01)
        else d
        for d in trainings
    ]
    row = next(row for row in tabulate(plan, partly, {}).rows if row.method == "famo")
    assert not row.failed
    assert sum(row.rates.values()) == SEEDS


@pytest.mark.parametrize("method", ["sum", f"{SINGLE}:ink"])
def test_without_something_to_compare_with_there_is_no_table(method):
    with pytest.raises(ValueError, match="to compare with, failed: ValueError: no"):
        tabulate(*drawn(failing=(method,)), {})


def test_a_method_that_is_the_baseline_is_a_tie():
    plan, trainings = drawn()
    same = {(d.job.seed, d.job.rate): d for d in trainings if d.job.method == "sum"}
    trainings = [
        done("dwa", d.job.seed, d.job.rate, *measured(same[d.job.seed, d.job.rate]))
        if d.job.method == "dwa"
        else d
        for d in trainings
    ]
    table = tabulate(plan, trainings, {})
    row = next(row for row in table.rows if row.method == "dwa")
    assert (row.corrected.mean, row.corrected.half, row.corrected.verdict) == (0, 0, 0)
    assert row.rank.mean == table.baseline.rank.mean


def measured(training):
    from dataclasses import astuple

    return astuple(training.validation), astuple(training.test)


def test_the_table_for_programs_holds_the_numbers():
    plan, trainings = drawn(failing=("dwa",))
    table = tabulate(plan, trainings, {"mgda": Cost(1.5, 1.25, 1.75, 2.0)})
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(comma_separated(table)))}
    assert [*rows] == [SINGLE, *(row.method for row in table.rows)]
    own = by_hand(plan, trainings, "mgda")
    assert float(rows["mgda"]["ink_mean"]) == pytest.approx(own[:, 2].mean(), abs=1e-4)
    apart = own[:, 3] - by_hand(plan, trainings, "sum")[:, 3]
    assert float(rows["mgda"]["score_difference_mean"]) == pytest.approx(apart.mean(), abs=1e-4)
    low = ttest_1samp(apart, 0).confidence_interval(1 - 0.05 / 4).low
    assert float(rows["mgda"]["corrected_difference_low"]) == pytest.approx(low, abs=1e-4)
    assert [rows["mgda"][f"cost_{end}"] for end in ("mean", "low", "high")] == [
        "1.5000",
        "1.2500",
        "1.7500",
    ]
    counts = dict(item.split(":") for item in rows["mgda"]["rates"].split())
    assert sum(map(int, counts.values())) == SEEDS
    assert rows["dwa"]["failed"] == "ValueError: no"
    assert rows["dwa"]["score_mean"] == rows["dwa"]["rank_mean"] == ""


@pytest.mark.parametrize("count", [6, 7, 15, 40])
def test_intervals_of_medians_are_those_of_scipy(count):
    values = np.random.default_rng(count).permutation(count).astype(float).tolist()
    expected = quantile_test(values, p=0.5).confidence_interval(0.95)
    assert median_interval(values) == (expected.low, expected.high)


def test_intervals_of_medians_cover_by_counting():
    """All ways in which 15 values lie about the median: in at most 5 % it is outside."""
    low, high = map(int, median_interval([float(i) for i in range(15)]))
    outside = sum(math.comb(15, k) for k in range(16) if not low < k <= high)
    narrower = sum(math.comb(15, k) for k in range(16) if not low + 1 < k <= high - 1)
    assert outside / 2**15 <= 0.05 < narrower / 2**15


def test_few_rounds_have_no_interval():
    assert all(math.isnan(end) for end in median_interval([1.0, 2.0, 3.0]))


def test_costs_are_ratios_within_rounds(monkeypatch):
    """A machine that is slow for a round is slow for all."""
    order = []

    class Timed:
        def __init__(self, name, setting):
            self.name, self.round = name, 0
            self.error = "ValueError: no" if name == "famo" else ""

        def warm_up(self):
            order.append(f"warm {self.name}")

        def time(self):
            order.append(self.name)
            self.round += 1
            return {"sum": 1, SINGLE: 1.5, "pcgrad": 2, "famo": 0}[self.name] * self.round**2 / 1000

    monkeypatch.setattr(costs, "_Runner", Timed)
    found = costs.measure(["sum", "pcgrad", "famo"], TINY, rounds=7)
    names = ["sum", SINGLE, "pcgrad", "famo"]
    assert order == [f"warm {name}" for name in names] + names * 7
    assert found["pcgrad"] == Cost(2, 2, 2, pytest.approx(32))  # the fourth of seven rounds
    assert found[SINGLE].ratio == pytest.approx(1.5)
    assert math.isnan(found["famo"].ratio)
    assert found["famo"].error == "ValueError: no"


def test_costs_are_measured_once(tmp_path, monkeypatch):
    found = costs.measured(["sum", "pcgrad"], TINY, tmp_path, rounds=2)
    assert found["sum"].ratio == 1
    assert found["pcgrad"].ratio > 0
    assert found[SINGLE].milliseconds > 0
    monkeypatch.setattr(costs, "measure", lambda *a: pytest.fail("measured again"))
    assert repr(costs.measured(["sum"], TINY, tmp_path, rounds=2)) == repr(found)
