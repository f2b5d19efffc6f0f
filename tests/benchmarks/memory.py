"""What balancing costs in memory: the peak of a step above that of a plain step.

Counted are the bytes that PyTorch's allocator holds, from before the first of two steps, so that
whatever a Balancer keeps from one step to the next counts too. The unit is one gradient of the
shared parameters: with m tasks, an exact method holds m of them where a plain step holds one. The
floors are those of ``step_cost``: what m backward passes hold that keep the graph for each other.

    python -m tests.benchmarks.memory
    python -m tests.benchmarks.memory --workload mlp-4 --json
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler greets in every measurement

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import reporting
from tests.benchmarks.step_cost import FLOORS, OPTIONAL, VARIANTS, balanced_step, balancers, floors
from tests.benchmarks.workloads import TINY, WORKLOADS

MEASURED = (
    "equal+sum",
    "equal+pcgrad",
    "equal+cagrad",
    "equal+graddrop",
    "autol+cagrad",
    "equal+cagrad, bfloat16",
)
DEFAULT = ("mlp-2", "mlp-4", "mlp-8", "transformer-256", "transformer-1024")


class Use(NamedTuple):
    """Bytes on top of what was there before."""

    peak: int
    kept: int
    """At the end."""


def memory_of(run: Callable[[], None], device: torch.device) -> Use:
    """Return what a function uses on a device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peak, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Use(peak - before, kept - before)
    # The allocator of the CPU has no statistics, but tells the profiler of every block.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return _replayed(_blocks(profiler))


def _blocks(profiler: profile) -> list[tuple[int, int]]:
    """Return address and size of every block taken, and minus its size of every one given back."""
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    events = [e for e in _walk(roots) if e.typed[0] == _EventType.Allocation]
    events.sort(key=lambda event: event.start_time_ns)
    on_cpu = (e.typed[1] for e in events if e.typed[1].device.type == "cpu")
    return [(block.ptr, block.alloc_size) for block in on_cpu]


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def _replayed(blocks: Iterable[tuple[int, int]]) -> Use:
    live: dict[int, int] = {}
    total = peak = 0
    for address, size in blocks:
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
        else:
            # What was there before the profiler is none of the function's.
            total -= live.pop(address, 0)
    return Use(peak, total)


def measure(name: str, device: torch.device) -> dict[str, Any]:
    """Return everything about one workload, as plain values, in gradients of the shared part."""
    workload = {**WORKLOADS, **TINY}[name](device)
    m = len(workload.tasks)
    variants = {variant: (VARIANTS | OPTIONAL)[variant] for variant in MEASURED}
    made = balancers(workload, variants)
    plain, *passes = floors(workload).values()
    steps = dict(zip(FLOORS[1:], passes, strict=True))
    for variant, balancer in made.items():
        steps[variant] = balanced_step(workload, balancer, variants[variant])
    trained = nn.ModuleList([workload.model, *made.values()])

    def use_of(step: Callable[[], None]) -> Use:
        def two_steps() -> None:
            step()
            trained.zero_grad(set_to_none=True)
            step()

        trained.zero_grad(set_to_none=True)
        return memory_of(two_steps, device)

    plain()  # libraries take what they keep for ever, in whichever step is first
    floor = use_of(plain)
    unit = sum(p.numel() * p.element_size() for p in workload.parameters)
    rows = {}
    for variant, step in steps.items():
        use = use_of(step)
        rows[variant] = {
            "extra": (use.peak - floor.peak) / unit,
            "left": (use.kept - floor.kept) / unit,
        }
        if variant in made:
            rows[variant]["limit"] = m + 0.1
    return {
        "tasks": m,
        "unit_bytes": unit,
        "plain": {"peak": floor.peak / unit, "kept": floor.kept / unit},
        "variants": rows,
    }


def table(name: str, result: dict[str, Any]) -> str:
    """Return one workload as text."""
    plain = result["plain"]
    size = f"{result['tasks']} tasks, unit {result['unit_bytes'] / 2**20:.1f} MiB"
    lines = [
        f"{name}: {size}; a plain step takes {plain['peak']:.2f} and leaves {plain['kept']:.2f}",
        f"{'':28}{'extra':>8}{'left':>8}",
    ]
    for variant, row in result["variants"].items():
        line = f"{variant:28}{row['extra']:8.2f}{row['left']:8.2f}"
        if "limit" in row:
            line += f"  at most {row['limit']:.1f}"
            line += ", OVER" if row["extra"] > row["limit"] else ""
        lines.append(line)
    return "\n".join([*lines, "", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table per workload, or JSON."""
    options = reporting.parser_of(__doc__, DEFAULT).parse_args(arguments)
    reporting.report(options, measure, table)


if __name__ == "__main__":
    main()
