"""A finished run, or its deployment on another cohort, read back."""

import json
import logging
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from examples.pathology.cohort.cohort import TRAINING_ONLY
from examples.pathology.cohort.targets import one_spelling, refuse_look_alikes
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import whole
from examples.pathology.common.folders import DEPLOYED, RUN
from examples.pathology.common.names import composed
from examples.pathology.common.toml import read_toml
from examples.pathology.results.folds import FoldResult, read_embeddings, read_fold, read_validation
from examples.pathology.results.measuring import measure_further, summarise_folds
from examples.pathology.results.summary import Metrics, RunSummary, read_summary
from examples.pathology.settings.cohort import TCGA_SITE
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.settings.runs import PageConfig
from examples.pathology.tables.reading import PATIENT, read_clinical_table, sites_of
from examples.pathology.tables.writing import read_table_of_ours

logger = logging.getLogger(__name__)


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

    @cached_property
    def metrics(self) -> Metrics:
        """All figures: those of the summary, and those that only the predictions tell."""
        folds = [measure_further(each, self.summary.targets[0]) for each in self.results]
        return {**self.summary.metrics, **summarise_folds(folds, self.summary.seed)}


def read_run(folder: Path) -> Run:
    """Read a finished run, under the name of its method."""
    summary = read_summary(folder)
    folds = range(1, len(summary.seconds) + 1)
    results = tuple(read_fold(folder / f"fold-{k}") for k in folds)
    return Run(summary.method, folder, summary, results)


@dataclass(frozen=True)
class Deployed:
    """A run deployed on another cohort.

    Args:
        models: Every fold's model, each on all patients.
        ensemble: Their mean, as a run of one fold; its embeddings are those of the first model.
    """

    models: Run
    ensemble: Run


def read_deployed(folder: Path, run: Path | None = None) -> Deployed:
    """Read a deployment, with the validation parts of its run, by default where it was then.

    Raises:
        UserError: A file of it is damaged or gone.
    """
    summary = read_summary(folder)
    names = [f"fold-{k}" for k in range(1, len(next(iter(summary.metrics.values())).folds) + 1)]
    remedy = f"Delete {folder / 'metrics.json'} and run the command that made it again."
    parts = [read_validation((run or Path(summary.run)) / name, remedy) for name in names]
    results = []
    for place, first, threshold, validated in zip(
        (*names, "."),
        (*names, names[0]),
        (*(summary.thresholds or [None] * len(names)), summary.threshold_of_ensemble),
        (*parts, tuple(part for each in parts for part in each)),
        strict=True,
    ):
        points = read_embeddings(folder / first / "embeddings.npy", remedy)
        table = read_table_of_ours(folder / place / "predictions.csv", remedy, rows=len(points))
        known = math.nan if threshold is None else threshold
        results.append(FoldResult(table, points, 0, 0, 0.0, known, validated=validated))
    of_ensemble = replace(summary, metrics=summary.metrics_of_ensemble)
    return Deployed(
        Run("mean of folds", folder, summary, tuple(results[:-1])),
        Run("ensemble", folder, of_ensemble, (results[-1],)),
    )


def sites_in(run: Run, config: PageConfig) -> dict[str, list[str]]:
    """Return by site the patients with a label, largest first: of the folds, or of a column.

    Raises:
        UserError: The table with the column is gone, or lacks it, or sites in it look alike.
    """
    tested = pd.concat([result.predictions for result in run.results])
    names = set(tested.loc[tested[run.summary.target] != "", PATIENT])
    column, splits, clinical = config.site_column, run.folder / "splits.json", pd.DataFrame()
    if column is None:
        if not splits.exists():
            return {}
        with whole(splits, "Put it back."):
            found = json.loads(splits.read_text(encoding="utf-8")).get("groups", {})
    else:
        if column != TCGA_SITE:
            made = made_with(run.folder, "clini")
            table = config.site_table or made["clini"]
            clinical = read_clinical_table(table, [column], made.get("patient_column", PATIENT))
            clinical = clinical.assign(**{column: one_spelling(clinical[column])})
            refuse_look_alikes(column, clinical[column], table)
        found = sites_of(names, column, clinical)
    sites: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names & found.keys()):
        sites[found[name] or "not known"].append(name)
    return dict(sorted(sites.items(), key=lambda item: (-len(item[1]), item[0])))


def fold_folders(run: Path) -> list[Path]:
    """Return the folders of the folds of a finished run; raise if it is none."""
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
    path = run / RUN
    with whole(path, "Put it back, or run `crossval` into a new folder."):
        settings: dict[str, Any] = read_toml(path)["crossval"]
        settings["folds"] = int(settings["folds"])
        if "balancer" not in settings:
            raise ValueError("it does not say which `balancer` it was made with")
    return settings


def made_with(folder: Path, source: str) -> dict[str, Any]:
    """Return the settings of a run or a deployment; ``source``, which may have moved, as a path.

    Raises:
        UserError: They are damaged or gone, or do not tell the source.
    """
    path = folder / RUN
    path = path if path.exists() else folder / DEPLOYED
    with whole(path, "Put it back."):
        settings, *_ = read_toml(path).values()  # provenance follows
        return {**settings, source: Path(settings[source])}


def trained_on(folder: Path) -> set[str]:
    """Return everybody on whom a model of a run was trained; nobody where its ledger is gone."""
    path = folder / "ledger.csv"
    if not path.exists():
        logger.warning("%s is gone, so that nothing tells whom the run was trained on", path)
        return set()
    alone = run_settings(folder)["balancer"] == BASELINE  # it knows the primary target only
    statuses = ("used",) if alone else ("used", TRAINING_ONLY)
    ledger = read_table_of_ours(path, "Put it back.")
    rows = ledger[(ledger["item"] == "patient") & ledger["status"].isin(statuses)]
    return set(map(composed, rows["name"]))


def slides_of(folder: Path) -> dict[str, list[str]]:
    """Return the slides of every patient that a run or a deployment used, by their names there."""
    ledger = read_table_of_ours(folder / "ledger.csv", "Put it back.")
    used = ledger[(ledger["item"] == "slide") & (ledger["status"] == "used")]
    return {str(who): [*names] for who, names in used.groupby("patient")["name"]}
