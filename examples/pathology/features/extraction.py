"""The extraction stage: every slide becomes a feature file, or a ledger row that says why not.

`extract_slide` is the way of one slide, from its first line to its last. `SlideQueue` lets slides
follow each other so closely that the network hardly ever waits.
"""

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from examples.pathology.common.errors import OutputError, UserError
from examples.pathology.common.files import writable, write_bytes
from examples.pathology.extractors.choose import make_extractor
from examples.pathology.features.files import UnavailableError, write_features
from examples.pathology.features.inference import Clock, Network, infer, place
from examples.pathology.features.ledger import FEATURES, TILING, Rows, SlideRow
from examples.pathology.features.provenance import finished_rows, parameters_of, provenance_of
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.slides.overlay import draw_overlay
from examples.pathology.slides.slide import THUMBNAILS, LevelError, Slide, SlideFile, open_slide
from examples.pathology.slides.tiling import TilePlan, TileReader, TileStatus, plan_tiles
from examples.pathology.slides.units import SlideError, SlideExcludedError

logger = logging.getLogger(__name__)

Report = Callable[[Rows], object]

Steps = Generator[None, None, Rows]
"""A slide on its way. Where it stops another thread may go on with it; it ends with its rows."""


def default_workers(device: torch.device) -> int:
    """Return how many threads to read with: a GPU needs many, on a CPU the network needs them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores or 1) if device.type == "cuda" else 2


def make_network(config: ExtractConfig, device: torch.device) -> Network:
    """Build the network of a run on its device."""
    options, tile_px = config.extractor_option, config.rules.tile_size_px
    extractor = make_extractor(config.extractor, config.weights, config.seed, options, tile_px)
    return place(extractor, device, config.precision, config.batch_size)


def extract_slides(
    files: Iterable[SlideFile], config: ExtractConfig, network: Network, report: Report
) -> None:
    """Extract slides one after the other; the network hardly ever waits for the rest.

    Args:
        files: The slides.
        config: How.
        network: The network on its device.
        report: Called with the ledger rows of each slide, in the order of `files`; an error that
            it raises ends the work.
    """
    threads = config.workers or default_workers(network.device)
    with ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool:
        read = partial(TileReader, rules=config.rules, pool=pool, ahead=2 * threads)
        SlideQueue(report).run(extract_slide(file, config, network, read) for file in files)


class SlideQueue:
    """Slides close behind each other: the network has one, the next is opened, the last written.

    The network works in the thread that calls, where Ctrl-C stops it at once; opening and writing
    have a thread each.

    Args:
        report: Told the rows of each slide, in order.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="opener")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._next: tuple[Steps, Future[Rows]] | None = None
        self._last: Future[None] | None = None
        self._written: deque[Rows] = deque()  # and not reported yet

    def run(self, slides: Iterator[Steps]) -> None:
        """Take slides to their ends.

        After an error or Ctrl-C, files that are there have their rows, and no slide stays open.
        """
        with self._opener, self._writer, ExitStack() as stack:
            stack.callback(self._close_next)
            stack.callback(self._report_rest)
            self._open_next(slides)
            while self._next is not None:
                slide, opened = self._next
                rows = opened.result()
                self._open_next(slides)
                rows = rows or _step(slide)
                self._report_last()
                if rows:
                    self._report(rows)
                else:
                    self._last = self._writer.submit(self._write, slide)

    def _open_next(self, slides: Iterator[Steps]) -> None:
        slide = next(slides, None)
        self._next = None if slide is None else (slide, self._opener.submit(_step, slide))

    def _close_next(self) -> None:
        if self._next is not None:
            slide, opened = self._next
            if not opened.cancel() and (rows := opened.result()):
                self._report(rows)  # an earlier run had finished it
            slide.close()

    def _write(self, slide: Steps) -> None:
        self._written.append(_step(slide))

    def _report_last(self) -> None:
        """Wait for the writer. Rows stay in line until they are reported: Ctrl-C may come first."""
        if self._last is not None:
            self._last.result()
            self._last = None
        while self._written:
            try:
                self._report(self._written[0])
            except Exception:  # its word that the work ends: it knows of the rows
                self._written.popleft()
                raise
            self._written.popleft()

    def _report_rest(self) -> None:
        """Report what the writer is still at, even if Ctrl-C came while it was asked for that."""
        self._writer.shutdown()
        self._report_last()


def _step(slide: Steps) -> Rows:
    """Take a slide to where it stops next; return its rows if that is its end, and else none."""
    try:
        next(slide)
    except StopIteration as end:
        rows: Rows = end.value
        return rows
    return ()


