"""Whole runs: several devices, early ends, killed processes. The network is a cheap one."""

import csv
import json
import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

import h5py
import pytest
import torch
from torch import nn

from examples.pathology.common import files
from examples.pathology.common.errors import UserError
from examples.pathology.extractors.extractor import Extractor
from examples.pathology.features import dispatch, extraction
from examples.pathology.slides.slide import SlideFile
from tests._forks import forking
from tests.pathology.slide_helpers import extract, save_slide

pytestmark = pytest.mark.usefixtures("forked_workers")


class Patches(nn.Module):
    """Mean colours of the 16 patches of a tile."""

    def forward(self, tiles):
        return tiles.unfold(1, 56, 56).unfold(2, 56, 56).mean(dim=(-1, -2)).flatten(1)


def build(name, weights, seed, options, tile_px):
    return Extractor(Patches(), lambda tiles: tiles.float() / 255, name, "ab")


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


def extract_and_stop(place, slides, out, mark):
    """Extract, in a process of its own, and stop for good at a chosen place, leaving a mark."""
    calls, original_forward, original_publish = [], Patches.forward, files.publish

    def stop():
        while not (out / "a.h5").exists():  # a thread writes it
            time.sleep(0.01)
        mark.touch()
        time.sleep(600)

    def forward(self, tiles):
        calls.append(1)
        if len(calls) == 4:  # a slide has 9 tiles, 8 in the first batch: in the middle of the next
            stop()
        return original_forward(self, tiles)

    def publish(temporary, path):
        if path.name == "b.h5":  # it is on disk in part
            data = temporary.read_bytes()
            temporary.write_bytes(data[: len(data) // 2])
            stop()
        original_publish(temporary, path)

    extraction.make_extractor = build
    if place == "network":
        Patches.forward = forward
    else:
        files.publish = publish
    extract(slides, out, weights=None, device="cpu", workers=2)


@pytest.mark.parametrize("place", ["network", "file"])
def test_a_killed_run_taken_up_again_gives_the_same_files(place, tmp_path, network):
    slides, out, mark = make_slides(tmp_path / "in", 3), tmp_path / "out", tmp_path / "mark"
    process = forking().Process(target=extract_and_stop, args=(place, slides, out, mark))
    process.start()
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in out.glob("*.h5")] == ["a.h5"]
    assert len(list(out.glob(".b.h5.*.tmp"))) == (place == "file")
    (out / "sub").mkdir()
    (out / "sub" / "c.h5.tmp").touch()  # as an earlier release would have left it
    first = (out / "a.h5").stat()
    resumed = extract(slides, out, weights=None, device="cpu")
    assert (resumed.done, resumed.skipped) == (3, 1)
    assert not list(out.rglob("*.tmp"))
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


# What processes of a cluster do instead of `dispatch.extract_batch`, with the cheap network.


def work_cheaply(*arguments, original=dispatch.extract_batch):
    extraction.make_extractor = build
    return original(*arguments)


def work_or_die(files, *more):
    """Die when slide b comes, after the smaller ones of its batch are done."""
    if any(file.stem == "b" for file in files):
        work_cheaply([file for file in files if file.stem < "b"], *more)
        os.kill(os.getpid(), signal.SIGKILL)
    return work_cheaply(files, *more)


def complain(*_):
    return [], UserError("No such weights.")


CHEAP = {"weights": None, "extractor": "patches"}


def test_several_processes_give_what_one_gives(tmp_path, network, monkeypatch):
    monkeypatch.setattr(dispatch, "extract_batch", work_cheaply)
    monkeypatch.chdir(tmp_path)
    make_slides(tmp_path / "in", 3)
    (tmp_path / "in" / "d.svs").write_bytes(b"no slide")
    one = extract(Path("in"), Path("one"), device="cpu", **CHEAP)
    two = extract(Path("in"), Path("two"), device="cpu,cpu", **CHEAP)
    assert (two.done, two.failed, two.exit_code) == (one.done, one.failed, 1) == (3, 1, 1)
    assert [(row.slide, row.stage, row.status) for row in two.rows] == [
        (row.slide, row.stage, row.status) for row in one.rows
    ]
    ours, theirs = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert ours == theirs


def test_a_slide_that_kills_its_process_takes_no_other_with_it(
    tmp_path, network, monkeypatch, caplog
):
    monkeypatch.setattr(dispatch, "extract_batch", work_or_die)
    monkeypatch.setattr(dispatch, "DEATHS", 1)
    monkeypatch.setattr(dispatch, "BATCHES_PER_PROCESS", 1)
    make_slides(tmp_path / "in", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.h5").write_bytes(b"of an earlier run")
    summary = extract(tmp_path / "in", tmp_path / "out", device="cpu", processes=2, **CHEAP)
    assert (summary.done, summary.failed, summary.stopped, summary.exit_code) == (3, 1, "", 1)
    assert {row.slide: row.reason for row in summary.rows if row.status == "failed"} == {
        "b.tif": "its worker died once while at it"
    }
    assert "slides of batches that failed are taken one by one" in caplog.text
    assert (tmp_path / "out" / "b.h5.old").is_file()
    undisturbed = extract(tmp_path / "in", tmp_path / "whole", device="cpu", **CHEAP)
    assert undisturbed.done == 4
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "whole")
    for name in ("a.h5", "c.h5", "d.h5"):
        assert ours[name] == theirs[name]


def test_workers_of_a_scheduler_share_the_slides(tmp_path, network, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr(dispatch, "extract_batch", work_cheaply)
    monkeypatch.chdir(tmp_path)
    make_slides(Path("in"), 2)
    for name in ("x", "y", "z"):
        Path("in", f"{name}.svs").write_bytes(b"no slide")
    options = {"device": "cpu", **CHEAP}
    with (
        patch.dict(os.environ),  # which Dask changes for its processes, and does not restore
        LocalCluster(
            n_workers=1, threads_per_worker=2, dashboard_address=":0", silence_logs="ERROR"
        ) as workers,
    ):
        address = workers.scheduler_address
        summary = extract(Path("in"), Path("out"), scheduler=address, **options)
        again = extract(Path("in"), Path("out"), scheduler=address, max_failures=0, **options)
        with pytest.raises(UserError, match="`processes` must be left out where `scheduler`"):
            extract(Path("in"), Path("out"), scheduler=address, processes=2, **options)
        monkeypatch.setattr(dispatch, "extract_batch", complain)
        with pytest.raises(UserError, match=r"No such weights"):
            extract(Path("in"), Path("wrong"), scheduler=address, **options)
    assert Path("wrong", "ledger.csv").is_file()
    assert (summary.done, summary.failed, summary.skipped) == (2, 3, 0)
    assert again.stopped == "more than 0 slides failed."
    assert again.slides < 5
    extract(Path("in"), Path("one"), **options)
    for name in ("a.h5", "b.h5"):
        assert contents(Path("out"))[name] == contents(Path("one"))[name]


@pytest.mark.parametrize(
    ("device", "processes", "words"),
    [
        ("cpu,cpu", 1, "at least the 2 devices of `device`, but got 1."),
        ("cpu", 0, "`processes` must be at least 1, but got 0."),
    ],
)
def test_each_device_needs_a_process(tmp_path, device, processes, words):
    make_slides(tmp_path / "in", 1)
    with pytest.raises(UserError, match=words):
        extract(tmp_path / "in", tmp_path / "out", device=device, processes=processes, **CHEAP)


def test_slides_are_dealt_out_by_size(tmp_path):
    files = []
    for number, size in enumerate([5, 70, 10, 40, 20, 0] * 10):
        path = tmp_path / f"{number}.svs"
        path.write_bytes(b"x" * size)
        files.append(SlideFile(path, path.name, path.stem))
    batches = dispatch.deal(files, 3)
    dealt = [file for batch in batches for file in batch]
    sizes = [file.path.stat().st_size for file in dealt]
    assert sorted(dealt, key=files.index) == files
    assert sizes == sorted(sizes, reverse=True)
    assert {len(batch) for batch in batches} == {5}
    assert [len(batch) for batch in dispatch.deal(files, 1)] == [8] * 7 + [4]
    assert [len(batch) for batch in dispatch.deal(files[:2], 3)] == [1, 1]
    assert dispatch.deal([SlideFile(tmp_path / "gone", "gone", "gone")], 2)
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
