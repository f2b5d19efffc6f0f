"""Reading the tables that people keep: CSV, TSV or Excel, all cells as text."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pandas as pd

from examples.pathology.common.errors import UserError, listing, nearest, one_line
from examples.pathology.common.files import readable
from examples.pathology.common.names import composed
from examples.pathology.settings.cohort import TCGA_SITE
from examples.pathology.tables.matching import slide_name

PATIENT, FILENAME, MPP = "PATIENT", "FILENAME", "MPP"
# What stands for "not known" in the tables of TCGA, GDC, cBioPortal, CPTAC, Excel and pandas, in
# lower case. A lone "-" is not among them: next to "+" it is a result.
# fmt: off
NOT_KNOWN = frozenset((
    "", "na", "n/a", "n.a.", "nan", "<na>", "none", "null", "missing", "--", "'--", "?",
    "unknown", "[unknown]", "not available", "[not available]", "not reported", "[not reported]",
    "not applicable", "[not applicable]", "not evaluated", "[not evaluated]", "[discrepancy]",
    "[pending]", "[not submitted]", "not allowed to collect", "n.d.", "not determined",
    "#n/a", "#div/0!", "#value!", "#ref!", "#name?", "#num!", "#null!",
))
# fmt: on

NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
HINT = re.compile(r'"?sep=([^\w\s"]|\t)"?[;,\t ]*(?:\r\n|\r|\n)', re.IGNORECASE)
BARCODE = re.compile(r"TCGA-([0-9A-Z]{2})(-|$)", re.IGNORECASE)
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a table as stripped strings, where whatever means "not known" becomes ``""``.

    Args:
        path: ``.csv``, ``.tsv`` or ``.xlsx`` (its first sheet).
        columns: Columns that must be there.

    Raises:
        UserError: The file cannot be read, a column is missing or stands twice.
    """
    table: pd.DataFrame = _read_cells(path, columns).map(_known)
    return table


