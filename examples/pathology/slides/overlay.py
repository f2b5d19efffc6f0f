"""The grid of a slide drawn over it."""

from typing import NamedTuple

import cv2
import numpy as np

from examples.pathology.slides.tiling import Pixels, TilePlan, TileStatus


class _Look(NamedTuple):
    label: str
    colour: tuple[int, int, int]  # people with colour blindness tell these apart too
    strength: float  # of the colour over the tile, 0 to 1


_LOOKS = {
    TileStatus.KEPT: _Look("kept", (0, 158, 115), 0.0),
    TileStatus.BRIGHT: _Look("glass", (150, 150, 150), 0.1),
    TileStatus.SMOOTH: _Look("too few edges", (213, 94, 0), 0.35),
    TileStatus.PENDING: _Look("not read", (204, 121, 167), 0.35),
    TileStatus.DAMAGED: _Look("damaged", (240, 228, 66), 0.5),
}
_OVERHANG = _Look("over the edge: no whole tile", (0, 114, 178), 0.3)
COLOURS = {each.label: f"rgb{each.colour}" for each in (*_LOOKS.values(), _OVERHANG)}


def draw_overlay(plan: TilePlan) -> Pixels:
    """Draw the grid on the overview, coloured by what became of each tile, with a legend.

    Args:
        plan: The plan after the tiles were read.

    Returns:
        RGB, ``(h, w, 3)``.
    """
    rows, columns = plan.status.shape
    px = plan.tile_px
    looks = [*(_LOOKS[status] for status in sorted(TileStatus)), _OVERHANG]
    shown = np.full(plan.overview.shape[:2], len(looks) - 1)  # of each pixel its look
    shown[: rows * px, : columns * px] = np.kron(plan.status, np.ones((px, px), dtype=np.uint8))
    strength = np.array([look.strength for look in looks])[:, None]
    colour = strength * np.array([look.colour for look in looks])
    picture = (1 - strength).astype(np.float32)[shown] * plan.overview + colour[shown]
    picture = np.clip(picture.astype(np.float32), 0, 255).astype(np.uint8)
    for row, column in np.ndindex(rows, columns):
        corner = (column * px + 1, row * px + 1)
        opposite = ((column + 1) * px - 2, (row + 1) * px - 2)
        look = _LOOKS[TileStatus(int(plan.status[row, column]))]
        cv2.rectangle(picture, corner, opposite, look.colour, max(1, px // 40))
    legend = _legend(plan)
    width = max(picture.shape[1], legend.shape[1])
    return np.vstack([_padded(picture, width), _padded(legend, width)])


def _padded(picture: Pixels, width: int) -> Pixels:
    missing = ((0, 0), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, missing, constant_values=255)


def _legend(plan: TilePlan) -> Pixels:
    """Draw one line per status that occurs, with the number of tiles."""
    entries = [
        (look.colour, f"{look.label}: {plan.count(status)}")
        for status, look in _LOOKS.items()
        if plan.count(status)
    ]
    entries.append((_OVERHANG.colour, _OVERHANG.label))
    line = 22
    legend: Pixels = np.full((line * len(entries) + 8, 280, 3), 255, dtype=np.uint8)
    for number, (colour, text) in enumerate(entries):
        y = 4 + number * line
        cv2.rectangle(legend, (6, y + 3), (20, y + 17), colour, -1)
        place = (28, y + 16)
        cv2.putText(legend, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.48, (0, 0, 0), 1, cv2.LINE_AA)
    return legend
