"""How often the host waits for the device in a step.

On a GPU PyTorch tells (``torch.cuda.set_sync_debug_mode``); elsewhere the pretended device does,
which counts the same reads and copies.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests._pretended import DEVICE as PRETENDED
from tests._pretended import Pretended
from tests.benchmarks import catalogue
from tests.benchmarks.workloads import mlp
from tests.gpu.rows import Row, Setting, attempted

POLICIES = ("propagate", "raise", "drop", "skip")
TASKS = (2, 3)
LIMITED = ("equal+cagrad", "equal+pcgrad")
"""Variants for which a number of waits is prescribed."""
WARMUP = 3
"""Steps that are not counted: what depends on the tasks alone is made in the first ones."""
MESSAGE = "called a synchronizing CUDA operation"


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each strategy and number of tasks."""
    there = setting.device.type == "cuda"
    for m in TASKS:
        for variant in LIMITED if setting.quick else catalogue.variants(m):
            if not (setting.quick or variant.startswith("equal+") or variant.endswith("+sum")):
                continue  # a weighting beside CAGrad waits as both do
            what = f"{variant}, {m} tasks"
            device = setting.device if there else PRETENDED
            yield from attempted(what, _rows, what, variant, m, device)


def limit_of(variant: str, m: int, policy: str) -> int | None:
    """Return how often the host may wait at most, where that is prescribed."""
    if variant not in LIMITED:
        return None
    return 0 if m == 2 and policy == "propagate" else 1


def _rows(what: str, variant: str, m: int, device: torch.device) -> Iterator[Row]:
    counts, places, good = [], {}, None
    for policy in POLICIES:
        found = waits_of(variant, m, policy, device)
        limit = limit_of(variant, m, policy)
        over = limit is not None and len(found) > limit
        good = good if limit is None else (good is not False) and not over
        counts.append(f"{policy} {len(found)}" + (f" (at most {limit})" if over else ""))
        places[policy] = dict(Counter(found))
    yield Row(what, ", ".join(counts), places, good)


def waits_of(variant: str, m: int, policy: str, device: torch.device) -> list[str]:
    """Return where the host waits in one step, as file:line, once the first steps are over."""
    with _counting(device) as waits, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of fallbacks, as of Krum with few tasks
        options = {"primary": None} if variant in LIMITED else {}
        workload = mlp(device, m, width=8, size=4)
        balancer = catalogue.balancer_of(workload, variant, nonfinite=policy, **options)
        step = catalogue.step_of(workload, balancer)
        for _ in range(WARMUP):
            workload.model.zero_grad()
            step()
        waits.clear()
        workload.model.zero_grad()
        step()
        return list(waits)


@contextmanager
def _counting(device: torch.device) -> Iterator[list[str]]:
    """Give a list of the waits so far."""
    if device.type != "cuda":
        with Pretended() as pretended:
            yield pretended.waits
        return
    waits: list[str] = []

    def note(
        message: Warning | str, category: object, filename: str, line: int, *_: object
    ) -> None:
        if MESSAGE in str(message):
            waits.append(f"{Path(filename).name}:{line}")

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