def _read_cells(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a table as stripped and composed strings; see `read_table`."""
    readers = {".csv": ",", ".tsv": "\t", ".xlsx": None}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path} must be one of {listing(readers)}, but its name ends in {path.suffix!r}."
        )
    separator = readers[path.suffix.lower()]
    options: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}
    with readable(path):
        try:
            if separator is None:
                cells = pd.read_excel(path, **options)
            else:
                text, separator = _without_hint(_decoded(path), separator)
                cells = _parsed(text, _separator(text, separator, columns), path, options)
        except UserError:
            raise
        except (ValueError, KeyError, BadZipFile, csv.Error) as error:  # of every parser
            raise UserError(
                f"{path} must be a table, but it cannot be read: {one_line(error)}."
            ) from error
    cells = cells.fillna("").astype(str).map(str.strip).map(composed)
    table = _below_header(cells, path)
    header = list(table.columns)
    for column in columns:
        if column not in header:
            hint = nearest(column, header)
            if len(header) == 1 and ";" in header[0]:
                hint = " It seems to use semicolons."
            raise UserError(
                f"{path} must have a column `{column}`, but has {listing(map(repr, header))}.{hint}"
            )
        if header.count(column) > 1:
            raise UserError(
                f"{path} must have one column `{column}`, but has {header.count(column)}."
            )
    return table


def _parsed(text: str, separator: str, path: Path, options: dict[str, Any]) -> pd.DataFrame:
    """Return the cells of a text, blank lines among them: rows are told by their number."""
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    width = next((len(row) for row in rows if any(map(str.strip, row))), 0)
    for number, row in enumerate(rows, start=1):
        if any(map(str.strip, row[width:])):
            raise UserError(
                f"{path} must have as many names in its first row as cells in each, but has "
                f"{width} names and {len(row)} cells in row {number}. Put a cell with a separator "
                "in it in quotes."
            )
    options = {**options, "names": range(max(map(len, rows), default=0)), "skip_blank_lines": False}
    cells = pd.read_csv(io.StringIO(text), sep=separator, **options)
    named: pd.DataFrame = cells.iloc[:, :width]
    return named


def _below_header(cells: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the rows that hold anything, named by the first of them; the index counts all rows."""
    cells = cells.loc[(cells != "").any(axis=1)]
    if cells.empty:
        raise UserError(
            f"{path} must be a table, but it is empty, or its first sheet is. Move the table there."
        )
    table: pd.DataFrame = cells.iloc[1:].set_axis(list(cells.iloc[0]), axis=1)
    return table


def _decoded(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 if its first two bytes say so."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    remedy = "Save it as CSV UTF-8"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} must be a table in UTF-8, but byte 0x{data[error.start]:02x} in row {row} is "
            f"none of it. {remedy} (it may be in the encoding of Windows, cp1252)."
        ) from error
    if "\0" in text:
        raise UserError(f"{path} must be a table in UTF-8, but has bytes of 0. {remedy}.")
    return text


def _without_hint(text: str, usual: str) -> tuple[str, str]:
    """Return a text with a blank line for Excel's ``sep=;``, and the separator that this tells."""
    hint = HINT.match(text)
    return (text, usual) if hint is None else ("\n" + text[hint.end() :], hint[1])


def _separator(text: str, usual: str, columns: Sequence[str]) -> str:
    """Return the separator that gives the columns asked for; the usual one if it or none does."""
    lines = text.lstrip("\r\n").splitlines()
    for separator in (usual, *(other for other in ";\t," if other != usual)):
        header = next(csv.reader(lines[:1], delimiter=separator), [])
        if {name.strip() for name in header} >= set(columns):
            return separator
    return usual


def with_points(name: str, cells: Sequence[str], path: Path) -> list[str]:
    """Return cells with decimal points if all are numbers and some have a decimal comma.

    Args:
        name: Of the column, for the error.
        cells: As text, empty where not known.
        path: The table, for the error.

    Raises:
        UserError: Numbers have points here and commas there, or commas that may separate thousands.
    """
    known = [cell for cell in cells if cell]
    commas = [cell for cell in known if "," in cell]
    if not commas or not all(map(NUMBER.fullmatch, known)):
        return list(cells)
    if points := [cell for cell in known if "." in cell]:
        raise UserError(
            f"{path}: `{name}` must write its numbers in one way, but has {commas[0]!r} and "
            f"{points[0]!r}. Write decimal points."
        )
    if all(map(THOUSANDS.fullmatch, commas)):
        raise UserError(
            f"{path}: `{name}` must have decimal points, but has {commas[0]!r}, whose comma may "
            "separate thousands. Write a point, or no comma."
        )
    return [cell.replace(",", ".") for cell in cells]


def _known(cell: str, classes: Collection[str] = ()) -> str:
    """Return a cell, or ``""`` if it means "not known" and is none of the classes."""
    return "" if cell.lower() in NOT_KNOWN and cell not in classes else cell


def read_clinical_table(
    path: Path, targets: Sequence[str], patient_column: str = PATIENT
) -> pd.DataFrame:
    """Read the clinical table as `read_clinical_words` does, without the words."""
    return read_clinical_words(path, targets, patient_column)[0]


def read_clinical_words(
    path: Path,
    targets: Sequence[str],
    patient_column: str = PATIENT,
    classes: Mapping[str, Collection[str]] | None = None,
) -> tuple[pd.DataFrame, dict[str, Counter[str]]]:
    """Read the clinical table, and which words of it were taken for "not known".

    Args:
        path: The table.
        targets: Columns that must be there.
        patient_column: The column of the patient.
        classes: Words that are classes of a column, though elsewhere they mean "not known".

    Returns:
        One row per patient, indexed by patient; by column how often each word was taken for "not
        known", without columns where none was.

    Raises:
        UserError: A patient is unnamed or stands in more than one row, commas in numbers may mean
            two things, or the patient's column is asked for as another.
    """
    if patient_column in targets:
        raise UserError(
            f"{path}: a target or site must be another column than the patient's, but got "
            f"`{patient_column}`."
        )
    table = _read_cells(path, [patient_column, *targets])
    words: dict[str, Counter[str]] = {}
    for position, column in enumerate(table.columns):
        before = list(table.iloc[:, position])
        after = [_known(cell, (classes or {}).get(column, ())) for cell in before]
        numeric = column in targets or column in (classes or {})
        table.isetitem(position, with_points(column, after, path) if numeric else after)
        taken = Counter(cell for cell, kept in zip(before, after, strict=True) if cell != kept)
        if taken:
            words[column] = taken
    _refuse_unnamed(table, path, patient_column)
    twice = [name for name, count in Counter(table[patient_column]).items() if count > 1]
    if twice:
        raise UserError(
            f"{path} must have one row per patient, but has several for {listing(sorted(twice))}."
        )
    indexed: pd.DataFrame = table.set_index(patient_column)
    return indexed, words


def sites_of(patients: Iterable[str], column: str, clinical: pd.DataFrame) -> dict[str, str]:
    """Return the site of every patient, empty where it is not known.

    Args:
        patients: Their names.
        column: A column of the table; or ``tcga-site``, for XX of a barcode TCGA-XX-....
        clinical: Indexed by patient; not looked at for ``tcga-site``.
    """
    if column != TCGA_SITE:
        return {name: str(clinical[column].get(name, "")) for name in patients}
    found = {name: BARCODE.match(name) for name in patients}
    return {name: match[1].upper() if match else "" for name, match in found.items()}


def read_slide_table(
    path: Path, patient_column: str = PATIENT, filename_column: str = FILENAME
) -> list[tuple[str, str]]:
    """Read the slide table as ``(patient, key)``: a key is a relative path, without ``.h5``.

    Args:
        path: The table.
        patient_column: The column of the patient.
        filename_column: The column of the file name.

    Raises:
        UserError: A cell is empty, or a file name would lead out of the feature folder.
    """
    table = read_table(path, [patient_column, filename_column])
    _refuse_unnamed(table, path, patient_column)
    _refuse_unnamed(table, path, filename_column)
    rows = zip(table[patient_column], table[filename_column], strict=True)
    return [(patient, slide_name(name, path, filename_column)) for patient, name in rows]


def refuse_two_owners(owned: Iterable[tuple[str, str]], what: str, table: Path) -> None:
    """Raise if something belongs to two patients.

    Args:
        owned: Patient and what is theirs.
        what: What that is, for the error.
        table: Where it stands, for the error.
    """
    owners: dict[str, str] = {}
    for patient, name in owned:
        if (owner := owners.setdefault(name, patient)) != patient:
            raise UserError(
                f"{table}: each {what} must belong to one patient, but {name} is claimed by "
                f"{owner} and {patient}."
            )


def _refuse_unnamed(table: pd.DataFrame, path: Path, column: str) -> None:
    if rows := [str(row + 1) for row in table.index[table[column] == ""]]:
        raise UserError(
            f"{path}: `{column}` must be filled in, but is empty in row {listing(rows)}."
        )
