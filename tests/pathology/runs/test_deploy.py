import csv
import json
import logging
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from examples.pathology.common.errors import UserError
from examples.pathology.report.report import write_report
from examples.pathology.results.folds import read_model
from examples.pathology.results.runs import trained_on
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.runs.deploy import deploy_settings, run_deploy
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.runs import DeployConfig, PageConfig
from examples.pathology.training.bags import BagStore
from tests.pathology.killing import small_models
from tests.pathology.tiny import make_tables, write_bag, write_table, write_trident_bag


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with small_models():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tables = make_tables(folder, patients=16)
    run_crossval(
        CrossvalConfig(
            tables.clini,
            tables.slides,
            tables.features,
            "isMSIH",
            folder / "run",
            auxiliary=("LF",),
            folds=2,
            epochs=2,
            learning_rate=3e-3,
            device="cpu",
        )
    )
    return folder / "run"


@pytest.fixture
def external(tmp_path):
    """Other patients, who lack the auxiliary column; two have no label."""
    tables = make_tables(tmp_path / "external", patients=9, seed=5)
    table = pd.read_csv(tables.clini, dtype=str)
    table.loc[[2, 5], "isMSIH"] = ""
    table[["PATIENT", "isMSIH"]].to_csv(tables.clini, index=False)
    return tables


def deploy(run, tables, out, **changes):
    return run_deploy(
        DeployConfig(
            run, tables.clini, tables.slides, tables.features, out, device="cpu", **changes
        )
    )


