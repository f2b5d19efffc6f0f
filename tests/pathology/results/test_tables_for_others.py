"""Tables of predictions, read by the rules of STAMP's statistics.

Of a classification it reads the target as text and ``<target>_<class>`` as numbers, and wants a
probability of every class that is somebody's; files are told apart by the name of their folder. Of
a regression it reads the target and ``pred``, leaves out rows without either, and tells files apart
by their own name (`KatherLab/STAMP`, ``src/stamp/statistics``: ``__init__.py``, ``categorical.py``
and ``regression.py``, version 2).
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, mean_absolute_error, roc_auc_score

from examples.pathology.common.errors import UserError
from examples.pathology.results.folds import read_fold
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.runs.deploy import run_deploy
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.runs import DeployConfig
from tests.pathology.killing import small_models
from tests.pathology.tiny import make_tables

FOLDS = (1, 2)


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with small_models():
        yield


def trained(folder, target, auxiliary=(), **changes):
    extra = {"grade": ["1", "2", "1", "3"] * 6}  # 1 are those that features tell apart
    tables = make_tables(folder, patients=24, missing=(3, 10), extra=extra)
    options = {"folds": 2, "epochs": 6, "learning_rate": 3e-3, "device": "cpu", **changes}
    sources = tables.clini, tables.slides, tables.features
    config = CrossvalConfig(*sources, target, folder / "run", auxiliary=auxiliary, **options)
    run_crossval(config)
    return config


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A run of three classes that are called by numbers."""
    return trained(tmp_path_factory.mktemp("classes"), "grade", ("LF",))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("numbers"), "LF", ("isMSIH",))


def deployed(config):
    sources = config.clini, config.slide_table, config.features
    out = config.out.parent / "deployed"
    run_deploy(DeployConfig(config.out, *sources, out, device="cpu"))
    return out


def per_fold(folder: Path) -> list[Path]:
    return [folder / f"fold-{k}" / "predictions.csv" for k in FOLDS]


def classification(path: Path, target: str, true_class: str) -> tuple[np.ndarray, np.ndarray]:
    """Return who has a class and how probable it is, as STAMP reads them for its curves."""
    columns = {target: str, f"{target}_{true_class}": float}
    table = pd.read_csv(path, usecols=list(columns), dtype=columns)
    return (table[target] == true_class).to_numpy(), table[f"{target}_{true_class}"].to_numpy()


def categorical(path: Path, target: str) -> dict[str, tuple[float, float, int]]:
    """Return AUROC, AUPRC and the count of every class that is somebody's."""
    table = pd.read_csv(path, dtype=str).dropna(subset=[target])
    found = {}
    for label in table[target].unique():
        true = table[target] == label
        scores = table[[f"{target}_{label}"]].map(float).to_numpy()[:, 0]
        measured = roc_auc_score(true, scores), average_precision_score(true, scores)
        found[label] = (*measured, int(true.sum()))
    return found


def regression(path: Path, target: str) -> tuple[float, float, int]:
    """Return Pearson's r, the mean absolute error and the count of those who are known."""
    table = pd.read_csv(path).dropna(subset=[target, "pred"])
    true, said = np.asarray(table[target], float), np.asarray(table["pred"], float)
    return pearsonr(true, said)[0], mean_absolute_error(true, said), len(true)


def test_classes_are_read_by_stamps_rules(classes):
    metrics = json.loads((classes.out / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    for label in ("1", "2", "3"):
        of_folds = metrics[f"auroc of {label}"]["folds"]
        for path, measured in zip(per_fold(classes.out), of_folds, strict=True):
            true, scores = classification(path, "grade", label)
            assert roc_auc_score(true, scores) == pytest.approx(measured)
            auroc, _, count = categorical(path, "grade")[label]
            assert (auroc, count) == (pytest.approx(measured), true.sum())
    assert len({path.parent.name for path in per_fold(classes.out)}) == 2


def test_a_regression_is_read_by_stamps_rules(numbers):
    metrics = json.loads((numbers.out / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    for k, path in enumerate(per_fold(numbers.out)):
        r, error, _ = regression(path, "LF")
        assert r == pytest.approx(metrics["pearson"]["folds"][k])
        assert error == pytest.approx(metrics["mae"]["folds"][k])
    assert regression(numbers.out / "predictions.csv", "LF")[2] == 22


def test_one_table_has_all_folds_and_the_fold_that_tested_a_patient(classes, numbers):
    for config in (classes, numbers):
        text = {"dtype": str, "keep_default_na": False}
        table = pd.read_csv(config.out / "predictions.csv", **text)
        assert table["PATIENT"].is_unique
        assert table.columns.tolist()[-2:] == ["pred", "fold"]
        for k, path in zip(FOLDS, per_fold(config.out), strict=True):
            of_fold = table[table["fold"] == str(k)].drop(columns="fold").reset_index(drop=True)
            pd.testing.assert_frame_equal(of_fold, pd.read_csv(path, **text))
    splits = json.loads((classes.out / "splits.json").read_text(encoding="utf-8"))["folds"]
    for k, fold in zip(FOLDS, splits, strict=True):
        table = pd.read_csv(classes.out / "predictions.csv")
        assert sorted(table.loc[table["fold"] == k, "PATIENT"]) == sorted(fold["test"])


def test_a_patient_is_called_by_the_likeliest_class_or_the_number(classes, numbers):
    for folder in (classes.out, classes.out / "fold-1", deployed(classes)):
        rows = pd.read_csv(folder / "predictions.csv", dtype=str).to_dict("records")
        for row in rows:
            others = {label: float(row[f"grade_{label}"]) for label in "123"}
            assert others[row["pred"]] == max(others.values())
        assert len({row["pred"] for row in rows}) > 1
    for folder in (numbers.out, numbers.out / "fold-2", deployed(numbers)):
        table = pd.read_csv(folder / "predictions.csv", dtype=str)
        assert (table["pred"] == table["LF_pred"]).all()


def test_the_table_of_all_folds_is_made_of_folds_of_an_earlier_release(classes):
    """They had no column ``pred``; the run is summed up again where it is taken up."""
    before = (classes.out / "predictions.csv").read_bytes()
    path = classes.out / "fold-1" / "predictions.csv"
    written = path.read_bytes()
    pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns="pred").to_csv(
        path, index=False, lineterminator="\n"
    )
    assert "pred" not in read_fold(classes.out / "fold-1").predictions
    (classes.out / "predictions.csv").unlink()
    run_crossval(classes)
    assert (classes.out / "predictions.csv").read_bytes() == before
    path.write_bytes(written)


@pytest.mark.parametrize("name", ["pred", "fold"])
def test_a_target_called_as_a_column_of_ours_is_refused_before_training(tmp_path, name):
    extra = {name: ["a", "b"] * 6}
    tables = make_tables(tmp_path, extra=extra)
    config = CrossvalConfig(
        tables.clini, tables.slides, tables.features, name, tmp_path / "run", device="cpu"
    )
    with pytest.raises(UserError, match=rf"give {name}\. Rename a column"):
        run_crossval(config)
    assert not (tmp_path / "run" / "fold-1").exists()
