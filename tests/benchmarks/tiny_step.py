"""What Python costs: the time of a step where tensors are so small that little else is left.

The network is an MLP, 16 to 32 to 32, with two heads (``--tasks``: more) and a batch of 32; or,
with ``--parameters``, so many shared parameters of ten numbers each, which one operation joins
before the heads. A step is the forward pass and everything up to filled ``.grad``; floors are the
passes alone, as in ``step_cost``: of the sum, and one for every task. Shown are medians in
microseconds, what lies above the floor, and how many plain steps (floor 1) a step takes.

    python -m tests.benchmarks.tiny_step
    python -m tests.benchmarks.tiny_step --steps 200 --rounds 30 --json > today.json
    python -m tests.benchmarks.tiny_step --parameters 100000 --steps 1 --rounds 5
    python -m tests.benchmarks.tiny_step --tasks 500 --steps 1 --rounds 9
    python -m tests.benchmarks.tiny_step --peers  # beside TorchJD, if it is installed

To compare two versions of the library, run both in turn, many times over, and look at the median of
the ratios: on a machine that others use, too, single runs differ by more than the versions do.
"""

import gc
import itertools
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
from tests.benchmarks.peers import peers
from tests.benchmarks.workloads import Batch, Workload

TASKS = 2
VARIANTS = {
    "Sum": "equal+sum",
    "PCGrad": "equal+pcgrad",
    "CAGrad": "equal+cagrad",
    "GradDrop": "equal+graddrop",
    "autol+cagrad": "autol+cagrad",
}


class Network(nn.Module):
    """A shared trunk and a head for each task.

    Args:
        tasks: How many.
    """

    def __init__(self, tasks: int = TASKS) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = _heads(32, tasks)
        self.signs = dict(zip(self.heads, itertools.cycle((1.0, -1.0))))  # what heads are to say

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the mean losses over rows of shape (n, 16)."""
        hidden = self.trunk(rows)
        return {task: self.loss(task, hidden, sign) for task, sign in self.signs.items()}

    def loss(self, task: str, hidden: Tensor, sign: float | Tensor) -> Tensor:
        """Return a task's mean loss, by what its head is to say of all rows."""
        return (self.heads[task](hidden) - sign).square().mean()

    def workload(self, rows: Tensor) -> Workload:
        """Return the network as the benchmarks of other packages take it."""
        batch = Batch(rows, {task: torch.tensor(sign) for task, sign in self.signs.items()})
        return Workload("mlp", self, [self.trunk], self.heads, self.trunk, self.loss, batch, batch)


class ManyParameters(nn.Module):
    """Many shared parameters of ten numbers each, and a head for each task.

    One operation reaches all parameters: next to any other model of as many, little else is done.

    Args:
        count: How many.
        tasks: How many tasks.
    """

    def __init__(self, count: int, tasks: int = TASKS) -> None:
        super().__init__()
        self.trunk = nn.ParameterList([torch.randn(10) for _ in range(count)])
        self.heads = _heads(1, tasks)

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        """Return a loss per task; the rows, shape (n, 16), only say how far apart these are."""
        joined = torch.cat(list(self.trunk)).unflatten(0, (-1, 10))
        return {
            task: (head((joined * row[:10]).mean()[None]) - 1).square().mean()
            for (task, head), row in zip(self.heads.items(), rows, strict=False)
        }


def _heads(width: int, tasks: int) -> nn.ModuleDict:
    return nn.ModuleDict({f"task{number}": nn.Linear(width, 1) for number in range(tasks)})


def steps(
    count: int = 0, tasks: int = TASKS, *, beside: bool = False
) -> dict[str, Callable[[], object]]:
    """Return a step of each variant, and the floors, by name.

    Args:
        count: How many parameters the trunk has; 0 for the MLP.
        tasks: How many tasks.
        beside: Whether to return TorchJD's, too, in its three modes, for the MLP.
    """
    torch.manual_seed(0)
    network = ManyParameters(count, tasks) if count else Network(tasks)
    rows, held_out = torch.randn(32, 16), torch.randn(32, 16)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def emptied(step: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            step()

        return run

    def plain() -> None:
        first, *others = network.losses(rows).values()
        sum(others, start=first).backward()

    shared = list(network.trunk.parameters())
    wanted = [[*shared, *head.parameters()] for head in network.heads.values()]

    def one_by_one() -> None:
        losses = network.losses(rows).values()
        for number, (loss, leaves) in enumerate(zip(losses, wanted, strict=True), 1):
            torch.autograd.grad(loss, leaves, retain_graph=number < tasks)

    found = {"floor 1": emptied(plain), "floor 2": emptied(one_by_one)}
    for name, strategies in VARIANTS.items():
        names = list(network.heads)
        balancer = make_balancer(strategies, tasks=names, shared=network.trunk, optimizer=optimizer)
        validation: dict[str, Any] = {}
        if balancer.weighting.needs_validation:
            validation["validation"] = lambda: network.losses(held_out)

        def step(balancer: Any = balancer, validation: dict[str, Any] = validation) -> None:
            balancer.backward(network.losses(rows), **validation)

        found[name] = emptied(step)
    if beside and isinstance(network, Network):
        others, missing = peers(network.workload(rows), ["torchjd"])
        found |= {name: emptied(step) for name, step in others.items()}
        sys.stderr.writelines(f"{line}\n" for line in missing)
    return found


def measure(
    rounds: int, count: int, parameters: int = 0, tasks: int = TASKS, *, beside: bool = False
) -> dict[str, float]:
    """Return the median time of a step in seconds of processor time, by variant.

    Args:
        rounds: How often each variant has its turn.
        count: How many steps make a turn.
        parameters: The ``count`` of :func:`steps`.
        tasks: How many tasks.
        beside: Whether to measure TorchJD, too.
    """
    variants = steps(parameters, tasks, beside=beside)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():  # the first steps have more to do
        for _ in range(2 if parameters or tasks > TASKS else 20):
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
    lines = [f"{'':24}{'us':>10}{'above its floor':>18}{'x floor 1':>12}"]
    for name, seconds in result.items():
        floor = result["floor 1" if name in ("Sum", "floor 1") else "floor 2"]
        cells = f"{seconds * 1e6:10.1f}{(seconds - floor) * 1e6:18.1f}"
        cells += f"{seconds / result['floor 1']:12.2f}"
        lines.append(f"{name:24}{cells}")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or JSON."""
    parser = reporting.plain_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100, help="in one turn")
    parser.add_argument(
        "--parameters", type=int, default=0, help="of the trunk; 0 (the default) for the MLP"
    )
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--peers", action="store_true", help="beside TorchJD, for the MLP")
    options = parser.parse_args(arguments)
    environment = reporting.describe(torch.device("cpu"))
    result = measure(
        options.rounds, options.steps, options.parameters, options.tasks, beside=options.peers
    )
    if options.json:
        json.dump({"environment": environment, "seconds": result}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(reporting.header(environment) + table(result))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more would wake each other for nothing
    main()
