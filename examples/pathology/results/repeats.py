"""How sure a figure is where training was repeated: over patients and trained models at once.

The variance is that of many readers and many cases (Obuchowski and Rockette 1995): a trained model
is a reader, a patient is a case, and every fold has patients and models of its own. For a figure D
of K folds and S seeds, or for the difference of two methods in it, the mean has

    variance = (M + P) / K², where M = sum over folds of s² / S and P = sum over folds of C

s² is the variance of D over seeds. C is its covariance over patients between two seeds, by the
jackknife: what all models of a fold find in its patients alike. What training on other patients
would change is in neither.

M is known from K (S - 1) degrees of freedom only, which may be one; P from all patients. A t-test
with the degrees of freedom of both together (Satterthwaite) is wrong too often where they are few.
Half of the interval is the square root of z² P + t² M over K instead, with the quantiles of the
normal and of the t-distribution (Banerjee 1960, Sankhya 22, 357): whatever M and P are, it holds at
least as often as it says, since the distribution function of chi-square with one degree is concave.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from examples.pathology.cohort.targets import Target
from examples.pathology.common.files import json_or_none
from examples.pathology.results.measuring import (
    Measured,
    measure_fold,
    measure_further,
    summary_of,
)
from examples.pathology.results.metrics import Metric, Score
from examples.pathology.results.resampling import without_each
from examples.pathology.results.runs import Run
from examples.pathology.results.summary import Metrics, MetricSummary
from examples.pathology.tables.reading import PATIENT

ROUNDING = 1e-12  # of a difference
LEAST = 1e-16  # of half a p


@dataclass(frozen=True)
class Repeated:
    """A figure of one fold from every seed.

    Args:
        values: ``(s,)``, of each seed.
        without: The same without each patient ``(s, n)``.
        strata: Within what patients are drawn ``(n,)``: the classes keep their sizes.
    """

    values: NDArray[np.float64]
    without: NDArray[np.float64]
    strata: NDArray[np.str_]

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Over patients, of the figures of each two seeds ``(s, s)``: the jackknife by strata.

        Of AUROCs it is DeLong's. The only patient of a stratum adds nothing.
        """
        total = np.zeros([len(self.values)] * 2)
        for stratum in np.unique(self.strata):
            part = self.without[:, self.strata == stratum]
            centred = part - part.mean(axis=1, keepdims=True)
            total += (1 - 1 / part.shape[1]) * centred @ centred.T
        return total


