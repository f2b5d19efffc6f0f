"""What a cross-validation leaves on disk: written fold by fold, and read back."""

import io
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from examples.pathology.cohort.targets import CALLED, FOLD, Target, prediction_columns
from examples.pathology.common.errors import UserError, listing, one_line
from examples.pathology.common.files import (
    DAMAGED,
    json_or_none,
    readable,
    whole,
    write_bytes,
    write_json,
)
from examples.pathology.common.names import composed
from examples.pathology.features.kind import FeatureKind
from examples.pathology.results import metrics
from examples.pathology.tables.reading import PATIENT
from examples.pathology.tables.writing import read_table_of_ours, write_table
from examples.pathology.training.losses import Scaler
from examples.pathology.training.model import new_model
from examples.pathology.training.prediction import Fitted, PatientPrediction

REMEDY = "Run the command that made it again."
DONE = "fold.json"  # written last: a fold that has it is finished
SEARCH = "search.csv"  # a row for each candidate of a fold that tries several
Candidate = dict[str, float]
"""Its ``learning_rate``, the ``weight`` of auxiliary targets where that is tried as well, and its
``validation_loss``, ``best_epoch``, ``epochs`` and ``seconds``."""


@dataclass(frozen=True)
class FoldResult:
    """What a finished fold left on disk, read back.

    Args:
        predictions: One row per test patient, as in ``predictions.csv``, all strings.
        embeddings: The [cls] embedding ``(n, d)`` in the same order.
        best_epoch: The epoch whose parameters were kept.
        epochs: How many were run.
        seconds: How long it took.
        threshold: The probability from which a patient is called positive; NaN without one.
        history: One row per epoch.
        validated: The validation part, of an ensemble that of every model, where it is at hand.
        search: What became of all candidates, where several were tried.
    """

    predictions: pd.DataFrame
    embeddings: NDArray[np.float32]
    best_epoch: int
    epochs: int
    seconds: float
    threshold: float = math.nan
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    validated: tuple[pd.DataFrame, ...] = ()
    search: Sequence[Candidate] = ()

    def by_name(self) -> "FoldResult":
        """Return the same with the patients in order of their names, as comparisons need them."""
        order = np.argsort(self.predictions[PATIENT].to_numpy(dtype=str), kind="stable")
        table, embeddings = self.predictions.iloc[order], self.embeddings[order]
        return replace(self, predictions=table, embeddings=embeddings)


def write_fold(
    folder: Path,
    fitted: Fitted,
    tested: Sequence[PatientPrediction],
    validated: Sequence[PatientPrediction],
    kind: FeatureKind,
    seconds: float,
) -> None:
    """Write what a fold leaves behind; the file that says it is finished comes last.

    The threshold of F1 is set on the validation part, of which `validated` are the predictions.
    """
    write_predictions(folder / "predictions.csv", fitted.targets, tested)
    write_predictions(folder / "validation.csv", fitted.targets, validated)
    write_table(folder / "history.csv", pd.DataFrame(list(fitted.history)))
    write_embeddings(folder / "embeddings.npy", tested)
    buffer = io.BytesIO()
    torch.save(
        {
            "state_dict": {key: value.cpu() for key, value in fitted.model.state_dict().items()},
            "targets": [{**asdict(t), "classes": list(t.classes)} for t in fitted.targets],
            "scalers": {name: [s.low, s.high] for name, s in fitted.scalers.items()},
            "network": {"width": fitted.model.d_model, "layers": fitted.model.layers},
            "precision": fitted.precision,
            "best_epoch": fitted.best_epoch,
            **asdict(kind),
        },
        buffer,
    )
    write_bytes(folder / "model.pt", buffer.getvalue())
    done = {
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "threshold": json_or_none(threshold_of(fitted.targets[0], validated)),
        "seconds": round(seconds, 3),
    }
    write_json(folder / DONE, done)


def read_model(path: Path, device: str) -> tuple[Fitted, FeatureKind]:
    """Read ``model.pt`` of a trained fold, and on what kind of features it was trained.

    Raises:
        UserError: The file is missing or holds no model of ours.
    """
    with readable(path):
        try:
            data = io.BytesIO(path.read_bytes())  # torch seeks before the start of a cut-off file
            saved = torch.load(data, map_location=device, weights_only=True)
            targets = tuple(_target(target) for target in saved["targets"])
            model = new_model(targets, saved["in_features"], **saved["network"])
            model.load_state_dict(saved["state_dict"])
            scalers = {composed(name): Scaler(*ends) for name, ends in saved["scalers"].items()}
            fitted = Fitted(
                model.to(device).eval(),
                targets,
                scalers,
                (),
                saved["best_epoch"],
                saved["precision"],
            )
            kind = FeatureKind.read(saved)
        except (*DAMAGED, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} must hold a model of this release, but does not: {one_line(error)}."
            ) from error
    return fitted, kind


def _target(saved: Mapping[str, Any]) -> Target:
    """Return a target as tables are read now; an earlier release did not compose its names."""
    names = {key: composed(saved[key]) for key in ("name", "positive")}
    return Target(**{**saved, **names, "classes": tuple(map(composed, saved["classes"]))})


def threshold_of(target: Target, validated: Sequence[PatientPrediction]) -> float:
    """Return the probability of the positive class from which F1 is highest on these patients.

    It is NaN for a regression, and where one class is missing.
    """
    if target.kind == "regression":
        return math.nan
    column = target.classes.index(target.positive)
    return metrics.best_threshold(
        [p.patient.label == target.positive for p in validated],
        [p.probabilities[target.name][column] for p in validated],
    )


