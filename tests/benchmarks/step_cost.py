"""What balancing costs: the time of a step as a ratio to a plain step, measured in one run.

All variants take turns, so that a change of the machine's speed meets all of them; shown are
medians.

    python -m tests.benchmarks.step_cost --tiles 256 --rounds 15
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from examples.pathology.model import JointTransformer
from mtbalance import PAPER_COMBINATIONS, make_balancer

TASKS = ("msi", "tme")


def losses_of(model: JointTransformer, tiles: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the class, squared error of the auxiliary target."""
    logits, value = model(tiles).outputs
    return {
        "msi": torch.nn.functional.cross_entropy(logits, torch.tensor([1])),
        "tme": (value - 0.3).square().mean(),
    }


def variants(model: JointTransformer, tiles: Tensor) -> dict[str, Callable[[], None]]:
    """Forward and everything up to filled ``.grad``, by name."""
    shared = [p for module in model.shared_modules() for p in module.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def plain() -> None:
        sum(losses_of(model, tiles).values()).backward()  # type: ignore[union-attr]

    def task_gradients() -> None:
        first, last = losses_of(model, tiles).values()
        torch.autograd.grad(first, shared, retain_graph=True)
        torch.autograd.grad(last, shared)

    def balanced(name: str) -> Callable[[], None]:
        balancer = make_balancer(
            name, tasks=TASKS, shared=model.shared_modules(), optimizer=optimizer
        )

        def step() -> None:
            balancer.backward(losses_of(model, tiles), validation=lambda: losses_of(model, tiles))

        return step

    return {
        "plain sum": plain,
        "task gradients only": task_gradients,
        **{name: balanced(name) for name in PAPER_COMBINATIONS},
    }


def measure(tiles: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of each variant."""
    torch.manual_seed(0)
    model = JointTransformer([2, 1])
    steps = variants(model, torch.randn(tiles, 768))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 2):
        for name, step in steps.items():
            model.zero_grad()
            start = time.perf_counter()
            step()
            if round_number >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    medians = measure(options.tiles, options.rounds)
    if options.json:
        json.dump({"tiles": options.tiles, "seconds": medians}, sys.stdout, indent=2)
        return
    floor, gradients = medians["plain sum"], medians["task gradients only"]
    sys.stdout.write(f"{'':22}{'ms':>8}{'x plain':>9}{'x task gradients':>18}\n")
    for name, seconds in medians.items():
        sys.stdout.write(
            f"{name:22}{seconds * 1e3:8.1f}{seconds / floor:9.2f}{seconds / gradients:18.2f}\n"
        )


if __name__ == "__main__":
    main()
