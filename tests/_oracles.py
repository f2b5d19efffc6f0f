"""Second answers to what the strategies compute: slow loops, optimality certificates, SciPy.

Nothing here imports mtbalance. Everything works in float64 on NumPy arrays.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
from torch import Tensor

Array = np.ndarray


def array(tensor: Tensor) -> Array:
    """Return a tensor's numbers as a float64 array."""
    return tensor.detach().double().cpu().numpy()


# --- PCGrad ---------------------------------------------------------------------------------------


def pcgrad_row(rows: Array, task: int, order: Sequence[int]) -> Array:
    """Return one task's gradient after the paper's inner loop, on vectors (Algorithm 1)."""
    g = rows[task].copy()
    for other in order:
        assert other != task
        inner = g @ rows[other]
        if inner < 0:
            g = g - inner / (rows[other] @ rows[other]) * rows[other]
    return g


def pcgrad_rows(rows: Array, task: int) -> list[Array]:
    """Return one task's gradient after the inner loop, for every order of the others."""
    others = [j for j in range(len(rows)) if j != task]
    return [pcgrad_row(rows, task, order) for order in itertools.permutations(others)]


def pcgrad_outcomes(rows: Array) -> Iterator[Array]:
    """Yield PCGrad's direction for every choice of an order per task."""
    for choice in itertools.product(*[pcgrad_rows(rows, i) for i in range(len(rows))]):
        yield np.sum(choice, axis=0)


def pcgrad_fixed(rows: Array) -> Array:
    """Return PCGrad's direction when every task visits the others by number."""
    m = len(rows)
    return sum(pcgrad_row(rows, i, [j for j in range(m) if j != i]) for i in range(m))


def pcgrad_expectation(rows: Array) -> Array:
    """Return the mean of PCGrad's direction over all orders, drawn for each task on its own."""
    return sum(np.mean(pcgrad_rows(rows, i), axis=0) for i in range(len(rows)))


# --- random numbers -------------------------------------------------------------------------------


def numbered_draw(seed: int, column: int) -> float:
    """Return one column's draw in (-1, 1), with Python's whole numbers.

    SplitMix64 of the seed gives two keys. The column's number times 2^32 / golden ratio, plus one
    key, xor the other, is multiplied, joined with its upper bits (the sign going along), and
    multiplied again, by the constants of MurmurHash3's finalizer.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (1 + (column >> 32))) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    x = (column * 0x9E3779B1 + z) % 2**32 ^ z >> 32
    x = x * 0x85EBCA6B % 2**32
    signed = x - 2**32 if x >= 2**31 else x
    x = (signed ^ signed >> 15) * 0xC2B2AE35 % 2**32
    signed = x - 2**32 if x >= 2**31 else x
    return float(np.float32(signed) * np.float32(2.0**-31 * (1 - 2.0**-24)))


# --- GradDrop -------------------------------------------------------------------------------------


def graddrop(rows: Array, draws: Array, leaks: Sequence[float]) -> Array:
    """Return GradDrop's direction, number by number, for the uniform draws given (Algorithm 1)."""
    m, p = rows.shape
    direction = np.zeros(p)
    for k in range(p):
        total = sum(rows[i, k] for i in range(m))
        size = sum(abs(rows[i, k]) for i in range(m))
        if size == 0:
            continue
        purity = (1 + total / size) / 2
        for i in range(m):
            g = rows[i, k]
            kept = (purity > draws[k] and g > 0) or (purity <= draws[k] and g < 0)
            direction[k] += g if kept else leaks[i] * g
    return direction


# --- CAGrad ---------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How far a direction is from solving CAGrad's problem: 0 at a solution (off the kink)."""

    outside: float
    """By how much it leaves the ball, relative to the radius."""
    gap: float
    """Duality gap, relative to (1 + c) |g0| sum_i w_i |g_i|, which bounds each of its terms."""
    inside: float
    """By how much it stays off the sphere, relative to the radius."""
    gap_of_largest: float
    """Duality gap, relative to (1 + c) |g0| times the largest norm of a row."""


def divisor(c: float, rescale: int) -> float:
    """Return what the published rescaling divides by."""
    return [1.0, 1 + c * c, 1 + c][rescale]


