"""Cutting a slide into tiles of tissue, in microns from the first line to the last.

A tile is as wide in um and in px as was asked for, whatever the scanner. The grid starts at the
top-left corner of the slide; tiles that would hang over its edge are dropped. Glass is found on a
small overview picture and never read in detail; of the other tiles, those without edges (blur, ink,
empty mucus) are dropped by the Canny rule of STAMP.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from examples.pathology.settings.extract import TileRules
from examples.pathology.slides.slide import LevelError, Slide
from examples.pathology.slides.units import SlideError, SlideExcludedError

Pixels = npt.NDArray[np.uint8]

READ_EDGE_PX = 2048
"""Largest edge of one read; together with the number of workers it bounds the memory."""

OVERVIEW_EDGE_PX = 1600
"""About how large the overview picture gets at most."""


class TileStatus(IntEnum):
    """What became of a tile of the grid."""

    KEPT = 0
    BRIGHT = 1  # glass
    SMOOTH = 2  # too few edges
    PENDING = 3  # not glass, not looked at in detail yet
    DAMAGED = 4  # some of its pixels cannot be read


DARK_GREY = 40
"""Pixels darker than this are dark: stained nuclei are brighter, fluorescence background is not."""

GREY_SPREAD = 2
"""Pixels whose red, green and blue differ by no more are grey; any stain differs by tens."""

GLASS_GREY = 200
"""A slide without anything darker is blank, and blank glass may be of any colour."""


@dataclass(frozen=True)
class TilePlan:
    """The grid of a slide and what is known about its tiles.

    Attributes:
        status: One `TileStatus` per tile, ``(rows, columns)`` uint8; changes while tiles are read.
        overview: The whole slide as a small picture, RGB ``(h, w, 3)``.
        tile_px: Edge of a tile in the overview in pixels.
    """

    status: npt.NDArray[np.uint8]
    overview: Pixels
    tile_px: int

    def count(self, status: TileStatus) -> int:
        """Return the number of tiles with this status."""
        return int(np.count_nonzero(self.status == status))


@dataclass(frozen=True)
class TileBlock:
    """Neighbouring tiles that were read together.

    Attributes:
        positions: Row and column of each tile, ``(k, 2)``.
        pixels: RGB of the tiles, ``(k, tile_size_px, tile_size_px, 3)``.
        edge_share: Share of edge pixels of each tile, ``(k,)``.
    """

    positions: npt.NDArray[np.int64]
    pixels: Pixels
    edge_share: npt.NDArray[np.float64]


class _ReadBlock(NamedTuple):
    """All tiles of a block, damaged ones among them."""

    tiles: TileBlock
    damaged: npt.NDArray[np.bool_]  # whether lost pixels have a part in the tile, (k,)
    lost_share: npt.NDArray[np.float64]  # share of the tile's own area, (k,)


def grid_shape(width_um: float, height_um: float, tile_size_um: float) -> tuple[int, int]:
    """Return the rows and columns of whole tiles that fit on a slide."""
    # A millionth of a tile forgives the rounding of resolutions such as 20040.08 px/cm.
    rows, columns = (math.floor(side / tile_size_um + 1e-6) for side in (height_um, width_um))
    return rows, columns


def plan_tiles(slide: Slide, rules: TileRules, *, judge: bool = True) -> TilePlan:
    """Lay the grid on a slide and find the tiles that are glass.

    Args:
        slide: The open slide.
        rules: What is a tile and what is glass.
        judge: Whether to refuse slides that are not of stained tissue on a bright background.

    Returns:
        The plan, with every tile either bright or pending.

    Raises:
        SlideError: If the slide cannot be read, too much of it is damaged, or its values do not
            fill their bits.
        SlideExcludedError: If it looks like fluorescence, or has tissue without any colour.
    """
    rows, columns = grid_shape(slide.width_um, slide.height_um, rules.tile_size_um)
    tile_px = min(max(OVERVIEW_EDGE_PX // max(rows, columns, 1), 4), 160)
    # Heat maps show what there is.
    most_lost = rules.max_damaged_share if judge else 1.0
    overview, lost = _read_overview(slide, rules.tile_size_um, tile_px, most_lost)
    grey: Pixels = np.asarray(cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    if judge:
        _refuse_unused_bits(slide, overview)
        _refuse_fluorescence(slide.name, overview, grey, rules)
    whole = grey[: rows * tile_px, : columns * tile_px].astype(np.float64)
    by_tile = rows, tile_px, columns, tile_px
    brightness = whole.reshape(by_tile).mean(axis=(1, 3))
    bright = brightness >= rules.brightness_cutoff
    if lost is not None:  # is on the background, and no glass for that
        bright &= ~lost[: rows * tile_px, : columns * tile_px].reshape(by_tile).any(axis=(1, 3))
    status = np.where(bright, TileStatus.BRIGHT, TileStatus.PENDING).astype(np.uint8)
    if judge and grey.min() < GLASS_GREY:
        _refuse_grey(slide.name, overview)
    return TilePlan(status=status, overview=overview, tile_px=tile_px)


def _refuse_unused_bits(slide: Slide, overview: Pixels) -> None:
    """Raise if 12 or 14 bits were stored in 16 as they are: the upper 8, all we get, are dark."""
    brightest = int(overview.max())
    if brightest < 128 and (bits := slide.bits_per_sample()) > 8:
        raise SlideError(
            f"A slide must have 8 bits per sample or use all it has, but {slide.name} has "
            f"{bits}, of which the uppermost are empty: the upper 8 reach "
            f"{brightest} of 255. Convert it to 8 bits."
        )


def _refuse_fluorescence(name: str, overview: Pixels, grey: Pixels, rules: TileRules) -> None:
    """Raise if much of what was scanned is dark; next to glass, black of exactly 0 was not."""
    # Without glass it counts: the background of a fluorescence slide may be cut off at 0.
    has_glass = bool((grey >= GLASS_GREY).any())
    scanned = grey[overview.max(axis=2) > 0] if has_glass else grey
    dark = float(np.mean(scanned < DARK_GREY))
    if dark > rules.max_dark_share:
        raise SlideExcludedError(
            f"A slide must have a bright background, but {dark:.0%} of {name} is dark: it "
            "looks like fluorescence, for which the tissue rules are not made. If it is not, "
            "allow more with --max-dark-share."
        )


def _refuse_grey(name: str, overview: Pixels) -> None:
    """Raise if an overview (h, w, 3) with more than glass on it has no colour anywhere."""
    red, *others = cv2.split(overview)
    if max(int(cv2.absdiff(red, other).max()) for other in others) <= GREY_SPREAD:
        raise SlideExcludedError(
            f"A slide must show stained tissue, but red, green and blue are equal everywhere on "
            f"{name}: it was scanned in grey, or its colours are stored as separate planes, of "
            "which one is read. Convert it to RGB with interleaved samples."
        )


def _refuse_damage(slide: Slide, share: float, most: float, rule: str) -> None:
    """Raise if more than this share of what was to be read cannot be."""
    if share > most or share >= 1:
        raise LevelError(
            0,
            f"The pixels of {slide.name} must be readable but for {most:.0%}, but of {rule} "
            f"{share:.0%} or more are damaged: {slide.damage} Copy it again, or allow more with "
            "--max-damaged-share.",
        )


def _read_overview(
    slide: Slide, tile_size_um: float, tile_px: int, most_lost: float
) -> tuple[Pixels, npt.NDArray[np.bool_] | None]:
    """Read the whole slide at `tile_px` pixels per tile, and what of it is lost, if anything."""
    um_per_px = tile_size_um / tile_px
    width = max(1, round(slide.width_um / um_per_px))
    height = max(1, round(slide.height_um / um_per_px))
    level_mpp = slide.level_mpp(slide.level_for(um_per_px))
    step = max(1, int(READ_EDGE_PX * level_mpp / um_per_px))  # bounds the memory
    overview: Pixels = np.empty((height, width, 3), dtype=np.uint8)
    lost = np.zeros((height, width), dtype=bool)
    for top in range(0, height, step):
        for left in range(0, width, step):
            high, wide = min(step, height - top), min(step, width - left)
            part = slice(top, top + high), slice(left, left + wide)
            x, y, w, h = (edge * um_per_px for edge in (left, top, wide, high))
            picture = slide.read_around(x, y, w, h, (wide, high))
            overview[part] = picture.pixels
            if picture.lost is not None:
                lost[part] = picture.lost
                _refuse_damage(slide, float(lost.mean()), most_lost, "its area")
    return overview, lost if lost.any() else None


class TileReader(Iterator[TileBlock]):
    """Reads the pending tiles of a slide in blocks of neighbours, ahead of their use.

    Reading begins at once. Sets the status of every pending tile to kept, smooth or damaged; gives
    blocks with the kept tiles only, and leaves out blocks without any. Raises a `LevelError` when
    too much of the tiles is damaged. Close it before the slide.

    Args:
        slide: The open slide.
        plan: Its plan.
        rules: What makes a tile worth keeping.
        pool: Threads that read; the order of the blocks does not depend on them.
        ahead: How many blocks may be read before they are used; bounds the memory.
    """

    def __init__(
        self,
        slide: Slide,
        plan: TilePlan,
        rules: TileRules,
        *,
        pool: ThreadPoolExecutor,
        ahead: int,
    ) -> None:
        target_mpp = rules.tile_size_um / rules.tile_size_px
        level_mpp = slide.level_mpp(slide.level_for(target_mpp))
        edge = min(8, max(1, int(READ_EDGE_PX * level_mpp // rules.tile_size_um)))
        self._slide, self._plan, self._rules = slide, plan, rules
        self._pool, self._ahead = pool, max(1, ahead)
        self._todo = _blocks(plan, edge)
        self._pending = plan.count(TileStatus.PENDING)
        self._lost = 0.0  # in tiles
        self._waiting: deque[Future[_ReadBlock]] = deque()
        self._fill()

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead:
            positions = next(self._todo, None)
            if positions is None:
                return
            block = self._pool.submit(_read_block, self._slide, positions, self._rules)
            self._waiting.append(block)

    def __next__(self) -> TileBlock:
        """Return the next block, as soon as it has been read."""
        while self._waiting:
            block, damaged, lost_share = self._waiting.popleft().result()
            self._fill()
            keep = (block.edge_share >= self._rules.min_edge_share) & ~damaged
            status = np.where(keep, TileStatus.KEPT, TileStatus.SMOOTH)
            status[damaged] = TileStatus.DAMAGED
            self._plan.status[tuple(block.positions.T)] = status
            if damaged.any():
                self._lost += float(lost_share.sum())
                share, most = self._lost / self._pending, self._rules.max_damaged_share
                _refuse_damage(self._slide, share, most, "its tiles that are not glass")
            if keep.any():
                return TileBlock(block.positions[keep], block.pixels[keep], block.edge_share[keep])
        raise StopIteration

    def close(self) -> None:
        """Stop reading and wait until nobody is on the slide any more."""
        self._todo = iter(())
        for future in self._waiting:
            future.cancel()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.cancelled():
                future.exception()


def _blocks(plan: TilePlan, edge: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the positions (k, 2) of pending tiles, square of `edge` tiles by square."""
    rows, columns = plan.status.shape
    for top in range(0, rows, edge):
        for left in range(0, columns, edge):
            part = plan.status[top : top + edge, left : left + edge] == TileStatus.PENDING
            if part.any():
                yield np.argwhere(part) + np.array([top, left])


