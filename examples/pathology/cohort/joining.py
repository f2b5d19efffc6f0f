"""The clinical table, the slide table and the feature files side by side, checked and matched."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from examples.pathology.common.errors import UserError, listing
from examples.pathology.common.files import walk
from examples.pathology.settings.cohort import Sources
from examples.pathology.tables.matching import log_other_folders, match_files
from examples.pathology.tables.reading import (
    read_clinical_words,
    read_slide_table,
    refuse_two_owners,
)


@dataclass(frozen=True)
class Joined:
    """Tables and files side by side, before anybody is left out.

    Args:
        clinical: One row per patient, indexed by patient, with the columns asked for.
        slides: Patient and key of every row of the slide table.
        files: Feature files by relative path without suffix.
        found: The files that every key may mean.
        unknown: By column, how often each word was taken for "not known".
    """

    clinical: pd.DataFrame
    slides: Sequence[tuple[str, str]]
    files: Mapping[str, Path]
    found: Mapping[str, list[str]]
    unknown: Mapping[str, Counter[str]]

    def unknown_of(self, column: str) -> str:
        """Return which words of a column were taken for "not known", and how often."""
        words = self.unknown.get(column, Counter()).most_common()
        return listing(f"{word!r} ({count})" for word, count in words)

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
    sources: Sources, columns: Sequence[str], classes: Mapping[str, Collection[str]] | None = None
) -> Joined:
    """Read both tables and match the slide table with the feature files.

    Args:
        sources: Where they are.
        columns: Columns that the clinical table must have, besides the patient's.
        classes: Words that are classes of a column, though elsewhere they mean "not known".

    Raises:
        UserError: The tables contradict themselves or each other.
    """
    clinical, unknown = read_clinical_words(sources.clini, columns, sources.patient_column, classes)
    slides = read_slide_table(sources.slide_table, sources.patient_column, sources.filename_column)
    files = find_feature_files(sources.features)
    found = match_files((key for _, key in slides), files)
    log_other_folders(found, sources.slide_table, sources.filename_column)
    owned = ((patient, f"{found[key][0]}.h5") for patient, key in slides if len(found[key]) == 1)
    refuse_two_owners(owned, "feature file", sources.slide_table)  # would leak between folds
    return Joined(clinical, slides, files, found, unknown)


def find_feature_files(folder: Path) -> dict[str, Path]:
    """Return the ``.h5`` files of a folder and its sub-folders by relative path without suffix.

    Links to folders are followed, as among slides.

    Raises:
        UserError: There are none.
    """
    found = (directory / name for directory, names in walk(folder) for name in names)
    paths = sorted(path for path in found if path.suffix == ".h5")
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    if not files:
        what = "holds none" if folder.is_dir() else "is no folder"
        raise UserError(f"`features` must be a folder of .h5 files, but {folder} {what}.")
    return files
