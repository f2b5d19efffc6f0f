from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pathology.common.errors import UserError
from examples.pathology.settings.extract import TileRules
from examples.pathology.slides.overlay import draw_overlay
from examples.pathology.slides.slide import Slide, open_slide
from examples.pathology.slides.tiling import (
    READ_EDGE_PX,
    SlideExcludedError,
    TileReader,
    TileStatus,
    edge_share,
    grid_shape,
    plan_tiles,
)
from examples.pathology.slides.units import Mpp, SlideError
from tests.pathology.slide_helpers import SHARED, FakeHandle, checkered, plain, tissue

RULES = TileRules()


def make(paint, size, mpp=0.5, **options):
    handle = FakeHandle(size, paint, **options)
    return Slide(handle, "fake", Mpp(mpp, mpp, "test")), handle


def read_all(slide, plan, rules=RULES, workers=2):
    with ThreadPoolExecutor(workers) as pool:
        return list(TileReader(slide, plan, rules, pool=pool, ahead=2 * workers))


def half_glass(x, y):
    """Glass on the left of x = 1024 px, tissue on the right."""
    pixels = checkered(x, y)
    pixels[x < 1024, :3] = 248
    return pixels


@given(st.integers(1, 300_000), st.integers(1, 300_000), st.integers(50, 4000))
def test_the_grid_holds_all_whole_tiles_and_no_other(width, height, nm):
    mpp = nm / 1000
    rows, columns = grid_shape(width * mpp, height * mpp, 256.0)
    exact = Fraction(nm, 1000)  # a slow, exact second way
    for count, pixels in ((columns, width), (rows, height)):
        assert count * 256 <= pixels * exact * (1 + Fraction(1, 10**5)) + Fraction(1, 1000)
        assert (count + 1) * 256 > pixels * exact


def test_a_resolution_rounded_by_the_file_format_loses_no_tile():
    # 2048 px of 0.5 um are 4 tiles; stored as 20000.02 px/cm they are 3.999996.
    assert grid_shape(2048 * 1e4 / 20000.02, 2048 * 0.5, 256.0) == (4, 3)
    assert grid_shape(2048 * 1e4 / 20000.002, 2048 * 0.5, 256.0) == (4, 4)


def test_glass_is_found_on_the_overview_and_never_read():
    slide, handle = make(half_glass, (2600, 1100), downsamples=(1, 4))
    plan = plan_tiles(slide, RULES)
    assert plan.status.shape == (2, 5)
    np.testing.assert_array_equal(plan.status[:, :2], TileStatus.BRIGHT)
    np.testing.assert_array_equal(plan.status[:, 2:], TileStatus.PENDING)
    handle.reads.clear()
    blocks = read_all(slide, plan)
    assert sum(len(block.positions) for block in blocks) == 6
    assert min(x for x, *_ in handle.reads) >= 1024 - 16  # but for the margin of the resampling
    np.testing.assert_array_equal(plan.status[:, 2:], TileStatus.KEPT)


def test_tiles_hang_over_no_edge():
    slide, _ = make(checkered, (2047, 1535))  # one pixel short of 4 x 3 tiles
    plan = plan_tiles(slide, RULES)
    assert plan.status.shape == (2, 3)


def test_tiles_without_edges_are_dropped():
    slide, _ = make(plain((200, 120, 160)), (1100, 1100))  # even pink: out of focus, or mucus
    plan = plan_tiles(slide, RULES)
    assert read_all(slide, plan) == []
    assert plan.count(TileStatus.SMOOTH) == 4


def test_thresholds_are_configurable():
    slide, _ = make(plain((200, 120, 160)), (1100, 1100))
    kept = plan_tiles(slide, TileRules(min_edge_share=0.0))
    assert len(read_all(slide, kept, TileRules(min_edge_share=0.0))) == 1
    glass = plan_tiles(slide, TileRules(brightness_cutoff=100.0))
    assert glass.count(TileStatus.BRIGHT) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_edge_share": 1.5}, r"`min-edge-share` must be between 0 and 1, but got 1\.5"),
        ({"tile_size_um": 15.0}, r"`tile-um` must be between 16 and 2048, but got 15\.0"),
        ({"tile_size_px": 4096}, "`tile-px` must be between 32 and 2048, but got 4096"),
        ({"brightness_cutoff": float("nan")}, "`brightness-cutoff` must be between 0 and 256"),
    ],
)
def test_impossible_rules_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        TileRules(**options)


