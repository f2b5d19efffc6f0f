"""A benchmark to one page: what came out, the tables behind it, figures, and what was done."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from examples.pathology.common.files import table_csv, write_text
from examples.pathology.figures import plots
from examples.pathology.figures import study as study_plots
from examples.pathology.figures.run import caption_of
from examples.pathology.figures.study import Column, Estimate
from examples.pathology.report import pages
from examples.pathology.report.report import funnel_html
from examples.pathology.results.runs import Run
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.study.differences import REFERENCES, Difference, all_differences
from examples.pathology.study.folder import REPORT, Deployed, Panel, Study
from examples.pathology.study.tables import (
    NAIVE,
    CostRow,
    Table,
    cost_rows,
    cost_table,
    numbers,
    performance,
    representation,
)
from examples.pathology.study.verdicts import (
    GIVEN,
    MARKS,
    METHOD,
    differences_csv,
    differences_table,
    marks,
    verdicts,
)

logger = logging.getLogger(__name__)

EMBEDDED = (BASELINE, NAIVE, "cagrad", "autol+cagrad")  # whose t-SNE is shown, if they are there
COST_REMARK = (
    "Median over the epochs of all folds, relative to that of naive with the same auxiliary "
    "target; an epoch is all training patients and the validation part. Jobs ran side by side on "
    "shared cores, so that small differences are noise."
)


def write_study_report(study: Study, out: Path | None = None) -> Path:
    """Write ``index.html`` (self-contained), its tables as Markdown and CSV, and ``figures/``.

    Args:
        study: The benchmark, read back.
        out: Where to; ``None``: ``report/`` in its folder.

    Returns:
        The page.

    Raises:
        UserError: Methods were not tested on the same patients.
    """
    out = out or study.folder / REPORT
    differences = all_differences(study)
    mark = marks(differences)
    first, second = performance(study, mark), representation(study, mark)
    figures = draw_study(study, out / "figures")
    for name, table in (("table1", first), ("table2", second)):
        remarks = [MARKS, *_warnings(study)]
        text = pages.table_markdown(table.headings, table.rows)
        write_text(out / f"{name}.md", text + "".join(f"\n{remark}\n" for remark in remarks))
    areas = ("auroc", "auprc", "f1", "prevalence")
    write_text(out / "table1.csv", numbers(study, lambda key: key in areas))
    write_text(out / "table2.csv", numbers(study, lambda key: key == "silhouette" or "/" in key))
    write_text(out / "differences.csv", differences_csv(differences))
    write_text(out / "cost.csv", table_csv(CostRow._fields, cost_rows(study)))
    page = out / "index.html"
    write_text(page, _html(study, differences, first, second, figures))
    logger.info("The report is %s", page)
    return page


def draw_study(study: Study, folder: Path) -> list[tuple[str, Path]]:
    """Draw what is compared; return what each figure shows, and its file.

    Args:
        study: The benchmark.
        folder: The folder to write to.
    """
    drawn = []
    for number, panel in enumerate(study.panels, start=1):
        if not panel.runs:
            continue
        auxiliary, caption = panel.auxiliary, caption_of(_any_run(panel).summary)
        path = folder / f"methods-{number}.png"  # its name may hold any character
        title = f"All methods with {auxiliary}"
        names = [m if m in panel.runs else f"{m} (missing)" for m in study.methods]
        study_plots.dots(names, _columns(study, panel), path, title=title, caption=caption)
        drawn.append((title, path))
        path = folder / f"weights-{number}.png"
        title = f"Task weights over time with {auxiliary}"
        tasks = [study.settings["target"], auxiliary]
        histories = {method: _histories(run) for method, run in panel.runs.items()}
        if study_plots.weights_over_time(histories, tasks, path, title=title, caption=caption):
            drawn.append((title, path))
        path = folder / f"tsne-{number}.png"
        _draw_embeddings(study, panel, path, caption)
        drawn.append((f"t-SNE of the [cls] embedding with {auxiliary}", path))
    rates = {
        panel.auxiliary: {
            method: found for method, run in panel.runs.items() if (found := conflict_rates(run))
        }
        for panel in study.panels
    }
    methods = [name for name in study.methods if any(name in found for found in rates.values())]
    if methods:
        path, title = folder / "conflicts.png", "How often the two tasks conflict"
        caption = caption_of(_any_run(study.panels[0]).summary)
        study_plots.conflicts(methods, rates, path, title=title, caption=caption)
        drawn.append((title, path))
    return drawn


def conflict_rates(run: Run) -> list[float]:
    """Return, for every fold, the share of two-task steps whose gradients conflict.

    Steps in which one task has no label have no second gradient: they are not counted.
    """
    rates = []
    for history in _histories(run):
        if "conflicts" in history:
            pairs = float((history["active"] - 1).sum())  # of two tasks: the steps with both
            if pairs > 0:
                rates.append(float(history["conflicts"].sum()) / pairs)
    return rates


def _columns(study: Study, panel: Panel) -> list[Column]:
    def column(
        name: str, key: str, found: Mapping[str, Mapping[str, Any]], chance: float | None
    ) -> Column:
        estimates = {method: _estimate(values.get(key)) for method, values in found.items()}
        missing = Estimate()
        return Column(
            name,
            [estimates.get(method, missing) for method in study.methods],
            estimates.get(BASELINE, missing),
            chance,
        )

    inside = {method: run.summary["metrics"] for method, run in panel.runs.items()}
    summary = _any_run(panel).summary
    columns = [
        column("AUROC", "auroc", inside, 0.5),
        column("AUPRC", "auprc", inside, summary["positives"] / summary["patients"]),
        column("Silhouette of [cls]", "silhouette", inside, 0.0),
    ]
    outside = {m: each.summary["metrics_of_ensemble"] for m, each in panel.deployed.items()}
    if outside:
        columns.append(column("External AUROC, ensemble", "auroc", outside, 0.5))
    return columns


def _estimate(value: Mapping[str, Any] | None) -> Estimate:
    if value is None:
        return Estimate()
    numbers = (value["mean"], *value["ci95_over_patients"])
    return Estimate(*(math.nan if number is None else float(number) for number in numbers))


def _draw_embeddings(study: Study, panel: Panel, path: Path, caption: str) -> None:
    wanted = [*EMBEDDED, *study.methods]
    methods = list(dict.fromkeys(name for name in wanted if name in panel.runs))[: len(EMBEDDED)]
    target = study.settings["target"]
    results = [panel.runs[method].results[0] for method in methods]
    plots.tsne(
        [(r.embeddings, r.predictions[target].to_numpy(dtype=str)) for r in results],
        _any_run(panel).summary["classes"],
        path,
        title=f"[cls] embedding by {target}, with {panel.auxiliary}",
        caption=caption,
        seed=study.settings["seed"],
        names=methods,
        about="t-SNE of the test patients of fold 1, by each method's own model; panels share no "
        "axes, and distances between groups mean little.",
    )


def _histories(run: Run) -> list[pd.DataFrame]:
    return [result.history for result in run.results]


def _any_run(panel: Panel) -> Run:
    """Return a run that knows the auxiliary target, if there is one."""
    return min(panel.runs.items(), key=lambda item: item[0] == BASELINE)[1]


def _warnings(study: Study) -> list[str]:
    summaries = [run.summary for panel in study.panels for run in panel.runs.values()]
    summaries += [each.summary for panel in study.panels for each in panel.deployed.values()]
    return list(dict.fromkeys(text for s in summaries if (text := caption_of(s))))


def _html(
    study: Study,
    differences: Sequence[Difference],
    first: Table,
    second: Table,
    figures: Sequence[tuple[str, Path]],
) -> str:
    parts = [
        *map(pages.warning_html, _warnings(study)),
        "<h2>What came out</h2>",
        pages.list_html(verdicts(study, differences)),
        pages.paragraph_html(GIVEN),
        pages.paragraph_html(_what(study)),
        "<h2>Table 1: performance</h2>",
        _table_html(first),
        pages.paragraph_html(MARKS),
        "<h2>Table 2: embedding and auxiliary value</h2>",
        _table_html(second),
    ]
    for reference in REFERENCES:
        table = differences_table(differences, reference)
        if table.rows:
            parts += [f"<h2>Differences from {reference}</h2>", _table_html(table)]
    parts += [
        pages.paragraph_html(METHOD) if differences else "",
        "<h2>Cost</h2>",
        _table_html(cost_table(study)),
        pages.paragraph_html(COST_REMARK),
        "<h2>Figures</h2>",
        pages.figures_html(figures, wide=True),
        "<h2>Who was used, and who was not</h2>",
        *_funnels(study),
        "<h2>Jobs</h2>",
        *_jobs(study),
        "<h2>Settings</h2>",
        _settings_html(study.settings),
        "<h2>Made with</h2>",
        _settings_html(study.provenance),
    ]
    return pages.page_html(f"Benchmark of {study.settings['target']}", parts)


def _what(study: Study) -> str:
    panel = next(panel for panel in study.panels if panel.runs)
    summary = _any_run(panel).summary
    outside = ""
    if panel.deployed:
        deployed = next(iter(panel.deployed.values())).summary
        outside = (
            f" External cohort: {deployed['patients']} patients, {deployed['labelled']} with a "
            f"label, {deployed['positives']} of them {deployed['positive']}."
        )
    return (
        f"{len(study.methods)} methods, {len(study.panels)} auxiliary targets, each on its own "
        f"with {summary['target']}; {len(summary['seconds'])} folds by patient, equal for all "
        f"methods, with equal initial weights. {summary['patients']} patients, "
        f"{summary['positives']} of them {summary['positive']}; {summary['tiles']} tiles. "
        f"Features: {summary['extractor']}.{outside}"
    )


def _funnels(study: Study) -> list[str]:
    """Return who was used, for each cohort once."""
    found: dict[str, list[str]] = {}
    for panel in study.panels:
        if panel.runs:
            run = _any_run(panel)
            found.setdefault(funnel_html(run.folder, run.summary), []).append(panel.auxiliary)
    parts = [
        f"<h3>With {html.escape(', '.join(names))}</h3>{funnel}" for funnel, names in found.items()
    ]
    deployed = _any_deployed(study)
    if deployed is not None:
        parts.append(f"<h3>External cohort</h3>{funnel_html(deployed.folder, deployed.summary)}")
    return parts


def _any_deployed(study: Study) -> Deployed | None:
    return next((d for panel in study.panels for d in panel.deployed.values()), None)


def _jobs(study: Study) -> list[str]:
    """Return the jobs that did not end well, and how many had to be begun again."""
    if not study.jobs:
        return [pages.paragraph_html("The benchmark was stopped early and has no list of jobs.")]
    bad = [job for job in study.jobs if job.status != "done"]
    again = sum(job.attempts > 1 for job in study.jobs)
    sentence = f"{len(study.jobs) - len(bad)} of {len(study.jobs)} jobs are done."
    if again:
        sentence += f" {again} were begun more than once, since their worker was lost."
    rows = [(job.key, job.status, job.error, job.attempts) for job in bad]
    headings = ("Job", "Status", "Why", "Attempts")
    return [pages.paragraph_html(sentence), pages.table_html(headings, rows) if rows else ""]


def _table_html(table: Table) -> str:
    return pages.table_html(table.headings, table.rows, names=2, dense=True)


def _settings_html(values: Mapping[str, Any]) -> str:
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in values.items()
    ]
    return pages.table_html(("Setting", "Value"), rows)
