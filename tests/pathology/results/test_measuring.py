import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss

from examples.pathology.cohort.targets import Target
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.measuring import describe_primary, measure_fold, measure_further
from examples.pathology.results.metrics import Metric

LABEL = Target("isMSIH", "classification", ("MSIH", "MSS"), "MSIH")
LF = Target("LF", "regression")


def test_a_fold_of_one_class_has_no_auroc_and_says_why():
    table = pd.DataFrame(
        {"PATIENT": ["a", "b"], "isMSIH": ["MSS"] * 2, "isMSIH_MSIH": ["0.2", "0.4"]}
    )
    measured = measure_fold(FoldResult(table, np.eye(2, dtype=np.float32), 1, 1, 0.0), [LABEL])
    for name in ("auroc", "auprc", "silhouette"):
        assert math.isnan(measured[Metric(name)].score.value)
        assert measured[Metric(name)].score.reason == "one class only"


def test_a_regression_is_measured_in_its_unit_without_strata():
    table = pd.DataFrame(
        {
            "PATIENT": list("abcde"),
            "LF": ["1", "2", "4", "", "3"],
            "LF_pred": ["2", "2", "2.5", "9", "3.5"],
            "isMSIH": ["MSS", "MSIH", "MSIH", "MSS", ""],
            "isMSIH_MSIH": ["0.2", "0.4", "0.1", "0.9", "0.5"],
        }
    )
    embeddings = np.zeros((5, 2), dtype=np.float32)
    measured = measure_fold(FoldResult(table, embeddings, 1, 1, 0.0), [LF, LABEL])
    assert list(map(str, measured)) == ["pearson", "mae", "auroc/isMSIH"]
    assert measured[Metric("mae")].score.value == pytest.approx((1 + 0 + 1.5 + 0.5) / 4)
    r = np.corrcoef([1, 2, 4, 3], [2, 2, 2.5, 3.5])[0, 1]
    assert measured[Metric("pearson")].score.value == pytest.approx(r)
    assert measured[Metric("auroc", "isMSIH")].score.value == pytest.approx(
        1 / 4
    )  # of MSIH over MSS
    assert {len(set(each.strata)) for each in measured.values()} == {1}
    twice = np.array([[2.0, 0.0, 1.0, 1.0]])
    assert measured[Metric("mae")].resampled(twice)[0] == pytest.approx((2 * 1 + 1.5 + 0.5) / 4)


def test_further_figures_are_those_of_the_libraries():
    random = np.random.default_rng(5)
    y, numbers = np.arange(12) % 3 == 0, np.round(random.normal(size=12), 1)
    p, weights = random.random(12), random.integers(0, 4, (1, 12)).astype(float)
    table = pd.DataFrame(
        {
            "PATIENT": [f"p{i}" for i in range(12)],
            "LF": [*map(str, numbers[:-1]), ""],  # of the last one it is not known
            "LF_pred": np.round(p, 1).astype(str),
            "isMSIH": np.where(y, "MSIH", "MSS"),
            "isMSIH_MSIH": p.astype(str),
        }
    )
    fold = FoldResult(table, np.zeros((12, 2), dtype=np.float32), 1, 1, 0.0)
    found = measure_further(fold, LABEL)
    assert list(map(str, found)) == ["brier", "calibration"]
    brier, calibration = found[Metric("brier")], found[Metric("calibration")]
    assert brier.score.value == pytest.approx(brier_score_loss(y, p))
    expected = brier_score_loss(y, p, sample_weight=weights[0])
    assert brier.resampled(weights)[0] == pytest.approx(expected)
    assert calibration.score.value == pytest.approx(abs(p.mean() - 1 / 3))
    expected = abs(np.average(p - y, weights=weights[0]))
    assert calibration.resampled(weights)[0] == pytest.approx(expected)
    assert set(brier.strata) == {"MSIH", "MSS"}
    (spearman,) = measure_further(fold, LF).values()
    x, y, copies = numbers[:-1], np.round(p, 1)[:-1], weights[0, :-1].astype(int)
    assert spearman.score.value == pytest.approx(spearmanr(x, y).statistic)
    expected = spearmanr(np.repeat(x, copies), np.repeat(y, copies)).statistic
    assert spearman.resampled(weights[:, :-1])[0] == pytest.approx(expected)


def test_a_summary_says_what_a_primary_target_is_like():
    about = describe_primary(LF, ["1", "2", "4.5"])
    assert about == {
        "target": "LF",
        "kind": "regression",
        "values": {"lowest": 1.0, "highest": 4.5, "mean": 2.5, "sd": pytest.approx(3.25**0.5)},
    }
    assert describe_primary(LF, []) == {"target": "LF", "kind": "regression"}
    cut = Target("LF", "classification", ("<2", ">=2"), ">=2", 2.0)
    assert describe_primary(cut, [">=2", "<2", ">=2"]) == {
        "target": "LF",
        "kind": "classification",
        "classes": ["<2", ">=2"],
        "positive": ">=2",
        "cutoff": 2.0,
        "positives": 2,
    }
