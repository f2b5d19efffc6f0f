import errno
import os

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from examples.pathology.common import files as common_files
from examples.pathology.common.errors import UserError
from examples.pathology.features import files as features
from examples.pathology.features.files import (
    OfSlide,
    UnavailableError,
    read_features,
    write_features,
)
from examples.pathology.features.kind import FeatureKind
from tests.pathology.holding import held
from tests.pathology.slide_helpers import SHARED

BAGS = SHARED / "bags"


def write(path, feats=None, coords=None, **options):
    feats = np.ones((3, 768)) if feats is None else feats
    coords = np.arange(6).reshape(3, 2) * 256.0 if coords is None else coords
    defaults = {"extractor": "ctranspath", "weights_sha256": "ab12", "random_weights": False}
    write_features(path, feats, coords, **(defaults | options))


def store(path, attributes=None, **datasets):
    """Write a feature file as another program would."""
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(attributes or {})


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.just(8)), elements=st.floats(-9, 9, width=16)
    )
)
def test_what_was_written_is_read(tmp_path_factory, feats):
    path = tmp_path_factory.mktemp("bag") / "sub" / "a.h5"
    coords = np.arange(2 * len(feats)).reshape(-1, 2) * 256.0
    write(path, feats, coords, random_weights=True, weights_sha256=None, extractor="x-random-seed1")
    bag = read_features(path)
    np.testing.assert_array_equal(bag.feats, feats)  # float16 holds these values exactly
    np.testing.assert_array_equal(bag.coords_um, coords)
    assert (bag.feats.dtype, bag.coords_um.dtype) == (np.float32, np.float32)
    kind = FeatureKind(8, "x-random-seed1", None, 256.0, random_weights=True, tile_size_px=224)
    assert bag.kind == kind


def test_the_layout_is_the_one_that_stamp_reads(tmp_path):
    write(tmp_path / "a.h5", provenance={"version": "0.1.0"})
    with h5py.File(tmp_path / "a.h5") as file:
        assert {name: (file[name].dtype.str, file[name].shape) for name in file} == {
            "feats": ("<f2", (3, 768)),
            "coords": ("<f4", (3, 2)),
            "augmented": ("|b1", (3,)),
        }
        attributes = dict(file.attrs)
    assert not any(attributes.pop("augmented", []))
    assert attributes == {
        "extractor": "ctranspath",
        "unit": "um",
        "tile_size": 256.0,
        "tile_size_um": 256.0,
        "tile_size_px": 224,
        "feat_type": "tile",
        "stamp_version": "2.0.0",
        "mtbalance_weights_sha256": "ab12",
        "mtbalance_random_weights": False,
        "mtbalance_version": "0.1.0",
    }


@pytest.mark.parametrize(
    ("name", "extractor", "first_um", "tiles"),
    [
        ("stamp_v1_example", "STAMP-extract-001_01-10-2023_xiyuewang-ctranspath-7c998680", 256, 15),
        ("stamp_v2.0_example", "ctranspath-01234567", 256.486, 18),
        ("stamp_v2.5_example", "ctranspath", 256.486, 18),
        ("trident_example", "ctranspath", np.nan, 18),
        ("clam_example", "", np.nan, 18),
    ],
)
def test_files_of_other_programs_are_read(name, extractor, first_um, tiles):
    path = BAGS / f"{name}.h5"
    if not path.is_file():
        pytest.skip("the shared data is not here")
    bag = read_features(path)
    assert bag.feats.shape == (tiles, 768)
    assert bag.kind.extractor == extractor
    assert bag.kind.weights_sha256 is None
    assert bag.kind.magnification == (10.0 if name == "trident_example" else None)
    np.testing.assert_allclose(bag.coords_um[0, 0], first_um, rtol=1e-5)


# Three tiles of 256 um at (256, 0), (512, 0) and (256, 512) um on a slide of 0.5 um per pixel, as
# each program would write them.
CORNERS_UM = np.array([[256.0, 0.0], [512.0, 0.0], [256.0, 512.0]])
V1_NAME = "STAMP-extract-001_01-10-2023_xiyuewang-ctranspath-7c998680"
V2 = {"extractor": "ctranspath", "unit": "um", "stamp_version": "2.0.0"}
HALF = np.arange(24, dtype=np.float16).reshape(3, 8)


