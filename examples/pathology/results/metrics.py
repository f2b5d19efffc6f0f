"""Arrays in, numbers out: what a cross-validated biomarker model is judged by.

Every figure of a fold is a `Score`: a number, or NaN with the reason why there is none. A fold
whose test part holds one class only has no AUROC; that is a fact to report, not a reason to crash
or to invent 0.5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn import metrics as sklearn_metrics

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "prevalence": "Prevalence",
    "silhouette": "Silhouette of [cls]",
    "pearson": "Pearson r",
    "mae": "Mean absolute error",
    "spearman": "Spearman rho",
    "brier": "Brier score",
    "calibration": "Calibration in the large",
}
LOWER_IS_BETTER = ("mae", "brier", "calibration")
LIMITS = {
    **dict.fromkeys(("pearson", "spearman", "silhouette"), (-1.0, 1.0)),
    "mae": (0.0, math.inf),
}


@dataclass(frozen=True)
class Metric:
    """Which figure, and of what; as text its name in ``metrics.json``.

    Args:
        figure: One of `TITLES`.
        auxiliary: The auxiliary target that it is of; empty: the primary one.
        label: The class that is told from all others; empty: the positive one.
    """

    figure: str
    auxiliary: str = ""
    label: str = ""

    @classmethod
    def read(cls, name: str) -> "Metric":
        """Return the metric that has a name in ``metrics.json``."""
        figure = name.partition("/")[0].partition(" of ")[0]
        of = name.removeprefix(figure)
        if of.startswith("/"):
            return cls(figure, auxiliary=of[1:])
        return cls(figure, label=of.removeprefix(" of "))

    def __str__(self) -> str:
        if self.label:
            return f"{self.figure} of {self.label}"
        return f"{self.figure}/{self.auxiliary}" if self.auxiliary else self.figure

    @property
    def sign(self) -> int:
        """1 if higher is better, -1 if lower is."""
        return -1 if self.figure in LOWER_IS_BETTER else 1

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value that it can have."""
        return LIMITS.get(self.figure, (0.0, 1.0))

    @property
    def title(self) -> str:
        """Its name in words."""
        title = TITLES[self.figure]
        if self.label:
            return f"{title} of {self.label} against the rest"
        return f"{title}, {self.auxiliary}" if self.auxiliary else title


@dataclass(frozen=True)
class Score:
    """A number, or NaN and why.

    Args:
        value: The number; NaN if it is not defined.
        reason: Why it is not defined; empty otherwise.
    """

    value: float
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """A figure over the folds of one cross-validation.

    Args:
        mean: Mean over the folds that have a value; NaN if none has.
        sd: Sample standard deviation over those folds (n - 1); NaN below two.
        low: Lower end of the 95 % t-interval of the mean over folds; NaN below two.
        high: Its upper end. Folds share training patients, so that the interval is too narrow as
            one for the population: it describes the spread over folds.
        folds: How many folds have a value.
    """

    mean: float
    sd: float
    low: float
    high: float
    folds: int


def auroc(positive: ArrayLike, score: ArrayLike) -> Score:
    """Area under the ROC curve: the chance that a positive patient scores above a negative one.

    Args:
        positive: ``(n,)``, true for patients of the positive class.
        score: ``(n,)``, higher means more likely positive; ties count half.
    """
    return _of_both_classes(sklearn_metrics.roc_auc_score, positive, score)


def auprc(positive: ArrayLike, score: ArrayLike) -> Score:
    """Average precision, whose chance level is the `prevalence`; otherwise as `auroc`."""
    return _of_both_classes(sklearn_metrics.average_precision_score, positive, score)


def f1(positive: ArrayLike, score: ArrayLike, threshold: float) -> Score:
    """F1 of the positive class, called where the score is at least the threshold.

    Args:
        positive: ``(n,)``, true for patients of the positive class.
        score: ``(n,)``, higher means more likely positive.
        threshold: From `best_threshold` on other patients; NaN if there was none.
    """
    if math.isnan(threshold):
        return Score(math.nan, "no threshold: the validation part has one class only")
    called = np.asarray(score, dtype=float) >= threshold
    return _of_both_classes(sklearn_metrics.f1_score, positive, called)


def best_threshold(positive: ArrayLike, score: ArrayLike) -> float:
    """Return the lowest score whose use as a threshold gives the highest F1; NaN for one class.

    Args:
        positive: ``(n,)``, true for patients of the positive class.
        score: ``(n,)``, higher means more likely positive.
    """
    truth, scores = np.asarray(positive, dtype=bool), np.asarray(score, dtype=float)
    if truth.all() or not truth.any():
        return math.nan
    candidates = np.unique(scores)
    reached = [sklearn_metrics.f1_score(truth, scores >= c) for c in candidates]
    return float(candidates[int(np.argmax(reached))])


def threshold_at(positive: ArrayLike, score: ArrayLike, sensitivity: float) -> float:
    """Return the highest threshold with a sensitivity of at least this; NaN without positives.

    Args:
        positive: ``(n,)``, true for patients of the positive class.
        score: ``(n,)``, higher means more likely positive; at least the threshold is called so.
        sensitivity: Above 0 and at most 1.
    """
    found = np.sort(np.asarray(score, dtype=float)[np.asarray(positive, dtype=bool)])[::-1]
    if len(found) == 0:
        return math.nan
    reached = np.arange(1, len(found) + 1) / len(found)  # divided as the sensitivity was rounded
    return float(found[int(np.argmax(reached >= sensitivity))])


