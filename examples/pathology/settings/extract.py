"""Settings of an extraction."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from examples.pathology.common.errors import UserError

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TileRules:
    """What a tile is and which tiles are kept.

    Attributes:
        tile_size_um: Edge of a tile on the slide in um; 256 as in STAMP.
        tile_size_px: Edge of a tile in pixels; 224 as CTransPath wants.
        brightness_cutoff: Tiles at least this bright on average (0 to 255) are glass.
        canny_low: Lower threshold of Canny's edge detector.
        canny_high: Upper threshold of Canny's edge detector.
        min_edge_share: Tiles with a smaller share of edge pixels are dropped.
        max_dark_share: Slides with a larger share of dark pixels are taken for fluorescence.
    """

    tile_size_um: float = 256.0
    tile_size_px: int = 224
    brightness_cutoff: float = 240.0
    canny_low: float = 40.0
    canny_high: float = 100.0
    min_edge_share: float = 0.02
    max_dark_share: float = 0.5

    def __post_init__(self) -> None:
        for name, low, high in (
            ("tile_size_um", 1, 10_000),
            ("tile_size_px", 1, 10_000),
            ("brightness_cutoff", 0, 256),
            ("canny_low", 0, 10_000),
            ("canny_high", 0, 10_000),
            ("min_edge_share", 0, 1),
            ("max_dark_share", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"`{name}` must be between {low} and {high}, but got {value}.")


LAYOUTS = ("stamp-v2", "stamp-v1")
"""Layouts of feature files that can be written."""


@dataclass(frozen=True)
class Settings:
    """Everything that is the same for all slides of a run, before any network is built.

    Attributes:
        out: Output folder.
        rules: What a tile is.
        extractor: Name of the network, as `make_extractor` takes it.
        weights: Its weights file; None for random weights.
        seed: Seed of random weights.
        precision: ``float32`` or ``bfloat16``.
        batch_size: Tiles per call of the network.
        workers: Threads that read, in each process; None: what suits the device.
        layout: Layout of the feature files.
        table_mpp: Microns per pixel by stem of the slide, from the slide table.
        default_mpp: What to assume for slides that do not say.
        show_tiles: Whether a slide that takes long gets a progress bar of its own.
    """

    out: Path
    rules: TileRules
    extractor: str
    weights: Path | None
    seed: int
    precision: str
    batch_size: int
    workers: int | None
    layout: str
    table_mpp: dict[str, float] = field(hash=False)
    default_mpp: float | None
    show_tiles: bool = True

    def __post_init__(self) -> None:
        check_settings(self.precision, self.batch_size)
        if self.workers is not None and self.workers < 1:
            raise UserError(f"`workers` must be at least 1, but got {self.workers}.")
        if self.layout not in LAYOUTS:
            raise UserError(
                f"`layout` must be one of {', '.join(LAYOUTS)}, but got {self.layout!r}."
            )


def check_settings(precision: str, batch_size: int) -> None:
    """Raise a `UserError` for an unknown precision or a batch size below 1."""
    if precision not in PRECISIONS:
        raise UserError(
            f"`precision` must be one of {', '.join(PRECISIONS)}, but got {precision!r}."
        )
    if batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1, but got {batch_size}.")
