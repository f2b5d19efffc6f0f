"""Tiles as annotations of QuPath: GeoJSON in pixels of the slide.

QuPath (0.4 and later) makes an object of every feature: ``objectType``, ``name``,
``classification`` with its name and colour, and ``measurements`` by name
(`qupath/qupath`, ``qupath-core/.../io/QuPathTypeAdapters.java`` and ``GsonTools.java``). Its
coordinates are pixels of level 0, counted from OpenSlide's bounds wherever a slide tells all four
(``qupath-extension-openslide/.../OpenSlideImageServer.java``), such as in ``.mrxs``. Many thousand
objects are too many for it: hence the top tiles, or areas. Rings are as RFC 7946 has them: closed,
the outer one counter-clockwise, where y is taken to point up as on a map.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import ImageColor
from shapely import Polygon
from shapely.geometry import mapping
from shapely.geometry.polygon import orient

from examples.pathology.figures.sheet import colour


def boxes_px(
    corners_um: NDArray[np.float32],
    tile_um: float,
    mpp: tuple[float, float],
    origin_px: tuple[int, int],
) -> NDArray[np.int64]:
    """Return left, top, right and bottom edge of tiles in whole pixels ``(n, 4)``.

    Edges that tiles share stay shared.

    Args:
        corners_um: x and y of the top-left corner of every tile ``(n, 2)``.
        tile_um: Edge of a tile.
        mpp: um per pixel along x and y.
        origin_px: Of the pixels, in those of the file.
    """
    corners = corners_um.astype(float)
    edges = np.concatenate([corners, corners + tile_um], axis=1) / np.tile(mpp, 2)
    return np.asarray(np.rint(edges - np.tile(origin_px, 2)), np.int64)


def annotations(
    boxes: NDArray[np.int64],
    scores: Mapping[str, NDArray[np.float64]],
    attention: NDArray[np.float64],
    *,
    top: int,
    quantile: float | None,
) -> dict[str, Any]:
    """Return what stands out of every class or number, as a collection of features.

    Args:
        boxes: Of the tiles, ``(n, 4)``, as `boxes_px` has them.
        scores: By name, of the tiles ``(n,)``.
        attention: Of the tiles, ``(n,)``.
        top: How many tiles of every name.
        quantile: Of the scores: tiles from here on are merged to areas wherever they touch, in
            place of the top tiles; ``None``: no areas.
    """
    features = []
    for number, (name, values) in enumerate(scores.items()):
        if quantile is None:
            chosen = np.argsort(-values, kind="stable")[:top]
            found = [(shapely.box(*boxes[tile]), np.array([tile])) for tile in chosen]
        else:
            found = _areas(boxes, np.flatnonzero(values >= np.quantile(values, quantile)))
        for shape, tiles in found:
            score = float(values[tiles].mean())
            properties = {
                "objectType": "annotation",
                "name": f"{name} {score:.3g}",
                "classification": {"name": name, "color": ImageColor.getrgb(colour(number))},
                "measurements": {
                    "score": score,
                    "highest score": float(values[tiles].max()),
                    "attention": float(attention[tiles].mean()),
                    "tiles": len(tiles),
                },
            }
            shown = mapping(orient(shape, 1.0))
            features.append({"type": "Feature", "geometry": shown, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _areas(
    boxes: NDArray[np.int64], chosen: NDArray[np.int64]
) -> list[tuple[Polygon, NDArray[np.int64]]]:
    """Return what tiles cover together, part by part, and which of them each part holds."""
    whole = shapely.union_all(shapely.box(*boxes[chosen].T))
    parts = shapely.get_parts(whole.simplify(0))  # corners of tiles along straight edges go
    centres = shapely.points((boxes[chosen, :2] + boxes[chosen, 2:]) / 2)
    part, inside = shapely.STRtree(centres).query(parts, predicate="contains")
    return [(shape, chosen[inside[part == i]]) for i, shape in enumerate(parts)]
