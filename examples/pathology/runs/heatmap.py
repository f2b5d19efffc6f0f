"""What each tile of a slide says, by the models of a run: attention, class score, top tiles.

Attention is how much the [cls] token looks at a tile, relative to the average tile. The score of a
tile is what a model says of a slide that consists of this tile alone: it shows what the model takes
for a sign of the class, or of a high value, and is no calibrated probability of the tile. Both are
means over folds.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import write_json
from examples.pathology.features.files import Bag, read_features
from examples.pathology.features.kind import refuse_other_features
from examples.pathology.figures.heatmap import LEAST_SPAN, Picture, heatmap, top_tiles
from examples.pathology.figures.sheet import Sheet
from examples.pathology.results.folds import read_model
from examples.pathology.results.runs import fold_folders, run_settings
from examples.pathology.results.summary import warning_of
from examples.pathology.settings.extract import TileRules
from examples.pathology.settings.runs import HeatmapConfig
from examples.pathology.slides.pixelsizes import mpp_of_slide
from examples.pathology.slides.slide import LevelError, Slide, open_slide, slide_file
from examples.pathology.slides.tiling import plan_tiles
from examples.pathology.slides.units import SlideError
from examples.pathology.tables.writing import write_table
from examples.pathology.training.prediction import Fitted
from examples.pathology.training.tile_values import TileValues, tile_values

logger = logging.getLogger(__name__)

TOP_TILE_PX = 224

Opener = Callable[[frozenset[int]], Slide]
"""Opens the slide, given its broken levels."""


class Score(NamedTuple):
    """What the score of a tile is called, and how much its colours cover at least."""

    column: str  # of the table
    words: str  # in the figure
    of: str  # a class, or a target
    least_span: float


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
    read = [read_model(folder / "model.pt", device) for folder in folders]
    opener = _opener(config)
    with closing(opener(frozenset())) as slide:
        bag = read_features(config.features, mpp=(slide.mpp.x, slide.mpp.y))
        size_um = _check(bag, slide, config.features)
    for folder, (_, kind) in zip(folders, read, strict=True):
        refuse_other_features(kind, bag.kind, folder, config.features)
    models = [fitted for fitted, _ in read]
    values, score = tile_values(models, bag.feats, device), _score(models)
    target = models[0].targets[0]
    summary: dict[str, Any] = {
        "slide": slide.name,
        "run": str(config.run.resolve()),
        "target": target.name,
        **({"positive": target.positive} if target.positive else {}),
        f"{score.column}_of_the_slide": values.slide_score,
        "tiles": len(bag.feats),
        "tile_size_um": size_um,
        "random_weights": bag.kind.random_weights,
        "simulated": bag.kind.simulated,
        "note": run_settings(config.run).get("note", ""),
    }
    _draw(config, opener, bag.coords_um, values, score, summary)
    columns = {"attention": values.attention, score.column: values.score}
    corners = pd.DataFrame(bag.coords_um.astype(float), columns=["x_um", "y_um"])
    write_table(config.out / "tiles.csv", corners.assign(**columns))
    summary["seconds"] = round(time.perf_counter() - started, 3)
    write_json(config.out / "heatmap.json", summary)
    said = slide.name, len(bag.feats), summary["seconds"], config.out
    logger.info("%s: %d tiles, %.1f s; %s", *said)
    return summary


def _opener(config: HeatmapConfig) -> Opener:
    """Return what opens the slide; the size of its pixels is looked up once."""
    path, table = config.slide, config.slide_table
    if not path.is_file():
        raise UserError(f"`slide` must be readable, but there is no file {path}.")
    name = PurePosixPath(slide_file(path.absolute()).name).name  # of DICOM, the folder's
    mpp = None if table is None else mpp_of_slide(table, path, config.filename_column)

    def opener(broken: frozenset[int]) -> Slide:
        try:
            return open_slide(
                path, name, table_mpp=mpp, default_mpp=config.default_mpp, broken_levels=broken
            )
        except (SlideError, OSError) as error:
            raise UserError(f"`slide` must be readable: {error}") from error

    return opener


def _check(bag: Bag, slide: Slide, path: Path) -> float:
    """Return the tile size, and raise if tiles cannot be placed on the slide."""
    size_um = bag.kind.tile_size_um
    if len(bag.feats) == 0:
        raise UserError(f"{path} must hold tiles, but holds none.")
    if size_um is None or not np.isfinite(bag.coords_um).all():
        raise UserError(
            f"{path} must say where its tiles are in um, but does not. Extract the slide again."
        )
    ends = bag.coords_um.max(axis=0) + size_um
    limits = np.array([slide.width_um, slide.height_um])
    if bag.coords_um.min() < -size_um or (ends > limits + size_um).any():
        raise UserError(
            f"`features` must be those of `slide`, but {path.name} has tiles up to "
            f"{ends[0]:.0f} x {ends[1]:.0f} um and {slide.name} measures "
            f"{limits[0]:.0f} x {limits[1]:.0f} um."
        )
    return size_um


def _score(models: Sequence[Fitted]) -> Score:
    target = models[0].targets[0]
    if target.kind == "classification":
        return Score("score", "Class score", f"{target.name} = {target.positive}", LEAST_SPAN)
    # Colours span a tenth of what training has seen, as for probabilities.
    seen = [fitted.scalers[target.name] for fitted in models]
    least_span = LEAST_SPAN * float(np.mean([scaler.high - scaler.low for scaler in seen]))
    return Score("value", "Predicted value", target.name, least_span)


def _draw(
    config: HeatmapConfig,
    opener: Opener,
    corners_um: NDArray[np.float32],
    values: TileValues,
    score: Score,
    summary: dict[str, Any],
) -> None:
    """Draw the values over the slide, and the tiles with the highest."""
    name, size_um = summary["slide"], summary["tile_size_um"]
    caption = warning_of(
        summary["note"], summary["simulated"], random_weights=summary["random_weights"]
    )
    by_kind = {"attention": values.attention, score.column: values.score}
    best = [np.argsort(-value, kind="stable")[: config.top] for value in by_kind.values()]
    overview, um_per_px, tiles = _read_pictures(opener, size_um, [corners_um[i] for i in best])
    title = f"{name}: {score.of}, {score.column} of the slide {values.slide_score:.3g}"
    sheet = Sheet(config.out / "heatmap.png", title, caption)
    place = overview, um_per_px, corners_um, size_um
    heatmap(*place, values, sheet, what=score.words, least_span=score.least_span)
    title = f"{name}: tiles of {size_um:g} um with the highest values"
    rows = [
        (kind, pictures, value[indices])
        for (kind, value), indices, pictures in zip(by_kind.items(), best, tiles, strict=True)
    ]
    top_tiles(rows, Sheet(config.out / "top-tiles.png", title, caption))


def _read_pictures(
    opener: Opener,
    size_um: float,
    rows_um: Sequence[NDArray[np.float32]],
    broken: frozenset[int] = frozenset(),
) -> tuple[Picture, float, list[list[Picture]]]:
    """Read the whole slide, with the size of its pixels in um, and rows of tiles at their corners.

    As in `extract`, a broken level of the pyramid is replaced by a finer one.
    """
    rules = TileRules(tile_size_um=size_um)
    size = size_um, size_um, (TOP_TILE_PX, TOP_TILE_PX)
    try:
        with closing(opener(broken)) as slide:
            plan = plan_tiles(slide, rules, judge=False)  # only the picture is needed
            tiles = [[slide.read(float(x), float(y), *size) for x, y in row] for row in rows_um]
            return plan.overview, size_um / plan.tile_px, tiles
    except LevelError as error:
        if error.level == 0:
            raise UserError(f"`slide` must be readable: {error}") from error
        logger.warning("%s It is read from a finer level instead.", error)
        return _read_pictures(opener, size_um, rows_um, broken | {error.level})
