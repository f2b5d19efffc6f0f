"""What each strategy of the catalogue costs, in one run with its floors and its namesakes.

Every gradient strategy that ``make_balancer`` knows is measured under equal weights, every
weighting with the plain sum and with one strategy on Gramians; new ones appear by themselves.
Floors, turns and medians are those of ``step_cost``: floor 2 is one backward pass per task. Of
TorchJD and LibMTL what has the same name takes part; shown is their time over ours, and a dash
where there is none.

    python -m tests.benchmarks.catalogue
    python -m tests.benchmarks.catalogue --workload mlp-4 --rounds 5 --to today.json
"""

import json
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtbalance import Balancer, make_balancer
from mtbalance._factory import GRADIENTS, WEIGHTINGS
from tests.benchmarks import reporting
from tests.benchmarks.peers import LIBRARIES, Step, byzantine_of, peers_of_catalogue, trim_of
from tests.benchmarks.step_cost import FLOORS, floors, interleaved, medians_of, quartiles
from tests.benchmarks.workloads import TINY, WORKLOADS, Workload

MEASURED = ("transformer-256", "mlp-4")
ROUNDS = 15
"""Minutes in all: a round of both workloads takes some 20 s of one core."""
GRAMIAN = "cagrad"
"""With what weightings are measured besides the plain sum."""
LEAST_TASKS = {"krum": 3}
"""Where not any number will do."""


def variants(m: int) -> list[str]:
    """Return names for ``make_balancer`` with m tasks, each class once, under its own name."""
    gradients = [kind.__name__.lower() for kind in dict.fromkeys(GRADIENTS.values())]
    weightings = [kind.__name__.lower() for kind in dict.fromkeys(WEIGHTINGS.values())]
    names = [f"equal+{name}" for name in gradients if m >= LEAST_TASKS.get(name, 1)]
    for gradient in ("sum", GRAMIAN):
        names += [f"{weighting}+{gradient}" for weighting in weightings]
    return list(dict.fromkeys(names))


# --- what strategies need -------------------------------------------------------------------------


def balancer_of(workload: Workload, variant: str, **chosen: Any) -> Balancer:
    """Return a Balancer, with all that nobody can choose but the user, and with what is chosen."""
    m = len(workload.tasks)
    weighting, _, _ = variant.partition("+")
    options: dict[str, Any] = {
        # Auto-Lambda reads its learning rate; it never makes a step.
        "optimizer": torch.optim.AdamW(workload.model.parameters(), lr=1e-4),
        "weights": [1.0] * m,
        "byzantine": byzantine_of(m),
        "trim": trim_of(m),
    }
    if weighting == "equal":  # of a weighting, all tasks are primary
        options["primary"] = workload.tasks[0]
    options |= chosen
    balancer = make_balancer(variant, tasks=workload.tasks, shared=workload.shared, **options)
    return balancer.to(workload.training.inputs.device)


def step_of(workload: Workload, balancer: Balancer) -> Step:
    """Return a step, with the validation batch, further batches and look back that it needs."""
    arguments: dict[str, Any] = {}
    if balancer.weighting.needs_validation:
        arguments["validation"] = workload.validation_losses
    further = min(balancer.gradient.further_batches, default=0)
    if further:
        arguments["batches"] = (workload.validation_losses,) * further
    looks_back = balancer.weighting.needs_after_step

    def step() -> None:
        balancer.backward(workload.losses(), **arguments)
        if looks_back:
            balancer.after_step(workload.losses)

    return step


# --- the run --------------------------------------------------------------------------------------


