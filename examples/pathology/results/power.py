"""How large a difference a comparison can see, from studies simulated at the level of predictions.

Every simulated study has the patients, folds and seeds of a real one. Its scores are normal, of a
class target within each class (the binormal model), of a number together with it. A reference and a
method that is better by a known amount are compared as the real study compares them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]

STUDIES, FEWEST = 1000, 200  # a share of 0.8 is known to 0.013, at worst to 0.028
DRAWN = 1_500_000  # patients times seeds in all studies of one difference: bounds the time
STEPS = 12  # differences on a curve, besides none
LARGEST = 0.999  # AUROC or r of a method
FOUND = ("found", "found_after_correction")


@dataclass(frozen=True)
class Design:
    """Two methods on the same patients.

    Args:
        folds: Patients of each ``(k, classes)``: negative and positive ones, or all as one class if
            the target is a number.
        seeds: Of initial weights.
        reference: AUROC, or Pearson's r, of the method that the other one is compared with.
        alike: Correlations ``(classes, 3)`` of two scores of a patient, given the truth: of one
            method from two seeds, of two methods from one seed, and of two from two.
        spread: Variance over seeds of the true difference in a fold.
    """

    folds: NDArray[np.int64]
    seeds: int
    reference: float
    alike: Floats
    spread: float = 0.0


def simulate(
    design: Design, differences: Floats, levels: Sequence[float], studies: int, seed: int
) -> Floats:
    """Return the share of studies that find a method to differ from the reference ``(levels, d)``.

    All differences see the same patients, so that a curve over them is smooth.

    Args:
        design: What is drawn.
        differences: By how much the method is better ``(d,)``; none gets beyond `LARGEST`.
        levels: Below which p counts.
        studies: How many.
        seed: Of the draw.
    """
    random = np.random.default_rng(seed)
    found, shared = [], []
    for fold in design.folds:
        errors = _errors(design, fold, studies, random)
        truth = random.normal(size=(studies, 1, sum(fold)))  # of a number
        moved = np.sqrt(design.spread) * random.normal(size=(studies, design.seeds))
        value, change = _measured(np.full_like(moved, design.reference), errors[:, 0], truth, fold)
        true = [np.clip(design.reference + d + moved, -LARGEST, LARGEST) for d in differences]
        ours = [_measured(each, errors[:, 1], truth, fold) for each in true]
        found.append([each[0] - value for each in ours])
        shared.append([shared_variance(each[1] - change, fold) for each in ours])
    decided = [is_found(np.array(found), np.array(shared), level) for level in levels]
    shares: Floats = np.array(decided).mean(axis=-1)
    return shares


def is_found(found: Floats, shared: Floats, level: float) -> NDArray[np.bool_]:
    """Return whether p is below a level: that of `compare_auroc`, or `estimate` of several seeds.

    Args:
        found: Differences in each fold from each seed ``(k, ..., s)``.
        shared: Their covariance over patients ``(k, ...)``, of one seed their variance.
        level: Two-sided.
    """
    folds, seeds = len(found), found.shape[-1]
    limit = special.ndtri(level / 2) ** 2 * np.maximum(shared, 0.0).sum(axis=0)
    if seeds > 1:
        of_models = found.var(axis=-1, ddof=1).sum(axis=0) / seeds
        limit = limit + special.stdtrit(folds * (seeds - 1), level / 2) ** 2 * of_models
    decided: NDArray[np.bool_] = (folds * found.mean(axis=(0, -1))) ** 2 > limit + 1e-24
    return decided


def _errors(
    design: Design, fold: NDArray[np.int64], studies: int, random: np.random.Generator
) -> Floats:
    """Draw scores of mean 0 and variance 1, of both methods ``(studies, 2, seeds, n)``."""
    of_method, of_seed, of_neither = design.alike.T
    own = 1 - of_method - of_seed + of_neither
    parts = np.stack([of_neither, of_method - of_neither, of_seed - of_neither, own])
    parts = np.maximum(parts, 0.0)  # estimates need not fit together
    sizes = np.sqrt(parts / parts.sum(axis=0)).repeat(fold, axis=1)
    kinds = (1, 1), (2, 1), (1, design.seeds), (2, design.seeds)
    drawn = (random.normal(size=(studies, *kind, sum(fold))) for kind in kinds)
    total: Floats = sum(size * part for size, part in zip(sizes, drawn, strict=True))
    return total


def _measured(
    true: Floats, errors: Floats, truth: Floats, fold: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    true = true[..., None]
    if len(fold) == 1:
        return correlation(truth, true * truth + np.sqrt(1 - true**2) * errors)
    positive = np.arange(sum(fold)) >= fold[0]
    return area(errors + np.sqrt(2) * special.ndtri(true) * positive, fold[0])


def area(scores: Floats, negatives: int) -> tuple[Floats, Floats]:
    """Return the AUROC ``(...)``, and how leaving out each patient moves it ``(..., n)``.

    Args:
        scores: ``(..., n)``, none equal to another.
        negatives: How many patients, those who come first, are negative.
    """
    ranks, parts = _ranks(scores), (slice(negatives), slice(negatives, None))
    beaten = [ranks[..., part] - _ranks(scores[..., part]) for part in parts]  # of the other class
    q, p = (each.shape[-1] for each in beaten)
    moves = [each - each.mean(axis=-1, keepdims=True) for each in beaten]
    moved = np.concatenate([moves[0] / (p * (q - 1)), -moves[1] / (q * (p - 1))], axis=-1)
    return beaten[1].mean(axis=-1) / q, moved


def _ranks(values: Floats) -> NDArray[np.int64]:
    order = values.astype(np.float32).argsort(axis=-1)  # several times as fast as of float64
    return order.argsort(axis=-1)


def correlation(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return Pearson's r ``(...)`` of ``(..., n)``, and how leaving out each patient moves it."""
    n = x.shape[-1]
    x, y = (each - each.mean(axis=-1, keepdims=True) for each in (x, y))
    products = x * x, y * y, x * y
    totals = [each.sum(axis=-1, keepdims=True) for each in products]
    # Without a patient, a sum about the mean is smaller by n / (n - 1) of the patient's product.
    xx, yy, xy = (t - each * n / (n - 1) for t, each in zip(totals, products, strict=True))
    without = xy / np.sqrt(xx * yy)
    moved = without - without.mean(axis=-1, keepdims=True)
    return (totals[2] / np.sqrt(totals[0] * totals[1]))[..., 0], moved


