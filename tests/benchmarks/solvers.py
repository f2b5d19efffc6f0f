"""What CAGrad's solver costs and how exact it is, next to SciPy's SLSQP and CVXPY with Clarabel.

All solvers see the same Gramians and take turns in one process, on one thread, so that a change
of the machine's speed meets all of them; shown are median times and the worst duality gaps. SLSQP
is called as the authors of CAGrad call it. CVXPY and Clarabel are not needed: without them they
are left out.

    python -m tests.benchmarks.solvers --rounds 5
"""

import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

if __name__ == "__main__":
    # Before NumPy and torch: threads only slow down problems this small, SciPy's most of all.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np
import scipy.optimize
import torch

from mtbalance.gradient import CAGrad
from tests._oracles import judge_cagrad
from tests.benchmarks import reporting

Array = np.ndarray

C = 0.4
SIZES = (2, 5, 10, 20, 50)
MATRICES = 10


# --- gradient matrices ----------------------------------------------------------------------------


def random(rng: np.random.Generator, m: int) -> Array:
    """Normal entries, more columns than rows."""
    return rng.standard_normal((m, m + 10))


def conflicting(rng: np.random.Generator, m: int) -> Array:
    """Rows whose mean is a tenth of what it was: about half of all pairs conflict."""
    rows = random(rng, m)
    return rows - 0.9 * rows.mean(0)


def ill_conditioned(rng: np.random.Generator, m: int) -> Array:
    """Norms spread over twelve decades."""
    return random(rng, m) * 10.0 ** rng.uniform(-6, 6, (m, 1))


def duplicates(rng: np.random.Generator, m: int) -> Array:
    """Every second row is a positive multiple of its neighbour."""
    rows = random(rng, m)
    rows[1::2] = rows[: m - m % 2 : 2] * rng.choice([0.5, 1.0, 2.0], (m // 2, 1))
    return rows


def rank_deficient(rng: np.random.Generator, m: int) -> Array:
    """Rank at most 2 (at most 1 for two rows)."""
    rank = min(2, m - 1)
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, m + 10))


def opposite(rng: np.random.Generator, m: int) -> Array:
    """The last row is a negative multiple of the first."""
    rows = random(rng, m)
    rows[-1] = -rng.choice([0.5, 2.0, 3.0]) * rows[0]
    return rows


def near_stationary(rng: np.random.Generator, m: int) -> Array:
    """A convex combination of the rows is shorter than they are by about 1e-4."""
    rows = random(rng, m)
    rows[-1] = -(rng.uniform(0.5, 2, m - 1) @ rows[:-1])
    return rows + 1e-4 * random(rng, m)


FAMILIES = (
    random,
    conflicting,
    ill_conditioned,
    duplicates,
    rank_deficient,
    opposite,
    near_stationary,
)


# --- solvers --------------------------------------------------------------------------------------

Solver = Callable[[Array], Array]
"""From a Gramian, shape (m, m), to the weights of the rows on the scale of the sum, shape (m,)."""


def ours() -> Solver:
    strategy = CAGrad(C, rescale=0)
    return lambda gramian: strategy.weights(torch.from_numpy(gramian)).numpy()


def from_simplex(gramian: Array, w: Array) -> Array:
    """Return the weights of the rows from those on the simplex: 1 + m c |g0| w / |g_w|."""
    m = len(gramian)
    radius = C * math.sqrt(max(gramian.mean(), 0.0))
    return 1 + m * radius * w / math.sqrt(max(w @ gramian @ w, 1e-300))


def slsqp() -> Solver:
    """The authors' formulation: from equal weights, with epsilons and SciPy's default tolerance."""

    def solve(gramian: Array) -> Array:
        m = len(gramian)
        equal = np.ones(m) / m
        radius = C * math.sqrt(gramian.mean() + 1e-8) + 1e-8
        result = scipy.optimize.minimize(
            lambda x: x @ gramian @ equal + radius * np.sqrt(x @ gramian @ x + 1e-8),
            equal,
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda x: 1 - x.sum()},
        )
        return from_simplex(gramian, np.clip(result.x, 0, None))

    return solve


