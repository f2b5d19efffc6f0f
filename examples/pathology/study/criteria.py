"""What methods are compared by, inside and outside the cohort, and when two of them are alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.pathology.cohort.targets import Target
from examples.pathology.results import resampling
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.measuring import (
    Measured,
    measure_fold,
    measure_further,
    numbers_of,
    scores_of,
)
from examples.pathology.results.metrics import Metric
from examples.pathology.results.resampling import (
    Exchange,
    Figure,
    Resampled,
    exchange_ranks,
    exchange_standardised,
    exchange_values,
    pseudo_values,
)
from examples.pathology.settings.cohort import Kind
from examples.pathology.tables.reading import PATIENT

AUROC, AUPRC, SILHOUETTE = Metric("auroc"), Metric("auprc"), Metric("silhouette")
BRIER, CALIBRATION = Metric("brier"), Metric("calibration")
PEARSON, MAE, SPEARMAN = Metric("pearson"), Metric("mae"), Metric("spearman")
NAMES = {
    AUROC: "AUROC",
    AUPRC: "AUPRC",
    SILHOUETTE: "silhouette",
    BRIER: "Brier score",
    CALIBRATION: "calibration in the large",
    PEARSON: "Pearson's r",
    MAE: "mean absolute error",
    SPEARMAN: "Spearman's rho",
}
"""Of figures, in a sentence."""


def heading(metric: Metric, words: str = "{}") -> str:
    """Return the name of a figure at a beginning, in words of its own or alone."""
    text = words.format(NAMES[metric])
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Tested:
    """A method's figures in a fold, its patients in order of their names.

    Args:
        patients: Their names ``(n,)``.
        truth: Who is of the positive class, or the measured number ``(n,)``.
        predicted: The probability of it, or the predicted number ``(n,)``.
        measured: All figures.
    """

    patients: NDArray[np.str_]
    truth: NDArray[Any]
    predicted: NDArray[np.float64]
    measured: Mapping[Metric, Measured]


def tested(result: FoldResult, target: Target) -> Tested:
    """Measure the patients of a fold whose target is known."""
    result = result.by_name()
    known = (result.predictions[target.name] != "").to_numpy()
    table = result.predictions[known]
    result = replace(result, predictions=table, embeddings=result.embeddings[known])
    numbers = target.kind == "regression"
    truth, predicted = (
        numbers_of(table, target) if numbers else scores_of(table, target, target.positive)
    )
    measured = {**measure_fold(result, [target]), **measure_further(result, target)}
    return Tested(table[PATIENT].to_numpy(dtype=str), truth, predicted, measured)


@dataclass(frozen=True)
class Paired:
    """Two methods on the same patients of a fold, by one criterion.

    Args:
        value: The first method's figure minus the second's.
        strata: What patients are resampled within ``(n,)``.
        resampled: The same difference for resampled patients, or without some of them.
        exchange: The methods' results of a patient, to be exchanged; made when it is asked for.
    """

    value: float
    strata: NDArray[np.str_]
    resampled: Resampled
    exchange: Callable[[], Exchange]


Exchanging = Callable[[Tested, Tested, Metric], Exchange]


@dataclass(frozen=True)
class Criterion:
    """What methods are compared by.

    Args:
        metric: The figure.
        cohort: Of whom: ``internal``, or of the ensemble on the ``external`` cohort.
        exchange: What two methods may exchange of a patient if they are alike in this.
    """

    metric: Metric
    cohort: str
    exchange: Exchanging = field(compare=False, repr=False)

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return NAMES[self.metric] + " (external, ensemble)" * (self.cohort == "external")

    def compare(self, ours: Tested, theirs: Tested) -> Paired | None:
        """Compare two methods on the same patients; ``None`` if a figure is not defined of them."""
        one, other = ours.measured[self.metric], theirs.measured[self.metric]
        if one.resampled is None or other.resampled is None:
            return None
        if self.metric == SILHOUETTE and np.unique(one.strata, return_counts=True)[1].min() < 2:
            return None  # without the only patient of a class, which pseudo-values ask for
        return Paired(
            one.score.value - other.score.value,
            one.strata,
            _minus(one.resampled, other.resampled),
            partial(self.exchange, ours, theirs, self.metric),
        )


def _minus(one: Resampled, other: Resampled) -> Resampled:
    return lambda weights: one(weights) - other(weights)


def _exchange_ranks(ours: Tested, theirs: Tested, _: Metric, *, figure: Figure) -> Exchange:
    return exchange_ranks(ours.truth, ours.predicted, theirs.predicted, figure)


def _exchange_pseudo_values(ours: Tested, theirs: Tested, metric: Metric) -> Exchange:
    figures = (each.measured[metric].resampled for each in (ours, theirs))
    values = [pseudo_values(f, len(ours.patients)) for f in figures if f is not None]
    return exchange_values(*values)


def _exchange_values(ours: Tested, theirs: Tested, metric: Metric) -> Exchange:
    errors = (np.abs(each.predicted - each.truth) for each in (ours, theirs))
    return exchange_values(*(e**2 if metric == BRIER else e for e in errors))


def _exchange_standardised(ours: Tested, theirs: Tested, _: Metric) -> Exchange:
    return exchange_standardised(ours.truth, ours.predicted, theirs.predicted)


def _in_both(metric: Metric, exchange: Exchanging) -> tuple[Criterion, Criterion]:
    inside = Criterion(metric, "internal", exchange)
    return inside, replace(inside, cohort="external")


CRITERIA: Mapping[Kind, tuple[Criterion, ...]] = {
    "classification": (
        *_in_both(AUROC, partial(_exchange_ranks, figure=resampling.auroc)),
        *_in_both(AUPRC, partial(_exchange_ranks, figure=resampling.auprc)),
        Criterion(SILHOUETTE, "internal", _exchange_pseudo_values),
        *_in_both(BRIER, _exchange_values),
        *_in_both(CALIBRATION, _exchange_pseudo_values),
    ),
    "regression": (
        *_in_both(PEARSON, _exchange_standardised),
        *_in_both(MAE, _exchange_values),
        *_in_both(SPEARMAN, partial(_exchange_ranks, figure=resampling.spearman)),
    ),
}
"""By the kind of the primary target."""