def test_a_run_of_before_with_decomposed_names_knows_its_target(run, external, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    for path in old.glob("fold-*/model.pt"):
        saved = torch.load(path, weights_only=True)
        saved["targets"][0].update(name="isMSIe\u0301", classes=["MSIe\u0301", "MSS"])
        saved["targets"][0]["positive"] = "MSIe\u0301"
        torch.save(saved, path)
    text = external.clini.read_text().replace("isMSIH", "isMSI\u00e9").replace("MSIH", "MSI\u00e9")
    external.clini.write_text(text)
    value = deploy(old, external, tmp_path / "out")
    assert (value["target"], value["labelled"]) == ("isMSI\u00e9", 7)
    assert value["metrics"]["auroc"]["mean"] is not None


def test_the_ensemble_is_the_mean_of_the_folds_models(run, external, tmp_path):
    """Computed again from the saved models, patient by patient."""
    value = deploy(run, external, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out/predictions.csv", keep_default_na=False)
    assert table["PATIENT"].tolist() == [f"P{i:02d}" for i in range(9)]
    assert table.columns.tolist() == [
        "PATIENT", "isMSIH", "isMSIH_MSIH", "isMSIH_MSS", "LF", "LF_pred", "pred",
    ]  # fmt: skip
    assert (table["LF"] == "").all()
    cohort = external.load(auxiliary=())
    for patient in cohort.patients:
        probabilities, numbers = [], []
        for k in (1, 2):
            fitted, _ = read_model(run / f"fold-{k}/model.pt", "cpu")
            with torch.inference_mode():
                outputs, _ = fitted.model(torch.from_numpy(BagStore().load(patient)))
            probabilities.append(outputs[0].double().softmax(1)[0, 1].item())
            low, high = fitted.scalers["LF"].low, fitted.scalers["LF"].high
            numbers.append(low + outputs[1].item() * (high - low))
        row = table[table["PATIENT"] == patient.name].iloc[0]
        assert row["isMSIH_MSS"] == pytest.approx(np.mean(probabilities), abs=1e-6)
        assert row["LF_pred"] == pytest.approx(np.mean(numbers), abs=1e-5)
    assert (value["patients"], value["labelled"]) == (9, 7)


def test_figures_are_per_fold_and_of_the_ensemble(run, external, tmp_path):
    value = deploy(run, external, tmp_path / "out")
    auroc = value["metrics"]["auroc"]
    assert len(auroc["folds"]) == 2
    assert auroc["mean"] == pytest.approx(np.mean(auroc["folds"]))
    table = pd.read_csv(tmp_path / "out/predictions.csv", keep_default_na=False)
    table = table[table["isMSIH"] != ""]
    positive = table["isMSIH"] == value["positive"]
    score = table[f"isMSIH_{value['positive']}"]
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    ensemble = value["metrics_of_ensemble"]["auroc"]
    assert ensemble["mean"] == pytest.approx(np.mean(pairs))
    low, high = ensemble["ci95_over_patients"]
    assert low <= ensemble["mean"] <= high
    assert value["metrics"]["pearson/LF"]["mean"] is None
    write_report([tmp_path / "out"])
    drawn = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert drawn == {"roc.png", "pr.png", "calibration-1.png"}  # nobody's LF is known
    assert (tmp_path / "out/fold-2/predictions.csv").exists()
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == value


def test_the_threshold_is_that_of_the_run(run, external, tmp_path):
    value = deploy(run, external, tmp_path / "out")
    trained = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert value["thresholds"] == trained["thresholds"]
    known = [t for t in trained["thresholds"] if t is not None]
    assert value["threshold_of_ensemble"] == pytest.approx(np.mean(known))


def test_what_the_page_shows_is_no_setting_of_the_predictions(tmp_path):
    """A benchmark deploys anew where these differ, and earlier ones do not say it."""
    config = DeployConfig(*map(tmp_path.joinpath, ("run", "c.csv", "s.csv", "features", "out")))
    stored = deploy_settings(config)["deploy"]
    assert "page" not in stored
    assert stored == deploy_settings(replace(config, page=PageConfig(0.5)))["deploy"]


def test_a_cohort_without_any_label_gets_predictions(run, external, tmp_path):
    table = pd.read_csv(external.clini, dtype=str)
    table[["PATIENT"]].to_csv(external.clini, index=False)
    value = deploy(run, external, tmp_path / "out")
    assert value["labelled"] == 0
    assert value["metrics"]["auroc"]["mean"] is None
    table = pd.read_csv(tmp_path / "out/predictions.csv", keep_default_na=False)
    assert len(table) == 9
    assert table["isMSIH_MSS"].between(0, 1).all()
    page = write_report([tmp_path / "out"]).read_text(encoding="utf-8")
    assert "9 patients, 0 of them with a known isMSIH" in page
    assert "undefined: no patients" in page
    assert not (tmp_path / "out/figures").exists()


def test_patients_without_features_are_in_the_ledger(run, external, tmp_path):
    (external.features / "P01-1.h5").unlink()
    value = deploy(run, external, tmp_path / "out")
    assert value["patients"] == 8
    with (tmp_path / "out/ledger.csv").open(encoding="utf-8", newline="") as file:
        rows = {(r["item"], r["name"]): r for r in csv.DictReader(file)}
    assert rows["patient", "P01"]["reason"] == "none of its slides has usable features"
    assert rows["patient", "P02"]["status"] == "used"  # has no label, and needs none


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extractor": "other"}, r"the extractor that .* trained on \(tiny\), but .* has other"),
        ({"sha": "cd"}, r"the weights that .* trained on \(ab\), but .* has cd"),
        ({"width": 512}, "the length that"),
    ],
)
def test_features_of_another_kind_are_refused(run, external, tmp_path, change, words):
    width = change.pop("width", 768)
    for i in range(9):
        write_bag(external.features / f"P{i:02d}-1.h5", np.full((2, width), i), **change)
    with pytest.raises(UserError, match=words):
        deploy(run, external, tmp_path / "out")
    assert not (tmp_path / "out/predictions.csv").exists()


def test_features_of_another_tile_size_are_refused(run, external, tmp_path):
    for name, value, words in (
        ("tile_size_px", 256, r"the tile size in px that .*\(224\), but .* has 256"),
        ("tile_size_um", 112.0, r"the tile size in um that .*\(256.0\), but .* has 112"),
    ):
        for path in external.features.glob("*.h5"):
            with h5py.File(path, "r+") as file:
                file.attrs[name] = value
        with pytest.raises(UserError, match=words):
            deploy(run, external, tmp_path / "out")


