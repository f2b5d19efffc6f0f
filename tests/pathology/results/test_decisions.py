"""Decisions at thresholds, Brier score and calibration: against scikit-learn, loops and algebra."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from examples.pathology.cohort.targets import Target
from examples.pathology.results import metrics
from examples.pathology.results.decisions import calibration, confusion, decisions, share
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.runs import Run
from examples.pathology.results.summary import RunSummary

TWO = Target("MSI", "classification", ("MSS", "MSIH"), "MSIH")
THREE = Target("Type", "classification", ("a", "b", "c"), "b")
BEST, SENSITIVE = "best F1", "sensitivity 80 %"


def table_of(target, labels, scores):
    """Return predictions as they are read: all text."""
    scores = np.asarray(scores, dtype=float)
    if scores.ndim == 1:
        scores = np.stack([1 - scores, scores], axis=1)
    columns = {f"{target.name}_{c}": scores[:, k] for k, c in enumerate(target.classes)}
    return pd.DataFrame({"PATIENT": "x", target.name: labels, **columns}).astype(str)


def fold_of(target, tested, *validated, threshold=math.nan):
    table = table_of(target, *tested)
    parts = tuple(table_of(target, *part) for part in validated)
    points = np.zeros((len(table), 2), dtype=np.float32)
    return FoldResult(table, points, 1, 1, 0.0, threshold, validated=parts)


def drawn(target, patients, seed):
    """Draw labels and probabilities that know something of them."""
    random = np.random.default_rng(seed)
    truth = random.integers(len(target.classes), size=patients)
    logits = random.normal(size=(patients, len(target.classes)))
    logits[np.arange(patients), truth] += 1
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.array(target.classes)[truth], scores


def run_of(results, target=TWO):
    about = {"method": "naive", "target": target.name, "classes": target.classes}
    about.update(positive=target.positive, patients=0, funnel=(), extractor="", note="")
    summary = RunSummary(**about, random_weights=False, metrics={})
    return Run("naive", Path(), summary, tuple(results))


def found(results, target=TWO):
    table = decisions(run_of(results, target), 0.8, method="naive")
    assert (table.pop("method") == "naive").all()
    return table.set_index(["class", "rule", "figure"]).sort_index()


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9])),
        min_size=1,
        max_size=45,
    ),
    st.sampled_from([1, 30, 56, 60, 70, 80, 95, 100]),
)
@example([(True, 0.1), (True, 0.9), (False, 0.5)], 100)
@example([(True, k / 25) for k in range(25)], 56)
def test_the_threshold_is_the_highest_with_the_sensitivity(patients, percent):
    """Counted in whole numbers: 14 of 25 are 56 %, and 0.56 * 25 is above 14."""
    truth, score = zip(*patients, strict=True)
    threshold = metrics.threshold_at(truth, score, percent / 100)
    if not any(truth):
        assert math.isnan(threshold)
        return
    enough = [
        c
        for c in sorted({*score, 2.0})
        if 100 * sum(t and s >= c for t, s in patients) >= percent * sum(truth)
    ]
    assert threshold == max(enough)


def test_each_patient_is_judged_by_its_own_folds_threshold_and_folds_are_pooled():
    """The second fold's scores are a tenth of the first's, and so is its threshold."""
    labels, scores = drawn(TWO, 60, seed=1)
    validated = drawn(TWO, 30, seed=2)
    results = [
        fold_of(
            TWO,
            (labels[part], scores[part, 1] * scale),
            (validated[0], validated[1][:, 1] * scale),
            threshold=0.5 * scale,
        )
        for part, scale in ((slice(0, 25), 1.0), (slice(25, 60), 0.1))
    ]
    truth = labels == "MSIH"
    positives = np.sort(validated[1][validated[0] == "MSIH", 1])[::-1]
    at_sensitivity = positives[math.ceil(0.8 * len(positives)) - 1]
    table = found(results)
    for rule, limit in ((BEST, 0.5), (SENSITIVE, at_sensitivity)):
        called = scores[:, 1] >= limit
        row = table.loc["MSIH", rule]
        tn, fp, fn, tp = sklearn_metrics.confusion_matrix(truth, called).ravel()
        assert row.loc[["tn", "fp", "fn", "tp"], "value"].tolist() == [tn, fp, fn, tp]
        assert min(tn, fp, fn, tp) > 0
        for figure, expected in (
            ("sensitivity", sklearn_metrics.recall_score(truth, called)),
            ("specificity", sklearn_metrics.recall_score(~truth, ~called)),
            ("ppv", sklearn_metrics.precision_score(truth, called)),
            ("npv", sklearn_metrics.precision_score(~truth, ~called)),
            ("prevalence", truth.mean()),
        ):
            assert row.loc[figure, "value"] == pytest.approx(expected)
            assert row.loc[figure, "patients"] / row.loc[figure, "of"] == pytest.approx(expected)
            assert row.loc[figure, "ci95_low"] < expected < row.loc[figure, "ci95_high"]
        first, second = map(float, row.loc["ppv", "thresholds"].split())
        assert (first, second) == pytest.approx((limit, limit / 10), rel=1e-5)


def test_a_fold_without_a_threshold_judges_nobody():
    tested = (["MSIH", "MSS", "MSS"], [0.9, 0.8, 0.1])
    known = fold_of(TWO, tested, (["MSIH", "MSS"], [0.5, 0.2]), threshold=0.5)
    without = fold_of(TWO, tested, (["MSS", "MSS"], [0.5, 0.2]))
    table = found([known, without])
    for rule in (BEST, SENSITIVE):
        assert table.loc[("MSIH", rule, "ppv"), "thresholds"] == "0.5 none"
        assert table.loc[("MSIH", rule, "prevalence"), ["patients", "of"]].tolist() == [1, 3]
    assert table.loc[("MSIH", "", "brier"), "of"] == 6  # it needs no threshold
    table = found([without])
    reasons = table.loc[("MSIH", BEST), "undefined"]
    assert set(reasons[["sensitivity", "specificity", "ppv", "npv", "prevalence"]]) == {
        "nobody is judged"
    }


@pytest.mark.parametrize(
    ("labels", "scores", "figure", "reason"),
    [
        (["MSS", "MSS"], [0.1, 0.9], "sensitivity", "no positive patient"),
        (["MSIH", "MSIH"], [0.1, 0.9], "specificity", "no negative patient"),
        (["MSIH", "MSS"], [0.1, 0.2], "ppv", "no patient called positive"),
        (["MSIH", "MSS"], [0.8, 0.9], "npv", "no patient called negative"),
        (["", ""], [0.8, 0.9], "prevalence", "nobody is judged"),
    ],
)
def test_what_is_undefined_says_why(labels, scores, figure, reason):
    table = found([fold_of(TWO, (labels, scores), threshold=0.5)])
    row = table.loc[("MSIH", BEST, figure)]
    assert (row["value"], row["ci95_low"], row["undefined"]) == (None, None, reason)
    if len({*labels}) == 1:
        why = "one class only" if labels[0] else "no patient"
        assert table.loc[("MSIH", "", "skill"), "undefined"] == why


def test_the_stored_threshold_of_f1_needs_no_validation_part_and_is_called_itself():
    table = found([fold_of(TWO, (["MSIH", "MSS"], [0.3, 0.1]), threshold=0.3)])
    assert table.loc[("MSIH", BEST, "tp"), "value"] == 1
    assert table.loc[("MSIH", BEST, "ppv"), "thresholds"] == "0.3"
    assert table.loc[("MSIH", SENSITIVE, "ppv"), "thresholds"] == "none"


def test_an_ensemble_has_the_mean_of_the_thresholds():
    parts = [(["MSIH", "MSS"], [0.5, 0.2]), (["MSIH", "MSS"], [0.9, 0.2]), (["MSS"], [0.1])]
    table = found([fold_of(TWO, (["MSIH"], [0.6]), *parts, threshold=0.4)])
    assert float(table.loc[("MSIH", SENSITIVE, "ppv"), "thresholds"]) == pytest.approx(0.7)


def test_of_several_classes_each_is_told_from_the_rest():
    tested, validated = drawn(THREE, 50, seed=3), drawn(THREE, 40, seed=4)
    result = fold_of(THREE, tested, validated, threshold=0.123)
    table = found([result], THREE)
    for k, label in enumerate(THREE.classes):
        truth, score = tested[0] == label, tested[1][:, k]
        best = metrics.best_threshold(validated[0] == label, validated[1][:, k])
        limit = 0.123 if label == "b" else best
        row = table.loc[(label, BEST)]
        expected = sklearn_metrics.recall_score(truth, score >= limit)
        assert row.loc["sensitivity", "value"] == pytest.approx(expected)
        brier = sklearn_metrics.brier_score_loss(truth, score)
        assert table.loc[(label, "", "brier"), "value"] == pytest.approx(brier)
    called = np.array(THREE.classes)[tested[1].argmax(axis=1)]
    expected = sklearn_metrics.confusion_matrix(tested[0], called)
    half = fold_of(THREE, tested), fold_of(THREE, (["", "c"], [[1, 0, 0], [0, 1, 0]]))
    expected[2, 1] += 1  # of the second fold; who has no label is not counted
    matrix = confusion(run_of(half, THREE))
    assert matrix["class"].tolist() == ["a", "b", "c"]
    counts = matrix[[f"most probable: {label}" for label in "abc"]]
    assert counts.to_numpy().tolist() == expected.tolist()


def test_the_skill_is_0_for_the_prevalence_and_1_for_the_truth():
    labels = ["MSIH"] * 3 + ["MSS"] * 9
    always = found([fold_of(TWO, (labels, [0.25] * 12))]).loc["MSIH", ""]
    assert always.loc["brier", "value"] == pytest.approx(0.25 * 0.75)
    assert always.loc["brier_of_prevalence", "value"] == pytest.approx(0.25 * 0.75)
    assert always.loc["skill", "value"] == pytest.approx(0)
    right = found([fold_of(TWO, (labels, [1.0] * 3 + [0.0] * 9))]).loc["MSIH", ""]
    assert right.loc["skill", ["value", "ci95_low", "ci95_high"]].tolist() == [1, 1, 1]
    labels, scores = drawn(TWO, 80, seed=5)
    row = found([fold_of(TWO, (labels, scores))]).loc["MSIH", ""]
    reference = row.loc["brier_of_prevalence", "value"]
    low, high = row.loc["brier", ["ci95_low", "ci95_high"]]
    assert low < row.loc["brier", "value"] < high
    assert row.loc["skill", ["ci95_low", "ci95_high"]].tolist() == pytest.approx(
        [1 - high / reference, 1 - low / reference]
    )


def test_bins_are_scikit_learns_and_hold_their_patients_and_wilsons_interval():
    labels, scores = drawn(TWO, 132, seed=6)  # no quantile is a score: 131 is prime
    truth, score = labels == "MSIH", scores[:, 1]
    table = calibration(truth, score)
    observed, predicted = calibration_curve(truth, score, n_bins=6, strategy="quantile")
    assert table["observed"].tolist() == pytest.approx(observed)
    assert table["predicted"].tolist() == pytest.approx(predicted)
    assert (table["patients"].sum(), table["positives"].sum()) == (132, truth.sum())
    z = stats.norm.ppf(0.975)
    for row in table.itertuples():
        n, p = row.patients, row.positives / row.patients
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert (row.ci95_low, row.ci95_high) == pytest.approx((middle - half, middle + half))


def test_equal_probabilities_share_a_bin():
    truth = np.arange(200) % 4 == 0
    assert len(calibration(truth, np.full(200, 0.25))) == 1
    table = calibration(truth, np.repeat([0.1, 0.2, 0.9], [120, 20, 60]))
    assert table["patients"].tolist() == [120, 20, 60]
    assert len(calibration(truth[:3], np.array([0.1, 0.2, 0.3]))) == 1


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("each", [4, 8, 20])
def test_the_interval_of_pooled_folds_covers_their_mean(each, spread):
    """Computed, not drawn: the count is a sum of binomial ones, of folds that may differ."""
    ends = np.array([share(k, 5 * each, "")[1:3] for k in range(5 * each + 1)])
    coverage = []
    for mean in np.linspace(0.02, 0.98, 49):
        folds = np.clip(mean + spread * np.linspace(-1, 1, 5), 0, 1)
        pmf = np.ones(1)
        for p in folds:
            pmf = np.convolve(pmf, stats.binom.pmf(np.arange(each + 1), each, p))
        low, high = ends.T
        coverage.append(pmf[(low <= folds.mean()) & (folds.mean() <= high)].sum())
    assert np.mean(coverage) > 0.945
    assert min(coverage) > 0.92
