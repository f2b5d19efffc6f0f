"""The sections that the page of runs and the page of a deployment have in common."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from examples.pathology.figures.scores import draw_calibration
from examples.pathology.figures.sheet import Sheet
from examples.pathology.figures.study import Column, Estimate, dots
from examples.pathology.report import pages
from examples.pathology.results import decisions as deciding
from examples.pathology.results.folds import best_of, candidate_in_words
from examples.pathology.results.runs import Run, sites_in
from examples.pathology.settings.runs import PageConfig
from examples.pathology.tables.writing import write_table

JUDGED = (
    "A fold's model judges the patients that it was tested on, at its own threshold; an ensemble "
    "judges at the mean of its models' thresholds. Patients of all folds are counted together: one "
    "fold has too few of a class. Thresholds come from the validation parts: the one with the best "
    "F1, and the highest with a sensitivity of at least {:g} % there. Where such a part has one "
    "class only, or is gone, there is none, and the fold's patients are not judged."
)
INTERVALS = (
    "Brackets: 95 % intervals over patients, with models and thresholds as they are; Wilson's of a "
    "share, the bootstrap's of a Brier score. PPV and NPV are those at the prevalence beside them. "
    "Skill: how much lower the Brier score is than that of always saying the prevalence, as a "
    "share of the latter."
)
SEARCHED = (
    "In every fold all candidates were trained from the same initial weights, and the one with the "
    "lowest loss of {} on the validation part was kept; the test part was looked at after that. "
    "search.csv has all of them. Seconds in all are those of all candidates, epochs those of the "
    "one kept."
)
SMALL_SITE, EVERYBODY = 20, "all patients"
BY_SITE = (
    "Each patient is judged by the model that tested it, at its threshold of best F1; those of a "
    f"site are taken together, and sites of fewer than {SMALL_SITE} patients in one row (sites.csv "
    "has a row for each). No dot: nobody is of the class in question. An AUROC over several folds "
    "compares scores of several models, which may lower it, and one of fewer than "
    f"{deciding.FEW} patients of a class has no interval. Differences between sites of few "
    "patients say nothing: look at the intervals."
)
_VALUE = ("value", "ci95_low", "ci95_high")


class Section(NamedTuple):
    """A part of a page.

    Args:
        heading: Above it.
        paragraphs: What it says first.
        tables: Below them; the first column of each names the row.
        figures: Below those, a title and the file of each.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[pd.DataFrame] = ()
    figures: Sequence[tuple[str, Path]] = ()


def _decided(found: pd.DataFrame, *, ruled: bool) -> pd.DataFrame:
    """Return `decisions` as a page shows them: those of thresholds, or what needs none."""
    found = found[(found["rule"] != "") == ruled]
    names = [*found.columns[: -len(deciding.COLUMNS) + (3 if ruled else 1)]]
    short = found["thresholds"].map(_shorter)
    found = found.assign(cell=found.apply(_cell, axis=1), thresholds=short)
    table = found.pivot_table("cell", names, "figure", "first", sort=False).reset_index()
    shown: pd.DataFrame = table.rename(columns=_heading)
    return shown


def _heading(name: str) -> str:
    return name.upper() if len(name) < 4 else name.replace("_", " ").capitalize()


def _cell(row: "pd.Series[Any]") -> str:
    if row["undefined"]:
        return f"undefined: {row['undefined']}"
    if row["ci95_low"] is None:
        return f"{row['value']:.3g}"
    value, low, high = (f"{row[c]:.{2 if row['rule'] else 3}f}" for c in _VALUE)
    return f"{value} [{low}, {high}]"


def _shorter(thresholds: str) -> str:
    return " ".join(t if t == "none" else f"{float(t):.2g}" for t in thresholds.split())


def judged(found: pd.DataFrame, config: PageConfig) -> Section:
    """Return the section of the `decisions` of one or several runs."""
    tables = [_decided(found, ruled=ruled) for ruled in (True, False)]
    said = [JUDGED.format(100 * config.sensitivity), INTERVALS]
    return Section("Decisions and calibration", said, tables)


