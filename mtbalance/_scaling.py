"""What a gradient scaler puts on losses."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


def scaled(losses: Iterable[Tensor], scaler: GradScaler | None) -> list[Tensor]:
    """Return the losses times the scale, which is set up if that has not happened."""
    if scaler is None:
        return list(losses)
    with torch.enable_grad():  # backward passes may be made under no_grad, so this one product, too
        return [scaler.scale(loss) for loss in losses]


def scale_of(scaler: GradScaler | None, like: Tensor | None = None) -> float | None:
    """Return the scale; None where no scaler looks at ``.grad`` after the step.

    ``like`` is a loss, for a scaler that has not been called in this step.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    if like is not None:
        scaler.scale(like)  # makes the scaler set its scale up
    return scaler.get_scale()
