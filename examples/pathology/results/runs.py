"""A finished run, or its deployment on another cohort, read back."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import whole
from examples.pathology.common.toml import read_toml
from examples.pathology.results.folds import (
    FoldResult,
    read_embeddings,
    read_fold,
    read_predictions,
    read_validation,
)
from examples.pathology.results.summary import Metrics, RunSummary, metrics_from_json, read_summary

DEPLOYED = "deploy.toml"  # a folder that has it holds a deployment


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


@dataclass(frozen=True)
class Deployed:
    """A run deployed on another cohort, read from its folder.

    Args:
        folder: Where it is.
        run: The run that was deployed.
        summary: What ``metrics.json`` says.
        labelled: How many of its patients have a label.
        results: Of every fold's model.
        ensemble: The mean of all models; its embeddings are those of the first.
        metrics_of_ensemble: How good it is.
    """

    folder: Path
    run: Path
    summary: RunSummary
    labelled: int
    results: tuple[FoldResult, ...]
    ensemble: FoldResult
    metrics_of_ensemble: Metrics

    @property
    def runs(self) -> list[Run]:
        """The ensemble, then each fold's model, as runs of one fold that tested all patients."""
        summary = replace(self.summary, metrics=self.metrics_of_ensemble)
        ensemble = Run("ensemble", self.folder, summary, (self.ensemble,))
        models = [
            Run(f"model of fold {k}", self.folder, self.summary, (result,))
            for k, result in enumerate(self.results, start=1)
        ]
        return [ensemble, *models]


def read_deployed(folder: Path, run: Path | None = None) -> Deployed:
    """Read a deployment.

    Args:
        folder: Where it is.
        run: The run that was deployed; ``None``: where it was then.

    Raises:
        UserError: A file of it is damaged or gone.
    """
    path = folder / "metrics.json"
    remedy = f"Delete {path} and run the command that made it again: other results stay."
    with whole(path, remedy):
        stored = json.loads(path.read_text(encoding="utf-8"))
        labelled, run = int(stored["labelled"]), run or Path(stored["run"])
        metrics = metrics_from_json(stored["metrics_of_ensemble"])
        summary = RunSummary.from_json(stored)
        folds = len(next(iter(summary.metrics.values())).folds)
        thresholds = stored.get("thresholds", [None] * folds)
        of_ensemble = stored.get("threshold_of_ensemble")
    inside = [f"fold-{k}" for k in range(1, folds + 1)]
    validated = [read_validation(run / name, remedy) for name in inside]

    def result(
        place: Path, embeddings: Path, threshold: float | None, parts: Sequence[pd.DataFrame]
    ) -> FoldResult:
        points = read_embeddings(embeddings / "embeddings.npy", remedy)
        table = read_predictions(place / "predictions.csv", remedy, rows=len(points))
        known = math.nan if threshold is None else float(threshold)
        return FoldResult(table, points, 0, 0, 0.0, known, validated=tuple(parts))

    results = tuple(
        result(folder / name, folder / name, threshold, parts)
        for name, threshold, parts in zip(inside, thresholds, validated, strict=True)
    )
    every = [part for parts in validated for part in parts]
    ensemble = result(folder, folder / inside[0], of_ensemble, every)
    return Deployed(folder, run, summary, labelled, results, ensemble, metrics)


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
