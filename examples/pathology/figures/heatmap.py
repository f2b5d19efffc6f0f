"""Values of tiles to pictures: over the slide, and the tiles that stand out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from examples.pathology.figures.sheet import PICTURES, SMALL, TEXT, Sheet, Style

LEAST_SPAN = 0.1
"""Of the colours: tiles that hardly differ must not look as if they did."""

Picture = NDArray[np.uint8]


class Layer(NamedTuple):
    """A value of every tile."""

    name: str  # in short
    title: str
    shown: NDArray[np.float64]  # (n,)
    colours: str = "viridis"
    least_span: float = LEAST_SPAN


def heatmap(
    overview: Picture,
    um_per_px: float,
    corners_um: NDArray[np.float32],
    tile_um: float,
    layers: Sequence[Layer],
    sheet: Sheet,
    *,
    columns: int = 3,
) -> None:
    """Draw the slide ``(h, w, 3)``, and over it each layer of values.

    Corners are x and y of the top-left corner of every tile ``(n, 2)``.
    """
    height_mm, width_mm = (side * um_per_px / 1000 for side in overview.shape[:2])
    width = 4.6 if width_mm >= height_mm else max(2.8, 4.6 * width_mm / height_mm)
    height = min(width * height_mm / width_mm, 9.0)
    own = [f"{x.name}: {x.least_span:.3g}" for x in layers if x.least_span != LEAST_SPAN]
    remark = "Colours span the 1st to 99th percentile of this slide's tiles, and at least 0.1"
    remark += f" ({'; '.join(own)})." if own else "."
    count = 1 + len(layers)
    panel, margin = (width, height), (2.4, 1.6 * -(-count // columns))
    words: Style = {"remark": remark, "letters": 140 / 3, "style": PICTURES}
    with sheet.open(panel, margin, count, columns=columns, **words) as (figure, panels):
        panels[0].set_title("Slide")
        for axes, layer in zip(panels[1:], layers, strict=True):
            corners = corners_um.astype(float) / 1000
            drawn = _squares(axes, corners, tile_um / 1000, layer)
            figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
            axes.set_title(layer.title)
        for axes in panels:
            axes.imshow(overview, extent=(0, width_mm, height_mm, 0))
            axes.set(xlim=(0, width_mm), ylim=(height_mm, 0))
            axes.set_xlabel("mm", fontsize=SMALL)
            axes.tick_params(labelsize=SMALL)


def _squares(axes: Axes, corners: NDArray[np.float64], edge: float, layer: Layer) -> PolyCollection:
    """Draw a half transparent square per tile, wherever it lies."""
    steps = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * edge
    low, high = np.percentile(layer.shown, [1, 99])
    short = max(0.0, layer.least_span - (high - low)) / 2
    squares = PolyCollection(
        list(corners[:, None, :] + steps),
        array=layer.shown,
        cmap=layer.colours,
        norm=Normalize(low - short, high + short, clip=True),
        alpha=0.6,
        linewidth=0,
        antialiased=False,  # or thin lines shine through between neighbours
    )
    axes.add_collection(squares)
    return squares


def top_tiles(
    rows: Sequence[tuple[str, Sequence[Picture], NDArray[np.float64]]],
    sheet: Sheet,
    *,
    small: bool = False,
) -> None:
    """Draw the tiles with the highest values, a row for each kind of value.

    Args:
        rows: Name of the value, pictures of tiles, and their values, highest first.
        sheet: Where to, and the words around it.
        small: Whether there are many rows: names stand above them, and not at every tile.
    """
    columns = max(len(pictures) for _, pictures, _ in rows)
    count, style = len(rows) * columns, {**PICTURES, "figure.titlesize": TEXT}
    panel, letters = ((1.25, 1.75), 16) if small else ((1.9, 2.3), 22)
    with sheet.open(panel, (0.8, 1.0), count, columns=columns, letters=letters, style=style) as (
        _,
        panels,
    ):
        for axes in panels:
            axes.set_axis_off()
        for number, (name, pictures, values) in enumerate(rows):
            line = panels[number * columns :]
            for axes, picture, value in zip(line, pictures, values, strict=False):
                axes.imshow(picture)
                title = f"\n{value:.4g}" if small else f"{name} {value:.4g}"
                axes.set_title(title, fontsize=SMALL)
            if small:
                font: Style = {"fontsize": SMALL, "fontweight": "bold"}
                where: Style = {"xycoords": "axes fraction", "textcoords": "offset points"}
                heading = line[0].annotate(name, (0, 1), (0, 20), **where, **font)
                heading.set_in_layout(False)  # a long name must not push columns apart
