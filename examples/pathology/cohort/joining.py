"""The clinical table, the slide table and the feature files side by side, checked and matched."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from examples.pathology.common.errors import UserError, listing
from examples.pathology.settings.cohort import CohortConfig
from examples.pathology.tables.matching import match_files, slide_key
from examples.pathology.tables.reading import FILENAME, PATIENT, read_table


def read_clinical_table(
    path: Path, targets: Sequence[str], patient_column: str = PATIENT
) -> pd.DataFrame:
    """Read the clinical table: one row per patient, indexed by patient.

    Args:
        path: The table.
        targets: Columns that must be there.
        patient_column: The column of the patient.

    Raises:
        UserError: A patient is unnamed or stands in more than one row.
    """
    table = read_table(path, [patient_column, *targets])
    _refuse_unnamed(table, path, patient_column)
    twice = [name for name, count in Counter(table[patient_column]).items() if count > 1]
    if twice:
        raise UserError(
            f"{path} must have one row per patient, but has several for {listing(sorted(twice))}."
        )
    indexed: pd.DataFrame = table.set_index(patient_column)
    return indexed


def read_slide_table(
    path: Path, patient_column: str = PATIENT, filename_column: str = FILENAME
) -> list[tuple[str, str]]:
    """Read the slide table as ``(patient, key)``: a key is a relative path without suffix.

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
    return [(patient, slide_key(name, path, filename_column)) for patient, name in rows]


@dataclass(frozen=True)
class Joined:
    """Tables and files side by side, before anybody is left out.

    Args:
        clinical: One row per patient, indexed by patient, with the columns asked for.
        slides: Patient and key of every row of the slide table.
        files: Feature files by relative path without suffix.
        found: The files that every key may mean.
    """

    clinical: pd.DataFrame
    slides: Sequence[tuple[str, str]]
    files: Mapping[str, Path]
    found: Mapping[str, list[str]]

    @property
    def slides_of(self) -> dict[str, list[str]]:
        """The keys of every patient of the slide table."""
        keys: dict[str, list[str]] = defaultdict(list)
        for patient, key in self.slides:
            keys[patient].append(key)
        return keys

    @property
    def unclaimed(self) -> list[str]:
        """Feature files that no row of the slide table may mean."""
        claimed = {name for candidates in self.found.values() for name in candidates}
        return [name for name in self.files if name not in claimed]


def join(
    clini: Path,
    slide_table: Path,
    features: Path,
    columns: Sequence[str],
    *,
    patient_column: str = PATIENT,
    filename_column: str = FILENAME,
) -> Joined:
    """Read both tables and match the slide table with the feature files.

    Args:
        clini: Clinical table.
        slide_table: One row per slide.
        features: Folder of ``.h5`` files, searched with its sub-folders.
        columns: Columns that the clinical table must have, besides the patient's.
        patient_column: Column of the patient in both tables.
        filename_column: Column of the file name in the slide table.

    Raises:
        UserError: The tables contradict themselves or each other.
    """
    clinical = read_clinical_table(clini, columns, patient_column)
    slides = read_slide_table(slide_table, patient_column, filename_column)
    files = find_feature_files(features)
    found = match_files((key for _, key in slides), files)
    _refuse_shared_files(slides, found, slide_table)
    return Joined(clinical, slides, files, found)


def join_for(config: CohortConfig) -> Joined:
    """Read and match what a cohort is made of; its targets must be columns."""
    return join(
        config.clini,
        config.slide_table,
        config.features,
        [config.target, *config.auxiliary],
        patient_column=config.patient_column,
        filename_column=config.filename_column,
    )


def find_feature_files(folder: Path) -> dict[str, Path]:
    """Return the ``.h5`` files of a folder and its sub-folders by relative path without suffix.

    Raises:
        UserError: There are none.
    """
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.h5"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        what = "holds none" if folder.is_dir() else "is no folder"
        raise UserError(f"`features` must be a folder of .h5 files, but {folder} {what}.")
    return files


def _refuse_shared_files(
    slides: Sequence[tuple[str, str]], found: Mapping[str, list[str]], table: Path
) -> None:
    """Raise if a feature file belongs to two patients, which would leak between folds."""
    owners: dict[str, str] = {}
    for patient, key in slides:
        if len(found[key]) == 1 and (owner := owners.setdefault(found[key][0], patient)) != patient:
            raise UserError(
                f"{table}: each feature file must belong to one patient, but {found[key][0]}.h5 "
                f"is claimed by {owner} and {patient}."
            )


def _refuse_unnamed(table: pd.DataFrame, path: Path, column: str) -> None:
    rows = [str(row + 2) for row in np.flatnonzero(table[column] == "")]
    if rows:
        raise UserError(
            f"{path}: `{column}` must be filled in, but is empty in row {listing(rows)}."
        )
