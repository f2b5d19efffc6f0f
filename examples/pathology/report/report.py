"""Finished runs to one page: a table, the figures, who was left out, and what it cannot say."""

from __future__ import annotations

import csv
import html
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.pathology.cohort.cohort import TRAINING_ONLY
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import table_csv, write_text
from examples.pathology.figures import plots
from examples.pathology.figures.run import caption_of, draw_figures
from examples.pathology.report import pages
from examples.pathology.results import metrics
from examples.pathology.results.resampling import Comparison, compare_auroc, holm
from examples.pathology.results.runs import Run, read_run
from examples.pathology.settings.crossval import BASELINE
from mtbalance import PAPER_COMBINATIONS

logger = logging.getLogger(__name__)

CAUTION = (
    "Mean ± standard deviation over the folds of one cross-validation with one seed [95 % "
    "bootstrap interval over the patients tested, the models taken as they are]. {remark} The "
    "folds share training patients and are few and small, so a difference between rows that is not "
    "clearly larger than their spread says nothing, and no method is claimed to be better than "
    "another here."
)
REMARKS = {
    "classification": "F1 is at the threshold that is best on the validation part.",
    "regression": "The mean absolute error is in the unit of the target.",
}


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, seed: int = 0, preface: str = ""
) -> Path:
    """Write ``index.html`` (self-contained), ``table.md``, ``table.csv`` and ``figures/``.

    Args:
        runs: Run folders, or folders of run folders.
        out: Where to; ``None``: ``report/`` in the first of ``runs``.
        seed: Of the t-SNE.
        preface: A paragraph that stands first.

    Returns:
        The page.

    Raises:
        UserError: A folder holds no finished run, or the runs are of different targets.
    """
    found, unfinished = _find_runs(runs)
    read = _read_runs(found)
    out = out or runs[0] / "report"
    columns = _columns(read)
    figures: list[tuple[str, list[tuple[str, Path]]]] = []
    for run in read:
        folder = out / "figures" / _file_name(run.name)
        drawn = draw_figures(folder, run.summary, run.results, seed=seed)
        figures.append((run.name, [(f"{run.name}: {title}", path) for title, path in drawn]))
    if len(read) > 1:
        figures.insert(0, ("Methods side by side", _draw_comparisons(read, out / "figures")))
    write_text(out / "table.md", _markdown(read, columns))
    write_text(out / "table.csv", _csv(read, columns))
    page = out / "index.html"
    write_text(page, _html(read, columns, figures, unfinished, preface))
    logger.info("The report is %s", page)
    return page


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
    summaries = [json.loads((f / "metrics.json").read_text(encoding="utf-8")) for f in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        for key in ("target", "kind", "positive"):
            first, other = summaries[0].get(key), summary.get(key)
            if first != other:
                raise UserError(
                    f"All runs must have the same {key}, but {folders[0]} has {first!r} and "
                    f"{folder} has {other!r}."
                )
    count = Counter(summary["method"] for summary in summaries)
    runs = []
    for folder, summary in zip(folders, summaries, strict=True):
        method = str(summary["method"])
        runs.append(read_run(folder, method if count[method] == 1 else f"{method} ({folder.name})"))
    order = {name: i for i, name in enumerate((BASELINE, *PAPER_COMBINATIONS))}
    return sorted(runs, key=lambda run: order.get(run.summary["method"], len(order)))


def _columns(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return ``(key of the metric, heading)`` of the table."""
    columns = [
        ("auroc", "AUROC"),
        ("auprc", "AUPRC"),
        ("f1", "F1"),
        ("silhouette", "Silhouette of [cls]"),
    ]
    if is_regression(runs[0].summary):
        columns = [("pearson", "Pearson r"), ("mae", "Mean absolute error")]
    extra = dict.fromkeys(key for run in runs for key in run.summary["metrics"])
    for key in extra:
        if key.startswith("pearson/"):
            columns.append((key, f"Pearson r, {key.removeprefix('pearson/')}"))
        elif key.startswith("auroc/"):
            columns.append((key, f"AUROC, {key.removeprefix('auroc/')}"))
        elif key.startswith("auroc of "):
            columns.append((key, f"AUROC of {key.removeprefix('auroc of ')} against the rest"))
    return columns


def _cells(run: Run, columns: Sequence[tuple[str, str]]) -> list[str]:
    return [run.name, *(pages.metric_cell(run.summary["metrics"].get(key)) for key, _ in columns)]


def _markdown(runs: Sequence[Run], columns: Sequence[tuple[str, str]]) -> str:
    headings = ["Method", *(heading for _, heading in columns)]
    table = pages.table_markdown(headings, [_cells(run, columns) for run in runs])
    remarks = [
        _caution(runs[0].summary),
        *([text] if (text := caption_of(runs[0].summary)) else []),
    ]
    return table + "".join(f"\n{text}\n" for text in remarks)


def _csv(runs: Sequence[Run], columns: Sequence[tuple[str, str]]) -> str:
    """Return one row per method and metric, with everything that the page rounds or leaves out."""
    rows = [
        [run.name, key, *pages.metric_numbers(value)]
        for run in runs
        for key in [*(key for key, _ in columns), "prevalence"]
        if (value := run.summary["metrics"].get(key)) is not None
    ]
    return table_csv(["method", "metric", *pages.METRIC_COLUMNS], rows)


def _draw_comparisons(runs: Sequence[Run], folder: Path) -> list[tuple[str, Path]]:
    drawn = []
    caption = caption_of(runs[0].summary)
    folds = min(len(run.results) for run in runs)
    if is_regression(first := runs[0].summary):
        compared = [("pearson", "Pearson r", 0.0)]
    else:
        share = first["positives"] / first["patients"]
        compared = [("auroc", "AUROC", 0.5), ("auprc", "AUPRC", share)]
    for key, name, chance in compared:
        path = folder / f"compare-{key}.png"
        values = {run.name: [s.value for s in run.scores(key)][:folds] for run in runs}
        plots.compare(values, path, metric=name, chance=chance, caption=caption)
        drawn.append((f"{name} in every fold", path))
    return drawn


def _differences(runs: Sequence[Run]) -> list[str]:
    """Return a sentence on each method's paired differences from the baseline, on equal folds."""
    base = runs[0]
    if base.summary["method"] != BASELINE:
        return []
    comparable = [
        run for run in runs[1:] if run.summary["splits_sha256"] == base.summary["splits_sha256"]
    ]
    if is_regression(base.summary):
        key, name, tests = "pearson", "Pearson r", [""] * len(comparable)
    else:
        key, name, tests = "auroc", "AUROC", _delong_sentences(comparable, base)
    sentences = []
    for run, test in zip(comparable, tests, strict=True):
        ours, theirs = run.scores(key), base.scores(key)
        summary = metrics.paired_difference(ours, theirs)
        if summary.folds < 2:
            continue
        higher = sum(a.value > b.value for a, b in zip(ours, theirs, strict=True))
        inside = summary.low <= 0 <= summary.high
        sentences.append(
            f"{run.name} minus {base.name}, {name} fold by fold: {summary.mean:+.3f} ± "
            f"{summary.sd:.3f}; higher in "
            f"{higher} of {summary.folds} folds; 95 % t-interval over folds {summary.low:+.3f} to "
            f"{summary.high:+.3f}, which {'includes' if inside else 'excludes'} 0"
            + (
                "."
                if inside
                else ", but folds are not independent, so this is no test of significance."
            )
            + test
        )
    return sentences


def _delong_sentences(runs: Sequence[Run], base: Run) -> list[str]:
    tests = [_delong(run, base) for run in runs]
    corrected = holm([test.p for test in tests])
    return [_test_sentence(test, p, len(runs)) for test, p in zip(tests, corrected, strict=True)]


def _delong(ours: Run, theirs: Run) -> Comparison:
    """Compare the AUROCs of two runs on the same test patients."""
    target, positive = ours.summary["target"], ours.summary["positive"]
    folds = []
    for a, b in zip(ours.results, theirs.results, strict=True):
        both = a.predictions.merge(b.predictions, on="PATIENT", suffixes=("", "_theirs"))
        score = f"{target}_{positive}"
        folds.append(
            (
                (both[target] == positive).to_numpy(),
                both[score].to_numpy(dtype=float),
                both[f"{score}_theirs"].to_numpy(dtype=float),
            )
        )
    return compare_auroc(folds)


def _test_sentence(test: Comparison, corrected: float, comparisons: int) -> str:
    if test.folds == 0:
        return ""
    several = f" ({corrected:.3f} corrected for {comparisons} comparisons)" * (comparisons > 1)
    return (
        f" DeLong's test over the same test patients, the trained models taken as they are: "
        f"{test.low:+.3f} to {test.high:+.3f}, p = {test.p:.3f}{several}."
    )


def _warnings(runs: Sequence[Run], unfinished: Sequence[Path]) -> list[str]:
    texts = list(dict.fromkeys(text for run in runs if (text := caption_of(run.summary))))
    if len({run.summary["splits_sha256"] for run in runs}) > 1:
        texts.append(
            "The runs were made on different splits: their rows cannot be compared fold by fold."
        )
    if len({run.summary["patients"] for run in runs}) > 1:
        texts.append("The runs were made on different patients.")
    texts += [f"{path.name} is not finished and is left out." for path in unfinished]
    return texts


def _html(
    runs: Sequence[Run],
    columns: Sequence[tuple[str, str]],
    figures: Sequence[tuple[str, Sequence[tuple[str, Path]]]],
    unfinished: Sequence[Path],
    preface: str,
) -> str:
    first = runs[0].summary
    headings = ["Method", *(heading for _, heading in columns)]
    parts = [
        pages.paragraph_html(preface),
        *(pages.warning_html(text) for text in _warnings(runs, unfinished)),
        pages.paragraph_html(
            f"{first['patients']} patients; {first['tiles']} tiles; {len(runs[0].results)} folds "
            f"by patient. {_primary(first)} Features: {first['extractor']}."
        ),
        pages.table_html(headings, [_cells(run, columns) for run in runs]),
        pages.paragraph_html(_caution(first)),
        pages.list_html(_differences(runs)),
    ]
    for heading, drawn in figures:
        parts += [f"<h2>{html.escape(heading)}</h2>", pages.figures_html(drawn)]
    parts += [
        "<h2>Who was used, and who was not</h2>",
        funnel_html(runs[0].folder, runs[0].summary),
        "<h2>Runs</h2>",
        _runs_html(runs),
    ]
    return pages.page_html(f"Cross-validation of {first['target']}", parts)


def _primary(summary: Mapping[str, Any]) -> str:
    """Return in words what the primary target is like, and what chance would reach."""
    if is_regression(summary):
        values = summary["values"]
        return (
            f"{summary['target']} runs from {values['lowest']:g} to {values['highest']:g} with "
            f"mean {values['mean']:.3g} and standard deviation {values['sd']:.3g}; chance has a "
            "Pearson r of 0."
        )
    share = summary["positives"] / summary["patients"]
    return (
        f"{summary['positives']} patients are {summary['positive']}. The prevalence of {share:.2f} "
        "is the chance level of AUPRC; that of AUROC is 0.5."
    )


def _caution(summary: Mapping[str, Any]) -> str:
    return CAUTION.format(remark=REMARKS[summary.get("kind", "classification")])


def is_regression(summary: Mapping[str, Any]) -> bool:
    """Return whether the primary target of a run is a number."""
    return bool(summary.get("kind") == "regression")


def funnel_html(folder: Path, summary: Mapping[str, Any]) -> str:
    """Return who was used, and who was left out and why.

    Args:
        folder: Of a run or a deployment.
        summary: What its ``metrics.json`` holds.
    """
    with (folder / "ledger.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] != "used"]
    alone = [row for row in rows if row["status"] == TRAINING_ONLY]
    reasons = Counter(
        (row["item"], row["reason"]) for row in rows if row["status"] != TRAINING_ONLY
    )
    left_out = [f"{n} × {item}: {why}" for (item, why), n in reasons.most_common()]
    stages = [f"{count} {stage}" for stage, count in summary["funnel"]]
    return (
        pages.paragraph_html("Patients:")
        + pages.list_html(stages, ordered=True)
        + (f"<p>{len(alone)} trained on for other targets only.</p>" if alone else "")
        + pages.paragraph_html("Left out:")
        + pages.list_html(left_out or ["nobody"])
        + pages.paragraph_html("One row for each is in ledger.csv of the run.")
    )


def _runs_html(runs: Sequence[Run]) -> str:
    rows = [
        (
            run.name,
            run.folder.name,
            ", ".join(map(str, run.summary["epochs"])),
            ", ".join(map(str, run.summary["best_epochs"])),
            f"{sum(run.summary['seconds']):.0f}",
            run.summary["seed"],
        )
        for run in runs
    ]
    headings = ("Method", "Folder", "Epochs per fold", "Best epoch", "Seconds", "Seed")
    return pages.table_html(headings, rows)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "run"
