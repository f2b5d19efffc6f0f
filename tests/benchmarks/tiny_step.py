"""What Python costs: the time of a step where tensors are so small that little else is left.

The network is an MLP, 16 to 32 to 32, with two heads and a batch of 32. A step is the forward pass
and everything up to filled ``.grad``; floors are the passes alone, as in ``step_cost``: of the sum,
and one for every task. Shown are medians in microseconds and what lies above the floor.

    python -m tests.benchmarks.tiny_step
    python -m tests.benchmarks.tiny_step --steps 200 --rounds 30 --json > today.json

To compare two versions of the library, run both in turn, many times over, and look at the median of
the ratios: on a machine that others use, too, single runs differ by more than the versions do.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtbalance import make_balancer
from tests.benchmarks import reporting

TASKS = ("a", "b")
VARIANTS = {
    "Sum": "equal+sum",
    "PCGrad": "equal+pcgrad",
    "CAGrad": "equal+cagrad",
    "GradDrop": "equal+graddrop",
    "autol+cagrad": "autol+cagrad",
}


class Network(nn.Module):
    """A shared trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(32, 1) for task in TASKS})

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the mean losses over rows of shape (n, 16)."""
        hidden = self.trunk(rows)
        return {
            task: (head(hidden) - sign).square().mean()
            for (task, head), sign in zip(self.heads.items(), (1.0, -1.0), strict=True)
        }


def steps() -> dict[str, Callable[[], object]]:
    """Return a step of each variant, and the floors, by name."""
    torch.manual_seed(0)
    network, rows, held_out = Network(), torch.randn(32, 16), torch.randn(32, 16)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def emptied(step: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            step()

        return run

    def plain() -> None:
        first, second = network.losses(rows).values()
        (first + second).backward()

    def one_by_one() -> None:
        first, second = network.losses(rows).values()
        torch.autograd.grad(first, parameters, retain_graph=True, allow_unused=True)
        torch.autograd.grad(second, parameters, allow_unused=True)

    found = {"floor 1": emptied(plain), "floor 2": emptied(one_by_one)}
    for name, strategies in VARIANTS.items():
        balancer = make_balancer(strategies, tasks=TASKS, shared=network.trunk, optimizer=optimizer)
        validation: dict[str, Any] = {}
        if balancer.weighting.needs_validation:
            validation["validation"] = lambda: network.losses(held_out)

        def step(balancer: Any = balancer, validation: dict[str, Any] = validation) -> None:
            balancer.backward(network.losses(rows), **validation)

        found[name] = emptied(step)
    return found


def measure(rounds: int, count: int) -> dict[str, float]:
    """Return the median time of a step in seconds of processor time, by variant.

    Args:
        rounds: How often each variant has its turn.
        count: How many steps make a turn.
    """
    variants = steps()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():  # the first steps have more to do
        for _ in range(20):
            run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in variants.items():
                start = time.process_time()
                for _ in range(count):
                    run()
                times[name].append((time.process_time() - start) / count)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def table(result: dict[str, float]) -> str:
    """Return the times as text."""
    lines = [f"{'':16}{'us':>8}{'above its floor':>18}"]
    for name, seconds in result.items():
        cells = f"{seconds * 1e6:8.1f}"
        if not name.startswith("floor"):
            floor = result["floor 1" if name == "Sum" else "floor 2"]
            cells += f"{(seconds - floor) * 1e6:18.1f}"
        lines.append(f"{name:16}{cells}")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100, help="in one turn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    environment = reporting.describe(torch.device("cpu"))
    result = measure(options.rounds, options.steps)
    if options.json:
        json.dump({"environment": environment, "seconds": result}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(reporting.header(environment) + table(result))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more would wake each other for nothing
    main()
