from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.pathology.cohort.targets import (
    Target,
    cut,
    cut_classes,
    describe,
    kind_of,
    make_target,
    refuse_foreign_values,
    warn_of_far_value,
)
from examples.pathology.common.errors import UserError
from examples.pathology.settings.cohort import CohortConfig

TABLE = Path("clini.csv")
NUMBERS = [str(i / 2) for i in range(21)]


def config(**changes) -> CohortConfig:
    return CohortConfig(TABLE, Path("s.csv"), Path("f"), "t", **changes)


@pytest.mark.parametrize(
    ("values", "most_classes", "kind"),
    [
        (NUMBERS, 20, "regression"),
        (NUMBERS[1:] * 2, 20, "classification"),
        ([*NUMBERS, ""], 20, "regression"),  # not known is no value
        ([*NUMBERS, "high"], 20, "classification"),
        ([*NUMBERS, "inf"], 20, "classification"),
        ([*NUMBERS, "1_000"], 20, "classification"),  # a number to Python alone
        (["0", "1", "2"], 2, "regression"),
        (["0", "1", "0"], 2, "classification"),
        (["0", "1", "0.0", "1.0"], 2, "classification"),  # two numbers, not four
    ],
)
def test_many_numbers_are_a_measurement(values, most_classes, kind):
    assert kind_of(pd.Series(values), most_classes) == kind


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ([-999.0] * 5 + [0.1, 0.2, 0.3, 0.4], ["-999"]),
        ([1e6] * 2 + [0.1, 0.2, 0.3, 0.4], ["1e+06"]),
        ([0.0] * 30 + [0.1, 0.2, 0.4, 900.0], ["900"]),
        ([0.0] * 30 + [1.0, 20.0, 300.0, 4000.0], []),  # counts with many zeros
        ([0.0] * 20 + [1.0] * 20, []),
        ([-999.0] * 9 + [0.5], []),  # of one other value nothing is lost
        ([], []),
    ],
)
def test_a_number_far_from_all_others_is_told_however_often_it_stands(caplog, numbers, told):
    warn_of_far_value("t", {f"P{i:02d}": x for i, x in enumerate(numbers)}, TABLE)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" is ")[1].split(" and ")[0] for line in lines] == told


def test_measurements_with_a_heavy_tail_are_not_told(caplog):
    random = np.random.default_rng(0)
    for _ in range(300):
        values = np.round(np.exp(random.normal(size=40)), 1)  # rounded: some are equal
        warn_of_far_value("t", dict(zip(map(str, range(40)), values, strict=True)), TABLE)
    assert not caplog.records


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.data())
def test_the_cut_off_itself_is_positive(values, data):
    cutoff = data.draw(st.sampled_from(values) | st.floats(-1e6, 1e6))
    below, above = cut_classes(cutoff)
    cells = cut("t", pd.Series([*map(str, values), ""]), cutoff, TABLE)
    assert list(cells) == [*(above if value >= cutoff else below for value in values), ""]


def test_classes_of_a_cut_off_are_named_by_it():
    assert cut_classes(42.0) == ("<42", ">=42")
    assert cut_classes(0.125) == ("<0.125", ">=0.125")


def test_words_cannot_be_cut():
    with pytest.raises(UserError, match=r"clini.csv: `t` must hold numbers, but has 'high'\."):
        cut("t", pd.Series(["1", "high"]), 0.5, TABLE)


def test_the_upper_class_of_a_cut_off_is_positive_though_it_is_not_the_rarer():
    values = ["<1", *[">=1"] * 9]
    target = make_target("t", "classification", values, config(cutoff=1.0))
    assert target == Target("t", "classification", ("<1", ">=1"), ">=1", 1.0)
    chosen = make_target("t", "classification", values, config(cutoff=1.0, positive="<1"))
    assert chosen.positive == "<1"
    with pytest.raises(UserError, match=r"at least 2 values among the patients used, but has <1"):
        make_target("t", "classification", ["<1"], config(cutoff=1.0))


def test_a_measurement_as_classes_is_told_what_it_can_be():
    with pytest.raises(UserError, match=r"at most 20 classes.* 21 .*--kind t=regression, or --cut"):
        make_target("t", "classification", NUMBERS, config(kind=("t=classification",)))
    with pytest.raises(UserError, match=r"at most 20 classes, but has 21 values\.$"):
        make_target("t", "classification", [f"word {i}" for i in NUMBERS], config())


def test_a_regression_has_no_positive_class():
    assert make_target("t", "regression", NUMBERS, config()) == Target("t", "regression")
    with pytest.raises(UserError, match=r"`positive` must be left out for `t`, a regression"):
        make_target("t", "regression", NUMBERS, config(positive="1"))


def test_targets_are_described():
    label = Target("t", "classification", ("a", "b"), "b")
    expected = "classification, a (1), b (3); positive is b, prevalence 0.750"
    assert describe(label, ["b", "a", "b", "b"]) == expected
    assert describe(Target("t", "regression"), [3.0, 1.0, 2.5]) == "regression, 1 to 3, median 2.5"


def test_values_that_were_not_trained_on_are_refused():
    label = Target("t", "classification", ("MSIH", "MSS"), "MSIH")
    with pytest.raises(UserError, match=r"one of MSIH, MSS, .* but has 'MSI-H'.* `MSIH`"):
        refuse_foreign_values(label, pd.Series(["MSI-H", "MSS", ""]), TABLE)
    with pytest.raises(UserError, match="must hold numbers, but has 'high'"):
        refuse_foreign_values(Target("t", "regression"), pd.Series(["1", "high", ""]), TABLE)
