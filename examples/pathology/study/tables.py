"""A benchmark to tables: a row for every method on every auxiliary target, the failed ones too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from examples.pathology.common.files import table_csv
from examples.pathology.report import pages
from examples.pathology.results.runs import Run
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.study.folder import Deployed, JobRow, Panel, Study, run_folder

NAIVE = "naive"
EVERY = "(every one)"  # stands for the auxiliary target of a baseline that has none


@dataclass(frozen=True)
class Table:
    """A table as it is shown.

    Args:
        headings: Of the columns; the first two say what a row is.
        rows: The cells.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class StudyRow:
    """A method on an auxiliary target.

    Args:
        auxiliary: The auxiliary target as it stands in the table.
        method: The method.
        panel: Where its run belongs.
        run: Its run; ``None`` if it is not finished.
        deployed: Its deployment; ``None`` if there is none.
        failure: Why the run is missing; empty if it is there.
        deploy_failure: Why the deployment is missing; empty if it is there or was not asked for.
    """

    auxiliary: str
    method: str
    panel: Panel
    run: Run | None
    deployed: Deployed | None
    failure: str
    deploy_failure: str


Mark = Callable[[StudyRow, str, str], str]


def study_rows(study: Study) -> list[StudyRow]:
    """Return the rows of all tables: a baseline that all auxiliary targets share comes once."""
    rows = []
    own_baseline = bool(study.settings["complete_cases"])
    for number, panel in enumerate(study.panels):
        for method in study.methods:
            shared = method == BASELINE and not own_baseline
            if shared and number > 0:
                continue
            place = run_folder(panel.auxiliary, method, own_baseline=own_baseline).as_posix()
            jobs = [job for job in study.jobs if job.key.startswith(f"{place}/")]
            deploying = [job for job in jobs if job.key.endswith("/deploy")]
            run, deployed = panel.runs.get(method), panel.deployed.get(method)
            missing = run is not None and deployed is None and study.deployed
            rows.append(
                StudyRow(
                    EVERY if shared else panel.auxiliary,
                    method,
                    panel,
                    run,
                    deployed,
                    why_missing(jobs) if run is None else "",
                    why_missing(deploying) if missing else "",
                )
            )
    return rows


def why_missing(jobs: Sequence[JobRow]) -> str:
    """Return why a result is not there, from the jobs that should have made it."""
    failed = next((job for job in jobs if job.status == "failed"), None)
    if failed is not None:
        return f"failed: {failed.key.rpartition('/')[2]}: {failed.error}"
    skipped = next((job for job in jobs if job.status == "skipped"), None)
    return f"skipped: {skipped.error}" if skipped is not None else "not finished"


def performance(study: Study, mark: Mark) -> Table:
    """Return Table 1: AUROC and AUPRC within the cohort and, where there is one, outside it.

    Args:
        study: The benchmark.
        mark: From a row, a cohort and a metric, what to write before its figure.
    """
    headings = ["Auxiliary target", "Method", "AUROC", "AUPRC", "Prevalence"]
    if study.deployed:
        headings += [
            "External AUROC, ensemble",
            "External AUPRC, ensemble",
            "External AUROC, mean of folds",
            "External AUPRC, mean of folds",
            "External prevalence",
        ]
    rows = []
    for row in study_rows(study):
        names = [row.auxiliary, row.method]
        if row.run is None:
            rows.append((*names, row.failure, *[""] * (len(headings) - 3)))
            continue
        summary = row.run.summary
        cells = [
            mark(row, "internal", key) + _cell(summary["metrics"], key)
            for key in ("auroc", "auprc")
        ]
        cells.append(_share(summary["positives"], summary["patients"]))
        if row.deployed is not None:
            outside = row.deployed.summary
            cells += [
                mark(row, "external", key) + _cell(outside["metrics_of_ensemble"], key)
                for key in ("auroc", "auprc")
            ]
            cells += [_cell(outside["metrics"], key) for key in ("auroc", "auprc")]
            cells.append(_share(outside["positives"], outside["labelled"]))
        elif study.deployed:
            cells += [row.deploy_failure, "", "", "", ""]
        rows.append((*names, *cells))
    return Table(tuple(headings), tuple(rows))


