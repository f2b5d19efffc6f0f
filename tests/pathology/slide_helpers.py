"""Slides for tests: one in memory whose every pixel is known, and small files on disk."""

from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from examples.pathology.features.extract import run_extract
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.simulation.slides import write_pyramid

SHARED = Path(__file__).parents[3] / "shared" / "data"


class FakeHandle:
    """Stands in for `openslide.OpenSlide`; its pixels are a function of level-0 coordinates.

    `paint(x, y)` takes arrays of level-0 pixel centres and returns RGBA uint8 (h, w, 4).
    """

    def __init__(self, size, paint, downsamples=(1.0,), properties=None, broken=()):
        self.dimensions = size
        self.level_downsamples = tuple(downsamples)
        self.level_dimensions = tuple(
            (max(1, int(size[0] / d)), max(1, int(size[1] / d))) for d in downsamples
        )
        self.properties = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"} | (properties or {})
        self.broken = set(broken)
        self.paint = paint
        self.reads = []  # (x, y, level, w, h)
        self.closed = False

    def read_region(self, location, level, size):
        assert not self.closed, "read after close"
        self.reads.append((*location, level, *size))
        if level in self.broken:
            raise openslide.OpenSlideError("bad tile")
        d = self.level_downsamples[level]
        x = (round(location[0] / d) + np.arange(size[0]) + 0.5) * d
        y = (round(location[1] / d) + np.arange(size[1]) + 0.5) * d
        return Image.fromarray(self.paint(*np.meshgrid(x, y)), "RGBA")

    def close(self):
        self.closed = True


def plain(colour):
    """Return a `paint` of one colour."""

    def paint(x, y):
        return np.broadcast_to(np.array([*colour, 255], dtype=np.uint8), (*x.shape, 4)).copy()

    return paint


def checkered(x, y):
    """Paint pink and purple squares of 16 level-0 pixels: many edges, like tissue."""
    odd = ((x // 16 + y // 16) % 2).astype(bool)
    pixels = np.full((*x.shape, 4), 255, dtype=np.uint8)
    pixels[odd, :3] = (230, 170, 200)
    pixels[~odd, :3] = (90, 60, 120)
    return pixels


def tissue(height, width, seed=0):
    """Return RGB pixels (h, w, 3) of dark dots on pink, 0.5 um each."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), (228, 170, 200), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for y, x in rng.integers(0, (height, width), (height * width // 4000, 2)):
        part = (slice(max(y - 8, 0), y + 9), slice(max(x - 8, 0), x + 9))
        inside = (rows[part] - y) ** 2 + (columns[part] - x) ** 2 <= 49
        pixels[part][inside] = (70, 45, 105)
    return pixels


def save_slide(path, height=1100, width=1100, seed=0, mpp=0.5, white_left=0):
    """Write a small slide of tissue with a stripe of glass on the left."""
    pixels = tissue(height, width, seed)
    pixels[:, :white_left] = 247
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pyramid(path, pixels, mpp=mpp)
    return pixels


def extract(slides, out, **options):
    """Extract a folder of slides."""
    return run_extract(ExtractConfig(slides, out, **options))
