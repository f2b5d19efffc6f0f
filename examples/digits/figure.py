"""The results in a picture: the only module that imports matplotlib."""

import io
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from examples.digits.data import data_of
from examples.digits.methods import SINGLE
from examples.digits.page import comma_separated
from examples.digits.results import SCORE, Interval, Row, Table
from examples.digits.setting import TASKS

TABLE = "table"
"""Where the file says which table it shows."""

SHOWN = 8
"""Pictures at the top."""

PALETTE = 128
"""Colours of the file, which has few."""

BETTER, WORSE, TIE = "#0072b2", "#c8502a", "#6b6b6b"
STYLE: dict[Any, Any] = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8.5,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.0,
}
PANELS = {
    TASKS[0]: "upper-left digit\npoints of accuracy",
    TASKS[1]: "lower-right digit\npoints of accuracy",
    TASKS[2]: "ink\nerror (less is better)",
    SCORE: "all three\npoints of score",
}


def draw(table: Table, out: Path) -> None:
    """Draw each method's differences from equal weights, and what its step costs.

    Args:
        table: The study's result.
        out: The .png to write.
    """
    rows = [table.reference, *(row for row in table.rows if not row.failed)]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 2.1 + 0.19 * len(rows)))
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1 + 0.19 * len(rows)))
        top, main = parts
        _pictures(top, table)
        panels = main.subplots(1, len(PANELS) + 1, sharey=True, width_ratios=(1, 1, 1, 1.25, 0.8))
        for axes, (measure, heading) in zip(panels, PANELS.items(), strict=False):
            _differences(axes, rows, measure)
            axes.set_title(heading)
        _costs(panels[-1], rows)
        panels[-1].set_title("time of a step\nequal weights: 1")
        names = ["a network per task" if row.method == SINGLE else row.method for row in rows]
        panels[0].set_yticks(range(len(rows)), names)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        for axes in panels:
            for row in range(1, len(rows), 2):
                axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", lw=0, zorder=0)
        panels[1].set_xlabel("difference from equal weights (Equal + Sum)", loc="left")
        main.legend(handles=_legend(rows), loc="outside lower center", ncols=5, handletextpad=0.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    picture = picture.quantize(PALETTE, kmeans=1, dither=Image.Dither.NONE)
    told = PngInfo()
    told.add_text(TABLE, digest(table))
    picture.save(out, optimize=True, pnginfo=told)


def digest(table: Table) -> str:
    """Return what tells a table from others; the figure's file holds it."""
    return sha256(comma_separated(table).encode()).hexdigest()


def _pictures(figure: Any, table: Table) -> None:
    pictures = data_of(0, table.plan.setting).train
    for number, axes in enumerate(figure.subplots(1, SHOWN)):
        axes.imshow(pictures.pixels[number].numpy(), cmap="Greys", vmin=0, vmax=1)
        first, second = int(pictures.upper_left[number]), int(pictures.lower_right[number])
        axes.set_title(f"{first}, {second}, ink {float(pictures.ink[number]):.1f}")
        axes.set_axis_off()


def _differences(axes: Axes, rows: list[Row], measure: str) -> None:
    """Draw a measure's differences; what lies far out is an arrow at the edge, with its number."""
    limit = _limit(rows, measure)
    axes.axvline(0, color="black", lw=0.7, zorder=1)
    for place, row in enumerate(rows):
        inner = row.differences[measure]
        outer = row.corrected if measure == SCORE else None
        colour = _colour(outer, measure) if outer else TIE
        if abs(inner.mean) > limit:
            side = math.copysign(1, inner.mean)
            axes.plot(
                side * limit * 0.97, place, marker=">" if side > 0 else "<", color=colour, ms=4.5
            )
            axes.text(
                side * limit * 0.88,
                place,
                f"{inner.mean:+.{2 if measure == 'ink' else 0}f}".replace("-", "−"),
                ha="right" if side > 0 else "left",
                va="center",
                color=colour,
                fontsize=7,
            )
            continue
        for interval, width in ((outer, 0.8), (inner, 2.2)):
            if interval is not None and not math.isnan(interval.half):
                axes.plot([interval.low, interval.high], [place] * 2, color=colour, lw=width)
        axes.plot(inner.mean, place, "o", color=colour, mec="white", mew=0.5, ms=4.5, zorder=5)
    axes.set_xlim(-limit, limit)
    axes.margins(y=0)


def _limit(rows: list[Row], measure: str) -> float:
    """Return how far a panel reaches: most of the methods are well inside."""
    sizes = [abs(row.differences[measure].mean) for row in rows]
    return max(2.0 * float(np.quantile(sizes, 0.85)), 0.01 if measure == "ink" else 1.0)


def _colour(interval: Interval, measure: str) -> str:
    sign = -interval.verdict if measure == "ink" else interval.verdict
    return {1: BETTER, -1: WORSE, 0: TIE}[sign]


def _costs(axes: Axes, rows: list[Row]) -> None:
    axes.axvline(1, color="black", lw=0.7, zorder=1)
    for place, row in enumerate(rows):
        if row.cost and not math.isnan(row.cost.ratio):
            if not math.isnan(row.cost.low):
                axes.plot([row.cost.low, row.cost.high], [place] * 2, color=TIE, lw=2.2)
            axes.plot(row.cost.ratio, place, "o", color=TIE, mec="white", mew=0.5, ms=4.5)
    axes.set_xlim(left=0)


def _legend(rows: list[Row]) -> list[Line2D]:
    found = {_colour(row.corrected, SCORE) for row in rows if row.corrected}
    words = {BETTER: "better beyond chance", WORSE: "worse beyond chance", TIE: "tie"}
    handles = [
        Line2D([], [], color=colour, marker="o", ls="", label=word)
        for colour, word in words.items()
        if colour in found | {TIE}
    ]
    handles.append(Line2D([], [], color=TIE, lw=2.2, label="95 % interval"))
    handles.append(Line2D([], [], color=TIE, lw=0.8, label="corrected for all methods"))
    return handles
