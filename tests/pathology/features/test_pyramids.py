"""One picture as several slides: whatever a file says about its pixels, the tiles are the same."""

import json

import cv2
import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from examples.pathology.extractors.extractor import Extractor
from examples.pathology.features import extraction
from examples.pathology.features.files import read_features
from tests.pathology.slide_helpers import SHARED, extract, tissue

MPP = 0.499
OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/'
    '2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" PhysicalSizeX="{0}" PhysicalSizeY="{0}" '
    'PhysicalSizeXUnit="µm" PhysicalSizeYUnit="µm"/></Image></OME>'
)


def write(path, pixels, *, resolution=(1, 1), unit="NONE", description="", levels=3):
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            if level:
                size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            file.write(
                pixels,
                photometric="rgb",
                compression="zlib",
                tile=(256, 256),
                subfiletype=int(level > 0),
                resolution=tuple(value / 2**level for value in resolution),
                resolutionunit=unit,
                description=description.encode(),
                metadata=None,
            )


@pytest.fixture
def network(monkeypatch):
    def build(name, weights, seed, options, tile_px):
        model = torch.nn.Sequential(torch.nn.AvgPool2d(28), torch.nn.Flatten())
        return Extractor(model, lambda t: t.permute(0, 3, 1, 2).float() / 255, name, "ab")

    monkeypatch.setattr(extraction, "make_extractor", build)


def picture():
    pixels = tissue(1900, 2300, seed=3)
    pixels[:, :600] = 246  # glass
    pixels[1100:, 1700:] = (214, 150, 190)  # tissue without edges
    return pixels


def test_a_slide_is_the_same_whatever_tells_its_resolution(tmp_path, network):
    folder, pixels = tmp_path / "in", picture()
    folder.mkdir()
    per_cm = (1e4 / MPP,) * 2
    write(folder / "cm.tif", pixels, resolution=per_cm, unit="CENTIMETER")
    write(folder / "inch.tif", pixels, resolution=(25_400 / MPP,) * 2, unit="INCH")
    write(folder / "xml.tif", pixels, description=OME.format(MPP))
    write(folder / "table.tif", pixels)
    write(folder / "default.tif", pixels)
    write(folder / "placeholder.tif", pixels, resolution=(72, 72), unit="INCH")
    write(folder / "flat.tif", pixels, resolution=per_cm, unit="CENTIMETER", levels=1)
    (tmp_path / "t.csv").write_text(f"FILENAME,MPP\ntable,{MPP}\n")
    summary = extract(
        folder,
        tmp_path / "out",
        weights=None,
        device="cpu",
        slide_table=tmp_path / "t.csv",
        default_mpp=MPP,
    )
    rows = {row.slide: row for row in summary.rows}
    assert {name: row.mpp_source for name, row in rows.items() if row.status == "ok"} == {
        "cm.tif": "openslide.mpp-x",
        "inch.tif": "openslide.mpp-x",
        "xml.tif": "openslide.comment PhysicalSizeX",
        "table.tif": "slide table",
        "default.tif": "default",
        "placeholder.tif": "default",
        "flat.tif": "openslide.mpp-x",
    }
    assert summary.failed == 0
    bags = {end: read_features(tmp_path / "out" / f"{end}.h5") for end in ("cm", "flat")}
    # 4 x 3 tiles of 513.03 px: the left column is glass, and one tile has no edges. The overhang of
    # 248 px on the right and 361 px at the bottom gives none.
    expected = [(x * 256.0, y * 256.0) for y in range(3) for x in (1, 2, 3)][:-1]
    assert [tuple(corner) for corner in bags["cm"].coords_um] == expected
    for end in ("inch", "xml", "table", "default", "placeholder"):
        bag = read_features(tmp_path / "out" / f"{end}.h5")
        np.testing.assert_array_equal(bag.coords_um, bags["cm"].coords_um)
        np.testing.assert_array_equal(bag.feats, bags["cm"].feats)
    # Read from level 0 instead of 1, the pixels differ by the resampling alone.
    np.testing.assert_array_equal(bags["flat"].coords_um, bags["cm"].coords_um)
    np.testing.assert_allclose(bags["flat"].feats, bags["cm"].feats, atol=0.01)


