import os

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from examples.pathology import features
from examples.pathology.errors import UserError
from examples.pathology.features import read_features, write_features
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
    assert (bag.extractor, bag.weights_sha256, bag.random_weights) == ("x-random-seed1", None, True)
    assert bag.path == path


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
    assert bag.extractor == extractor
    assert bag.weights_sha256 is None
    np.testing.assert_allclose(bag.coords_um[0, 0], first_um, rtol=1e-5)


@pytest.mark.parametrize("name", ["feats", "features", "patch_embeddings"])
def test_all_names_of_the_features_are_known(name, tmp_path):
    store(tmp_path / "a.h5", {"unit": "um"}, coords=np.zeros((2, 2)), **{name: np.ones((2, 4))})
    np.testing.assert_array_equal(read_features(tmp_path / "a.h5").feats, np.ones((2, 4)))


@pytest.mark.parametrize(
    ("coords", "attributes", "expected"),
    [
        ([[224, 448]], {"extractor": "STAMP-extract-001_x"}, [[256, 512]]),  # one tile, no stride
        ([[0, 0], [448, 0], [672, 224]], {}, [[0, 0], [512, 0], [768, 256]]),
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


def test_missing_and_truncated_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.h5 does not"):
        read_features(tmp_path / "none.h5")
    write(tmp_path / "a.h5")
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"complete HDF5 file, but .*cut\.h5 is not"):
        read_features(tmp_path / "cut.h5")


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

    monkeypatch.setattr(features, "publish", look)
    write(tmp_path / "a.h5")
    assert seen == [("a.h5", (3, 768))]
