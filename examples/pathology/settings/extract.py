"""Settings of an extraction: which slides, what is a tile, and which network."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

from examples.pathology.common.errors import UserError
from examples.pathology.settings.cohort import filename_column_option, mpp_table_option, seed_option
from examples.pathology.settings.option import Settings, between, needed, nested, option

LAYOUTS = ("stamp-v2", "stamp-v1")
"""Layouts of feature files that can be written."""

TILE_UM, TILE_PX = 256.0, 224
"""Edge of a tile in STAMP, and all that its layout of version 1 can tell."""

MIN_MPP = 0.08
MAX_MPP = 4.0
"""Scanners make pixels of 0.09 um (oil, 60x) and more, so that half a micron written ten times too
small is noticed; above 4 um a 224 px tile has no cells to see."""

default_mpp_option = partial(option, None, min=MIN_MPP, max=MAX_MPP)


@dataclass(frozen=True)
class TileRules(Settings):
    """What a tile is and which tiles are kept."""

    tile_size_um: float = option(
        TILE_UM, "Edge of a tile on the slide in um.", flag="--tile-um", min=16, max=2048
    )
    tile_size_px: int = option(
        TILE_PX, "The same in pixels, as the network takes it.", flag="--tile-px", min=32, max=2048
    )
    brightness_cutoff: float = option(
        240.0, "Tiles at least this bright on average (0 to 255) are glass.", rule=between(0, 256)
    )
    min_edge_share: float = option(
        0.02, "Tiles with a smaller share of edge pixels are background.", rule=between(0, 1)
    )
    canny_low: float = option(
        40.0, "Lower threshold of the edges.", rule=between(0, 10000), source="STAMP"
    )
    canny_high: float = option(
        100.0, "Upper threshold of the edges.", rule=between(0, 10000), source="STAMP"
    )
    max_dark_share: float = option(
        0.5, "Slides with a larger share of dark pixels are fluorescence.", rule=between(0, 1)
    )
    max_damaged_share: float = option(
        0.1,
        "Tiles with pixels that cannot be read are left out; slides fail if a larger share of the "
        "area of all tiles but glass cannot.",
        rule=between(0, 1),
    )


@dataclass(frozen=True)
class ExtractConfig(Settings):
    """Which slides become feature files, and how."""

    slides: Path = needed("Folder of slides, searched with its sub-folders.")
    out: Path = needed("Where the feature files go.")
    _: KW_ONLY
    weights: Path | None = option(
        None, "ctranspath.pth; without it, seeded RANDOM weights that carry no biology."
    )
    extractor: str = option("ctranspath", "ctranspath, or timm:NAME for one of timm's models.")
    extractor_option: tuple[str, ...] = option(
        (), "Of timm's model, such as reg_tokens=4; several.", metavar="KEY=VALUE"
    )
    slide_table: Path | None = mpp_table_option()
    filename_column: str = filename_column_option()
    default_mpp: float | None = default_mpp_option(help="um per pixel of slides that do not tell.")
    workers: int | None = option(
        None,
        "Threads that read tiles, in each process; default: 2 on a CPU, with a GPU one per core.",
        min=1,
        source="16 at most",
    )
    processes: int | None = option(None, "That share the slides; default: one per device.", min=1)
    scheduler: str | None = option(
        None, "Of Dask, whose workers share the slides instead.", metavar="tcp://HOST:PORT"
    )
    batch_size: int = option(64, "Tiles per forward pass.", min=1, source="at most 8 on a CPU")
    rules: TileRules = nested(TileRules)
    precision: str = option(
        "float32",
        "float32, or bfloat16: faster on a GPU, features differ by 0.03.",
        choices=("float32", "bfloat16"),
    )
    layout: str = option(
        "stamp-v2",
        "Of the feature files: stamp-v2, or stamp-v1 for its old readers.",
        choices=LAYOUTS,
    )
    max_failures: int | None = option(
        None, "End the run when more slides than this have failed.", min=0
    )
    seed: int = seed_option()
    device: str = option("auto", "auto, cpu, cuda or cuda:N; several with commas share the slides.")
    show_tiles: bool = True  # a progress bar of its own for a slide that takes long

    def __post_init__(self) -> None:
        super().__post_init__()
        um, px = self.rules.tile_size_um, self.rules.tile_size_px
        if self.layout == "stamp-v1" and (um, px) != (TILE_UM, TILE_PX):
            raise UserError(
                f"`layout` must be stamp-v2 for tiles of {um:g} um and {px} px, since stamp-v1 "
                f"means {TILE_UM:g} um and {TILE_PX} px. Leave --layout out, or the tile's size."
            )


@dataclass(frozen=True)
class VerifyWeightsConfig(Settings):
    """Which file to look at."""

    weights: Path = needed("A CTransPath checkpoint.")
