"""Runs, or a deployment, to one page: a table, figures, who was left out, what it cannot say."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from examples.pathology.common.errors import UserError
from examples.pathology.common.folders import DEPLOYED
from examples.pathology.figures.run import draw_figures, draw_scores
from examples.pathology.figures.scores import compare
from examples.pathology.figures.sheet import Sheet
from examples.pathology.report import pages
from examples.pathology.report.patients import worst_errors
from examples.pathology.report.sections import SECTIONS
from examples.pathology.results import metrics
from examples.pathology.results.metrics import Metric
from examples.pathology.results.resampling import Comparison, compare_auroc, holm
from examples.pathology.results.runs import Run, read_deployed, read_run
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.settings.runs import PageConfig
from examples.pathology.tables.reading import PATIENT
from examples.pathology.tables.writing import write_table
from mtbalance import PAPER_COMBINATIONS

logger = logging.getLogger(__name__)

CAUTION = (
    "Mean ± standard deviation over the folds of one cross-validation with one seed [95 % "
    "bootstrap interval over the patients tested, the models taken as they are]. {remark} The "
    "folds share training patients and are few and small, so a difference between rows that is not "
    "clearly larger than their spread says nothing, and no method is claimed to be better than "
    "another here."
)
CAUTION_DEPLOYED = (
    "Mean ± standard deviation over the models of the folds, each on all patients of this cohort "
    "[95 % bootstrap interval over them, the models taken as they are]. The ensemble predicts the "
    "mean of all models. {remark}"
)
REMARKS = {
    "classification": "F1 is at the threshold that is best on the validation part.",
    "regression": "The mean absolute error is in the unit of the target.",
}


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    seed: int = 0,
    preface: str = "",
    config: PageConfig | None = None,
) -> Path:
    """Write ``index.html`` (self-contained), ``table.md``, ``table.csv`` and ``figures/``.

    Args:
        runs: Run folders, or folders of run folders; or one deployment.
        out: Where to; ``None``: ``report/`` in the first of ``runs``, or the deployment's folder.
        seed: Of the t-SNE.
        preface: A paragraph that stands first.
        config: What the page shows.

    Returns:
        The page.

    Raises:
        UserError: A folder holds no finished run, or the runs are of different targets.
    """
    if (runs[0] / DEPLOYED).exists():
        return _write_deployed(runs[0], out or runs[0], config)
    found, unfinished = _find_runs(runs)
    read = _read_runs(found)
    first = read[0].summary
    out = out or runs[0] / "report"
    figures: list[tuple[str, list[tuple[str, Path]]]] = []
    for run in read:
        folder = out / "figures" / _file_name(run.name)
        drawn = draw_figures(folder, run.summary, run.results, seed=seed)
        figures.append((run.name, [(f"{run.name}: {title}", path) for title, path in drawn]))
    if len(read) > 1:
        figures.insert(0, ("Methods side by side", _draw_comparisons(read, out / "figures")))
    return _write(
        out,
        read,
        CAUTION,
        read,
        config,
        title=f"Cross-validation of {first.target}",
        preface=preface,
        warnings=_warnings(read, unfinished),
        differences=_differences(read),
        figures_of=figures,
        runs=_runs_table(read),
    )


def _write_deployed(folder: Path, out: Path, config: PageConfig | None) -> Path:
    deployed = read_deployed(folder)
    models, summary, figures = deployed.models, deployed.models.summary, []
    if summary.labelled:
        drawn = draw_scores(out / "figures", summary, models.results)
        figures.append(("Every fold's model", drawn))
    alone = [
        replace(models, name=f"model of fold {k}", results=(result,))
        for k, result in enumerate(models.results, start=1)
    ]
    return _write(
        out,
        [deployed.ensemble, models],
        CAUTION_DEPLOYED,
        [deployed.ensemble, *alone],
        config,
        title=f"{summary.method} deployed: {summary.target}",
        warnings=pages.captions_of([summary]),
        figures_of=figures,
    )


def _write(
    out: Path,
    rows: Sequence[Run],
    caution: str,
    judged: Sequence[Run],
    config: PageConfig | None,
    **values: object,
) -> Path:
    """Write a page with a row of figures for each of some runs, and sections of those judged."""
    first, shown = rows[0].summary, _columns(rows)
    table, caution = _table(rows, shown), caution.format(remark=REMARKS[first.kind])
    pages.write_markdown(out / "table.md", table, [caution, first.caption])
    write_table(out / "table.csv", _numbers(rows, [*shown, Metric("prevalence")]))
    config = config or PageConfig()
    sections = [make(judged, out, config) for make in SECTIONS]
    worst = {run.name: [run] for run in (rows[:1] if first.run else rows)}  # or the ensemble's
    return pages.write_page(
        out / "index.html",
        "report.html.j2",
        summary=first,
        table_of_metrics=table,
        caution=caution,
        sections=[section for section in sections if section is not None],
        worst_errors=worst_errors(worst, out, config.worst),
        used=pages.funnel_of(rows[0].folder, first),
        **values,
    )


def _find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return finished and unfinished run folders."""
    found: list[Path] = []
    unfinished: list[Path] = []
    for folder in folders:
        inside = [path.parent for path in sorted(folder.glob("*/config.toml"))]
        candidates = [folder] if (folder / "config.toml").exists() else inside
        if not candidates:
            raise UserError(
                f"`run` must be a run folder or a folder of them, but {folder} is none."
            )
        for candidate in candidates:
            (found if (candidate / "metrics.json").exists() else unfinished).append(candidate)
    for folder in unfinished:
        logger.warning("%s is not finished and is left out; run `crossval` again", folder)
    if not found:
        raise UserError(
            f"`run` must hold a finished run, but {unfinished[0]} is not finished. Run `crossval` "
            "again."
        )
    return list(dict.fromkeys(found)), unfinished


