"""What a benchmark can see: its design read from predictions with a planted truth, and the page."""

import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from examples.pathology.cohort.targets import Target
from examples.pathology.results import power as results_power
from examples.pathology.results import resampling
from examples.pathology.results.metrics import Metric
from examples.pathology.results.power import FOUND
from examples.pathology.study import report as study_report
from examples.pathology.study.criteria import AUROC, CRITERIA
from examples.pathology.study.differences import Difference
from examples.pathology.study.folder import read_study
from examples.pathology.study.power import _of_fold, curves_in_full, design_of, powers
from examples.pathology.study.report import write_study_report
from tests.pathology.tiny_study import PATIENTS, write_study

INSIDE = CRITERIA["classification"][0]
OUTSIDE = next(c for c in CRITERIA["classification"] if (c.metric, c.cohort) == (AUROC, "external"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("tiny"), auxiliary=("LF",))


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def compared(criterion):
    return [Difference(criterion, "baseline", "LF", name, family=2) for name in ("naive", "dwa")]


def scores_of(random, truth, seeds, parts, spread):
    """Draw scores (3, seeds, n) from variances of patient, method, seed and neither.

    The first method has an AUROC of 0.8, or r = 0.5, the others of 0.03 more.
    """
    n, methods = len(truth), 3
    shapes = (1, 1, n), (methods, 1, n), (1, seeds, n), (methods, seeds, n)
    errors = sum(np.sqrt(v) * random.normal(size=s) for v, s in zip(parts, shapes, strict=True))
    level = np.array([0.0, 0.03, 0.03])[:, None, None] + 0.8 * (truth.dtype == bool)
    level = level + spread * random.normal(size=(methods, seeds, 1)) * [[[0]], [[1]], [[1]]]
    if truth.dtype == bool:
        return errors + np.sqrt(2) * stats.norm.ppf(level) * truth
    return 7 * ((0.5 + level) * truth + np.sqrt(1 - (0.5 + level) ** 2) * errors)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.04])
def test_a_planted_design_is_found(numbers, spread):
    random, found = np.random.default_rng(5), []
    for _ in range(60):
        truth = random.normal(size=80) if numbers else np.arange(80) < 30
        scores = scores_of(random, truth, 3, (0.5, 0.2, 0.1, 0.2), spread)
        found.append(_of_fold(truth, scores, resampling.pearson if numbers else resampling.auroc))
    assert all(np.array_equal(fold.folds, [[80]] if numbers else [[50, 30]]) for fold in found)
    assert np.mean([f.reference for f in found]) == pytest.approx(0.5 if numbers else 0.8, abs=0.02)
    alike = np.mean([fold.alike for fold in found], axis=0)
    assert alike == pytest.approx(np.array([[0.7, 0.6, 0.5]] * len(alike)), abs=0.03)
    spreads = np.array([fold.spread for fold in found])
    error = spreads.std() / np.sqrt(len(spreads))
    assert abs(spreads.mean() - spread**2) < 3 * error
    assert error < 0.0005  # of a spread of 0.0016


def test_few_patients_and_figures_that_are_not_defined_give_no_design():
    truth, scores = np.arange(9) < 3, np.random.default_rng(0).normal(size=(3, 2, 9))
    assert _of_fold(truth, scores, resampling.auroc).folds.tolist() == [[6, 3]]
    assert _of_fold(truth[2:], scores[..., 2:], resampling.auroc) is None  # one positive
    assert _of_fold(truth[3:], scores[..., 3:], resampling.auroc) is None
    number = np.arange(9.0)
    assert _of_fold(number[:3], scores[..., :3], resampling.pearson) is None
    scores[1] = 0.5  # predicts the same for everybody
    assert _of_fold(number, scores, resampling.pearson).folds.tolist() == [[9]]
    assert _of_fold(number, scores[:2], resampling.pearson) is None
    assert _of_fold(number, scores[1:], resampling.pearson) is None


def test_a_design_is_that_of_the_runs(tiny, copy):
    study = read_study(tiny)
    inside, outside = (design_of(study, each, "baseline") for each in (INSIDE, OUTSIDE))
    third = PATIENTS // 3
    assert inside.folds.tolist() == [[PATIENTS - third, third]] * 2
    assert outside.folds.tolist() == [[PATIENTS - third, third]]
    baseline = study.panels[0].runs["baseline"].summary
    assert inside.reference == pytest.approx(baseline.metrics[AUROC].mean)
    assert (inside.seeds, inside.spread) == (1, 0)
    for path in copy.glob("runs/lf/naive/fold-*"):  # patients in another order
        table, points = pd.read_csv(path / "predictions.csv"), np.load(path / "embeddings.npy")
        table[::-1].to_csv(path / "predictions.csv", index=False)
        np.save(path / "embeddings.npy", points[::-1])
    assert design_of(read_study(copy), INSIDE, "baseline").alike == pytest.approx(inside.alike)


def test_the_page_says_and_draws_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "draw_study", lambda *_: [])
    page = write_study_report(read_study(tiny), tmp_path)
    text, table = page.read_text(encoding="utf-8"), pd.read_csv(tmp_path / "power.csv")
    first = text[: text.index("<h2>Table 1")]
    start = first.index("<li>With 72 patients, 24 of them positive, 2 folds and 1 seed, ")
    said = first[start : first.index("</li>", start)]
    assert " after correction for 2 comparisons)" in said
    assert "not known: one fold and one seed are too few for its approximation." in first
    assert first.count("<img") == 1
    assert (tmp_path / "figures" / "power.png").stat().st_size > 5000
    assert table.groupby(["cohort", "times"]).size().to_dict() == {
        ("internal", times): 13 for times in (1, 2, 4)
    }
    rows = table[(table["cohort"] == "internal") & (table["times"] == 1)]
    size = float(said.split(" in AUROC of ")[1].split(" is found")[0])
    below, above = rows[rows["difference"] < size], rows[rows["difference"] > size]
    assert below[FOUND[0]].max() < 0.83
    assert above[FOUND[0]].min() > 0.77


def test_of_a_number_it_is_r(tmp_path, monkeypatch):
    monkeypatch.setattr(results_power, "STUDIES", 200)
    study = read_study(
        write_study(
            tmp_path, auxiliary=("LF",), primary=Target("HRD", "regression"), deployed=False
        )
    )
    (found,) = powers(study, compared(CRITERIA["regression"][0]))
    assert found.criterion.metric == Metric("pearson")
    assert found.words.startswith("With 72 patients, 2 folds and 1 seed, ")
    assert " true difference from baseline in Pearson's r" in found.words
    assert ", given the truth" in found.words
    assert ",," not in found.words
    r = study.panels[0].runs["baseline"].summary.metrics[Metric("pearson")].mean
    assert f"{r:.3f} for baseline" in found.words


def test_why_nothing_is_known_is_said(copy, tmp_path):
    for path in copy.glob("runs/baseline/fold-*/predictions.csv"):
        table = pd.read_csv(path)
        table["isMSIH_MSIH"] = 1.0 * (table["isMSIH"] == "MSIH")
        table.to_csv(path, index=False)
    perfect = powers(read_study(copy), compared(INSIDE))[0]
    assert perfect.words == "What can be seen in AUROC is not known: baseline is perfect."
    alone = read_study(write_study(tmp_path / "alone", methods=("naive",), deployed=False))
    (unknown,) = powers(alone, [])
    assert "not known: no fold has enough patients and two methods" in unknown.words
    assert not perfect.curves
    assert not unknown.curves
    assert study_report.draw_power(alone, [unknown], tmp_path) == []
    assert curves_in_full([unknown]).empty
