"""A finished run, read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.results import metrics
from examples.pathology.results.folds import (
    FoldResult,
    read_fold,
)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Args:
        name: Its row in the table: the method, with the folder if two runs share a method.
        folder: Where it is.
        summary: What ``metrics.json`` holds.
        results: Of every fold.
    """

    name: str
    folder: Path
    summary: Mapping[str, Any]
    results: tuple[FoldResult, ...]

    def scores(self, metric: str) -> list[metrics.Score]:
        """Return a figure of every fold, NaN with the reason where it is not defined."""
        value = self.summary["metrics"][metric]
        return [
            metrics.Score(
                math.nan if number is None else number, value["undefined"].get(str(k), "")
            )
            for k, number in enumerate(value["folds"], start=1)
        ]


def read_run(folder: Path, name: str) -> Run:
    """Read a finished run.

    Args:
        folder: Its folder.
        name: Its row in a table.
    """
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    folds = range(1, len(summary["seconds"]) + 1)
    return Run(name, folder, summary, tuple(read_fold(folder / f"fold-{k}") for k in folds))


def fold_folders(run: Path) -> list[Path]:
    """Return the folders of the folds of a finished run.

    Raises:
        UserError: It is none.
    """
    if not (run / "metrics.json").exists():
        raise UserError(
            f"`run` must be a finished run of `crossval`, but {run} is none. Run `crossval` first, "
            "or again to finish it."
        )
    count = int(read_toml(run / "config.toml")["crossval"]["folds"])
    return [run / f"fold-{k}" for k in range(1, count + 1)]
