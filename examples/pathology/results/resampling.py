"""How sure a figure is: what it would be had other patients been drawn, and between two methods.

A resample of n patients is a row of n whole weights, how often each was drawn. All figures are
computed from weights for all resamples at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.spatial import distance

RESAMPLES = 2000
PERMUTATIONS = 9999
BLOCK = 1000  # permutations at a time, which bounds the memory
Weights = NDArray[np.float64]
Resampled = Callable[[Weights], NDArray[np.float64]]
Figure = Callable[[ArrayLike, ArrayLike, Weights], NDArray[np.float64]]  # such as `auroc`
Swaps = NDArray[np.float64]


def draw_weights(
    strata: NDArray[np.str_], resamples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Draw how often each patient is in each resample; every stratum keeps its size.

    Args:
        strata: ``(n,)``, the class of each patient: so no resample loses a class.
        resamples: How many.
        random: Of the draw.

    Returns:
        ``(resamples, n)`` whole numbers.
    """
    weights = np.zeros((resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = random.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=resamples
        )
    return weights


def auroc(positive: ArrayLike, score: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Area under the ROC curve of every resample ``(b,)``; ties count half."""
    truth, scores = np.asarray(positive, dtype=bool), np.asarray(score, dtype=float)
    wins = np.sign(scores[truth][:, None] - scores[~truth][None, :]) / 2 + 0.5  # (p, q)
    won = np.einsum("bp,pq,bq->b", weights[:, truth], wins, weights[:, ~truth], optimize=True)
    return _ratio(won, weights[:, truth].sum(axis=1) * weights[:, ~truth].sum(axis=1))


def auprc(positive: ArrayLike, score: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Average precision of every resample ``(b,)``."""
    truth, scores = np.asarray(positive, dtype=bool), np.asarray(score, dtype=float)
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    drawn = weights[:, order]
    found = np.cumsum(drawn * truth[order], axis=1)[:, last_of_tie]
    called = np.cumsum(drawn, axis=1)[:, last_of_tie]
    gained = np.diff(found, axis=1, prepend=0.0)
    return _ratio((gained * _ratio(found, called, 0.0)).sum(axis=1), found[:, -1])


def f1(positive: ArrayLike, called: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """F1 of every resample ``(b,)``; 0 where nobody is positive or called so."""
    truth, claim = np.asarray(positive, dtype=bool), np.asarray(called, dtype=bool)
    hits = weights[:, truth & claim].sum(axis=1)
    return _ratio(2 * hits, weights[:, truth].sum(axis=1) + weights[:, claim].sum(axis=1), 0.0)


def pearson(truth: ArrayLike, predicted: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Pearson correlation of every resample ``(b,)``; NaN where one side does not vary."""
    x, y = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)
    dx = x - (share @ x)[:, None]
    dy = y - (share @ y)[:, None]
    return _correlation(share, dx, dy, 1e-12 * np.abs(x).max() * np.abs(y).max())


def spearman(truth: ArrayLike, predicted: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Spearman correlation of every resample ``(b,)``: of mid-ranks among those drawn.

    NaN where one side does not vary.
    """
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)
    return _correlation(share, _mid_ranks(truth, share), _mid_ranks(predicted, share), 1e-12)


def _mid_ranks(values: ArrayLike, share: Weights) -> NDArray[np.float64]:
    """Return the share of a resample below each value plus half of that at it, minus its mean."""
    numbers = np.asarray(values, dtype=float)
    order = np.argsort(numbers, kind="stable")
    first, place = np.unique(numbers[order], return_index=True, return_inverse=True)[1:]
    at = np.add.reduceat(share[:, order], first, axis=1)
    ranks = np.empty(share.shape)
    ranks[:, order] = (np.cumsum(at, axis=1) - at / 2)[:, place]
    return ranks - 0.5


def _correlation(
    share: Weights, dx: NDArray[np.float64], dy: NDArray[np.float64], least: float
) -> NDArray[np.float64]:
    """Correlate deviations ``(b, n)`` from their means; NaN where they hardly spread."""
    xx, yy, xy = ((share * a).sum(axis=1) for a in (dx * dx, dy * dy, dx * dy))
    spread = np.sqrt(xx * yy)
    return _ratio(xy, np.where(spread > least, spread, 0.0))


def silhouette(embedding: ArrayLike, label: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Mean silhouette of every resample ``(b,)``; NaN where a single class was drawn.

    Each patient is measured against those drawn, so that silhouettes of one resample depend on each
    other as those of one sample do. A patient who was drawn twice is no neighbour of itself.

    Args:
        embedding: ``(n, d)``.
        label: ``(n,)``, the true class.
        weights: ``(b, n)``.
    """
    points, labels = np.asarray(embedding, dtype=float), np.asarray(label)
    distances = distance.squareform(distance.pdist(points))
    own = np.full(weights.shape, math.nan)  # mean distance to the patient's own class
    nearest = np.full(weights.shape, math.inf)  # to the nearest other class
    for name in np.unique(labels):
        members = labels == name
        drawn = weights * members
        neighbours = drawn.sum(axis=1, keepdims=True) - drawn
        average = _ratio(drawn @ distances, neighbours)
        own[:, members] = average[:, members]
        others = np.where(np.isnan(average), math.inf, average)
        nearest[:, ~members] = np.minimum(nearest, others)[:, ~members]
    alone, without_other = np.isnan(own), np.isinf(nearest)
    nearest[without_other] = 0.0  # the whole resample is NaN then
    own[alone] = nearest[alone]  # 0 for the only patient of a class: the usual convention
    each = _ratio(nearest - own, np.maximum(nearest, own), 0.0)
    averages = _ratio((each * weights).sum(axis=1), weights.sum(axis=1))
    averages[(without_other & (weights > 0)).any(axis=1)] = math.nan
    return averages


def mean(values: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Weighted mean of one value per patient, for every resample ``(b,)``."""
    return _ratio(weights @ np.asarray(values, dtype=float), weights.sum(axis=1))


def distance_of_mean(values: ArrayLike, weights: Weights) -> NDArray[np.float64]:
    """Distance of the `mean` from 0 ``(b,)``."""
    return np.abs(mean(values, weights))


def interval(
    folds: Sequence[tuple[NDArray[np.str_], Resampled]], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a figure's mean over folds.

    Patients are resampled within each fold, class by class. The models are taken as they are: the
    interval says how much the figure depends on who was tested, not on who was trained on.

    Args:
        folds: For every fold that has the figure, the strata of its patients, and the function
            that computes the figure of every resample.
        seed: Of the draw.
        resamples: How many.
    """
    if not folds:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    rows = [figure(draw_weights(strata, resamples, random)) for strata, figure in folds]
    means = np.mean(rows, axis=0)
    means = means[~np.isnan(means)]
    if len(means) == 0:
        return math.nan, math.nan
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two scores of the same patients, judged by DeLong's test.

    Args:
        difference: Mean over folds of the first AUROC minus the second.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided p-value of no difference.
        folds: How many folds have both classes.
    """

    difference: float
    low: float
    high: float
    p: float
    folds: int


def compare_auroc(
    folds: Sequence[tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]],
) -> Comparison:
    """Compare two methods on the same folds by the test of DeLong et al. (1988).

    Within a fold the test gives the variance of the difference of two AUROCs of the same patients.
    Folds test different patients, so that the variance of the mean over K folds is their sum over
    K squared. Like the bootstrap interval, it takes the trained models as they are.

    Args:
        folds: For each fold truth ``(n,)``, scores of the first and of the second method ``(n,)``.
    """
    differences, variances = [], []
    for truth, ours, theirs in folds:
        if truth.all() or not truth.any() or min(truth.sum(), (~truth).sum()) < 2:
            continue
        areas, covariance = delong(truth, np.stack([ours, theirs]))
        differences.append(areas[0] - areas[1])
        variances.append(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    k = len(differences)
    if k == 0:
        return Comparison(math.nan, math.nan, math.nan, math.nan, 0)
    difference = float(np.mean(differences))
    error = math.sqrt(max(0.0, float(np.sum(variances)))) / k
    if error < 1e-12:  # the same ranks: no difference, or one without any doubt
        return Comparison(difference, difference, difference, float(abs(difference) < 1e-12), k)
    half = float(stats.norm.ppf(0.975)) * error
    p = 2 * float(stats.norm.sf(abs(difference) / error))
    return Comparison(difference, difference - half, difference + half, p, k)


def delong(
    positive: NDArray[np.bool_], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the AUROCs of several scores of the same patients and their covariance.

    Args:
        positive: ``(n,)``, at least two of each class.
        scores: ``(m, n)``.

    Returns:
        AUROCs ``(m,)`` and covariance ``(m, m)``, by mid-ranks (Sun and Xu 2014).
    """
    p, q = int(positive.sum()), int((~positive).sum())
    ranks = stats.rankdata(scores, axis=1)
    own_p = stats.rankdata(scores[:, positive], axis=1)
    own_q = stats.rankdata(scores[:, ~positive], axis=1)
    v10 = (ranks[:, positive] - own_p) / q  # how many negatives each positive beats
    v01 = 1 - (ranks[:, ~positive] - own_q) / p
    covariance = np.atleast_2d(np.cov(v10)) / p + np.atleast_2d(np.cov(v01)) / q
    return v10.mean(axis=1), covariance


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method; NaN stays and does not count."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


@dataclass(frozen=True)
class Exchange:
    """Two methods on the patients of one fold, whose results can change places patient by patient.

    Args:
        patients: How many.
        difference: From swaps ``(b, patients)``, 1 where the methods change places and 0 where they
            stay, to the first method's figure minus the second's ``(b,)``.
    """

    patients: int
    difference: Callable[[Swaps], NDArray[np.float64]]


def exchange_ranks(
    truth: NDArray[Any], ours: NDArray[np.float64], theirs: NDArray[np.float64], figure: Figure
) -> Exchange:
    """Return two methods that can exchange ranks, compared by a figure of ranks.

    The scores of two methods have different scales, so that a patient's two scores are not
    exchangeable even where the methods are equally good. Their mid-ranks within the fold are, and
    leave both figures as they are (Bandos et al. 2005, doi:10.1002/sim.2149).

    Args:
        truth: ``(n,)``, both classes, or numbers that are not all equal.
        ours: Scores of the first method ``(n,)``.
        theirs: Scores of the second method ``(n,)``.
        figure: `auroc`, `auprc` or `spearman`.
    """
    return _exchange(truth, stats.rankdata(ours), stats.rankdata(theirs), figure)


def exchange_standardised(
    truth: NDArray[np.float64], ours: NDArray[np.float64], theirs: NDArray[np.float64]
) -> Exchange:
    """Return two methods that can exchange standardised predictions, compared by `pearson`.

    As `exchange_ranks`: methods may differ in the unit and the spread of what they predict, and be
    equally good. Standardised within the fold, predictions are exchangeable and leave both
    correlations as they are. To first order, an exchange turns the sign of the difference of a
    patient's influence on them, whose mean is 0 if they are equal: other shapes do not matter.

    Args:
        truth: ``(n,)``, not all equal.
        ours: Predictions of the first method ``(n,)``, not all equal.
        theirs: Likewise of the second.
    """
    return _exchange(truth, stats.zscore(ours), stats.zscore(theirs), pearson)


def _exchange(
    truth: NDArray[Any], ours: NDArray[np.float64], theirs: NDArray[np.float64], figure: Figure
) -> Exchange:
    twice, scores = np.concatenate([truth, truth]), np.concatenate([ours, theirs])

    def difference(swaps: Swaps) -> NDArray[np.float64]:
        kept = 1 - swaps  # a patient's score is weighed 1 for the method that has it, 0 otherwise
        first, second = np.hstack([kept, swaps]), np.hstack([swaps, kept])
        return figure(twice, scores, first) - figure(twice, scores, second)

    return Exchange(len(truth), difference)


def exchange_values(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Exchange:
    """Return two methods that can exchange a patient's values ``(n,)``, compared by the mean."""
    differences = ours - theirs
    return Exchange(len(differences), lambda swaps: (1 - 2 * swaps) @ differences / len(ours))


def pseudo_values(figure: Resampled, patients: int) -> NDArray[np.float64]:
    """Return the jackknife's pseudo-value of each patient ``(n,)``: what it adds to a figure.

    A figure in which patients depend on each other, such as the silhouette, is no mean of
    independent values. Of pseudo-values it nearly is (Tukey 1958): n times the figure of all, minus
    n - 1 times that without the patient. Of a distance from 0 they are signed by its direction, so
    that two as far off in opposite directions are alike, which exchanged predictions are not.

    Args:
        figure: Computes the figure of every resample.
        patients: How many, n.
    """
    everybody = figure(np.ones((1, patients)))
    return patients * everybody - (patients - 1) * without_each(figure, patients)


def without_each(figure: Resampled, patients: int) -> NDArray[np.float64]:
    """Return a figure without each of its patients in turn ``(n,)``."""
    return figure(1 - np.eye(patients))


def permutation_p(
    folds: Sequence[Exchange], *, seed: int, permutations: int = PERMUTATIONS
) -> float:
    """Return the two-sided p-value of a difference's mean over folds, by random exchanges.

    If it made no difference which of two methods a result of a patient came from, the difference
    found would be one draw among those with the methods exchanged at random in each patient. p is
    the share of draws, the one found among them, that are at least as far from 0: never 0 (Phipson
    and Smyth 2010, doi:10.2202/1544-6115.1585). The trained models are taken as they are: that
    training again would give other models is not part of it.

    Args:
        folds: Both methods in every fold that has the figure; NaN without any.
        seed: Of the draw.
        permutations: How many draws.

    Raises:
        ValueError: The figure is not defined in a fold.
    """
    if not folds:
        return math.nan
    found = permuted_differences(folds, [np.zeros((1, fold.patients)) for fold in folds])[0]
    if math.isnan(found):
        raise ValueError("The figure must be defined in every fold, but is NaN in one.")
    random = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, permutations, BLOCK):
        size = min(BLOCK, permutations - start)
        swaps = [random.integers(0, 2, (size, fold.patients)).astype(float) for fold in folds]
        drawn = permuted_differences(folds, swaps)
        extreme += int((np.abs(drawn) >= abs(found) - 1e-12).sum())  # equal but for rounding
    return (1 + extreme) / (1 + permutations)


def permuted_differences(folds: Sequence[Exchange], swaps: Sequence[Swaps]) -> NDArray[np.float64]:
    """Return the mean over folds of the difference ``(b,)`` under each fold's swaps ``(b, n)``."""
    rows = [fold.difference(each) for fold, each in zip(folds, swaps, strict=True)]
    return np.asarray(np.mean(rows, axis=0), dtype=np.float64)


def _ratio(
    above: NDArray[np.float64], below: NDArray[np.float64], otherwise: float = math.nan
) -> NDArray[np.float64]:
    result = np.full(np.broadcast(above, below).shape, otherwise)
    np.divide(above, below, out=result, where=below != 0)
    return result
