"""What each tile of a slide says, by the models of a run: attention, class score, top tiles.

Attention is how much the [cls] token looks at a tile, relative to the average tile. The score of a
tile is what a model says of a slide that consists of this tile alone: it shows what the model takes
for a sign of the class, or of a high value, and is no calibrated probability of the tile. Both are
means over folds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import table_csv, write_json, write_text
from examples.pathology.common.toml import read_toml
from examples.pathology.features.files import Bag, read_features
from examples.pathology.features.kind import refuse_other_features
from examples.pathology.figures import heatmap as heatmap_plots
from examples.pathology.results.folds import read_model
from examples.pathology.results.runs import fold_folders
from examples.pathology.results.summary import warning_of
from examples.pathology.settings.extract import TileRules
from examples.pathology.settings.runs import HeatmapConfig
from examples.pathology.slides.pixelsizes import mpp_of_slide
from examples.pathology.slides.slide import LevelError, Slide, open_slide, slide_file
from examples.pathology.slides.tiling import plan_tiles
from examples.pathology.slides.units import SlideError
from examples.pathology.training.tile_values import TileValues, tile_values

logger = logging.getLogger(__name__)

TOP_TILE_PX = 224

Opener = Callable[..., Slide]
"""Opens the slide, given its broken levels."""


def run_heatmap(config: HeatmapConfig) -> dict[str, Any]:
    """Draw heat maps of one slide.

    Writes ``heatmap.png`` (the slide, attention, score), ``top-tiles.png``, ``tiles.csv`` with
    every tile's position and values, and ``heatmap.json``.

    Args:
        config: Of what.

    Returns:
        What ``heatmap.json`` holds.

    Raises:
        UserError: The run is not finished, slide or features cannot be read, or the features are
            of another kind than those of the run.
    """
    started = time.perf_counter()
    device = resolve_device(config.device)
    folders = fold_folders(config.run)
    models = [read_model(folder / "model.pt", device) for folder in folders]
    if not config.slide.is_file():
        raise UserError(f"`slide` must be readable, but there is no file {config.slide}.")
    name = PurePosixPath(slide_file(config.slide.absolute()).name).name  # of DICOM, the folder's
    table = config.slide_table
    opener = partial(
        open_slide,
        config.slide,
        name,
        table_mpp=None
        if table is None
        else mpp_of_slide(table, config.slide, config.filename_column),
        default_mpp=config.default_mpp,
    )
    with closing(_open(opener)) as slide:
        bag = read_features(config.features, mpp=slide.mpp.x)
        size_um = _check(bag, slide, config.features)
    for folder, (_, kind) in zip(folders, models, strict=True):
        refuse_other_features(kind, bag.kind, folder, config.features)
    values = tile_values([fitted for fitted, _ in models], bag.feats, device)
    target = models[0][0].targets[0]
    if target.kind == "classification":
        score, what, least_span = "score", "Class score", heatmap_plots.LEAST_SPAN
        heading = f"{target.name} = {target.positive}"
    else:  # colours span a tenth of what training has seen, as for probabilities
        ranges = [fitted.scalers[target.name] for fitted, _ in models]
        score, what, heading = "value", "Predicted value", target.name
        least_span = heatmap_plots.LEAST_SPAN * float(np.mean([r.high - r.low for r in ranges]))
    summary: dict[str, Any] = {
        "slide": name,
        "run": str(config.run.resolve()),
        "target": target.name,
        **({"positive": target.positive} if target.positive else {}),
        f"{score}_of_the_slide": values.slide_score,
        "tiles": len(bag.feats),
        "tile_size_um": size_um,
        "random_weights": bag.kind.random_weights,
        "simulated": bag.kind.simulated,
        "note": read_toml(config.run / "config.toml")["crossval"].get("note", ""),
    }
    caption = warning_of(
        summary["note"], bag.kind.simulated, random_weights=bag.kind.random_weights
    )
    by_kind = {"attention": values.attention, score: values.score}
    best = {
        kind: np.argsort(-value, kind="stable")[: config.top] for kind, value in by_kind.items()
    }
    corners = [bag.coords_um[indices] for indices in best.values()]
    overview, um_per_px, tiles = _read_pictures(opener, size_um, corners)
    heatmap_plots.heatmap(
        overview,
        um_per_px,
        bag.coords_um,
        size_um,
        values.attention,
        values.score,
        config.out / "heatmap.png",
        title=f"{name}: {heading}, {score} of the slide {values.slide_score:.3g}",
        caption=caption,
        what=what,
        least_span=least_span,
    )
    heatmap_plots.top_tiles(
        [
            (kind, pictures, by_kind[kind][indices])
            for (kind, indices), pictures in zip(best.items(), tiles, strict=True)
        ],
        config.out / "top-tiles.png",
        title=f"{name}: tiles of {size_um:g} um with the highest values",
        caption=caption,
    )
    write_text(config.out / "tiles.csv", _tiles_csv(bag, values, score))
    summary["seconds"] = round(time.perf_counter() - started, 3)
    write_json(config.out / "heatmap.json", summary)
    logger.info(
        "%s: %d tiles, %.1f s; %s",
        name,
        len(bag.feats),
        summary["seconds"],
        config.out,
    )
    return summary


def _check(bag: Bag, slide: Slide, path: Path) -> float:
    """Return the tile size, and raise if tiles cannot be placed on the slide."""
    if len(bag.feats) == 0:
        raise UserError(f"{path} must hold tiles, but holds none.")
    if bag.kind.tile_size_um is None or not np.isfinite(bag.coords_um).all():
        raise UserError(
            f"{path} must say where its tiles are in um, but does not. Extract the slide again."
        )
    ends = bag.coords_um.max(axis=0) + bag.kind.tile_size_um
    limits = np.array([slide.width_um, slide.height_um])
    if (bag.coords_um.min() < -bag.kind.tile_size_um) or (
        ends > limits + bag.kind.tile_size_um
    ).any():
        raise UserError(
            f"`features` must be those of `slide`, but {path.name} has tiles up to "
            f"{ends[0]:.0f} x {ends[1]:.0f} um and {slide.name} measures "
            f"{limits[0]:.0f} x {limits[1]:.0f} um."
        )
    return bag.kind.tile_size_um


def _open(opener: Opener, broken: frozenset[int] = frozenset()) -> Slide:
    try:
        return opener(broken_levels=broken)
    except (SlideError, OSError) as error:
        raise UserError(f"`slide` must be readable: {error}") from error


def _read_pictures(
    opener: Opener,
    size_um: float,
    corners_um: Sequence[NDArray[np.float32]],
    broken: frozenset[int] = frozenset(),
) -> tuple[heatmap_plots.Picture, float, list[list[heatmap_plots.Picture]]]:
    """Read the whole slide, with the size of its pixels in um, and rows of tiles.

    As in `extract`, a broken level of the pyramid is replaced by a finer one.
    """
    rules = TileRules(tile_size_um=size_um, max_dark_share=1.0)  # only the picture is needed
    try:
        with closing(_open(opener, broken)) as slide:
            plan = plan_tiles(slide, rules)
            size_px = (TOP_TILE_PX, TOP_TILE_PX)
            tiles = [
                [slide.read(float(x), float(y), size_um, size_um, size_px) for x, y in row]
                for row in corners_um
            ]
            return plan.overview, size_um / plan.tile_px, tiles
    except LevelError as error:
        if error.level == 0:
            raise UserError(f"`slide` must be readable: {error}") from error
        logger.warning("%s It is read from a finer level instead.", error)
        return _read_pictures(opener, size_um, corners_um, broken | {error.level})


def _tiles_csv(bag: Bag, values: TileValues, score: str) -> str:
    columns = bag.coords_um.tolist(), values.attention.tolist(), values.score.tolist()
    rows = ((x, y, attention, value) for (x, y), attention, value in zip(*columns, strict=True))
    return table_csv(["x_um", "y_um", "attention", score], rows)