def measure(
    name: str,
    device: torch.device,
    rounds: int = ROUNDS,
    *,
    with_peers: bool = True,
    most_seconds: float = math.inf,
) -> dict[str, Any]:
    """Return everything about one workload, as plain values; times are in seconds.

    Args:
        name: Of the workload.
        device: Where to run it.
        rounds: How many; the first warms up where there are 5 or more.
        with_peers: Whether to measure other libraries too.
        most_seconds: After how many no further round begins.
    """
    workload = {**WORKLOADS, **TINY}[name](device)
    made = {variant: balancer_of(workload, variant) for variant in variants(len(workload.tasks))}
    ours = {variant: step_of(workload, balancer) for variant, balancer in made.items()}
    theirs, missing = peers_of_catalogue(workload, made) if with_peers else ({}, [])
    others = {
        f"{library} {variant}": step
        for library, steps in theirs.items()
        for variant, step in steps.items()
    }
    floors_ = floors(workload)
    with warnings.catch_warnings():  # of fallbacks, as of Krum with few tasks, and theirs
        warnings.simplefilter("ignore")
        times, failures = interleaved(
            {**floors_, **ours, **others},
            {},
            nn.ModuleList([workload.model, *made.values()]),
            rounds,
            may_fail=others,
            most_seconds=most_seconds,
        )
    medians = medians_of(times)
    rows = {}
    for variant in (*floors_, *made):
        median = medians[variant]
        rows[variant] = {
            "median": median,
            "quartiles": quartiles(times[variant]),
            "ratios": {floor: median / medians[floor] for floor in floors_},
            "peers": _peers_of(variant, median, medians, failures),
        }
    return {
        "tasks": len(workload.tasks),
        "shared_parameters": sum(p.numel() for p in workload.parameters),
        "rounds": len(times[FLOORS[0]]),
        "variants": rows,
        "missing": missing,
        "load": reporting.load(),
    }


def _peers_of(
    variant: str, ours: float, medians: Mapping[str, float], failures: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return what other libraries need for a variant, by library, or why they fail."""
    found: dict[str, dict[str, Any]] = {}
    for library in LIBRARIES:
        name = f"{library} {variant}"
        if name in medians:
            found[library] = {"median": medians[name], "to_ours": medians[name] / ours}
        elif name in failures:
            found[library] = {"fails": failures[name]}
    return found


# --- the table ------------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all workloads as one Markdown table: a row per variant, four columns per workload."""
    heads = ["strategy"]
    for name, result in results.items():
        heads += [f"{name} ({result['tasks']} tasks), ms", "x floor 2"]
        heads += [f"{library}, x ours" for library in LIBRARIES]
    lines = [_line(heads), _line(["---", *["--:"] * (len(heads) - 1)])]
    for variant in _in_all(results):
        cells = [variant]
        for result in results.values():
            row = result["variants"].get(variant)
            if row is None:
                cells += ["-"] * (2 + len(LIBRARIES))
                continue
            cells += [f"{row['median'] * 1e3:.1f}", f"{row['ratios']['floor 2']:.2f}"]
            cells += [_cell(row["peers"].get(library)) for library in LIBRARIES]
        lines.append(_line(cells))
    failures = {
        f"{library} {variant}, {name}: {peer['fails']}"
        for name, result in results.items()
        for variant, row in result["variants"].items()
        for library, peer in row["peers"].items()
        if "fails" in peer
    }
    missing = {line for result in results.values() for line in result["missing"]}
    return "\n".join([*lines, "", *sorted(failures), *sorted(missing), ""])


def _in_all(results: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    return max((result["variants"] for result in results.values()), key=len)


def _cell(peer: Mapping[str, Any] | None) -> str:
    if peer is None:
        return "-"
    return "fails" if "fails" in peer else f"{peer['to_ours']:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or JSON."""
    parser = reporting.parser_of(__doc__, MEASURED)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"by default {ROUNDS}")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument("--to", type=Path, help="a file to which JSON goes beside the table")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    environment = {**reporting.describe(device), "busy": options.busy}
    with reporting.others_at_work(options.busy):
        results = {
            name: measure(name, device, options.rounds, with_peers=not options.no_peers)
            for name in options.workload
        }
    everything = json.dumps({"environment": environment, "workloads": results}, indent=2) + "\n"
    if options.to:
        options.to.write_text(everything)
    sys.stdout.write(everything if options.json else reporting.header(environment) + table(results))


if __name__ == "__main__":
    main()
