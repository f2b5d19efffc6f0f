"""What each tile of a slide says, by the models of a run: attention, scores, top tiles.

Attention is how much the [cls] token looks at a tile, relative to the average tile. The score of a
tile is what a model says of a slide that consists of this tile alone: it shows what the model takes
for a sign of a class, or of a high value, and is no calibrated probability of the tile. Both are
means over the models that are asked: of all folds for a single slide, whoever its patient is; of
those that have not seen the patient for all slides of a run, see `heatmaps`.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import write_json
from examples.pathology.features.files import Bag, OfSlide, read_features
from examples.pathology.features.kind import FeatureKind, refuse_other_features
from examples.pathology.figures.heatmap import LEAST_SPAN, Layer, Picture, heatmap, top_tiles
from examples.pathology.figures.sheet import Sheet
from examples.pathology.results.folds import read_model
from examples.pathology.results.runs import fold_folders, run_settings
from examples.pathology.results.summary import warning_of
from examples.pathology.runs.geojson import annotations, boxes_px
from examples.pathology.settings.extract import TileRules
from examples.pathology.settings.runs import HeatmapConfig
from examples.pathology.slides.pixelsizes import mpp_of_slide
from examples.pathology.slides.slide import LevelError, Slide, SlideFile, open_slide, slide_file
from examples.pathology.slides.tiling import plan_tiles
from examples.pathology.slides.units import SlideError
from examples.pathology.tables.writing import write_table
from examples.pathology.training.prediction import Fitted
from examples.pathology.training.tile_values import TileValues, tile_values

logger = logging.getLogger(__name__)

TOP_TILE_PX = 224

SAME_MPP = 1e-3
"""Largest difference, as a share, between resolutions that are one: of a slide of 100,000 pixels it
moves the last tile by 100."""

Models = Mapping[str, tuple[Fitted, FeatureKind]]
"""By the name of its folder, what a fold has trained, and on what features."""

Opener = Callable[[frozenset[int]], Slide]
"""Opens the slide, given its broken levels."""


def run_heatmap(config: HeatmapConfig) -> dict[str, Any]:
    """Draw heat maps of one slide, by the mean of all folds.

    Writes ``heatmap.png`` (the slide, attention, score), ``top-tiles.png``, ``tiles.csv`` with
    every tile's position and values, ``tiles.geojson`` for QuPath, and at last ``heatmap.json``.
    Where models say more than one number, ``all-scores.png`` and ``all-top-tiles.png`` have them.
    What ``heatmap.json`` holds is returned.

    Raises:
        UserError: The run is not finished, slide or features cannot be read, or the features are
            of another kind than those of the run.
    """
    models, path, table = read_models(config), config.slide, config.slide_table
    if path is None or not path.is_file():
        raise UserError(f"`slide` must be readable, but there is no file {path}.")
    name = PurePosixPath(slide_file(path.absolute()).name).name  # of DICOM, the folder's
    mpp = None if table is None else mpp_of_slide(table, path, config.filename_column)
    file = SlideFile(path, name, name, table_mpp=mpp)
    return draw_slide(config, models, file, config.features, config.out)


def read_models(config: HeatmapConfig) -> Models:
    """Read the models of all folds of a finished run."""
    device = resolve_device(config.device)
    return {each.name: read_model(each / "model.pt", device) for each in fold_folders(config.run)}


def draw_slide(
    config: HeatmapConfig, models: Models, file: SlideFile, features: Path, out: Path, **more: Any
) -> dict[str, Any]:
    """Draw heat maps of a slide by the mean of some models; otherwise as `run_heatmap`.

    A model that is alone has tested the patient; ``heatmap.json`` holds `more` as well.
    """
    started = time.perf_counter()
    opener = partial(_open, file, config.default_mpp)
    slide, bag, size_um = place_tiles(config, file, features)
    for name, (_, kind) in models.items():
        refuse_other_features(kind, bag.kind, config.run / name, features)
    fitted = [each for each, _ in models.values()]
    target, note = fitted[0].targets[0], run_settings(config.run).get("note", "")
    values = tile_values(fitted, bag.feats, resolve_device(config.device))
    layers = _layers(fitted, values)
    main, of_slide = layers[target.main], values.of_slide[target.columns[target.main]]
    short, words = "score", "Class score"
    if target.kind == "regression":
        short, words = "value", "Predicted value"
    summary: dict[str, Any] = {
        "slide": slide.name,
        "run": str(config.run.resolve()),
        "target": target.name,
        **({"positive": target.positive} if target.positive else {}),
        f"{short}_of_the_slide": of_slide,
        "tiles": len(bag.feats),
        "tile_size_um": size_um,
        "random_weights": bag.kind.random_weights,
        "simulated": bag.kind.simulated,
        "note": note,
        "folds": list(models),
        "scores_of_the_slide": values.of_slide,
        **more,
    }
    caption = warning_of(note, bag.kind.simulated, random_weights=bag.kind.random_weights)
    if len(models) == 1:
        caption += f" Drawn by the model of {summary['folds'][0]}, which tested this patient."
    rows = [
        ("attention", Layer("", "Attention (1: the average tile)", values.attention, "magma")),
        (short, main._replace(name=words.lower(), title=f"{words} of each tile alone")),
        *((layer.name, layer) for layer in layers),
    ]
    title = f"{slide.name}: {main.name}, {short} of the slide {of_slide:.3g}"
    place, sheet = (bag.coords_um, size_um), Sheet(out / "heatmap.png", title, caption.strip())
    _draw(opener, place, rows, sheet, slide.name, config.top)
    boxes = boxes_px(*place, (slide.mpp.x, slide.mpp.y), slide.bounds_px)
    by_name = {layer.name: layer.shown for layer in layers}
    marked = annotations(boxes, by_name, values.attention, top=config.top, quantile=config.areas)
    write_json(out / "tiles.geojson", {**marked, "note": sheet.caption})
    columns = {"attention": values.attention, short: main.shown, **values.scores}
    corners = pd.DataFrame(bag.coords_um.astype(float), columns=["x_um", "y_um"])
    write_table(out / "tiles.csv", pd.concat([corners, pd.DataFrame(columns)], axis=1))
    summary["seconds"] = round(time.perf_counter() - started, 3)
    write_json(out / "heatmap.json", summary)
    logger.info("%s: %d tiles, %.1f s; %s", slide.name, len(bag.feats), summary["seconds"], out)
    return summary


def place_tiles(config: HeatmapConfig, file: SlideFile, features: Path) -> tuple[Slide, Bag, float]:
    """Return a slide, closed, with its features and the size of a tile in um.

    Raises:
        UserError: Slide or features cannot be read, or are not of each other.
    """
    with closing(_open(file, config.default_mpp, frozenset())) as slide:
        bag = read_features(features, mpp=(slide.mpp.x, slide.mpp.y))
        _refuse_other_slide(bag.slide, slide, features)
        return slide, bag, _check(bag, slide, features)


def _open(file: SlideFile, default_mpp: float | None, broken: frozenset[int]) -> Slide:
    known = {"table_mpp": file.table_mpp, "default_mpp": default_mpp}
    try:
        return open_slide(file.path, file.name, **known, broken_levels=broken)
    except (SlideError, OSError) as error:
        raise UserError(f"`slide` must be readable: {error}") from error


def _refuse_other_slide(said: OfSlide, slide: Slide, path: Path) -> None:
    """Raise if features say that their slide has another size or resolution than this one.

    What they do not say is no difference; another name alone is told, as slides are renamed.
    """
    if said.size_px is not None and said.size_px != (slide.width_px, slide.height_px):
        raise UserError(
            f"`features` must be those of `slide`, but {path.name} is of {said.name}, a slide of "
            f"{said.size_px[0]} x {said.size_px[1]} pixels, and {slide.name} has {slide.width_px} "
            f"x {slide.height_px}."
        )
    for was, now in zip(said.mpp, (slide.mpp.x, slide.mpp.y), strict=False):
        if not math.isclose(was, now, rel_tol=SAME_MPP):
            raise UserError(
                f"`slide` must have as many um per pixel as when its features were made, but "
                f"{path.name} was made with {was:.6g} (from {said.mpp_source}) and {slide.name} "
                f"has {now:.6g} (from {slide.mpp.source}). {_remedy(said, slide, was)}"
            )
    if said.name and PurePosixPath(said.name).name != PurePosixPath(slide.name).name:
        logger.warning("%s is of %s; it is drawn over %s.", path, said.name, slide.name)


def _remedy(said: OfSlide, slide: Slide, mpp: float) -> str:
    """Say how a slide gets the microns per pixel that its features were made with."""
    if slide.mpp.source == "default":
        remedy = f"Give --default-mpp {mpp:.6g}"
    elif slide.mpp.source != "slide table":
        remedy = f"Give a --slide-table that has {mpp:.6g} in its MPP column for this slide"
    elif said.mpp_source in ("slide table", "default"):
        remedy = f"Write {mpp:.6g} in the MPP column of --slide-table for this slide"
    else:  # found in the slide, perhaps another along y
        remedy = "Leave its MPP in --slide-table empty"
    return f"{remedy}, or extract the slide again if that is wrong."


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


def _layers(models: Sequence[Fitted], values: TileValues) -> list[Layer]:
    """Return the scores of every class, or the number, of every target."""
    layers = []
    for target in models[0].targets:
        least_span = LEAST_SPAN
        if target.kind == "regression":
            # Colours span a tenth of what training has seen, as for probabilities.
            seen = [fitted.scalers[target.name] for fitted in models]
            least_span *= float(np.mean([scaler.high - scaler.low for scaler in seen]))
        for column, label in zip(target.columns, target.classes or ("",), strict=True):
            name = f"{target.name} = {label}" if label else target.name
            layers.append(Layer(name, name, values.scores[column], least_span=least_span))
    return layers


def _draw(
    opener: Opener,
    place: tuple[NDArray[np.float32], float],
    rows: Sequence[tuple[str, Layer]],
    sheet: Sheet,
    slide: str,
    top: int,
) -> None:
    """Draw values over the slide, and the tiles with the highest: of two rows, then of the rest."""
    corners_um, size_um = place
    best = [np.argsort(-layer.shown, kind="stable")[:top] for _, layer in rows]
    overview, um_per_px, tiles = _read_pictures(opener, size_um, [corners_um[i] for i in best])
    layers = [layer for _, layer in rows]
    highest = [
        (name, pictures, layer.shown[indices])
        for (name, layer), indices, pictures in zip(rows, best, tiles, strict=True)
    ]
    heatmap(overview, um_per_px, *place, layers[:2], sheet)
    title, out = f"{slide}: tiles of {size_um:g} um with the highest values", sheet.path.parent
    top_tiles(highest[:2], replace(sheet, path=out / "top-tiles.png", title=title))
    if len(rows) > 3:
        top_tiles(
            highest[2:], replace(sheet, path=out / "all-top-tiles.png", title=title), small=True
        )
        title = f"{slide}: every class and number, of each tile alone"
        sheet = replace(sheet, path=out / "all-scores.png", title=title)
        heatmap(overview, um_per_px, *place, layers[2:], sheet, columns=2)


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