def test_features_of_another_magnification_are_refused(tmp_path):
    random = np.random.default_rng(0)
    tables = make_tables(tmp_path, patients=12)
    for path in tables.features.glob("*.h5"):
        write_trident_bag(path, random.normal(size=(3, 8)), 20)
    config = CrossvalConfig(
        tables.clini, tables.slides, tables.features, "isMSIH", tmp_path / "run",
        balancer="baseline", folds=2, epochs=1, device="cpu",
    )  # fmt: skip
    run_crossval(config)
    for path in tables.features.glob("*.h5"):
        write_trident_bag(path, random.normal(size=(3, 8)), 5)
    with pytest.raises(UserError, match=r"the magnification that .*\(20.0\), but .* has 5.0"):
        deploy(tmp_path / "run", tables, tmp_path / "out")


def test_labels_that_were_not_trained_on_are_refused(run, external, tmp_path):
    rows = [[f"P{i:02d}", "MSI-H" if i == 3 else "MSS"] for i in range(9)]
    write_table(external.clini, ["PATIENT", "isMSIH"], rows)
    with pytest.raises(UserError, match=r"must be one of MSIH, MSS, as in .*'MSI-H'.*`MSIH`"):
        deploy(run, external, tmp_path / "out")


def test_patients_with_other_labels_are_named_and_left_out_if_asked(
    run, external, tmp_path, caplog
):
    rows = [[f"P{i:02d}", "MSI-H" if i == 3 else "MSS", "low" if i == 5 else i] for i in range(9)]
    write_table(external.clini, ["PATIENT", "isMSIH", "LF"], rows)
    (external.features / "P07-1.h5").unlink()
    words = r"'MSI-H' for 1 of 9 patients \(P03\)\. Did .*`deploy --skip-unknown-labels`"
    with pytest.raises(UserError, match=words):
        deploy(run, external, tmp_path / "out")
    with caplog.at_level(logging.INFO, "examples"):
        value = deploy(run, external, tmp_path / "out", skip_unknown_labels=True)
    assert value["funnel"] == [
        ["in the clinical table", 9],
        ["without unknown labels", 7],
        ["and a slide in the slide table", 7],
        ["and usable features: used", 6],
    ]
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    assert list(table["PATIENT"]) == ["P00", "P01", "P02", "P04", "P06", "P08"]
    ledger = pd.read_csv(tmp_path / "out/ledger.csv", keep_default_na=False)
    reasons = ledger[ledger["item"] == "patient"].set_index("name")["reason"]
    assert reasons["P03"] == "its isMSIH 'MSI-H' was not trained on"
    assert reasons["P05"] == "its LF 'low' was not trained on"
    assert "Left out: 1 x patient: its isMSIH 'MSI-H' was not trained on" in caplog.text
    assert "Left out: 1 x patient: none of its slides has usable features" in caplog.text
    assert "Patients: 9 in the clinical table -> 7 without" in caplog.text
    rest = write_table(external.clini, ["PATIENT"], [[name] for name in table["PATIENT"]])
    deploy(run, replace(external, clini=rest), tmp_path / "rest")  # the others' are as ever
    again = pd.read_csv(tmp_path / "rest/predictions.csv")
    pd.testing.assert_series_equal(again["isMSIH_MSS"], table["isMSIH_MSS"])


def named(tables, change):
    """Give patients other names in both tables."""
    for path in (tables.clini, tables.slides):
        header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        write_table(path, header, [[change(row[0]), *row[1:]] for row in rows])


def test_patients_that_the_run_was_trained_on_are_warned_of(run, external, tmp_path, caplog):
    named(external, lambda name: name if name in ("P03", "P05", "P06", "P07") else f"X{name}")
    value = deploy(run, external, tmp_path / "out")
    assert value["trained_on"] == ["P03", "P05", "P06", "P07"]
    words = (
        "4 of 9 patients have the name of one that the run was trained on (P03, P05, P06 and 1 "
        "more): if they are the same people"
    )
    assert words in caplog.text
    page = write_report([tmp_path / "out"]).read_text(encoding="utf-8")
    assert words in page.partition("<table")[0]
    assert words in (tmp_path / "out/table.md").read_text(encoding="utf-8")


