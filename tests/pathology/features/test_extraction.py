import csv
import json
import logging
import shutil
from functools import partial

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from examples.pathology.common.errors import UserError
from examples.pathology.extractors.extractor import Extractor
from examples.pathology.features import extraction
from examples.pathology.features.files import read_features
from examples.pathology.features.provenance import sample_sha256
from examples.pathology.settings.extract import ExtractConfig, TileRules
from examples.pathology.slides import slide as slides
from tests.pathology.holding import held
from tests.pathology.slide_helpers import (
    SHARED,
    FakeHandle,
    checkered,
    extract,
    plain,
    save_slide,
    tissue,
)


class Colours(nn.Module):
    """A cheap network: the mean colour of a tile, repeated; counts its calls."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.fail_at = None

    def forward(self, tiles):
        self.batches.append(len(tiles))
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        return tiles.mean(dim=(1, 2)).repeat(1, 256)


@pytest.fixture
def network(monkeypatch):
    model = Colours()

    def build(name, weights, seed, options, tile_px):
        name = name if weights else f"{name}-random-seed{seed}"
        return Extractor(model, lambda t: t.float() / 255, name, "ab" if weights else None)

    monkeypatch.setattr(extraction, "make_extractor", build)
    return model


def run(folder, out, **options):
    return extract(folder, out, **({"weights": None, "workers": 2, "device": "cpu"} | options))


def rows_of(out):
    """Return the ledger's rows by slide and stage."""
    with (out / "ledger.csv").open(encoding="utf-8") as file:
        return {(row["slide"], row["stage"]): row for row in csv.DictReader(file)}


def ledger(out):
    """Return the last row of each slide: the stage where it ended."""
    return {slide: row for (slide, _), row in rows_of(out).items()}


def test_a_slide_becomes_features_a_picture_and_a_ledger_row(tmp_path, network):
    # 4 x 3 tiles of 512 px; the left column is glass.
    pixels = save_slide(tmp_path / "in" / "sub" / "a.TIF", 1600, 2100, white_left=512)
    summary = run(tmp_path / "in", tmp_path / "out", batch_size=4)
    bag = read_features(tmp_path / "out" / "sub" / "a.h5")
    expected = [(x * 256.0, y * 256.0) for y in range(3) for x in (1, 2, 3)]  # row by row
    assert bag.coords_um.tolist() == [list(corner) for corner in expected]
    for (x, y), feats in zip(bag.coords_um, bag.feats, strict=True):
        part = pixels[int(2 * y) : int(2 * y) + 512, int(2 * x) : int(2 * x) + 512]
        np.testing.assert_allclose(feats[:3], part.mean(axis=(0, 1)) / 255, atol=0.01)
    assert network.batches == [4, 4, 1]
    assert (tmp_path / "out" / "thumbnails" / "sub" / "a.jpg").stat().st_size > 1000
    header = (tmp_path / "out" / "ledger.csv").read_text().splitlines()[0]
    assert header == (
        "slide,stage,status,reason,tiles_total,tiles_kept,mpp,mpp_source,seconds,reader"
    )
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [("sub/a.TIF", "tiling"), ("sub/a.TIF", "features")]
    for row in rows.values():
        assert (row["status"], row["reason"]) == ("ok", "")
        assert (row["tiles_total"], row["tiles_kept"], row["mpp"]) == ("12", "9", "0.5")
        assert row["mpp_source"] == "openslide.mpp-x"
        assert float(row["seconds"]) > 0
    assert (summary.slides, summary.tiled, summary.done, summary.exit_code) == (1, 1, 1, 0)
    assert sum(float(row["seconds"]) for row in rows.values()) < summary.seconds + 0.01
    assert not list(tmp_path.rglob("*.tmp"))


