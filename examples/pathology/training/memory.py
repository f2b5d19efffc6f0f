"""Whether the largest bag can be trained on: on a CPU, memory grows with the square of its tiles.

With dropout, PyTorch's attention on a CPU builds a matrix of tiles by tiles for each head, and
keeps it for the backward pass. On a GPU, and without dropout, it goes through the tiles in blocks.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from examples.pathology.cohort.patients import Patient
from examples.pathology.common.errors import UserError
from examples.pathology.settings.crossval import HEADS, CrossvalConfig

MATRICES_PER_LAYER = 3
"""That an encoder layer keeps: what softmax gives, what is dropped of it, and what is left.

One more is there for a while. Measured with 6 heads: 4.1, 7.2 and 10.8 of them with 1, 2 and 3
layers and 2,000 tiles (0.41, 0.72 and 1.03 GB). Half precision takes no less.
"""


def refuse_bags_too_large(
    patients: Sequence[Patient], config: CrossvalConfig, device: str, *, memory: int | None = None
) -> None:
    """Raise if the largest bag needs more memory than this machine has for its attention alone.

    What is refused would not fit even if nothing else were in memory; what is let pass may still
    not fit.

    Args:
        patients: All who are trained on in some fold.
        config: Tells the number of layers, and how many tiles are drawn.
        device: Where the model is; resolved.
        memory: Of the machine in bytes; ``None``: as the system says.

    Raises:
        UserError: It does; the patient is named.
    """
    memory = memory_bytes() if memory is None else memory
    if not device.startswith("cpu") or memory is None or not patients:
        return
    largest = max(patients, key=lambda patient: patient.tiles)
    tiles = min(largest.tiles, config.max_tiles or largest.tiles)
    per_pair = 4 * HEADS * (MATRICES_PER_LAYER * config.layers + 1)
    if tiles**2 * per_pair > memory:
        fits = int((memory / 2 / per_pair) ** 0.5)
        raise UserError(
            f"`max-tiles` must be given to train on a CPU, since patient {largest.name} has "
            f"{largest.tiles} tiles: attention among {tiles} needs "
            f"{tiles**2 * per_pair / 1e9:.0f} GB, and this machine has {memory / 1e9:.0f} GB. Give "
            f"--max-tiles {fits} or fewer, or train on a GPU."
        )


def memory_bytes() -> int | None:
    """Return how much memory this machine has, swap included, or None where it does not say."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, for one
        return None
    return memory + _swap_bytes() if memory > 0 else None


def _swap_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")]
    return sum(found)
