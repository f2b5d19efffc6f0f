"""Networks by name; the only file that knows all of them."""

from pathlib import Path

from examples.pathology.common.errors import UserError, nearest
from examples.pathology.extractors.ctranspath import CTRANSPATH, ctranspath_extractor
from examples.pathology.extractors.extractor import Extractor
from examples.pathology.extractors.timm_models import TIMM_PREFIX, timm_extractor


def make_extractor(name: str, weights: Path | None, seed: int = 0) -> Extractor:
    """Build an extractor by name.

    Args:
        name: ``ctranspath``, or ``timm:`` and the name of one of timm's models.
        weights: Its checkpoint; None for seeded random weights, whose features carry no biology.
        seed: Seed of the random weights; not used with `weights`.

    Raises:
        UserError: If the name is unknown or the weights do not fit.
    """
    if name == CTRANSPATH:
        return ctranspath_extractor(weights, seed)
    if name.startswith(TIMM_PREFIX):
        return timm_extractor(name.removeprefix(TIMM_PREFIX), weights, seed)
    raise UserError(
        f"`extractor` must be {CTRANSPATH} or {TIMM_PREFIX}NAME, but got {name!r}."
        f"{nearest(name, [CTRANSPATH])}"
    )
