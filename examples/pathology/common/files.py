"""Files: one that cannot be read is named, and one that is written is there whole or not at all."""

import errno
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import OutputError, UserError, one_line

NO_MORE_OUTPUT = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
)
"""What the system says where the next file would fare no better: a full disk, say."""

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, EOFError)
"""What readers raise of content that is not as it was written."""

logger = logging.getLogger(__name__)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of a file that the system cannot read that it must be readable.

    Raises:
        UserError: Reading it within raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} must be a readable file, but {error.strerror or error}."
        ) from error


@contextmanager
def whole(path: Path, remedy: str) -> Iterator[None]:
    """Say of a file that we have written that it must be as it was written; the remedy comes last.

    Raises:
        UserError: It cannot be read, or what was read within is damaged or not there.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, *DAMAGED) as error:
        reason = f"{error!r}" if isinstance(error, KeyError) else one_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(
            f"{path} must be there as it was written, but is not ({reason}). {remedy}"
        ) from error


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Say of a file or folder that the system cannot write that nothing can be written any more.

    Raises:
        OutputError: Writing within raised an `OSError` that the next file would meet too: the disk
            is full or read-only, or the folder is somebody else's.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_MORE_OUTPUT:
            raise
        raise OutputError(
            f"{path} must be writable, but {error.strerror}. Make room, or give another --out, and "
            "run the command again: what is finished stays."
        ) from error


def require_writable(folder: Path) -> None:
    """Write a block where the files of a folder will lie, and remove it again.

    Args:
        folder: It need not exist, and is not made.

    Raises:
        UserError: It is a file, or lies below one.
        OutputError: Nothing can be written there.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"`out` must be a folder, but {there} is a file.")
    with writable(folder), tempfile.TemporaryFile(dir=there) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: without NaN."""
    return None if math.isnan(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file under a temporary name, flush it to disk, then rename: whole or not at all.

    The temporary name is of this call alone, so that two who write the same file do not meet.

    Raises:
        OutputError: Nothing can be written any more, since the disk is full, say.
    """
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            temporary.chmod(0o644)  # mkstemp's 0o600 would keep colleagues out
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished, closed file its name, so that a crash leaves the old file or the new one."""
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


def walk(folder: Path, skip: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, links followed, with their visible files in order.

    A warning names folders that the system does not let us look into; `skip` is left out.
    """
    seen = {skip.resolve()} if skip is not None else set()
    for directory, children, names in os.walk(folder, onerror=_warn, followlinks=True):
        here = Path(directory).resolve()
        if here in seen:  # the output folder, or a link that leads back
            children.clear()
            continue
        seen.add(here)
        children[:] = sorted(child for child in children if not child.startswith("."))
        yield Path(directory), sorted(name for name in names if not name.startswith("."))


def _warn(error: OSError) -> None:
    if isinstance(error, PermissionError):
        logger.warning("%s is not searched: %s.", error.filename, error.strerror)
