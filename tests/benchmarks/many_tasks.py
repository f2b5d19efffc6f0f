"""What a solve of every strategy on Gramians costs as tasks become many: time and memory.

Every gradient strategy that ``make_balancer`` knows and that decides by the Gramian gets those of
conflicting rows and of rows of which each second one nearly is its neighbour; shown is the slower
of both. Times are processor time of one thread, so that other work on the machine matters little:
medians, or one call where it takes longer than the limit. Memory is the peak of PyTorch's allocator
above what was there before, the Gramian itself (2 MB for 500 tasks) not counted. What takes longer
than the limit is marked with "!".

    python -m tests.benchmarks.many_tasks
    python -m tests.benchmarks.many_tasks --sizes 100 --json
"""

import inspect
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # before NumPy and torch

import numpy as np
import torch

from mtbalance._factory import GRADIENTS
from mtbalance.gradient import GradientStrategy
from tests.benchmarks import reporting
from tests.benchmarks.catalogue import LEAST_TASKS
from tests.benchmarks.memory import memory_of
from tests.benchmarks.peers import byzantine_of
from tests.benchmarks.solvers import Array, conflicting

SIZES = (2, 8, 32, 100, 500)
LIMIT = 1.0
"""Seconds that a solve may take; the backward passes of 500 tasks take about as long at least."""


def nearly_dependent(rng: np.random.Generator, m: int) -> Array:
    """Conflicting rows, each second one its neighbour but for 1e-7 of its length."""
    rows = conflicting(rng, m)
    half = m // 2
    rows[1 : 2 * half : 2] = rows[: 2 * half : 2] + 1e-7 * rng.standard_normal((half, m + 10))
    return rows


FAMILIES = (conflicting, nearly_dependent)


def strategies(m: int) -> dict[str, GradientStrategy]:
    """Return every strategy on Gramians for m tasks, with what only a user can choose."""
    chosen = {"primary": 0, "byzantine": byzantine_of(m)}
    found = {}
    for kind in dict.fromkeys(GRADIENTS.values()):
        if not kind.by_gramian or m < LEAST_TASKS.get(kind.__name__.lower(), 1):
            continue
        required = [
            name
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.default is parameter.empty
        ]
        found[kind.__name__] = kind(**{name: chosen[name] for name in required})
    return found


def cost_of(strategy: GradientStrategy, gramian: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Return seconds and bytes of a solve, and how often it answered with its substitute."""
    # The products of the rows with themselves stand for those of two batches.
    across = (gramian,) if strategy.further_batches else ()
    before = strategy.fallbacks
    use = memory_of(lambda: strategy.coefficients(gramian, *across), gramian.device)
    fallbacks = strategy.fallbacks - before
    times: list[float] = []
    while len(times) < rounds and (not times or times[0] <= LIMIT):
        start = time.process_time()
        strategy.coefficients(gramian, *across)
        times.append(time.process_time() - start)
    return {"seconds": statistics.median(times), "bytes": use.peak, "fallbacks": fallbacks}


def measure(m: int, rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what each strategy costs with m tasks, by its name and the family of the rows."""
    costs: dict[str, dict[str, dict[str, Any]]] = {}
    for family in FAMILIES:
        rows = torch.from_numpy(family(np.random.default_rng(m), m))
        with warnings.catch_warnings():  # of fallbacks, which are counted
            warnings.simplefilter("ignore")
            for name, strategy in strategies(m).items():
                cost = cost_of(strategy, rows @ rows.T, rounds)
                costs.setdefault(name, {})[family.__name__] = cost
    return costs


def table(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a Markdown table: a row per strategy, and time and memory for each number of tasks."""
    heads = ["strategy", *(f"m = {m}: ms | MB" for m in results)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (2 * len(results)) + "|"]
    for name in dict.fromkeys(name for costs in results.values() for name in costs):
        cells = [f"`{name}`"]
        for costs in results.values():
            families = costs.get(name, {}).values()
            seconds = max((cost["seconds"] for cost in families), default=None)
            if seconds is None:
                cells += ["–", "–"]
                continue
            most = max(cost["bytes"] for cost in families)
            cells.append(f"{seconds * 1e3:.3g}" + (" !" if seconds > LIMIT else ""))
            cells.append(f"{most / 2**20:.2g}" if most >= 0.05 * 2**20 else "0")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table, or JSON."""
    options = reporting.parser_of_sizes(__doc__, SIZES).parse_args(arguments)
    environment = reporting.describe(torch.device("cpu"))
    results = {m: measure(m, options.rounds) for m in options.sizes}
    if options.json:
        json.dump({"environment": environment, "tasks": results}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    sys.stdout.write(reporting.header(environment))
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