def shared_variance(moved: Floats, fold: NDArray[np.int64]) -> Floats:
    """Return the covariance over patients from two seeds, of one seed the variance ``(studies,)``.

    Args:
        moved: By leaving out each patient ``(studies, seeds, n)``, about their mean in a class.
        fold: Patients of each class, which keep their number: so is the variance DeLong's.
    """
    seeds, scale = moved.shape[1], 1 - 1 / fold.repeat(fold)
    shared: Floats = (scale * moved.sum(axis=1) ** 2).sum(axis=-1)
    if seeds > 1:
        shared = (shared - (scale * moved**2).sum(axis=(1, 2))) / (seeds * (seeds - 1))
    return shared


def curve(design: Design, levels: tuple[float, float], seed: int) -> pd.DataFrame:
    """Return the share of studies that find a difference, from none to where nearly all do.

    Args:
        design: With a reference below `LARGEST`.
        levels: Below which p counts, before and after correction.
        seed: Of the draw.

    Returns:
        A row per true ``difference``, with the shares `FOUND` and of how many ``studies`` they are.
    """
    ends = (LARGEST - design.reference) * 1.4 ** -np.arange(12.0)
    nearly = simulate(design, ends, levels, FEWEST, seed)[1] > 0.98
    steps = np.linspace(0, ends[max(0, int(nearly.sum()) - 1)], STEPS + 1)
    studies = int(np.clip(DRAWN // (design.folds.sum() * design.seeds), FEWEST, STUDIES))
    shares = dict(zip(FOUND, simulate(design, steps, levels, studies, seed), strict=True))
    table: pd.DataFrame = pd.DataFrame({"difference": steps, **shares, "studies": studies})
    return table


def detectable(curve: pd.DataFrame, column: str, share: float) -> float:
    """Return the smallest difference found in a share of studies; NaN if none on the curve is."""
    shares = np.maximum.accumulate(curve[column].to_numpy())
    return float(np.interp(share, shares, curve["difference"])) if shares[-1] >= share else np.nan
