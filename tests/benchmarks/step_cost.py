"""What balancing costs: the time of a step, measured in one run with its floors and its peers.

A step is the forward pass and everything up to filled ``.grad``. All variants take turns in an
order that is shuffled in every round, so that a change of the machine's speed meets all of them.
Shown are medians, how far the quartiles lie from them (+-), and ratios of medians to the floors:

- floor 1: forward and backward pass of the plain sum;
- floor 2: forward pass and, for every task, ``torch.autograd.grad`` on the shared parameters;
- floor 3: floor 2, and forward and backward pass of a validation batch (for Auto-Lambda).

    python -m tests.benchmarks.step_cost
    python -m tests.benchmarks.step_cost --workload mlp-4 --rounds 30 --json > today.json
"""

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtbalance import Balancer, make_balancer
from tests.benchmarks import reporting
from tests.benchmarks.peers import Step, peers, strategy_of
from tests.benchmarks.workloads import PRECISIONS, TINY, WORKLOADS, Workload, with_precision

ROUNDS = {
    "transformer-1024": 5,
    "transformer-4096": 3,
    "mlp-2": 25,
    "mlp-8": 9,
    "mlp-16": 5,
    "resnet": 7,
}
"""Rounds where steps are short or long; elsewhere ``DEFAULT_ROUNDS``."""
DEFAULT_ROUNDS = 15

FLOORS = ("floor 1", "floor 2", "floor 3")

CHOSEN = {
    "transformer-4096": (
        "equal+sum",
        "equal+cagrad",
        "equal+graddrop",
        "autol+cagrad",
        "torchjd cagrad vmap",
        "torchjd cagrad seq",
        "LibMTL pcgrad",
        "LibMTL cagrad",
    ),
}
"""Variants where all of them would take too long: with so many tiles, the passes alone matter."""


class Variant(NamedTuple):
    """A way to balance: a name for ``make_balancer``, and how it is called."""

    strategies: str
    options: Mapping[str, Any] = {}
    """Of ``make_balancer``."""
    arguments: Callable[[Tensor], Mapping[str, Any]] = lambda features: {}
    """Of ``Balancer.backward`` besides losses and validation, given the features."""
    steps: int = 1
    """How many steps in a row are one measurement, where not every step costs the same."""


VARIANTS = {
    name: Variant(name)
    for name in (
        "equal+sum",
        "uncert+sum",
        "dwa+sum",
        "equal+pcgrad",
        "equal+cagrad",
        "equal+graddrop",
        "dwa+cagrad",
        "autol+sum",
        "autol+cagrad",
    )
}


def _at_features(features: Tensor) -> dict[str, Tensor]:
    return {"features": features}


OPTIONAL = {
    "equal+cagrad-of-features": Variant("cagrad", arguments=_at_features),
    "equal+graddrop-of-features": Variant("graddrop", arguments=_at_features),
    "equal+cagrad, every 4": Variant("cagrad", {"every": 4}, steps=4),
    "equal+cagrad, bfloat16": Variant("cagrad", {"dtype": torch.bfloat16}),
    "equal+cagrad, chunk 16": Variant("cagrad", {"chunk": 16}),
}
"""What options of the Balancer do, where it is asked for: most of them are not exact."""


def floor_of(variant: str) -> str:
    """Return the floor that a variant is measured by: the passes that it cannot do without."""
    if variant.startswith("autol"):
        return "floor 3"
    return "floor 1" if variant.endswith("+sum") else "floor 2"


def limit_of(variant: str, family: str, m: int) -> tuple[str, float] | None:
    """Return what a variant may cost at most: a floor, and how many times it."""
    weighting, _, gradient = variant.partition("+")
    on_transformer = family == "transformer"
    if weighting == "autol":
        return ("floor 3", 1.12) if on_transformer and gradient == "cagrad" else None
    if gradient == "sum":
        return "floor 1", 1.03
    if gradient in ("pcgrad", "cagrad") and (on_transformer or (family == "mlp" and m <= 8)):
        return "floor 2", 1.08 if on_transformer else 1.20
    if gradient == "graddrop" and family in ("transformer", "mlp"):
        return "floor 2", 1.30 if on_transformer else 1.50
    return None


# --- the steps ------------------------------------------------------------------------------------


