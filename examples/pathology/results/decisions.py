"""What is decided at a threshold, how often that is right, and what the probabilities are worth.

Each patient is judged by the model and the threshold of the fold that tested it, and patients of
all folds are counted together: one fold has so few of a class that its shares mean little.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from examples.pathology.cohort.targets import Target
from examples.pathology.common.files import json_or_none
from examples.pathology.results import metrics, resampling
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.measuring import scores_of
from examples.pathology.results.runs import Run
from examples.pathology.tables.reading import PATIENT

COLUMNS = ["class", "rule", "thresholds", "figure", "value", "ci95_low", "ci95_high"]
COLUMNS += ["patients", "of", "undefined"]
_CELLS, _SCORES = ("tp", "fp", "fn", "tn"), ("brier", "brier_of_prevalence", "skill")
FEW = 5
BINS, SMALLEST_BIN = 10, 20  # of a calibration curve; patients

Choose = Callable[[ArrayLike, ArrayLike], float]
Truth = NDArray[np.bool_]
Floats = NDArray[np.float64]


def decisions(run: Run, sensitivity: float, **names: str) -> pd.DataFrame:
    """Return how often patients are called rightly and wrongly, and the Brier score.

    Args:
        run: Of a classification.
        sensitivity: That the second threshold has at least in the validation part.
        names: Columns that stand first.

    Returns:
        A row per class, rule of the threshold and figure, with `COLUMNS`: ``thresholds`` of the
        folds, ``value`` with its 95 % interval, how many ``patients`` ``of`` how many it is, or why
        it is ``undefined``. The Brier score has no rule.
    """
    at_least = partial(metrics.threshold_at, sensitivity=sensitivity)
    target, at_name = run.summary.targets[0], f"sensitivity {100 * sensitivity:g} %"
    rules: dict[str, Choose] = {"best F1": metrics.best_threshold, at_name: at_least}
    rows: list[list[object]] = []
    for label in judged_classes(target):
        truth, score, fold = pooled(run, label)
        for rule, choose in rules.items():
            found = [_threshold(each, target, label, choose) for each in run.results]
            named = " ".join("none" if math.isnan(t) else f"{t:.6g}" for t in found)
            shares = _shares(truth, score, np.array(found)[fold])
            rows += [[label, rule, named, *share] for share in shares]
        rows += [[label, "", "", *figure] for figure in _brier(truth, score, run.summary.seed)]
    return _table({**names, **_table(rows, columns=COLUMNS, dtype=object)})


def judged_classes(target: Target) -> tuple[str, ...]:
    """Return the classes told from all others: the positive one, or each of more than two."""
    return target.classes if len(target.classes) > 2 else (target.positive,)


def pooled(run: Run, label: str) -> tuple[Truth, Floats, NDArray[np.int64]]:
    """Return who is of a class, its probability and the fold's index ``(n,)``, of all known."""
    target = run.summary.targets[0]
    tables = [each.predictions for each in run.results]
    known = [table[table[target.name] != ""] for table in tables]
    folds = np.repeat(np.arange(len(known)), [len(table) for table in known])
    return *scores_of(pd.concat(known), target, label), folds


def _threshold(fold: FoldResult, target: Target, label: str, choose: Choose) -> float:
    """Return what a rule chooses on validation parts, of several the mean; NaN if it cannot."""
    if choose is metrics.best_threshold and label == target.positive:
        return fold.threshold  # known even where the validation part is not at hand
    found = [choose(*scores_of(part, target, label)) for part in fold.validated]
    return metrics.over_folds([metrics.Score(threshold) for threshold in found]).mean


def _shares(truth: Truth, score: Floats, limits: Floats) -> list[tuple[object, ...]]:
    judged = ~np.isnan(limits)
    truth, called = truth[judged], (score >= limits)[judged]
    pairs = ((truth, called), (~truth, called), (truth, ~called), (~truth, ~called))
    counts = tp, fp, fn, tn = [int((a & b).sum()) for a, b in pairs]
    nobody = "" if len(truth) else "nobody is judged"
    return [
        ("sensitivity", *share(tp, tp + fn, nobody or "no positive patient")),
        ("specificity", *share(tn, tn + fp, nobody or "no negative patient")),
        ("ppv", *share(tp, tp + fp, nobody or "no patient called positive")),
        ("npv", *share(tn, tn + fn, nobody or "no patient called negative")),
        ("prevalence", *share(tp + fn, len(truth), nobody)),
        *((k, n, None, None, n, len(truth), "") for k, n in zip(_CELLS, counts, strict=True)),
    ]


