"""The grid of a slide drawn over it."""

from __future__ import annotations

import cv2
import numpy as np

from examples.pathology.slides.tiling import Pixels, TilePlan, TileStatus

_COLOURS: dict[TileStatus, tuple[int, int, int]] = {
    TileStatus.KEPT: (0, 158, 115),
    TileStatus.SMOOTH: (213, 94, 0),
    TileStatus.BRIGHT: (150, 150, 150),
    TileStatus.PENDING: (204, 121, 167),
}
"""Colours that people with colour blindness tell apart too."""


_OVERHANG_COLOUR = (0, 114, 178)


_LABELS = {
    TileStatus.KEPT: "kept",
    TileStatus.SMOOTH: "too few edges",
    TileStatus.BRIGHT: "glass",
    TileStatus.PENDING: "not read",
}


def draw_overlay(plan: TilePlan) -> Pixels:
    """Draw the grid on the overview, coloured by what became of each tile, with a legend.

    Args:
        plan: The plan after the tiles were read.

    Returns:
        RGB, ``(h, w, 3)``.
    """
    picture = plan.overview.copy()
    rows, columns = plan.status.shape
    px = plan.tile_px
    tint = picture.astype(np.float32)
    overhang = np.ones(picture.shape[:2], dtype=bool)
    overhang[: rows * px, : columns * px] = False
    tint[overhang] = 0.7 * tint[overhang] + 0.3 * np.array(_OVERHANG_COLOUR)
    for row, column in np.ndindex(rows, columns):
        part = (slice(row * px, (row + 1) * px), slice(column * px, (column + 1) * px))
        status = TileStatus(int(plan.status[row, column]))
        strength = {TileStatus.KEPT: 0.0, TileStatus.BRIGHT: 0.1}.get(status, 0.35)
        tint[part] = (1 - strength) * tint[part] + strength * np.array(_COLOURS[status])
    picture = np.clip(tint, 0, 255).astype(np.uint8)
    for row, column in np.ndindex(rows, columns):
        colour = _COLOURS[TileStatus(int(plan.status[row, column]))]
        corner = (column * px + 1, row * px + 1)
        opposite = ((column + 1) * px - 2, (row + 1) * px - 2)
        cv2.rectangle(picture, corner, opposite, colour, max(1, px // 40))
    legend = _legend(plan)
    width = max(picture.shape[1], legend.shape[1])
    return np.vstack([_padded(picture, width), _padded(legend, width)])


def _padded(picture: Pixels, width: int) -> Pixels:
    missing = ((0, 0), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, missing, constant_values=255)


def _legend(plan: TilePlan) -> Pixels:
    """Draw one line per status that occurs, with the number of tiles."""
    entries = [
        (_COLOURS[status], f"{_LABELS[status]}: {plan.count(status)}")
        for status in TileStatus
        if plan.count(status)
    ]
    entries.append((_OVERHANG_COLOUR, "over the edge: no whole tile"))
    line = 22
    legend: Pixels = np.full((line * len(entries) + 8, 280, 3), 255, dtype=np.uint8)
    for number, (colour, text) in enumerate(entries):
        y = 4 + number * line
        cv2.rectangle(legend, (6, y + 3), (20, y + 17), colour, -1)
        place = (28, y + 16)
        cv2.putText(legend, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.48, (0, 0, 0), 1, cv2.LINE_AA)
    return legend
