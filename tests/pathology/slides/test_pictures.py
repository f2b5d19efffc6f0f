"""Slides that OpenSlide does not open: their pixels are those of the same slide that it does."""

import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from examples.pathology.settings.extract import TileRules
from examples.pathology.slides.pictures import FlatPicture, TiffPicture, open_handle
from examples.pathology.slides.slide import open_slide
from examples.pathology.slides.tiling import plan_tiles
from examples.pathology.slides.units import SlideError, SlideExcludedError
from tests.pathology.slide_helpers import tissue

CM = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}  # 0.5 um
PIXELS = tissue(600, 700, seed=5)
ALPHA = np.dstack([PIXELS, np.arange(700, dtype=np.uint8)[None].repeat(600, 0)])


WIDE = PIXELS.astype(np.uint16) * 257 ^ np.arange(700, dtype=np.uint16)[:, None] % 257  # 16 bits


def tiff(path, pixels=PIXELS, **options):
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", **options})


def ome(path, *, planar=False, **options):
    """Write a BigTIFF with levels in SubIFDs, of every third pixel."""
    options |= {"photometric": "rgb", "planarconfig": "separate" if planar else "contig"}
    axes = {"axes": "CYX" if planar else "YXS", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
        for step in (1, 3):
            pixels = PIXELS[::step, ::step]
            pixels = np.moveaxis(pixels, -1, 0) if planar else pixels
            more = {"subifds": 1, "metadata": axes} if step == 1 else {"subfiletype": 1}
            file.write(pixels, **{"metadata": None, **options, **more})


WRITERS = {
    "raw.tif": tiff,
    "lzw.tif": lambda path: tiff(path, compression="lzw", predictor=True, rowsperstrip=7),
    "one_strip.tif": lambda path: tiff(path, compression="zlib", rowsperstrip=600),
    "planar.tif": lambda path: tiff(
        path, np.moveaxis(PIXELS, -1, 0), planarconfig="separate", rowsperstrip=50
    ),
    "big_endian_16.tiff": lambda path: tiff(path, WIDE, byteorder=">"),
    "tiles.btf": lambda path: tiff(
        path, tile=(128, 256), compression="jpeg2000", compressionargs={"level": 0, "mct": False}
    ),
    "imagej.tif": lambda path: tifffile.imwrite(path, PIXELS, imagej=True),
    "a.ome.tif": ome,
    "b.ome.tif": lambda path: ome(path, planar=True, compression="zlib", rowsperstrip=32),
    "c.ome.tif": lambda path: ome(path, tile=(128, 128), compression="jpeg2000"),
    "a.png": Image.fromarray(PIXELS).save,
    "a.bmp": Image.fromarray(PIXELS).save,
    "palette.png": lambda path: Image.fromarray(PIXELS // 86 * 86).quantize(64).save(path),
}


def corners(width, height, count=30, seed=0):
    """Draw rectangles (x, y, w, h) inside a picture; the first is all of it."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, width, count), rng.integers(0, height, count)
    sizes = [
        (int(rng.integers(1, width - a + 1)), int(rng.integers(1, height - b + 1)))
        for a, b in zip(x, y, strict=True)
    ]
    drawn = [(int(a), int(b), *size) for a, b, size in zip(x, y, sizes, strict=True)]
    return [(0, 0, width, height), *drawn]


@pytest.fixture
def often():
    """Let threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("name", WRITERS)
def test_many_threads_read_the_pixels_that_openslide_reads(tmp_path, name, often):
    path = tmp_path / name
    WRITERS[name](path)
    truth = np.asarray(Image.open(path).convert("RGB")) if "palette" in name else PIXELS
    truth = WIDE if "16" in name else truth
    tiff(tmp_path / "truth.tif", truth, tile=(256, 256))
    handle = open_handle(path, name)
    assert isinstance(handle, FlatPicture if path.suffix in (".png", ".bmp") else TiffPicture)
    assert handle.dimensions == (700, 600)
    with closing(openslide.OpenSlide(tmp_path / "truth.tif")) as tiled, closing(handle):

        def differs(rectangle):
            x, y, *size = rectangle
            ours = np.asarray(handle.read_region((x, y), 0, tuple(size)))
            return not np.array_equal(ours, tiled.read_region((x, y), 0, tuple(size)))

        with ThreadPoolExecutor(8) as pool:
            assert not any(pool.map(differs, corners(700, 600)))


@pytest.mark.parametrize("name", ["a.ome.tif", "b.ome.tif", "c.ome.tif"])
def test_levels_in_subifds_are_read(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with closing(open_handle(tmp_path / name, name)) as handle:
        scale = handle.level_downsamples[1]
        assert handle.level_dimensions == [(700, 600), (234, 200)]
        assert scale == pytest.approx((700 / 234 + 600 / 200) / 2)
        for x, y, *size in corners(234, 200):
            part = handle.read_region((round(x * scale), round(y * scale)), 1, tuple(size))
            expected = PIXELS[::3, ::3][y : y + size[1], x : x + size[0]]
            np.testing.assert_array_equal(np.asarray(part)[..., :3], expected)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_pixels_are_those_of_openslide(tmp_path, kind):
    pixels = ALPHA.copy()
    if kind == "assocalpha":  # colours are stored multiplied by it
        pixels[..., :3] = pixels[..., :3].astype(int) * pixels[..., 3:] // 255
    for name, options in ("strips.tif", {}), ("tiled.tif", {"tile": (256, 256)}):
        tiff(tmp_path / name, pixels, extrasamples=[kind], **options, **CM)
    Image.fromarray(ALPHA).save(tmp_path / "a.png")
    read = []
    for name in ("tiled.tif", "strips.tif", "a.png")[: 3 if kind == "unassalpha" else 2]:
        with closing(open_slide(tmp_path / name, name, table_mpp=0.5)) as slide:
            read.append(slide.read(0, 0, 350, 300, (700, 600)).astype(int))
    for other in read[1:]:  # OpenSlide rounds once more, to colours multiplied by alpha
        assert np.abs(read[0] - other).max() <= (2 if kind == "unassalpha" else 0)


def test_what_cannot_be_decoded_is_lost_and_nothing_else(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, compression="zlib", rowsperstrip=150)
    with tifffile.TiffFile(path) as file:
        start = file.pages.first.dataoffsets[2]  # rows 300 to 449
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with closing(open_slide(path, "a.tif", table_mpp=0.5)) as slide:
        picture = slide.read_around(0, 0, 350, 300, (700, 600))
        lost = np.zeros((600, 700), bool)
        lost[300:450] = True
        np.testing.assert_array_equal(picture.lost, lost)
        np.testing.assert_array_equal(picture.pixels[~picture.blurred], PIXELS[~picture.blurred])
        assert "tifffile says: " in slide.damage
        assert "at (0, 150) um" in slide.damage


def test_a_strip_that_the_file_leaves_out_is_transparent(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, compression="zlib", rowsperstrip=150)
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages.first.tags["StripByteCounts"]
        counts.overwrite((counts.value[0], 0, *counts.value[2:]))
    with closing(open_slide(path, "a.tif", table_mpp=0.5)) as slide:
        pixels = slide.read(0, 0, 350, 300, (700, 600))
        assert (pixels[160:290] == 255).all()
        np.testing.assert_array_equal(pixels[310:], PIXELS[310:])


def test_a_file_that_ends_too_early_has_its_first_strips(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, compression="zlib", rowsperstrip=150)
    with tifffile.TiffFile(path) as file:
        cut = file.pages.first.dataoffsets[3] + 10
    path.write_bytes(path.read_bytes()[:cut])
    with closing(open_slide(path, "a.tif", table_mpp=0.5)) as slide:
        picture = slide.read_around(0, 0, 350, 300, (700, 600))
        assert picture.lost[450:].all()
        assert not picture.lost[:450].any()
        assert "the file ends" in slide.damage


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.png", r"a\.png must be a picture that Pillow reads, but it is damaged.*truncated"),
        ("b.tif", r"b\.tif must be a slide that OpenSlide reads, but it is damaged.*tifffile"),
        ("c.jpg", r"c\.jpg must be a picture that Pillow reads, .*cannot identify"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, reason):
    Image.fromarray(PIXELS).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    data = {"a.png": whole[: len(whole) // 2], "b.tif": b"II*\0\x08\0\0\0\xff", "c.jpg": b"x"}
    (tmp_path / name).write_bytes(data[name])
    with pytest.raises(SlideError, match=reason):
        open_slide(tmp_path / name, name, table_mpp=0.5)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))


def huge_strip(path):
    tiff(path, compression="zlib", rowsperstrip=600)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            file.pages.first.tags[tag].overwrite(40_000)


@pytest.mark.parametrize(("name", "write"), [("a.png", huge_png), ("a.tif", huge_strip)])
def test_size_is_bounded_by_memory_and_not_by_pillow(tmp_path, name, write):
    """Pillow alone would warn of half as many pixels as it refuses, which are 179 million."""
    write(tmp_path / name)
    reason = rf"at most 1,073,741,824 pixels, but of {name} it has 40,000 x 40,000\. Convert"
    with pytest.raises(SlideError, match=reason):
        open_slide(tmp_path / name, name, table_mpp=0.5)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_strips_of_jpeg_are_those_of_pillow(tmp_path, photometric):
    """Which decodes them by another program: rounding and chroma may differ by little."""
    path = tmp_path / "a.tif"
    tiff(path, compression="jpeg", photometric=photometric, rowsperstrip=48)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    with closing(open_handle(path, "a.tif")) as handle:
        ours = np.asarray(handle.read_region((0, 0), 0, (700, 600)).convert("RGB"))
    assert np.abs(ours - expected).max() <= 8
    assert np.abs(ours - expected).mean() < 0.5


def channels(path):
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(np.zeros((4, 600, 700), np.uint16), metadata={"axes": "CYX"})


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.ome.tif", channels, r"a\.ome\.tif has axes CYX of 4 x 600 x 700, uint16, MINISBLACK: "),
        ("b.tif", lambda path: tifffile.imwrite(path, PIXELS[..., 0]), "axes YX of 600 x 700"),
        ("c.tif", lambda path: tiff(path, PIXELS.astype(np.float32)), "float32, RGB"),
        ("d.tif", lambda path: tiff(path, np.stack([PIXELS] * 2)), "axes QYXS of 2 x 600 x 700"),
        ("e.png", Image.fromarray(PIXELS[..., 0]).save, "Pillow's mode L"),
        ("f.png", Image.fromarray(PIXELS[..., 0].astype(np.uint16)).save, "Pillow's mode I;16"),
        ("g.jpg", Image.fromarray(PIXELS).convert("CMYK").save, "Pillow's mode CMYK"),
    ],
)
def test_what_is_not_rgb_is_excluded_in_one_sentence(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(SlideExcludedError, match=reason):
        open_slide(tmp_path / name, name, table_mpp=0.5)


def test_figures_of_ours_are_no_slides(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "Matplotlib version 3.9.0, https://matplotlib.org/")
    Image.fromarray(PIXELS).save(tmp_path / "roc.png", pnginfo=text)
    with pytest.raises(
        SlideExcludedError, match=r"roc\.png must be a slide, but is a drawn figure"
    ):
        open_slide(tmp_path / "roc.png", "roc.png", default_mpp=0.5)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_twelve_bits_in_sixteen_are_refused(tmp_path, name):
    values = tissue(1100, 1100, seed=2).astype(np.uint16) << 4
    tiff(tmp_path / name, values) if name == "a.tif" else cv2.imwrite(tmp_path / name, values)
    reason = pytest.raises(SlideError, match=f"{name} has 16, of which the uppermost are empty")
    with closing(open_slide(tmp_path / name, name, table_mpp=0.5)) as slide, reason:
        plan_tiles(slide, TileRules())


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_fluorescence_and_grey_are_excluded(tmp_path, name):
    rows = np.arange(1100, dtype=np.uint8)[:, None, None]
    dark = np.broadcast_to(rows % 200 * (rows % 9 == 0), (1100, 1100, 3)).astype(np.uint8)
    grey = np.broadcast_to(100 + rows % 150, (1100, 1100, 3)).astype(np.uint8)
    for pixels, reason in ((dark, "looks like fluorescence"), (grey, "equal everywhere")):
        Image.fromarray(pixels).save(tmp_path / name)
        excluded = pytest.raises(SlideExcludedError, match=reason)
        with closing(open_slide(tmp_path / name, name, table_mpp=0.5)) as slide, excluded:
            plan_tiles(slide, TileRules())


def imagej(path, unit):
    resolution = {"resolution": (4, 4), "metadata": {"unit": unit}}
    tifffile.imwrite(path, PIXELS, imagej=True, **resolution)


@pytest.mark.parametrize(
    ("name", "write", "mpp", "source"),
    [
        (
            "a.png",
            lambda path: Image.fromarray(PIXELS).save(path, dpi=(50_800, 51_000)),
            0.5,
            "dpi-x",
        ),
        ("a.jpg", lambda path: Image.fromarray(PIXELS).save(path, dpi=(50_800,) * 2), 0.5, "dpi-x"),
        ("a.tif", lambda path: tiff(path, **CM), 0.5, "tiff.XResolution"),
        ("b.tif", lambda path: tiff(path, resolution=(50_800, 50_800)), 0.5, "tiff.XResolution"),
        ("a.ome.tif", ome, 0.5, "tiff.ImageDescription PhysicalSizeX"),
        ("c.tif", lambda path: imagej(path, "micron"), 0.25, "tiff.XResolution"),
        ("d.tif", lambda path: imagej(path, "um"), 0.25, "tiff.XResolution"),
        ("e.tif", lambda path: imagej(path, "\\u00B5m"), 0.25, "tiff.XResolution"),
    ],
)
def test_pixel_sizes_are_read(tmp_path, name, write, mpp, source):
    write(tmp_path / name)
    with closing(open_slide(tmp_path / name, name, default_mpp=1)) as slide:
        assert slide.mpp.x == pytest.approx(mpp, rel=1e-4)
        assert slide.mpp.source == source


def test_a_resolution_without_a_unit_is_in_inches(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, **CM)
    with tifffile.TiffFile(path) as file:
        place = file.pages.first.tags["ResolutionUnit"].offset
    data = bytearray(path.read_bytes())
    data[place : place + 2] = struct.pack("<H", 65_001)  # a number that nobody knows
    path.write_bytes(data)
    with closing(open_slide(path, "a.tif")) as slide:
        assert slide.mpp.x == pytest.approx(25_400 / 20_000)


def test_an_imagej_picture_in_pixels_has_no_size(tmp_path):
    imagej(tmp_path / "a.tif", "pixel")
    with pytest.raises(SlideError, match="has no microns per pixel"):
        open_slide(tmp_path / "a.tif", "a.tif")


@pytest.mark.parametrize(
    ("dpi", "reason"),
    [
        (None, "has no microns per pixel. Give them in the MPP column"),
        (72, "no microns per pixel but a placeholder, 352.*Give them in the MPP column"),
        (600, "between 0.08 and 4.0, but a.png has 42.3.*true value in the MPP column"),
    ],
)
def test_a_flat_picture_without_a_size_is_excluded(tmp_path, dpi, reason):
    """It may be a thumbnail or a photograph that lies beside the slides."""
    Image.fromarray(PIXELS).save(tmp_path / "a.png", **({"dpi": (dpi, dpi)} if dpi else {}))
    with pytest.raises(SlideExcludedError, match=reason):
        open_slide(tmp_path / "a.png", "a.png")
    with closing(open_slide(tmp_path / "a.png", "a.png", table_mpp=0.5)) as slide:
        assert (slide.mpp.x, slide.mpp.source) == (0.5, "slide table")
