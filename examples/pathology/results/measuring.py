"""Predictions on disk to numbers: every figure of a fold, its mean over folds and its intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.pathology.cohort.targets import Target
from examples.pathology.common.files import json_or_none
from examples.pathology.results import metrics, resampling
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.metrics import Metric, Score
from examples.pathology.results.resampling import Resampled
from examples.pathology.results.summary import MetricSummary


def describe_primary(target: Target, labels: Sequence[str]) -> dict[str, Any]:
    """Return what a summary says of the primary target, and of its values that are known."""
    about: dict[str, Any] = {"target": target.name, "kind": target.kind}
    if target.kind == "classification":
        cut = {} if target.cutoff is None else {"cutoff": target.cutoff}
        classes = {"classes": list(target.classes), "positive": target.positive}
        return {**about, **classes, **cut, "positives": list(labels).count(target.positive)}
    if not labels:
        return about
    values = np.array(labels, dtype=float)
    ends = {"lowest": float(values.min()), "highest": float(values.max())}
    spread = {"mean": float(values.mean()), "sd": float(values.std(ddof=1))}
    return {**about, "values": {**ends, **spread}}


def describe_auxiliary(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return what a summary says of all targets but the first."""
    return [
        {"name": target.name, "kind": target.kind}
        | ({"classes": list(target.classes), "positive": target.positive} if target.classes else {})
        for target in targets[1:]
    ]


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

    score: Score
    strata: NDArray[np.str_]
    resampled: Resampled | None


def measure_fold(result: FoldResult, targets: Sequence[Target]) -> dict[Metric, Measured]:
    """Return every figure of one fold by name, the primary target's first."""
    primary = targets[0]
    known = (result.predictions[primary.name] != "").to_numpy()
    table = result.predictions[known]
    if primary.kind == "regression":
        measured = _measure_numbers(table, primary)
    else:
        measured = _measure_classes(table, result.embeddings[known], result.threshold, primary)
    for target in targets[1:]:
        table = result.predictions[result.predictions[target.name] != ""]
        strata = _strata(table, primary)
        if target.kind == "regression":
            measured[Metric("pearson", target.name)] = _pearson(table, target, strata)
        else:
            measured[Metric("auroc", target.name)] = _auroc(table, target, target.positive, strata)
    return measured


def measure_further(result: FoldResult, primary: Target) -> dict[Metric, Measured]:
    """Return what ``metrics.json`` does not hold, and can be had of the predictions of any run."""
    table = result.predictions[result.predictions[primary.name] != ""]
    strata = _strata(table, primary)
    if primary.kind == "regression":
        numbers = numbers_of(table, primary)
        of_resamples = partial(resampling.spearman, *numbers)
        return {Metric("spearman"): _measured(metrics.spearman(*numbers), strata, of_resamples)}
    positive, score = scores_of(table, primary, primary.positive)
    squares = partial(resampling.mean, (score - positive) ** 2)
    biases = partial(resampling.distance_of_mean, score - positive)
    return {
        Metric("brier"): _measured(metrics.brier(positive, score), strata, squares),
        # The share of positives is half of it, so resamples must not keep that as it is.
        Metric("calibration"): _measured(
            metrics.calibration(positive, score), np.full(len(table), ""), biases
        ),
    }


def _measure_numbers(table: pd.DataFrame, primary: Target) -> dict[Metric, Measured]:
    strata = _strata(table, primary)
    truth, predicted = numbers_of(table, primary)
    distances = partial(resampling.mean, np.abs(truth - predicted))
    return {
        Metric("pearson"): _pearson(table, primary, strata),
        Metric("mae"): _measured(metrics.mean_absolute_error(truth, predicted), strata, distances),
    }


