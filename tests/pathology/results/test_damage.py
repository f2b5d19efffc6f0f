"""Files of a run that were cut off, emptied or lost: one sentence that names the file."""

import shutil

import numpy as np
import pandas as pd
import pytest

from examples.pathology.common.errors import UserError
from examples.pathology.report.report import write_report
from examples.pathology.results.folds import read_fold, read_model
from examples.pathology.results.runs import fold_folders, read_run, run_settings
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.settings.crossval import CrossvalConfig
from tests.pathology.killing import small_models
from tests.pathology.tiny import make_tables

FILES = (
    "metrics.json",
    "fold-2/fold.json",
    "fold-2/predictions.csv",
    "fold-2/validation.csv",
    "fold-2/embeddings.npy",
    "fold-2/history.csv",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tables = make_tables(folder, patients=12)
    config = CrossvalConfig(
        tables.clini,
        tables.slides,
        tables.features,
        "isMSIH",
        folder / "run",
        folds=2,
        epochs=1,
        balancer="baseline",
        device="cpu",
    )
    with small_models():
        run_crossval(config)
    return config


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished.out, tmp_path / "run")


def without_last_line(data):
    return data[: data.rstrip(b"\n").rfind(b"\n") + 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda data: b"\x00" * len(data),
        without_last_line,
        None,
    ],
    ids=["half", "empty", "zeros", "a line less", "gone"],
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_what_to_do(name, damage, run):
    path = run / name
    if name == "fold-2/validation.csv" and damage in (without_last_line, None):
        pytest.skip("nothing says how many rows it had, and old runs may lack it")
    if damage is None:
        if name in ("metrics.json", "fold-2/fold.json"):
            pytest.skip("without it, nothing is finished, and that is told")
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    words = rf"{name} must be there as it was written, but is not \(.+\)\. (Delete|Run) .+again"
    with pytest.raises(UserError, match=words) as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def test_crossval_and_report_say_so_too(finished, run):
    (run / "fold-2" / "predictions.csv").unlink()
    with pytest.raises(UserError, match=r"predictions\.csv must be there as it was written"):
        write_report([run])
    damaged = finished.out / "fold-2" / "predictions.csv"
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:-1])
    with pytest.raises(UserError, match=r"fold-2/predictions\.csv must be there as it was"):
        run_crossval(finished)
    damaged.write_bytes(kept)
    assert len(read_fold(finished.out / "fold-2").predictions) == 6


@pytest.mark.parametrize("damage", ["others", "twice", "one less"])
def test_predictions_of_others_than_the_test_part_are_no_fold_of_it(damage, run):
    """As an earlier release left a fold whose folder was given to `deploy`, too."""
    path = run / "fold-2" / "predictions.csv"
    table = pd.read_csv(path, dtype=str)
    name = table["PATIENT"][1]
    if damage == "one less":
        table = table.drop(1)
        points = np.load(run / "fold-2/embeddings.npy")
        np.save(run / "fold-2/embeddings.npy", points[1:])
    else:
        table.loc[1, "PATIENT"] = "X1" if damage == "others" else table["PATIENT"][0]
    table.to_csv(path, index=False)
    words = (
        rf"in the test part of the fold, but differs in .*{name}.*\. Delete .*fold-2 and .*again"
    )
    with pytest.raises(UserError, match=words):
        read_run(run)
    (run / "splits.json").unlink()
    assert len(read_run(run).results) == 2  # nothing tells


@pytest.mark.parametrize(
    "text",
    ["", "[crossval]\nfolds = 'x'", "[crossval]\nfolds = 2", "[crossval", "crossval = 1", None],
)
def test_damaged_settings_are_named(text, run):
    path = run / "config.toml"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.toml must be"):
        fold_folders(run)
    with pytest.raises(UserError, match=r"config\.toml must be"):
        run_settings(run)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_model_that_was_cut_off_is_named(share, run):
    path = run / "fold-1" / "model.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"model\.pt must hold a model of this release"):
        read_model(path, "cpu")