def stamp_v1(path, rows=slice(None)):
    coords = (CORNERS_UM / 256 * 224).astype(np.int64)[rows]
    flags = np.zeros(len(coords), dtype=bool)
    store(path, {"extractor": V1_NAME}, feats=HALF[rows], coords=coords, augmented=flags)


def stamp_v1_of_one_tile(path):
    stamp_v1(path, slice(1))


def stamp_v20(path):
    coords = CORNERS_UM.astype(np.float32)
    store(path, V2 | {"tile_size": 256.0}, feats=HALF, coords=coords)


def stamp_v25(path):
    sizes = {"tile_size_um": 256.0, "tile_size_px": 224, "feat_type": "tile", "code_hash": "1a2b"}
    store(path, V2 | {"stamp_version": "2.5.0"} | sizes, feats=HALF, coords=CORNERS_UM)


def trident(path):
    coords = (CORNERS_UM / 0.5).astype(np.int64)
    store(path, features=HALF.astype(np.float32), coords=coords)
    with h5py.File(path, "a") as file:
        file["features"].attrs["encoder"] = "ctranspath"
        file["coords"].attrs.update(
            {"patch_size": 224, "patch_size_level0": 512, "level0_magnification": 20, "overlap": 0}
        )


def clam(path):
    coords = (CORNERS_UM / 0.5).astype(np.int32)
    store(path, features=HALF.astype(np.float32), coords=coords)


@pytest.mark.parametrize(
    ("layout", "extractor", "um", "px"),
    [
        (stamp_v1, V1_NAME, 256.0, 224),
        (stamp_v1_of_one_tile, V1_NAME, 256.0, 224),
        (stamp_v20, "ctranspath", 256.0, None),
        (stamp_v25, "ctranspath", 256.0, 224),
        (trident, "ctranspath", 256.0, 224),
        (clam, "", None, None),
    ],
)
def test_every_known_layout_is_read(layout, extractor, um, px, tmp_path):
    layout(tmp_path / "a.h5")
    bag = read_features(tmp_path / "a.h5", mpp=0.5)
    np.testing.assert_array_equal(bag.coords_um, CORNERS_UM[: len(bag.feats)])
    np.testing.assert_array_equal(bag.feats, HALF[: len(bag.feats)])
    kind = bag.kind
    assert (kind.extractor, kind.tile_size_um, kind.tile_size_px) == (extractor, um, px)
    assert bag.kind.weights_sha256 is None
    assert not bag.kind.random_weights


@pytest.mark.parametrize(
    ("told", "magnification"),
    [
        ({"target_magnification": 5, "level0_magnification": 40, "patch_size_level0": 2048}, 5.0),
        ({"level0_magnification": 40, "patch_size_level0": 512}, 20.0),
        ({"level0_magnification": 40, "patch_size_level0": 682}, 15.0),  # 682.67 px, cut off
        ({"target_magnification": "None", "level0_magnification": -1}, None),
        ({"level0_magnification": 0, "patch_size_level0": 512}, None),
        ({"patch_size_level0": 512}, None),
        ({}, None),
    ],
)
def test_the_magnification_is_known_where_trident_tells_it(told, magnification, tmp_path):
    store(tmp_path / "a.h5", features=np.ones((2, 4)), coords=np.zeros((2, 2), dtype=np.int64))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["coords"].attrs.update({"patch_size": 256, **told})
    kind = read_features(tmp_path / "a.h5").kind
    assert (kind.magnification, kind.tile_size_px) == (magnification, 256)


@pytest.mark.parametrize("layout", [trident, clam])
def test_each_axis_of_a_slide_has_its_own_size_of_pixels(layout, tmp_path):
    layout(tmp_path / "a.h5")
    bag = read_features(tmp_path / "a.h5", mpp=(0.25, 0.27))
    np.testing.assert_allclose(bag.coords_um, CORNERS_UM / 0.5 * (0.25, 0.27), rtol=1e-6)


@pytest.mark.parametrize("layout", [trident, clam])
def test_pixels_of_a_slide_are_no_microns_until_somebody_says_how_large_they_are(layout, tmp_path):
    layout(tmp_path / "a.h5")
    bag = read_features(tmp_path / "a.h5")
    assert np.isnan(bag.coords_um).all()
    assert bag.kind.tile_size_um is None