def test_other_patients_are_not_warned_of(run, external, tmp_path, caplog):
    named(external, lambda name: f"X{name}")
    assert deploy(run, external, tmp_path / "out")["trained_on"] == []
    assert "trained on" not in caplog.text
    path = tmp_path / "out/metrics.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["trained_on"]  # as deployments of before
    path.write_text(json.dumps(value), encoding="utf-8")
    page = write_report([tmp_path / "out"]).read_text(encoding="utf-8")
    assert "that the run was trained on" not in page


def test_who_is_trained_on_for_other_targets_only_is_one_of_them_unless_the_baseline(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    ledger = copy / "ledger.csv"
    text = ledger.read_text(encoding="utf-8")
    assert "patient,P04,P04,used," in text
    text = text.replace("patient,P04,P04,used,", "patient,P04,P04,training only,no label")
    ledger.write_text(text.replace("patient,P05,P05,used,", "patient,P05,P05,excluded,none"))
    everybody = {f"P{i:02d}" for i in range(16)}
    assert trained_on(copy) == everybody - {"P05"}
    settings = copy / "config.toml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace('"balancer" = "naive"', '"balancer" = "baseline"'))
    assert trained_on(copy) == everybody - {"P04", "P05"}


def test_a_run_without_its_ledger_is_deployed_and_says_so(run, external, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "ledger.csv").unlink()
    assert deploy(copy, external, tmp_path / "out")["trained_on"] == []
    assert "ledger.csv is gone, so that nothing tells whom" in caplog.text


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_deployment_and_a_run_keep_out_of_each_others_folders(run, external, tmp_path):
    """Nothing is read: neither the other run nor any table is there."""
    copy, deployed = shutil.copytree(run, tmp_path / "copy"), tmp_path / "deployed"
    deploy(run, external, deployed)
    before = content(copy), content(deployed)
    nowhere = replace(external, clini=tmp_path / "no", slides=tmp_path / "no")
    for out in (copy, copy / "fold-1", deployed / "fold-2"):
        kind = "a deployment" if out.parent == deployed else "a run of `crossval`"
        words = (
            rf"`out` must be a new folder or that of a deployment, but .* holds {kind} \(.*toml\)"
        )
        with pytest.raises(UserError, match=words):
            deploy(tmp_path / "no", nowhere, out)
    for out in (deployed, deployed / "fold-1", copy / "fold-1"):
        paths = nowhere.clini, nowhere.slides, nowhere.features
        with pytest.raises(UserError, match=r"or that of a run of `crossval`, but .* holds a"):
            run_crossval(CrossvalConfig(*paths, "isMSIH", out))
    assert (content(copy), content(deployed)) == before
    deploy(run, external, deployed)  # again
    assert content(deployed) == before[1]
    deploy(copy, external, copy / "deployed")  # a folder of its own


def test_a_run_that_is_not_finished_is_refused(external, tmp_path):
    with pytest.raises(UserError, match="`run` must be a finished run of `crossval`"):
        deploy(tmp_path, external, tmp_path / "out")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no model")
    with pytest.raises(UserError, match="must hold a model of this release, but does not"):
        read_model(tmp_path / "model.pt", "cpu")
    with pytest.raises(UserError, match="must be a readable file"):
        read_model(tmp_path / "none.pt", "cpu")


def test_columns_may_have_other_names(run, external, tmp_path):
    for path in (external.clini, external.slides):
        text = path.read_text(encoding="utf-8").replace("PATIENT", "case")
        path.write_text(text, encoding="utf-8")
    value = deploy(run, replace(external), tmp_path / "out", patient_column="case")
    assert value["patients"] == 9