def _read_block(slide: Slide, positions: npt.NDArray[np.int64], rules: TileRules) -> _ReadBlock:
    """Read the tiles at `positions` (k, 2) in one go and measure their edges."""
    (top, left), (bottom, right) = positions.min(axis=0), positions.max(axis=0) + 1
    um, px = rules.tile_size_um, rules.tile_size_px
    x, y, w, h = (float(edge * um) for edge in (left, top, right - left, bottom - top))
    picture = slide.read_around(x, y, w, h, (int(right - left) * px, int(bottom - top) * px))
    parts = [
        (slice((row - top) * px, (row - top + 1) * px), slice((c - left) * px, (c - left + 1) * px))
        for row, c in positions
    ]
    pixels = np.stack([picture.pixels[part] for part in parts])
    shares = [edge_share(tile, rules.canny_low, rules.canny_high) for tile in pixels]
    lost, blurred = picture.lost, picture.blurred
    return _ReadBlock(
        tiles=TileBlock(positions=positions, pixels=pixels, edge_share=np.array(shares)),
        damaged=np.array([blurred is not None and bool(blurred[part].any()) for part in parts]),
        lost_share=np.array([0.0 if lost is None else float(lost[part].mean()) for part in parts]),
    )


def edge_share(tile: Pixels, low: float = 40.0, high: float = 100.0) -> float:
    """Return the share of a tile's pixels that Canny's detector calls an edge.

    Args:
        tile: RGB, ``(h, w, 3)``.
        low: Lower threshold.
        high: Upper threshold.
    """
    edges = cv2.Canny(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), low, high)
    return float(np.count_nonzero(edges)) / edges.size
