"""A benchmark to tables: a row for every method on every auxiliary target, the failed ones too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from examples.pathology.jobs.engine import Outcome
from examples.pathology.report import pages
from examples.pathology.results.decisions import decisions as of_run
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.metrics import Metric
from examples.pathology.results.repeats import RepeatedSummary
from examples.pathology.results.runs import Deployed, Run
from examples.pathology.results.summary import Metrics, MetricSummary, RunSummary
from examples.pathology.settings.cohort import Kind
from examples.pathology.settings.crossval import BASELINE, NAIVE
from examples.pathology.study.criteria import (
    AUPRC,
    AUROC,
    BRIER,
    CALIBRATION,
    MAE,
    PEARSON,
    SILHOUETTE,
    SPEARMAN,
    heading,
)
from examples.pathology.study.folder import Panel, Study, run_folder

ENSEMBLE, MODELS = "external, ensemble", "external, mean of folds"
EVERY = "(every one)"  # stands for the auxiliary target of a baseline that has none

COST = {  # a column of `costs`: its heading on the page, and how its cells are shown there
    "auxiliary": ("Auxiliary target", ""),
    "method": ("Method", ""),
    "seconds": ("Seconds per epoch", ".3g"),
    "relative": ("Relative to naive", ".2f"),
    "epochs": ("Epochs run in each fold", ""),
    "total": ("Seconds in all", ".0f"),
}


@dataclass(frozen=True)
class StudyRow:
    """A method on an auxiliary target.

    Args:
        auxiliary: As it stands in the table.
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

    @property
    def names(self) -> dict[str, str]:
        """The cells that say what the row is."""
        return {"Auxiliary target": self.auxiliary, "Method": self.method}

    @property
    def repeats(self) -> list[Run]:
        """Its run of every seed that has one."""
        return [*self.panel.of("internal").get(self.method, {}).values()]

    @property
    def runs(self) -> dict[str, Run]:
        """Its run and what was deployed, by the cohort that their figures are of."""
        found = {} if self.run is None else {"internal": self.run}
        if self.deployed is not None:
            found[ENSEMBLE] = self.deployed.ensemble
            found[MODELS] = self.deployed.models
        return found

    @property
    def metrics(self) -> dict[str, Metrics]:
        """All its figures over all seeds, by cohort as in `runs`."""
        short = {"internal": "internal", ENSEMBLE: "external", MODELS: "models"}
        return {cohort: self.panel.metrics[short[cohort]][self.method] for cohort in self.runs}


Marks = Mapping[tuple[str, Metric, str, str], str]
"""What to write before a figure, by cohort, metric, auxiliary target and method."""


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
                    _why_missing(jobs) if run is None else "",
                    _why_missing(deploying) if missing else "",
                )
            )
    return rows


def _why_missing(jobs: Sequence[Outcome]) -> str:
    """Return why a result is not there, from the jobs that should have made it."""
    why = [f"failed: {j.key.rpartition('/')[2]}: {j.error}" for j in jobs if j.status == "failed"]
    why += [f"skipped: {job.error}" for job in jobs if job.status == "skipped"]
    return why[0] if why else "not finished"


RANKED: Mapping[Kind, tuple[Metric, ...]] = {
    "classification": (AUROC, AUPRC),
    "regression": (PEARSON, MAE, SPEARMAN),
}
"""What Table 1 shows."""
PROBABILITY = (BRIER, CALIBRATION)
"""What Table 3 shows, of classes."""


def performance(study: Study, marks: Marks, shown: Sequence[Metric]) -> pd.DataFrame:
    """Return figures within the cohort and, where there is one, outside it; AUPRC with its level.

    `shown` is `RANKED` for Table 1, and `PROBABILITY` for Table 3.
    """
    rows = []
    for row in study_rows(study):
        cells = {**row.names, heading(shown[0]): row.failure}
        for cohort, run in row.runs.items():
            words = "{}" if cohort == "internal" else cohort.replace("external", "external {}")
            for metric in shown:
                place = (cohort.removesuffix(", ensemble"), metric, row.panel.auxiliary, row.method)
                sign = marks.get(place, "")
                cells[heading(metric, words)] = sign + _cell(row.metrics[cohort], metric)
            if cohort == "internal" and AUPRC in shown:
                cells["Prevalence"] = _share(run.summary, run.summary.patients)
        if row.deploy_failure:
            cells[heading(shown[0], "external {}, ensemble")] = row.deploy_failure
        elif row.deployed is not None and AUPRC in shown:
            outside = row.deployed.models.summary
            cells["External prevalence"] = _share(outside, outside.labelled)
        if study.seeds > 1:
            cells["Seeds"] = str(len(row.repeats))
        rows.append(cells)
    return _table(rows)


