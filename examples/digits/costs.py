"""How long a step of each method takes, beside one of the baseline."""

import csv
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from examples.digits.data import Pictures
from examples.digits.methods import BASELINE, SINGLE
from examples.digits.setting import TASKS, Setting
from examples.digits.training import Training, one_thread

COSTS = "costs.csv"
ROUNDS, QUICK_ROUNDS = 15, 7
STEPS = 10
"""In a round, of each method."""

WARM_EPOCHS = 5
"""Of two steps each, before anything is measured: some methods only rest in their first epochs."""

_NUMBERS = ("ratio", "low", "high", "milliseconds")


@dataclass(frozen=True)
class Cost:
    """Time of a step, as a multiple of the baseline's.

    Args:
        ratio: Median over the rounds; NaN if the method failed.
        low: Lower end of a 95 % interval of that median; NaN for too few rounds.
        high: Upper end.
        milliseconds: Median of a step.
        error: Why the method failed; empty if it did not.
    """

    ratio: float
    low: float
    high: float
    milliseconds: float
    error: str = ""


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the two values between which the median lies with a probability of at least `level`.

    The number of values below the true median is binomial, whatever their distribution.

    Args:
        values: Independent measurements.
        level: Of the interval.
    """
    count = len(values)
    below = int(binom.ppf((1 - level) / 2, count, 0.5))
    if binom.cdf(below, count, 0.5) > (1 - level) / 2:
        below -= 1
    if below < 0:
        return math.nan, math.nan
    ordered = sorted(values)
    return ordered[below], ordered[count - 1 - below]


def measure(methods: Sequence[str], setting: Setting, rounds: int = ROUNDS) -> dict[str, Cost]:
    """Measure all methods, in rounds in which each has its turn, with one thread.

    Args:
        methods: Names of the catalogue; the baseline and the reference are measured with them.
        setting: Of the trainings.
        rounds: To take medians over.
    """
    names = [BASELINE, SINGLE, *(name for name in methods if name != BASELINE)]
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runners = {name: _Runner(name, setting) for name in names}
        for runner in runners.values():
            runner.warm_up()
        times = np.array([[runners[name].time() for name in names] for _ in range(rounds)])
    return {
        name: _cost(times[:, i], times[:, 0], runners[name].error) for i, name in enumerate(names)
    }


def _cost(times: NDArray[np.float64], base: NDArray[np.float64], error: str) -> Cost:
    if error:
        return Cost(math.nan, math.nan, math.nan, math.nan, error)
    ratios = times / base
    low, high = median_interval(ratios.tolist())
    return Cost(float(np.median(ratios)), low, high, 1000 * float(np.median(times)))


class _Runner:
    """Takes steps of a method, or of three networks for the reference."""

    def __init__(self, name: str, setting: Setting) -> None:
        parts = [f"{SINGLE}:{task}" for task in TASKS] if name == SINGLE else [name]
        self.trainings: list[Training] = []
        self.batches: list[Pictures] = []
        self.error = ""
        with self._noting_errors():
            self.trainings = [Training(part, 0, setting.rates[0], setting) for part in parts]
            batches = list(self.trainings[0].epoch())
            self.batches = [batches[i % len(batches)] for i in range(STEPS)]

    def warm_up(self) -> None:
        for _ in range(WARM_EPOCHS):
            self._take(self.batches[:2])
            for training in self.trainings:
                training.end_epoch()

    def time(self) -> float:
        """Return the seconds of one step."""
        start = perf_counter()
        self._take(self.batches)
        return (perf_counter() - start) / STEPS

    def _take(self, batches: Sequence[Pictures]) -> None:
        with self._noting_errors():
            for batch in batches:
                for training in self.trainings:
                    training.step(batch)

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # a method that fails is a result
            self.error = self.error or f"{type(caught).__name__}: {caught}"


def measured(methods: Sequence[str], setting: Setting, out: Path, rounds: int) -> dict[str, Cost]:
    """Return the costs that a folder holds, or measure them all and write them there.

    Ratios are of times that were taken by turns: one method is never measured without the others.

    Args:
        methods: As in `measure`.
        setting: Of the trainings.
        out: The folder.
        rounds: As in `measure`.
    """
    path = out / COSTS
    if path.exists():
        found = read(out)
        if {BASELINE, SINGLE, *methods} <= found.keys():
            return found
    costs = measure(methods, setting, rounds)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", *_NUMBERS, "error"])
        for name, cost in costs.items():
            numbers = (f"{getattr(cost, key):.4f}" for key in _NUMBERS)
            writer.writerow([name, *numbers, " ".join(cost.error.split())])
    return read(out)


def read(out: Path) -> dict[str, Cost]:
    """Return the costs that a folder holds."""
    with (out / COSTS).open(encoding="utf-8", newline="") as file:
        return {
            row["method"]: Cost(**{key: float(row[key]) for key in _NUMBERS}, error=row["error"])
            for row in csv.DictReader(file)
        }
