"""What a feature file was made with, and whether one that exists is still the right one."""

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.pathology.features.files import open_features
from examples.pathology.features.inference import Clock, Network
from examples.pathology.features.ledger import FEATURES, TILING, Rows, SlideRow
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.slides.slide import Slide, SlideFile
from mtbalance import __version__

logger = logging.getLogger(__name__)

SAMPLES = 32
SAMPLE_BYTES = 1 << 16
"""Of each slide, so many blocks of so many bytes are hashed: 2 MiB, read in well under a second."""


def parameters_of(
    file: SlideFile, slide: Slide, config: ExtractConfig, network: Network
) -> dict[str, Any]:
    """Return all that decides what a slide's features are; a file made with others is redone."""
    return {
        **asdict(config.rules),
        "extractor": network.extractor.identifier,
        "weights_sha256": network.extractor.weights_sha256,
        "precision": network.precision,
        "layout": config.layout,
        "slide_bytes": file.path.stat().st_size,
        "slide_reader": slide.reader,
        "slide_quickhash": slide.quickhash,
        "slide_sample_sha256": sample_sha256(file.path),
        "slide_width_px": slide.width_px,
        "slide_height_px": slide.height_px,
        "slide_mpp_x": round(slide.mpp.x, 9),
        "slide_mpp_y": round(slide.mpp.y, 9),
    }


def sample_sha256(path: Path) -> str:
    """Return a checksum of blocks spread evenly over a slide's files, both ends included.

    OpenSlide's quickhash reads the smallest level only, and there is none where that is large. The
    time of last change would differ after every copy. Files of up to 2 MiB are read in full.

    Args:
        path: The slide; the data of a ``.mrxs`` slide, in the folder of its name, count too.
    """
    folder = path.with_suffix("")
    more = sorted(folder.glob("*.dat")) if path.suffix.lower() == ".mrxs" else []
    digest = hashlib.sha256()
    for member in (path, *more):
        last = max(0, member.stat().st_size - SAMPLE_BYTES)
        count = min(SAMPLES, -(-last // SAMPLE_BYTES) + 1)
        with member.open("rb") as file:
            for number in range(count):
                file.seek(last * number // max(1, count - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def provenance_of(
    slide: Slide, row: SlideRow, parameters: dict[str, Any], clock: Clock
) -> dict[str, Any]:
    """Return what a feature file says about itself, by attribute name without our prefix."""
    return {
        "version": __version__,
        "slide": slide.name,
        "slide_mpp": slide.mpp.x,
        "slide_mpp_y": slide.mpp.y,
        "slide_mpp_source": slide.mpp.source,
        "slide_reader": slide.reader,
        "slide_width_px": slide.width_px,
        "slide_height_px": slide.height_px,
        "precision": parameters["precision"],
        "tiles_total": row.tiles_total,
        "tiles_damaged": row.tiles_damaged,
        "parameters": json.dumps(parameters, sort_keys=True),
        "seconds_tiling": clock.seconds[TILING],
        "seconds_features": clock.seconds[FEATURES],
        "unreadable_levels": json.dumps(sorted(slide.broken_levels)),
    }


def finished_rows(path: Path, file: SlideFile, parameters: dict[str, Any]) -> Rows | None:
    """Return the rows of a slide whose features exist already, or None if there is work to do.

    A parameter that the file does not hold, since an earlier release made it, is no difference.

    Raises:
        UnavailableError: The file may be right, but cannot be read now.
    """
    if not path.is_file():
        return None
    try:
        with open_features(path) as stored:
            attributes = dict(stored.attrs)
            kept = len(stored["feats"])
            whole = kept == len(stored["coords"])
    except (OSError, KeyError) as error:
        return _again(path, file, f"is damaged ({error})")
    try:
        old = dict(json.loads(attributes["mtbalance_parameters"]))
        damaged = int(attributes.get("mtbalance_tiles_damaged", 0))
        row = SlideRow(
            slide=file.name,
            stage=TILING,
            status="ok",
            reason="finished before" + (f"; {damaged} damaged tiles are left out" * (damaged > 0)),
            tiles_total=int(attributes["mtbalance_tiles_total"]),
            tiles_kept=kept,
            tiles_damaged=damaged,
            mpp=float(attributes["mtbalance_slide_mpp"]),
            mpp_source=str(attributes["mtbalance_slide_mpp_source"]),
            seconds=round(float(attributes["mtbalance_seconds_tiling"]), 3),
            reader=str(attributes.get("mtbalance_slide_reader", "OpenSlide")),
            skipped=True,
        )
        seconds = round(float(attributes["mtbalance_seconds_features"]), 3)
    except (KeyError, TypeError, ValueError):
        return _again(path, file, "was made by another program or release")
    if not whole:
        return _again(path, file, "is damaged")
    now = {key: parameters.get(key) for key in sorted(old)}
    if changed := [f"{key} {old[key]} -> {now[key]}" for key in now if old[key] != now[key]]:
        return _again(path, file, f"was made with other parameters ({', '.join(changed)})")
    return row, replace(row, stage=FEATURES, seconds=seconds)


def _again(path: Path, file: SlideFile, why: str) -> Rows | None:
    """Say why a slide is extracted again though it has a file; return no rows."""
    logger.warning("%s %s; %s is extracted again.", path, why, file.name)
    return None
