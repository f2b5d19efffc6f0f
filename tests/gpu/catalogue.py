"""What a step costs with every strategy, by the clock of ``tests.benchmarks.catalogue``."""

from collections.abc import Iterator

from tests.benchmarks import catalogue
from tests.gpu.rows import Row, Setting, attempted, listed, milliseconds

ROUNDS = 30
"""At most: the time decides."""
MARGIN = 10.0
"""Seconds for imports, and for models to be made."""


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each workload."""
    names = ("tiny-mlp",) if setting.quick else catalogue.MEASURED
    share = setting.share(len(names), MARGIN)
    for name in names:
        yield from attempted(name, _rows, name, share, setting)


def _rows(name: str, seconds: float, setting: Setting) -> Iterator[Row]:
    rounds = 1 if setting.quick else ROUNDS
    result = catalogue.measure(name, setting.device, rounds, with_peers=False, most_seconds=seconds)
    variants = result["variants"]
    floor = milliseconds(variants["floor 2"]["median"])
    ratios = {v: r["ratios"]["floor 2"] for v, r in variants.items() if not v.startswith("floor")}
    yield Row(name, f"floor 2 {floor}; times floor 2: {listed(ratios)}", result)
