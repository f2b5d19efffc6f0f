"""What ``metrics.json`` of a run says, read and written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import listing
from examples.pathology.common.files import whole
from examples.pathology.results.metrics import Metric, Score
from examples.pathology.settings.cohort import Kind


@dataclass(frozen=True)
class MetricSummary:
    """A metric of a run; None where it is not defined.

    Args:
        folds: Its value in each fold.
        undefined: Why a fold has none, by its number, from ``1``.
        mean: Over the folds that have one.
        sd: Over them.
        ci95_over_patients: Bootstrap interval of the mean: had other patients been tested.
        ci95_over_folds: t-interval of the mean.
        folds_with_value: How many have one.
    """

    folds: Sequence[float | None]
    undefined: Mapping[str, str]
    mean: float | None
    sd: float | None
    ci95_over_patients: Sequence[float | None]
    ci95_over_folds: Sequence[float | None]
    folds_with_value: int

    @property
    def scores(self) -> list[Score]:
        """Its value in each fold, NaN with the reason where it is not defined."""
        return [
            Score(math.nan if value is None else value, self.undefined.get(str(k), ""))
            for k, value in enumerate(self.folds, start=1)
        ]


Metrics = Mapping[Metric, MetricSummary]


def _auxiliary_target(stored: Mapping[str, Any]) -> Target:
    classes, positive = tuple(stored.get("classes", ())), stored.get("positive", "")
    return Target(stored["name"], stored["kind"], classes, positive)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run, or its deployment, which says nothing of training.

    Args:
        method: Name of the balancer.
        target: The primary target.
        kind: What it is.
        classes: Its classes in order of the logits; a regression has none.
        positive: The class whose AUROC is reported.
        cutoff: Where numbers were cut into two classes; ``None``: nowhere.
        positives: How many patients are of the positive class.
        values: ``lowest``, ``highest``, ``mean`` and ``sd`` of a regression.
        auxiliary: ``name`` and ``kind`` of every other target; of classes also ``classes`` and
            ``positive``, which older runs lack.
        patients: How many are tested.
        training_only: How many more are trained on, for other targets only.
        complete_cases: Whether all patients have all targets.
        max_tiles: Tiles drawn of a patient in an epoch; ``None``: all.
        width: Of the Transformer.
        layers: Of the Transformer.
        precision: Of the training.
        tiles: Of all patients together.
        funnel: Each stage from the clinical table to the patients used, and how many are left.
        extractor: Name of the network behind the features.
        random_weights: Whether it had random weights.
        simulated: A sentence that says so if features or labels are simulated.
        note: What the user wants to stand under every figure.
        seed: Of all that was drawn.
        splits_sha256: Equal for runs on equal folds.
        best_epochs: The epoch that was kept, in each fold.
        epochs: How many were run, in each fold.
        seconds: How long it took, in each fold.
        search: Of the candidate that each fold kept, ``learning_rate``, ``weight`` (of `fixed`) and
            ``validation_loss``, and how many ``candidates`` there were; none without a search.
        thresholds: From which a patient is called positive, in each fold; ``None``: not defined.
        share_waiting_for_data: Of the time of training; ``None``: not known.
        metrics: All figures.
        run: The run that was deployed, and of its deployment:
        labelled: How many patients have a label.
        trained_on: Those who have the name of a patient that the run was trained on.
        threshold_of_ensemble: The mean of the thresholds.
        metrics_of_ensemble: All figures of the mean of the models.
    """

    method: str
    target: str
    kind: Kind = "classification"  # runs of earlier releases do not say
    classes: Sequence[str] = ()
    positive: str = ""
    cutoff: float | None = None
    positives: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    auxiliary: Sequence[Mapping[str, Any]] = ()
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
    simulated: str = ""  # runs of earlier releases do not say
    note: str
    seed: int = 0
    splits_sha256: str = ""
    best_epochs: Sequence[int] = ()
    epochs: Sequence[int] = ()
    seconds: Sequence[float] = ()
    search: Sequence[Mapping[str, float]] = ()
    thresholds: Sequence[float | None] = ()
    share_waiting_for_data: float | None = None
    metrics: Metrics
    run: str = ""
    labelled: int | None = None
    trained_on: Sequence[str] = ()
    threshold_of_ensemble: float | None = None
    metrics_of_ensemble: Metrics = field(default_factory=dict)

    @property
    def targets(self) -> list[Target]:
        """What is predicted, the primary target first."""
        primary = Target(self.target, self.kind, tuple(self.classes), self.positive, self.cutoff)
        return [primary, *map(_auxiliary_target, self.auxiliary)]

    @property
    def caption(self) -> str:
        """The warning that belongs under every figure."""
        first = warning_of(self.note, self.simulated, random_weights=self.random_weights)
        return " ".join(filter(None, (first, warning_of_training(self.trained_on, self.patients))))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "RunSummary":
        """Return what ``metrics.json`` holds."""
        known = {each.name: stored[each.name] for each in fields(cls) if each.name in stored}
        for name in known.keys() & {"metrics", "metrics_of_ensemble"}:
            figures = known[name].items()
            known[name] = {Metric.read(each): MetricSummary(**value) for each, value in figures}
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """Return what ``metrics.json`` of a cross-validation holds."""
        optional = ["classes", "positive", "cutoff", "values", "search", "thresholds", "run"]
        optional += ["labelled", "trained_on", "threshold_of_ensemble", "metrics_of_ensemble"]
        stored = {
            name: value
            for name, value in vars(self).items()
            if name not in optional or value not in (None, "", (), {})
        }
        if self.kind == "regression":
            del stored["positives"]
        return {"format": 1, **stored, "metrics": metrics_json(self.metrics)}


def metrics_json(metrics: Metrics) -> dict[str, Any]:
    """Return figures by their names, as JSON can hold them."""
    return {str(metric): vars(value) for metric, value in metrics.items()}


def warning_of(note: str, simulated: str, *, random_weights: bool) -> str:
    """Return the warning that belongs under every figure, of what a `RunSummary` says."""
    note = note.strip().rstrip(".")
    random = "Features come from a network with RANDOM weights and carry no biology."
    parts = (f"{note}." if note else "", simulated, random if random_weights else "")
    return " ".join(part for part in parts if part)


def warning_of_training(trained_on: Sequence[str], patients: int) -> str:
    """Return the warning that belongs under figures of patients whom the models have seen."""
    if not trained_on:
        return ""
    return (
        f"{len(trained_on)} of {patients} patients have the name of one that the run was trained "
        f"on ({listing(trained_on, 3)}): if they are the same people, figures are better than for "
        "others, and those of the cross-validation count."
    )


def read_summary(folder: Path) -> "RunSummary":
    """Read ``metrics.json`` of a finished run.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / "metrics.json"
    with whole(path, "Delete it and run the command that made it again: other results stay."):
        return RunSummary.from_json(json.loads(path.read_text(encoding="utf-8")))