def share(patients: int, of: int, missing: str) -> tuple[object, ...]:
    """Return a share with Wilson's 95 % interval, what it is a share of, and why there is none.

    Where models of other sensitivities judge a part of the patients each, the count varies less
    than a binomial one of the mean: the interval is, if anything, too wide.
    """
    if of == 0:
        return None, None, None, patients, of, missing
    low, high = stats.binomtest(patients, of).proportion_ci(method="wilson")
    return patients / of, float(low), float(high), patients, of, ""


def by_site(run: Run, sites: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """Return how well the patients of each site are ranked, and how often they are called rightly.

    The run is of a classification, and the thresholds are those of best F1.

    Returns:
        A row per site and figure: shares as in `decisions`; of the AUROC, with scores of several
        folds taken together, ``patients`` is how many are positive, and there is no interval
        below `FEW` patients of a class.
    """
    rows: list[list[object]] = []
    for site, members in sites.items():
        tables = [each.predictions[each.predictions[PATIENT].isin(members)] for each in run.results]
        inside = [replace(r, predictions=t) for r, t in zip(run.results, tables, strict=True)]
        truth, score, fold = pooled(replace(run, results=tuple(inside)), run.summary.positive)
        area = metrics.auroc(truth, score)
        resampled = (truth.astype(str), partial(resampling.auroc, truth, score))
        few = min(truth.sum(), len(truth) - truth.sum()) < FEW  # resamples would be too much alike
        ends = resampling.interval([] if few else [resampled], seed=run.summary.seed)
        numbers = [json_or_none(number) for number in (area.value, *ends)]
        rows.append([site, "auroc", *numbers, int(truth.sum()), len(truth), area.reason])
        limits = np.array([each.threshold for each in run.results])[fold]
        rows += [[site, *each] for each in _shares(truth, score, limits)]
    return _table(rows, columns=["site", *COLUMNS[3:]], dtype=object)


def _brier(truth: Truth, score: Floats, seed: int) -> list[tuple[object, ...]]:
    if not len(truth):
        return [(name, *share(0, 0, "no patient")) for name in _SCORES]
    errors, n, reference = (score - truth) ** 2, len(truth), float(np.var(truth))
    of_resamples = partial(resampling.mean, errors)
    brier = [errors.mean(), *resampling.interval([(truth.astype(str), of_resamples)], seed=seed)]
    value, high, low = [1 - each / reference for each in brier] if reference else [None] * 3
    return [
        (_SCORES[0], *brier, n, n, ""),
        (_SCORES[1], reference, None, None, n, n, ""),
        (_SCORES[2], value, low, high, n, n, "" if reference else "one class only"),
    ]


def _table(*cells: Any, **options: Any) -> pd.DataFrame:
    table: pd.DataFrame = pd.DataFrame(*cells, **options)
    return table


def calibration(truth: Truth, score: Floats) -> pd.DataFrame:
    """Return how many are positive among patients of about the same probability.

    Args:
        truth: ``(n,)``, who is positive; at least one patient.
        score: ``(n,)``, the probability of it.

    Returns:
        A row per bin; bins hold about equally many patients, and equal scores are in one bin.
        ``predicted`` is the mean probability, ``observed`` the share with Wilson's interval.
    """
    count = max(1, min(BINS, len(truth) // SMALLEST_BIN))
    place = np.searchsorted(np.quantile(score, np.arange(1, count) / count), score)
    bins = [place == k for k in np.unique(place)]
    rows = [(score[b].mean(), *share(int(truth[b].sum()), int(b.sum()), "")[:5]) for b in bins]
    columns = ["predicted", "observed", "ci95_low", "ci95_high", "positives", "patients"]
    return _table(rows, columns=columns)


def confusion(run: Run, **names: str) -> pd.DataFrame:
    """Return how many patients of each class (rows) have which most probable class (columns)."""
    classes = run.summary.classes
    scores = [pooled(run, label)[:2] for label in classes]
    truth, called = (np.argmax([each[i] for each in scores], axis=0) for i in (0, 1))
    counts = np.zeros([len(classes)] * 2, dtype=int)
    np.add.at(counts, (truth, called), 1)
    most = {f"most probable: {label}": counts[:, k] for k, label in enumerate(classes)}
    return _table({**names, "class": classes, **most})