def judge_cagrad(
    rows: Array, direction: Array, c: float, rescale: int = 1, rounding: float = 1e-14
) -> Verdict:
    r"""Certify a direction by weak duality.

    For every d in the ball and every w in the simplex, min_i <g_i, d> <= <g_w, d> <=
    <g_w, g0> + c |g0| |g_w|. So whatever w is tried, the right-hand side minus the left-hand side
    bounds the distance from the optimum. Tried are

    - weights for which g_w points along d - g0, on tasks that fare worst under d: such weights are
      what makes d optimal, and SciPy's NNLS finds them from d alone;
    - those of the least |g_w|, which give the bound of 0 where some combination vanishes.

    Rows that are zero count in the mean only. The parts of d are as long as (1 + c) |g0|, so that
    rounding them moves <g_i, d> by about ``rounding`` times (1 + c) |g0| |g_i|, which is forgiven.
    """
    m = len(rows)
    rows, direction = rows.astype(np.longdouble), direction.astype(np.longdouble)
    mean = rows.sum(0) / m
    radius = c * np.sqrt(mean @ mean)
    norms = np.sqrt((rows * rows).sum(1))
    alive = norms > 1e-30 * norms.max()
    rows, norms = rows[alive], norms[alive]
    d = direction * (np.longdouble(divisor(c, rescale)) / m)
    step = d - mean
    length = np.sqrt(step @ step)

    units = (rows / norms[:, None]).astype(np.float64)
    progress = rows @ d
    noise = (1 + c) * np.sqrt(mean @ mean) * norms
    reached = (progress + rounding * noise).min()
    spread = (progress - reached) / noise
    spread = np.where(spread <= 2 * rounding, 0, spread).astype(np.float64)
    bounds = []
    for y in (
        nonnegative_least_squares(
            np.vstack([units.T, 1e3 * np.diag(spread)]),
            np.r_[(step / radius).astype(np.float64), np.zeros(len(units))],
        ),
        least_norm_weights(units, (norms.min() / norms).astype(np.float64)),
    ):
        if not (y > 0).any():
            continue
        w = y / norms
        w = w / w.sum()
        g_w = w @ rows
        bound = g_w @ mean + radius * np.sqrt(g_w @ g_w)
        bounds.append((bound, (1 + c) * np.sqrt(mean @ mean) * (w @ norms)))
    bound, scale = min(bounds)
    return Verdict(
        float(max(length / radius - 1, 0)),
        float((bound - reached) / scale),
        float(max(1 - length / radius, 0)),
        float((bound - reached) / noise.max()),
    )


def nonnegative_least_squares(matrix: Array, right: Array) -> Array:
    """Return x >= 0 that minimises |matrix @ x - right|."""
    if matrix.shape[1] == 0:  # at which SciPy 1.17.1 crashes
        return np.zeros(0)
    solution, _ = scipy.optimize.nnls(matrix, right)
    return solution


def least_norm_weights(rows: Array, sizes: Array) -> Array:
    """Return y >= 0 with sizes @ y = 1 that minimises |y @ rows|.

    For y = t v with sizes @ v = 1, |y @ rows|^2 + (sizes @ y - 1)^2 = t^2 |v @ rows|^2 + (t - 1)^2,
    whose least value over t grows with |v @ rows|: plain NNLS finds the same v.
    """
    stacked = np.vstack([rows.T, sizes])
    y = nonnegative_least_squares(stacked, np.r_[np.zeros(rows.shape[1]), 1.0])
    return y / (sizes @ y)


def project_on_dual_cone(rows: Array, vector: Array) -> tuple[Array, float]:
    """Return the projection of a vector on {d: <g_i, d> >= 0 for all i}, and its distance.

    By Moreau's decomposition the vector is its projection on the dual cone minus a non-negative
    combination of rows, the one nearest to minus the vector.
    """
    norms = np.linalg.norm(rows, axis=1)
    units = rows[norms > 0] / norms[norms > 0, None]
    lifted = nonnegative_least_squares(units.T, -vector) @ units
    return vector + lifted, float(np.linalg.norm(lifted))


def cagrad_by_slsqp(rows: Array, c: float) -> Array:
    """Return the mean-scaled CAGrad direction from SciPy's SLSQP on the primal problem.

    The epigraph form: maximise t subject to <g_i, d> >= t and |d - g0|^2 <= (c |g0|)^2, for rows of
    a length around 1.
    """
    mean = rows.mean(0)
    radius = c * np.linalg.norm(mean)
    start = np.r_[mean, (rows @ mean).min()]
    constraints = [
        {
            "type": "ineq",
            "fun": lambda x: rows @ x[:-1] - x[-1],
            "jac": lambda x: np.c_[rows, -np.ones(len(rows))],
        },
        {
            "type": "ineq",
            "fun": lambda x: radius**2 - (x[:-1] - mean) @ (x[:-1] - mean),
            "jac": lambda x: np.r_[-2 * (x[:-1] - mean), 0.0],
        },
    ]
    result = scipy.optimize.minimize(
        lambda x: -x[-1],
        start,
        jac=lambda x: np.r_[np.zeros(len(mean)), -1.0],
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return result.x[:-1]


# --- ConFIG, IMTL-G -------------------------------------------------------------------------------


def equiangular_by_lstsq(rows: Array, wanted: Array) -> tuple[Array, float]:
    """Return the shortest x with <u_i, x> as wanted, or as near as can be, for unit vectors u_i.

    And how uncertain a direction is that inner products of the rows decide, relative to its length:
    infinitely where it is not clear which combinations of the rows vanish.
    """
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    limit = 1e-6 * len(rows) ** 0.5
    values = np.linalg.svd(units, compute_uv=False)
    x = np.linalg.lstsq(units, wanted, rcond=limit)[0]
    if np.linalg.norm(units @ x) <= 1e-12 * np.linalg.norm(wanted):
        x = np.zeros_like(x)  # what is left is rounding
    limit *= values[0]
    tolerance = 1e-12 + 1e-13 / values[values > limit].min() ** 2
    unclear = ((values > limit / 3) & (values < 3 * limit)).any()
    return x, np.inf if unclear else float(tolerance)


# --- DWA ------------------------------------------------------------------------------------------


def dwa_weights(last: Sequence[float], before: Sequence[float], temperature: float) -> list[float]:
    """Return DWA's weights from the mean losses of two epochs, with Python's own numbers."""
    powers = [math.exp(a / b / temperature) for a, b in zip(last, before, strict=True)]
    return [len(powers) * power / sum(powers) for power in powers]
