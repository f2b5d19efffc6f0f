"""Damaged pixels: what can be read around them is read, by every thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openslide
import pytest

from examples.pathology.slides.reading import Source
from tests.pathology.slide_helpers import FakeHandle, checkered


class Damaged(FakeHandle):
    """A slide one tile of which, 300 to 400 px both ways, cannot be read.

    As OpenSlide's, a handle gives nothing more after that.
    """

    def __init__(self, path="a.svs"):
        tiles = {f"openslide.level[0].tile-{side}": "100" for side in ("width", "height")}
        super().__init__((1000, 1000), checkered, properties=tiles)
        self.failed = False

    def read_region(self, corner, level, size):
        (x, y), (width, height) = corner, size
        self.failed |= x < 400 and x + width > 300 and y < 400 and y + height > 300
        if self.failed:
            raise openslide.OpenSlideError("bad tile")
        return super().read_region(corner, level, size)


@pytest.fixture
def source(monkeypatch, tmp_path):
    opened = []

    def opening(path):
        opened.append(Damaged())
        return opened[-1]

    monkeypatch.setattr(openslide, "OpenSlide", opening)
    source = Source(opening("a.svs"), tmp_path / "a.svs")
    yield source
    source.close()
    assert all(handle.closed for handle in opened)


def test_all_but_the_damaged_tile_is_read(source):
    region = source.read_around((150, 250), (500, 600))
    whole = np.asarray(FakeHandle((1000, 1000), checkered).read_region((150, 250), 0, (500, 600)))
    rows, columns = np.mgrid[250:850, 150:650]
    # Tiles of 100 px are read two by two: less would take too many reads.
    lost = (rows >= 200) & (rows < 400) & (columns >= 200) & (columns < 400)
    np.testing.assert_array_equal(region.lost, lost)
    np.testing.assert_array_equal(np.asarray(region.image)[~lost], whole[~lost])
    assert not np.asarray(region.image)[lost].any()
    assert region.problem == (200, 250, "bad tile")


def test_a_failed_read_takes_nothing_from_other_threads(source):
    corners = [(x, y) for x in range(0, 1000, 100) for y in range(0, 1000, 100)]
    with ThreadPoolExecutor(8) as pool:
        regions = list(pool.map(lambda corner: source.read_around(corner, (100, 100)), corners))
    damaged = [c for c, region in zip(corners, regions, strict=True) if region.lost is not None]
    assert damaged == [(300, 300)]


def test_a_source_without_a_file_is_not_opened_anew():
    source = Source(Damaged(), None)
    with pytest.raises(openslide.OpenSlideError, match="bad tile"):
        source.read_around((0, 0), (500, 500))
