"""What predictions are trained on: cross-entropy, or the squared error of a scaled value.

A regression target is scaled to [0, 1] by the training part, so that losses of any unit meet on one
scale; the scalers are kept, so that predictions go back to the unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from examples.pathology.cohort.patients import Patient, known_values, values_of
from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import UserError

Number = TypeVar("Number", float, NDArray[np.float64])


@dataclass(frozen=True)
class Scaler:
    """Brings a regression target to [0, 1] over the training part, and predictions back.

    Args:
        low: Minimum over the training part, in the target's unit.
        high: Its maximum.
    """

    low: float
    high: float

    def scale(self, value: float) -> float:
        """Return a value in [0, 1] for what lies within the training part's range."""
        return (value - self.low) / (self.high - self.low)

    def unscale(self, value: Number) -> Number:
        """Return a scaled value, or an array of them, in the target's unit."""
        return self.low + value * (self.high - self.low)


def fit_scalers(targets: Sequence[Target], patients: Sequence[Patient]) -> dict[str, Scaler]:
    """Fit one scaler per regression target on the training part.

    Args:
        targets: The primary target first.
        patients: Of the training part.

    Raises:
        UserError: A target has fewer than two different values there.
    """
    scalers = {}
    known = values_of(patients, targets)
    for target in targets:
        if target.kind == "regression":
            values = [float(value) for value in known[target.name]]
            if len(set(values)) < 2:
                raise UserError(
                    f"`{target.name}` must have at least 2 values in every training part, but has "
                    f"{len(set(values))} among {len(patients)} patients."
                )
            scalers[target.name] = Scaler(min(values), max(values))
    return scalers


def task_losses(
    outputs: Sequence[Tensor],
    patient: Patient,
    targets: Sequence[Target],
    scalers: Mapping[str, Scaler],
) -> dict[str, Tensor]:
    """Return the loss of every target that is known for a patient; the others are absent.

    Args:
        outputs: The model's ``(1, width)`` outputs, one per target, the primary one first.
        patient: Who they are for.
        targets: What they are of.
        scalers: One per regression target.
    """
    losses = {}
    known = known_values(patient, targets)
    for target, output in zip(targets, outputs, strict=True):
        if target.name not in known:
            continue
        value = known[target.name]
        if target.kind == "classification":
            truth = torch.tensor([target.classes.index(str(value))], device=output.device)
            losses[target.name] = F.cross_entropy(output, truth)
        else:
            scaled = scalers[target.name].scale(float(value))
            losses[target.name] = F.mse_loss(output, torch.full_like(output, scaled))
    return losses
