"""Predictions on disk to numbers: every figure of a fold, its mean over folds and its intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.pathology import metrics, resampling
from examples.pathology.files import json_or_none
from examples.pathology.splits import Fold, splits_sha256
from examples.pathology.training import BASELINE

if TYPE_CHECKING:
    from examples.pathology.cohort import Cohort, Target
    from examples.pathology.config import CrossvalConfig
    from examples.pathology.resampling import Resampled
    from examples.pathology.results import FoldResult


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
