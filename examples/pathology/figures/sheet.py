"""The sheet that every figure is drawn on, and the one style of them all.

Figures are written as png, with colours that colour-blind readers can tell apart (Okabe and Ito)
and a marker or line style besides the colour. A caption under each says what is synthetic or random
about its data.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.pathology.common.files import write_bytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
BLACK, GREY = "#000000", "#666666"
TITLE, TEXT, MEDIUM, SMALL = 13, 11, 10, 9.5  # points
LETTERS_PER_INCH = 13  # of small text

Style = dict[str, Any]
"""Settings of matplotlib, or of what it draws, by name."""

STYLE: Style = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": TEXT,
    "figure.constrained_layout.use": True,
    "figure.labelsize": SMALL,  # the caption
    "figure.titlesize": TITLE,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
PICTURES: Style = {"axes.grid": False, "axes.spines.right": True, "axes.spines.top": True}
"""What differs where panels hold a picture or a map."""


@dataclass(frozen=True)
class Sheet:
    """Where a figure goes, and the words around it.

    Args:
        path: The ``.png`` to write.
        title: Above the panels; a panel that is alone and has no heading has it for its own.
        caption: Below them.
    """

    path: Path
    title: str
    caption: str = ""

    @contextmanager
    def open(
        self,
        panel: tuple[float, float],
        margin: tuple[float, float] = (0.0, 0.0),
        count: int = 1,
        *,
        columns: int | None = None,
        share_y: bool = False,
        legend: Literal["upper", "center"] = "upper",
        remark: str = "",
        letters: float | None = None,
        style: Style | None = None,
    ) -> Iterator[tuple[Figure, list[Axes]]]:
        """Give a figure and its panels to draw on; then write it, whole or not at all.

        What has a label in the first panel is explained beside the panels; below, the caption would
        run into it. The style ends with the block, and pyplot does not know the figure, so that
        none stays open.

        Args:
            panel: Width and height of a panel, in inches.
            margin: Width and height for what stands around the panels.
            count: Number of panels.
            columns: How many of them stand side by side, at most; ``None``: all.
            share_y: Whether panels have one vertical axis.
            legend: Where the legend stands.
            remark: What the figure says of itself, before the caption.
            letters: In a line of the caption, for each column; ``None``: as many as fit.
            style: What differs from `STYLE`, if anything.
        """
        columns = min(columns or count, count)
        rows = -(-count // columns)
        width, height = panel[0] * columns + margin[0], panel[1] * rows + margin[1]
        settings: dict[Any, Any] = {**STYLE, **(style or {})}
        with rc_context(settings):
            figure = Figure(figsize=(width, height))
            places = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel())
            panels = places[:count]
            for axes in places[count:]:
                axes.set_visible(False)
            yield figure, panels
            if count == 1 and not panels[0].get_title():
                panels[0].set_title(self.title, fontsize=TITLE, wrap=True)
            else:
                figure.suptitle(self.title, wrap=True)
            handles, names = panels[0].get_legend_handles_labels()
            if names and panels[0].get_legend() is None:
                loc: Any = f"outside right {legend}"
                figure.legend(handles, names, loc=loc)
            if text := f"{remark} {self.caption}".strip():
                fit = letters * columns if letters else LETTERS_PER_INCH * width
                figure.supxlabel(textwrap.fill(text, round(fit)), color=GREY)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            write_bytes(self.path, buffer.getvalue())


def colour(number: int) -> str:
    """Return the colour of a fold, class or task; they repeat."""
    return COLOURS[number % len(COLOURS)]


def coloured_marker(number: int) -> Style:
    """Return the colour and the marker of a fold, class or task, as matplotlib takes them."""
    return {"color": colour(number), "marker": MARKERS[number % len(MARKERS)]}


def coloured_line(number: int) -> Style:
    """Return the colour and the line style of a fold or task, as matplotlib takes them."""
    return {"color": colour(number), "ls": LINES[number % len(LINES)]}
