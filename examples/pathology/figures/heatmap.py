"""Values of tiles to pictures: over the slide, and the tiles that stand out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from examples.pathology.figures.sheet import PICTURES, SMALL, TEXT, Sheet
from examples.pathology.training.tile_values import TileValues

LEAST_SPAN = 0.1
"""Of the colours: tiles that hardly differ must not look as if they did."""

Picture = NDArray[np.uint8]


def heatmap(
    overview: Picture,
    um_per_px: float,
    corners_um: NDArray[np.float32],
    tile_um: float,
    values: TileValues,
    sheet: Sheet,
    *,
    what: str = "Class score",
    least_span: float = LEAST_SPAN,
) -> None:
    """Draw the slide, and over it the attention and the score of every tile.

    Args:
        overview: The whole slide, ``(h, w, 3)``.
        um_per_px: Size of its pixels.
        corners_um: x and y of the top-left corner of every tile ``(n, 2)``.
        tile_um: Edge of a tile.
        values: What the models say of every tile.
        sheet: Where to, and the words around it.
        what: The score's name.
        least_span: Of the score's colours.
    """
    height_mm, width_mm = (side * um_per_px / 1000 for side in overview.shape[:2])
    width = 4.6 if width_mm >= height_mm else max(2.8, 4.6 * width_mm / height_mm)
    height = min(width * height_mm / width_mm, 9.0)
    remark = "Colours span the 1st to 99th percentile of this slide's tiles, and at least 0.1"
    remark += f" ({what.lower()}: {least_span:.3g})." if least_span != LEAST_SPAN else "."
    parts = [
        ("Slide", None, "", 0.0),
        ("Attention (1: the average tile)", values.attention, "magma", LEAST_SPAN),
        (f"{what} of each tile alone", values.score, "viridis", least_span),
    ]
    with sheet.open(
        (width, height), (2.4, 1.6), len(parts), remark=remark, letters=140 / 3, style=PICTURES
    ) as (figure, panels):
        for axes, (name, shown, colours, span) in zip(panels, parts, strict=True):
            axes.imshow(overview, extent=(0, width_mm, height_mm, 0))
            if shown is not None:
                corners = corners_um.astype(float) / 1000
                drawn = _squares(axes, corners, tile_um / 1000, shown, colours, span)
                figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
            axes.set(xlim=(0, width_mm), ylim=(height_mm, 0), title=name)
            axes.set_xlabel("mm", fontsize=SMALL)
            axes.tick_params(labelsize=SMALL)


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
    rows: Sequence[tuple[str, Sequence[Picture], NDArray[np.float64]]], sheet: Sheet
) -> None:
    """Draw the tiles with the highest values, a row for each kind of value.

    Args:
        rows: Name of the value, pictures of tiles, and their values, highest first.
        sheet: Where to, and the words around it.
    """
    columns = max(len(pictures) for _, pictures, _ in rows)
    count, style = len(rows) * columns, {**PICTURES, "figure.titlesize": TEXT}
    with sheet.open((1.9, 2.3), (0.8, 1.0), count, columns=columns, letters=22, style=style) as (
        _,
        panels,
    ):
        for axes in panels:
            axes.set_axis_off()
        for number, (name, pictures, values) in enumerate(rows):
            line = panels[number * columns :]
            for axes, picture, value in zip(line, pictures, values, strict=False):
                axes.imshow(picture)
                axes.set_title(f"{name} {value:.4g}", fontsize=SMALL)
