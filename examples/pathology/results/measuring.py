"""Predictions on disk to numbers: every figure of a fold, its mean over folds and its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.pathology.cohort.targets import Target
from examples.pathology.common.files import json_or_none
from examples.pathology.results import metrics, resampling
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.resampling import Resampled


def describe_primary(target: Target, labels: Sequence[str]) -> dict[str, Any]:
    """Return what a summary says of the primary target.

    Args:
        target: The primary target.
        labels: Its values of the patients who have one.
    """
    about: dict[str, Any] = {"target": target.name, "kind": target.kind}
    if target.kind == "classification":
        cut = {} if target.cutoff is None else {"cutoff": target.cutoff}
        return {
            **about,
            "classes": list(target.classes),
            "positive": target.positive,
            **cut,
            "positives": list(labels).count(target.positive),
        }
    if not labels:
        return about
    values = np.array(labels, dtype=float)
    return {
        **about,
        "values": {
            "lowest": float(values.min()),
            "highest": float(values.max()),
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)),
        },
    }


def thresholds_of(target: Target, results: Sequence[FoldResult]) -> dict[str, Any]:
    """Return the thresholds of F1 of every fold; a regression has none."""
    if target.kind == "regression":
        return {}
    return {"thresholds": [json_or_none(result.threshold) for result in results]}


@dataclass(frozen=True)
class Measured:
    """A figure of one fold, and how to get it of resampled patients.

    Args:
        score: The figure.
        strata: The primary class of each patient that it is of ``(n,)``; all equal for a
            regression.
        resampled: Computes it for resamples of them; ``None`` where it is not defined.
    """

    score: metrics.Score
    strata: NDArray[np.str_]
    resampled: Resampled | None


def measure_fold(result: FoldResult, targets: Sequence[Target]) -> dict[str, Measured]:
    """Return every figure of one fold by name, the primary target's first."""
    primary = targets[0]
    known = (result.predictions[primary.name] != "").to_numpy()
    table = result.predictions[known]
    if primary.kind == "regression":
        measured = _measure_numbers(table, primary, _strata(table, primary), "pearson", "mae")
    else:
        measured = _measure_classes(result, known, primary)
    for target in targets[1:]:
        measured |= _measure_auxiliary(result.predictions, target, primary)
    return measured


def _measure_classes(
    result: FoldResult, known: NDArray[np.bool_], primary: Target
) -> dict[str, Measured]:
    table = result.predictions[known]
    strata = _strata(table, primary)
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
    embeddings = result.embeddings[known]
    measured["silhouette"] = _measured(
        metrics.silhouette(embeddings, strata),
        strata,
        lambda weights: resampling.silhouette(embeddings, strata, weights),
    )
    if len(primary.classes) > 2:
        for label in primary.classes:
            measured |= _ranking(table, primary, label, strata, f"auroc of {label}")
    return measured


def _measure_auxiliary(table: pd.DataFrame, target: Target, primary: Target) -> dict[str, Measured]:
    known = table[table[target.name] != ""]
    strata = _strata(known, primary)
    if target.kind == "classification":
        return _ranking(known, target, target.positive, strata, f"auroc/{target.name}")
    return _measure_numbers(known, target, strata, f"pearson/{target.name}")


def _strata(table: pd.DataFrame, primary: Target) -> NDArray[np.str_]:
    """Return what patients are resampled within: their class, or nothing for a regression."""
    if primary.kind == "regression":
        return np.full(len(table), "")
    return table[primary.name].to_numpy(dtype=str)


def _measure_numbers(
    table: pd.DataFrame,
    target: Target,
    strata: NDArray[np.str_],
    pearson: str,
    mae: str | None = None,
) -> dict[str, Measured]:
    """Return how predicted and measured numbers agree, under the names given."""
    truth = table[target.name].to_numpy(dtype=float)
    predicted = table[f"{target.name}_pred"].to_numpy(dtype=float)
    measured = {
        pearson: _measured(
            metrics.pearson(truth, predicted),
            strata,
            lambda weights: resampling.pearson(truth, predicted, weights),
        )
    }
    if mae is not None:
        measured[mae] = _measured(
            metrics.mean_absolute_error(truth, predicted),
            strata,
            lambda weights: resampling.mean(np.abs(truth - predicted), weights),
        )
    return measured


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
