"""All trainings of a study: shared out over processes, each remembered when it is done."""

import csv
import json
import math
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from multiprocessing import get_context, parent_process
from os import _exit
from pathlib import Path

import torch
from tqdm import tqdm

import mtbalance
from examples.digits.methods import SINGLE
from examples.digits.setting import TASKS, Setting
from examples.digits.training import DIGITS, Measured, train

TRAININGS, PLAN = "trainings.csv", "setting.json"


@dataclass(frozen=True)
class Job:
    """One training: a method, a repetition, a learning rate."""

    method: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Done:
    """What came of a training.

    Args:
        job: The training.
        validation: What the network gets right there; None if the training failed.
        test: Likewise.
        error: Why it failed; empty if it has not.
        warning: What was warned of first; empty if nothing was.
    """

    job: Job
    validation: Measured | None
    test: Measured | None
    error: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Plan:
    """What a study is made of.

    Args:
        methods: Names of the methods that are compared; the reference is not among them.
        seeds: Number of repetitions.
        setting: What all trainings have in common.
        missing: Methods of the catalogue that are left out.
    """

    methods: tuple[str, ...]
    seeds: int
    setting: Setting
    missing: tuple[str, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """All trainings, one repetition after the other."""
        names = [*(f"{SINGLE}:{task}" for task in TASKS), *self.methods]
        return [
            Job(name, seed, rate)
            for seed in range(self.seeds)
            for name in names
            for rate in self.setting.rates
        ]


class OtherSettingError(ValueError):
    """A folder holds trainings that cannot be compared with those that were asked for."""


def attempt(job: Job, setting: Setting) -> Done:
    """Train; an error becomes a part of the result."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        try:
            measured = train(job.method, job.seed, job.rate, setting)
            error = ""
        except Exception as caught:  # noqa: BLE001  # a method that fails is a result
            error = f"{type(caught).__name__}: {caught}"
    warning = str(told[0].message) if told else ""
    validation, test = (None, None) if error else measured
    return Done(job, validation, test, _one_line(error), _one_line(warning))


def run(plan: Plan, out: Path, processes: int) -> list[Done]:
    """Make all trainings that a folder does not hold yet.

    Args:
        plan: What is to be trained.
        out: The folder, which exists.
        processes: That train side by side; what they do does not depend on their number.

    Returns:
        Those of the plan, in its order.

    Raises:
        OtherSettingError: If the folder holds trainings with another setting.
    """
    journal = Journal(out / TRAININGS)
    _write_plan(plan, out / PLAN, has_trainings=bool(journal.done))
    missing = [job for job in plan.jobs if job not in journal.done]
    bar = tqdm(total=len(plan.jobs), initial=len(plan.jobs) - len(missing), unit="training")
    with bar:
        for done in _results(missing, plan.setting, processes):
            journal.add(done)
            bar.set_postfix_str(done.job.method, refresh=False)
            bar.update()
    journal.sort(plan.jobs)
    return [journal.done[job] for job in plan.jobs]


def _results(jobs: Sequence[Job], setting: Setting, processes: int) -> Iterator[Done]:
    if processes == 1:
        yield from (attempt(job, setting) for job in jobs)
    elif jobs:
        with _pool(processes) as pool:
            waiting: list[Future[Done]] = [pool.submit(attempt, job, setting) for job in jobs]
            yield from (future.result() for future in as_completed(waiting))


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _stop_with_the_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _stop_with_the_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it has ended, however it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            _exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Journal:
    """A file with a line for each training that is done.

    Args:
        path: The .csv file. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[Job, Done] = {}
        if path.exists():
            whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
            for row in csv.DictReader(whole.splitlines()):
                done = _from_row(row)
                self.done[done.job] = done
        self._write(self.done.values())

    def add(self, done: Done) -> None:
        """Write down a training."""
        self.done[done.job] = done
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(_to_row(done))

    def sort(self, jobs: Sequence[Job]) -> None:
        """Put the lines into the order of a plan; others come last."""
        place = {job: number for number, job in enumerate(jobs)}
        key = lambda done: (place.get(done.job, len(place)), *astuple(done.job))  # noqa: E731
        self._write(sorted(self.done.values(), key=key))

    def _write(self, several: Iterable[Done]) -> None:
        aside = self.path.with_suffix(".part")
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(_to_row(done) for done in several)
        aside.replace(self.path)


_MEASURES = [field.name for field in fields(Measured)]
_PARTS = ("validation", "test")
COLUMNS = [
    *(field.name for field in fields(Job)),
    *(f"{part}_{measure}" for part in _PARTS for measure in _MEASURES),
    "error",
    "warning",
]


def _to_row(done: Done) -> list[str]:
    parts = (done.validation, done.test)
    values = [astuple(part) if part else [math.nan] * len(_MEASURES) for part in parts]
    cells = [
        "" if math.isnan(value) else f"{value:.{DIGITS}f}" for part in values for value in part
    ]
    job = done.job
    return [job.method, str(job.seed), repr(job.rate), *cells, done.error, done.warning]


def _from_row(row: dict[str, str]) -> Done:
    job = Job(row["method"], int(row["seed"]), float(row["rate"]))
    if row["error"]:
        return Done(job, None, None, row["error"], row["warning"])
    validation, test = (
        Measured(*(float(row[f"{part}_{measure}"] or "nan") for measure in _MEASURES))
        for part in _PARTS
    )
    return Done(job, validation, test, "", row["warning"])


def read(out: Path) -> tuple[Plan, list[Done]]:
    """Return what a folder holds: what was asked for last, and what came of it."""
    stored = json.loads((out / PLAN).read_text(encoding="utf-8"))
    setting = Setting(**{**stored["setting"], "rates": tuple(stored["setting"]["rates"])})
    plan = Plan(tuple(stored["methods"]), stored["seeds"], setting, tuple(stored["missing"]))
    with (out / TRAININGS).open(encoding="utf-8", newline="") as file:
        done = {each.job: each for each in map(_from_row, csv.DictReader(file))}
    return plan, [done[job] for job in plan.jobs]


def _write_plan(plan: Plan, path: Path, *, has_trainings: bool) -> None:
    asked = {
        "torch": torch.__version__.partition("+")[0],
        "mtbalance": mtbalance.__version__,
        "setting": json.loads(json.dumps(asdict(plan.setting))),
        "seeds": plan.seeds,
        "methods": list(plan.methods),
        "missing": list(plan.missing),
    }
    if path.exists() and has_trainings:
        stored = json.loads(path.read_text(encoding="utf-8"))
        for key in ("torch", "mtbalance", "setting"):
            if stored[key] != asked[key]:
                raise OtherSettingError(
                    f"`out` must be a folder without trainings of another {key}, but "
                    f"{path} says {stored[key]}, and asked for is {asked[key]}."
                )
    path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def _one_line(text: str) -> str:
    return " ".join(text.split())
