"""Folders: whose they are, and who may work in them."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError, listing
from examples.pathology.common.files import writable
from examples.pathology.common.toml import read_toml, write_toml

logger = logging.getLogger(__name__)

RUN = "config.toml"  # a folder that has it holds a run of `crossval`
DEPLOYED = "deploy.toml"  # ..., a deployment
RESULTS = {RUN: "a run of `crossval`", DEPLOYED: "a deployment"}
"""Both have folds, predictions and figures of the same names."""


def claim_folder(out: Path, what: str, settings: Mapping[str, Any]) -> None:
    """Mark a folder with what is made in it, ``<what>.toml``, or check that it is the same.

    The settings are all that decides its content. Hidden files in it do not count.

    Raises:
        UserError: The folder holds another one, or other files.
    """
    path = out / f"{what}.toml"
    if path.exists():
        stored = read_toml(path).get(what, {})
        differing = [
            f"{name}: {stored.get(name)} -> {settings.get(name)}"
            for name in dict.fromkeys([*settings, *stored])
            if stored.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"`out` must be a new folder or one of the same {what}, but {out} differs in "
                f"{listing(differing)}."
            )
    elif out.exists() and any(not found.name.startswith(".") for found in out.iterdir()):
        raise UserError(f"`out` must be a new or empty folder, but {out} holds other files.")
    else:
        write_toml(path, {what: settings})


def refuse_other_results(out: Path, own: str) -> None:
    """Raise if a folder holds results of another command, some of which ours would replace.

    Args:
        out: The folder.
        own: The file that marks ours, of `RESULTS`.

    Raises:
        UserError: It does, or is the folder of a fold.
    """
    out = out.resolve()
    places = [(out, {name for name in RESULTS if name != own})]
    if re.fullmatch(r"fold-\d+", out.name):
        places.append((out.parent, set(RESULTS)))
    for folder, names in places:
        for name in sorted(names):
            if (folder / name).exists():
                raise UserError(
                    f"`out` must be a new folder or that of {RESULTS[own]}, but {folder} holds "
                    f"{RESULTS[name]} ({name}). Use another --out."
                )


def clean(folder: Path) -> None:
    """Remove what killed writers left in a folder where nobody else writes."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def clean_below(folder: Path) -> None:
    """Remove what killed writers left in a folder, and in those below, where nobody else writes."""
    for pattern in (".*.tmp", "*.h5.tmp"):  # the second by earlier releases
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[bool]:
    """Keep other processes out of a folder; the system lifts the lock when a process ends.

    Args:
        folder: The folder, made if missing.

    Yields:
        Whether it is locked; there are systems without locks.

    Raises:
        UserError: Another process is at work in it.
        OutputError: Nothing can be written there.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # no such locks there
        yield False
        return
    import fcntl

    with writable(folder):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    locked = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"`out` must be a folder that no other process works in, but {folder} is in use. "
                "Wait for it, or use another --out."
            ) from error
        except OSError as error:  # a file system without locks
            locked = False
            logger.warning("%s cannot be locked (%s); run one process at a time", folder, error)
        yield locked
    finally:
        os.close(handle)