def test_brightness_is_compared_as_less_than():
    for value, expected in ((239, TileStatus.PENDING), (240, TileStatus.BRIGHT)):
        slide, _ = make(plain((value, value, value)), (600, 600))
        assert plan_tiles(slide, RULES).status.tolist() == [[expected]]


def test_dark_slides_are_excluded_as_fluorescence():
    def stars(x, y):
        pixels = plain((4, 2, 8))(x, y)
        pixels[(x % 50 < 10) & (y % 50 < 10), :3] = (40, 60, 250)
        return pixels

    slide, _ = make(stars, (1100, 1100))
    with pytest.raises(SlideExcludedError, match="fake is dark: it looks like fluorescence"):
        plan_tiles(slide, RULES)


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_values_that_do_not_fill_their_bits_are_refused_for_that(bits, tmp_path):
    pixels = tissue(1100, 1100).astype(np.uint16) << (bits - 8)
    size = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), metadata=None, **size)
    with closing(open_slide(path, "a.tif")) as slide:
        if bits == 16:
            assert plan_tiles(slide, RULES).count(TileStatus.PENDING) == 4
            return
        with pytest.raises(SlideError, match=r"a\.tif has 16, of which the upper.* to 8 bits") as e:
            plan_tiles(slide, RULES)
        assert not isinstance(e.value, SlideExcludedError)


def test_black_that_was_never_scanned_is_not_fluorescence():
    def stitched(x, y):
        pixels = half_glass(x, y)
        pixels[x > 1536, :3] = 0
        return pixels

    slide, _ = make(stitched, (5120, 1100))
    plan = plan_tiles(slide, RULES)
    read_all(slide, plan)
    assert [plan.count(s) for s in (TileStatus.BRIGHT, TileStatus.KEPT)] == [4, 2]
    slide, _ = make(plain((0, 0, 0)), (1100, 1100))
    with pytest.raises(SlideExcludedError, match=r"100% of fake is dark.*with --max-dark-share"):
        plan_tiles(slide, RULES)


def grey_tissue(x, y):
    pixels = half_glass(x, y)
    pixels[..., :3] = pixels[..., :1]  # one plane of three, as OpenSlide gives it
    return pixels


def test_slides_without_any_colour_are_excluded():
    slide, _ = make(grey_tissue, (2048, 1100))
    with pytest.raises(SlideExcludedError, match="green and blue are equal everywhere on fake"):
        plan_tiles(slide, RULES)
    assert plan_tiles(slide, RULES, judge=False).count(TileStatus.PENDING) == 4  # a heat map of old

    def with_a_little_colour(x, y):
        pixels = grey_tissue(x, y)
        pixels[(x > 1500) & (y > 600), 0] += 20
        return pixels

    slide, _ = make(with_a_little_colour, (2048, 1100))
    assert plan_tiles(slide, RULES).count(TileStatus.PENDING) == 4


def test_a_slide_smaller_than_a_tile_has_an_empty_grid():
    slide, _ = make(checkered, (300, 2000))
    plan = plan_tiles(slide, RULES)
    assert plan.status.shape == (3, 0)
    assert read_all(slide, plan) == []
    assert draw_overlay(plan).shape[2] == 3


def test_edge_share_counts_the_outline():
    tile = np.full((224, 224, 3), 255, dtype=np.uint8)
    assert edge_share(tile) == 0.0
    tile[62:162, 62:162] = 0
    # The outline of a square of 100 px is 400 px long; Canny draws it one pixel wide.
    assert edge_share(tile) == pytest.approx(400 / 224**2, rel=0.05)
    faint = np.full((224, 224, 3), 200, dtype=np.uint8)
    faint[62:162, 62:162] = 195
    assert edge_share(faint) == 0.0  # below the threshold of 40
    assert edge_share(faint, low=1, high=2) > 0.0


@pytest.mark.parametrize("mpp", [0.5, 0.251])
def test_tiles_do_not_depend_on_the_number_of_threads_or_the_size_of_a_read(mpp):
    size = (round(800 / mpp), round(530 / mpp))
    results = []
    for workers in (1, 4):
        slide, _ = make(checkered, size, mpp)
        blocks = read_all(slide, plan_tiles(slide, RULES), workers=workers)
        results.append(
            (
                np.concatenate([block.positions for block in blocks]),
                np.concatenate([block.pixels for block in blocks]),
            )
        )
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    slide, _ = make(checkered, size, mpp)
    for (row, column), tile in list(zip(*results[0], strict=True))[::2]:
        alone = slide.read(column * 256.0, row * 256.0, 256, 256, (224, 224))
        assert np.abs(alone.astype(int) - tile).max() <= 1