def coords_as_stamp_v2_reads(path):
    """The rule of STAMP 2's reader, in its order; it refuses files of a newer release."""
    with h5py.File(path) as file:
        attributes, coords = dict(file.attrs), file["coords"][:]
        assert file["feats"].dtype == np.float16
        assert tuple(map(int, attributes.get("stamp_version", "0").split("."))) <= (2, 0, 0)
        if "tile_size" in attributes and attributes.get("unit") == "um":
            return coords, attributes["tile_size"]
        if "tile_size_um" in attributes:
            return coords, attributes["tile_size_um"]
        size = attributes.get("tile_size") or min(
            step for axis in coords.T for step in np.diff(np.unique(axis))
        )
        assert round(size) == 224
        return coords / 224 * 256, 256.0


@pytest.mark.parametrize("layout", ["stamp-v2", "stamp-v1"])
@pytest.mark.parametrize("tiles", [1, 3])
def test_stamp_2_reads_what_we_write(layout, tiles, tmp_path):
    write(tmp_path / "a.h5", HALF[:tiles], CORNERS_UM[:tiles], layout=layout)
    coords, size = coords_as_stamp_v2_reads(tmp_path / "a.h5")
    np.testing.assert_allclose(coords, CORNERS_UM[:tiles])
    assert size == 256.0
    bag = read_features(tmp_path / "a.h5")
    np.testing.assert_array_equal(bag.coords_um, CORNERS_UM[:tiles])
    assert (bag.kind.tile_size_um, bag.kind.tile_size_px) == (256.0, 224)
    assert bag.kind.weights_sha256 == "ab12"  # our own attributes are there in every layout


def test_the_old_layout_is_what_stamp_1_writes(tmp_path):
    write(tmp_path / "ours.h5", HALF, CORNERS_UM, layout="stamp-v1", extractor=V1_NAME)
    stamp_v1(tmp_path / "theirs.h5")
    with h5py.File(tmp_path / "ours.h5") as ours, h5py.File(tmp_path / "theirs.h5") as theirs:
        assert set(ours) == set(theirs)
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
        more = {name for name in ours.attrs if not name.startswith("mtbalance_")}
        assert more == {"extractor", "tile_size"}
    with pytest.raises(UserError, match="`layout` must be one of stamp-v2, stamp-v1"):
        write(tmp_path / "a.h5", layout="v1")


def test_other_tile_sizes_are_written_and_read(tmp_path):
    write(tmp_path / "a.h5", tile_size_um=128.0, tile_size_px=256)
    kind = read_features(tmp_path / "a.h5").kind
    assert (kind.tile_size_um, kind.tile_size_px) == (128.0, 256)
    assert "tiles of 128 um in 256 px" in str(kind)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["tile_size_px"] == 256


@pytest.mark.parametrize("name", ["feats", "features", "patch_embeddings"])
def test_all_names_of_the_features_are_known(name, tmp_path):
    store(tmp_path / "a.h5", {"unit": "um"}, coords=np.zeros((2, 2)), **{name: np.ones((2, 4))})
    np.testing.assert_array_equal(read_features(tmp_path / "a.h5").feats, np.ones((2, 4)))


@pytest.mark.parametrize(
    ("coords", "attributes", "expected"),
    [
        ([[224, 448]], {"extractor": "STAMP-extract-001_x"}, [[256, 512]]),  # one tile, no stride
        ([[0, 0], [448, 0], [672, 224]], {}, [[0, 0], [512, 0], [768, 256]]),
        ([[224, 448]], {"tile_size": 224.0}, [[256, 512]]),
        ([[0, 0], [512, 512]], {}, [[np.nan] * 2] * 2),  # pixels of who knows what size
        ([[0, 0], [224, 0]], {"unit": "um"}, [[0, 0], [224, 0]]),
        ([[0, 0], [224, 0]], {"tile_size_um": 256.0}, [[0, 0], [224, 0]]),
    ],
)
def test_coordinates_come_in_um(coords, attributes, expected, tmp_path):
    path = tmp_path / "a.h5"
    store(path, attributes, coords=np.array(coords), feats=np.ones((len(coords), 4)))
    np.testing.assert_allclose(read_features(path).coords_um, expected)


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ({"coords": np.zeros((2, 2))}, "must hold `coords` and one of feats"),
        ({"feats": np.ones((2, 4))}, "holds feats"),
        ({"feats": np.ones((2, 4)), "coords": np.zeros((3, 2))}, r"\(2, 4\) and\s+\(3, 2\)"),
        ({"feats": np.ones(4), "coords": np.zeros((4, 2))}, r"must be \(n, d\)"),
        ({"feats": np.full((1, 4), np.nan), "coords": np.zeros((1, 2))}, "must be finite"),
    ],
)
def test_unusable_files_are_refused_by_name(datasets, words, tmp_path):
    path = tmp_path / "odd.h5"
    store(path, **datasets)
    with pytest.raises(UserError, match=words) as caught:
        read_features(path)
    assert "odd.h5" in str(caught.value)


