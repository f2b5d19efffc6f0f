"""A trained fold, and what it says about patients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.pathology.cohort.patients import Patient
from examples.pathology.cohort.targets import Target
from examples.pathology.training.bags import BagStore
from examples.pathology.training.losses import Scaler
from examples.pathology.training.model import JointTransformer, Prediction


@dataclass(frozen=True)
class Fitted:
    """A trained fold.

    Args:
        model: With the parameters of the best epoch, in eval mode.
        targets: What it predicts, in the order of its heads.
        scalers: One per regression target.
        history: One row of numbers per epoch.
        best_epoch: The epoch (from 1) whose parameters were kept.
        precision: Of its matrix products, in training and prediction.
    """

    model: JointTransformer
    targets: tuple[Target, ...]
    scalers: Mapping[str, Scaler]
    history: tuple[Mapping[str, float], ...]
    best_epoch: int
    precision: str = "float32"

    @property
    def seconds(self) -> float:
        """How long its training took."""
        return sum(row["seconds"] for row in self.history)

    @property
    def validation_loss(self) -> float:
        """The mean loss of the primary target on the validation part, at the best epoch."""
        return self.history[self.best_epoch - 1][f"validation/{self.targets[0].name}"]


@dataclass(frozen=True)
class PatientPrediction:
    """What the model says about one patient.

    Args:
        patient: Who.
        probabilities: For every classification target its class probabilities ``(classes,)``.
        numbers: For every regression target the prediction in the target's unit.
        embedding: The [cls] embedding ``(d,)``.
    """

    patient: Patient
    probabilities: Mapping[str, NDArray[np.float64]]
    numbers: Mapping[str, float]
    embedding: NDArray[np.float32]


def forward(
    model: JointTransformer, tiles: NDArray[np.float32], device: torch.device, precision: str
) -> Prediction:
    """Run the model on the tiles of one patient; outputs are in single precision.

    Args:
        model: On ``device``.
        tiles: ``(n, in_features)``.
        device: Where to compute.
        precision: As in `CrossvalConfig`.
    """
    bag = torch.from_numpy(tiles).to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        outputs, embedding = model(bag)
    return Prediction(tuple(output.float() for output in outputs), embedding.float())


@contextmanager
def matrix_precision(precision: str) -> Iterator[None]:
    """Let matrix products of NVIDIA GPUs run in TensorFloat-32 where that is asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def predict(
    fitted: Fitted,
    patients: Sequence[Patient],
    *,
    bags: BagStore | None = None,
    device: str = "cpu",
) -> list[PatientPrediction]:
    """Predict every target of every patient.

    Args:
        fitted: A trained fold.
        patients: For whom.
        bags: Where tiles are read; ``None``: a store of its own.
        device: Where the model is.
    """
    bags = bags or BagStore()
    fitted.model.eval()
    predictions = []
    stream = bags.stream([patient] for patient in patients)
    for patient, (tiles,) in zip(patients, stream, strict=True):
        with torch.inference_mode(), matrix_precision(fitted.precision):
            outputs, embedding = forward(
                fitted.model, tiles, torch.device(device), fitted.precision
            )
        said = in_units(fitted, outputs)
        numbers = {name: float(said.pop(name)[0, 0]) for name in fitted.scalers}
        probabilities = {name: of_bags[0] for name, of_bags in said.items()}
        predictions.append(
            PatientPrediction(patient, probabilities, numbers, embedding[0].cpu().numpy())
        )
    return predictions


def in_units(fitted: Fitted, outputs: Sequence[Tensor]) -> dict[str, NDArray[np.float64]]:
    """Return by target the probability of every class, or the value in its unit, ``(b, k)``."""
    said = {}
    for target, output in zip(fitted.targets, outputs, strict=True):
        if target.kind == "classification":
            said[target.name] = output.double().softmax(1).cpu().numpy()
        else:
            said[target.name] = fitted.scalers[target.name].unscale(output.double().cpu().numpy())
    return said
