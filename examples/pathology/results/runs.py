"""A finished run, read back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import whole
from examples.pathology.common.toml import read_toml
from examples.pathology.results.folds import FoldResult, read_fold
from examples.pathology.results.summary import RunSummary, read_summary


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Args:
        name: Its row in a table: the method, with the folder if two runs share a method.
        folder: Where it is.
        summary: What ``metrics.json`` says.
        results: Of every fold.
    """

    name: str
    folder: Path
    summary: RunSummary
    results: tuple[FoldResult, ...]


def read_run(folder: Path) -> Run:
    """Read a finished run, under the name of its method."""
    summary = read_summary(folder)
    folds = range(1, len(summary.seconds) + 1)
    return Run(
        summary.method, folder, summary, tuple(read_fold(folder / f"fold-{k}") for k in folds)
    )


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
    count = run_settings(run)["folds"]
    return [run / f"fold-{k}" for k in range(1, count + 1)]


def run_settings(run: Path) -> dict[str, Any]:
    """Return the settings that a run was made with.

    Raises:
        UserError: Its ``config.toml`` is damaged or gone.
    """
    path = run / "config.toml"
    with whole(path, "Put it back, or run `crossval` into a new folder."):
        settings: dict[str, Any] = read_toml(path)["crossval"]
        settings["folds"] = int(settings["folds"])
        if "balancer" not in settings:
            raise ValueError("it does not say which `balancer` it was made with")
    return settings