def representation(study: Study, mark: Mark) -> Table:
    """Return Table 2: silhouette of the [cls] embedding, and how well the auxiliary value is met.

    Args:
        study: The benchmark.
        mark: As for `performance`.
    """
    headings = (
        "Auxiliary target",
        "Method",
        "Silhouette of [cls] by true class",
        "Auxiliary value: Pearson r (AUROC where it is a class)",
    )
    rows = []
    for row in study_rows(study):
        if row.run is None:
            rows.append((row.auxiliary, row.method, row.failure, ""))
            continue
        found = row.run.summary["metrics"]
        cell = mark(row, "internal", "silhouette") + _cell(found, "silhouette")
        rows.append((row.auxiliary, row.method, cell, _auxiliary_cell(found, row.panel.auxiliary)))
    return Table(headings, tuple(rows))


class CostRow(NamedTuple):
    """What a method costs on an auxiliary target; None where it is not known.

    Args:
        auxiliary: The auxiliary target.
        method: The method.
        seconds: Per epoch, see `seconds_per_epoch`.
        relative: The same, relative to naive on this auxiliary target.
        epochs: How many were run in each fold, with spaces between.
        total: Seconds of all folds.
    """

    auxiliary: str
    method: str
    seconds: float | None = None
    relative: float | None = None
    epochs: str = ""
    total: float | None = None


def cost_rows(study: Study) -> list[CostRow]:
    """Return what each method costs.

    The baseline stands in every panel, since each has a naive run of its own to compare with.
    """
    rows = []
    for panel in study.panels:
        naive = seconds_per_epoch(panel.runs.get(NAIVE))
        for method in study.methods:
            run = panel.runs.get(method)
            seconds = seconds_per_epoch(run)
            if run is None or seconds is None:
                rows.append(CostRow(panel.auxiliary, method))
                continue
            rows.append(
                CostRow(
                    panel.auxiliary,
                    method,
                    seconds,
                    seconds / naive if naive else None,
                    " ".join(str(result.epochs) for result in run.results),
                    sum(result.seconds for result in run.results),
                )
            )
    return rows


def cost_table(study: Study) -> Table:
    """Return `cost_rows` as they are shown."""
    headings = (
        "Auxiliary target",
        "Method",
        "Seconds per epoch",
        "Relative to naive",
        "Epochs run in each fold",
        "Seconds in all",
    )
    return Table(
        headings,
        tuple(
            (
                row.auxiliary,
                row.method,
                pages.MISSING if row.seconds is None else f"{row.seconds:.3g}",
                pages.MISSING if row.relative is None else f"{row.relative:.2f}",
                row.epochs,
                pages.MISSING if row.total is None else f"{row.total:.0f}",
            )
            for row in cost_rows(study)
        ),
    )


def seconds_per_epoch(run: Run | None) -> float | None:
    """Return the median over the epochs of all folds; ``None`` if no time was kept."""
    if run is None:
        return None
    seconds = [
        float(value)
        for result in run.results
        if "seconds" in result.history
        for value in result.history["seconds"]
    ]
    return statistics.median(seconds) if seconds else None


def numbers(study: Study, keys: Callable[[str], bool]) -> str:
    """Return a CSV with a row per method, cohort and metric, nothing rounded or left out.

    Args:
        study: The benchmark.
        keys: Which metrics, by name.
    """
    rows: list[list[object]] = []
    for row in study_rows(study):
        names: list[object] = [row.auxiliary, row.method]
        if row.run is None:
            rows.append([*names, "", "", *[""] * len(pages.METRIC_COLUMNS), row.failure])
            continue
        for cohort, found in _summaries(row):
            rows += [
                [*names, cohort, key, *pages.metric_numbers(value), "done"]
                for key, value in found.items()
                if keys(key)
            ]
        if row.deploy_failure:
            blank = [""] * len(pages.METRIC_COLUMNS)
            rows.append([*names, "external", "", *blank, row.deploy_failure])
    headings = ["auxiliary", "method", "cohort", "metric", *pages.METRIC_COLUMNS, "status"]
    return table_csv(headings, rows)


def _summaries(row: StudyRow) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if row.run is not None:
        yield "internal", row.run.summary["metrics"]
    if row.deployed is not None:
        yield "external, ensemble", row.deployed.summary["metrics_of_ensemble"]
        yield "external, mean of folds", row.deployed.summary["metrics"]


def _cell(found: Mapping[str, Any], key: str) -> str:
    return pages.metric_cell(found.get(key), sd=False)


def _auxiliary_cell(found: Mapping[str, Any], auxiliary: str) -> str:
    if (value := found.get(f"auroc/{auxiliary}")) is not None:
        return f"AUROC {pages.metric_cell(value, sd=False)}"
    return _cell(found, f"pearson/{auxiliary}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else pages.MISSING
