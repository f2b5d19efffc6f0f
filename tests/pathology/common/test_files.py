"""Files appear whole or not at all."""

import math

import pytest

from examples.pathology.common import files
from examples.pathology.common.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_may_not_be_searched_is_named(tmp_path, monkeypatch, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").touch()
    original = files.os.scandir

    def scandir(folder):
        if str(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(folder))
        return original(folder)

    monkeypatch.setattr(files.os, "scandir", scandir)
    assert [names for _, names in files.walk(tmp_path)] == [["a"]]
    assert f"{tmp_path / 'sub'} is not searched: Permission denied." in caplog.text


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a.json", {"a": math.nan})


def test_a_file_that_cannot_be_read_is_named_and_other_errors_pass(tmp_path):
    path = tmp_path / "b"
    with (
        pytest.raises(UserError, match=r"b must be a readable file, but No such file"),
        files.readable(path),
    ):
        path.read_text()
    with pytest.raises(KeyError), files.readable(tmp_path):
        {}["a"]
