"""What ``metrics.json`` of a run says, read and written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from examples.pathology.cohort.targets import Target
from examples.pathology.common.files import json_or_none
from examples.pathology.results.metrics import Metric, Score, Summary


@dataclass(frozen=True)
class MetricSummary:
    """A metric of a run.

    Args:
        scores: In every fold.
        over_folds: Mean and spread over the folds.
        low: Lower end of the mean's 95 % bootstrap interval over patients; NaN without any value.
        high: Its upper end.
    """

    scores: tuple[Score, ...]
    over_folds: Summary
    low: float
    high: float

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> MetricSummary:
        """Return what `to_json` gave."""
        reasons = stored["undefined"]
        mean, sd = _or_nan(stored["mean"]), _or_nan(stored["sd"])
        low, high = map(_or_nan, stored["ci95_over_folds"])
        return cls(
            tuple(
                Score(_or_nan(value), reasons.get(str(k), ""))
                for k, value in enumerate(stored["folds"], start=1)
            ),
            Summary(mean, sd, low, high, stored["folds_with_value"]),
            *map(_or_nan, stored["ci95_over_patients"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it: None for NaN."""
        over = self.over_folds
        return {
            "folds": [json_or_none(score.value) for score in self.scores],
            "undefined": {str(k): s.reason for k, s in enumerate(self.scores, start=1) if s.reason},
            "mean": json_or_none(over.mean),
            "sd": json_or_none(over.sd),
            "ci95_over_patients": [json_or_none(self.low), json_or_none(self.high)],
            "ci95_over_folds": [json_or_none(over.low), json_or_none(over.high)],
            "folds_with_value": over.folds,
        }


Metrics = Mapping[Metric, MetricSummary]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What is known of a run, or of its deployment, which has no folds, epochs and splits.

    Args:
        method: Name of the balancer.
        targets: What is predicted, the primary target first.
        positives: How many patients are of its positive class.
        values: Lowest, highest, mean and sd of a primary target that is a number.
        patients: How many are tested.
        training_only: How many more are trained on for other targets only.
        complete_cases: Whether all patients have all targets.
        max_tiles: Tiles drawn of a patient in an epoch; ``None``: all.
        width: Of the Transformer.
        layers: Of the Transformer.
        precision: Of the training.
        tiles: Of all patients together.
        funnel: ``(stage, count)`` of the patients, from the table to those used.
        extractor: Name of the network behind the features.
        random_weights: Whether it had random weights.
        simulated: A sentence that says so if features or labels are simulated.
        note: A warning of the user's, for every figure.
        seed: Of everything drawn.
        splits_sha256: The same for runs with the same folds.
        best_epochs: Epoch kept in each fold.
        epochs: Run in each fold.
        seconds: Of training, each fold.
        thresholds: From which patients are called positive, each fold; ``None``: not defined.
        share_waiting_for_data: Of the training time; ``None`` if no time was kept.
        metrics: All figures.
    """

    method: str
    targets: tuple[Target, ...]
    positives: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    patients: int
    training_only: int = 0
    complete_cases: bool = False
    max_tiles: int | None = None
    width: int = 0
    layers: int = 0
    precision: str = ""
    tiles: int = 0
    funnel: Sequence[tuple[str, int]]
    extractor: str
    random_weights: bool
    simulated: str = ""  # runs of 0.1.0 do not say
    note: str
    seed: int = 0
    splits_sha256: str = ""
    best_epochs: Sequence[int] = ()
    epochs: Sequence[int] = ()
    seconds: Sequence[float] = ()
    thresholds: Sequence[float | None] = ()
    share_waiting_for_data: float | None = None
    metrics: Metrics

    @property
    def primary(self) -> Target:
        """The primary target."""
        return self.targets[0]

    @property
    def caption(self) -> str:
        """The warning that belongs under every figure."""
        return warning_of(self.note, self.simulated, random_weights=self.random_weights)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RunSummary:
        """Return what ``metrics.json`` says of a run or a deployment, of earlier releases too."""
        primary = Target(
            stored["target"],
            stored.get("kind", "classification"),  # earlier runs have no other
            tuple(stored.get("classes", ())),
            stored.get("positive", ""),
            stored.get("cutoff"),
        )
        auxiliary = (Target(t["name"], t["kind"]) for t in stored.get("auxiliary", ()))
        names = {each.name for each in fields(cls)} - {"metrics"}
        return cls(
            targets=(primary, *auxiliary),
            metrics=metrics_from_json(stored["metrics"]),
            **{name: value for name, value in stored.items() if name in names},
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``metrics.json`` of a cross-validation holds."""
        plain = dict(vars(self))
        for name in ("method", "targets", "positives", "values", "metrics"):
            del plain[name]
        if self.primary.kind == "regression":
            del plain["thresholds"]
        return {
            "format": 1,
            "method": self.method,
            **primary_json(self.primary, self.positives, self.values),
            "auxiliary": [{"name": t.name, "kind": t.kind} for t in self.targets[1:]],
            **plain,
            "metrics": metrics_json(self.metrics),
        }


def primary_json(
    target: Target, positives: int = 0, values: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return what a summary says of the primary target.

    Args:
        target: The primary target.
        positives: How many patients are of its positive class.
        values: What its numbers are like; empty if nobody has one.
    """
    about: dict[str, Any] = {"target": target.name, "kind": target.kind}
    if target.kind == "regression":
        return {**about, **({"values": values} if values else {})}
    cut = {} if target.cutoff is None else {"cutoff": target.cutoff}
    classes = {"classes": list(target.classes), "positive": target.positive}
    return {**about, **classes, **cut, "positives": positives}


def metrics_json(metrics: Metrics) -> dict[str, Any]:
    """Return figures by their names, as JSON can hold them."""
    return {str(metric): value.to_json() for metric, value in metrics.items()}


def metrics_from_json(stored: Mapping[str, Any]) -> dict[Metric, MetricSummary]:
    """Return what `metrics_json` gave."""
    return {Metric.read(name): MetricSummary.from_json(value) for name, value in stored.items()}


def warning_of(note: str, simulated: str, *, random_weights: bool) -> str:
    """Return the warning that belongs under every figure.

    Args:
        note: The user's.
        simulated: A sentence that says so if features or labels are simulated.
        random_weights: Whether features come from a network with random weights.
    """
    note = note.strip().rstrip(".")
    parts = [f"{note}." if note else "", simulated]
    if random_weights:
        parts.append("Features come from a network with RANDOM weights and carry no biology.")
    return " ".join(part for part in parts if part)


def read_summary(folder: Path) -> RunSummary:
    """Read ``metrics.json`` of a finished run or of a deployment."""
    return RunSummary.from_json(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
