"""What parts tell: one row of the table at a time, so that a part that is stopped has told some."""

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Setting(NamedTuple):
    """How a part is to run."""

    device: torch.device
    quick: bool
    """Whether the smallest size will do, which shows that the part works and measures nothing."""
    seconds: float
    """How long it may take in all."""

    def share(self, count: int, margin: float) -> float:
        """Return the seconds for each of so many measurements, beside a margin for the rest."""
        return max(self.seconds - margin, 1.0) / count


class Row(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    figures: Mapping[str, Any] = {}
    """The same as plain values, for JSON."""
    good: bool | None = None
    """Whether it is as it should be; None where nothing is prescribed."""


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Append each row to a file as soon as it is there."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row._asdict()) + "\n")
            file.flush()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file whose writer may have been stopped in the middle of a line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def listed(values: Mapping[str, float], pattern: str = "{:.2f}") -> str:
    """Return names and numbers as a cell of the table."""
    return ", ".join(f"{name} {pattern.format(value)}" for name, value in values.items())


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def attempted(what: str, measure: Callable[..., Iterable[Row]], *arguments: Any) -> Iterator[Row]:
    """Yield rows, and an error as one more: what comes after it is still to be measured."""
    try:
        yield from measure(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the table
        first = str(error).strip().partition("\n")[0]
        yield Row(
            what,
            f"fails: {type(error).__name__}: {first[:300]}",
            {"traceback": traceback.format_exc()},
            good=False,
        )
