"""The MPP column of a slide table: what people know about pixels that the slides do not say."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.slides.slide import slide_file
from examples.pathology.tables.matching import (
    comparable,
    log_other_folders,
    match_files,
    shared_paths,
    slide_name,
    without_suffix,
)
from examples.pathology.tables.reading import FILENAME, MPP, read_table, with_points

logger = logging.getLogger(__name__)


def mpp_of_slides(
    table: Path,
    stems: Iterable[str],
    column: str = FILENAME,
    names: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Look slides up in the MPP column of a slide table.

    Args:
        table: The table; MPP may be missing or partly empty. A slide whose own row has none has
            none: that of another row is another slide's.
        stems: Relative paths of the slides without suffix, as `SlideFile` has them.
        column: The column of the file name, which is needed.
        names: Their paths with suffix by stem, which tell rows apart that differ in it alone.

    Returns:
        Microns per pixel by stem, of the slides whose row gives it.

    Raises:
        UserError: If the table cannot be read, a value is not a number, a row may mean several
            slides, or a slide has several values.
    """
    stems = sorted(stems)
    values = _read_column(table, column)
    shared = shared_paths(values)
    sought = {stem: comparable((names or {}).get(stem, stem)) for stem in stems}
    called = {
        name if name in values and without_suffix(name) in shared else stem: stem
        for stem, name in sought.items()
    }
    found = {called[name]: mpp for name, mpp in _match(values, called, table, column).items()}
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
        comparable("/".join(parts[i:]))
        for parts in (PurePosixPath(file.name).parts, PurePosixPath(file.stem).parts)
        for i in range(len(parts))
    ]
    stem = next((end for end in ends if end in values), file.stem)
    return _match(values, [stem], table, column).get(stem)


def _match(
    values: Mapping[str, float | None], stems: Iterable[str], table: Path, column: str
) -> dict[str, float]:
    """Give the values of keys to the slides that they mean."""
    rows: dict[str, dict[str, float | None]] = defaultdict(dict)
    found = match_files(values, stems)
    log_other_folders(found, table, column)
    for key, slides in found.items():
        if len(slides) > 1 and values[key] is not None:
            raise UserError(
                f"{table}: a row with an {MPP} must mean one slide, but {key!r} may mean "
                f"{listing(slides)}. Write `{column}` in full, as in '{slides[0]}.h5'."
            )
        if len(slides) == 1:
            rows[slides[0]][key] = values[key]
    only = {stem: _only(same, stem, table, column) for stem, same in rows.items()}
    return {stem: value for stem, value in only.items() if value is not None}


def _only(found: Mapping[str, float | None], stem: str, table: Path, column: str) -> float | None:
    """Return the value of a slide that several rows may mean: that of its own path, if any."""
    path = comparable(stem)
    own = {key: value for key, value in found.items() if path in (key, without_suffix(key))}
    if own:  # the same slide: with and without its suffix, one may be empty
        found = {key: value for key, value in own.items() if value is not None}
    if len(set(found.values())) > 1:
        said = listing(
            f"{'none' if value is None else format(value, 'g')} for {key!r}"
            for key, value in found.items()
        )
        raise UserError(
            f"{table}: a slide must have one {MPP}, but {stem} has several: {said}. "
            f"Write `{column}` in full, as in '{stem}.h5'."
        )
    return next(iter(found.values()), None)


def _read_column(path: Path, column: str) -> dict[str, float | None]:
    """Read microns per pixel by slide; of the rows that do not give it, too: they are a slide's."""
    table = read_table(path, [column])
    values: dict[str, float | None] = {}
    if MPP not in table.columns:
        logger.warning("%s has no column `%s`.%s", path, MPP, nearest(MPP, table.columns))
        return values
    for name, text in zip(table[column], with_points(MPP, list(table[MPP]), path), strict=True):
        if not name:
            continue
        key = comparable(slide_name(name, path, column))
        known = values.setdefault(key, None)
        if not text:
            continue
        try:
            value = float(text)
        except ValueError as error:
            raise UserError(
                f"{path}: {MPP} must hold numbers in um per pixel, but is {text!r} for {name}."
            ) from error
        if known not in (None, value):
            raise UserError(
                f"{path}: a slide must have one {MPP}, but {name} has {known:g} and {value:g}."
            )
        values[key] = value
    return values
