"""Feature files looked at once: usable, and of one kind?"""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np

from examples.pathology.common.errors import UserError, one_line
from examples.pathology.features.files import read_features
from examples.pathology.features.kind import Maker


class Inspection:
    """Looks at every feature file once: is it usable, and does it fit the others?"""

    def __init__(self) -> None:
        self.tiles: dict[Path, int] = {}
        self.crc: dict[Path, int] = {}
        self._makers: dict[Maker, Path] = {}

    def problem(self, path: Path) -> str:
        """Return why a file cannot be used, or an empty string."""
        try:
            bag = read_features(path)
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # h5py's words for a broken or foreign file
            return f"unreadable: {one_line(error)}"
        if len(bag.feats) == 0:
            return "no tiles"
        if not np.isfinite(bag.feats).all():
            return "unreadable: features that are not finite"
        self.tiles[path] = len(bag.feats)
        self.crc[path] = zlib.crc32(bag.feats.tobytes())
        maker = Maker(
            bag.extractor,
            bag.weights_sha256,
            bag.tile_size_um,
            bag.random_weights,
            bag.feats.shape[1],
            bag.simulated,
        )
        self._makers.setdefault(maker, path)
        return ""

    def refuse_mixture(self) -> None:
        """Raise if the usable files do not come from one extractor with one set of weights.

        A file of another tool may not know its weights or tile size: that alone is no difference.
        """
        makers = sorted(self._makers, key=lambda maker: str(self._makers[maker]))
        for first, second in itertools.combinations(makers, 2):
            if not first.agrees(second):
                raise UserError(
                    "All feature files must come from one extractor with the same weights and tile "
                    f"size, but {self._makers[first].name} is of {first} and "
                    f"{self._makers[second].name} of {second}."
                )

    def maker(self) -> Maker:
        """Return what the usable files say together."""
        makers = list(self._makers)
        return makers[0]._replace(
            weights_sha256=next((m.weights_sha256 for m in makers if m.weights_sha256), None),
            tile_size_um=next((m.tile_size_um for m in makers if m.tile_size_um), None),
        )