def test_tiles_of_another_size_are_cut_written_and_told(tmp_path, network):
    pixels = save_slide(tmp_path / "in" / "a.tif", 1600, 2100)  # of 0.5 um
    rules = TileRules(tile_size_um=160.0, tile_size_px=80)  # 320 px of the slide
    run(tmp_path / "in", tmp_path / "out", rules=rules)
    bag = read_features(tmp_path / "out" / "a.h5")
    assert (bag.kind.tile_size_um, bag.kind.tile_size_px) == (160.0, 80)
    assert bag.coords_um.tolist() == [[x * 160.0, y * 160.0] for y in range(5) for x in range(6)]
    for (x, y), feats in zip(bag.coords_um, bag.feats, strict=True):
        part = pixels[int(2 * y) : int(2 * y) + 320, int(2 * x) : int(2 * x) + 320]
        np.testing.assert_allclose(feats[:3], part.mean(axis=(0, 1)) / 255, atol=0.01)
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        assert (file.attrs["tile_size"], file.attrs["tile_size_px"]) == (160.0, 80)
    assert run(tmp_path / "in", tmp_path / "out", rules=rules).skipped == 1


def test_a_size_that_the_network_does_not_take_is_told_before_slides_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").touch()  # would be a failure in the ledger
    with pytest.raises(UserError, match="ctranspath takes tiles of 224 px"):
        run(tmp_path / "in", tmp_path / "out", rules=TileRules(tile_size_px=256))
    assert not (tmp_path / "out" / "ledger.csv").exists()


