"""What made a feature file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.pathology.common.errors import UserError

logger = logging.getLogger(__name__)

NAMES = {
    "in_features": "length",
    "extractor": "extractor",
    "weights_sha256": "weights",
    "tile_size_um": "tile size in um",
    "random_weights": "random weights",
    "simulated": "simulated features",
}
FEATURE_KEYS = tuple(NAMES)


class Maker(NamedTuple):
    """What made a feature file."""

    extractor: str
    weights_sha256: str | None
    tile_size_um: float | None
    random_weights: bool
    width: int
    simulated: str = ""

    def agrees(self, other: Maker) -> bool:
        """Return whether nothing that both files say differs."""
        return all(a == b or a is None or b is None for a, b in zip(self, other, strict=True))

    def __str__(self) -> str:
        weights = "random weights" if self.random_weights else "weights"
        sha = self.weights_sha256[:8] if self.weights_sha256 else "not named"
        size = "" if self.tile_size_um is None else f", tiles of {self.tile_size_um:g} um"
        drawn = f"; {self.simulated}" if self.simulated else ""
        return f"{self.extractor} ({self.width}-d, {weights} {sha}{size}{drawn})"


def refuse_other_features(
    trained: Mapping[str, Any], found: Mapping[str, Any], model: Path, features: Path
) -> None:
    """Raise if features are not of the kind that a model was trained on.

    A file of another tool may not say its weights or tile size; what is not said is no difference,
    and is logged.

    Args:
        trained: What the model was trained on.
        found: What the features are.
        model: Of whom, for the error.
        features: Where they are, for the error.

    Raises:
        UserError: They differ.
    """
    for key in FEATURE_KEYS:
        was, now = trained[key], found[key]
        if key == "simulated":  # labels may be drawn or shuffled in one of the two
            was, now = bool(was), bool(now)
        if was is None or now is None:
            if was != now:
                logger.warning("%s or %s does not tell the %s", model, features, NAMES[key])
        elif was != now:
            raise UserError(
                f"`features` must have the {NAMES[key]} that the model was trained on ({was}), "
                f"but {features} has {now}. Extract the slides again with the settings of the run."
            )
