"""Benchmarks of several seeds: what all of them say together, and what is missing of them."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, silhouette_score

from examples.pathology.common.errors import UserError
from examples.pathology.results.metrics import Metric
from examples.pathology.results.repeats import over_seeds
from examples.pathology.study import report as study_report
from examples.pathology.study.differences import all_differences
from examples.pathology.study.folder import read_study
from examples.pathology.study.report import draw_study, write_study_report
from examples.pathology.study.tables import costs
from examples.pathology.study.verdicts import verdicts
from tests.pathology.drawing import words
from tests.pathology.tiny_study import write_study

METHODS = ("baseline", "naive", "dwa")
PLACES = {"baseline": "baseline", "naive": "lf/naive", "dwa": "lf/dwa"}
SEEDS = 3


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """dwa ranks patients better than all others, from every seed."""
    folder = tmp_path_factory.mktemp("seeds")
    for repeat in range(SEEDS):
        write_study(folder, methods=METHODS, auxiliary=("LF",), shifts={"dwa": 4.0}, repeat=repeat)
    return folder


@pytest.fixture(scope="module")
def page(planted, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_report, "draw_study", lambda *_: [])  # figures take their time
        return write_study_report(read_study(planted), tmp_path_factory.mktemp("page"))


@pytest.fixture
def copy(planted, tmp_path):
    return shutil.copytree(planted, tmp_path / "copy")


def folder_of(study, seed, method, place="runs"):
    return study / (place if seed == 0 else f"{place}-{seed + 1}") / PLACES[method]


def by_seed(study, figure, method, seeds=range(SEEDS)):
    """Return a figure of the predictions of every seed and fold (s, k)."""
    folds = [[folder_of(study, s, method) / f"fold-{k}" for k in (1, 2)] for s in seeds]
    return np.array([[figure(fold) for fold in each] for each in folds])


def auroc(fold):
    table = pd.read_csv(fold / "predictions.csv")
    return roc_auc_score(table["isMSIH"] == "MSIH", table["isMSIH_MSIH"])


def auroc_or_nan(fold):
    return auroc(fold) if fold.name == "fold-2" else np.nan


def silhouette(fold):
    table = pd.read_csv(fold / "predictions.csv")
    return silhouette_score(np.load(fold / "embeddings.npy"), table["isMSIH"])


@pytest.mark.parametrize("figure", [auroc, silhouette])
def test_a_difference_is_the_mean_over_folds_and_seeds_and_says_how_far_seeds_are_apart(
    planted, page, figure
):
    rows = pd.read_csv(page.parent / "differences.csv").set_index(
        ["cohort", "metric", "reference", "method"]
    )
    row = rows.loc["internal", figure.__name__, "naive", "dwa"]
    of_seeds = by_seed(planted, figure, "dwa") - by_seed(planted, figure, "naive")
    assert row["difference"] == pytest.approx(of_seeds.mean())
    assert row["sd_over_seeds"] == pytest.approx(of_seeds.mean(axis=1).std(ddof=1))
    assert (row["seeds"], row["folds"], row["df"]) == (3, 2, 4)
    models = of_seeds.var(axis=0, ddof=1).sum() / SEEDS / 4
    assert row["standard_error"] >= np.sqrt(models)  # patients add to it
    assert row["ci95_low"] < row["difference"] < row["ci95_high"]
    assert (row["p"] < 0.05) == (not row["ci95_low"] <= 0 <= row["ci95_high"])


def test_tables_and_the_page_speak_of_all_seeds(planted, page):
    rows = pd.read_csv(page.parent / "table1.csv").set_index(["method", "cohort", "metric"])
    row = rows.loc["dwa", "internal", "auroc"]
    found = by_seed(planted, auroc, "dwa")
    assert (row["mean"], row["seeds"]) == (pytest.approx(found.mean()), 3)
    assert row["sd_over_seeds"] == pytest.approx(found.mean(axis=1).std(ddof=1))
    assert [float(each) for each in row["folds"].split()] == pytest.approx(
        found.mean(axis=0), rel=1e-5
    )
    assert rows.loc["dwa", "internal", "prevalence"]["mean"] == pytest.approx(1 / 3)
    assert np.isnan(rows.loc["dwa", "internal", "prevalence"]["ci95_low_over_patients"])
    ends = rows["ci95_high_over_patients"][rows.index.get_level_values("metric") == "auroc"]
    assert ends.max() == 1  # that of dwa is beyond, where no AUROC is
    text = page.read_text(encoding="utf-8")
    said = re.search(r"Significantly better than naive in AUROC [^<]+", text)
    assert re.search(r"dwa with LF \(\+[\d.]+ \[\+[^]]+\], sd \d\.\d+ over 3 seeds, ", said[0])
    for expected in (
        "trained from 3 seeds on the same folds",
        "with equal initial weights from each seed",
        "means over folds and seeds with a 95 % interval over patients and trained models",
        "Banerjee",
    ):
        assert expected in text
    assert "one seed and one set of splits" not in text
    assert "These are means over 9 runs" in text  # the worst errors, of three methods


def test_where_all_models_are_tested_on_the_same_patients_they_are_one_reader(planted):
    """Two equal models say no more of patients than one: their interval must not be narrower."""
    ensembles = [*read_study(planted).panels[0].of("external")["dwa"].values()]
    doubled = [replace(run, results=run.results * 2) for run in ensembles]
    once, twice = over_seeds(ensembles), over_seeds(doubled)
    for metric, expected in once.items():
        assert twice[metric].ci95_over_patients == pytest.approx(expected.ci95_over_patients)


@pytest.mark.parametrize("lacking", ["dwa", "naive"])
def test_only_seeds_that_both_methods_have_are_compared(copy, lacking):
    (folder_of(copy, 1, lacking) / "metrics.json").unlink()
    study = read_study(copy)
    found = all_differences(study)
    assert (
        "1 of 9 runs are missing and in no comparison; the list of jobs says why."
        in verdicts(study, found)[0]
    )
    one = next(d for d in found if (d.reference, d.method) == ("naive", "dwa"))
    ours, theirs = (by_seed(copy, auroc, name, (0, 2)) for name in ("dwa", "naive"))
    assert (one.difference, one.seeds) == (pytest.approx((ours - theirs).mean()), 2)
    other = {"dwa": "naive", "naive": "dwa"}[lacking]
    assert {d.seeds for d in found if (d.reference, d.method) == ("baseline", other)} == {3}


def test_a_fold_that_lacks_the_figure_from_one_seed_is_left_out(copy):
    path = folder_of(copy, 1, "dwa") / "fold-1/predictions.csv"
    table = pd.read_csv(path, dtype=str)
    table.assign(isMSIH="MSS").to_csv(path, index=False)
    found = all_differences(read_study(copy))
    one = next(d for d in found if (d.reference, d.method) == ("naive", "dwa"))
    second = [by_seed(copy, auroc_or_nan, name)[:, 1] for name in ("dwa", "naive")]
    assert (one.folds, one.seeds) == (1, 3)
    assert one.difference == pytest.approx((second[0] - second[1]).mean())


def test_a_single_seed_in_common_is_tested_as_one_seed_is(copy):
    for path in copy.glob("runs-2/**/metrics.json"):
        path.unlink()
    for path in (folder_of(copy, 2, "dwa"), folder_of(copy, 2, "dwa", "external")):
        (path / "metrics.json").unlink()
    several = all_differences(read_study(copy))
    settings = copy / "study.toml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("seeds = 3", "seeds = 1"), encoding="utf-8")
    alone = all_differences(read_study(copy))
    for ours, theirs in zip(several, alone, strict=True):
        if ours.method == "dwa":
            assert (ours.seeds, ours.p, ours.low) == (1, theirs.p, theirs.low)
        else:
            assert ours.seeds == 2


def test_folds_of_another_seed_must_be_the_same(copy):
    path = folder_of(copy, 2, "dwa") / "metrics.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**summary, "splits_sha256": "other"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"equal splits, but .*runs-3.*dwa has others than"):
        all_differences(read_study(copy))


def test_cost_is_that_of_all_seeds(planted):
    rows = {row.method: row for row in costs(read_study(planted)).itertuples(index=False)}
    assert (rows["dwa"].total, rows["dwa"].epochs) == (9.0 * 2 * SEEDS, "3 3 3 3 3 3")


def test_dots_stand_at_the_means_over_seeds(planted, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(study_report, "_draw_embeddings", lambda *_: None)
    draw_study(read_study(planted), tmp_path)
    figure = drawn[0]
    assert "over patients and seeds" in words(figure)
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    points = [x for line in lines for x in line.get_xdata()]
    means = [by_seed(planted, auroc, method).mean() for method in METHODS]
    assert points == pytest.approx(means)


def test_auxiliary_figures_need_no_more_than_a_summary_says(copy):
    """Summaries of deployments do not name auxiliary targets, and none says what is positive."""
    for seed in range(SEEDS):
        path = folder_of(copy, seed, "dwa") / "metrics.json"
        summary = json.loads(path.read_text(encoding="utf-8"))
        metrics = {**summary["metrics"], "auroc/Site": summary["metrics"]["auroc"]}
        stored = {**summary, "auxiliary": [], "metrics": metrics}
        path.write_text(json.dumps(stored), encoding="utf-8")
    found = read_study(copy).panels[0].metrics["internal"]["dwa"]
    of_number, of_class = (found[Metric.read(name)] for name in ("pearson/LF", "auroc/Site"))
    tables = by_seed(copy, lambda fold: correlation(fold, "LF"), "dwa")
    assert of_number.mean == pytest.approx(tables.mean())
    low, high = of_number.ci95_over_patients
    assert low < of_number.mean < high
    assert of_class.mean == pytest.approx(by_seed(copy, auroc, "dwa").mean())
    assert of_class.ci95_over_patients == [None, None]


def correlation(fold, name):
    table = pd.read_csv(fold / "predictions.csv")
    return np.corrcoef(table[name], table[f"{name}_pred"])[0, 1]
