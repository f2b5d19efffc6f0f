"""Whether every bag can be trained on: up to some size, a CPU needs memory for tiles by tiles.

With dropout, PyTorch's attention on a CPU builds a matrix of tiles by tiles for each head, and
keeps it for the backward pass. Large bags attend in blocks (`attention`), as all do on a GPU and
without dropout: there memory grows with the tiles.
"""

from collections.abc import Sequence

import psutil

from examples.pathology.cohort.patients import Patient
from examples.pathology.common.errors import UserError
from examples.pathology.settings.crossval import HEADS, CrossvalConfig
from examples.pathology.training.attention import in_blocks

MATRICES_PER_LAYER = 3
"""That an encoder layer keeps: what softmax gives, what is dropped of it, and what is left.

One more is there for a while. Measured with 6 heads: 4.1, 7.2 and 10.8 of them with 1, 2 and 3
layers and 2,000 tiles (0.41, 0.72 and 1.03 GB). Half precision takes no less.
"""
WIDTHS_PER_LAYER, WIDTHS = 19, 5
"""Numbers kept of a tile where there are blocks, in widths: by encoder and decoder layer, and once.

A step with 2 layers takes 52 to 55, of which these are 43 (10,000 and 20,000 tiles).
"""


def refuse_bags_too_large(
    patients: Sequence[Patient], config: CrossvalConfig, device: str, *, memory: int | None = None
) -> None:
    """Raise if a bag needs more memory than this machine has for one step.

    What is refused would not fit even if nothing else were in memory; what is let pass may still
    not fit.

    Args:
        patients: All who are trained on in some fold.
        config: Tells width and number of layers, and how many tiles are drawn.
        device: Where the model is; resolved.
        memory: Of the machine in bytes; ``None``: as the system says.

    Raises:
        UserError: It does; the patient is named.
    """
    if not device.startswith("cpu") or not patients:
        return
    memory = memory_bytes() if memory is None else memory
    per_pair = 4 * HEADS * (MATRICES_PER_LAYER * config.layers + 1)
    per_tile = 4 * config.width * (WIDTHS_PER_LAYER * config.layers + WIDTHS)

    def needed(patient: Patient, limit: int | None = config.max_tiles) -> int:
        tiles = min(patient.tiles, limit or patient.tiles)
        return tiles * (per_tile if in_blocks(tiles, HEADS) else tiles * per_pair)

    worst = max(patients, key=needed)
    if needed(worst) > memory:
        tried = int(memory / 2 / per_tile), int((memory / 2 / per_pair) ** 0.5)
        fits = max(n for n in tried if all(needed(patient, n) <= memory for patient in patients))
        raise UserError(
            f"`max-tiles` must be {'lower' if config.max_tiles else 'given'} to train on a CPU, "
            f"since patient {worst.name} has {worst.tiles} tiles: a step on "
            f"{min(worst.tiles, config.max_tiles or worst.tiles)} needs {needed(worst) / 1e9:.0f} "
            f"GB, and this machine has {memory / 1e9:.0f} GB. Give --max-tiles {fits} or fewer, or "
            "train on a GPU."
        )


def memory_bytes() -> int:
    """Return how much memory this machine has, swap included."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)
