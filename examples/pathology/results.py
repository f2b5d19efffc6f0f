"""What a cross-validation leaves on disk: written fold by fold, read back, summed up and drawn."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from examples.pathology import metrics, plots
from examples.pathology.errors import UserError, listing
from examples.pathology.files import write_bytes, write_json, write_text
from examples.pathology.splits import Fold, splits_sha256
from examples.pathology.training import BASELINE, Fitted, PatientPrediction

if TYPE_CHECKING:
    from examples.pathology.cohort import Cohort, Target
    from examples.pathology.config import CrossvalConfig

DONE = "fold.json"  # written last: a fold that has it is finished


@dataclass(frozen=True)
class FoldResult:
    """What a finished fold left on disk, read back.

    Args:
        predictions: One row per test patient, as in ``predictions.csv``, all strings.
        embeddings: The [cls] embedding ``(n, d)`` in the same order.
        best_epoch: The epoch whose parameters were kept.
        epochs: How many were run.
        seconds: How long it took.
    """

    predictions: pd.DataFrame
    embeddings: NDArray[np.float32]
    best_epoch: int
    epochs: int
    seconds: float


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
    cohort: Cohort,
    seconds: float,
) -> None:
    """Write what a fold leaves behind; the file that says it is finished comes last."""
    write_text(folder / "predictions.csv", _predictions_csv(fitted.targets, tested))
    write_text(folder / "history.csv", _csv_of(fitted.history))
    buffer = io.BytesIO()
    np.save(buffer, np.stack([p.embedding for p in tested]), allow_pickle=False)
    write_bytes(folder / "embeddings.npy", buffer.getvalue())
    buffer = io.BytesIO()
    torch.save(
        {
            "state_dict": {key: value.cpu() for key, value in fitted.model.state_dict().items()},
            "targets": [
                {"name": t.name, "kind": t.kind, "classes": list(t.classes), "positive": t.positive}
                for t in fitted.targets
            ],
            "scalers": {name: [s.low, s.high] for name, s in fitted.scalers.items()},
            "in_features": cohort.in_features,
            "extractor": cohort.extractor,
            "random_weights": cohort.random_weights,
        },
        buffer,
    )
    write_bytes(folder / "model.pt", buffer.getvalue())
    write_json(
        folder / DONE,
        {
            "best_epoch": fitted.best_epoch,
            "epochs": len(fitted.history),
            "seconds": round(seconds, 3),
        },
    )


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
    return FoldResult(
        pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False),
        np.load(folder / "embeddings.npy", allow_pickle=False),
        int(done["best_epoch"]),
        int(done["epochs"]),
        float(done["seconds"]),
    )


def summarise(
    config: CrossvalConfig, cohort: Cohort, folds: Sequence[Fold], results: Sequence[FoldResult]
) -> dict[str, Any]:
    """Turn the predictions of all folds into what ``metrics.json`` holds."""
    targets = cohort.targets[:1] if config.balancer == BASELINE else cohort.targets
    scored = [fold_scores(result, targets) for result in results]
    counts = Counter(patient.label for patient in cohort.patients)
    return {
        "format": 1,
        "method": config.balancer,
        "target": cohort.target.name,
        "classes": list(cohort.target.classes),
        "positive": cohort.target.positive,
        "auxiliary": [{"name": t.name, "kind": t.kind} for t in targets[1:]],
        "patients": len(cohort.patients),
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
        "metrics": {name: _summary_json([fold[name] for fold in scored]) for name in scored[0]},
    }


def fold_scores(result: FoldResult, targets: Sequence[Target]) -> dict[str, metrics.Score]:
    """Return every figure of one fold by name, the primary target's first."""
    primary = targets[0]
    truth = result.predictions[primary.name]
    positive = truth == primary.positive
    score = result.predictions[f"{primary.name}_{primary.positive}"].astype(float)
    scores = {
        "auroc": metrics.auroc(positive, score),
        "auprc": metrics.auprc(positive, score),
        "prevalence": metrics.prevalence(positive),
        "silhouette": metrics.silhouette(result.embeddings, truth),
    }
    if len(primary.classes) > 2:
        for label in primary.classes:
            score = result.predictions[f"{primary.name}_{label}"].astype(float)
            scores[f"auroc of {label}"] = metrics.auroc(truth == label, score)
    for target in targets[1:]:
        known = result.predictions[result.predictions[target.name] != ""]
        if target.kind == "regression":
            measured, predicted = known[target.name], known[f"{target.name}_pred"]
            scores[f"pearson/{target.name}"] = metrics.pearson(
                measured.astype(float), predicted.astype(float)
            )
        else:
            score = known[f"{target.name}_{target.positive}"].astype(float)
            scores[f"auroc/{target.name}"] = metrics.auroc(
                known[target.name] == target.positive, score
            )
    return scores


def _summary_json(scores: Sequence[metrics.Score]) -> dict[str, Any]:
    summary = metrics.over_folds(scores)
    return {
        "folds": [_or_none(score.value) for score in scores],
        "undefined": {str(k): s.reason for k, s in enumerate(scores, start=1) if s.reason},
        "mean": _or_none(summary.mean),
        "sd": _or_none(summary.sd),
        "ci95_over_folds": [_or_none(summary.low), _or_none(summary.high)],
        "folds_with_value": summary.folds,
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def draw_figures(
    figures: Path, summary: Mapping[str, Any], results: Sequence[FoldResult], *, seed: int
) -> list[Path]:
    """Draw ROC and PR curves and the t-SNE of the [cls] embedding.

    Args:
        figures: The folder to write to.
        summary: What ``metrics.json`` holds.
        results: Of all folds.
        seed: Of the t-SNE.

    Returns:
        The files, in that order.
    """
    target, positive = str(summary["target"]), str(summary["positive"])
    title = f"{summary['method']}: {target} = {positive}"
    caption = caption_of(summary)
    scored = [
        (
            (result.predictions[target] == positive).to_numpy(),
            result.predictions[f"{target}_{positive}"].astype(float).to_numpy(),
        )
        for result in results
    ]
    files = [figures / f"{name}.png" for name in ("roc", "pr", "tsne")]
    plots.roc(scored, files[0], title=title, caption=caption)
    plots.precision_recall(scored, files[1], title=title, caption=caption)
    embedded = [
        (result.embeddings, result.predictions[target].to_numpy(dtype=str)) for result in results
    ]
    plots.tsne(
        embedded,
        list(summary["classes"]),
        files[2],
        title=f"{summary['method']}: [cls] embedding by {target}",
        caption=caption,
        seed=seed,
    )
    return files


def caption_of(summary: Mapping[str, Any]) -> str:
    """Return the warning that belongs under every figure of a run."""
    note = str(summary["note"]).strip().rstrip(".")
    parts = [f"{note}."] if note else []
    if summary["random_weights"]:
        parts.append("Features come from a network with RANDOM weights and carry no biology.")
    return " ".join(parts)
