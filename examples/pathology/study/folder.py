"""A benchmark on disk: which run is where, and all of it read back.

Every method on every auxiliary target is an ordinary run folder of `crossval`, and every deployed
one an ordinary folder of `deploy`, so that `report`, `deploy` and `heatmap` work on them alone. The
baseline knows the primary target only and is the same for every auxiliary target, unless complete
cases are asked for: then each auxiliary target has patients, splits and a baseline of its own.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.results.folds import FoldResult, read_predictions
from examples.pathology.results.runs import Run, read_run
from examples.pathology.settings.benchmark import folder_name
from examples.pathology.settings.crossval import BASELINE

SETTINGS = "study.toml"  # a folder that has it belongs to a benchmark
LEDGER = "jobs.csv"
RUNS, EXTERNAL, REPORT = "runs", "external", "report"


@dataclass(frozen=True)
class Deployed:
    """A run deployed on the external cohort, read from its folder.

    Args:
        name: The method.
        folder: Where it is.
        summary: What ``metrics.json`` holds.
        results: Of every fold's model on all external patients.
        ensemble: The mean of all models; its embeddings are those of the first.
    """

    name: str
    folder: Path
    summary: Mapping[str, Any]
    results: tuple[FoldResult, ...]
    ensemble: FoldResult


@dataclass(frozen=True)
class Panel:
    """One auxiliary target with every method.

    Args:
        auxiliary: The auxiliary target.
        runs: Finished runs by method, the baseline first; a method that failed is not in it.
        deployed: Those of them that were deployed, by method.
    """

    auxiliary: str
    runs: Mapping[str, Run]
    deployed: Mapping[str, Deployed]


@dataclass(frozen=True)
class JobRow:
    """What became of one job.

    Args:
        key: Which one: ``AUXILIARY/METHOD/fold-K`` or ``.../results`` or ``.../deploy``.
        status: ``done``, ``failed``, or ``skipped`` because something it needs failed.
        error: Why it failed.
        seconds: How long it took, in the process that finished it; 0 if it was done already.
        attempts: How often it was begun in this invocation.
    """

    key: str
    status: str
    error: str
    seconds: float
    attempts: int


@dataclass(frozen=True)
class Study:
    """A benchmark, read back; runs that failed are missing and stand in `jobs`.

    Args:
        folder: Where it is.
        settings: What ``study.toml`` holds under ``[benchmark]``: all settings.
        provenance: What it holds under ``[provenance]``: versions, machine, features, data.
        methods: All methods asked for, in order of the tables.
        panels: One per auxiliary target.
        jobs: What became of every job of the last invocation.
    """

    folder: Path
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    methods: tuple[str, ...]
    panels: tuple[Panel, ...]
    jobs: tuple[JobRow, ...]

    @property
    def deployed(self) -> bool:
        """Whether there is an external cohort."""
        return any(panel.deployed for panel in self.panels)


def run_folder(auxiliary: str, method: str, *, own_baseline: bool) -> Path:
    """Return where a run is, relative to ``runs/`` or ``external/``.

    Args:
        auxiliary: The auxiliary target.
        method: The method.
        own_baseline: Whether each auxiliary target has a baseline of its own.
    """
    if method == BASELINE and not own_baseline:
        return Path(BASELINE)
    return Path(folder_name(auxiliary)) / method


def read_study(folder: Path) -> Study:
    """Read a benchmark's folder.

    Raises:
        UserError: It is none, or no run in it is finished.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(f"`run` must be the folder of a benchmark, but {folder} has no {SETTINGS}.")
    stored = read_toml(path)
    settings = stored["benchmark"]
    methods = tuple(settings["methods"])
    panels = []
    for auxiliary in settings["auxiliary"]:
        places = {
            method: run_folder(auxiliary, method, own_baseline=settings["complete_cases"])
            for method in methods
        }
        finished = {
            method: place
            for method, place in places.items()
            if (folder / RUNS / place / "metrics.json").exists()
        }
        panels.append(
            Panel(
                auxiliary,
                {m: read_run(folder / RUNS / place, m) for m, place in finished.items()},
                {
                    m: read_deployed(folder / EXTERNAL / place, m)
                    for m, place in finished.items()
                    if (folder / EXTERNAL / place / "metrics.json").exists()
                },
            )
        )
    if not any(panel.runs for panel in panels):
        raise UserError(f"`run` must hold a finished run, but none of {folder} is finished.")
    return Study(
        folder,
        settings,
        stored.get("provenance", {}),
        methods,
        tuple(panels),
        read_jobs(folder / LEDGER),
    )


def read_deployed(folder: Path, name: str) -> Deployed:
    """Read what `deploy` wrote."""
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    thresholds = [*summary["thresholds"], summary["threshold_of_ensemble"]]
    places = [folder / f"fold-{k + 1}" for k in range(len(summary["thresholds"]))]
    results = []
    for place, predictions, threshold in zip(
        [*places, places[0]], [*places, folder], thresholds, strict=True
    ):
        results.append(
            FoldResult(
                read_predictions(predictions / "predictions.csv"),
                np.load(place / "embeddings.npy", allow_pickle=False),
                best_epoch=0,
                epochs=0,
                seconds=0.0,
                threshold=math.nan if threshold is None else float(threshold),
            )
        )
    *by_fold, ensemble = results
    return Deployed(name, folder, summary, tuple(by_fold), ensemble)


def read_jobs(path: Path) -> tuple[JobRow, ...]:
    """Read the ledger of jobs; a benchmark that was stopped early has none."""
    if not path.exists():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            JobRow(
                row["job"], row["status"], row["error"], float(row["seconds"]), int(row["attempts"])
            )
            for row in csv.DictReader(file)
        )
