"""Of what kind tile features are: what made them, and of how large a piece of tissue."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureKind:
    """What the tile features of one or many feature files are.

    Args:
        in_features: Length of a tile's feature vector; 768 for CTransPath.
        extractor: Name of the network that made them; empty if the files do not say.
        weights_sha256: Checksum of its weights; ``None`` if unknown or random.
        tile_size_um: Edge of a tile on the slide in um; ``None`` if the files do not say.
        tile_size_px: Edge of a tile in pixels, as it was cut; ``None`` if the files do not say.
        random_weights: Whether the network had seeded random weights, so that the features carry
            no learned biology.
        simulated: A sentence that says so where the features are simulated; empty otherwise.
        magnification: At which the tiles were seen, 20 for 20x; ``None`` if the files do not say.
            TRIDENT's tell it, and not the size in um.
    """

    in_features: int
    extractor: str
    weights_sha256: str | None = None
    tile_size_um: float | None = None
    random_weights: bool = False
    simulated: str = ""
    tile_size_px: int | None = None
    magnification: float | None = None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "FeatureKind":
        """Return a kind from its parts by name (`asdict` gives them), whatever stands beside them.

        Raises:
            KeyError: A part is missing.
        """
        # What runs of earlier releases do not tell.
        earlier = {"tile_size_px": None, "magnification": None}
        return cls(**{field.name: {**earlier, **stored}[field.name] for field in fields(cls)})

    def agrees(self, other: "FeatureKind") -> bool:
        """Return whether nothing that both say differs."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return all(a == b or a is None or b is None for a, b in pairs)

    def __str__(self) -> str:
        weights = "random weights" if self.random_weights else "weights"
        sha = self.weights_sha256[:8] if self.weights_sha256 else "not named"
        drawn = f"; {self.simulated}" if self.simulated else ""
        return f"{self.extractor} ({self.in_features}-d, {weights} {sha}{self.tiles}{drawn})"

    @property
    def tiles(self) -> str:
        """How large the tiles are, as the end of a list; empty if the files do not say."""
        um = "" if self.tile_size_um is None else f" of {self.tile_size_um:g} um"
        px = "" if self.tile_size_px is None else f" in {self.tile_size_px} px"
        seen = "" if self.magnification is None else f" at {self.magnification:g}x"
        return f", tiles{um}{px}{seen}" if um or px or seen else ""


def together(kinds: Sequence[FeatureKind]) -> "FeatureKind":
    """Return what kinds that agree say together: what one does not tell, another may.

    Args:
        kinds: At least one.
    """
    return replace(
        kinds[0],
        weights_sha256=next((k.weights_sha256 for k in kinds if k.weights_sha256), None),
        tile_size_um=next((k.tile_size_um for k in kinds if k.tile_size_um), None),
        tile_size_px=next((k.tile_size_px for k in kinds if k.tile_size_px), None),
        magnification=next((k.magnification for k in kinds if k.magnification), None),
    )


_WORDS = {
    "in_features": "length",
    "extractor": "extractor",
    "weights_sha256": "weights",
    "tile_size_um": "tile size in um",
    "tile_size_px": "tile size in px",
    "random_weights": "random weights",
    "simulated": "simulated features",
    "magnification": "magnification",
}


def refuse_other_features(
    trained: FeatureKind, found: FeatureKind, model: Path, features: Path
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
    for name, words in _WORDS.items():
        was, now = getattr(trained, name), getattr(found, name)
        if name == "simulated":  # labels may be drawn or shuffled in one of the two
            was, now = bool(was), bool(now)
        if was is None or now is None:
            if was != now:
                logger.warning("%s or %s does not tell the %s", model, features, words)
        elif was != now:
            raise UserError(
                f"`features` must have the {words} that the model was trained on ({was}), "
                f"but {features} has {now}. Extract the slides again with the settings of the run."
            )
