"""Feature files looked at once: usable, and of one kind?"""

import itertools
import zlib
from pathlib import Path

from examples.pathology.common.errors import UserError, one_line
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
