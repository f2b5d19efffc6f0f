"""Feature files looked at once: usable, of one kind, and each of one patient?"""

import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from examples.pathology.cohort.patients import Patient
from examples.pathology.common.errors import UserError, listing, one_line
from examples.pathology.features.files import UnavailableError, read_features
from examples.pathology.features.kind import FeatureKind, together


class Inspection:
    """Looks at every feature file once: is it usable, and does it fit the others?"""

    def __init__(self) -> None:
        self.tiles: dict[Path, int] = {}
        self.crc: dict[Path, int] = {}
        self._kinds: dict[FeatureKind, Path] = {}

    def problem(self, path: Path) -> str:
        """Return why a file cannot be used, or an empty string.

        Raises:
            UnavailableError: It may be sound, but cannot be read now.
        """
        try:
            bag = read_features(path)
        except UnavailableError:
            raise
        except (OSError, ValueError, KeyError) as error:  # h5py's for a broken or foreign file
            return f"unreadable: {one_line(error)}"
        if len(bag.feats) == 0:
            return "no tiles"
        self.tiles[path] = len(bag.feats)
        self.crc[path] = zlib.crc32(bag.feats.tobytes())
        self._kinds.setdefault(bag.kind, path)
        return ""

    def kind(self) -> FeatureKind:
        """Return what the usable files say together.

        A file of another tool may not know its weights or tile size: that alone is no difference.

        Raises:
            UserError: They do not come from one extractor with one set of weights.
        """
        kinds = sorted(self._kinds, key=lambda kind: str(self._kinds[kind]))
        for first, second in itertools.combinations(kinds, 2):
            if not first.agrees(second):
                raise UserError(
                    "All feature files must come from one extractor with the same weights, tile "
                    f"size and magnification, but {self._kinds[first].name} is of {first} and "
                    f"{self._kinds[second].name} of {second}."
                )
        return together(list(self._kinds))

    def refuse_copies(self, patients: Iterable[Patient]) -> None:
        """Raise if two patients have the same features, to the last bit, in files of other names.

        No two slides give that: one slide is under two patients, of whom one may train a model that
        is tested on the other, and of whose labels one at least is of another slide.

        Raises:
            UserError: There are such files; the patients are named.
        """
        first: dict[tuple[int, int], tuple[str, Path]] = {}
        copies = []
        for patient in patients:
            for path in patient.files:
                sums = self.tiles[path], self.crc[path]
                owner, other = first.setdefault(sums, (patient.name, path))
                if owner != patient.name and _same_features(path, other):
                    copies.append(f"{other.name} of {owner} and {path.name} of {patient.name}")
        if copies:
            raise UserError(
                "Each slide must belong to one patient, but the same features are in "
                f"{listing(copies, 4)}. Take whatever is in the wrong place out of the slide table."
            )


def _same_features(one: Path, other: Path) -> bool:
    """Return whether they are the same, as checksums may agree by chance."""
    return np.array_equal(read_features(one).feats, read_features(other).feats)
