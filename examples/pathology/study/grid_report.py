"""What came out of a grid of simulated cohorts: differences with intervals, a figure, a page.

The cohort is the unit: all methods of a cohort are trained and tested on the same patients, their
differences are taken within it, and intervals and tests are those of Student's t over cohorts.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from examples.pathology.figures.grid import MINUS, Block, draw_grid
from examples.pathology.figures.sheet import Sheet
from examples.pathology.report import pages
from examples.pathology.results.metrics import Score, over_folds
from examples.pathology.results.resampling import holm
from examples.pathology.settings.crossval import BASELINE, NAIVE
from examples.pathology.settings.grid import GridConfig
from examples.pathology.simulation.planned import CORRELATION
from examples.pathology.study.differences import LEVEL
from examples.pathology.tables.writing import write_table

RESULTS = "results.csv"
CELL = ["overlap", "patients", "strength", "further", "missing"]
MARGINS: tuple[list[str], ...] = ([], ["overlap"], ["patients"], ["further", "missing"])
"""What means over cells are taken by, besides the strength."""

USELESS = f"{NAIVE}, value useless"
"""Reference for what the auxiliary value does, and not just a second task: strength 0."""

SIMULATED = "Labels, auxiliary values and features are SIMULATED by a program."


def differences(rows: pd.DataFrame, by: Sequence[str] = CELL) -> pd.DataFrame:
    """Compare methods cell by cell, or their means over cells.

    `naive` is compared with the baseline and with itself where the value is useless, every other
    balancer with `naive`.

    Args:
        rows: Of ``results.csv``.
        by: What cells must have in common to be taken together: a cohort's differences are averaged
            over them, and it counts only if none is missing.

    Returns:
        A row per method, reference and group of cells: the mean difference in AUROC over cohorts,
        the ends of its 95 % t-interval, and p of the paired t-test.
    """
    areas = rows.set_index([*CELL, "cohort", "method"])["auroc"].astype(float)
    wide = areas.unstack("method")  # noqa: PD010 - nothing is to be aggregated
    pairs = [(NAIVE, BASELINE, wide[BASELINE])]
    if 0.0 in rows["strength"].unique():
        useless = wide[NAIVE].xs(0.0, level="strength")
        at_zero = useless.reindex(wide.index.droplevel("strength")).to_numpy()
        pairs.append((NAIVE, USELESS, pd.Series(at_zero, wide.index)))
    others = [name for name in rows["method"].unique() if name not in (BASELINE, NAIVE)]
    pairs += [(name, NAIVE, wide[NAIVE]) for name in others]
    found = []
    for method, reference, theirs in pairs:
        both = pd.DataFrame({"difference": wide[method] - theirs, "reference": theirs})
        if reference == USELESS:
            both = both[both.index.get_level_values("strength") > 0]
        of_cohorts = both.groupby([*by, "cohort"]).agg(lambda cells: cells.mean(skipna=False))
        for group, values in of_cohorts.groupby(list(by)):
            figures = _over_cohorts(values["difference"])
            about = {"method": method, "reference": reference, **dict(zip(by, group, strict=True))}
            found.append({**about, "reference AUROC": values["reference"].mean(), **figures})
    table: pd.DataFrame = pd.DataFrame(found)
    return table


def _over_cohorts(values: "pd.Series[float]") -> dict[str, float]:
    found = over_folds([Score(float(value)) for value in values])
    error = found.sd / math.sqrt(found.folds) if found.folds > 1 else math.nan
    if error > 0:
        p = 2 * float(stats.t.sf(abs(found.mean) / error, found.folds - 1))
    else:
        p = math.nan if math.isnan(error) else float(found.mean == 0)
    return {
        "cohorts": found.folds,
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "p": p,
    }


def corrected(frame: pd.DataFrame) -> pd.DataFrame:
    """Return differences with p corrected by Holm's method for all with the same two methods."""
    groups = frame.groupby(["method", "reference"], sort=False)["p"]
    table: pd.DataFrame = frame.assign(
        corrected=groups.transform(lambda p: holm(list(p))), family=groups.transform("count")
    )
    return table