def test_random_weights_are_written_all_over_the_file(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif")
    run(tmp_path / "in", tmp_path / "out", seed=7)
    bag = read_features(tmp_path / "out" / "a.h5")
    assert bag.kind.random_weights
    assert bag.kind.extractor == "ctranspath-random-seed7"
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        attributes = dict(file.attrs)
    assert attributes["mtbalance_random_weights"]
    assert attributes["mtbalance_slide"] == "a.tif"
    assert attributes["mtbalance_precision"] == "float32"
    assert attributes["mtbalance_slide_mpp"] == pytest.approx(0.5)
    parameters = json.loads(attributes["mtbalance_parameters"])
    assert parameters["brightness_cutoff"] == 240
    assert parameters["min_edge_share"] == 0.02


def test_the_result_does_not_depend_on_threads_or_batches(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif", 2600, 2600)
    results = []
    for number, options in enumerate(({"workers": 1, "batch_size": 1}, {"workers": 4})):
        run(tmp_path / "in", tmp_path / str(number), **options)
        results.append(read_features(tmp_path / str(number) / "a.h5"))
    np.testing.assert_array_equal(results[0].feats, results[1].feats)
    np.testing.assert_array_equal(results[0].coords_um, results[1].coords_um)
    assert len(results[0].feats) == 25


def bad_folder(folder):
    save_slide(folder / "b_good.tif")
    folder.joinpath("a_text.svs").write_text("no slide")
    folder.joinpath("c_empty.svs").write_bytes(b"")
    save_slide(folder / "d_glass.tif", white_left=1100)
    save_slide(folder / "e_small.tif", 300, 300)
    Image.fromarray(tissue(1100, 1100)).save(folder / "f_flat.png", dpi=(72, 72))
    save_slide(folder / "g_mpp.tif", mpp=352.8)


def test_bad_slides_get_rows_and_stop_nothing(tmp_path, network, caplog):
    bad_folder(tmp_path / "in")
    summary = run(tmp_path / "in", tmp_path / "out")
    rows = ledger(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {
        "a_text.svs": "failed",
        "b_good.tif": "ok",
        "c_empty.svs": "failed",
        "d_glass.tif": "empty",
        "e_small.tif": "empty",
        "f_flat.png": "excluded",
        "g_mpp.tif": "failed",
    }
    assert "OpenSlide reads" in rows["a_text.svs"]["reason"]
    assert rows["d_glass.tif"]["reason"] == "no tile left: 4 of 4 are glass, 0 have too few edges"
    assert "the slide is 150 x 150 um" in rows["e_small.tif"]["reason"]
    for name in ("f_flat.png", "g_mpp.tif"):
        assert "a placeholder, 352." in rows[name]["reason"]
    assert (summary.done, summary.empty, summary.excluded, summary.failed) == (1, 2, 1, 3)
    assert summary.exit_code == 1
    assert [path.name for path in (tmp_path / "out").glob("*.h5")] == ["b_good.h5"]
    assert "a_text.svs failed" in caplog.text


def test_links_to_nothing_fail_in_one_sentence_and_stop_nothing(tmp_path, network, caplog):
    save_slide(tmp_path / "in" / "c.tif")
    for name in ("a.dcm", "b.svs"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "gone")
    run(tmp_path / "in", tmp_path / "out")
    rows = ledger(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.dcm": "failed", "b.svs": "failed", "c.tif": "ok",
    }  # fmt: skip
    assert "Traceback" not in caplog.text


def test_unforeseen_errors_are_logged_with_their_traceback(tmp_path, network, monkeypatch, caplog):
    save_slide(tmp_path / "in" / "a.tif")
    save_slide(tmp_path / "in" / "b.tif", seed=1)
    original = extraction.plan_tiles

    def plan(slide, rules):
        if slide.name == "a.tif":
            raise ZeroDivisionError("nobody thought of this")
        return original(slide, rules)

    monkeypatch.setattr(extraction, "plan_tiles", plan)
    run(tmp_path / "in", tmp_path / "out")
    rows = ledger(tmp_path / "out")
    assert rows["a.tif"]["reason"] == "ZeroDivisionError: nobody thought of this"
    assert rows["a.tif"]["stage"] == "tiling"
    assert rows["b.tif"]["status"] == "ok"
    assert "Traceback" in caplog.text


def test_a_slide_that_cannot_be_opened_is_looked_at_when_its_turn_comes(tmp_path, network, caplog):
    (tmp_path / "a.svs").write_text("no slide")
    (tmp_path / "a.h5").write_bytes(b"of an earlier run")
    config = ExtractConfig(tmp_path, tmp_path, device="cpu")
    built = extraction.make_network(config, torch.device("cpu"))
    (file,) = slides.find_slides(tmp_path)
    for gets_its_turn in (False, True):
        caplog.clear()
        steps = extraction.extract_slide(file, config, built, None)
        next(steps)
        assert "a.svs" not in caplog.text
        assert (tmp_path / "a.h5").exists()
        if gets_its_turn:
            with pytest.raises(StopIteration) as end:
                next(steps)
            assert [(row.slide, row.status) for row in end.value.value] == [("a.svs", "failed")]
            assert "a.svs failed" in caplog.text
            assert (tmp_path / "a.h5.old").exists()
        steps.close()


def test_finished_slides_are_left_alone(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif")
    run(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / "a.h5"
    before, calls, rows = path.stat(), len(network.batches), rows_of(tmp_path / "out")
    again = run(tmp_path / "in", tmp_path / "out", workers=1, batch_size=1)
    assert len(network.batches) == calls
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (again.done, again.skipped) == (1, 1)
    repeated = rows_of(tmp_path / "out")
    assert {row.pop("reason") for row in repeated.values()} == {"finished before"}
    for key, row in rows.items():
        del row["reason"]
        # When the file is written, the clock has not stopped yet.
        assert 0 < float(repeated[key].pop("seconds")) <= float(row.pop("seconds"))
    assert repeated == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "extractor ctranspath-random-seed0 -> ctranspath-random-seed1"),
        ({"weights": "w.pth"}, "weights_sha256 None -> ab"),
        ({"extractor": "other"}, "extractor ctranspath-random-seed0 -> other-random-seed0"),
        ({"precision": "bfloat16"}, "precision float32 -> bfloat16"),
        ({"layout": "stamp-v1"}, "layout stamp-v2 -> stamp-v1"),
        ({"rules": TileRules(min_edge_share=0.01)}, "min_edge_share 0.02 -> 0.01"),
        ({"rules": TileRules(tile_size_um=250.0)}, "tile_size_um 256.0 -> 250.0"),
        ({"rules": TileRules(tile_size_px=256)}, "tile_size_px 224 -> 256"),
        ({"slide_table": "mpp.csv"}, "slide_mpp_x 0.5 -> 0.48"),
    ],
)
def test_other_parameters_redo_a_slide_and_say_so(options, words, tmp_path, network, caplog):
    save_slide(tmp_path / "in" / "a.tif")
    pd.DataFrame({"FILENAME": ["a"], "MPP": [0.48]}).to_csv(tmp_path / "mpp.csv")
    if "slide_table" in options:
        options = {"slide_table": tmp_path / "mpp.csv"}
    run(tmp_path / "in", tmp_path / "out")
    calls = len(network.batches)
    assert run(tmp_path / "in", tmp_path / "out", **options).skipped == 0
    assert len(network.batches) > calls
    assert words in caplog.text
    assert "made with other parameters" in caplog.text


def test_another_slide_under_the_same_name_is_noticed(tmp_path, network, caplog):
    save_slide(tmp_path / "in" / "a.tif")
    run(tmp_path / "in", tmp_path / "out")
    first = read_features(tmp_path / "out" / "a.h5").feats
    save_slide(tmp_path / "in" / "a.tif", seed=5)  # the same size and resolution
    assert run(tmp_path / "in", tmp_path / "out").skipped == 0
    assert np.abs(read_features(tmp_path / "out" / "a.h5").feats - first).max() > 0
    assert "slide_quickhash" in caplog.text


def save_uncompressed(path, pixels, small):
    """Write two levels as they are; the file has as many bytes whatever the pixels are."""
    size = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    path.parent.mkdir(exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for level, picture in enumerate((pixels, small)):
            options = {"subfiletype": int(level > 0), "metadata": None, **size}
            file.write(picture, photometric="rgb", tile=(256, 256), **options)


def test_a_slide_that_changed_in_its_largest_level_alone_is_noticed(tmp_path, network, caplog):
    path = tmp_path / "in" / "a.tif"
    small = tissue(600, 600)  # whose quickhash is all that OpenSlide tells
    save_uncompressed(path, tissue(2400, 2400, seed=1), small)
    run(tmp_path / "in", tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "out").skipped == 1
    shutil.copy(path, tmp_path / "copy")
    shutil.move(tmp_path / "copy", path)  # another time of last change, the same slide
    assert run(tmp_path / "in", tmp_path / "out").skipped == 1
    save_uncompressed(path, tissue(2400, 2400, seed=2), small)
    caplog.clear()
    assert run(tmp_path / "in", tmp_path / "out").skipped == 0
    assert "slide_sample_sha256" in caplog.text
    assert "slide_quickhash" not in caplog.text
    assert "slide_bytes" not in caplog.text


def test_files_of_a_release_that_stored_fewer_parameters_are_not_redone(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif")
    run(tmp_path / "in", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "a.h5", "a") as file:
        parameters = json.loads(file.attrs["mtbalance_parameters"])
        del parameters["slide_sample_sha256"]
        file.attrs["mtbalance_parameters"] = json.dumps(parameters)
    assert run(tmp_path / "in", tmp_path / "out").skipped == 1
    assert run(tmp_path / "in", tmp_path / "out", layout="stamp-v1").skipped == 0


@pytest.mark.parametrize("place", [0, 5_000_000, 9_999_999])
def test_the_sample_of_a_slide_reaches_over_all_its_bytes(place, tmp_path):
    data = bytearray(10_000_000)
    (tmp_path / "a.mrxs").write_bytes(b"index")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0000.dat").write_bytes(data)
    before = sample_sha256(tmp_path / "a.mrxs")
    changed = slice(max(0, place - 400_000), min(len(data), place + 400_000))
    data[changed] = b"1" * (changed.stop - changed.start)
    (tmp_path / "a" / "Data0000.dat").write_bytes(data)
    assert sample_sha256(tmp_path / "a.mrxs") != before


def test_damaged_and_foreign_files_are_redone(tmp_path, network, caplog):
    save_slide(tmp_path / "in" / "a.tif")
    path = tmp_path / "out" / "a.h5"
    path.parent.mkdir()
    path.write_bytes(b"half a file")
    assert run(tmp_path / "in", tmp_path / "out").skipped == 0
    assert "is damaged" in caplog.text
    with h5py.File(path, "a") as file:
        del file.attrs["mtbalance_parameters"]
    assert run(tmp_path / "in", tmp_path / "out").skipped == 0
    assert "made by another program" in caplog.text
    assert run(tmp_path / "in", tmp_path / "out").skipped == 1


def test_features_in_use_are_left_alone(tmp_path, network):
    for name in "ab":
        save_slide(tmp_path / "in" / f"{name}.tif", seed=ord(name))
    run(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out" / "a.h5").read_bytes()
    with held(tmp_path / "out" / "a.h5"):
        summary = run(tmp_path / "in", tmp_path / "out")
    assert (summary.failed, summary.skipped, summary.exit_code) == (1, 1, 1)
    assert "is in use by another process" in ledger(tmp_path / "out")["a.tif"]["reason"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5*")) == ["a.h5", "b.h5"]
    assert (tmp_path / "out" / "a.h5").read_bytes() == before
    assert run(tmp_path / "in", tmp_path / "out").skipped == 2


def test_outdated_features_of_a_slide_that_now_fails_are_set_aside(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif")
    save_slide(tmp_path / "in" / "b.tif")
    run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.tif").write_bytes(b"damaged")
    assert run(tmp_path / "in", tmp_path / "out").failed == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5*")) == ["a.h5.old", "b.h5"]


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on_from_there(tmp_path, network):
    for name in "abc":
        save_slide(tmp_path / "in" / f"{name}.tif", seed=ord(name))
    network.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.h5*")] == ["a.h5"]
    assert list(ledger(tmp_path / "out")) == ["a.tif"]
    network.fail_at = None
    summary = run(tmp_path / "in", tmp_path / "out")
    assert (summary.done, summary.skipped) == (3, 1)


def test_slides_that_share_a_stem_do_not_overwrite_each_other(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif", seed=1)
    save_slide(tmp_path / "in" / "a.tiff", seed=2)
    run(tmp_path / "in", tmp_path / "out")
    one, two = (read_features(tmp_path / "out" / f"a.{end}.h5") for end in ("tif", "tiff"))
    assert np.abs(one.feats - two.feats).max() > 0


def test_a_broken_level_is_replaced_by_a_finer_one(tmp_path, network, monkeypatch, caplog):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_bytes(b"x")
    handles = []

    def open_fake(path):
        handles.append(FakeHandle((2100, 1100), checkered, (1, 2, 4), broken=(1, 2)))
        return handles[-1]

    monkeypatch.setattr(slides.openslide, "OpenSlide", open_fake)
    assert run(tmp_path / "in", tmp_path / "out").done == 1
    row = ledger(tmp_path / "out")["a.svs"]
    assert (row["tiles_kept"], row["reason"]) == (
        "8",
        "unreadable levels, replaced by finer ones: 1",
    )
    assert "It is read from a finer level instead" in caplog.text
    assert all(handle.closed for handle in handles)
    assert run(tmp_path / "in", tmp_path / "out").skipped == 1


def damage(path, tile):
    """Overwrite the beginning of a tile of level 0."""
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 16)


def test_a_damaged_tile_is_left_out_and_the_others_are_as_before(tmp_path, network, caplog):
    save_slide(tmp_path / "in" / "a.tif", mpp=1.0)  # 4 x 4 tiles of 256 px, as the file has
    shutil.copy(tmp_path / "in" / "a.tif", tmp_path / "in" / "b.tif")
    damage(tmp_path / "in" / "b.tif", 0)
    rules = TileRules(min_edge_share=0.005)
    assert run(tmp_path / "in", tmp_path / "out", rules=rules).done == 2
    whole, rest = (read_features(tmp_path / "out" / f"{name}.h5") for name in "ab")
    # The tile at the corner, and the three whose borders are made from its pixels too.
    left = ~(whole.coords_um <= 256).all(axis=1)
    assert (len(whole.feats), left.sum()) == (16, 12)
    np.testing.assert_array_equal(rest.coords_um, whole.coords_um[left])
    np.testing.assert_array_equal(rest.feats, whole.feats[left])
    row = ledger(tmp_path / "out")["b.tif"]
    assert (row["status"], row["tiles_total"], row["tiles_kept"]) == ("ok", "16", "12")
    assert "4 damaged tiles are left out: at (0, 0) um OpenSlide says" in row["reason"]
    assert "b.tif: 4 damaged tiles are left out" in caplog.text
    with h5py.File(tmp_path / "out" / "b.h5") as file:
        assert file.attrs["mtbalance_tiles_damaged"] == 4
    assert run(tmp_path / "in", tmp_path / "out", rules=rules).skipped == 2
    reasons = {name: row["reason"] for name, row in ledger(tmp_path / "out").items()}
    assert reasons["a.tif"] == "finished before"
    assert reasons["b.tif"] == "finished before; 4 damaged tiles are left out"


def test_a_slide_fails_if_too_much_of_its_tissue_is_damaged(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif", mpp=1.0, white_left=768)  # 4 tiles are not glass
    damage(tmp_path / "in" / "a.tif", 13)  # of 5 x 5: below the first of them
    assert run(tmp_path / "in", tmp_path / "out").failed == 1
    reason = ledger(tmp_path / "out")["a.tif"]["reason"]
    assert "must be readable but for 10%, but of its tiles that are not glass 25% or more" in reason
    assert "at (768, 512) um OpenSlide says" in reason
    assert "--max-damaged-share" in reason
    rules = TileRules(max_damaged_share=0.3, min_edge_share=0.005)
    assert run(tmp_path / "in", tmp_path / "out", rules=rules).done == 1  # the remedy works


def test_unreadable_pixels_fail_the_slide(tmp_path, network, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_bytes(b"x")
    fake = partial(FakeHandle, (1100, 1100), plain((9, 9, 9)), broken=(0,))
    monkeypatch.setattr(slides.openslide, "OpenSlide", lambda path: fake())
    assert run(tmp_path / "in", tmp_path / "out").failed == 1
    assert "OpenSlide says: bad tile" in ledger(tmp_path / "out")["a.svs"]["reason"]


def test_the_slide_table_overrules_what_the_slide_says(tmp_path, network):
    save_slide(tmp_path / "in" / "sub" / "a.tif", mpp=100.0)  # a placeholder
    table = tmp_path / "slides.xlsx"
    pd.DataFrame({"PATIENT": ["p", "q"], "FILENAME": ["a", "b"], "MPP": [0.5, None]}).to_excel(
        table, index=False
    )
    summary = run(tmp_path / "in", tmp_path / "out", slide_table=table)
    assert (summary.rows[0].mpp, summary.rows[0].mpp_source) == (0.5, "slide table")


def test_slides_of_one_name_have_rows_of_their_own(tmp_path, network):
    for name in ("a.tif", "a.tiff", "b.tif"):
        save_slide(tmp_path / "in" / name)
    (tmp_path / "t.csv").write_text("FILENAME,MPP\na.tif,0.5\na.tiff,0.25\nb.tif,0.5\nb.svs,0.3\n")
    rows = run(tmp_path / "in", tmp_path / "out", slide_table=tmp_path / "t.csv").rows
    assert {row.slide: row.mpp for row in rows} == {"a.tif": 0.5, "a.tiff": 0.25, "b.tif": 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NAME,MPP\na,0.5\n", "must have a column `FILENAME`"),
        ("FILENAME,MPP\na,half\n", r"MPP must hold numbers in um per pixel, but is 'half' for a"),
        ("FILENAME,MPP\na,0.5\na.h5,0.25\n", r"one MPP, but a\.h5 has 0\.5 and 0\.25"),
        ("FILENAME,MPP\nTCGA-1,0.5\n", r"'TCGA-1' may mean TCGA-1\.aa, TCGA-1\.bb"),
    ],
)
def test_broken_slide_tables_are_wrong_use(text, words, tmp_path, network):
    for name in ("a", "TCGA-1.aa", "TCGA-1.bb"):
        save_slide(tmp_path / "in" / f"{name}.tif")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        run(tmp_path / "in", tmp_path / "out", slide_table=tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "`workers` must be at least 1, but got 0"),
        ({"batch_size": 0}, "`batch-size` must be at least 1"),
        ({"precision": "half"}, "`precision` must be one of float32, bfloat16, but got 'half'"),
        ({"layout": "v3"}, "`layout` must be one of stamp-v2, stamp-v1, but got 'v3'"),
        (
            {"layout": "stamp-v1", "rules": TileRules(tile_size_um=112.0)},
            "`layout` must be stamp-v2 for tiles of 112 um and 224 px, .* Leave --layout out",
        ),
        (
            {"layout": "stamp-v1", "rules": TileRules(tile_size_px=256)},
            "`layout` must be stamp-v2 for tiles of 256 um and 256 px",
        ),
        ({"device": "cpu,abacus"}, "`device` must be auto, cpu, cuda or cuda:N"),
        ({"device": "abacus"}, "`device` must be auto, cpu, cuda or cuda:N"),
        ({"slide_table": "none.csv"}, "must be a readable file, but No such file"),
    ],
)
def test_wrong_use_is_told_before_any_work(options, words, tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif")
    if "slide_table" in options:
        options = {"slide_table": tmp_path / options["slide_table"]}
    with pytest.raises(UserError, match=words):
        run(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_inference_leaves_no_graph_and_no_changed_settings(tmp_path, network):
    save_slide(tmp_path / "in" / "a.tif")
    before = torch.backends.cudnn.allow_tf32
    run(tmp_path / "in", tmp_path / "out")
    assert torch.backends.cudnn.allow_tf32 == before
    assert torch.is_grad_enabled()


def test_real_slides_give_features_or_a_clear_reason(tmp_path, network, caplog):
    folder = SHARED / "wsi"
    if not folder.is_dir():
        pytest.skip("the shared data is not here")
    caplog.set_level(logging.ERROR)
    copy = tmp_path / "in"
    shutil.copytree(folder, copy)
    run(copy, tmp_path / "out")
    rows = ledger(tmp_path / "out")
    kept = {name: row["tiles_kept"] for name, row in rows.items() if row["status"] == "ok"}
    names = ["cmu-1-small-region.svs", "derived_dicom"]
    names += [f"derived_pyramid_{unit}.tif" for unit in ("cm", "inch", "xml")]
    assert kept == dict.fromkeys(names, "15")
    assert len(rows) == 14  # one slide each
    assert all(row["reason"] for name, row in rows.items() if name not in kept)
    bags = [read_features(tmp_path / "out" / f"{name.partition('.')[0]}.h5") for name in names]
    for bag in bags[1:]:
        np.testing.assert_array_equal(bag.coords_um, bags[0].coords_um)
        np.testing.assert_allclose(bag.feats, bags[0].feats, atol=0.01)
