"""What steps cost, by the clock of ``tests.benchmarks.step_cost``."""

from collections.abc import Iterator, Mapping
from typing import Any

from tests.benchmarks import step_cost
from tests.benchmarks.step_cost import PRECISIONS
from tests.benchmarks.workloads import TINY, WORKLOADS
from tests.gpu.rows import Row, Setting, attempted, milliseconds

ROUNDS = 60
"""At most: the time decides."""
MARGIN = 10.0
"""Seconds for imports, and for models to be made."""
QUICK = ("equal+sum", "equal+cagrad", "equal+cagrad, chunk 16", "torchjd cagrad seq gram")


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each workload: in float32 all of them, then under autocast."""
    workloads = TINY if setting.quick else WORKLOADS
    share = setting.share(len(workloads) * len(PRECISIONS), MARGIN)
    for precision in PRECISIONS:
        for name in workloads:
            what = f"{name}, {precision}"
            yield from attempted(what, _rows, what, name, precision, share, setting)


def _rows(what: str, name: str, precision: str, seconds: float, setting: Setting) -> Iterator[Row]:
    result = step_cost.measure(
        name,
        setting.device,
        rounds=1 if setting.quick else ROUNDS,
        chosen=QUICK if setting.quick else None,
        with_options=True,
        precision=precision,
        most_seconds=seconds,
    )
    yield Row(what, _found(result["variants"], result["rounds"]), result)
    for variant, why in result["failures"].items():
        yield Row(f"{what}: {variant}", f"fails: {why}")
    for line in result["missing"]:
        yield Row(what, line)


def _found(variants: Mapping[str, Mapping[str, Any]], rounds: int) -> str:
    """Return the floors in milliseconds and everything else in its floor."""
    floors = [f"{f} {milliseconds(variants[f]['median'])}" for f in step_cost.FLOORS]
    cells = []
    for variant, row in variants.items():
        if variant not in step_cost.FLOORS:
            floor = step_cost.floor_of(variant)
            cells.append(f"{variant} {row['ratios'][floor]:.2f} x {floor}")
    return f"{', '.join(floors)}; {', '.join(cells)} ({rounds} rounds)"