class Estimate(NamedTuple):
    """A mean over folds and seeds; NaN if no fold has the figure from every seed.

    `low` and `high` are the ends of its 95 % interval, `p` is two-sided against 0, `error` is its
    standard error, `df` are the degrees of freedom of what seeds add to it, and `sd` is the
    standard deviation over seeds of the mean over folds.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    error: float = math.nan
    df: int = 0
    sd: float = math.nan
    folds: int = 0


def repeated(figures: Sequence[Measured]) -> Repeated | None:
    """Return one figure, or difference, of one fold from every seed.

    Args:
        figures: Of each seed, the patients in one order.

    Returns:
        ``None`` if it is not defined from one seed, or not without one of the patients.
    """
    strata, rows = figures[0].strata, []
    for figure in figures:
        if figure.resampled is None:
            return None
        rows.append(without_each(figure.resampled, len(strata)))
    values, without = np.array([each.score.value for each in figures]), np.stack(rows)
    return None if np.isnan(without).any() else Repeated(values, without, strata)


def estimate(folds: Sequence[Repeated | None]) -> Estimate:
    """Return the mean over folds and seeds, and how sure it is, from at least two seeds.

    Folds of ``None`` are left out. Where neither seeds nor patients change anything, the interval
    is the value alone.
    """
    known = [each for each in folds if each is not None]
    if not known:
        return Estimate()
    values = np.stack([each.values for each in known])
    k, s = values.shape
    others = ~np.eye(s, dtype=bool)
    of_patients = sum(max(float(each.covariance[others].mean()), 0.0) for each in known) / k**2
    of_models = float(values.var(axis=1, ddof=1).sum()) / s / k**2
    value, df = float(values.mean()), k * (s - 1)

    def half(tail: float) -> float:
        """Return half of the interval that leaves out so much on either side."""
        z, t = special.ndtri(tail), special.stdtrit(df, tail)
        return math.sqrt(z**2 * of_patients + t**2 * of_models)

    def excess(logarithm: float) -> float:
        return half(math.exp(logarithm)) - abs(value)

    if abs(value) < ROUNDING:
        p = 1.0
    elif half(LEAST) <= abs(value):
        p = 2 * LEAST
    else:
        p = 2 * math.exp(optimize.brentq(excess, math.log(LEAST), math.log(0.5)))
    low, high = value - half(0.025), value + half(0.025)
    sd = float(values.mean(axis=0).std(ddof=1))
    return Estimate(value, low, high, p, math.sqrt(of_models + of_patients), df, sd, k)


@dataclass(frozen=True)
class RepeatedSummary(MetricSummary):
    """A metric of several seeds: each fold has the mean over them.

    Args:
        ci95_over_patients: Over patients and trained models.
        seeds: How many.
        sd_over_seeds: Of the mean over folds.
    """

    seeds: int
    sd_over_seeds: float | None


def over_seeds(runs: Sequence[Run]) -> Metrics:
    """Return all figures of one method over its seeds: of a single one, those of its summary.

    Where all models of a run are tested on the same patients, their mean is one reader.

    Args:
        runs: Of each seed, on the same patients.
    """
    if len(runs) == 1:
        return runs[0].metrics
    seeds = [[_by_name(run, k) for k in range(len(run.results))] for run in runs]
    crossed = len({patients for patients, _ in seeds[0]}) < len(seeds[0])
    found = {}
    for metric in runs[0].metrics:
        folds = [[fold[metric] for _, fold in each] for each in zip(*seeds, strict=True)]
        found[metric] = _summarise(folds, metric.limits, crossed=crossed)
    return found


def _by_name(run: Run, fold: int) -> tuple[tuple[str, ...], Mapping[Metric, Measured]]:
    """Return who was tested in a fold, and their figures, in order of their names."""
    result = run.results[fold].by_name()
    targets = [t for t in run.summary.targets if t.kind == "regression" or t.classes]
    named = {target.name for target in targets}
    numbers = (m.auxiliary for m in run.metrics if m.figure == "pearson" and m.auxiliary)
    targets += [Target(name, "regression") for name in numbers if name not in named]
    measured = {**measure_fold(result, targets), **measure_further(result, targets[0])}
    # Older summaries do not say which auxiliary class is positive: there is no interval.
    for metric in run.metrics.keys() - measured.keys():
        measured[metric] = Measured(run.metrics[metric].scores[fold], np.array([]), None)
    return tuple(result.predictions[PATIENT]), measured


def _summarise(
    folds: Sequence[Sequence[Measured]], limits: tuple[float, float], *, crossed: bool
) -> RepeatedSummary:
    samples = [repeated(figures) for figures in folds]
    scores = [_score(*each) for each in zip(folds, samples, strict=True)]
    known = [each for each in samples if each is not None]
    if crossed and known:
        values, without = (
            np.mean([getattr(each, name) for each in known], axis=0)
            for name in ("values", "without")
        )
        known = [Repeated(values, without, known[0].strata)]
    found = estimate(known)
    ends = np.clip([found.low, found.high], *limits)  # the truth is nowhere else
    of_folds = vars(summary_of(scores, (float(ends[0]), float(ends[1]))))
    return RepeatedSummary(**of_folds, seeds=len(folds[0]), sd_over_seeds=json_or_none(found.sd))


def _score(figures: Sequence[Measured], sample: Repeated | None) -> Score:
    """Return the mean over seeds of a fold, or why there is none."""
    missing = [each.score.reason for each in figures if each.score.reason]
    if missing:
        return Score(math.nan, missing[0])
    if sample is None and figures[0].resampled is not None:
        return Score(math.nan, "not defined without one of the patients")
    return Score(float(np.mean([each.score.value for each in figures])))
