"""How far a fold has come, on disk: whole or not at all, so that a killed run goes on from there.

A resumed fold equals an uninterrupted one bit for bit: everything that the next epoch depends on is
in the file (parameters, optimizer, balancer, schedule, random numbers, the best epoch so far), and
the order of patients is a function of seed and epoch.
"""

import io
import logging
import time
from pathlib import Path
from typing import Any

import torch

from examples.pathology.common.files import write_bytes

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
# Most of the time that may go into writing: an epoch of seconds need not be saved every time.
COST_SHARE = 0.05


class Checkpoint:
    """The file that a fold's state is kept in while the fold is trained.

    It is written after every epoch, unless writing would take more than a twentieth of the time:
    then after the next, but always after the last. What is lost by a kill is repeated, and gives
    the same.

    Args:
        path: Where; ``None`` keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._cost = 0.0
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state that an earlier run left, or ``None``."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  (torch raises many kinds for a damaged file)
            logger.warning(
                "%s cannot be read (%s); the fold starts anew", self.path, type(error).__name__
            )
            return None
        return state

    def save(self, state: dict[str, Any], *, last: bool = False) -> None:
        """Write the state atomically, unless it is not the last and that would cost too much."""
        started = time.monotonic()
        early = started - self._saved < self._cost / COST_SHARE
        if self.path is None or (early and not last):
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.path, buffer.getvalue())
        self._saved = time.monotonic()
        self._cost = self._saved - started


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the random numbers that dropout and initial weights are drawn from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go back to a state of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
