"""A benchmark to one page: what came out, the tables behind it, figures, and what was done."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from examples.pathology.figures.embedding import tsne
from examples.pathology.figures.sheet import Sheet
from examples.pathology.figures.study import (
    Column,
    Estimate,
    conflicts,
    dots,
    power,
    weights_over_time,
)
from examples.pathology.report import pages
from examples.pathology.report.pages import Funnel, funnel_of
from examples.pathology.report.patients import worst_errors
from examples.pathology.report.sections import judged, show_search, show_sites
from examples.pathology.results.metrics import Metric
from examples.pathology.results.resampling import PERMUTATIONS
from examples.pathology.results.runs import Deployed, Run
from examples.pathology.results.summary import Metrics
from examples.pathology.settings.crossval import BASELINE, NAIVE
from examples.pathology.settings.runs import PageConfig
from examples.pathology.study.criteria import (
    AUPRC,
    AUROC,
    BRIER,
    CRITERIA,
    PEARSON,
    SILHOUETTE,
    SPEARMAN,
    heading,
)
from examples.pathology.study.differences import LEVEL, REFERENCES, all_differences
from examples.pathology.study.folder import REPORT, Panel, Study
from examples.pathology.study.power import SHARE, Power, curves_in_full, powers
from examples.pathology.study.tables import (
    EVERY,
    PROBABILITY,
    RANKED,
    costs,
    costs_in_words,
    decisions,
    numbers,
    performance,
    representation,
    study_rows,
)
from examples.pathology.study.verdicts import (
    EXCHANGED,
    PROBABILITIES,
    differences_in_full,
    differences_table,
    marks,
    marks_in_words,
    verdicts,
)
from examples.pathology.tables.writing import write_table

EMBEDDED = (BASELINE, NAIVE, "cagrad", "autol+cagrad")  # have own figures, if they are there


def write_study_report(
    study: Study, out: Path | None = None, *, config: PageConfig | None = None
) -> Path:
    """Write ``index.html`` (self-contained), its tables as Markdown and CSV, and ``figures/``.

    Where not told, it is ``report/`` in the benchmark's folder. Returns the page.

    Raises:
        UserError: Methods were not tested on the same patients.
    """
    out, config = out or study.folder / REPORT, config or PageConfig()
    differences = all_differences(study)
    signs, cost, by_class = marks(differences), costs(study), study.kind == "classification"
    deployed = [each for panel in study.panels for each in panel.deployed.values()]
    summaries = [run.summary for panel in study.panels for run in panel.runs.values()]
    warnings = pages.captions_of([*summaries, *(each.models.summary for each in deployed)])
    meaning = marks_in_words(study)
    tables = [(performance(study, signs, RANKED[study.kind]), meaning)]
    tables.append((representation(study, signs), meaning))
    if by_class:
        remark = PROBABILITIES.format(summaries[0].positive)
        tables.append((performance(study, signs, PROBABILITY), remark))
    figures = draw_study(study, out / "figures")
    for number, (table, remark) in enumerate(tables, start=1):
        pages.write_markdown(out / f"table{number}.md", table, [remark, *warnings])
    for name, in_full in _tables_in_full(study).items():
        write_table(out / f"{name}.csv", in_full)
    write_table(out / "differences.csv", differences_in_full(differences))
    write_table(out / "cost.csv", cost)
    seen = powers(study, differences)
    write_table(out / "power.csv", curves_in_full(seen))
    panel = next(panel for panel in study.panels if panel.runs)
    sections = [show_sites(_shown(study, panel), out, config), show_search(_named(study), out)]
    if by_class:
        decided = decisions(study, config.sensitivity)
        write_table(out / "decisions.csv", decided)
        sections.insert(0, judged(decided, config))
    return pages.write_page(
        out / "index.html",
        "study.html.j2",
        title=f"Benchmark of {study.settings['target']}",
        warnings=warnings,
        study=study,
        summary=_any_run(panel).summary,
        deployed=next((each.models.summary for each in panel.deployed.values()), None),
        verdicts=verdicts(study, differences),
        tables=tables,
        power=[each.words for each in seen],
        figures_of_power=draw_power(study, seen, out / "figures"),
        sections=[section for section in sections if section is not None],
        differences={
            name + ", external cohort" * (cohort == "external"): differences_table(
                differences, name, cohort
            )
            for name in REFERENCES
            for cohort in ("internal", "external")
        },
        exchanged=EXCHANGED[study.kind],
        compared=bool(differences),
        permutations=PERMUTATIONS,
        cost=costs_in_words(cost),
        figures_of_study=figures,
        worst_errors=worst_errors(_groups(study), out, config.worst),
        funnels=_funnels(study, deployed),
        not_done=_not_done(study),
        again=sum(job.attempts > 1 for job in study.jobs),
        settings=pages.settings_table(study.settings),
        provenance=pages.settings_table(study.provenance),
    )


def _tables_in_full(study: Study) -> dict[str, pd.DataFrame]:
    first = (*RANKED[study.kind], Metric("f1"), Metric("prevalence"))
    found = {
        "table1": numbers(study, lambda metric: metric in first),
        "table2": numbers(study, lambda metric: metric == SILHOUETTE or bool(metric.auxiliary)),
    }
    if study.kind == "classification":
        found["table3"] = numbers(study, lambda metric: metric in PROBABILITY)
    return found


def draw_study(study: Study, folder: Path) -> list[tuple[str, Path]]:
    """Draw what is compared to a folder; return what each figure shows, and its file."""
    drawn = []
    for number, panel in enumerate(study.panels, start=1):
        if not panel.runs:
            continue
        auxiliary, caption = panel.auxiliary, _any_run(panel).summary.caption
        # Files have numbers, since the name of a target may hold any character.
        path, title = folder / f"methods-{number}.png", f"All methods with {auxiliary}"
        names = [m if m in panel.runs else f"{m} (missing)" for m in study.methods]
        over = "patients and seeds" if study.seeds > 1 else "patients"
        dots(names, _columns(study, panel, "internal"), Sheet(path, title, caption), over=over)
        drawn.append((title, path))
        if columns := _columns(study, panel, "external"):
            path, title = folder / f"external-{number}.png", f"{title}: external cohort, ensemble"
            there = next(iter(panel.first("external").values())).summary.caption
            dots(names, columns, Sheet(path, title, there), over=over)
            drawn.append((title, path))
        path, title = folder / f"weights-{number}.png", f"Task weights over time with {auxiliary}"
        tasks = [study.settings["target"], auxiliary]
        histories = {
            method: [history for run in runs.values() for history in _histories(run)]
            for method, runs in panel.of("internal").items()
        }
        if weights_over_time(histories, tasks, Sheet(path, title, caption)):
            drawn.append((title, path))
        path = folder / f"tsne-{number}.png"
        title = f"[cls] embedding by {tasks[0]}, with {auxiliary}"
        _draw_embeddings(study, panel, Sheet(path, title, caption))
        drawn.append((f"t-SNE of the [cls] embedding with {auxiliary}", path))
    rates = {
        panel.auxiliary: {
            method: found
            for method, runs in panel.of("internal").items()
            if (found := [rate for run in runs.values() for rate in conflict_rates(run)])
        }
        for panel in study.panels
    }
    methods = [name for name in study.methods if any(name in found for found in rates.values())]
    if methods:
        path, title = folder / "conflicts.png", "How often the two tasks conflict"
        caption = _any_run(next(panel for panel in study.panels if panel.runs)).summary.caption
        conflicts(methods, rates, Sheet(path, title, caption))
        drawn.append((title, path))
    return drawn


def draw_power(study: Study, found: Sequence[Power], folder: Path) -> list[tuple[str, Path]]:
    """Draw what differences can be seen, if that is known; return as `draw_study`."""
    curves = {each.criterion.title: each.curves for each in found if each.curves}
    path, title = folder / "power.png", "How often a true difference is found"
    if curves:
        caption = _any_run(next(panel for panel in study.panels if panel.runs)).summary.caption
        power(curves, SHARE, LEVEL, Sheet(path, title, caption))
    return [(title, path)] * bool(curves)


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


def _columns(study: Study, panel: Panel, cohort: str) -> list[Column]:
    columns = []
    if not (runs := panel.first(cohort)):
        return []
    found = panel.metrics[cohort]
    summary = next(iter(runs.values())).summary
    known = summary.patients if cohort == "internal" else summary.labelled
    share = summary.positives / known if known else math.nan
    chance = {AUROC: 0.5, AUPRC: share, SILHOUETTE: 0.0, BRIER: share * (1 - share)}
    chance |= {PEARSON: 0.0, SPEARMAN: 0.0}
    for metric in (each.metric for each in CRITERIA[study.kind] if each.cohort == cohort):
        *of_each, of_baseline = (_estimate(found, m, metric) for m in (*study.methods, BASELINE))
        words = "{}\n(lower is better)" if metric.sign < 0 else "{}"
        columns.append(Column(heading(metric, words), of_each, of_baseline, chance.get(metric)))
    return columns


def _estimate(found: Mapping[str, Metrics], method: str, metric: Metric) -> Estimate:
    if method not in found or (value := found[method].get(metric)) is None:
        return Estimate()
    numbers = (value.mean, *value.ci95_over_patients)
    return Estimate(*(math.nan if number is None else number for number in numbers))


def _draw_embeddings(study: Study, panel: Panel, sheet: Sheet) -> None:
    runs, target = _shown(study, panel), study.settings["target"]
    results, values = [run.results[0] for run in runs], float if study.kind == "regression" else str
    tsne(
        [(r.embeddings, r.predictions[target].to_numpy(dtype=values)) for r in results],
        _any_run(panel).summary.classes,
        sheet,
        seed=study.settings["seed"],
        names=[run.name for run in runs],
        about="t-SNE of the test patients of fold 1, by each method's own model; panels share no "
        "axes, and distances between groups mean little.",
    )


def _shown(study: Study, panel: Panel) -> list[Run]:
    """Return the runs that have figures of their own."""
    wanted = [*EMBEDDED, *study.methods]
    methods = list(dict.fromkeys(name for name in wanted if name in panel.runs))
    return [panel.runs[method] for method in methods[: len(EMBEDDED)]]


def _histories(run: Run) -> list[pd.DataFrame]:
    return [result.history for result in run.results]


def _any_run(panel: Panel) -> Run:
    """Return a run that knows the auxiliary target, if there is one."""
    return min(panel.runs.items(), key=lambda item: item[0] == BASELINE)[1]


def _funnels(study: Study, deployed: Sequence[Deployed]) -> dict[str, Funnel]:
    """Return who was used, for each cohort once."""
    found: dict[Funnel, list[str]] = {}
    for panel in study.panels:
        if panel.runs:
            run = _any_run(panel)
            found.setdefault(funnel_of(run.folder, run.summary), []).append(panel.auxiliary)
    funnels = {f"With {', '.join(names)}": funnel for funnel, names in found.items()}
    for each in deployed[:1]:
        funnels["External cohort"] = funnel_of(each.models.folder, each.models.summary)
    return funnels


def _named(study: Study) -> list[Run]:
    """Return all runs by what they are: method, auxiliary target, and seed where there are more."""
    return [
        replace(
            run,
            name=f"{row.method} with {row.auxiliary}".removesuffix(f" with {EVERY}")
            + f", seed {run.summary.seed}" * (study.seeds > 1),
        )
        for row in study_rows(study)
        for run in row.repeats
    ]


def _groups(study: Study) -> dict[str, list[Run]]:
    """Return runs and ensembles of all methods and seeds, to tell who is hard for all of them."""
    rows = study_rows(study)
    groups = {"all methods": "internal", "external cohort": "external"}
    found = {
        name: [run for row in rows for run in row.panel.of(cohort).get(row.method, {}).values()]
        for name, cohort in groups.items()
    }
    return {name: runs for name, runs in found.items() if runs}


def _not_done(study: Study) -> pd.DataFrame:
    bad = [job for job in study.jobs if job.status != "done"]
    rows = [(job.key, job.status, job.error, job.attempts) for job in bad]
    return pages.table(("Job", "Status", "Why", "Attempts"), rows)