def test_features_are_the_same_whatever_reads_the_slide(tmp_path, network):
    folder, out, pixels = tmp_path / "in", tmp_path / "out", picture()[:1100, 500:1700]
    folder.mkdir()
    mpp = 0.5  # which all formats can tell exactly
    per_cm = (1e4 / mpp,) * 2
    write(folder / "tiled.tif", pixels, resolution=per_cm, unit="CENTIMETER", levels=1)
    tags = {"resolution": per_cm, "resolutionunit": "CENTIMETER", "compression": "lzw"}
    tifffile.imwrite(folder / "strips.tif", pixels, photometric="rgb", **tags)
    sizes = {f"PhysicalSize{axis}": mpp for axis in "XY"}
    planes = np.moveaxis(pixels, -1, 0)
    with tifffile.TiffWriter(folder / "planes.ome.tif", bigtiff=True) as file:
        axes = {"axes": "CYX", **sizes}
        file.write(planes, photometric="rgb", planarconfig="separate", metadata=axes)
    Image.fromarray(pixels).save(folder / "flat.png", dpi=(25_400 / mpp,) * 2)
    Image.fromarray(pixels).save(folder / "table.bmp")
    (tmp_path / "t.csv").write_text(f"FILENAME,MPP\ntable.bmp,{mpp}\n")
    options = {"weights": None, "device": "cpu", "slide_table": tmp_path / "t.csv"}
    summary = extract(folder, out, **options)
    assert [(row.slide, row.reader, row.mpp_source) for row in summary.rows[::2]] == [
        ("flat.png", "Pillow", "dpi-x"),
        ("planes.ome.tif", "tifffile", "tiff.ImageDescription PhysicalSizeX"),
        ("strips.tif", "tifffile", "tiff.XResolution"),
        ("table.bmp", "Pillow", "slide table"),
        ("tiled.tif", "OpenSlide", "openslide.mpp-x"),
    ]
    expected = read_features(out / "tiled.h5")
    assert len(expected.feats) == 4  # 2 x 2 of 512 px
    for name in ("flat", "planes.ome", "strips", "table"):
        bag = read_features(out / f"{name}.h5")
        np.testing.assert_array_equal(bag.coords_um, expected.coords_um)
        np.testing.assert_array_equal(bag.feats, expected.feats)
        with h5py.File(out / f"{name}.h5") as stored:
            reader = "tifffile" if name in ("planes.ome", "strips") else "Pillow"
            assert stored.attrs["mtbalance_slide_reader"] == reader
    with h5py.File(out / "tiled.h5", "a") as stored:  # as an earlier release made it
        parameters = json.loads(stored.attrs["mtbalance_parameters"])
        assert parameters.pop("slide_reader") == "OpenSlide"
        stored.attrs["mtbalance_parameters"] = json.dumps(parameters)
        del stored.attrs["mtbalance_slide_reader"]
    again = extract(folder, out, **options)
    assert again.skipped == 5
    readers = [(row.slide, row.reader) for row in summary.rows]
    assert [(row.slide, row.reader) for row in again.rows] == readers


def test_features_are_those_of_the_tissue_at_that_place(tmp_path, network):
    (tmp_path / "in").mkdir()
    pixels = picture()
    write(tmp_path / "in" / "a.tif", pixels, resolution=(1e4 / MPP,) * 2, unit="CENTIMETER")
    extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu")
    bag = read_features(tmp_path / "out" / "a.h5")
    for corner, feats in zip(bag.coords_um, bag.feats, strict=True):
        for number in (0, 9, 63):  # an eighth of a tile, 32 um, each
            row, column = divmod(number, 8)
            x, y = (round((corner[i] + 32 * (column, row)[i]) / MPP) for i in (0, 1))
            part = pixels[y : y + 64, x : x + 64].mean(axis=(0, 1)) / 255
            np.testing.assert_allclose(feats.reshape(3, 64)[:, number], part, atol=0.02)


def test_the_shared_pyramids_give_the_tiles_of_their_source(tmp_path, network):
    if not (SHARED / "wsi").is_dir():
        pytest.skip("the shared data is not here")
    (tmp_path / "in").mkdir()
    names = ["cmu-1-small-region.svs", *(f"derived_pyramid_{e}.tif" for e in ("cm", "inch", "xml"))]
    for name in names:
        (tmp_path / "in" / name).symlink_to(SHARED / "wsi" / name)
    extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu")
    source, *copies = (read_features(tmp_path / "out" / f"{n.split('.')[0]}.h5") for n in names)
    for bag in copies:
        np.testing.assert_array_equal(bag.coords_um, source.coords_um)
        np.testing.assert_allclose(bag.feats, source.feats, atol=0.02)  # JPEG, compressed twice
