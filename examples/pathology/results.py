"""What a cross-validation leaves on disk: written fold by fold, read back, summed up and drawn."""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from examples.pathology import history_plots, metrics, plots, resampling
from examples.pathology.cohort import Target
from examples.pathology.errors import UserError, listing, one_line
from examples.pathology.files import write_bytes, write_json, write_text
from examples.pathology.splits import Fold, splits_sha256
from examples.pathology.training import BASELINE, Fitted, PatientPrediction, Scaler, new_model

if TYPE_CHECKING:
    from examples.pathology.cohort import Cohort
    from examples.pathology.config import CrossvalConfig
    from examples.pathology.resampling import Resampled

DONE = "fold.json"  # written last: a fold that has it is finished
FEATURE_KEYS = ("in_features", "extractor", "weights_sha256", "tile_size_um", "random_weights")


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
    """

    predictions: pd.DataFrame
    embeddings: NDArray[np.float32]
    best_epoch: int
    epochs: int
    seconds: float
    threshold: float = math.nan
    history: pd.DataFrame = field(default_factory=pd.DataFrame)


def prediction_columns(targets: Sequence[Target]) -> list[str]:
    """Return the columns of ``predictions.csv``.

    Raises:
        UserError: Two of them have the same name.
    """
    columns = ["PATIENT"]
    for i, target in enumerate(targets):
        columns += [target.name] if i == 0 else [target.name, f"{target.name}_pred"]
        columns += [f"{target.name}_{label}" for label in target.classes]
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise UserError(
            "The columns of predictions.csv must have different names, but two targets or classes "
            "give "
            f"{listing(twice)}. Rename a column of the clinical table."
        )
    return columns


def write_fold(
    folder: Path,
    fitted: Fitted,
    tested: Sequence[PatientPrediction],
    validated: Sequence[PatientPrediction],
    cohort: Cohort,
    seconds: float,
) -> None:
    """Write what a fold leaves behind; the file that says it is finished comes last.

    Args:
        folder: Of the fold.
        fitted: The trained fold.
        tested: Its predictions for the test part.
        validated: Its predictions for the validation part, which set the threshold of F1.
        cohort: What the features are.
        seconds: How long it took.
    """
    write_predictions(folder / "predictions.csv", fitted.targets, tested)
    write_predictions(folder / "validation.csv", fitted.targets, validated)
    write_text(folder / "history.csv", _csv_of(fitted.history))
    write_embeddings(folder / "embeddings.npy", tested)
    buffer = io.BytesIO()
    torch.save(
        {
            "state_dict": {key: value.cpu() for key, value in fitted.model.state_dict().items()},
            "targets": [
                {"name": t.name, "kind": t.kind, "classes": list(t.classes), "positive": t.positive}
                for t in fitted.targets
            ],
            "scalers": {name: [s.low, s.high] for name, s in fitted.scalers.items()},
            "network": {"width": fitted.model.d_model, "layers": fitted.model.layers},
            "precision": fitted.precision,
            "best_epoch": fitted.best_epoch,
            **features_of(cohort),
        },
        buffer,
    )
    write_bytes(folder / "model.pt", buffer.getvalue())
    threshold = threshold_of(fitted.targets[0], validated)
    write_json(
        folder / DONE,
        {
            "best_epoch": fitted.best_epoch,
            "epochs": len(fitted.history),
            "threshold": json_or_none(threshold),
            "seconds": round(seconds, 3),
        },
    )


def features_of(cohort: Cohort) -> dict[str, Any]:
    """Return what a model must be told about the features that it was trained on."""
    return {
        "in_features": cohort.in_features,
        "extractor": cohort.extractor,
        "weights_sha256": cohort.weights_sha256,
        "tile_size_um": cohort.tile_size_um,
        "random_weights": cohort.random_weights,
    }


def read_model(path: Path, device: str) -> tuple[Fitted, dict[str, Any]]:
    """Read a trained fold and what it says about the features it was trained on.

    Args:
        path: ``model.pt`` of a fold.
        device: Where the model goes.

    Raises:
        UserError: The file is missing or holds no model of ours.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        targets = tuple(
            Target(t["name"], t["kind"], tuple(t["classes"]), t["positive"])
            for t in saved["targets"]
        )
        model = new_model(targets, saved["in_features"], **saved["network"])
        model.load_state_dict(saved["state_dict"])
        scalers = {name: Scaler(*ends) for name, ends in saved["scalers"].items()}
        fitted = Fitted(
            model.to(device).eval(), targets, scalers, (), saved["best_epoch"], saved["precision"]
        )
        about = {name: saved[name] for name in FEATURE_KEYS}
    except OSError as error:
        raise UserError(
            f"{path} must be a readable file, but {error.strerror or error}."
        ) from error
    except (RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} must hold a model of this release, but does not: {one_line(error)}."
        ) from error
    return fitted, about


