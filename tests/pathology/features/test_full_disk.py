"""Folders that take no more: what is finished stays, and nothing is computed for nothing."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from examples.pathology.common import files
from examples.pathology.common.errors import OutputError, UserError
from examples.pathology.common.folders import sole_writer
from examples.pathology.features import dispatch, extraction
from examples.pathology.features.inference import infer
from tests.pathology.features.test_dispatch import CHEAP, build, make_slides, work_cheaply
from tests.pathology.slide_helpers import extract

ROOT = Path(__file__).parents[3]


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(extraction, "make_extractor", build)


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if not (mount and umount):
        pytest.skip("no disk can be mounted: there is no `mount`")
    line = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run([umount, str(folder)], check=True)


def full_from(name):
    """What `publish` does where the disk is full when the file of this name comes."""

    def publish(temporary, path, original=files.publish):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(temporary, path)

    return publish


def work_on_a_full_disk(*arguments):
    files.publish = full_from("b.h5")
    return work_cheaply(*arguments)


def command(*arguments):
    line = [sys.executable, "-m", "examples.pathology", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_disk_that_gets_full_ends_the_run_and_what_is_finished_stays(
    tmp_path, network, monkeypatch, caplog
):
    slides, out, seen = make_slides(tmp_path / "in"), tmp_path / "out", []
    out.mkdir()
    (out / "b.h5").write_bytes(b"of an earlier run")
    monkeypatch.setattr(files, "publish", full_from("b.h5"))
    monkeypatch.setattr(extraction, "infer", lambda *args: (seen.append(1), infer(*args))[1])
    summary = extract(slides, out, weights=None, device="cpu")
    assert (summary.done, summary.failed, summary.exit_code) == (1, 0, 1)
    assert "3 not looked at" in str(summary)
    assert "b.h5 must be writable, but No space left on device. Make room" in summary.stopped
    assert (out / "b.h5").read_bytes() == b"of an earlier run"  # not set aside either
    assert (out / "ledger.csv").read_text(encoding="utf-8").count("a.tif") == 2
    assert not list(out.rglob("*.tmp"))
    assert len(seen) <= 3  # the network may have begun with the slide after it
    assert "Traceback" not in caplog.text


def test_not_even_the_ledger_can_be_written(tmp_path, network, monkeypatch):
    slides = make_slides(tmp_path / "in", 1)
    monkeypatch.setattr(files, "publish", full_from("ledger.csv"))
    summary = extract(slides, tmp_path / "out", weights=None, device="cpu")
    assert (summary.done, summary.exit_code) == (1, 1)
    assert "ledger.csv must be writable, but No space left" in summary.stopped


@pytest.mark.usefixtures("forked_workers")
def test_a_disk_that_gets_full_ends_the_work_of_all_processes(tmp_path, network, monkeypatch):
    monkeypatch.setattr(dispatch, "extract_batch", work_on_a_full_disk)
    monkeypatch.setattr(dispatch, "BATCHES_PER_PROCESS", 1)
    slides = make_slides(tmp_path / "in")
    summary = extract(slides, tmp_path / "out", device="cpu", processes=2, **CHEAP)
    assert "b.h5 must be writable, but No space left" in summary.stopped
    assert (summary.failed, summary.exit_code) == (0, 1)
    assert not (tmp_path / "out" / "b.h5").exists()


def test_a_second_run_into_a_folder_is_refused(tmp_path, network):
    slides, out = make_slides(tmp_path / "in", 1), tmp_path / "out"
    with sole_writer(out), pytest.raises(UserError, match="out is in use"):
        extract(slides, out, weights=None, device="cpu")
    assert extract(slides, out, weights=None, device="cpu").done == 1


def test_a_folder_is_probed_and_left_as_it_was(tmp_path):
    files.require_writable(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`out` must be a folder, but .*file is a file"):
        files.require_writable(tmp_path / "file" / "deep")


def test_a_full_disk_is_told_before_any_work(disk, tmp_path):
    slides = make_slides(tmp_path / "in", 1)
    with pytest.raises(OSError, match="No space left"), (disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(2 << 20))
    done = command("extract", "--slides", slides, "--out", disk / "x", "--device", "cpu")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "must be writable, but No space left on device" in done.stderr


def test_a_read_only_disk_is_told_before_any_work(disk, tmp_path):
    slides = make_slides(tmp_path / "in", 1)
    subprocess.run([shutil.which("mount"), "-o", "remount,ro", str(disk)], check=True)
    done = command("extract", "--slides", slides, "--out", disk / "x", "--device", "cpu")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "must be writable, but Read-only file system" in done.stderr


def test_a_file_of_features_larger_than_the_disk_leaves_no_part(disk):
    """Where HDF5 itself wrote to the disk, closing the file ended the process by a signal."""
    script = (
        "import sys, numpy as np; from pathlib import Path;"
        "from tests.pathology.tiny import write_bag;"
        "write_bag(Path(sys.argv[1]), np.ones((2000, 768)))"
    )
    line = [sys.executable, "-c", script, str(disk / "a.h5")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OutputError" in done.stderr.splitlines()[-1]
    assert list(disk.iterdir()) == []


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="name too long") as caught:
        files.write_text(tmp_path / ("x" * 300), "")
    assert not isinstance(caught.value, OutputError)


def test_what_is_written_in_memory_is_a_whole_file(tmp_path):
    from tests.pathology.tiny import write_bag

    write_bag(tmp_path / "a.h5", [[1.0] * 768])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        assert file["feats"].shape == (1, 768)
