"""The extraction stage: every slide becomes a feature file, or a ledger row that says why not.

Threads read and filter tiles while the network runs. A finished file is left alone as long as it
was made with the same parameters. Use it through `features.extract`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import write_bytes
from examples.pathology.extractors.choose import make_extractor
from examples.pathology.features.files import write_features
from examples.pathology.features.inference import Clock, Network, infer, place
from examples.pathology.features.ledger import FEATURES, TILING, LedgerRow
from examples.pathology.features.provenance import finished_rows, parameters_of, provenance_of
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.slides.overlay import draw_overlay
from examples.pathology.slides.slide import LevelError, Slide, SlideFile, open_slide
from examples.pathology.slides.tiling import (
    SlideExcludedError,
    TilePlan,
    TileReader,
    TileStatus,
    plan_tiles,
)
from examples.pathology.slides.units import SlideError

logger = logging.getLogger(__name__)

Rows = tuple[LedgerRow, ...]
Report = Callable[[Rows], bool]


@dataclass(frozen=True)
class Job:
    """The settings with the network on its device and the threads that read.

    Attributes:
        settings: What to do.
        network: The network.
        pool: Threads that read tiles.
        ahead: Blocks of tiles read ahead; together with their size they bound the memory.
    """

    settings: ExtractConfig
    network: Network
    pool: ThreadPoolExecutor
    ahead: int


def default_workers(device: torch.device) -> int:
    """Return how many threads to read with: a GPU needs many, on a CPU the network needs them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores or 1) if device.type == "cuda" else 2


def make_network(settings: ExtractConfig, device: torch.device) -> Network:
    """Build the network of a run on its device."""
    extractor = make_extractor(settings.extractor, settings.weights, settings.seed)
    return place(extractor, device, settings.precision, settings.batch_size)


def extract_slides(
    files: Sequence[SlideFile], settings: ExtractConfig, network: Network, report: Report
) -> None:
    """Extract slides one after the other; the network hardly ever waits for the rest.

    While it works on a slide, the next one is opened and its first tiles are read, and the files
    of the one before are written.

    Args:
        files: The slides.
        settings: What to do.
        network: The network on its device.
        report: Called with the ledger rows of each slide, in the order of `files`; returns whether
            to go on.
    """
    threads = settings.workers or default_workers(network.device)
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="opener") as opener,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
    ):
        job = Job(settings, network, pool, ahead=2 * threads)
        coming = deque(opener.submit(_prepare, file, job) for file in files[:1])
        ending: deque[Future[Rows]] = deque()
        try:
            for number, file in enumerate(files):
                outcome = coming.popleft().result()
                coming.extend(
                    opener.submit(_prepare, following, job)
                    for following in files[number + 1 : number + 2]
                )
                result = _compute(file, outcome, job)
                if ending and not report(ending.popleft().result()):
                    break
                if isinstance(result, _Computed):
                    ending.append(writer.submit(_conclude, file, result, job))
                elif not report(result):
                    break
        finally:  # also after Ctrl-C: files that are there have their rows, and no slide stays open
            while ending:
                report(ending.popleft().result())
            while coming:
                future = coming.popleft()
                if not future.cancel() and isinstance(outcome := future.result(), _Prepared):
                    outcome.close()


@dataclass(frozen=True)
class _Prepared:
    """A slide that is open, planned and being read.

    Attributes:
        slide: The open slide.
        path: Where its features go.
        parameters: What they depend on.
        plan: Its tiles.
        reader: Reads them.
        seconds: Time that opening and planning took.
        broken: Levels of its pyramid that cannot be read.
    """

    slide: Slide
    path: Path
    parameters: dict[str, Any]
    plan: TilePlan
    reader: TileReader
    seconds: float
    broken: frozenset[int]

    def close(self) -> None:
        self.reader.close()
        self.slide.close()


_Outcome = _Prepared | Rows | Exception
"""A slide to work on, the rows of one that needs no work, or what went wrong."""


@dataclass(frozen=True)
class _Computed:
    """A slide whose tiles the network has seen; it is closed.

    Attributes:
        prepared: The slide as it was.
        feats: Features (n, d) of its tiles.
        positions: Row and column of each (n, 2).
        clock: The time it took so far.
    """

    prepared: _Prepared
    feats: npt.NDArray[np.float16]
    positions: npt.NDArray[np.int64]
    clock: Clock


