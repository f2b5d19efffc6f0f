import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from examples.pathology.results import metrics
from examples.pathology.results.metrics import Score

# Few different scores, so that there are ties.
PATIENTS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.1, 0.2, 0.5, 0.9])), min_size=2, max_size=12
)


@given(PATIENTS)
def test_auroc_counts_pairs(patients):
    truth, score = zip(*patients, strict=True)
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for t, a in patients
        if t
        for u, b in patients
        if not u
    ]
    assume(pairs)
    assert metrics.auroc(truth, score).value == pytest.approx(sum(pairs) / len(pairs))


@given(PATIENTS)
def test_auprc_sums_precision_over_steps_of_recall(patients):
    truth, score = zip(*patients, strict=True)
    positives = sum(truth)
    assume(0 < positives < len(truth))
    area, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        called = [t for t, s in patients if s >= threshold]
        area += (sum(called) / positives - recall) * sum(called) / len(called)
        recall = sum(called) / positives
    assert metrics.auprc(truth, score).value == pytest.approx(area)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(-5, 5), st.integers(-5, 5)),
        min_size=3,
        max_size=9,
    )
)
def test_silhouette_compares_own_and_nearest_other_class(rows):
    labels = [row[0] for row in rows]
    points = np.array([row[1:] for row in rows], dtype=float)
    assume(1 < len(set(labels)) < len(labels))
    values = []
    for i, label in enumerate(labels):

        def mean_distance(other, i=i):
            near = [
                math.dist(points[i], points[j])
                for j in range(len(labels))
                if labels[j] == other and j != i
            ]
            return sum(near) / len(near) if near else None

        own = mean_distance(label)
        nearest = min(mean_distance(other) for other in set(labels) - {label})
        if own is None or max(own, nearest) == 0:
            values.append(0.0)  # alone in its class, or all at one point
        else:
            values.append((nearest - own) / max(own, nearest))
    assert metrics.silhouette(points, labels).value == pytest.approx(np.mean(values), abs=1e-9)


def test_pearson_worked_by_hand():
    # Deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6).
    assert metrics.pearson([1, 2, 3], [0, 3, 3]).value == pytest.approx(3 / math.sqrt(12))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=8))
def test_pearson_does_not_depend_on_the_unit(rows):
    x, y = np.array(rows, dtype=float).T
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    value = metrics.pearson(x, y).value
    assert metrics.pearson(x, 100 + 0.01 * y).value == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (metrics.auroc([True, True], [0.1, 0.2]), "one class only"),
        (metrics.auprc([False], [0.1]), "one class only"),
        (metrics.auroc([], []), "no patients"),
        (metrics.prevalence([]), "no patients"),
        (metrics.silhouette(np.zeros((3, 2)), ["a", "a", "a"]), "one class only"),
        (metrics.silhouette(np.eye(2), ["a", "b"]), "every patient is a class of its own"),
        (metrics.pearson([1, 2], [1, 2]), "2 patients with a value"),
        (metrics.pearson([1, 1, 1], [1, 2, 3]), "all measured values are equal"),
        (metrics.pearson([1, 2, 3], [0.5, 0.5, 0.5]), "all predicted values are equal"),
        (metrics.spearman([1, 2], [1, 2]), "2 patients with a value"),
        (metrics.spearman([1, 1, 1], [1, 2, 3]), "all measured values are equal"),
        (metrics.spearman([1, 2, 3], [7, 7, 7]), "all predicted values are equal"),
        (metrics.brier([], []), "no patients"),
        (metrics.calibration([], []), "no patients"),
    ],
)
def test_what_is_not_defined_is_nan_with_the_reason(score, reason):
    assert math.isnan(score.value)
    assert score.reason == reason


def test_over_folds_worked_by_hand():
    summary = metrics.over_folds([Score(1.0), Score(2.0), Score(math.nan, "why"), Score(3.0)])
    # The 97.5 % quantile of Student's t with 2 degrees of freedom is 4.30265 in every table.
    assert (summary.mean, summary.sd, summary.folds) == (2.0, 1.0, 3)
    assert summary.high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert 2.0 - summary.low == pytest.approx(summary.high - 2.0)


def test_one_fold_has_a_mean_but_no_spread():
    summary = metrics.over_folds([Score(0.7)])
    assert summary.mean == 0.7
    assert math.isnan(summary.sd)
    assert math.isnan(summary.low)


def test_no_fold_has_nothing():
    summary = metrics.over_folds([Score(math.nan, "one class only")])
    assert math.isnan(summary.mean)
    assert summary.folds == 0


def test_paired_differences_take_out_what_folds_share():
    summary = metrics.paired_difference([Score(0.9), Score(0.6)], [Score(0.8), Score(0.5)])
    assert summary.mean == pytest.approx(0.1)
    assert summary.sd == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="same folds, but got 2 and 1"):
        metrics.paired_difference([Score(0.9), Score(0.6)], [Score(0.8)])


def test_the_mean_curve_starts_at_zero_and_averages():
    grid = np.array([0.0, 0.5, 1.0])
    diagonal = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    perfect = (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    mean, spread = metrics.mean_curve([diagonal, perfect], grid)
    assert mean.tolist() == [0.0, 0.75, 1.0]
    assert spread[1] == pytest.approx(np.std([0.5, 1.0], ddof=1))


def test_the_mean_absolute_error_is_in_the_unit():
    assert metrics.mean_absolute_error([1.0, 2.0, 6.0], [2.0, 2.0, 4.0]).value == 1.0
    assert metrics.mean_absolute_error([], []).reason == "no patients"


def test_spearman_is_pearson_of_mid_ranks():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 of squares 4.5 and 5."""
    assert metrics.spearman([10, 20, 20, 90], [1, 2, 3, 400]).value == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )


def test_brier_and_calibration_worked_by_hand():
    positive, probability = [True, False, False, False], [0.5, 0.5, 0.0, 0.2]
    squares = 0.25 + 0.25 + 0 + 0.04
    assert metrics.brier(positive, probability).value == pytest.approx(squares / 4)
    assert metrics.calibration(positive, probability).value == pytest.approx(1.2 / 4 - 1 / 4)
    assert metrics.calibration(positive, [0.0] * 4).value == pytest.approx(1 / 4)  # too low as well
    assert metrics.calibration([True, False], [0.9, 0.1]).value == pytest.approx(0)


def test_what_lower_values_of_are_better():
    lower = {figure for figure in metrics.TITLES if metrics.Metric(figure).sign < 0}
    assert lower == {"mae", "brier", "calibration"}
