"""Runs parts one after the other, each in a process of its own, and makes the table of them."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu.parts import Part
from tests.gpu.rows import Row, read_rows

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 5.0
"""With less time left than this, a part is not begun."""
TAIL = 2000
"""How many characters of what a part has printed are kept."""

MARKS = {None: "", True: "ok", False: "**!**"}
"""The last column, by whether a row is as it should be."""

Command = Callable[[Part, Path, float], Sequence[str]]
"""From a part, the file for its rows and its seconds to a command line."""


class Outcome(NamedTuple):
    """What became of a part."""

    part: str
    status: str
    """In words, for the table."""
    finished: bool
    seconds: float
    rows: list[Row]
    printed: str
    """The end of what it has printed."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**self._asdict(), "rows": [row._asdict() for row in self.rows]}


def conduct(
    parts: Iterable[Part],
    command: Command,
    seconds: float,
    tell: Callable[[str], object] = lambda line: None,
) -> list[Outcome]:
    """Run parts, whatever becomes of those before.

    Args:
        parts: The parts, the most worth knowing first.
        command: Returns the command line of a part.
        seconds: How long all of them may take together.
        tell: Hears of each part as it ends.
    """
    end = time.monotonic() + seconds
    outcomes = []
    for part in parts:
        limit = min(part.seconds, end - time.monotonic())
        if limit < LEAST_SECONDS:
            outcome = Outcome(part.name, "not begun: no time is left", False, 0.0, [], "")
        else:
            outcome = _run(part, command, limit)
        tell(f"{outcome.part}: {outcome.status}")
        outcomes.append(outcome)
    return outcomes


def _run(part: Part, command: Command, limit: float) -> Outcome:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        rows, printed = Path(folder, "rows"), Path(folder, "printed")
        with printed.open("wb") as output:
            process = subprocess.Popen(
                command(part, rows, limit),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own, which can be ended as one
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end_group_of(process)
        took = time.monotonic() - start
        text = printed.read_text(errors="replace")
        status = _status(code, took, limit, text)
        return Outcome(part.name, status, code == 0, took, read_rows(rows), text[-TAIL:])


def _end_group_of(process: "subprocess.Popen[bytes]") -> None:
    """End what a part has started and left behind, and the part itself if it is still there."""
    with contextlib.suppress(ProcessLookupError):  # nothing was left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(code: int | None, took: float, limit: float, printed: str) -> str:
    if code is None:
        return f"stopped after its {limit:.0f} s"
    if code != 0:
        last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
        return f"failed after {took:.0f} s (exit status {code}): {last.strip()[:200]}"
    return f"done in {took:.0f} s of {limit:.0f}"


def command_of(device: str, *, quick: bool) -> Command:
    """Return what starts parts as this package does."""

    def command(part: Part, rows: Path, seconds: float) -> list[str]:
        line = [sys.executable, "-u", "-m", "tests.gpu", "--part", part.name, "--rows", str(rows)]
        line += ["--seconds", f"{seconds:.1f}", "--device", device]
        return [*line, "--quick"] if quick else line

    return command


def table(outcomes: Iterable[Outcome]) -> str:
    """Return one Markdown table: a line for each part, and below it one for each of its rows."""
    lines = ["| part | what | found | |", "|---|---|---|---|"]
    for outcome in outcomes:
        mark = MARKS[None if outcome.finished else False]
        lines.append(_line(f"**{outcome.part}**", "", outcome.status, mark))
        lines += [_line("", row.what, row.found, MARKS[row.good]) for row in outcome.rows]
    return "\n".join([*lines, ""])


def _line(*cells: str) -> str:
    escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
