"""Values of tiles to pictures: over the slide, and the tiles that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from examples.pathology.figures.plots import GREY, STYLE, save, wrap

LEAST_SPAN = 0.1
"""Of the colours: tiles that hardly differ must not look as if they did."""

Picture = NDArray[np.uint8]


def heatmap(
    overview: Picture,
    um_per_px: float,
    corners_um: NDArray[np.float32],
    tile_um: float,
    attention: NDArray[np.float64],
    score: NDArray[np.float64],
    path: Path,
    *,
    title: str,
    caption: str = "",
    what: str = "Class score",
    least_span: float = LEAST_SPAN,
) -> None:
    """Draw the slide, and over it the attention and the score of every tile.

    Args:
        overview: The whole slide, ``(h, w, 3)``.
        um_per_px: Size of its pixels.
        corners_um: x and y of the top-left corner of every tile ``(n, 2)``.
        tile_um: Edge of a tile.
        attention: ``(n,)``, 1 for the average tile.
        score: ``(n,)``, the probability of a class, or a value.
        path: The ``.png`` to write.
        title: Above the panels.
        caption: Below them.
        what: Name of the score.
        least_span: Of the score's colours.
    """
    height_mm, width_mm = (side * um_per_px / 1000 for side in overview.shape[:2])
    panel = 4.6 if width_mm >= height_mm else max(2.8, 4.6 * width_mm / height_mm)
    tall = panel * height_mm / width_mm
    figure = Figure(figsize=(3 * panel + 2.4, min(tall, 9.0) + 1.6), layout="constrained")
    figure.suptitle(title, fontsize=STYLE["font"] + 2)
    panels = figure.subplots(1, 3)
    parts = [
        ("Slide", None, "", 0.0),
        ("Attention (1: the average tile)", attention, "magma", LEAST_SPAN),
        (f"{what} of each tile alone", score, "viridis", least_span),
    ]
    for axes, (name, values, colours, span) in zip(panels, parts, strict=True):
        axes.imshow(overview, extent=(0, width_mm, height_mm, 0))
        if values is not None:
            corners = corners_um.astype(float) / 1000
            drawn = _squares(axes, corners, tile_um / 1000, values, colours, span)
            figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
        axes.set_xlim(0, width_mm)
        axes.set_ylim(height_mm, 0)
        axes.set_title(name, fontsize=STYLE["font"])
        axes.set_xlabel("mm", fontsize=STYLE["small"])
        axes.tick_params(labelsize=STYLE["small"])
    text = "Colours span the 1st to 99th percentile of this slide's tiles, and at least 0.1"
    text += f" ({what.lower()}: {least_span:.3g}). " if least_span != LEAST_SPAN else ". "
    figure.supxlabel(wrap(text + caption, 140), fontsize=STYLE["small"], color=GREY)
    save(figure, path)


def _squares(
    axes: Axes,
    corners: NDArray[np.float64],
    edge: float,
    values: NDArray[np.float64],
    colours: str,
    least_span: float,
) -> PolyCollection:
    """Draw a half transparent square per tile, wherever it lies."""
    steps = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * edge
    low, high = np.percentile(values, [1, 99])
    short = max(0.0, least_span - (high - low)) / 2
    squares = PolyCollection(
        list(corners[:, None, :] + steps),
        array=values,
        cmap=colours,
        norm=Normalize(low - short, high + short, clip=True),
        alpha=0.6,
        linewidth=0,
        antialiased=False,  # or thin lines shine through between neighbours
    )
    axes.add_collection(squares)
    return squares


def top_tiles(
    rows: Sequence[tuple[str, Sequence[Picture], NDArray[np.float64]]],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Draw the tiles with the highest values, a row for each kind of value.

    Args:
        rows: Name of the value, pictures of tiles, and their values, highest first.
        path: The ``.png`` to write.
        title: Above them.
        caption: Below them.
    """
    columns = max(len(pictures) for _, pictures, _ in rows)
    figure = Figure(figsize=(1.9 * columns + 0.8, 2.3 * len(rows) + 1.0), layout="constrained")
    figure.suptitle(wrap(title, 16 * columns + 8), fontsize=STYLE["font"])
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures, values) in zip(panels, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, picture, value in zip(line, pictures, values, strict=False):
            axes.imshow(picture)
            axes.set_title(f"{name} {value:.4g}", fontsize=STYLE["small"])
    if caption:
        figure.supxlabel(wrap(caption, 22 * columns), fontsize=STYLE["small"], color=GREY)
    save(figure, path)