def floors(workload: Workload) -> dict[str, Step]:
    """Return what nothing can be faster than, by name."""
    shared = workload.parameters

    def plain() -> None:
        torch.stack(list(workload.losses().values())).sum().backward()

    def task_gradients() -> None:
        *others, last = workload.losses().values()
        # The rows stay alive until the last one is there, as in every method that compares them.
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in others]
        rows.append(torch.autograd.grad(last, shared))

    def task_gradients_and_validation() -> None:
        task_gradients()
        total = torch.stack(list(workload.validation_losses().values())).sum()
        torch.autograd.grad(total, shared)

    return dict(zip(FLOORS, (plain, task_gradients, task_gradients_and_validation), strict=True))


def balancers(workload: Workload, variants: Mapping[str, Variant]) -> dict[str, Balancer]:
    """Return a Balancer for each variant."""
    # Auto-Lambda reads the learning rate; the optimizer never makes a step.
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=1e-4)
    return {
        name: make_balancer(
            variant.strategies,
            tasks=workload.tasks,
            shared=workload.shared,
            optimizer=optimizer,
            **variant.options,
        ).to(workload.training.inputs.device)
        for name, variant in variants.items()
    }


def balanced_step(workload: Workload, balancer: Balancer, variant: Variant) -> Step:
    """Return a step of a Balancer."""
    looks_ahead = balancer.weighting.needs_validation
    validation = {"validation": workload.validation_losses} if looks_ahead else {}

    def step() -> None:
        features = workload.features(workload.training.inputs)
        losses = workload.losses_of(features, workload.training)
        balancer.backward(losses, **validation, **variant.arguments(features))

    return step


# --- the clock ------------------------------------------------------------------------------------


def seconds(step: Step, repeats: int, trained: nn.Module, device: torch.device) -> float:
    """Return the time of one step, with empty ``.grad`` before it."""
    total = 0.0
    for _ in range(repeats):
        trained.zero_grad(set_to_none=True)
        gc.collect()  # everything long-lived is frozen, so that this takes no time
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        total += time.perf_counter() - start
    return total / repeats