def prevalence(positive: ArrayLike) -> Score:
    """Share of positive patients: what a random score reaches in AUPRC."""
    truth = np.asarray(positive, dtype=bool)
    return Score(float(truth.mean())) if len(truth) else Score(math.nan, "no patients")


def silhouette(embedding: ArrayLike, label: ArrayLike) -> Score:
    """Mean silhouette of embeddings by **true** class, Euclidean, between -1 and 1.

    Args:
        embedding: ``(n, d)``, the [cls] embedding of each patient.
        label: ``(n,)``, the true class.
    """
    points, labels = np.asarray(embedding, dtype=float), np.asarray(label)
    classes = len(np.unique(labels))
    if classes < 2:
        return Score(math.nan, "one class only")
    if classes >= len(labels):
        return Score(math.nan, "every patient is a class of its own")
    return Score(float(sklearn_metrics.silhouette_samples(points, labels).mean()))


def pearson(truth: ArrayLike, predicted: ArrayLike) -> Score:
    """Pearson correlation of the measured and the predicted value.

    Args:
        truth: ``(n,)``, measured.
        predicted: ``(n,)``, predicted, in any linear unit.
    """
    return _of_varying(lambda x, y: np.corrcoef(x, y)[0, 1], truth, predicted)


def spearman(truth: ArrayLike, predicted: ArrayLike) -> Score:
    """Pearson correlation of the ranks, equal values having their mean rank; as `pearson`."""
    return _of_varying(lambda x, y: stats.spearmanr(x, y).statistic, truth, predicted)


def _of_varying(figure: Callable[..., float], truth: ArrayLike, predicted: ArrayLike) -> Score:
    x, y = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    if len(x) < 3:
        return Score(math.nan, f"{len(x)} patients with a value")
    # A spread that is rounding only would give a meaningless correlation.
    for name, values in (("measured", x), ("predicted", y)):
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return Score(math.nan, f"all {name} values are equal")
    return Score(float(figure(x, y)))


def brier(positive: ArrayLike, probability: ArrayLike) -> Score:
    """Mean squared distance between a probability and what came true, 1 or 0; lower is better.

    Args:
        positive: ``(n,)``, true for patients of the positive class.
        probability: ``(n,)``, of being one.
    """
    return _mean((np.asarray(probability, dtype=float) - np.asarray(positive, dtype=float)) ** 2)


def calibration(positive: ArrayLike, probability: ArrayLike) -> Score:
    """Calibration in the large: how far the mean probability is from the share of positives.

    0 is best. It says nothing of single patients: always to say the prevalence reaches it
    (Van Calster et al. 2019, doi:10.1186/s12916-019-1466-7). Otherwise as `brier`.
    """
    found = _mean(np.asarray(probability, dtype=float) - np.asarray(positive, dtype=float))
    return replace(found, value=abs(found.value))


def mean_absolute_error(truth: ArrayLike, predicted: ArrayLike) -> Score:
    """Mean distance between measured and predicted values, in their unit.

    Args:
        truth: Measured values ``(n,)``.
        predicted: Predicted values ``(n,)``.
    """
    return _mean(np.abs(np.asarray(truth, dtype=float) - np.asarray(predicted, dtype=float)))


def _mean(values: NDArray[np.float64]) -> Score:
    return Score(float(values.mean())) if len(values) else Score(math.nan, "no patients")


def over_folds(scores: Sequence[Score]) -> Summary:
    """Summarise one figure over folds, leaving out those where it is not defined."""
    values = np.array([s.value for s in scores if not math.isnan(s.value)])
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    sd = float(values.std(ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return Summary(mean, sd, mean - half, mean + half, n)


def mean_curve(
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], grid: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of ROC curves at common false positive rates.

    Args:
        curves: ``(false positive rates, true positive rates)`` of each fold.
        grid: Rates ``(k,)`` at which to average, from 0 to 1.

    Returns:
        Mean and sample standard deviation ``(k,)``; the latter is 0 for a single curve.
    """
    rows = np.stack([np.interp(grid, x, y) for x, y in curves])
    rows[:, 0] = 0.0  # a vertical start would be read at its upper end
    spread = rows.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(grid))
    return rows.mean(axis=0), spread


def paired_difference(ours: Sequence[Score], theirs: Sequence[Score]) -> Summary:
    """Summarise the difference fold by fold of two methods that were run on the same splits.

    Raises:
        ValueError: The numbers of folds differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"Both methods must have the same folds, but got {len(ours)} and {len(theirs)}."
        )
    pairs = zip(ours, theirs, strict=True)
    return over_folds([Score(a.value - b.value, a.reason or b.reason) for a, b in pairs])


def _of_both_classes(figure: Callable[..., float], positive: ArrayLike, score: ArrayLike) -> Score:
    truth = np.asarray(positive, dtype=bool)
    if len(truth) == 0:
        return Score(math.nan, "no patients")
    if truth.all() or not truth.any():
        return Score(math.nan, "one class only")
    return Score(float(figure(truth, np.asarray(score))))
