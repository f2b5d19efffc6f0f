"""The MPP column of a slide table: what people know about pixels that the slides do not say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from examples.pathology.errors import UserError
from examples.pathology.tables import FILENAME, MPP, read_table

if TYPE_CHECKING:
    from examples.pathology.slides import SlideFile


def read_mpp_table(path: Path) -> dict[str, float]:
    """Read the MPP column of a slide table.

    Args:
        path: The table; FILENAME is needed, MPP may be missing or partly empty.

    Returns:
        Microns per pixel by FILENAME, for the rows that give it.

    Raises:
        UserError: If the table cannot be read or a value is not a number.
    """
    table = read_table(path, [FILENAME])
    values: dict[str, float] = {}
    if MPP not in table.columns:
        return values
    for name, text in zip(table[FILENAME], table[MPP], strict=True):
        if not name or not text:
            continue
        try:
            value = float(text)
        except ValueError as error:
            raise UserError(
                f"Column MPP must hold numbers in um per pixel, but {path} has {text!r} for {name}."
            ) from error
        if values.setdefault(_bare(name), value) != value:
            raise UserError(
                f"Column MPP must be unique per slide, but {path} has several values for {name}."
            )
    return values


def _bare(name: str) -> str:
    """Return a table's FILENAME without ``.h5``, with forward slashes."""
    name = name.strip().replace("\\", "/")
    return name[:-3] if name.lower().endswith(".h5") else name


def lookup_mpp(table: dict[str, float], file: SlideFile) -> float | None:
    """Find a slide in the table by path, by stem, or by a TCGA name without its UUID."""
    bare = Path(file.stem).name
    for key in (file.stem, file.name, bare, Path(file.name).name, bare.partition(".")[0]):
        if key in table:
            return table[key]
    return None
