"""The extraction stage: every slide becomes a feature file, or a ledger row that says why not.

Threads read and filter tiles while the network runs. A finished file is left alone as long as it
was made with the same parameters. Use it through `features.extract`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from examples.pathology.ctranspath import Extractor, ctranspath_extractor
from examples.pathology.devices import resolve_device
from examples.pathology.errors import UserError
from examples.pathology.features import ExtractSummary, LedgerRow, write_features
from examples.pathology.files import write_bytes, write_text
from examples.pathology.slides import LevelError, Slide, SlideFile, find_slides, open_slide
from examples.pathology.tables import FILENAME, MPP, read_table
from examples.pathology.tiling import (
    SlideExcludedError,
    TileBlock,
    TilePlan,
    TileRules,
    TileStatus,
    draw_overlay,
    plan_tiles,
    read_tiles,
)
from examples.pathology.units import SlideError

logger = logging.getLogger(__name__)

LEDGER_COLUMNS = (
    "slide",
    "stage",
    "status",
    "reason",
    "tiles_total",
    "tiles_kept",
    "mpp",
    "mpp_source",
    "seconds",
)

LEDGER_PERIOD_S = 10.0
"""The ledger on disk is at most this old, so that a killed run leaves one too."""

CPU_BATCH = 8
"""On a CPU larger batches fall out of the cache: 64 tiles at once are a third slower than 8."""


@dataclass(frozen=True)
class Job:
    """Everything that is the same for all slides of a run.

    Attributes:
        out: Output folder.
        rules: What a tile is.
        extractor: The network.
        device: Where it runs.
        batch_size: Tiles per call of the network.
        ahead: Blocks of tiles read ahead.
        pool: Threads that read.
        table_mpp: Microns per pixel by slide, from the slide table.
        default_mpp: What to assume for slides that do not say.
    """

    out: Path
    rules: TileRules
    extractor: Extractor
    device: torch.device
    batch_size: int
    ahead: int
    pool: ThreadPoolExecutor
    table_mpp: dict[str, float]
    default_mpp: float | None


def run(
    slides: Path,
    out: Path,
    *,
    weights: Path | None,
    slide_table: Path | None,
    default_mpp: float | None,
    workers: int,
    device: str,
    seed: int,
    batch_size: int,
    rules: TileRules,
) -> ExtractSummary:
    """Extract all slides of a folder; see `features.extract`, which documents the arguments."""
    for name, value in (("workers", workers), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"`{name}` must be at least 1, but got {value}.")
    files = find_slides(slides, skip=out)
    table_mpp = {} if slide_table is None else read_mpp_table(slide_table)
    place = torch.device(resolve_device(device))
    extractor = ctranspath_extractor(weights, seed)
    extractor.model.to(place)
    rows: list[LedgerRow] = []
    ledger = out / "ledger.csv"
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="tiles"))
        stack.callback(write_ledger, ledger, rows)  # after Ctrl-C as well
        job = Job(
            out=out,
            rules=rules,
            extractor=extractor,
            device=place,
            batch_size=min(batch_size, CPU_BATCH) if place.type == "cpu" else batch_size,
            ahead=2 * workers,
            pool=pool,
            table_mpp=table_mpp,
            default_mpp=default_mpp,
        )
        written = time.monotonic()
        bar = stack.enter_context(tqdm(files, desc="extracting", unit="slide"))
        for file in bar:
            bar.set_postfix_str(file.name, refresh=False)
            rows.append(_row(file, job))
            if time.monotonic() - written > LEDGER_PERIOD_S:
                write_ledger(ledger, rows)
                written = time.monotonic()
    summary = ExtractSummary(rows=tuple(rows), ledger=ledger)
    logger.info("%s", summary)
    return summary


def _row(file: SlideFile, job: Job) -> LedgerRow:
    """Extract one slide; whatever goes wrong with it becomes its row of the ledger."""
    started = time.monotonic()
    try:
        row = _extract_slide(file, job)
    except SlideExcludedError as error:
        row = LedgerRow(file.name, "excluded", str(error))
    except torch.cuda.OutOfMemoryError:
        raise  # the next slide would meet it too; a smaller batch_size helps
    except Exception as error:
        # The one broad net: thousands of slides must not be lost to one that nobody foresaw.
        expected = isinstance(error, SlideError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        logger.error("%s failed: %s", file.name, reason, exc_info=not expected)
        row = LedgerRow(file.name, "failed", reason)
    if row.status in ("empty", "excluded"):
        logger.warning("%s: %s", file.name, row.reason)
    if row.status != "ok":
        _retire(job.out / f"{file.stem}.h5")
    return row if row.skipped else row.with_seconds(time.monotonic() - started)


def _retire(path: Path) -> None:
    """Rename features that an earlier run made of a slide that gives none now."""
    if path.is_file():
        old = path.with_name(path.name + ".old")
        path.replace(old)
        logger.warning("%s is from an earlier run and no longer valid; it is now %s.", path, old)


def _extract_slide(file: SlideFile, job: Job, broken: frozenset[int] = frozenset()) -> LedgerRow:
    """Extract one slide; where a level of its pyramid is broken, a finer one takes its place."""
    if file.problem is not None:
        raise SlideExcludedError(file.problem)
    try:
        return _extract_levels(file, job, broken)
    except LevelError as error:
        if error.level == 0:
            raise
        logger.warning("%s It is read from a finer level instead.", error)
        return _extract_slide(file, job, broken | {error.level})


def _extract_levels(file: SlideFile, job: Job, broken: frozenset[int]) -> LedgerRow:
    slide = open_slide(
        file.path,
        file.name,
        table_mpp=_lookup(job.table_mpp, file),
        default_mpp=job.default_mpp,
        broken_levels=broken,
    )
    with contextlib.closing(slide):
        path = job.out / f"{file.stem}.h5"
        parameters = _parameters(file, slide, job)
        done = _finished_row(path, file, parameters)
        if done is not None:
            return done
        started = time.monotonic()
        plan = plan_tiles(slide, job.rules)
        blocks = read_tiles(slide, plan, job.rules, pool=job.pool, ahead=job.ahead)
        total = plan.count(TileStatus.PENDING)
        with (
            contextlib.closing(blocks),
            tqdm(total=total, desc=file.name, unit="tile", leave=False, delay=3) as bar,
        ):
            feats, positions = _infer(blocks, job, bar)
        _save_picture(job.out / "thumbnails" / f"{file.stem}.jpg", draw_overlay(plan))
        row = _described(file, slide, plan, job.rules.tile_size_um)
        if broken:
            levels = ", ".join(map(str, sorted(broken)))
            note = f"levels {levels} cannot be read; finer ones were used"
            row = replace(row, reason="; ".join(filter(None, (row.reason, note))))
        if row.status == "ok":
            order = np.lexsort((positions[:, 1], positions[:, 0]))  # row by row
            corners_um = positions[order][:, ::-1] * job.rules.tile_size_um
            write_features(
                path,
                feats[order],
                corners_um,
                extractor=job.extractor.identifier,
                weights_sha256=job.extractor.weights_sha256,
                random_weights=job.extractor.random_weights,
                provenance={
                    **_provenance(slide, row, parameters),
                    "seconds": time.monotonic() - started,
                    "unreadable_levels": json.dumps(sorted(broken)),
                },
            )
        return row


def _infer(
    blocks: Iterable[TileBlock], job: Job, bar: tqdm[NoReturn]
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
    """Run the network over the tiles; return features (n, d) and positions (n, 2)."""
    feats: list[npt.NDArray[np.float16]] = []
    positions: list[npt.NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    # TensorFloat-32 would change the features in the third digit without being asked.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for pixels, places in _batches(blocks, job.batch_size):
            tiles = torch.from_numpy(pixels).to(job.device)
            output = job.extractor.model(job.extractor.transform(tiles))
            feats.append(output.float().cpu().numpy().astype(np.float16))
            positions.append(places)
            bar.update(len(places))
    joined = np.concatenate(feats) if feats else np.empty((0, 0), dtype=np.float16)
    return joined, np.concatenate(positions)


def _batches(
    blocks: Iterable[TileBlock], size: int
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Regroup blocks into batches of `size` tiles, the last one smaller."""
    pixels: list[npt.NDArray[np.uint8]] = []
    places: list[npt.NDArray[np.int64]] = []
    for block in blocks:
        pixels.extend(block.pixels)
        places.extend(block.positions)
        while len(pixels) >= size:
            yield np.stack(pixels[:size]), np.stack(places[:size])
            del pixels[:size], places[:size]
    if pixels:
        yield np.stack(pixels), np.stack(places)


