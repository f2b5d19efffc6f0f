"""Networks by name; the only file that knows all of them."""

from collections.abc import Sequence
from pathlib import Path

from examples.pathology.common.errors import UserError, nearest
from examples.pathology.extractors.ctranspath import CTRANSPATH, TILE_PX, ctranspath_extractor
from examples.pathology.extractors.extractor import Extractor
from examples.pathology.extractors.timm_models import TIMM_PREFIX, timm_extractor


def make_extractor(
    name: str,
    weights: Path | None,
    seed: int = 0,
    options: Sequence[str] = (),
    tile_px: int = TILE_PX,
) -> Extractor:
    """Build an extractor by name.

    Args:
        name: ``ctranspath``, or ``timm:`` and the name of one of timm's models.
        weights: Its checkpoint; None for seeded random weights, whose features carry no biology.
        seed: Seed of the random weights; not used with `weights`.
        options: Of timm's model, each ``KEY=VALUE``.
        tile_px: Edge of the tiles in pixels.

    Raises:
        UserError: If the name is unknown, or weights, options or tiles do not fit.
    """
    if name == CTRANSPATH:
        if options or tile_px != TILE_PX:
            raise UserError(
                f"{CTRANSPATH} takes tiles of {TILE_PX} px and no options, but got `tile-px` "
                f"{tile_px} and `extractor-option` {' '.join(options) or 'none'}. Leave them out."
            )
        return ctranspath_extractor(weights, seed)
    if name.startswith(TIMM_PREFIX):
        return timm_extractor(name.removeprefix(TIMM_PREFIX), weights, seed, options, tile_px)
    raise UserError(
        f"`extractor` must be {CTRANSPATH} or {TIMM_PREFIX}NAME, but got {name!r}."
        f"{nearest(name, [CTRANSPATH])}"
    )
