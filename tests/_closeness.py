"""How closely directions of each strategy can be known, and where rounding decides about them.

Both are functions of the rows, by the conditions of the problems that the strategies solve.
"""

import numpy as np
import torch
from torch import Tensor

from mtbalance.gradient import GramianStrategy
from mtbalance.testing._property import rounding, size_of
from tests._catalogue import GradientCase
from tests._oracles import array, nonnegative_least_squares

RESOLUTION = 16 * 2.0**-52
"""What a Gramian in float64 knows of squared lengths of unit vectors."""


def tolerance_of(case: GradientCase, rows: Tensor) -> float:
    """Return by how much two equal answers may differ, relative to the sum of the norms.

    CAGrad's direction is the quotient of g_w by its length, which sets of rows that nearly cancel
    make as uncertain as that length. AlignedMTL's is as long as the root of an eigenvalue, which is
    known up to the root of the rounding, or to some eps of the largest. ConFIG, GradOPS and IMTLG
    invert the cosines, whose least eigenvalues are known to some eps; IMTLG divides by a sum that
    may nearly cancel, and ConFIG by what is left where hardly any vector agrees with all rows.
    PCD's direction is the quotient of a combination by its length, which is known to some eps of
    the squared length of its terms. Those of NashMTL and FairGrad may be much longer than all rows.
    Projections on the dual cone are the sums of multipliers that are right to 1e-13 each.
    """
    if case.name.startswith("AlignedMTL") and rows.any():
        ratios = _ratios_of_eigenvalues(rows)
        return max(1e-6, 4e-16 / float(ratios[ratios > 1e-13].min()))
    if case.name.startswith(("CAGrad", "AlignedMTL")):
        return 1e-6
    if case.name.startswith(_BARGAINING):
        return (1e-13 + rounding(rows.dtype)) * _length_of_terms(case, rows)
    if case.name in _ON_THE_DUAL_CONE:
        return 1e-12
    if case.name.startswith("PCD"):
        return 1e-13 + 1e-15 * cancelled(case, rows) ** 2
    if not case.name.startswith(("ConFIG", "GradOPS", "IMTLG")) or not rows.any():
        return 1e-13
    _, values, limit = _unit_rows_as(rows)
    times = cancelled(case, rows) ** (1 if case.name == "ConFIG" else 2)
    return (1e-13 + 1e-14 / values[values > limit].min() ** 2) * times


def slack_of(case: GradientCase, rows: Tensor) -> float:
    """Return how far below zero <g, d> may be where the weighted rows are longer than all rows."""
    return (1e-12 + rounding(rows.dtype)) * _length_of_terms(case, rows)


def _ratios_of_eigenvalues(rows: Tensor) -> Tensor:
    """Return the eigenvalues of the Gramian over the largest of them."""
    squares = torch.linalg.svdvals(rows.double() / rows.abs().max()).square()
    return squares / squares.max()


_BARGAINING = ("NashMTL", "FairGrad")
_ON_THE_DUAL_CONE = {
    *("UPGrad", "DualProj", "Normalized-UPGrad-min"),
    *("Smoothed", "RowMean", "RowMean-uncorrected"),
}


def _length_of_terms(case: GradientCase, rows: Tensor) -> float:
    """Return how long the weighted rows are together, next to the rows themselves."""
    made = case.make()
    strategy, wide = getattr(made, "strategy", made), rows.double()
    if not isinstance(strategy, GramianStrategy) or not rows.any():
        return 1.0
    weights = strategy.weights(wide @ wide.T)
    return max(size_of(weights[:, None] * wide) / max(size_of(wide), 1e-300), 1.0)


def cancelled(case: GradientCase, rows: Tensor) -> float:
    """Return how many times longer than their sum the terms are that a method divides by."""
    if not rows.any() or not case.name.startswith(("ConFIG", "IMTLG", "PCD")):
        return 1.0
    if case.name.startswith("PCD"):
        return _cancelled_by_demands(rows, case.make().tau)
    left, values, limit = _unit_rows_as(rows)
    left, values = left[:, values > limit], values[values > limit]
    if case.name == "ConFIG":
        agreeing = np.linalg.norm(left.sum(0)) / len(left) ** 0.5
        return float(1 / agreeing) if agreeing > 1e-13 else 1.0  # what is left is rounding
    norms = np.linalg.norm(array(rows[rows.any(1)]), axis=1)
    shares = left @ (left.sum(0) / values**2) / norms
    return float(max(np.abs(shares).sum() / max(abs(shares.sum()), 1e-300), 1))


