"""The library's tests, computing on the GPU."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.gpu.conduct import ROOT
from tests.gpu.rows import Row, Setting

ELSEWHERE = (
    "benchmarks",  # choose their device themselves, as the next five
    "digits",
    "distributed",  # the part `together`
    "gpu",
    "pathology",  # the parts `demo`, `extraction`
    "toy",
    "typing",
    "test_architecture.py",  # about files, as the next
    "test_docs.py",
)
"""What of the tests does not compute where ``MTBALANCE_TEST_DEVICE`` says."""
QUICK = ("tests/gradient/test_sum.py",)
PROCESSES = 8
MARGIN = 8.0
"""Seconds to tell what was found, when the time is over."""

_TOLD = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<after>.+?)"
    r"|(?P<before>tests/.+?) (?P<last>[A-Z]+)(?: .*)?\[ *\d+%\])\s*$"
)
_WHY = re.compile(r"^(?:FAILED|ERROR) (?P<test>tests/.+?) - (?P<why>.+)$")


class Told(NamedTuple):
    """What pytest has told, line by line."""

    counts: Counter[str]
    """How many tests have ended in which way."""
    failed: list[str]
    reasons: dict[str, str]
    """By test, for those that it gives one for (at the end)."""


def told_by(lines: Iterable[str]) -> Told:
    """Read the lines of ``pytest -v -rfE``, with pytest-xdist or without."""
    told = Told(Counter(), [], {})
    for line in lines:
        if found := _TOLD.match(line):
            word = found["first"] or found["last"]
            told.counts[word] += 1
            if word in ("FAILED", "ERROR"):
                told.failed.append(found["after"] or found["before"])
        elif found := _WHY.match(line):
            told.reasons[found["test"]] = found["why"].strip()
    return told


def measure(setting: Setting) -> Iterator[Row]:
    """Run the tests; when the time is over, tell of those that have ended."""
    processes = 0 if setting.quick or importlib.util.find_spec("xdist") is None else PROCESSES
    start = time.monotonic()
    with subprocess.Popen(
        command(processes, quick=setting.quick),
        cwd=ROOT,
        env={**os.environ, "MTBALANCE_TEST_DEVICE": setting.device.type},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        timer = threading.Timer(setting.seconds - MARGIN, process.kill)
        timer.start()
        assert process.stdout is not None
        lines = list(process.stdout)
        killed = process.wait() < 0
        timer.cancel()
    told, took = told_by(lines), time.monotonic() - start
    if not told.counts:
        raise RuntimeError(f"pytest has run no test: {' '.join(''.join(lines).split())[-300:]}")
    yield from rows_of(told, took, processes or 1, stopped=killed)


def command(processes: int, *, quick: bool) -> list[str]:
    """Return the command line of pytest."""
    line = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    line += ["-n", str(processes)] if processes else []
    ignored = [f"--ignore=tests/{name}" for name in ELSEWHERE]
    return [*line, *(QUICK if quick else ["tests", *ignored])]


def rows_of(told: Told, took: float, processes: int, *, stopped: bool) -> Iterator[Row]:
    """Yield a row for all tests, and one for each file with tests that fail."""
    counts = ", ".join(f"{count} {word.lower()}" for word, count in sorted(told.counts.items()))
    where = f"in {took:.0f} s by {processes} processes"
    yield Row(
        "all tests" if not stopped else "the tests that have ended in time",
        f"{counts} {where}" + (", then stopped" if stopped else ""),
        {"counts": dict(told.counts), "failed": told.failed, "reasons": told.reasons},
        good=not told.failed and not stopped,
    )
    for file, names in sorted(_by_file(told.failed).items()):
        why = next((told.reasons[name] for name in names if name in told.reasons), "")
        first = names[0].partition("::")[2]
        yield Row(file, f"{len(names)} fail, first {first}: {why[:200]}", good=False)


def _by_file(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition("::")[0], []).append(name)
    return found
