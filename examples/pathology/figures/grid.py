"""The figure of a grid of simulated cohorts: a map of differences for each pair of two factors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from examples.pathology.figures.sheet import MEDIUM, PICTURES, SMALL, Sheet, Style

MINUS = " \N{MINUS SIGN} "
LEAST = 0.02  # what the ends of the colours stand for at least, as a difference in AUROC


@dataclass(frozen=True)
class Block:
    """Differences of several comparisons in several cells.

    Args:
        title: What these cells have in common.
        rows: The comparisons; those with one reference follow each other.
        columns: The cells, each in two words; those with the same first follow each other.
        values: ``(rows, columns)``; NaN where there is none.
        marked: Which are significant ``(rows, columns)``.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[tuple[str, str]]
    values: NDArray[np.float64]
    marked: NDArray[np.bool_]


def draw_grid(blocks: Sequence[Block], sheet: Sheet) -> None:
    """Draw a map for each block: blue where the first method is better, red where it is worse."""
    rows, columns = blocks[0].values.shape
    known = np.concatenate([np.abs(block.values[np.isfinite(block.values)]) for block in blocks])
    most = max(LEAST, float(known.max(initial=0.0)))
    size, margin = (0.72 * columns, 0.3 * rows + 1.2), (3.4, 1.0)
    found = any(block.marked.any() for block in blocks)
    star = "* significant" if found else "Nothing is significant"
    remark = f"{star} after correction for all cells of one comparison."
    with sheet.open(
        size, margin, len(blocks), columns=2, share_y=True, remark=remark, style=PICTURES
    ) as (figure, panels):
        for axes, block in zip(panels, blocks, strict=True):
            shown = axes.imshow(block.values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
            _write_numbers(axes, block, most)
            axes.set_title(f"{block.title}\n", fontsize=MEDIUM)
            words = [second.replace(" ", "\n") for _, second in block.columns]
            axes.set_xticks(range(columns), words, fontsize=SMALL)
            for first, start, end in _runs([first for first, _ in block.columns]):
                middle = (start + end - 1) / 2
                axes.text(middle, -0.6, first, ha="center", va="bottom", fontsize=SMALL)
                axes.axvline(end - 0.5, color="white", lw=5)
            for _, _, end in _runs([row.rpartition(MINUS)[2] for row in block.rows]):
                axes.axhline(end - 0.5, color="white", lw=5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_yticks(range(rows), blocks[0].rows, fontsize=SMALL)
        figure.colorbar(shown, ax=panels, shrink=0.5, aspect=30, label="Difference in AUROC")


def _write_numbers(axes: Axes, block: Block, most: float) -> None:
    for row, column in np.ndindex(block.values.shape):
        if not math.isnan(value := block.values[row, column]):
            text = f"{value:+.3f}" + "*" * bool(block.marked[row, column])
            style: Style = {"color": "white" if abs(value) > 0.65 * most else "black"}
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, **style)


def _runs(words: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return every word with where the run of it begins, and where it ends."""
    runs, start = [], 0
    for word, same in groupby(words):
        end = start + len(list(same))
        runs.append((word, start, end))
        start = end
    return runs
