import logging
import struct

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.pathology.common.errors import UserError
from examples.pathology.slides.slide import (
    LevelError,
    Slide,
    SlideFile,
    find_slides,
    open_slide,
    slide_file,
)
from examples.pathology.slides.units import Mpp, SlideError
from tests.pathology.slide_helpers import SHARED, FakeHandle, checkered, plain, save_slide


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def dicom(series, study="1.2", nested=None):
    """Return the bytes that matter of a DICOM file."""

    def element(group, number, uid):
        value = uid.encode() + b"\0" * (len(uid) % 2)
        return struct.pack("<HH2sH", group, number, b"UI", len(value)) + value

    inner = element(0x20, 0xE, nested) if nested else b""
    tail = element(0x20, 0xD, study) + element(0x20, 0xE, series)
    return b"\0" * 128 + b"DICM" + element(8, 0x18, "9.9") + inner + tail


def test_slides_are_listed_whatever_the_case_of_their_suffix(tmp_path):
    touch(tmp_path, "b.SVS", "a.tiff", "sub/c.NdPi", "notes.txt", ".hidden.svs", "._b.SVS")
    touch(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/Data0001.dat")
    found = find_slides(tmp_path)
    assert [(slide.name, slide.stem) for slide in found] == [
        ("a.tiff", "a"),
        ("b.SVS", "b"),
        ("m.mrxs", "m"),
        ("sub/c.NdPi", "sub/c"),
    ]
    assert all(slide.problem is None for slide in found)


def test_slides_that_would_share_an_output_keep_their_full_names(tmp_path, caplog):
    touch(tmp_path, "a.svs", "a.tif", "sub/a.svs")
    stems = {slide.name: slide.stem for slide in find_slides(tmp_path)}
    assert stems == {"a.svs": "a.svs", "a.tif": "a.tif", "sub/a.svs": "sub/a"}
    assert "a.svs, a.tif would share the output name a.h5" in caplog.text


def test_flat_pictures_are_slides_but_not_those_of_vms_slides(tmp_path):
    touch(tmp_path, "a.svs", "photo.PNG", "vms/b.vms", "vms/b-macro.jpg", "c/Scan.btf")
    found = [(slide.name, slide.stem, slide.problem) for slide in find_slides(tmp_path)]
    assert found == [
        ("a.svs", "a", None),
        ("c/Scan.btf", "c/Scan", None),
        ("photo.PNG", "photo", None),
        ("vms/b.vms", "vms/b", None),
    ]


def test_flat_pictures_beside_a_slide_of_their_name_are_none(tmp_path, caplog):
    touch(tmp_path, "a.svs", "a.jpg", "a.png", "sub/a.png", "b.png", "b.jpg")
    found = {slide.name: slide for slide in find_slides(tmp_path)}
    assert found["a.svs"].stem == "a"  # features of before are not made again under another name
    for name in ("a.jpg", "a.png"):
        assert f"{name} must be a slide, but is a flat picture beside a.svs" in found[name].problem
        assert found[name].stem == name
    assert {name: found[name].stem for name in ("b.png", "b.jpg", "sub/a.png")} == {
        "b.png": "b.png",
        "b.jpg": "b.jpg",
        "sub/a.png": "sub/a",
    }
    assert "b.jpg, b.png would share the output name b.h5" in caplog.text


def test_pictures_that_extract_has_drawn_are_no_slides(tmp_path):
    touch(tmp_path, "a.svs", "thumbnails/a.jpg", "out/thumbnails/sub/b.jpg", "sub/c.jpg")
    assert [slide.name for slide in find_slides(tmp_path)] == ["a.svs", "sub/c.jpg"]


def test_what_looks_like_a_slide_but_is_not_read_is_counted_in_one_warning(tmp_path, caplog):
    names = ["c.isyntax", "c.VSI", "c.lif", "c.nd2", "c.jp2", "c.webp", "sub/d.jp2"]
    touch(tmp_path, *names, "c.svs.part", "c.svs.gz", "b.zarr/zarr.json", "b.zarr/0/e.zarr/0.tif")
    touch(tmp_path, "notes.txt", "table.csv.gz", "readme")
    counts = (
        "1 x .isyntax, 2 x .jp2, 1 x .lif, 1 x .nd2, 1 x .svs.gz, 1 x .svs.part, "
        "1 x .vsi, 1 x .webp, 1 x .zarr"
    )
    with pytest.raises(UserError, match=f"there are none. It holds {counts}, which cannot be read"):
        find_slides(tmp_path)
    touch(tmp_path, "TCGA-1.uuid.svs")
    caplog.clear()
    assert [slide.name for slide in find_slides(tmp_path)] == ["TCGA-1.uuid.svs"]
    (record,) = caplog.records
    assert f"{counts} are left out" in record.getMessage()


def test_output_folder_and_circles_of_links_are_passed_by(tmp_path):
    touch(tmp_path, "a.svs", "out/thumbnails/a.jpg", "real/b.svs")
    (tmp_path / "real" / "circle").symlink_to(tmp_path)
    found = find_slides(tmp_path, skip=tmp_path / "out")
    assert [slide.name for slide in found] == ["a.svs", "real/b.svs"]


def test_links_to_folders_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/b.svs")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "link").symlink_to(tmp_path / "elsewhere")
    assert [slide.name for slide in find_slides(tmp_path / "slides")] == ["link/b.svs"]


def test_no_folder_and_no_slides_are_wrong_use(tmp_path):
    with pytest.raises(UserError, match="folder of slides must exist"):
        find_slides(tmp_path / "none")
    touch(tmp_path, "readme.txt", "photo.gif")
    with pytest.raises(UserError, match=r"must hold slides \(.*\.dcm.*\.svs"):
        find_slides(tmp_path)


def test_one_dicom_series_is_one_slide(tmp_path):
    for number, size in enumerate((10, 500, 100)):
        path = tmp_path / "case" / f"{number}.dcm"
        path.parent.mkdir(exist_ok=True)
        # Each file refers to another series in a nested sequence, as label files may.
        path.write_bytes(dicom("1.2.3", nested=f"7.7.{number}") + b"\0" * size)
    (found,) = find_slides(tmp_path)
    assert found == SlideFile(tmp_path / "case" / "1.dcm", "case", "case")


def test_two_dicom_series_in_a_folder_are_two_slides(tmp_path):
    for name, series in (("a", "1.2.3"), ("b", "1.2.4"), ("c", "1.2.3"), ("d", "1.2.34")):
        (tmp_path / f"{name}.DCM").write_bytes(dicom(series))
    assert [slide.name for slide in find_slides(tmp_path)] == ["1.2.3", "1.2.34", "1.2.4"]


def test_dicom_slides_at_the_top_are_named_after_the_folder(tmp_path):
    touch(tmp_path / "case7", "a.dcm")  # not even DICOM: opening it will say so
    assert [slide.name for slide in find_slides(tmp_path / "case7")] == ["case7"]


def test_a_link_to_nothing_is_a_slide_of_its_own(tmp_path):
    (tmp_path / "dcm").mkdir()
    (tmp_path / "dcm" / "b.dcm").write_bytes(dicom("1.2.3"))
    (tmp_path / "dcm" / "a.dcm").symlink_to(tmp_path / "gone.dcm")
    (tmp_path / "c.svs").symlink_to(tmp_path / "gone.svs")
    found = find_slides(tmp_path)
    assert [slide.name for slide in found] == ["c.svs", "dcm", "dcm/a.dcm"]
    assert slide_file(tmp_path / "dcm" / "b.dcm").path.name == "b.dcm"
    for slide in (found[0], found[2]):
        words = rf"^{slide.name} must be readable, but the system says: No such file or directory, "
        with pytest.raises(SlideError, match=words + r"and it is a link to .*gone\.(svs|dcm)\.$"):
            open_slide(slide.path, slide.name)


def make(paint, size=(4000, 3000), mpp=(0.5, 0.5), **options):
    handle = FakeHandle(size, paint, **options)
    return Slide(handle, "fake", Mpp(*mpp, "test")), handle


def gradient(x, y):
    pixels = np.zeros((*x.shape, 4), dtype=np.uint8)
    pixels[..., 0] = np.clip(np.round(x / 17.3), 0, 255)
    pixels[..., 1] = np.clip(np.round(y / 17.3), 0, 255)
    pixels[..., 3] = 255
    return pixels


@pytest.mark.parametrize("mpp", [(0.499, 0.499), (0.25, 0.26), (2.3, 2.3)])
@pytest.mark.parametrize("downsamples", [(1.0,), (1.0, 2.0004, 4.002)])
def test_a_pixel_shows_the_place_it_stands_for(mpp, downsamples):
    slide, _ = make(gradient, size=(4080, 4080), mpp=mpp, downsamples=downsamples)
    x_um, y_um, edge_um = 200.3, 100.7, 256.0
    tile = slide.read(x_um, y_um, edge_um, edge_um, (224, 224)).astype(float)
    centres_um = (np.arange(224) + 0.5) * edge_um / 224
    assert tile.shape == (224, 224, 3)
    np.testing.assert_allclose(tile[100, :, 0], (x_um + centres_um) / mpp[0] / 17.3, atol=1.01)
    np.testing.assert_allclose(tile[:, 100, 1], (y_um + centres_um) / mpp[1] / 17.3, atol=1.01)
    # Rounding hides small shifts in single pixels, not in the mean.
    assert tile[..., 0].mean() == pytest.approx((x_um + edge_um / 2) / mpp[0] / 17.3, abs=0.05)


@pytest.mark.parametrize("mpp", [0.499, 0.25])
def test_a_tile_looks_the_same_alone_and_in_a_block(mpp):
    slide, _ = make(checkered, mpp=(mpp, mpp))
    block = slide.read(0, 0, 512, 512, (448, 448)).astype(int)
    alone = slide.read(256, 256, 256, 256, (224, 224)).astype(int)
    assert np.abs(block[224:, 224:] - alone).max() <= 1
    assert alone.std() > 10  # there was something to see


def test_shrinking_is_antialiased():
    def stripes(x, y):  # one pixel black, one white: a naive reader sees one of them
        pixels = plain((0, 0, 0))(x, y)
        pixels[(x.astype(int) % 2) == 0, :3] = 255
        return pixels

    slide, _ = make(stripes, mpp=(0.25, 0.25))
    tile = slide.read(0, 0, 256, 256, (224, 224))
    assert 115 < tile.mean() < 140
    assert tile[:, 5:-5].std() < 12


def test_the_coarsest_level_that_is_fine_enough_is_read():
    slide, handle = make(plain((200, 100, 150)), mpp=(0.25, 0.25), downsamples=(1, 4, 16))
    slide.read(0, 0, 256, 256, (224, 224))  # wants 1.143; the levels have 0.25, 1 and 4
    slide.read(0, 0, 256, 256, (16, 16))  # wants 16
    slide.read(0, 0, 256, 256, (2240, 2240))  # wants 0.114
    assert [level for _, _, level, _, _ in handle.reads] == [1, 2, 0]


@given(st.floats(0.1, 2), st.floats(0.2, 50), st.lists(st.floats(1.5, 64), max_size=5))
def test_no_better_level_exists(mpp, wanted, more):
    downsamples = [1.0, *sorted(more)]
    slide, _ = make(plain((0, 0, 0)), mpp=(mpp, mpp), downsamples=downsamples)
    chosen = slide.level_for(wanted)
    for downsample in downsamples:
        if mpp * downsample <= wanted:
            assert downsample <= downsamples[chosen]
        assert chosen == 0 or mpp * downsamples[chosen] <= wanted * 1.0101


def test_transparent_pixels_get_the_background_colour():
    def half(x, y):
        pixels = plain((10, 20, 30))(x, y)
        pixels[x > 1000, 3] = 0  # outside of what was scanned; the colour there is black
        return pixels

    properties = {"openslide.background-color": "FFE0C0"}
    slide, _ = make(half, properties=properties)
    np.testing.assert_array_equal(slide.read(600, 0, 100, 100, (8, 8))[4, 4], (255, 224, 192))
    np.testing.assert_array_equal(slide.read(100, 0, 100, 100, (8, 8))[4, 4], (10, 20, 30))
    slide, _ = make(half)
    np.testing.assert_array_equal(slide.read(600, 0, 100, 100, (8, 8))[4, 4], (255, 255, 255))


def test_the_last_pixels_of_a_slide_can_be_read():
    slide, handle = make(plain((9, 9, 9)), size=(1001, 777), downsamples=(1, 4.01))
    assert slide.read(0, 0, slide.width_um, slide.height_um, (30, 20)).shape == (20, 30, 3)
    (_, _, level, width, height), limits = handle.reads[-1], handle.level_dimensions
    assert (width, height) <= limits[level]


def test_a_level_that_cannot_be_decoded_is_named():
    slide, _ = make(plain((0, 0, 0)), downsamples=(1, 4), broken=(1,), mpp=(0.25, 0.25))
    with pytest.raises(LevelError, match=r"fake must be readable.*level 1.*bad tile") as caught:
        slide.read(0, 0, 256, 256, (224, 224))
    assert caught.value.level == 1
    handle = FakeHandle((4000, 3000), plain((0, 0, 0)), (1, 4), broken=(1,))
    avoiding = Slide(handle, "fake", Mpp(0.25, 0.25, "test"), frozenset({1}))
    assert avoiding.read(0, 0, 256, 256, (224, 224)).shape == (224, 224, 3)


def test_files_that_are_no_slides_are_refused_in_one_sentence(tmp_path):
    touch(tmp_path, "text.svs")
    with pytest.raises(SlideError, match=r"text\.svs must be a slide that OpenSlide reads"):
        open_slide(tmp_path / "text.svs", "text.svs")
    (tmp_path / "empty.svs").write_bytes(b"")
    with pytest.raises(SlideError, match=r"empty\.svs .* the file is empty"):
        open_slide(tmp_path / "empty.svs", "empty.svs")


def test_a_real_file_gives_the_pixels_that_were_written(tmp_path):
    pixels = save_slide(tmp_path / "a.tif", 800, 1200, mpp=0.4)
    slide = open_slide(tmp_path / "a.tif", "a.tif")
    assert (slide.width_px, slide.height_px) == (1200, 800)
    assert slide.mpp.x == pytest.approx(0.4)
    picture = slide.read(0, 0, slide.width_um, slide.height_um, (1200, 800)).astype(int)
    assert np.abs(picture - pixels).mean() < 6  # JPEG
    slide.close()


def test_dicom_folder_of_the_shared_data_is_one_slide(caplog):
    folder = SHARED / "wsi" / "derived_dicom"
    if not folder.is_dir():
        pytest.skip("the shared data is not here")
    caplog.set_level(logging.WARNING)
    (found,) = find_slides(folder)
    handle = openslide.OpenSlide(found.path)
    assert found.path.name == "volume_2220.dcm"
    assert handle.dimensions == (2220, 2967)
    handle.close()