def _described(file: SlideFile, slide: Slide, plan: TilePlan, um: float) -> LedgerRow:
    kept = plan.count(TileStatus.KEPT)
    if kept:
        reason = ""
    elif plan.status.size == 0:
        size = f"{slide.width_um:.0f} x {slide.height_um:.0f} um"
        reason = f"no tile: the slide is {size}, and a tile is {um:g} um wide"
    else:
        reason = (
            f"no tile left: {plan.count(TileStatus.BRIGHT)} of {plan.status.size} are glass, "
            f"{plan.count(TileStatus.SMOOTH)} have too few edges"
        )
    return LedgerRow(
        slide=file.name,
        status="ok" if kept else "empty",
        reason=reason,
        tiles_total=plan.status.size,
        tiles_kept=kept,
        mpp=slide.mpp.x,
        mpp_source=slide.mpp.source,
    )


def _parameters(file: SlideFile, slide: Slide, job: Job) -> dict[str, Any]:
    """Return all that decides what a slide's features are; a file made with others is redone."""
    return {
        **asdict(job.rules),
        "extractor": job.extractor.identifier,
        "weights_sha256": job.extractor.weights_sha256,
        "precision": "float32",
        "slide_bytes": file.path.stat().st_size,
        "slide_quickhash": slide.quickhash,
        "slide_width_px": slide.width_px,
        "slide_height_px": slide.height_px,
        "slide_mpp_x": round(slide.mpp.x, 9),
        "slide_mpp_y": round(slide.mpp.y, 9),
    }