@pytest.mark.parametrize(("mpp", "downsamples"), [(0.25, (1, 4, 16, 64)), (0.5, (1,))])
def test_no_read_is_large(mpp, downsamples):
    # The first is as large as slides get; the second has no pyramid at all.
    size = (160_000, 100_000) if len(downsamples) > 1 else (9_000, 7_000)
    slide, handle = make(plain((250, 250, 250)), size, mpp, downsamples=downsamples)
    plan = plan_tiles(slide, RULES)
    assert (
        plan.count(TileStatus.BRIGHT)
        == plan.status.size
        == np.prod(grid_shape(slide.width_um, slide.height_um, 256.0))
    )
    assert max(max(w, h) for *_, w, h in handle.reads) <= 1.2 * READ_EDGE_PX
    assert max(plan.overview.shape) < 3000


@pytest.mark.parametrize("edge_px", [6_000, 12_000])
def test_what_is_read_ahead_does_not_grow_with_the_slide(edge_px):
    slide, handle = make(checkered, (edge_px, 2100))
    plan = plan_tiles(slide, RULES)
    handle.reads.clear()
    with ThreadPoolExecutor(2) as pool:
        reader = TileReader(slide, plan, RULES, pool=pool, ahead=2)
        for used in range(1, 3):
            next(reader)
            pool.submit(int).result()  # the pool has begun whatever it was given before
            assert used <= len(handle.reads) <= used + 2
        reader.close()


def test_abandoned_reading_leaves_nobody_on_the_slide():
    slide, handle = make(checkered, (5200, 2600))
    plan = plan_tiles(slide, RULES)
    with ThreadPoolExecutor(2) as pool:
        blocks = TileReader(slide, plan, RULES, pool=pool, ahead=4)
        next(blocks)
        blocks.close()
        slide.close()
        # FakeHandle fails on a read after close; waiting here would raise it.
        reads = len(handle.reads)
    assert len(handle.reads) == reads
    assert plan.count(TileStatus.PENDING) > 0


def test_the_overlay_shows_each_tile_in_the_colour_of_its_status():
    slide, _ = make(half_glass, (2600, 1100))
    plan = plan_tiles(slide, RULES)
    read_all(slide, plan)
    picture = draw_overlay(plan)
    height, width = plan.overview.shape[:2]
    assert picture.shape[0] > height  # the legend
    assert picture.shape[1] >= width
    px = plan.tile_px
    np.testing.assert_array_equal(picture[px // 2, 1], (150, 150, 150))  # frame of a glass tile
    np.testing.assert_array_equal(picture[px // 2, 2 * px + 1], (0, 158, 115))  # of a kept one


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2), st.integers(0, 1))
def test_the_tiles_of_a_shifted_slide_are_shifted(dx, dy):
    def paint(x, y):
        pixels = checkered(x, y)
        inside = (x // 512 == dx) & (y // 512 == dy)
        pixels[~inside, :3] = 250
        return pixels

    slide, _ = make(paint, (1536, 1024))
    plan = plan_tiles(slide, RULES)
    (block,) = read_all(slide, plan)
    assert block.positions.tolist() == [[dy, dx]]


@pytest.mark.parametrize(
    "name",
    [
        "cmu-1-small-region.svs",
        "derived_pyramid_cm.tif",
        "derived_pyramid_inch.tif",
        "derived_pyramid_xml.tif",
    ],
)
def test_copies_of_one_slide_give_the_same_tiles(name):
    folder = SHARED / "wsi"
    if not folder.is_dir():
        pytest.skip("the shared data is not here")
    slide = open_slide(folder / name, name)
    plan = plan_tiles(slide, RULES)
    read_all(slide, plan)
    slide.close()
    # STAMP v1, which drops tiles at the edge as we do, keeps 15 of 20 here.
    assert (plan.status.size, plan.count(TileStatus.KEPT)) == (20, 15)
    assert np.argwhere(plan.status != TileStatus.KEPT).tolist() == [
        [0, 0],
        [0, 3],
        [1, 0],
        [3, 0],
        [4, 0],
    ]
