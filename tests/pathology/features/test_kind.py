from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from examples.pathology.common.errors import UserError
from examples.pathology.features.kind import FeatureKind, refuse_other_features, together

KIND = FeatureKind(768, "ctranspath", "ab" * 32, 256.0, tile_size_px=224, magnification=20.0)
OTHER = {
    "in_features": 1024,
    "extractor": "uni",
    "weights_sha256": "cd" * 32,
    "tile_size_um": 128.0,
    "tile_size_px": 512,
    "random_weights": True,
    "simulated": "Features are SIMULATED.",
    "magnification": 5.0,
}
UNKNOWN = [
    {name: None} for name in ("weights_sha256", "tile_size_um", "tile_size_px", "magnification")
]


def refuse(trained: FeatureKind, found: FeatureKind) -> None:
    refuse_other_features(trained, found, Path("fold-1"), Path("features"))


def test_a_kind_comes_back_from_its_parts_whatever_stands_beside_them():
    kind = replace(KIND, simulated="Drawn.")
    assert FeatureKind.read({"best_epoch": 3, **asdict(kind)}) == kind
    with pytest.raises(KeyError, match="simulated"):
        FeatureKind.read({name: value for name, value in asdict(kind).items() if value != "Drawn."})


@pytest.mark.parametrize("name", ["tile_size_px", "magnification"])
def test_runs_of_releases_that_did_not_tell_all_of_the_tiles_are_read(name):
    stored = asdict(KIND)
    del stored[name]
    assert FeatureKind.read(stored) == replace(KIND, **{name: None})


@pytest.mark.parametrize(
    ("um", "px", "seen", "words"),
    [(112.0, 224, None, ", tiles of 112 um in 224 px"), (256.0, None, None, ", tiles of 256 um"),
     (None, 512, None, ", tiles in 512 px"), (None, None, None, ""),
     (None, 256, 20.0, ", tiles in 256 px at 20x"), (None, None, 1.25, ", tiles at 1.25x")],
)  # fmt: skip
def test_a_kind_says_how_large_tiles_are_as_far_as_it_knows(um, px, seen, words):
    kind = replace(KIND, tile_size_um=um, tile_size_px=px, magnification=seen)
    assert kind.tiles == words
    assert f"abababab{words})" in str(kind)


@pytest.mark.parametrize("name", [field.name for field in fields(FeatureKind)])
def test_every_part_tells_kinds_apart_and_is_refused_by_a_model(name):
    other = replace(KIND, **{name: OTHER[name]})
    assert not KIND.agrees(other)
    assert not other.agrees(KIND)
    assert str(KIND) != str(other)
    with pytest.raises(UserError, match="that the model was trained on"):
        refuse(KIND, other)


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_what_one_does_not_tell_is_no_difference_and_the_other_tells_it(unknown, caplog):
    silent = replace(KIND, **unknown)
    assert KIND.agrees(silent)
    assert silent.agrees(KIND)
    assert together([silent, KIND]) == together([KIND, silent]) == KIND
    refuse(KIND, silent)
    assert "does not tell the" in caplog.text


def test_simulations_of_other_labels_are_one_kind_for_a_model_but_do_not_mix():
    drawn, real = (replace(KIND, simulated=f"Labels are {word}.") for word in ("DRAWN", "real"))
    assert not drawn.agrees(real)
    refuse(drawn, real)