def _provenance(slide: Slide, row: LedgerRow, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": _version(),
        "slide": slide.name,
        "slide_mpp": slide.mpp.x,
        "slide_mpp_y": slide.mpp.y,
        "slide_mpp_source": slide.mpp.source,
        "slide_width_px": slide.width_px,
        "slide_height_px": slide.height_px,
        "precision": parameters["precision"],
        "tiles_total": row.tiles_total,
        "parameters": json.dumps(parameters, sort_keys=True),
    }


def _version() -> str:
    try:
        return metadata.version("mtbalance")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def _finished_row(path: Path, file: SlideFile, parameters: dict[str, Any]) -> LedgerRow | None:
    """Return the row of a slide whose features exist already, or None if there is work to do."""
    if not path.is_file():
        return None
    try:
        with h5py.File(path, "r") as stored:
            attributes = dict(stored.attrs)
            kept = len(stored["feats"])
    except (OSError, KeyError) as error:
        logger.warning("%s is damaged (%s); %s is extracted again.", path, error, file.name)
        return None
    try:
        old = json.loads(attributes.get("mtbalance_parameters", ""))
    except json.JSONDecodeError:
        logger.warning("%s was made by another program; %s is extracted again.", path, file.name)
        return None
    changed = [
        key for key in sorted(old.keys() | parameters) if old.get(key) != parameters.get(key)
    ]
    if changed:
        logger.warning(
            "%s was made with other parameters (%s); %s is extracted again.",
            path,
            ", ".join(f"{key} {old.get(key)} -> {parameters.get(key)}" for key in changed),
            file.name,
        )
        return None
    return LedgerRow(
        slide=file.name,
        status="ok",
        reason="finished before",
        tiles_total=int(attributes["mtbalance_tiles_total"]),
        tiles_kept=kept,
        mpp=float(attributes["mtbalance_slide_mpp"]),
        mpp_source=str(attributes["mtbalance_slide_mpp_source"]),
        seconds=float(attributes["mtbalance_seconds"]),
        skipped=True,
    )


def read_mpp_table(path: Path) -> dict[str, float]:
    """Read the MPP column of a slide table.

    Args:
        path: The table; FILENAME is needed, MPP may be missing or partly empty.

    Returns:
        Microns per pixel by FILENAME, for the rows that give it.

    Raises:
        UserError: If the table cannot be read or a value is not a number.
    """
    table = read_table(path, [FILENAME])
    values: dict[str, float] = {}
    if MPP not in table.columns:
        return values
    for name, text in zip(table[FILENAME], table[MPP], strict=True):
        if not name or not text:
            continue
        try:
            value = float(text)
        except ValueError as error:
            raise UserError(
                f"Column MPP must hold numbers in um per pixel, but {path} has {text!r} for {name}."
            ) from error
        if values.setdefault(_bare(name), value) != value:
            raise UserError(
                f"Column MPP must be unique per slide, but {path} has several values for {name}."
            )
    return values


def _bare(name: str) -> str:
    """Return a table's FILENAME without ``.h5``, with forward slashes."""
    name = name.strip().replace("\\", "/")
    return name[:-3] if name.lower().endswith(".h5") else name


def _lookup(table: dict[str, float], file: SlideFile) -> float | None:
    """Find a slide in the table by path, by stem, or by a TCGA name without its UUID."""
    bare = Path(file.stem).name
    for key in (file.stem, file.name, bare, Path(file.name).name, bare.partition(".")[0]):
        if key in table:
            return table[key]
    return None


def _save_picture(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88)
    write_bytes(path, buffer.getvalue())


def write_ledger(path: Path, rows: Iterable[LedgerRow]) -> None:
    """Write one line per slide; the file on disk is always whole.

    Args:
        path: Where to.
        rows: The rows; their order is kept.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LEDGER_COLUMNS)
    for row in rows:
        values = [getattr(row, name) for name in LEDGER_COLUMNS]
        writer.writerow(["" if value is None else value for value in values])
    write_text(path, text.getvalue())