def write_embeddings(path: Path, predictions: Sequence[PatientPrediction]) -> None:
    """Write the [cls] embeddings ``(n, d)`` as ``.npy``."""
    buffer = io.BytesIO()
    np.save(buffer, np.stack([p.embedding for p in predictions]), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def write_predictions(
    path: Path, targets: Sequence[Target], predictions: Sequence[PatientPrediction]
) -> None:
    """Write one row per patient: what is known, what is predicted, and what that amounts to."""
    rows = []
    for prediction in predictions:
        patient = prediction.patient
        row: dict[str, Any] = {"PATIENT": patient.name, targets[0].name: patient.label}
        for target in targets:
            if target is not targets[0]:
                row[target.name] = patient.known.get(target.name, "")
            if target.kind == "classification":
                probabilities = prediction.probabilities[target.name]
                for label, probability in zip(target.classes, probabilities, strict=True):
                    row[f"{target.name}_{label}"] = float(probability)
                if target is not targets[0]:
                    row[f"{target.name}_pred"] = target.classes[int(probabilities.argmax())]
            else:
                row[f"{target.name}_pred"] = prediction.numbers[target.name]
        rows.append(row)
    table = pd.DataFrame(rows, columns=prediction_columns(targets), dtype=object)
    write_table(path, _called(table, targets[0]))


def _called(table: pd.DataFrame, target: Target) -> pd.DataFrame:
    """Return predictions with what the primary one amounts to: the likeliest class, or the number.

    Readers of STAMP's tables look for it under this name; earlier releases did not write it.
    """
    called = table[target.columns[0]].to_numpy()
    if target.kind == "classification":
        likeliest = table[target.columns].astype(float).to_numpy().argmax(axis=1)
        called = np.asarray(target.classes, dtype=object)[likeliest]
    called_so: pd.DataFrame = table.assign(**{CALLED: called})
    return called_so


def write_all_predictions(path: Path, target: Target, results: Sequence[FoldResult]) -> None:
    """Write what all folds say of their test patients, with the fold (from 1) that says so."""
    tables = [_called(result.predictions, target) for result in results]
    folds = [table.assign(**{FOLD: k}) for k, table in enumerate(tables, start=1)]
    write_table(path, pd.concat(folds))


def read_fold(folder: Path) -> FoldResult:
    """Read back a finished fold.

    Raises:
        UserError: The fold is not finished, a file of it is damaged or gone, or its predictions
            are of others than its test part.
    """
    if not (folder / DONE).exists():
        raise UserError(f"{folder} must be a finished fold, but is not. Run `crossval` again.")
    remedy = _anew(folder)
    with whole(folder / DONE, remedy):
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        best_epoch, epochs = int(done["best_epoch"]), int(done["epochs"])
        seconds = float(done["seconds"])
        threshold = math.nan if done.get("threshold") is None else float(done["threshold"])
    embeddings = read_embeddings(folder / "embeddings.npy", remedy)
    predictions = read_table_of_ours(folder / "predictions.csv", remedy, rows=len(embeddings))
    _refuse_untested(folder, predictions, remedy)
    history = read_table_of_ours(folder / "history.csv", remedy, rows=epochs, text=False)
    validated = read_validation(folder, remedy)
    numbers = best_epoch, epochs, seconds, threshold
    search = read_search(folder)
    return FoldResult(predictions, embeddings, *numbers, history, validated, search)


def _refuse_untested(folder: Path, predictions: pd.DataFrame, remedy: str) -> None:
    """Raise if predictions are not of the test part: others of that name may have replaced them."""
    splits, path = folder.parent / "splits.json", folder / "predictions.csv"
    if not splits.exists():
        return
    with whole(path, remedy):
        found = sorted(map(composed, predictions[PATIENT]))
    with whole(splits, "Put it back."):
        folds = json.loads(splits.read_text(encoding="utf-8"))["folds"]
        tested = sorted(map(composed, folds[int(folder.name.removeprefix("fold-")) - 1]["test"]))
    if found != tested:
        odd = sorted(set(found).symmetric_difference(tested)) or found
        raise UserError(
            f"{path} must be of the patients whom {splits.name} has in the test part of the fold, "
            f"but differs in {listing(odd, 4)}. {remedy}"
        )


def read_search(folder: Path) -> list[Candidate]:
    """Read what became of the candidates of a fold so far; none where there is no search.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / SEARCH
    if not path.exists():
        return []
    table = read_table_of_ours(path, _anew(folder))
    with whole(path, _anew(folder)):
        kinds = {name: int if "epoch" in str(name) else float for name in table}
        return [*table.astype(kinds).to_dict("records")]


def best_of(search: Sequence[Candidate]) -> int:
    """Return the place of the candidate with the lowest validation loss, of equals the first."""
    return min(range(len(search)), key=lambda place: search[place]["validation_loss"])


def candidate_in_words(candidate: Mapping[str, float]) -> str:
    """Return ``learning rate 0.001, weight 3``."""
    weight = f", weight {candidate['weight']:g}" if "weight" in candidate else ""
    return f"learning rate {candidate['learning_rate']:g}{weight}"


def _anew(folder: Path) -> str:
    return (
        f"Delete {folder} and {folder.parent / 'metrics.json'}, and run the command that made them "
        "again: other folds stay."
    )


def read_validation(folder: Path, remedy: str) -> tuple[pd.DataFrame, ...]:
    """Read the validation part of a fold; none where a run does not have it, or is gone."""
    path = folder / "validation.csv"
    return (read_table_of_ours(path, remedy),) if path.exists() else ()


def read_embeddings(path: Path, remedy: str) -> NDArray[np.float32]:
    """Read back what `write_embeddings` wrote."""
    with whole(path, remedy):
        embeddings: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return embeddings