def _cancelled_by_demands(rows: Tensor, tau: float) -> float:
    """Return it for PCD's terms in the first step, the primary task being the first.

    What is to be added to its unit vector is the shortest vector with at least the products that
    are lacking. It is minus the upper part of what is left of (0, 1) next to the rows (u, lacking)
    by non-negative least squares, over the last number of it (Lawson and Hanson, chapter 23).
    """
    if not rows[0].any():
        return 1.0
    units = array(rows[rows.any(1)])
    own, *others = units / np.linalg.norm(units, axis=1, keepdims=True)
    beside = np.array([[*unit, tau - unit @ own] for unit in others]).reshape(-1, len(own) + 1)
    target = np.eye(len(own) + 1)[-1]
    multipliers = nonnegative_least_squares(beside.T, target)
    rest = target - multipliers @ beside
    if np.linalg.norm(rest) < 1e-9:
        return 1.0  # there is no such vector
    terms = 1 + multipliers.sum() / rest[-1]
    length = np.linalg.norm(own + multipliers @ beside[:, :-1] / rest[-1])
    return float(terms / length) if length > 1e-9 * terms else 1.0  # what is left is rounding


def _unit_rows_as(rows: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Return left vectors and singular values of the unit rows, and up to where these are zero."""
    alive = array(rows[rows.any(1)])
    norms = np.linalg.norm(alive, axis=1)
    left, values, _ = np.linalg.svd(alive / norms[:, None], full_matrices=False)
    return left, values, float(np.sqrt(1e-12 * len(alive)) * values[0])


def near_a_jump(case: GradientCase, rows: Tensor) -> bool:
    """Whether rounding decides about the direction, as the method itself says that it jumps there.

    AlignedMTL takes eigenvalues of the Gramian for zero that are about its rounding, ConFIG,
    GradOPS and IMTLG those of cosines that are about the rounding of float32; IMTLG turns the
    direction round. PCD takes combinations for zero, and demands for excluding each other. Krum's
    scores tie up to a limit. What MoCo and MoDo take off their weights may be so large that only
    the least slope counts.
    """
    if not rows.any():
        return False
    if case.name.startswith("Krum"):
        return _nearly_tie(array(rows), case.make().selected)
    if case.name.startswith(("MoCo", "MoDo")):
        return _least_slopes_are_near(array(rows), case.make().gamma)
    if case.name.startswith("PCD"):
        return cancelled(case, rows) >= 1e5
    if case.name.startswith(("ConFIG", "GradOPS", "IMTLG")):
        _, values, limit = _unit_rows_as(rows)
        jumps = ((values > limit / 3) & (values < 3 * limit)).any()
        return bool(jumps) or cancelled(case, rows) >= 1e6
    if not case.name.startswith("AlignedMTL"):
        return False
    ratios = _ratios_of_eigenvalues(rows)
    return bool(((ratios > 1e-16) & (ratios < 1e-13)).any())


def _nearly_tie(rows: np.ndarray, selected: int) -> bool:
    """Whether scores differ by about as much as Krum takes for rounding, nobody being Byzantine."""
    m = len(rows)
    if m < 3:
        return False
    rows = rows / np.abs(rows).max()
    distances = ((rows[:, None] - rows) ** 2).sum(2)
    squares = (rows**2).sum(1)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, : m - 2]
    scores = np.take_along_axis(distances, nearest, 1).sum(1)
    limits = RESOLUTION * np.take_along_axis(squares + squares[:, None], nearest, 1).sum(1)
    last = np.argsort(scores)[min(selected, m) - 1]
    ratios = np.abs(scores - scores[last]) / np.maximum(limits + limits[last], 1e-300)
    return bool(((ratios > 0.3) & (ratios < 3)).any())


def _least_slopes_are_near(rows: np.ndarray, rate: float) -> bool:
    """Whether rounding of slopes decides which of the least gets how much of the weight."""
    slopes = np.sort(rows @ rows.mean(0))
    coarse = rate * np.abs(rows @ rows.T).max() * 1e-16 > 3e-14
    return bool(coarse and len(slopes) > 1 and rate * (slopes[1] - slopes[0]) < 40)