def _prepare(file: SlideFile, job: Job, broken: frozenset[int] = frozenset()) -> _Outcome:
    """Open and plan a slide and begin to read it; a broken level is replaced by a finer one.

    Errors are returned, not raised: they belong to this slide, whoever is working on another.
    """
    started = time.perf_counter()
    try:
        if file.problem is not None:
            raise SlideExcludedError(file.problem)
        settings = job.settings
        slide = open_slide(
            file.path,
            file.name,
            table_mpp=file.table_mpp,
            default_mpp=settings.default_mpp,
            broken_levels=broken,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(slide.close)
            path = settings.out / f"{file.stem}.h5"
            parameters = parameters_of(file, slide, settings, job.network)
            done = finished_rows(path, file, parameters)
            if done is not None:
                return done
            plan = plan_tiles(slide, settings.rules)
            reader = TileReader(slide, plan, settings.rules, pool=job.pool, ahead=job.ahead)
            stack.pop_all()
            seconds = time.perf_counter() - started
            return _Prepared(slide, path, parameters, plan, reader, seconds, broken)
    except LevelError as error:
        return error if error.level == 0 else _retry(file, job, broken, error)
    except Exception as error:  # noqa: BLE001 - see `_failure`
        return error


def _retry(file: SlideFile, job: Job, broken: frozenset[int], error: LevelError) -> _Outcome:
    logger.warning("%s It is read from a finer level instead.", error)
    return _prepare(file, job, broken | {error.level})


def _compute(file: SlideFile, outcome: _Outcome, job: Job) -> _Computed | Rows:
    """Run the network over a prepared slide; whatever goes wrong becomes a row of the ledger."""
    if isinstance(outcome, tuple):
        return outcome
    clock = Clock()
    try:
        if isinstance(outcome, Exception):
            raise outcome
        clock.seconds[TILING] = outcome.seconds
        with (
            contextlib.closing(outcome),
            tqdm(
                total=outcome.plan.count(TileStatus.PENDING),
                desc=file.name,
                unit="tile",
                leave=False,
                delay=3,
                disable=not job.settings.show_tiles,
            ) as bar,
        ):
            feats, positions = infer(outcome.reader, job.network, clock, bar.update)
        clock.enter(clock.stage)
        return _Computed(outcome, feats, positions, clock)
    except LevelError as error:
        if error.level > 0 and isinstance(outcome, _Prepared):
            return _compute(file, _retry(file, job, outcome.broken, error), job)
        return _failure(file, error, clock, job)
    except Exception as error:  # noqa: BLE001 - see `_failure`
        return _failure(file, error, clock, job)


def _conclude(file: SlideFile, computed: _Computed, job: Job) -> Rows:
    """Write the picture of a slide and, if it has tissue, its feature file."""
    clock, prepared = computed.clock, computed.prepared
    clock.resume(TILING)
    rows: Rows = ()
    try:
        plan = prepared.plan
        _save_picture(job.settings.out / "thumbnails" / f"{file.stem}.jpg", draw_overlay(plan))
        row = _described(file, prepared, job.settings.rules.tile_size_um)
        rows = (row,)
        if row.status == "ok":
            clock.enter(FEATURES)
            _write(computed, row, job)
            rows = (row, replace(row, stage=FEATURES))
        else:
            logger.warning("%s: %s", file.name, row.reason)
            retire(job.settings.out / f"{file.stem}.h5")
    except Exception as error:  # noqa: BLE001 - see `_failure`
        return _failure(file, error, clock, job, rows)
    return _timed(rows, clock)


def _failure(file: SlideFile, error: Exception, clock: Clock, job: Job, rows: Rows = ()) -> Rows:
    """Turn what went wrong with a slide into its last row of the ledger.

    The one broad net: thousands of slides must not be lost to one that nobody foresaw.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        raise error  # the next slide would meet it too; a smaller batch_size helps
    expected = isinstance(error, (SlideError, UserError))
    reason = str(error) if expected else f"{type(error).__name__}: {error}"
    if isinstance(error, SlideExcludedError):
        logger.warning("%s: %s", file.name, reason)
        status = "excluded"
    else:
        logger.error("%s failed: %s", file.name, reason, exc_info=None if expected else error)
        status = "failed"
    retire(job.settings.out / f"{file.stem}.h5")
    return _timed((*rows, LedgerRow(file.name, clock.stage, status, reason)), clock)


def _timed(rows: Rows, clock: Clock) -> Rows:
    clock.enter(clock.stage)
    return tuple(replace(row, seconds=round(clock.seconds[row.stage], 3)) for row in rows)


def retire(path: Path) -> None:
    """Rename features that an earlier run made of a slide that gives none now."""
    if path.is_file():
        old = path.with_name(path.name + ".old")
        path.replace(old)
        logger.warning("%s is from an earlier run and no longer valid; it is now %s.", path, old)


def _write(computed: _Computed, row: LedgerRow, job: Job) -> None:
    settings, extractor, prepared = job.settings, job.network.extractor, computed.prepared
    write_features(
        prepared.path,
        computed.feats,
        computed.positions[:, ::-1] * settings.rules.tile_size_um,
        extractor=extractor.identifier,
        weights_sha256=extractor.weights_sha256,
        random_weights=extractor.weights_sha256 is None,
        tile_size_um=settings.rules.tile_size_um,
        tile_size_px=settings.rules.tile_size_px,
        layout=settings.layout,
        provenance={
            **provenance_of(prepared.slide, row, prepared.parameters),
            "seconds_tiling": computed.clock.seconds[TILING],
            "seconds_features": computed.clock.seconds[FEATURES],
            "unreadable_levels": json.dumps(sorted(prepared.broken)),
        },
    )


def _described(file: SlideFile, prepared: _Prepared, um: float) -> LedgerRow:
    """Say in a row what tiling found."""
    slide, plan = prepared.slide, prepared.plan
    kept = plan.count(TileStatus.KEPT)
    reasons = []
    if plan.status.size == 0:
        size = f"{slide.width_um:.0f} x {slide.height_um:.0f} um"
        reasons.append(f"no tile: the slide is {size}, and a tile is {um:g} um wide")
    elif not kept:
        reasons.append(
            f"no tile left: {plan.count(TileStatus.BRIGHT)} of {plan.status.size} are glass, "
            f"{plan.count(TileStatus.SMOOTH)} have too few edges"
        )
    if prepared.broken:
        levels = ", ".join(map(str, sorted(prepared.broken)))
        reasons.append(f"unreadable levels, replaced by finer ones: {levels}")
    return LedgerRow(
        slide=file.name,
        stage=TILING,
        status="ok" if kept else "empty",
        reason="; ".join(reasons),
        tiles_total=plan.status.size,
        tiles_kept=kept,
        mpp=slide.mpp.x,
        mpp_source=slide.mpp.source,
    )


def _save_picture(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88)
    write_bytes(path, buffer.getvalue())
