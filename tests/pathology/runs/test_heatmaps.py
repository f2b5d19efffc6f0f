"""All slides of a run: who draws whose, what cannot be drawn, and what is drawn again."""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from examples.pathology.cli import main
from examples.pathology.common.errors import UserError
from examples.pathology.features.files import read_features
from examples.pathology.results.folds import read_model
from examples.pathology.runs import heatmap as one_heatmap
from examples.pathology.runs import heatmaps
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.runs.heatmaps import run_heatmaps
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.runs import HeatmapConfig
from examples.pathology.simulation.slides import MPP, write_pyramid
from tests.pathology.killing import small_models
from tests.pathology.tiny import make_tables, write_bag

UNLABELLED = "P05"


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with small_models():
        yield


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A run of 12 patients, one of whom lacks the primary label, and a slide of each."""
    folder = tmp_path_factory.mktemp("cohort")
    tables = make_tables(folder, patients=12)
    table = pd.read_csv(tables.clini, dtype=str, keep_default_na=False)
    table.loc[table["PATIENT"] == UNLABELLED, "isMSIH"] = ""
    table.to_csv(tables.clini, index=False)
    sources = tables.clini, tables.slides, tables.features
    options = {"folds": 2, "epochs": 1, "device": "cpu"}
    for name, more in (("naive", {}), ("baseline", {"balancer": "baseline"})):
        out = folder / name
        run_crossval(CrossvalConfig(*sources, "isMSIH", out, auxiliary=("LF",), **options, **more))
    (folder / "slides").mkdir()
    pixels = np.full((512, 4 * 512, 3), (220, 180, 200), dtype=np.uint8)
    write_pyramid(folder / "slides" / "P00-1.tif", pixels, mpp=MPP)
    for i in range(1, 12):
        shutil.copy(folder / "slides" / "P00-1.tif", folder / "slides" / f"P{i:02d}-1.tif")
    return folder


@pytest.fixture
def copy(cohort, tmp_path):
    """What a test may spoil."""
    for name in ("naive", "features", "slides"):
        shutil.copytree(cohort / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """Draw nothing; keep by slide who would."""
    calls = {}

    def draw_slide(config, models, slide, features, out, **more):
        calls[slide.stem] = list(models)
        out.mkdir(parents=True, exist_ok=True)
        told = {"tiles": 4, "seconds": 1.5, **more}
        (out / "heatmap.json").write_text(json.dumps(told), encoding="utf-8")
        return told

    monkeypatch.setattr(heatmaps, "draw_slide", draw_slide)
    return calls


def draw(folder, out, run="naive", **options):
    config = HeatmapConfig(
        folder / run, folder / "features", out, slides=folder / "slides", device="cpu", **options
    )
    code = run_heatmaps(config, folder / "slides")
    ledger = pd.read_csv(out / "ledger.csv", dtype=str, keep_default_na=False)
    return code, ledger.set_index("patient")


def folds_of(run):
    return json.loads((run / "splits.json").read_text(encoding="utf-8"))["folds"]


def test_a_slide_is_drawn_by_the_fold_that_tested_its_patient(cohort, tmp_path, asked):
    code, ledger = draw(cohort, tmp_path)
    assert code == 0
    for k, fold in enumerate(folds_of(cohort / "naive"), start=1):
        for patient in fold["test"]:
            assert asked[f"{patient}-1"] == [f"fold-{k}"]
            assert patient not in {*fold["train"], *fold["validation"]}
            assert tuple(ledger.loc[patient][["drawn_by", "status"]]) == (f"fold-{k}", "ok")
    assert len(asked) == 11
    row = ledger.loc[UNLABELLED]
    assert tuple(row[["status", "reason"]]) == (
        "excluded",
        "all models were trained on its patient",
    )


def test_the_baseline_draws_whom_it_was_not_trained_on_by_all_folds(cohort, tmp_path, asked):
    code, ledger = draw(cohort, tmp_path, run="baseline")
    assert (code, ledger.loc[UNLABELLED, "status"]) == (0, "ok")
    assert asked[f"{UNLABELLED}-1"] == ["fold-1", "fold-2"]
    assert len(asked) == 12


def test_what_cannot_be_drawn_is_told_and_the_rest_is_drawn(copy, asked):
    (copy / "slides" / "P00-1.tif").unlink()
    (copy / "features" / "P01-1.h5").unlink()
    for name in ("a", "b"):
        (copy / "slides" / name).mkdir()
        shutil.copy(copy / "slides" / "P04-1.tif", copy / "slides" / name / "P04-1.tif")
    (copy / "slides" / "P04-1.tif").unlink()
    code, ledger = draw(copy, copy / "out")
    assert code == 1
    failed = ledger[ledger["status"] == "failed"]["reason"]
    assert failed["P00"] == "no slide"
    assert failed["P01"] == "no feature file"
    assert failed["P04"] == "ambiguous: a/P04-1, b/P04-1"
    assert len(failed) == 3
    assert len(asked) == 8


def test_only_what_changed_is_drawn_again(copy, asked):
    assert draw(copy, copy / "out")[0] == 0
    asked.clear()
    code, ledger = draw(copy, copy / "out")
    assert (code, asked) == (0, {})
    assert set(ledger["reason"]) == {"drawn before", "all models were trained on its patient"}
    assert set(ledger.drop(UNLABELLED)["tiles"]) == {"4"}

    write_bag(copy / "features" / "P07-1.h5", np.ones((4, 768)))
    draw(copy, copy / "out")
    assert list(asked) == ["P07-1"]
    asked.clear()

    path = copy / "naive" / "fold-1" / "model.pt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["heads.0.bias"] += 1
    torch.save(saved, path)
    draw(copy, copy / "out")
    tested = folds_of(copy / "naive")[0]["test"]
    assert sorted(asked) == sorted(f"{patient}-1" for patient in tested)
    asked.clear()

    with (copy / "slides" / "P09-1.tif").open("ab") as file:
        file.write(b"another")
    draw(copy, copy / "out")
    assert list(asked) == ["P09-1"]
    asked.clear()

    changes = {"top": 3}, {"top": 3, "areas": 0.9}, {"top": 3, "areas": 0.9, "default_mpp": 0.5}
    for options in changes:
        draw(copy, copy / "out", **options)
        assert len(asked) == 11
        asked.clear()


def test_what_an_earlier_release_has_drawn_in_the_wrong_place_is_told(copy, asked):
    with h5py.File(copy / "features" / "P07-1.h5", "a") as file:
        file.attrs.update(
            {"mtbalance_slide_mpp": 0.25, "mtbalance_slide_mpp_source": "slide table"}
        )
    draw(copy, copy / "out")  # not even looked at: drawing is pretended
    _, ledger = draw(copy, copy / "out")
    assert ledger.loc["P06", "reason"] == "drawn before"
    assert ledger.loc["P07", "status"] == "failed"
    assert "P07-1.h5 was made with 0.25 (from slide table)" in ledger.loc["P07", "reason"]


def test_a_damaged_page_is_named_with_what_to_do(copy, asked):
    draw(copy, copy / "out")
    (copy / "out" / "P08-1" / "heatmap.json").write_text("{", encoding="utf-8")
    code, ledger = draw(copy, copy / "out")
    assert code == 1
    assert f"Delete {copy / 'out' / 'P08-1'}" in ledger.loc["P08", "reason"]


def test_a_slide_is_drawn_from_what_its_own_fold_says(copy, monkeypatch):
    """Computed again from the saved model, and one slide is none."""
    kept = sorted(folds_of(copy / "naive")[1]["test"])[0]
    for path in (copy / "features").iterdir():
        if path.stem not in (f"{kept}-1", "P08-1" if kept != "P08" else "P09-1"):
            path.unlink()
    other = next(p for p in (copy / "features").iterdir() if p.stem != f"{kept}-1")
    (copy / "slides" / f"{other.stem}.tif").write_bytes(b"no slide")
    code, ledger = draw(copy, copy / "out")
    assert code == 1
    assert "must be readable" in ledger.loc[other.stem[:3], "reason"]
    fitted, _ = read_model(copy / "naive" / "fold-2" / "model.pt", "cpu")
    feats = torch.from_numpy(read_features(copy / "features" / f"{kept}-1.h5").feats)
    with torch.inference_mode():
        alone = [fitted.model(tile[None]).outputs for tile in feats]
    table = pd.read_csv(copy / "out" / f"{kept}-1" / "tiles.csv")
    assert list(table.columns[2:]) == ["attention", "score", "isMSIH_MSIH", "isMSIH_MSS", "LF_pred"]
    for i, (classes, number) in enumerate(alone):
        expected = classes[0].double().softmax(0).tolist()
        np.testing.assert_allclose(table.loc[i, ["isMSIH_MSIH", "isMSIH_MSS"]], expected, rtol=1e-4)
        unscaled = fitted.scalers["LF"].unscale(number.item())
        assert table.loc[i, "LF_pred"] == pytest.approx(unscaled, rel=1e-4, abs=1e-5)
    told = json.loads((copy / "out" / f"{kept}-1" / "heatmap.json").read_text(encoding="utf-8"))
    assert told["folds"] == ["fold-2"]
    written = {path.name for path in (copy / "out" / f"{kept}-1").iterdir()}
    assert written == {
        "heatmap.png", "top-tiles.png", "all-scores.png", "all-top-tiles.png", "tiles.csv",
        "tiles.geojson", "heatmap.json",
    }  # fmt: skip


def test_features_of_another_slide_fail_alone(copy):
    for path in (copy / "features").iterdir():
        if path.stem not in ("P06-1", "P07-1"):
            path.unlink()
    with h5py.File(copy / "features" / "P07-1.h5", "a") as file:
        file.attrs.update({"mtbalance_slide_width_px": 99, "mtbalance_slide_height_px": 512})
    _, ledger = draw(copy, copy / "out")
    assert ledger.loc["P06", "status"] == "ok"
    assert ledger.loc["P07", "status"] == "failed"
    assert "a slide of 99 x 512 pixels" in ledger.loc["P07", "reason"]


def test_features_of_nobody_in_the_run_are_refused(copy, asked):
    shutil.rmtree(copy / "features")
    write_bag(copy / "features" / "other.h5", np.ones((4, 768)))
    with pytest.raises(UserError, match="must hold those of the run's slides"):
        draw(copy, copy / "out")


@pytest.mark.parametrize(("given", "word"), [({}, "neither"), ({"slide", "slides"}, "both")])
def test_one_slide_or_a_folder_of_them_is_asked_for(tmp_path, given, word):
    paths = dict.fromkeys(given, tmp_path)
    with pytest.raises(UserError, match=rf"but got {word}\."):
        HeatmapConfig(tmp_path, tmp_path, tmp_path, **paths)


def test_the_command_has_the_exit_code_of_failures(copy, asked, monkeypatch):
    arguments = ["heatmap", "--device", "cpu"]
    for name in ("run", "features", "slides", "out"):
        arguments += [f"--{name}", str(copy / ("naive" if name == "run" else name))]
    monkeypatch.setattr(one_heatmap, "run_heatmap", None)
    for code in (0, 1):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
        (copy / "slides" / "P06-1.tif").unlink(missing_ok=True)