def _read_runs(folders: Sequence[Path]) -> list[Run]:
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        for what in ("target", "kind", "positive"):
            first, other = (getattr(each.summary, what) for each in (runs[0], run))
            if first != other:
                raise UserError(
                    f"All runs must have the same {what}, but {folders[0]} has {first!r} and "
                    f"{run.folder} has {other!r}."
                )
    count = Counter(run.name for run in runs)
    order = {name: i for i, name in enumerate((BASELINE, *PAPER_COMBINATIONS))}
    return [
        run if count[run.name] == 1 else replace(run, name=f"{run.name} ({run.folder.name})")
        for run in sorted(runs, key=lambda run: order.get(run.name, len(order)))
    ]


def _columns(runs: Sequence[Run]) -> list[Metric]:
    """Return the metrics that the table shows."""
    regression = runs[0].summary.kind == "regression"
    always = ("pearson", "mae") if regression else ("auroc", "auprc", "f1", "silhouette")
    found = dict.fromkeys(metric for run in runs for metric in run.summary.metrics)
    return [*map(Metric, always), *(metric for metric in found if metric.auxiliary or metric.label)]


def _table(runs: Sequence[Run], columns: Sequence[Metric]) -> pd.DataFrame:
    """Return a row per method, as it is shown."""
    rows = [
        [run.name, *(pages.metric_cell(run.summary.metrics.get(metric)) for metric in columns)]
        for run in runs
    ]
    return pages.table(["Method", *(metric.title for metric in columns)], rows)


def _numbers(runs: Sequence[Run], columns: Sequence[Metric]) -> pd.DataFrame:
    """Return a row per method and metric, with everything that the page rounds or leaves out."""
    rows = [
        [run.name, metric, *pages.metric_numbers(run.summary.metrics[metric])]
        for run in runs
        for metric in columns
        if metric in run.summary.metrics
    ]
    return pages.table(["method", "metric", *pages.METRIC_COLUMNS], rows)


