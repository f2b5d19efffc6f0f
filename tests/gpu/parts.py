"""The parts, in order of worth: what each does, and how long it may take on one H100."""

import importlib
from collections.abc import Iterator
from typing import NamedTuple

from tests.gpu.rows import Row, Setting


class Part(NamedTuple):
    """One part of the run. Its module has a function ``measure``, from a setting to rows."""

    name: str
    seconds: float
    plan: str
    """What it does, as the answer where there is no GPU."""

    def measure(self, setting: Setting) -> Iterator[Row]:
        """Measure, importing what that takes: a package that is missing is this part's failure."""
        rows: Iterator[Row] = importlib.import_module(f"tests.gpu.{self.name}").measure(setting)
        return rows


PARTS = (
    Part(
        "suite",
        140,
        "the library's tests with MTBALANCE_TEST_DEVICE=cuda, by pytest-xdist where it is there",
    ),
    Part(
        "steps",
        95,
        "what a step costs for every workload of tests/benchmarks, with peers, in float32 and "
        "under bfloat16 autocast, with `chunk`, `every`, `dtype` and `features`: medians of "
        "interleaved rounds, times their floor",
    ),
    Part(
        "tiles",
        45,
        "time and peak memory of a step with 4,096 and 16,384 tiles for each strategy, and whether "
        "attention does without an n x n matrix",
    ),
    Part(
        "waits",
        25,
        "how often the host waits for the device in a step, for every strategy and every "
        "`nonfinite`: none for CAGrad and PCGrad of two tasks with 'propagate', at most one else",
    ),
    Part("demo", 55, "python -m examples.pathology demo --device cuda, from slides to the report"),
    Part(
        "extraction",
        45,
        "tiles per second through CTransPath's architecture: float32, TF32, bfloat16, "
        "channels-last, torch.compile",
    ),
    Part("together", 25, "two processes on one GPU (gloo) against one with the whole batch"),
    Part(
        "agreement",
        20,
        "what one step of every strategy writes, against the same step on the CPU, in float64 and "
        "float32",
    ),
    Part("catalogue", 30, "what a step costs with every strategy, on a Transformer and an MLP"),
)