def attempt(step: Step, repeats: int, trained: nn.Module, device: torch.device) -> float | str:
    """Return ``seconds``, or why the step failed: an error of somebody else's code is a result."""
    try:
        return seconds(step, repeats, trained, device)
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the table
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(
    steps: Mapping[str, Step],
    repeats: Mapping[str, int],
    trained: nn.Module,
    rounds: int,
    may_fail: Collection[str] = (),
    most_seconds: float = math.inf,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Make all steps once per round, in random order, until the rounds or the seconds are over.

    Returns:
        The seconds of each step in each round, and why steps failed, which are not tried again. The
        first round warms up: it does not count, unless there are fewer than 5.
    """
    device = next(trained.parameters()).device
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    failures: dict[str, str] = {}
    start = time.perf_counter()
    gc.collect()
    gc.freeze()
    gc.disable()  # it would fall on whichever step happens to be running
    try:
        for done in range(rounds):
            if done > 1 and time.perf_counter() - start > most_seconds:
                break
            for name in order.sample(list(times), len(times)):
                step, repeat = steps[name], repeats.get(name, 1)
                if name in may_fail:
                    taken: float | str = attempt(step, repeat, trained, device)
                else:
                    taken = seconds(step, repeat, trained, device)
                if isinstance(taken, str):
                    failures[name] = taken
                    del times[name]
                else:
                    times[name].append(taken)
    finally:
        gc.enable()
        gc.unfreeze()
    return {
        name: values[1:] if len(values) >= 5 else values for name, values in times.items()
    }, failures


def medians_of(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each step's times."""
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    name: str,
    device: torch.device,
    rounds: int | None = None,
    chosen: Collection[str] | None = None,
    *,
    with_peers: bool = True,
    with_options: bool = False,
    precision: str = "float32",
    most_seconds: float = math.inf,
) -> dict[str, Any]:
    """Return everything about one workload, as plain values; times are in seconds.

    Args:
        name: Of the workload.
        device: Where to run it.
        rounds: How many; None for what the workload bears.
        chosen: Names of what to measure besides the floors; None for what the workload bears.
        with_peers: Whether to measure other libraries too.
        with_options: Whether to measure ``OPTIONAL`` too.
        precision: Of the forward passes, one of ``PRECISIONS``.
        most_seconds: After how many no further round begins.
    """
    workload = with_precision({**WORKLOADS, **TINY}[name](device), precision)
    m = len(workload.tasks)
    rounds = rounds or ROUNDS.get(name, DEFAULT_ROUNDS)
    chosen = chosen or CHOSEN.get(name)
    if chosen is None:
        variants = VARIANTS | (OPTIONAL if with_options else {})
    else:
        variants = {k: v for k, v in (VARIANTS | OPTIONAL).items() if k in chosen}
    made = balancers(workload, variants)
    ours = {k: balanced_step(workload, balancer, variants[k]) for k, balancer in made.items()}
    theirs, missing = peers(workload) if with_peers else ({}, [])
    theirs = {k: v for k, v in theirs.items() if chosen is None or k in chosen}

    times, failures = interleaved(
        {**floors(workload), **ours, **theirs},
        {k: variant.steps for k, variant in variants.items()},
        nn.ModuleList([workload.model, *made.values()]),
        rounds,
        may_fail=theirs,
        most_seconds=most_seconds,
    )
    medians = medians_of(times)
    rows: dict[str, dict[str, Any]] = {}
    for k, median in medians.items():
        rows[k] = {
            "median": median,
            "quartiles": quartiles(times[k]),
            "ratios": {floor: median / medians[floor] for floor in FLOORS},
        }
        rival = f"equal+{strategy_of(k)}" if k in theirs else None
        if rival in medians:
            rows[k]["to_ours"] = median / medians[rival]
        if k in ours and (limit := limit_of(k, workload.family, m)):
            rows[k]["limit"] = {"floor": limit[0], "ratio": limit[1]}
    return {
        "tasks": m,
        "shared_parameters": sum(p.numel() for p in workload.parameters),
        "precision": precision,
        "rounds": len(times[FLOORS[0]]),
        "variants": rows,
        "failures": failures,
        "missing": missing,
        "load": reporting.load(),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


# --- the table ------------------------------------------------------------------------------------


def table(name: str, result: Mapping[str, Any]) -> str:
    """Return one workload as text."""
    size = f"{result['tasks']} tasks, {result['shared_parameters']:,} shared parameters"
    how = f"{result['precision']}, medians of {result['rounds']} rounds"
    lines = [
        f"{name}: {size}; {how}, load {result['load']}",
        f"{'':28}{'ms':>9}{'+-':>5}{'x floor 1':>11}{'x floor 2':>11}{'x floor 3':>11}",
    ]
    for variant, row in result["variants"].items():
        first, third = row["quartiles"]
        spread = (third - first) / 2 / row["median"]
        ratios = row["ratios"]
        shown = [ratios["floor 1"], ratios["floor 2"]]
        if variant.startswith(("autol", "floor 3")):  # nothing else has a validation batch
            shown.append(ratios["floor 3"])
        cells = "".join(f"{ratio:11.2f}" for ratio in shown).ljust(33)
        time_ = f"{row['median'] * 1e3:9.1f}{spread:5.0%}"
        lines.append(f"{variant:28}{time_}{cells}  {_remark(row)}".rstrip())
    lines += [f"{variant:28}    fails: {why}" for variant, why in result["failures"].items()]
    return "\n".join([*lines, *result["missing"], "", ""])


def _remark(row: Mapping[str, Any]) -> str:
    if "to_ours" in row:
        return f"{row['to_ours']:.2f} x ours"
    if "limit" in row:
        floor, limit = row["limit"]["floor"], row["limit"]["ratio"]
        verdict = "" if row["ratios"][floor] <= limit else ", OVER"
        return f"at most {limit:.2f} x {floor}{verdict}"
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table per workload, or JSON."""
    parser = reporting.parser_of(__doc__, WORKLOADS)
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="these alone besides the floors, as in a table",
    )
    parser.add_argument("--rounds", type=int, help="by default as many as the workload bears")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument("--options", action="store_true", help="measure Balancer's options too")
    options = parser.parse_args(arguments)
    measured = functools.partial(
        measure,
        rounds=options.rounds,
        chosen=options.variants,
        with_peers=not options.no_peers,
        with_options=options.options,
        precision=options.precision,
    )
    reporting.report(options, measured, table)


if __name__ == "__main__":
    main()
