"""How large a difference a benchmark can see: its design, simulated, in words and as curves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from examples.pathology.results import resampling
from examples.pathology.results.measuring import numbers_of, scores_of
from examples.pathology.results.power import FOUND, LARGEST, Design, curve, detectable
from examples.pathology.results.repeats import Repeated
from examples.pathology.results.resampling import Figure
from examples.pathology.results.runs import Run
from examples.pathology.study.criteria import AUROC, CRITERIA, PEARSON, Criterion
from examples.pathology.study.differences import LEVEL, REFERENCES, Difference
from examples.pathology.study.folder import Panel, Study

SHARE = 0.8  # of studies: what is usually planned for
TIMES = (1, 2, 4)  # as many patients
FIGURES = {AUROC: resampling.auroc, PEARSON: resampling.pearson}
Floats = NDArray[np.float64]


class Power(NamedTuple):
    """What a benchmark can see: in words, and curves by times of its patients; none if unknown."""

    criterion: Criterion
    words: str
    curves: Mapping[int, pd.DataFrame]


def powers(study: Study, differences: Sequence[Difference]) -> list[Power]:
    """Simulate the benchmark by what scores alone decide: AUROC or r, inside and outside."""
    return [
        _power(study, criterion, [d for d in differences if d.criterion == criterion and d.family])
        for criterion in CRITERIA[study.kind]
        if criterion.metric in FIGURES and (criterion.cohort == "internal" or study.deployed)
    ]


def _power(study: Study, criterion: Criterion, family: Sequence[Difference]) -> Power:
    sizes = {each.reference: each.family for each in family}
    reference = next((each for each in REFERENCES if each in sizes), "")
    design = design_of(study, criterion, reference)
    why = ""
    if design is None:
        why = "no fold has enough patients and two methods from all seeds"
    elif design.reference >= LARGEST:
        why = f"{reference} is perfect"
    elif design.seeds * len(design.folds) == 1:  # exchanges find more there than DeLong's test
        why = "one fold and one seed are too few for its approximation"
    if design is None or why:
        return Power(criterion, f"What can be seen in {criterion.title} is not known: {why}.", {})
    levels, seed = (LEVEL, LEVEL / sizes[reference]), int(study.settings["seed"])
    larger = {times: replace(design, folds=times * design.folds) for times in TIMES}
    curves = {times: curve(each, levels, seed) for times, each in larger.items()}
    found = [detectable(curves[1], column, SHARE) for column in FOUND]
    return Power(
        criterion, _in_words(criterion, reference, design, sizes[reference], found), curves
    )


def _in_words(
    criterion: Criterion, reference: str, design: Design, comparisons: int, found: Sequence[float]
) -> str:
    (folds, classes), seeds = design.folds.shape, design.seeds
    size, corrected = ("" if np.isnan(each) else f" of {each:.3f}" for each in found)
    positive = f", {design.folds[:, -1].sum()} of them positive" * (classes == 2)
    alike = " among negative and ".join(f"{each:.2f}" for each in design.alike[:, 1])
    alike += " among positive patients" if classes == 2 else ", given the truth"
    spread = f", and a difference that varies by {np.sqrt(design.spread):.3f} (sd) between seeds"
    return (
        f"With {design.folds.sum()} patients{positive}, {folds} fold{'s' * (folds > 1)} and "
        f"{seeds} seed{'s' * (seeds > 1)}, {'a' if size else 'no'} true difference from "
        f"{reference} in {criterion.title}{size} is found in {100 * SHARE:g} % of studies "
        f"({corrected[4:] or 'none'} after correction for {comparisons} "
        f"comparison{'s' * (comparisons > 1)}). Simulated with what is found here: "
        f"{design.reference:.3f} for {reference}, scores of two methods that correlate by "
        f"{alike}{spread * (seeds > 1)}."
    )


def curves_in_full(found: Sequence[Power]) -> pd.DataFrame:
    """Return all curves as one table."""
    tables = [
        curve.assign(cohort=each.criterion.cohort, metric=str(each.criterion.metric), times=times)
        for each in found
        for times, curve in each.curves.items()
    ]
    columns = ["cohort", "metric", "times", "difference", *FOUND, "studies"]
    table: pd.DataFrame = pd.concat([pd.DataFrame(columns=columns), *tables])[columns]
    return table


def design_of(study: Study, criterion: Criterion, reference: str) -> Design | None:
    """Estimate a benchmark's design from its predictions; ``None`` if there are too few.

    Folds are those of the first auxiliary target; what else there is, is the mean over the folds of
    all of them, and over all methods that have every seed of the reference.
    """
    panels = [[*_folds(panel, criterion, reference)] for panel in study.panels]
    folds = [fold for panel in panels for fold in panel]
    if not folds:
        return None
    weights = np.array([fold.folds[0] - 1 for fold in folds])
    return Design(
        np.concatenate([fold.folds for fold in next(filter(None, panels))]),
        folds[0].seeds,
        float(np.mean([fold.reference for fold in folds])),
        np.einsum("fc,fcr->cr", weights / weights.sum(axis=0), [fold.alike for fold in folds]),
        max(0.0, float(np.mean([fold.spread for fold in folds]))),
    )


def _folds(panel: Panel, criterion: Criterion, reference: str) -> Iterator[Design]:
    runs = panel.of(criterion.cohort)
    theirs = runs.pop(reference, {})
    methods = [theirs, *(each for each in runs.values() if each.keys() >= theirs.keys())]
    for of_fold in zip(*(_scores(each[s]) for each in methods for s in theirs), strict=True):
        truth, scores = of_fold[0][0], np.array([score for _, score in of_fold])
        scores = scores.reshape(len(methods), len(theirs), len(truth))
        if fold := _of_fold(truth, scores, FIGURES[criterion.metric]):
            yield fold


def _scores(run: Run) -> Iterator[tuple[NDArray[np.bool_] | Floats, Floats]]:
    """Yield truth and prediction of every fold, patients in order of their names."""
    target = run.summary.targets[0]
    for result in run.results:
        table = result.by_name().predictions
        table = table[table[target.name] != ""]
        if target.kind == "classification":
            yield scores_of(table, target, target.positive)
        else:
            yield numbers_of(table, target)


def _of_fold(truth: NDArray[np.bool_] | Floats, scores: Floats, figure: Figure) -> Design | None:
    """Estimate the design of one fold from scores ``(methods, seeds, n)``, the reference's first.

    Its `spread` may be below 0; ``None`` if figures or variances are not defined.
    """
    numbers, (_, seeds, n) = truth.dtype != bool, scores.shape
    strata = np.zeros(n, dtype=int) if numbers else truth.astype(int)
    sizes = np.bincount(strata, minlength=2 - numbers)
    if sizes.min() < (4 if numbers else 2):
        return None
    weights = np.vstack([np.ones(n), 1 - np.eye(n)])
    figures = np.array([[figure(truth, row, weights) for row in rows] for rows in scores])
    known = ~np.isnan(figures).any(axis=(1, 2))
    if not known[0] or known.sum() == 1:
        return None
    figures, scores, spread, same = figures[known], scores[known], 0.0, np.eye(seeds, dtype=bool)
    if seeds > 1:  # the variance over seeds that remains with ever more patients
        differences, names = figures[1:] - figures[0], strata.astype(str)
        of_each = differences[..., 0].var(axis=1, ddof=1)
        both = (Repeated(each[:, 0], each[:, 1:], names) for each in differences)
        shared = np.array([each.covariance for each in both])
        spread = float(of_each.mean() - shared[:, same].mean() + shared[:, ~same].mean())
    alike = [_alike(truth, scores[..., strata == each]) for each in range(len(sizes))]
    return Design(sizes[None], seeds, float(figures[0, :, 0].mean()), np.array(alike), spread)


def _alike(truth: NDArray[np.bool_] | Floats, scores: Floats) -> Floats:
    """Return `Design.alike` of one class, from scores as in `_of_fold`, the truth being of all."""
    if truth.dtype == bool:  # AUROC knows ranks only
        scores = stats.norm.ppf(stats.rankdata(scores, axis=-1) / (scores.shape[-1] + 1))
    rest = scores - scores.mean(axis=-1, keepdims=True)
    if truth.dtype != bool:
        x = truth - truth.mean()
        rest -= (rest @ x / (x @ x))[..., None] * x
    rest /= np.maximum(np.linalg.norm(rest, axis=-1, keepdims=True), 1e-300)
    own, same = np.einsum("msn,mtn->mst", rest, rest), np.eye(scores.shape[1], dtype=bool)
    across = np.einsum("sn,mtn->mst", rest[0], rest[1:])
    if same.all():
        return np.full(3, across.mean())
    return np.array([own[:, ~same].mean(), across[:, same].mean(), across[:, ~same].mean()])
