"""Files: one that cannot be read is named, and one that is written is there whole or not at all."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError

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


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: without NaN."""
    return None if math.isnan(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename: whole or not at all."""
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
    """Give a finished, closed file its name, so that a crash leaves the old file or the new one.

    Args:
        temporary: The finished file.
        path: The name it gets; a file of that name is replaced.
    """
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


def walk(folder: Path, skip: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, links followed, with their visible files in order.

    A warning names folders that the system does not let us look into.

    Args:
        folder: Where to begin.
        skip: A folder to leave out.
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
