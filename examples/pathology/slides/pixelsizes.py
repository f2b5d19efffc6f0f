"""The MPP column of a slide table: what people know about pixels that the slides do not say."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.common.names import composed
from examples.pathology.slides.slide import slide_file
from examples.pathology.tables.matching import match_files, slide_key
from examples.pathology.tables.reading import FILENAME, MPP, read_table, with_points

logger = logging.getLogger(__name__)


def mpp_of_slides(table: Path, stems: Iterable[str], column: str = FILENAME) -> dict[str, float]:
    """Look slides up in the MPP column of a slide table.

    Args:
        table: The table; MPP may be missing or partly empty.
        stems: Relative paths of the slides without suffix, as `SlideFile` has them.
        column: The column of the file name, which is needed.

    Returns:
        Microns per pixel by stem, of the slides whose row gives it.

    Raises:
        UserError: If the table cannot be read, a value is not a number, a row may mean several
            slides, or a slide has several values.
    """
    stems = sorted(stems)
    found = _match(_read_column(table, column), stems, table, column)
    logger.info("%s gives the %s of %d of %d slides.", table, MPP, len(found), len(stems))
    return found


def mpp_of_slide(table: Path, path: Path, column: str = FILENAME) -> float | None:
    """Look one slide file up in the MPP column of a slide table.

    A row that is the end of its path is preferred to one that only has the same file name.

    Args:
        table: The table, as for `mpp_of_slides`.
        path: The slide; of a DICOM series, any file.
        column: The column of the file name.

    Returns:
        Microns per pixel, or None if the table does not say.

    Raises:
        UserError: As `mpp_of_slides`.
    """
    values = _read_column(table, column)
    file = slide_file(path.absolute())
    # A table has the full name where slides differ only in their suffix; see `find_slides`.
    ends = [
        composed("/".join(parts[i:]))
        for parts in (PurePosixPath(file.name).parts, PurePosixPath(file.stem).parts)
        for i in range(len(parts))
    ]
    stem = next((end for end in ends if end in values), ends[-1])
    return _match(values, [stem], table, column).get(stem)


def _match(
    values: dict[str, float], stems: Iterable[str], table: Path, column: str
) -> dict[str, float]:
    """Give the values of keys to the slides that they mean."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for key, slides in match_files(values, stems).items():
        if len(slides) > 1:
            raise UserError(
                f"{table}: a row with an {MPP} must mean one slide, but {key!r} may mean "
                f"{listing(slides)}. Write `{column}` in full, as in '{slides[0]}.h5'."
            )
        if slides:
            rows[slides[0]][key] = values[key]
    return {stem: _only(found, stem, table, column) for stem, found in rows.items()}


def _only(found: dict[str, float], stem: str, table: Path, column: str) -> float:
    """Return the value of a slide that several rows may mean: that of its own path, if any."""
    if composed(stem) in found:
        return found[composed(stem)]
    if len(set(found.values())) > 1:
        said = listing(f"{value:g} for {key!r}" for key, value in found.items())
        raise UserError(
            f"{table}: a slide must have one {MPP}, but {stem} has several: {said}. "
            f"Write `{column}` in full, as in '{stem}.h5'."
        )
    return next(iter(found.values()))


def _read_column(path: Path, column: str) -> dict[str, float]:
    """Read microns per pixel by slide key, for the rows that give it."""
    table = read_table(path, [column])
    values: dict[str, float] = {}
    if MPP not in table.columns:
        logger.warning("%s has no column `%s`.%s", path, MPP, nearest(MPP, table.columns))
        return values
    for name, text in zip(table[column], with_points(MPP, list(table[MPP]), path), strict=True):
        if not name or not text:
            continue
        try:
            value = float(text)
        except ValueError as error:
            raise UserError(
                f"{path}: {MPP} must hold numbers in um per pixel, but is {text!r} for {name}."
            ) from error
        key = slide_key(name, path, column)
        if values.setdefault(key, value) != value:
            raise UserError(
                f"{path}: a slide must have one {MPP}, but {name} has {values[key]:g} and "
                f"{value:g}."
            )
    return values