def write_grid_report(config: GridConfig, rows: pd.DataFrame) -> Path:
    """Write ``cells.csv``, ``margins.csv``, ``grid.png`` and ``index.html``; return the page."""
    cells = corrected(differences(rows))
    by_factors = pd.concat([differences(rows, ["strength", *by]) for by in MARGINS])
    in_order = ["method", "reference"]  # all of one comparison together, as cells are
    margins = pd.concat([each for _, each in corrected(by_factors).groupby(in_order, sort=False)])
    write_table(config.out / "cells.csv", cells)
    write_table(config.out / "margins.csv", margins)
    sheet = Sheet(config.out / "grid.png", "Where joint training helps, and balancing", SIMULATED)
    draw_grid(blocks_of(cells), sheet)
    failed = rows[rows["auroc"].isna()].drop_duplicates("fit")
    baseline = rows[rows["method"] == BASELINE].groupby(["overlap", "patients"])["auroc"].mean()
    once = rows.drop_duplicates("fit")
    return pages.write_page(
        config.out / "index.html",
        "grid.html.j2",
        title="When does joint training help?",
        warnings=[SIMULATED],
        config=config,
        correlation=CORRELATION,
        sentences=sentences(cells, margins),
        figure=sheet.path,
        baseline=pages.table(
            ("Overlap", "Patients with a label", "AUROC of the baseline"),
            [(o, n, f"{area:.3f}") for (o, n), area in baseline.items()],
        ),
        margins=_shown(margins),
        cells=_shown(cells),
        families=sorted(set(cells["family"])),
        trainings=len(once),
        seconds=once.groupby("method", sort=False)["seconds"].median().round(1).to_dict(),
        hours=once["seconds"].sum() / 3600,
        failed=pages.table(("Training", "Why"), failed[["fit", "error"]].to_numpy().tolist()),
        settings=pages.settings_table(config.resolved()),
    )


def sentences(cells: pd.DataFrame, margins: pd.DataFrame) -> list[str]:
    """Return in words what is significant after correction, in cells and on average over them.

    The mean over all cells of a strength is told whatever it is, others where they are significant.
    """
    said = []
    for (method, reference), found in cells.groupby(["method", "reference"], sort=False):
        better, worse = (
            found[(found["corrected"] < LEVEL) & (sign * found["difference"] > 0)]
            for sign in (1, -1)
        )
        low, high = found["difference"].min(), found["difference"].max()
        text = (
            f"{method} against {reference}: significantly better in {len(better)} and worse in "
            f"{len(worse)} of {len(found)} cells; differences from {low:+.3f} to {high:+.3f}."
        )
        both = (margins["method"] == method) & (margins["reference"] == reference)
        for each in margins[both].to_dict("records"):
            which, significant = _which_cells(each), each["corrected"] < LEVEL
            if significant or not which:
                mark = "significant" if significant else "not significant"
                text += (
                    f" On average over cells of strength {each['strength']:g}{which}: "
                    f"{each['difference']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}], {mark}."
                )
        said.append(text)
    return said


def _which_cells(each: Mapping[Hashable, Any]) -> str:
    """Return in words what cells have in common besides the strength, if anything."""
    words = [f", {name} {each[name]:g}" for name in ("overlap", "patients") if pd.notna(each[name])]
    if pd.notna(each["missing"]):
        words.append(f", auxiliary value: {known_words(each['missing'], each['further'])}")
    return "".join(words)


def known_words(missing: float, further: float) -> str:
    """Return in words for whom the auxiliary value is known."""
    if further:
        return f"all, and {further:g} further"
    return f"{missing:.0%} missing" if missing else "all known"


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Return differences as a page shows them."""
    rows = []
    for each in frame.to_dict("records"):
        known = each.get("missing", math.nan)
        rows.append(
            (
                f"{each['method']}{MINUS}{each['reference']}",
                f"{each['strength']:g}",
                *(_or_all(each.get(name, math.nan)) for name in ("overlap", "patients")),
                "(all)" if math.isnan(known) else known_words(known, each["further"]),
                f"{each['reference AUROC']:.3f}",
                f"{each['difference']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]"
                + " *" * bool(each["corrected"] < LEVEL),
                f"{each['p']:.3g}",
                f"{each['corrected']:.3g}",
                int(each["cohorts"]),
            )
        )
    headings = ("Comparison", "Strength", "Overlap", "Patients", "Auxiliary value", "Reference")
    return pages.table((*headings, "Difference", "p", "Corrected p", "Cohorts"), rows)


def _or_all(value: float) -> str:
    return "(all)" if math.isnan(value) else f"{value:g}"


def blocks_of(cells: pd.DataFrame) -> list[Block]:
    """Return what the figure shows: a block for each overlap and number of patients."""
    blocks = []
    for (overlap, patients), here in cells.groupby(["overlap", "patients"]):
        columns = list(dict.fromkeys(zip(*(here[name] for name in CELL[2:]), strict=True)))
        lines = list(dict.fromkeys(zip(here["method"], here["reference"], strict=True)))
        shape = len(lines), len(columns)
        values, marked = np.full(shape, math.nan), np.zeros(shape, dtype=bool)
        for each in here.to_dict("records"):
            row = lines.index((each["method"], each["reference"]))
            column = columns.index(tuple(each[name] for name in CELL[2:]))
            values[row, column] = each["difference"]
            marked[row, column] = each["corrected"] < LEVEL
        blocks.append(
            Block(
                f"overlap {overlap:g}, {patients:g} patients with a label",
                [f"{method}{MINUS}{reference}" for method, reference in lines],
                [(f"strength {s:g}", known_words(m, f)) for s, f, m in columns],
                values,
                marked,
            )
        )
    return blocks