def _draw_comparisons(runs: Sequence[Run], folder: Path) -> list[tuple[str, Path]]:
    drawn = []
    folds = min(len(run.results) for run in runs)
    if (first := runs[0].summary).kind == "regression":
        compared = [("pearson", "Pearson r", 0.0)]
    else:
        share = first.positives / first.patients
        compared = [("auroc", "AUROC", 0.5), ("auprc", "AUPRC", share)]
    for key, name, chance in compared:
        path, title = folder / f"compare-{key}.png", f"{name} in every fold"
        values = {
            run.name: [s.value for s in run.summary.metrics[Metric(key)].scores][:folds]
            for run in runs
        }
        compare(values, Sheet(path, title, first.caption), metric=name, chance=chance)
        drawn.append((title, path))
    return drawn


def _differences(runs: Sequence[Run]) -> list[str]:
    """Return a sentence on each method's paired differences from the baseline, on equal folds."""
    base = runs[0]
    if base.summary.method != BASELINE:
        return []
    splits = base.summary.splits_sha256
    comparable = [run for run in runs[1:] if run.summary.splits_sha256 == splits]
    if base.summary.kind == "regression":
        metric, tests = Metric("pearson"), [""] * len(comparable)
    else:
        metric, tests = Metric("auroc"), _delong_sentences(comparable, base)
    sentences = []
    for run, test in zip(comparable, tests, strict=True):
        ours, theirs = (each.summary.metrics[metric].scores for each in (run, base))
        found = metrics.paired_difference(ours, theirs)
        if found.folds < 2:
            continue
        higher = sum(a.value > b.value for a, b in zip(ours, theirs, strict=True))
        sentences.append(
            f"{run.name} minus {base.name}, {metric.title} fold by fold: {found.mean:+.3f} ± "
            f"{found.sd:.3f}; higher in {higher} of {found.folds} folds; 95 % t-interval over "
            f"folds {found.low:+.3f} to {found.high:+.3f}, which "
            + (
                "includes 0."
                if found.low <= 0 <= found.high
                else "excludes 0, but folds are not independent, so this is no test of "
                "significance."
            )
            + test
        )
    return sentences


def _delong_sentences(runs: Sequence[Run], base: Run) -> list[str]:
    """Return what DeLong's test says of each run; nothing if no fold can be tested."""
    tests, many = [_delong(run, base) for run in runs], len(runs)
    sentences = []
    for test, corrected in zip(tests, holm([test.p for test in tests]), strict=True):
        several = f" ({corrected:.3f} corrected for {many} comparisons)" * (many > 1)
        sentence = (
            " DeLong's test over the same test patients, the trained models taken as they are: "
            f"{test.low:+.3f} to {test.high:+.3f}, p = {test.p:.3f}{several}."
        )
        sentences.append(sentence if test.folds else "")
    return sentences


def _delong(ours: Run, theirs: Run) -> Comparison:
    """Compare the AUROCs of two runs on the same test patients."""
    target = ours.summary.targets[0]
    score = f"{target.name}_{target.positive}"
    folds = []
    for a, b in zip(ours.results, theirs.results, strict=True):
        both = a.predictions.merge(b.predictions, on=PATIENT, suffixes=("", "_theirs"))
        scores = (both[name].to_numpy(dtype=float) for name in (score, f"{score}_theirs"))
        folds.append(((both[target.name] == target.positive).to_numpy(), *scores))
    return compare_auroc(folds)


def _warnings(runs: Sequence[Run], unfinished: Sequence[Path]) -> list[str]:
    texts = pages.captions_of(run.summary for run in runs)
    if len({run.summary.splits_sha256 for run in runs}) > 1:
        texts.append(
            "The runs were made on different splits: their rows cannot be compared fold by fold."
        )
    if len({run.summary.patients for run in runs}) > 1:
        texts.append("The runs were made on different patients.")
    return [*texts, *(f"{path.name} is not finished and is left out." for path in unfinished)]


def _runs_table(runs: Sequence[Run]) -> pd.DataFrame:
    headings = ("Method", "Folder", "Epochs per fold", "Best epoch", "Seconds", "Seed")
    rows = []
    for run in runs:
        epochs, best = (
            ", ".join(map(str, e)) for e in (run.summary.epochs, run.summary.best_epochs)
        )
        seconds = f"{sum(run.summary.seconds):.0f}"
        rows.append((run.name, run.folder.name, epochs, best, seconds, run.summary.seed))
    return pages.table(headings, rows)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "run"