@pytest.mark.parametrize(
    ("coords", "attributes"),
    [
        (np.full((2, 2), b"left"), {"unit": "um"}),
        (np.zeros((2, 2)), {"unit": "um", "tile_size_px": [224, 224]}),
        (np.zeros((2, 2)), {"unit": "um", "tile_size_um": "large"}),
    ],
)
def test_what_is_no_number_is_refused_by_name(coords, attributes, tmp_path):
    path = tmp_path / "odd.h5"
    store(path, attributes, feats=np.ones((2, 4)), coords=coords)
    with pytest.raises(UserError, match=r"must hold numbers as .*, but .*odd\.h5 does not \("):
        read_features(path)


def test_a_file_tells_what_it_knows_of_its_slide(tmp_path):
    write(tmp_path / "a.h5")
    assert read_features(tmp_path / "a.h5").slide == OfSlide()
    earlier = {"slide": "a.svs", "slide_mpp": 0.25, "slide_mpp_source": "openslide.mpp-x"}
    write(tmp_path / "a.h5", provenance=earlier)
    said = OfSlide("a.svs", None, (0.25,), "openslide.mpp-x")
    assert read_features(tmp_path / "a.h5").slide == said
    sizes = {"slide_width_px": 300, "slide_height_px": 200, "slide_mpp_y": 0.26}
    write(tmp_path / "a.h5", provenance={**earlier, **sizes})
    said = OfSlide("a.svs", (300, 200), (0.25, 0.26), "openslide.mpp-x")
    assert read_features(tmp_path / "a.h5").slide == said


def test_missing_and_truncated_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.h5 does not"):
        read_features(tmp_path / "none.h5")
    write(tmp_path / "a.h5")
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    words = r"complete HDF5 file, but .*cut\.h5 is not .*If it is not being written or copied"
    with pytest.raises(UserError, match=words) as caught:
        read_features(tmp_path / "cut.h5")
    assert "elete" not in str(caught.value)


def test_a_file_that_another_process_writes_is_in_use_and_not_damaged(tmp_path):
    path = tmp_path / "a.h5"
    write(path)
    with held(path), pytest.raises(UnavailableError, match=r"a\.h5 is in use by another") as caught:
        read_features(path)
    assert "elete" not in str(caught.value)
    assert read_features(path).feats.all()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(errno.EACCES, "unable to open"),
            r"a\.h5 the system says: Permission denied",
        ),
        (
            OSError(errno.ENOLCK, "unable to lock file"),
            r"a\.h5 the system says: No locks available",
        ),
        (OSError("file is already open for write (may use h5clear)"), r"a\.h5 is in use"),
    ],
)
def test_a_file_that_the_system_does_not_give_is_not_damaged(tmp_path, monkeypatch, error, words):
    def refuse(*_):
        raise error

    write(tmp_path / "a.h5")
    monkeypatch.setattr(features.h5py, "File", refuse)
    with pytest.raises(UnavailableError, match=words):
        read_features(tmp_path / "a.h5")


def test_wrong_shapes_and_overflow_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"got \(3, 768\) and\s+\(2, 2\)"):
        write(tmp_path / "a.h5", coords=np.zeros((2, 2)))
    with pytest.raises(UserError, match="below 65504"), np.errstate(over="ignore"):
        write(tmp_path / "a.h5", feats=np.full((3, 768), 1e6))
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    write(path)

    def no_power(descriptor):
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", no_power)
    with pytest.raises(OSError, match="no power"):
        write(path, feats=np.zeros((3, 768)))
    assert read_features(path).feats.all()
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]


def test_the_file_is_closed_before_it_gets_its_name(tmp_path, monkeypatch):
    seen = []

    def look(temporary, path):
        with h5py.File(temporary, "r+") as file:  # fails while somebody has it open for writing
            seen.append((path.name, file["feats"].shape))
        temporary.replace(path)

    monkeypatch.setattr(common_files, "publish", look)
    write(tmp_path / "a.h5")
    assert seen == [("a.h5", (3, 768))]