def representation(study: Study, marks: Marks) -> pd.DataFrame:
    """Return Table 2: how the auxiliary value is met and, of classes, the [cls] silhouette."""
    silhouette = f"{SILHOUETTE.title} by true class"
    predicted = "Auxiliary value: Pearson r (AUROC where it is a class)"
    by_class = study.kind == "classification"
    rows = []
    for row in study_rows(study):
        cells = {**row.names, silhouette if by_class else predicted: row.failure}
        if row.run is not None:
            found, auxiliary = row.metrics["internal"], row.panel.auxiliary
            sign = marks.get(("internal", SILHOUETTE, auxiliary, row.method), "")
            if by_class:
                cells[silhouette] = sign + _cell(found, SILHOUETTE)
            as_class, as_number = (Metric(figure, auxiliary) for figure in ("auroc", "pearson"))
            cells[predicted] = (
                f"AUROC {_cell(found, as_class)}" if as_class in found else _cell(found, as_number)
            )
        rows.append(cells)
    return _table(rows)


def decisions(study: Study, sensitivity: float) -> pd.DataFrame:
    """Return what every method decides, in its own test folds and as an ensemble outside.

    The second threshold has that sensitivity.
    """
    return pd.concat(
        of_run(run, sensitivity, auxiliary=row.auxiliary, method=row.method, cohort=cohort)
        for row in study_rows(study)
        for cohort, run in row.runs.items()
        if cohort in ("internal", ENSEMBLE)
    )


def costs(study: Study) -> pd.DataFrame:
    """Return what each method costs on an auxiliary target; None where it is not known.

    Of several seeds it is what all of them cost.

    The baseline stands in every panel, since each has a naive run of its own to compare with.

    Returns:
        A row per auxiliary target and method: ``seconds`` per epoch (median of all folds), the same
        ``relative`` to naive there, ``epochs`` run in each fold, ``total`` seconds of all folds.
    """
    rows: list[tuple[object, ...]] = []
    for panel in study.panels:
        of_seeds = panel.of("internal")
        models = {
            name: [r for run in runs.values() for r in run.results]
            for name, runs in of_seeds.items()
        }
        known = {method: _seconds_per_epoch(results) for method, results in models.items()}
        naive = known.get(NAIVE)
        for method in study.methods:
            if (seconds := known.get(method)) is None:
                rows.append((panel.auxiliary, method, None, None, "", None))
                continue
            relative, results = seconds / naive if naive else None, models[method]
            epochs = " ".join(str(result.epochs) for result in results)
            total = sum(result.seconds for result in results)
            rows.append((panel.auxiliary, method, seconds, relative, epochs, total))
    return pages.table([*COST], rows)


def costs_in_words(found: pd.DataFrame) -> pd.DataFrame:
    """Return `costs` as they are shown."""
    shown = {
        heading: [pages.DASH if cell is None else format(cell, form) for cell in found[column]]
        for column, (heading, form) in COST.items()
    }
    return pages.table([*shown], [*zip(*shown.values(), strict=True)])


def _seconds_per_epoch(results: Sequence[FoldResult]) -> float | None:
    """Return the median over the epochs of all folds; ``None`` if no time was kept."""
    kept = [result.history["seconds"] for result in results if "seconds" in result.history]
    return float(pd.concat(kept).median()) if kept else None


def numbers(study: Study, wanted: Callable[[Metric], bool]) -> pd.DataFrame:
    """Return a row per method, cohort and wanted metric, nothing rounded or left out."""
    rows: list[list[object]] = []
    for row in study_rows(study):
        start = row.auxiliary, row.method
        for cohort, metrics in row.metrics.items():
            rows += [
                [*start, cohort, metric, *pages.metric_numbers(value), "done", *_over_seeds(value)]
                for metric, value in metrics.items()
                if wanted(metric)
            ]
        blank = [""] * (1 + len(pages.METRIC_COLUMNS))
        for cohort, failure in (("", row.failure), ("external", row.deploy_failure)):
            if failure:
                rows.append([*start, cohort, *blank, failure, "", ""])
    headings = ["auxiliary", "method", "cohort", "metric", *pages.METRIC_COLUMNS, "status"]
    return pages.table([*headings, "seeds", "sd_over_seeds"], rows)


def _over_seeds(value: MetricSummary) -> tuple[int, float | None]:
    """Return of how many seeds a figure is the mean, and how far they are apart."""
    if isinstance(value, RepeatedSummary):
        return value.seeds, value.sd_over_seeds
    return 1, None


def _table(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Return a table of rows by heading; a cell that a row does not have is empty."""
    headings = dict.fromkeys(heading for row in rows for heading in row)
    return pages.table([*headings], [[row.get(name, "") for name in headings] for row in rows])


def _cell(found: Metrics, metric: Metric) -> str:
    return pages.metric_cell(found.get(metric), sd=False)


def _share(summary: RunSummary, patients: int | None) -> str:
    return f"{summary.positives / patients:.3f}" if patients else pages.DASH
