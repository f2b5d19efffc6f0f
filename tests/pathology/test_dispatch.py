"""Whole runs: several devices, early ends, killed processes. The network is a cheap one."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from examples.pathology import dispatch, extraction
from examples.pathology.errors import UserError
from examples.pathology.extractors import LoadedExtractor
from examples.pathology.features import extract
from examples.pathology.slides import SlideFile
from tests.pathology.slide_helpers import save_slide

ROOT = Path(__file__).parents[2]


class Patches(nn.Module):
    """Mean colours of the 16 patches of a tile."""

    def forward(self, tiles):
        return tiles.unfold(1, 56, 56).unfold(2, 56, 56).mean(dim=(-1, -2)).flatten(1)


def build(name, weights, seed):
    return LoadedExtractor(Patches(), lambda tiles: tiles.float() / 255, name, "ab")


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(extraction, "make_extractor", build)


def make_slides(folder, count=4):
    for number in range(count):
        save_slide(folder / f"{'abcdefgh'[number]}.tif", 1600, 1600 + 200 * number, seed=number)
    return folder


def contents(out):
    """All that the files of a run hold, but for the time it took."""
    found = {}
    for path in sorted(out.rglob("*.*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                data = {key: file[key][:].tolist() for key in file}
                notes = {k: str(v) for k, v in file.attrs.items() if "_seconds_" not in k}
            found[name] = (data, notes)
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8") as file:
                rows = [dict(row, seconds="", reason="") for row in csv.DictReader(file)]
            found[name] = rows
        else:
            found[name] = path.read_bytes()
    return found


# What is killed: a script that extracts and stops for good, leaving a mark, at a chosen place.
SCRIPT = """
import sys, time
from pathlib import Path
from examples.pathology import extraction, features
from tests.pathology import test_dispatch

place, slides, out, mark = sys.argv[1], *map(Path, sys.argv[2:])

def stop():
    while not (out / "a.h5").exists():  # a thread writes it
        time.sleep(0.01)
    mark.touch()
    time.sleep(600)

def forward(self, tiles, calls=[], original=test_dispatch.Patches.forward):
    calls.append(1)
    if len(calls) == 4:  # a slide has 9 tiles, 8 in the first batch: in the middle of the second
        stop()
    return original(self, tiles)

