"""A number as the primary target, and a number cut into two classes, from tables to page."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.figures.run import draw_figures
from examples.pathology.report.report import write_report
from examples.pathology.results.folds import read_fold, read_model
from examples.pathology.results.summary import read_summary
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.runs.deploy import run_deploy
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.runs import DeployConfig
from examples.pathology.training.bags import BagStore
from examples.pathology.training.tile_values import tile_values
from tests.pathology.killing import small_models
from tests.pathology.tiny import make_tables


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with small_models():
        yield


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("cohort"), patients=30, missing=(3,))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("other"), patients=10, missing=(2, 3), seed=7)


def run_of(tables, out, balancer="naive", **changes):
    values = {"auxiliary": ("isMSIH",), "folds": 2, "epochs": 6, "learning_rate": 3e-3, **changes}
    run_crossval(
        CrossvalConfig(
            tables.clini,
            tables.slides,
            tables.features,
            "LF",
            out,
            balancer=balancer,
            device="cpu",
            **values,
        )
    )
    return out


def deploy(run, tables, out):
    config = DeployConfig(run, tables.clini, tables.slides, tables.features, out, device="cpu")
    return run_deploy(config)


@pytest.fixture(scope="module")
def runs(tables, tmp_path_factory):
    """The baseline, and a joint run that learns the class of a patient as well."""
    folder = tmp_path_factory.mktemp("runs")
    for balancer in ("baseline", "naive"):
        run_of(tables, folder / balancer, balancer)
    return folder


@pytest.fixture(scope="module")
def cut(tables, tmp_path_factory):
    return run_of(tables, tmp_path_factory.mktemp("cut") / "run", cutoff=0.5, auxiliary=())


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def truth_of(tables):
    clinical = pd.read_csv(tables.clini, index_col="PATIENT")["LF"]
    return clinical[clinical.notna()]


# --- a regression ---------------------------------------------------------------------------------


def test_a_run_has_the_figures_of_a_regression_and_no_others(runs):
    value = read(runs / "naive/metrics.json")
    assert set(value["metrics"]) == {"pearson", "mae", "auroc/isMSIH"}
    assert set(read(runs / "baseline/metrics.json")["metrics"]) == {"pearson", "mae"}
    assert value["kind"] == "regression"
    assert not {"classes", "positive", "positives", "thresholds"} & set(value)


def test_predictions_are_in_the_unit_and_the_figures_are_theirs(runs, tables):
    truth = truth_of(tables)
    value = read(runs / "naive/metrics.json")["metrics"]
    tested = []
    for k in (1, 2):
        table = pd.read_csv(runs / f"naive/fold-{k}/predictions.csv", index_col="PATIENT")
        assert list(table.columns[:2]) == ["LF", "LF_pred"]
        assert (table["LF"] == truth[table.index]).all()
        r = np.corrcoef(table["LF"], table["LF_pred"])[0, 1]
        assert value["pearson"]["folds"][k - 1] == pytest.approx(r)
        error = (table["LF"] - table["LF_pred"]).abs().mean()
        assert value["mae"]["folds"][k - 1] == pytest.approx(error)
        tested += list(table.index)
    assert sorted(tested) == sorted(truth.index)  # all but the one without a value
    for name in ("pearson", "mae"):
        low, high = value[name]["ci95_over_patients"]
        assert low < value[name]["mean"] < high


def test_the_planted_value_is_found(runs):
    assert read(runs / "naive/metrics.json")["metrics"]["pearson"]["mean"] > 0.5


def test_the_epoch_that_is_kept_has_the_lowest_squared_error(runs):
    for k in (1, 2):
        result = read_fold(runs / f"naive/fold-{k}")
        assert result.best_epoch == 1 + int(result.history["validation/LF"].argmin())


def test_the_saved_model_gives_the_saved_predictions(runs, tables):
    fitted, _ = read_model(runs / "naive/fold-1/model.pt", "cpu")
    table = pd.read_csv(runs / "naive/fold-1/predictions.csv", index_col="PATIENT")
    patient = next(p for p in tables.load().patients if p.name in table.index)
    with torch.inference_mode():
        raw = float(fitted.model(torch.from_numpy(BagStore().load(patient))).outputs[0])
    scaler = fitted.scalers["LF"]
    trained = read(runs / "naive/splits.json")["folds"][0]["train"]
    assert (scaler.low, scaler.high) == (
        min(truth_of(tables)[trained]), max(truth_of(tables)[trained])
    )  # fmt: skip
    expected = scaler.low + raw * (scaler.high - scaler.low)
    assert table.loc[patient.name, "LF_pred"] == pytest.approx(expected, rel=1e-5)


def test_figures_are_those_of_a_regression(runs, tmp_path):
    summary = read_summary(runs / "naive")
    results = [read_fold(runs / f"naive/fold-{k}") for k in (1, 2)]
    drawn = draw_figures(tmp_path, summary, results, seed=0)
    assert [path.stem for _, path in drawn] == ["regression", "tsne", "training", "balance"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in drawn)


def test_the_report_compares_by_pearsons_r_and_tests_nothing(runs, tmp_path):
    page = write_report([runs], tmp_path).read_text(encoding="utf-8")
    text = re.sub(r"data:image/png;base64,[^']+", "", page)
    heading = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()[0]
    assert heading == "| Method | Pearson r | Mean absolute error | AUROC, isMSIH |"
    assert (tmp_path / "figures/compare-pearson.png").exists()
    assert "Decisions" not in page
    assert not (tmp_path / "decisions.csv").exists()
    assert "naive minus baseline, Pearson r fold by fold: " in text
    assert "LF runs from" in text
    for word in ("DeLong", "F1", "AUPRC", "prevalence", "ROC curve"):
        assert word not in text, word


def test_a_run_of_classes_is_not_compared_with_a_regression(runs, cut, tmp_path):
    with pytest.raises(UserError, match=r"must have the same kind, but .*'regression'.*'classif"):
        write_report([runs / "naive", cut], tmp_path)


def test_it_is_deployed(runs, other, tmp_path):
    value = deploy(runs / "naive", other, tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv", index_col="PATIENT")
    folds = [
        pd.read_csv(tmp_path / f"fold-{k}/predictions.csv", index_col="PATIENT") for k in (1, 2)
    ]
    mean = (folds[0]["LF_pred"] + folds[1]["LF_pred"]) / 2
    np.testing.assert_allclose(table["LF_pred"], mean[table.index])
    assert (value["patients"], value["labelled"], value["kind"]) == (10, 8, "regression")
    known = table[table["LF"].notna()]
    r = np.corrcoef(known["LF"], known["LF_pred"])[0, 1]
    assert value["metrics_of_ensemble"]["pearson"]["mean"] == pytest.approx(r)
    page = write_report([tmp_path]).read_text(encoding="utf-8")
    assert f"10 patients, 8 of them with a known LF; the run is {runs / 'naive'}" in page
    assert re.search(rf"<th>ensemble</th><td>{r:.3f} \[", page.replace("\N{NO-BREAK SPACE}", " "))
    assert "Decisions" not in page


def test_tiles_have_values_in_the_unit(runs, tables):
    models = [read_model(runs / f"naive/fold-{k}/model.pt", "cpu")[0] for k in (1, 2)]
    feats = BagStore().load(tables.load().patients[0])
    values = tile_values(models, feats, "cpu")
    expected, whole = [], []
    for fitted in models:
        scaler = fitted.scalers["LF"]
        with torch.inference_mode():
            alone = [float(fitted.model(torch.from_numpy(t[None])).outputs[0]) for t in feats]
            raw = float(fitted.model(torch.from_numpy(feats)).outputs[0])
        expected.append([scaler.low + value * (scaler.high - scaler.low) for value in alone])
        whole.append(scaler.low + raw * (scaler.high - scaler.low))
    np.testing.assert_allclose(
        values.scores["LF_pred"], np.mean(expected, axis=0), rtol=1e-4, atol=1e-5
    )
    assert values.of_slide["LF_pred"] == pytest.approx(np.mean(whole), rel=1e-4, abs=1e-5)


def test_the_reference_protocol_takes_a_regression(tables, tmp_path):
    out = run_of(tables, tmp_path / "run", "baseline", reference_protocol=True, epochs=1)
    assert set(read(out / "metrics.json")["metrics"]) == {"pearson", "mae"}


def test_too_few_values_are_told_before_anything_is_written(tmp_path):
    tables = make_tables(tmp_path / "cohort", patients=22, missing=())
    with pytest.raises(UserError, match=r"known for at least 24 patients for 8 folds, but is for"):
        run_of(tables, tmp_path / "run", folds=8)
    assert not (tmp_path / "run").exists()


# --- a cut-off ------------------------------------------------------------------------------------


def test_a_cut_off_makes_classes(cut, tables):
    value = read(cut / "metrics.json")
    assert value["classes"] == ["<0.5", ">=0.5"]
    assert (value["positive"], value["cutoff"]) == (">=0.5", 0.5)
    assert value["positives"] == (truth_of(tables) >= 0.5).sum()
    prevalence = np.mean(value["metrics"]["prevalence"]["folds"])
    assert prevalence == pytest.approx(value["positives"] / value["patients"], abs=0.05)
    assert {"auroc", "auprc", "f1"} < set(value["metrics"])
    assert read_toml(cut / "config.toml")["crossval"]["cutoff"] == 0.5
    table = pd.read_csv(cut / "fold-1/predictions.csv", index_col="PATIENT")
    assert list(table.columns) == ["LF", "LF_<0.5", "LF_>=0.5", "pred"]
    above = truth_of(tables)[table.index] >= 0.5
    assert (table["LF"] == np.where(above, ">=0.5", "<0.5")).all()


def test_another_cut_off_is_another_run(cut, tables):
    with pytest.raises(UserError, match=r"differs in cutoff: 0\.5 -> 1\.0"):
        run_of(tables, cut, cutoff=1.0, auxiliary=())


def test_an_external_cohort_is_cut_the_same_way(cut, other, tmp_path):
    value = deploy(cut, other, tmp_path)
    assert value["labelled"] == 8
    assert value["positives"] == (truth_of(other) >= 0.5).sum()
    table = pd.read_csv(tmp_path / "predictions.csv", index_col="PATIENT", keep_default_na=False)
    for name, number in truth_of(other).items():
        assert table.loc[name, "LF"] == (">=0.5" if number >= 0.5 else "<0.5")
    assert list(table.loc[["P02", "P03"], "LF"]) == ["", ""]
