"""Settings of an extraction: which slides, what is a tile, and which network."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated

from examples.pathology.settings.cohort import FilenameColumn, MppTable, Seed
from examples.pathology.settings.option import Nested, Option, Settings, between

LAYOUTS = ("stamp-v2", "stamp-v1")
"""Layouts of feature files that can be written."""


@dataclass(frozen=True)
class TileRules(Settings):
    """What a tile is and which tiles are kept.

    Args:
        tile_size_um: Edge of a tile on the slide in um; 256 as in STAMP.
        tile_size_px: Edge of a tile in pixels; 224 as CTransPath wants.
    """

    tile_size_um: float = 256.0
    tile_size_px: int = 224
    brightness_cutoff: Annotated[
        float,
        Option("Tiles at least this bright on average (0 to 255) are glass.", rule=between(0, 256)),
    ] = 240.0
    min_edge_share: Annotated[
        float,
        Option("Tiles with a smaller share of edge pixels are background.", rule=between(0, 1)),
    ] = 0.02
    canny_low: Annotated[
        float, Option("Lower threshold of the edges.", rule=between(0, 10_000), source="STAMP")
    ] = 40.0
    canny_high: Annotated[
        float, Option("Upper threshold of the edges.", rule=between(0, 10_000), source="STAMP")
    ] = 100.0
    max_dark_share: Annotated[
        float,
        Option("Slides with a larger share of dark pixels are fluorescence.", rule=between(0, 1)),
    ] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tile_size_um", "tile_size_px"):
            Option("", min=1, max=10_000).check(name, getattr(self, name))


@dataclass(frozen=True)
class ExtractConfig(Settings):
    """Which slides become feature files, and how.

    Args:
        show_tiles: Whether a slide that takes long gets a progress bar of its own.
    """

    slides: Annotated[Path, Option("Folder of slides, searched with its sub-folders.")]
    out: Annotated[Path, Option("Where the feature files go.")]
    _: KW_ONLY
    weights: Annotated[
        Path | None,
        Option("ctranspath.pth; without it, seeded RANDOM weights that carry no biology."),
    ] = None
    extractor: Annotated[str, Option("ctranspath, or timm:NAME for one of timm's models.")] = (
        "ctranspath"
    )
    slide_table: MppTable = None
    filename_column: FilenameColumn = "FILENAME"
    default_mpp: Annotated[
        float | None, Option("um per pixel of slides that do not tell theirs.")
    ] = None
    workers: Annotated[
        int | None,
        Option(
            "Threads that read tiles, in each process; default: 2 on a CPU, with a GPU one per "
            "core.",
            min=1,
            source="16 at most, shared out among the processes",
        ),
    ] = None
    processes: Annotated[
        int | None, Option("That share the slides; default: one per device.", min=1)
    ] = None
    scheduler: Annotated[
        str | None,
        Option(
            "Of Dask, whose workers share the slides instead.",
            metavar="tcp://HOST:PORT",
            source="They read and write the same folders under the same paths.",
        ),
    ] = None
    batch_size: Annotated[
        int, Option("Tiles per forward pass.", min=1, source="At most 8 are used on a CPU.")
    ] = 64
    rules: Annotated[TileRules, Nested()] = field(default_factory=TileRules)
    precision: Annotated[
        str,
        Option(
            "float32, or bfloat16: faster on a GPU, features differ by 0.03.",
            choices=("float32", "bfloat16"),
        ),
    ] = "float32"
    layout: Annotated[
        str,
        Option("Of the feature files: stamp-v2, or stamp-v1 for its old readers.", choices=LAYOUTS),
    ] = "stamp-v2"
    max_failures: Annotated[
        int | None, Option("End the run when more slides than this have failed.", min=0)
    ] = None
    seed: Seed = 0
    device: Annotated[
        str, Option("auto, cpu, cuda or cuda:N; several with commas share the slides.")
    ] = "auto"
    show_tiles: bool = True


@dataclass(frozen=True)
class VerifyWeightsConfig(Settings):
    """Which file to look at."""

    weights: Annotated[Path, Option("A CTransPath checkpoint.")]