def clarabel() -> Solver | None:
    """The dual as a second-order-cone problem on the root of the scaled Gramian; None if absent."""
    try:
        import cvxpy
    except ImportError:
        return None
    if "CLARABEL" not in cvxpy.installed_solvers():
        return None

    def solve(gramian: Array) -> Array:
        m = len(gramian)
        scale = float(np.abs(gramian).max())
        values, vectors = np.linalg.eigh(gramian / scale)
        root = (vectors * np.sqrt(np.clip(values, 0, None))).T
        linear = (gramian / scale).mean(1)
        radius = C * math.sqrt(max(linear.mean(), 0.0))
        w = cvxpy.Variable(m, nonneg=True)
        cost = linear @ w + radius * cvxpy.norm(root @ w, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of inaccurate solutions, which the gap shows
            cvxpy.Problem(cvxpy.Minimize(cost), [cvxpy.sum(w) == 1]).solve(solver="CLARABEL")
        return from_simplex(gramian, np.clip(w.value, 0, None))

    return solve


# --- measuring ------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One solver on one family of one size."""

    seconds: float
    """Median time of a call."""
    gap: float
    """Worst duality gap, relative to (1 + c) |g0| sum_i w_i |g_i|."""


def measure(
    m: int, family: Callable[..., Array], solvers: dict[str, Solver], rounds: int
) -> dict[str, Cell]:
    """Let all solvers take turns, each on all matrices of a family at a turn."""
    rng = np.random.default_rng(m)
    matrices = [family(rng, m) for _ in range(MATRICES)]
    gramians = [rows @ rows.T for rows in matrices]
    times: dict[str, list[float]] = {name: [] for name in solvers}
    gaps = dict.fromkeys(solvers, 0.0)
    for round_number in range(rounds + 1):
        for name, solve in solvers.items():
            for rows, gramian in zip(matrices, gramians, strict=True):
                start = time.perf_counter()
                weights = solve(gramian)
                seconds = time.perf_counter() - start
                if round_number:  # the first warms up
                    times[name].append(seconds)
                else:
                    gap = judge_cagrad(rows, weights @ rows, C, rescale=0).gap
                    gaps[name] = max(gaps[name], gap)
    return {name: Cell(statistics.median(times[name]), gaps[name]) for name in solvers}


def table(cells: dict[tuple[int, str], dict[str, Cell]], solvers: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the table."""
    others = [name for name in solvers if name != "ours"]
    line = "".join(f"{name:>10} us{'gap':>8}" for name in solvers)
    yield f"{'m':>3} {'family':15}" + line + "".join(f"{'ours/' + o:>15}" for o in others)
    for (m, family), row in cells.items():
        line = "".join(f"{c.seconds * 1e6:13.1f}{c.gap:8.0e}" for c in row.values())
        ratios = [row["ours"].seconds / row[name].seconds for name in others]
        yield f"{m:3} {family:15}" + line + "".join(f"{ratio:15.3f}" for ratio in ratios)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table, or JSON."""
    options = reporting.parser_of_sizes(__doc__, SIZES).parse_args(arguments)
    available = {"ours": ours(), "SLSQP": slsqp(), "Clarabel": clarabel()}
    solvers = {name: solver for name, solver in available.items() if solver is not None}
    environment = reporting.describe(torch.device("cpu"))
    cells = {
        (m, family.__name__): measure(m, family, solvers, options.rounds)
        for m in options.sizes
        for family in FAMILIES
    }
    if options.json:
        rows = [
            {"m": m, "family": family, "solver": name, **cell._asdict()}
            for (m, family), row in cells.items()
            for name, cell in row.items()
        ]
        json.dump({"environment": environment, "c": C, "cells": rows}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    sys.stdout.write(reporting.header(environment))
    if "Clarabel" not in solvers:
        sys.stdout.write("CVXPY with Clarabel is not installed, and left out.\n")
    sys.stdout.writelines(f"{line}\n" for line in table(cells, tuple(solvers)))


if __name__ == "__main__":
    main()
