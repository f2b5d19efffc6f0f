"""The figure of a grid of simulated cohorts: a map of differences for each pair of two factors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from examples.pathology.figures.sheet import MEDIUM, PICTURES, SMALL, Sheet

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
    panel = 0.72 * columns, 0.3 * rows + 1.2
    remark = "* significant after correction for all cells of one comparison."
    with sheet.open(
        panel, (3.4, 1.0), len(blocks), columns=2, share_y=True, remark=remark, style=PICTURES
    ) as (figure, panels):
        for axes, block in zip(panels, blocks, strict=True):
            shown = axes.imshow(block.values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
            for row, column in np.ndindex(block.values.shape):
                if not math.isnan(value := block.values[row, column]):
                    text = f"{value:+.3f}" + "*" * bool(block.marked[row, column])
                    dark = abs(value) > 0.65 * most
                    style = {"color": "white" if dark else "black", "fontsize": SMALL}
                    axes.text(column, row, text, ha="center", va="center", **style)
            axes.set_title(f"{block.title}\n", fontsize=MEDIUM)
            words = [second.replace(" ", "\n") for _, second in block.columns]
            axes.set_xticks(range(columns), words, fontsize=SMALL)
            start = 0
            for first, same in groupby(block.columns, lambda column: column[0]):
                end = start + len(list(same))
                middle = (start + end - 1) / 2
                axes.text(middle, -0.6, first, ha="center", va="bottom", fontsize=SMALL)
                axes.axvline(end - 0.5, color="white", lw=5)
                start = end
            ends = [
                end
                for end in range(1, rows)
                if _reference(block, end - 1) != _reference(block, end)
            ]
            for end in ends:
                axes.axhline(end - 0.5, color="white", lw=5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_yticks(range(rows), blocks[0].rows, fontsize=SMALL)
        figure.colorbar(shown, ax=panels, shrink=0.5, aspect=30, label="Difference in AUROC")


def _reference(block: Block, row: int) -> str:
    return block.rows[row].rpartition(" – ")[2]