def _measure_classes(
    table: pd.DataFrame, embeddings: NDArray[np.float32], threshold: float, primary: Target
) -> dict[Metric, Measured]:
    strata = _strata(table, primary)
    positive, score = scores_of(table, primary, primary.positive)
    auprc, f1 = metrics.auprc(positive, score), metrics.f1(positive, score, threshold)
    called = score >= threshold
    silhouette = metrics.silhouette(embeddings, strata)
    of_resamples = partial(resampling.silhouette, embeddings, strata)
    measured = {
        Metric("auroc"): _auroc(table, primary, primary.positive, strata),
        Metric("auprc"): _measured(auprc, strata, partial(resampling.auprc, positive, score)),
        Metric("f1"): _measured(f1, strata, partial(resampling.f1, positive, called)),
        Metric("prevalence"): Measured(metrics.prevalence(positive), strata, None),
        Metric("silhouette"): _measured(silhouette, strata, of_resamples),
    }
    if len(primary.classes) > 2:
        for label in primary.classes:
            measured[Metric("auroc", label=label)] = _auroc(table, primary, label, strata)
    return measured


def _strata(table: pd.DataFrame, primary: Target) -> NDArray[np.str_]:
    """Return what patients are resampled within: their class, or nothing for a regression."""
    if primary.kind == "regression":
        return np.full(len(table), "")
    return table[primary.name].to_numpy(dtype=str)


def scores_of(
    table: pd.DataFrame, target: Target, label: str
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return who is of a class, and the probability of it."""
    positive = (table[target.name] == label).to_numpy()
    return positive, table[f"{target.name}_{label}"].to_numpy(dtype=float)


def numbers_of(
    table: pd.DataFrame, target: Target
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return measured and predicted values."""
    truth, predicted = table[target.name], table[f"{target.name}_pred"]
    return truth.to_numpy(dtype=float), predicted.to_numpy(dtype=float)


def _auroc(table: pd.DataFrame, target: Target, label: str, strata: NDArray[np.str_]) -> Measured:
    scores = scores_of(table, target, label)
    return _measured(metrics.auroc(*scores), strata, partial(resampling.auroc, *scores))


def _pearson(table: pd.DataFrame, target: Target, strata: NDArray[np.str_]) -> Measured:
    numbers = numbers_of(table, target)
    return _measured(metrics.pearson(*numbers), strata, partial(resampling.pearson, *numbers))


def _measured(score: Score, strata: NDArray[np.str_], resampled: Resampled) -> Measured:
    return Measured(score, strata, None if score.reason else resampled)


def summarise_metrics(
    results: Sequence[FoldResult], targets: Sequence[Target], seed: int
) -> dict[Metric, MetricSummary]:
    """Return every figure in every fold, its mean, its spread and its bootstrap intervals."""
    return summarise_folds([measure_fold(result, targets) for result in results], seed)


def summarise_folds(
    folds: Sequence[Mapping[Metric, Measured]], seed: int
) -> dict[Metric, MetricSummary]:
    """Return the figures of all folds as `summarise_metrics` does."""
    return {metric: _summarise([fold[metric] for fold in folds], seed) for metric in folds[0]}


def _summarise(measured: Sequence[Measured], seed: int) -> MetricSummary:
    defined = [(each.strata, each.resampled) for each in measured if each.resampled is not None]
    interval = resampling.interval(defined, seed=seed)
    return summary_of([each.score for each in measured], interval)


def summary_of(scores: Sequence[Score], interval: tuple[float, float]) -> MetricSummary:
    """Return what a summary says of a figure's value in each fold, and of its interval."""
    over_folds = metrics.over_folds(scores)
    return MetricSummary(
        folds=[json_or_none(score.value) for score in scores],
        undefined={str(k): s.reason for k, s in enumerate(scores, start=1) if s.reason},
        mean=json_or_none(over_folds.mean),
        sd=json_or_none(over_folds.sd),
        ci95_over_patients=[json_or_none(end) for end in interval],
        ci95_over_folds=[json_or_none(over_folds.low), json_or_none(over_folds.high)],
        folds_with_value=over_folds.folds,
    )