def threshold_of(target: Target, validated: Sequence[PatientPrediction]) -> float:
    """Return the probability of the positive class from which F1 is highest on these patients."""
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
    """Write one row per patient: what is known, and what is predicted."""
    write_text(path, _predictions_csv(targets, predictions))


def _predictions_csv(targets: Sequence[Target], tested: Sequence[PatientPrediction]) -> str:
    rows = []
    for prediction in tested:
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
    return _csv_of(rows, prediction_columns(targets))


def _csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    names = list(columns or dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_fold(folder: Path) -> FoldResult:
    """Read back a finished fold.

    Raises:
        UserError: The fold is not finished.
    """
    if not (folder / DONE).exists():
        raise UserError(f"{folder} must be a finished fold, but is not. Run `crossval` again.")
    done = json.loads((folder / DONE).read_text(encoding="utf-8"))
    threshold = done.get("threshold")
    return FoldResult(
        read_predictions(folder / "predictions.csv"),
        np.load(folder / "embeddings.npy", allow_pickle=False),
        int(done["best_epoch"]),
        int(done["epochs"]),
        float(done["seconds"]),
        math.nan if threshold is None else float(threshold),
        pd.read_csv(folder / "history.csv"),
    )


def read_predictions(path: Path) -> pd.DataFrame:
    """Read back what `write_predictions` wrote, all as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def summarise(
    config: CrossvalConfig, cohort: Cohort, folds: Sequence[Fold], results: Sequence[FoldResult]
) -> dict[str, Any]:
    """Turn the predictions of all folds into what ``metrics.json`` holds."""
    targets = cohort.targets[:1] if config.balancer == BASELINE else cohort.targets
    counts = Counter(patient.label for patient in cohort.patients)
    return {
        "format": 1,
        "method": config.balancer,
        "target": cohort.target.name,
        "classes": list(cohort.target.classes),
        "positive": cohort.target.positive,
        "auxiliary": [{"name": t.name, "kind": t.kind} for t in targets[1:]],
        "patients": len(cohort.patients),
        "training_only": 0 if config.balancer == BASELINE else len(cohort.training_only),
        "complete_cases": config.complete_cases,
        "max_tiles": config.max_tiles,
        "width": config.width,
        "layers": config.layers,
        "precision": config.precision,
        "positives": counts[cohort.target.positive],
        "tiles": sum(patient.tiles for patient in cohort.patients),
        "funnel": [list(stage) for stage in cohort.funnel],
        "extractor": cohort.extractor,
        "random_weights": cohort.random_weights,
        "note": config.note,
        "seed": config.seed,
        "splits_sha256": splits_sha256(folds),
        "best_epochs": [result.best_epoch for result in results],
        "epochs": [result.epochs for result in results],
        "seconds": [result.seconds for result in results],
        "thresholds": [json_or_none(result.threshold) for result in results],
        "share_waiting_for_data": _share_waiting(results),
        "metrics": summary_of_metrics(results, targets, config.seed),
    }


def _share_waiting(results: Sequence[FoldResult]) -> float | None:
    """Return the share of training time spent waiting for tiles, all folds together."""
    histories = [r.history for r in results if "seconds_waiting_for_data" in r.history]
    spent = sum(float(history["seconds"].sum()) for history in histories)
    waited = sum(float(history["seconds_waiting_for_data"].sum()) for history in histories)
    return round(waited / spent, 4) if spent else None


@dataclass(frozen=True)
class Measured:
    """A figure of one fold, and how to get it of resampled patients.

    Args:
        score: The figure.
        strata: The primary class of each patient that it is of ``(n,)``.
        resampled: Computes it for resamples of them; ``None`` where it is not defined.
    """

    score: metrics.Score
    strata: NDArray[np.str_]
    resampled: Resampled | None


def measure_fold(result: FoldResult, targets: Sequence[Target]) -> dict[str, Measured]:
    """Return every figure of one fold by name, the primary target's first."""
    primary = targets[0]
    known = result.predictions[primary.name] != ""
    table = result.predictions[known]
    strata = table[primary.name].to_numpy(dtype=str)
    measured = _ranking(table, primary, primary.positive, strata, "auroc", "auprc")
    positive = strata == primary.positive
    score = table[f"{primary.name}_{primary.positive}"].to_numpy(dtype=float)
    called = score >= result.threshold
    measured["f1"] = _measured(
        metrics.f1(positive, score, result.threshold),
        strata,
        lambda weights: resampling.f1(positive, called, weights),
    )
    measured["prevalence"] = Measured(metrics.prevalence(positive), strata, None)
    each = metrics.silhouettes(result.embeddings[known.to_numpy()], strata)
    measured["silhouette"] = (
        Measured(each, strata, None)
        if isinstance(each, metrics.Score)
        else Measured(
            metrics.Score(float(each.mean())),
            strata,
            lambda weights: resampling.mean(each, weights),
        )
    )
    if len(primary.classes) > 2:
        for label in primary.classes:
            measured |= _ranking(table, primary, label, strata, f"auroc of {label}")
    for target in targets[1:]:
        measured |= _measure_auxiliary(result.predictions, target, primary)
    return measured


def _measure_auxiliary(table: pd.DataFrame, target: Target, primary: Target) -> dict[str, Measured]:
    known = table[table[target.name] != ""]
    strata = known[primary.name].to_numpy(dtype=str)
    if target.kind == "classification":
        return _ranking(known, target, target.positive, strata, f"auroc/{target.name}")
    truth = known[target.name].to_numpy(dtype=float)
    predicted = known[f"{target.name}_pred"].to_numpy(dtype=float)
    return {
        f"pearson/{target.name}": _measured(
            metrics.pearson(truth, predicted),
            strata,
            lambda weights: resampling.pearson(truth, predicted, weights),
        )
    }


def _ranking(
    table: pd.DataFrame,
    target: Target,
    label: str,
    strata: NDArray[np.str_],
    auroc: str,
    auprc: str | None = None,
) -> dict[str, Measured]:
    """Return the areas of one class against the others, under the names given."""
    positive = (table[target.name] == label).to_numpy()
    score = table[f"{target.name}_{label}"].to_numpy(dtype=float)
    measured = {
        auroc: _measured(
            metrics.auroc(positive, score),
            strata,
            lambda weights: resampling.auroc(positive, score, weights),
        )
    }
    if auprc is not None:
        measured[auprc] = _measured(
            metrics.auprc(positive, score),
            strata,
            lambda weights: resampling.auprc(positive, score, weights),
        )
    return measured


def _measured(score: metrics.Score, strata: NDArray[np.str_], resampled: Resampled) -> Measured:
    return Measured(score, strata, None if score.reason else resampled)


def fold_scores(result: FoldResult, targets: Sequence[Target]) -> dict[str, metrics.Score]:
    """Return every figure of one fold by name, without its uncertainty."""
    return {name: measured.score for name, measured in measure_fold(result, targets).items()}


def summary_of_metrics(
    results: Sequence[FoldResult], targets: Sequence[Target], seed: int
) -> dict[str, Any]:
    """Return every figure in every fold, its mean, spread and intervals, ready for JSON."""
    folds = [measure_fold(result, targets) for result in results]
    return {name: _summary_json([fold[name] for fold in folds], seed) for name in folds[0]}


def _summary_json(measured: Sequence[Measured], seed: int) -> dict[str, Any]:
    scores = [m.score for m in measured]
    summary = metrics.over_folds(scores)
    interval = resampling.interval(
        [(m.strata, m.resampled) for m in measured if m.resampled is not None], seed=seed
    )
    return {
        "folds": [json_or_none(score.value) for score in scores],
        "undefined": {str(k): s.reason for k, s in enumerate(scores, start=1) if s.reason},
        "mean": json_or_none(summary.mean),
        "sd": json_or_none(summary.sd),
        "ci95_over_patients": [json_or_none(end) for end in interval],
        "ci95_over_folds": [json_or_none(summary.low), json_or_none(summary.high)],
        "folds_with_value": summary.folds,
    }


def json_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: without NaN."""
    return None if math.isnan(value) else value


def draw_figures(
    figures: Path,
    summary: Mapping[str, Any],
    results: Sequence[FoldResult],
    *,
    seed: int,
) -> list[tuple[str, Path]]:
    """Draw what a run says: its ranking, its embedding, its measurements and its training.

    Args:
        figures: The folder to write to.
        summary: What ``metrics.json`` holds.
        results: Of all folds.
        seed: Of the t-SNE.

    Returns:
        A title and the file of every figure.
    """
    targets = [
        Target(
            str(summary["target"]),
            "classification",
            tuple(summary["classes"]),
            str(summary["positive"]),
        ),
        *(Target(str(t["name"]), t["kind"]) for t in summary["auxiliary"]),
    ]
    drawn = draw_scores(figures, summary, results, targets)
    embedded = [
        (result.embeddings, result.predictions[targets[0].name].to_numpy(dtype=str))
        for result in results
    ]
    path = figures / "tsne.png"
    plots.tsne(
        embedded,
        list(summary["classes"]),
        path,
        title=f"{summary['method']}: [cls] embedding by {targets[0].name}",
        caption=caption_of(summary),
        seed=seed,
    )
    drawn.append(("t-SNE", path))
    histories = [result.history for result in results if len(result.history)]
    if histories:
        tasks = [target.name for target in targets]
        method, caption = str(summary["method"]), caption_of(summary)
        best = [result.best_epoch for result in results if len(result.history)]
        path = figures / "training.png"
        history_plots.training(histories, best, tasks, path, title=method, caption=caption)
        drawn.append(("training", path))
        path = figures / "balance.png"
        if history_plots.balance(histories, tasks, path, title=method, caption=caption):
            drawn.append(("task weights and gradient conflict", path))
    return drawn


def draw_scores(
    figures: Path,
    summary: Mapping[str, Any],
    results: Sequence[FoldResult],
    targets: Sequence[Target],
) -> list[tuple[str, Path]]:
    """Draw ROC and PR curves of the primary target, and measured against predicted values.

    Args:
        figures: The folder to write to.
        summary: What ``metrics.json`` holds.
        results: Of all folds; patients without a label are left out.
        targets: What was predicted, the primary target first.

    Returns:
        A title and the file of every figure.
    """
    primary = targets[0]
    caption = caption_of(summary)
    title = f"{summary['method']}: {primary.name} = {primary.positive}"
    scored = []
    for result in results:
        known = result.predictions[result.predictions[primary.name] != ""]
        truth = (known[primary.name] == primary.positive).to_numpy()
        scored.append((truth, known[f"{primary.name}_{primary.positive}"].to_numpy(dtype=float)))
    drawn = [("ROC", figures / "roc.png"), ("precision-recall", figures / "pr.png")]
    plots.roc(scored, drawn[0][1], title=title, caption=caption)
    plots.precision_recall(scored, drawn[1][1], title=title, caption=caption)
    for number, target in enumerate(targets[1:], start=1):
        if target.kind == "regression":
            path = figures / f"regression-{number}.png"  # its name may hold any character
            points = []
            for result in results:
                known = result.predictions[result.predictions[target.name] != ""]
                measured = known[target.name].to_numpy(dtype=float)
                points.append((measured, known[f"{target.name}_pred"].to_numpy(dtype=float)))
            if not any(len(measured) for measured, _ in points):
                continue  # an external cohort need not know it
            heading = f"{summary['method']}: {target.name}"
            plots.regression(points, path, title=heading, caption=caption)
            drawn.append((f"measured and predicted {target.name}", path))
    return drawn


def caption_of(summary: Mapping[str, Any]) -> str:
    """Return the warning that belongs under every figure of a run."""
    note = str(summary["note"]).strip().rstrip(".")
    parts = [f"{note}."] if note else []
    if summary["random_weights"]:
        parts.append("Features come from a network with RANDOM weights and carry no biology.")
    return " ".join(parts)
