"""Reading the pixels of a slide file, past those that are damaged.

After a failed read OpenSlide gives nothing more from a handle, to no thread: the file is opened
anew then. A handle that others read with at the same time cannot tell whose read failed, hence
what is read again is read with a handle of its own.
"""

import itertools
import math
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image

from examples.pathology.slides.pictures import Handle, open_handle

PIECE_PX = 128
"""Least edge of a piece where a larger read fails; also the guess if a file names no tiles."""


class Region(NamedTuple):
    """A rectangle of level 0.

    Args:
        image: Its pixels, RGBA; transparent where they are lost.
        lost: Which cannot be read, ``(h, w)``; ``None``: all can.
        problem: Where the first of these are, in pixels of level 0, and why.
    """

    image: Image.Image
    lost: npt.NDArray[np.bool_] | None = None
    problem: tuple[int, int, str] | None = None


class Source:
    """An open slide file that threads read; close it after use.

    Args:
        handle: The open slide.
        path: The file; ``None``: it cannot be opened anew.
    """

    def __init__(self, handle: Handle, path: Path | None) -> None:
        self.handle = handle
        self._path = path
        self._failed: list[Handle] = []  # closed last: others may still read them
        self._lock = threading.Lock()
        self._steps = {side: _step(handle, side) for side in ("width", "height")}

    def close(self) -> None:
        """Release the file."""
        for handle in (*self._failed, self.handle):
            handle.close()

    def read(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Read a rectangle as RGBA.

        Args:
            corner: Its left and top edge in pixels of level 0.
            level: The level to read.
            size: Its width and height in pixels of that level.

        Raises:
            OpenSlideError: Some of it cannot be read.
        """
        handle = self.handle
        try:
            return handle.read_region(corner, level, size)
        except openslide.OpenSlideError:
            if self._path is None:
                raise
        with self._lock:
            if self.handle is handle:
                self.handle = self._opened()
                self._failed.append(handle)
        return self._read_alone(corner, level, size)

    def read_around(self, corner: tuple[int, int], size: tuple[int, int]) -> Region:
        """Read a rectangle of level 0 tile by tile of the file if it cannot be read at once.

        Args:
            corner: Its left and top edge.
            size: Its width and height.

        Raises:
            OpenSlideError: The file cannot be opened anew.
        """
        try:
            return Region(self.read(corner, 0, size))
        except openslide.OpenSlideError:
            if self._path is None:
                raise
        image = Image.new("RGBA", size)
        lost = np.zeros((size[1], size[0]), dtype=bool)
        problem = None
        for top, bottom in self._pieces("height", corner[1], size[1]):
            for left, right in self._pieces("width", corner[0], size[0]):
                place = left - corner[0], top - corner[1]
                try:
                    part = self._read_alone((left, top), 0, (right - left, bottom - top))
                    image.paste(part, place)
                except openslide.OpenSlideError as error:
                    lost[place[1] : bottom - corner[1], place[0] : right - corner[0]] = True
                    problem = problem or (left, top, str(error))
        return Region(image, lost, problem) if problem else Region(image)

    def _opened(self) -> Handle:
        if self._path is None:
            raise openslide.OpenSlideError("the file cannot be opened anew")
        return open_handle(self._path, self._path.name)

    def _read_alone(
        self, corner: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        handle = self._opened()
        try:
            return handle.read_region(corner, level, size)
        finally:
            handle.close()

    def _pieces(self, side: str, start: int, length: int) -> list[tuple[int, int]]:
        """Cut a stretch where tiles of the file begin."""
        step = self._steps[side]
        first = (start // step + 1) * step
        cuts = [start, *range(first, start + length, step), start + length]
        return list(itertools.pairwise(cuts))


def _step(handle: Handle, side: str) -> int:
    """Return how many pixels of level 0 to read at once: whole tiles of the file, if it has any."""
    try:
        tile = max(1, int(handle.properties.get(f"openslide.level[0].tile-{side}", PIECE_PX)))
    except ValueError:
        tile = PIECE_PX
    return tile * math.ceil(PIECE_PX / tile)