def extract_slide(
    file: SlideFile,
    config: ExtractConfig,
    network: Network,
    read: Callable[[Slide, TilePlan], TileReader],
) -> Steps:
    """Extract one slide; it stops before the network begins, and before its files are written.

    Args:
        file: The slide.
        config: How.
        network: The network on its device.
        read: Begins to read the tiles of a slide.

    Returns:
        Its rows of the ledger; whatever goes wrong is one of them.
    """
    path = config.out / f"{file.stem}.h5"
    rows: Rows = ()
    broken: frozenset[int] = frozenset()
    has_turn = False
    while True:  # again for each level that turns out to be unreadable: a finer one replaces it
        clock = Clock()
        try:
            with ExitStack() as stack:
                slide = stack.enter_context(closing(_open(file, config, broken)))
                parameters = parameters_of(file, slide, config, network)
                finished = finished_rows(path, file, parameters)
                if finished is not None:
                    return finished
                plan = plan_tiles(slide, config.rules)
                tiles = stack.enter_context(closing(read(slide, plan)))
                if not has_turn:
                    with clock.stopped():
                        yield
                    has_turn = True
                bar = stack.enter_context(_bar(file, plan, config.show_tiles))
                feats, positions = infer(tiles, network, clock, bar.update)
            with clock.stopped():
                yield
            clock.enter(TILING)
            _save_picture(config.out / THUMBNAILS / f"{file.stem}.jpg", draw_overlay(plan))
            rows = (_described(slide, plan, config.rules.tile_size_um),)
            if rows[0].status == "ok":
                if rows[0].tiles_damaged:
                    logger.warning("%s: %s.", file.name, rows[0].reason)
                clock.enter(FEATURES)
                made = provenance_of(slide, rows[0], parameters, clock)
                _write(path, feats, positions, config, network, made)
                rows = (*rows, replace(rows[0], stage=FEATURES))
            else:
                logger.warning("%s: %s", file.name, rows[0].reason)
                retire(path)
        except Exception as error:  # noqa: BLE001 - thousands must not be lost to one nobody foresaw
            if isinstance(error, LevelError) and error.level > 0:
                logger.warning("%s It is read from a finer level instead.", error)
                broken |= {error.level}
                continue
            if not has_turn:  # a run that ends before its turn has not looked at it
                with clock.stopped():
                    yield
            rows = (*rows, _failure(file, error, clock.stage))
            if not isinstance(error, UnavailableError):
                retire(path)
        clock.enter(clock.stage)
        return tuple(replace(row, seconds=round(clock.seconds[row.stage], 3)) for row in rows)


def _open(file: SlideFile, config: ExtractConfig, broken_levels: frozenset[int]) -> Slide:
    if file.problem is not None:
        raise SlideExcludedError(file.problem)
    return open_slide(
        file.path,
        file.name,
        table_mpp=file.table_mpp,
        default_mpp=config.default_mpp,
        broken_levels=broken_levels,
    )


def _bar(file: SlideFile, plan: TilePlan, shown: bool) -> "tqdm[Any]":
    pending = plan.count(TileStatus.PENDING)
    return tqdm(total=pending, desc=file.name, unit="tile", leave=False, delay=3, disable=not shown)


def _save_picture(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88)
    write_bytes(path, buffer.getvalue())


def _described(slide: Slide, plan: TilePlan, tile_size_um: float) -> SlideRow:
    """Say in a row what tiling found."""
    kept = plan.count(TileStatus.KEPT)
    reasons = []
    if plan.status.size == 0:
        size = f"{slide.width_um:.0f} x {slide.height_um:.0f} um"
        reasons.append(f"no tile: the slide is {size}, and a tile is {tile_size_um:g} um wide")
    elif not kept:
        reasons.append(
            f"no tile left: {plan.count(TileStatus.BRIGHT)} of {plan.status.size} are glass, "
            f"{plan.count(TileStatus.SMOOTH)} have too few edges"
        )
    if damaged := plan.count(TileStatus.DAMAGED):
        reasons.append(f"{damaged} damaged tiles are left out: {slide.damage.rstrip('.')}")
    if slide.broken_levels:
        levels = ", ".join(map(str, sorted(slide.broken_levels)))
        reasons.append(f"unreadable levels, replaced by finer ones: {levels}")
    return SlideRow(
        slide=slide.name,
        stage=TILING,
        status="ok" if kept else "empty",
        reason="; ".join(reasons),
        tiles_total=plan.status.size,
        tiles_kept=kept,
        tiles_damaged=damaged,
        mpp=slide.mpp.x,
        mpp_source=slide.mpp.source,
        reader=slide.reader,
    )


def _write(
    path: Path,
    feats: npt.NDArray[np.float16],
    positions: npt.NDArray[np.int64],
    config: ExtractConfig,
    network: Network,
    provenance: Mapping[str, Any],
) -> None:
    """Write the features (n, d) of tiles in these rows and columns (n, 2) of the grid."""
    extractor, rules = network.extractor, config.rules
    write_features(
        path,
        feats,
        positions[:, ::-1] * rules.tile_size_um,
        extractor=extractor.identifier,
        weights_sha256=extractor.weights_sha256,
        random_weights=extractor.weights_sha256 is None,
        tile_size_um=rules.tile_size_um,
        tile_size_px=rules.tile_size_px,
        layout=config.layout,
        provenance=provenance,
    )


def _failure(file: SlideFile, error: Exception, stage: str) -> SlideRow:
    """Say what went wrong with a slide, in the log and in a row."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, OutputError)):
        raise error  # the next slide would meet it too; a smaller batch_size or more room helps
    expected = isinstance(error, (SlideError, UserError))
    reason = str(error) if expected else f"{type(error).__name__}: {error}"
    if isinstance(error, SlideExcludedError):
        logger.warning("%s: %s", file.name, reason)
        return SlideRow(file.name, stage, "excluded", reason)
    logger.error("%s failed: %s", file.name, reason, exc_info=None if expected else error)
    return SlideRow(file.name, stage, "failed", reason)


def retire(path: Path) -> None:
    """Rename features that an earlier run made of a slide that gives none now."""
    if path.is_file():
        old = path.with_name(path.name + ".old")
        with writable(path):
            path.replace(old)
        logger.warning("%s is from an earlier run and no longer valid; it is now %s.", path, old)