def decide(runs: Sequence[Run], out: Path, config: PageConfig) -> Section | None:
    """Show what is decided at thresholds, and how far probabilities can be believed.

    Writes ``decisions.csv``, ``calibration.csv`` and, of several classes, ``confusion.csv``.
    """
    target, caption = runs[0].summary.targets[0], runs[0].summary.caption
    if target.kind == "regression" or not (runs[0].results[0].predictions[target.name] != "").any():
        return None
    found = pd.concat([deciding.decisions(r, config.sensitivity, method=r.name) for r in runs])
    write_table(out / "decisions.csv", found)
    section, bins, figures = judged(found, config), [], []
    for number, label in enumerate(deciding.judged_classes(target), start=1):
        curves = {run.name: deciding.pooled(run, label)[:2] for run in runs}
        for method, curve in curves.items():
            names = {"method": method, "class": label}
            bins.append(pd.DataFrame({**names, **deciding.calibration(*curve)}))
        path, title = out / "figures" / f"calibration-{number}.png", f"{target.name} = {label}"
        title = f"{'Calibration' if len(runs) > 1 else runs[0].name}: {title}"
        draw_calibration(curves, Sheet(path, title, caption))
        figures.append((title, path))
    write_table(out / "calibration.csv", pd.concat(bins))
    counts = []
    if len(target.classes) > 2:
        counts = [pd.concat([deciding.confusion(run, method=run.name) for run in runs])]
        write_table(out / "confusion.csv", counts[0])
        counts = [counts[0].rename(columns={"method": "Method", "class": "True class"})]
    return section._replace(tables=[*section.tables, *counts], figures=figures)


def show_sites(runs: Sequence[Run], out: Path, config: PageConfig) -> Section | None:
    """Show how good runs are at each site, and write ``sites.csv``."""
    target, tables, figures = runs[0].summary.targets[0], [], []
    once = {run.folder: run for run in reversed(runs)}  # of a deployment, the ensemble
    for number, run in enumerate(reversed(once.values()), start=1):
        if not target.classes or not (sites := sites_in(run, config)):
            continue
        small = [site for site, members in sites.items() if len(members) < SMALL_SITE]
        small *= len(small) > 1  # one would only lose its name
        shown = {site: members for site, members in sites.items() if site not in small}
        if small:
            shown[f"{len(small)} smaller sites"] = [n for site in small for n in sites[site]]
        groups = {**sites, **shown, EVERYBODY: [name for each in sites.values() for name in each]}
        found = deciding.by_site(run, groups)
        tables.append(pd.DataFrame({"method": run.name, **found[found["site"].isin(sites)]}))
        columns, rows = list[Column](), found.set_index(["figure", "site"])
        for figure, chance in (("AUROC", 0.5), ("Sensitivity", None), ("Specificity", None)):
            values = rows.loc[figure.lower()].loc[[*shown, EVERYBODY], list(_VALUE)]
            *of_sites, of_all = [Estimate(*row) for row in values.to_numpy(dtype=float)]
            columns.append(Column(figure, of_sites, of_all, chance))
        counts = rows.loc["auroc"].loc[[*shown], ["patients", "of"]].itertuples(name=None)
        named = [f"{site}: {positive} / {of}" for site, positive, of in counts]
        path, title = out / "figures" / f"sites-{number}.png", f"{run.name}: by site"
        sheet = Sheet(path, f"{title} ({target.positive} / patients)", run.summary.caption)
        dots(named, columns, sheet, ("site", EVERYBODY))
        figures.append((title, path))
    if not figures:
        return None
    write_table(out / "sites.csv", pd.concat(tables))
    return Section("By site", [BY_SITE], (), figures)


def show_search(runs: Sequence[Run], out: Path, _: PageConfig | None = None) -> Section | None:
    """Show what each fold of runs has kept of its candidates, and write ``search.csv``."""
    rows, tried = list[dict[str, Any]](), list[dict[str, Any]]()
    at_end: dict[str, list[bool]] = {}
    for run in runs:
        folds = {k: r.search for k, r in enumerate(run.results, start=1) if r.search}
        kept = {k: found[best_of(found)] for k, found in folds.items()}
        tried += [{"method": run.name, "fold": k, **row} for k in folds for row in folds[k]]
        for name in ("learning_rate", "weight"):
            for k, best in kept.items():
                if len(values := {row[name] for row in folds[k] if name in row}) > 2:
                    ends = min(values), max(values)
                    at_end.setdefault(name.replace("_", " "), []).append(best[name] in ends)
        if kept:
            words = {f"Fold {k}": candidate_in_words(best) for k, best in kept.items()}
            rows.append({"Method": run.name, **words})
    if not rows:
        return None
    write_table(out / "search.csv", pd.DataFrame(tried))
    said = [SEARCHED.format(runs[0].summary.target)] + [
        f"In {sum(found)} of {len(found)} folds the {name} kept is the lowest or the highest that "
        "was tried: a wider search may find a better one."
        for name, found in at_end.items()
        if any(found)
    ]
    return Section("What the search kept", said, [pd.DataFrame(rows).fillna(pages.DASH)])


Make = Callable[[Sequence[Run], Path, PageConfig], Section | None]
SECTIONS: tuple[Make, ...] = (decide, show_sites, show_search)
"""Makes a section of runs, in order of the page; None where they have nothing for it.

Of a deployment, the ensemble comes first, and then each fold's model, as runs of one fold that
tested all patients; some of these may have no label. The path is the page's folder.
"""