def publish(temporary, path, calls=[], original=features.publish):
    calls.append(1)
    if len(calls) == 2:  # the second file is on disk in part
        data = temporary.read_bytes()
        temporary.write_bytes(data[: len(data) // 2])
        stop()
    original(temporary, path)

extraction.make_extractor = test_dispatch.build
if place == "network":
    test_dispatch.Patches.forward = forward
else:
    features.publish = publish
features.extract(slides, out, weights=None, device="cpu", workers=2)
"""


@pytest.mark.parametrize("place", ["network", "file"])
def test_a_killed_run_taken_up_again_gives_the_same_files(place, tmp_path, network):
    slides, out, mark = make_slides(tmp_path / "in", 3), tmp_path / "out", tmp_path / "mark"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, place, slides, out, mark], cwd=ROOT, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert [path.name for path in out.glob("*.h5")] == ["a.h5"]
    assert [path.name for path in out.glob("*.h5.tmp")] == ["b.h5.tmp"] * (place == "file")
    first = (out / "a.h5").stat()
    resumed = extract(slides, out, weights=None, device="cpu")
    assert (resumed.done, resumed.skipped) == (3, 1)
    assert (out / "a.h5").stat().st_ino == first.st_ino
    assert (out / "a.h5").stat().st_mtime_ns == first.st_mtime_ns
    extract(slides, tmp_path / "undisturbed", weights=None, device="cpu")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_run_ends_when_too_many_slides_have_failed(tmp_path, network, caplog):
    make_slides(tmp_path / "in", 1)
    for name in ("b", "c", "d", "e"):
        (tmp_path / "in" / f"{name}.svs").write_bytes(b"no slide")
    options = {"weights": None, "device": "cpu"}
    summary = extract(tmp_path / "in", tmp_path / "out", max_failures=1, **options)
    assert (summary.done, summary.failed, summary.slides, summary.exit_code) == (1, 2, 3, 1)
    assert "2 not looked at: more than 1 slides failed." in str(summary)
    assert len(contents(tmp_path / "out")["ledger.csv"]) == 4
    # The limit is how many may fail, so that this many are still fine.
    summary = extract(tmp_path / "in", tmp_path / "out", max_failures=4, **options)
    assert (summary.failed, summary.slides, summary.stopped) == (4, 5, "")
    assert extract(tmp_path / "in", tmp_path / "new", max_failures=0, **options).slides == 2


def test_an_early_end_leaves_no_slide_open(tmp_path, network, monkeypatch):
    make_slides(tmp_path / "in", 3)
    (tmp_path / "in" / "aa.svs").write_bytes(b"no slide")
    open_slides = []
    original = extraction.open_slide

    def open_and_note(*args, **options):
        slide = original(*args, **options)
        close = slide.close
        open_slides.append(slide.name)
        slide.close = lambda: (open_slides.remove(slide.name), close())
        return slide

    monkeypatch.setattr(extraction, "open_slide", open_and_note)
    summary = extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu", max_failures=0)
    assert summary.slides == 2
    assert open_slides == []


def test_the_next_slide_is_read_while_the_network_works(tmp_path, network, monkeypatch):
    make_slides(tmp_path / "in", 2)
    opened, seen = [], []
    original, forward = extraction.open_slide, Patches.forward

    def open_and_note(path, name, **options):
        opened.append(name)
        return original(path, name, **options)

    def slow(self, tiles):
        deadline = time.monotonic() + 10
        while "b.tif" not in opened and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(tuple(opened))
        return forward(self, tiles)

    monkeypatch.setattr(extraction, "open_slide", open_and_note)
    monkeypatch.setattr(Patches, "forward", slow)
    assert extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu").done == 2
    assert seen[0] == ("a.tif", "b.tif")


def work_cheaply(*arguments, original=dispatch._work):
    extraction.make_extractor = build  # in the new process
    original(*arguments)


def test_several_devices_give_what_one_gives(tmp_path, network, monkeypatch):
    monkeypatch.setattr(dispatch, "_work", work_cheaply)
    make_slides(tmp_path / "in", 3)
    (tmp_path / "in" / "d.svs").write_bytes(b"no slide")
    options = {"weights": None, "extractor": "patches"}
    one = extract(tmp_path / "in", tmp_path / "one", device="cpu", **options)
    two = extract(tmp_path / "in", tmp_path / "two", device="cpu,cpu", **options)
    assert (two.done, two.failed, two.exit_code) == (one.done, one.failed, 1) == (3, 1, 1)
    assert [(row.slide, row.stage, row.status) for row in two.rows] == [
        (row.slide, row.stage, row.status) for row in one.rows
    ]
    for name in ("a.h5", "b.h5", "c.h5"):
        with h5py.File(tmp_path / "one" / name) as x, h5py.File(tmp_path / "two" / name) as y:
            np.testing.assert_array_equal(x["coords"], y["coords"])
            np.testing.assert_array_equal(x["feats"], y["feats"])
            assert x.attrs["mtbalance_parameters"] == y.attrs["mtbalance_parameters"]


def die(connection, files, *_):
    """Stand in for a worker: the first slide's process is killed, the other one has no work."""
    if files:
        os.kill(os.getpid(), signal.SIGKILL)
    connection.send(None)


def complain(connection, files, *_):
    connection.send(UserError("No such weights."))


@pytest.fixture
def quick_start(monkeypatch):
    """Fork: no waiting for imports; fine for processes that use neither torch nor a GPU."""
    monkeypatch.setattr(dispatch, "START_METHOD", "fork")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.usefixtures("quick_start")
def test_a_process_that_dies_is_reported_and_takes_no_other_with_it(tmp_path, monkeypatch):
    make_slides(tmp_path / "in", 1)
    monkeypatch.setattr(dispatch, "_work", die)
    summary = extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu,cpu")
    assert summary.exit_code == 1
    assert "the process on cpu ended with code -9. Run the command again" in summary.stopped
    assert (tmp_path / "out" / "ledger.csv").is_file()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.usefixtures("quick_start")
def test_wrong_use_in_a_process_is_wrong_use_of_the_command(tmp_path, monkeypatch):
    make_slides(tmp_path / "in", 1)
    monkeypatch.setattr(dispatch, "_work", complain)
    with pytest.raises(UserError, match="No such weights"):
        extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu,cpu")


def test_slides_are_dealt_out_by_size(tmp_path):
    files = []
    for number, size in enumerate([5, 70, 10, 40, 20, 0]):
        path = tmp_path / f"{number}.svs"
        path.write_bytes(b"x" * size)
        files.append(SlideFile(path, path.name, path.stem))
    shares = dispatch.deal(files, 2)
    sizes = [[file.path.stat().st_size for file in share] for share in shares]
    assert sorted([*sizes[0], *sizes[1]]) == [0, 5, 10, 20, 40, 70]
    assert abs(sum(sizes[0]) - sum(sizes[1])) <= 5
    assert all(share == sorted(share, reverse=True) for share in sizes)
    assert dispatch.deal(files[:1], 3)[1:] == [[], []]
    assert dispatch.resolve_devices("cpu, cpu") == [torch.device("cpu")] * 2


def test_what_a_file_was_made_with_is_in_it(tmp_path, network):
    make_slides(tmp_path / "in", 1)
    extract(tmp_path / "in", tmp_path / "out", weights=None, device="cpu", extractor="patches")
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        parameters = json.loads(file.attrs["mtbalance_parameters"])
        assert file["feats"].shape[1] == 48  # the network's, not CTransPath's 768
        assert file.attrs["mtbalance_weights_sha256"] == parameters["weights_sha256"] == "ab"
        assert file.attrs["extractor"] == parameters["extractor"] == "patches"
    assert parameters["precision"] == "float32"
    assert {"canny_low", "tile_size_um", "slide_mpp_x", "slide_quickhash"} <= parameters.keys()
