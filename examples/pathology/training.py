"""One fold: fit on the training part, stop on the validation part, hand back the best checkpoint.

The primary target's cross-entropy and each auxiliary loss (cross-entropy, or the mean squared error
of a target scaled to [0, 1] by the training part) meet in a `mtbalance.Balancer`. The baseline
trains the same network with the primary target's token alone, under the same protocol. Nothing here
ever sees the test fold.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from examples.pathology.cohort import BagStore, Cohort, Patient, Target
from examples.pathology.errors import RunError, UserError
from examples.pathology.model import JointTransformer
from mtbalance import Balancer, make_balancer

logger = logging.getLogger(__name__)

BASELINE = "baseline"


@dataclass(frozen=True)
class TrainingConfig:
    """How one fold is trained. Defaults and their sources: `config.CrossvalConfig`.

    Args:
        balancer: ``baseline`` or a name for `mtbalance.make_balancer`.
        epochs: Most epochs.
        patience: Epochs without a lower validation loss after which the fold stops, exactly.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW; learned task weights are not decayed.
        schedule: ``constant`` or ``cosine`` (one step per epoch, to 0 after `epochs`).
        standardize: Whether features are brought to mean 0 and standard deviation 1 over the tiles
            of the training part.
        seed: Of this fold alone, so that no fold depends on another.
        device: Where to train.
    """

    balancer: str = "naive"
    epochs: int = 32
    patience: int = 7
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "constant"
    standardize: bool = False
    seed: int = 0
    device: str = "cpu"


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

    def unscale(self, value: float) -> float:
        """Return a scaled value in the target's unit."""
        return self.low + value * (self.high - self.low)


@dataclass(frozen=True)
class Fitted:
    """A trained fold.

    Args:
        model: With the parameters of the best epoch, in eval mode.
        targets: What it predicts, in the order of its heads.
        scalers: One per regression target.
        history: One row of numbers per epoch.
        best_epoch: The epoch (from 1) whose parameters were kept.
    """

    model: JointTransformer
    targets: tuple[Target, ...]
    scalers: Mapping[str, Scaler]
    history: tuple[Mapping[str, float], ...]
    best_epoch: int


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


def fit_scalers(targets: Sequence[Target], patients: Sequence[Patient]) -> dict[str, Scaler]:
    """Fit one scaler per regression target on the training part.

    Raises:
        UserError: A target has fewer than two different values there.
    """
    scalers = {}
    for target in targets:
        if target.kind == "regression":
            values = [float(p.known[target.name]) for p in patients if target.name in p.known]
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
    for i, (target, output) in enumerate(zip(targets, outputs, strict=True)):
        value = patient.label if i == 0 else patient.known.get(target.name)
        if value is None:
            continue
        if target.kind == "classification":
            truth = torch.tensor([target.classes.index(str(value))], device=output.device)
            losses[target.name] = F.cross_entropy(output, truth)
        else:
            scaled = scalers[target.name].scale(float(value))
            losses[target.name] = F.mse_loss(output, torch.full_like(output, scaled))
    return losses


def fit_fold(
    cohort: Cohort,
    train: Sequence[Patient],
    validation: Sequence[Patient],
    config: TrainingConfig,
    *,
    lookahead: Sequence[Patient] = (),
    bags: BagStore | None = None,
    name: str = "fold",
) -> Fitted:
    """Train one fold.

    Args:
        cohort: Tells the targets and the length of a feature vector.
        train: Patients to step on; a step is one patient with all tiles.
        validation: Patients whose mean primary cross-entropy decides when to stop and what to keep.
        config: How.
        lookahead: Patients for the look-ahead batches of a weighting that needs them (Auto-Lambda).
            Those that are not in ``train`` count as training part too: scalers see them.
        bags: Where tiles are read; ``None``: a store of its own.
        name: What to call the fold in errors and progress.

    Returns:
        The model of the best epoch and the history.

    Raises:
        RunError: A loss is not finite; the fold, epoch, patient and target are named.
        UserError: The balancer's name is unknown, or an auxiliary target cannot be scaled.
    """
    bags = bags or BagStore()
    device = torch.device(config.device)
    targets = cohort.targets[:1] if config.balancer == BASELINE else cohort.targets
    training_part = [*train, *(p for p in lookahead if p not in train)]
    scalers = fit_scalers(targets, training_part)
    primary = targets[0].name
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # the caller's random numbers stay as they were
        learner = _Learner(config, cohort.in_features, targets, scalers, bags, lookahead, name)
        if config.standardize:
            learner.model.standardize(*_mean_and_deviation(bags, training_part))
        best, best_epoch, best_state = math.inf, 0, learner.state()
        history: list[Mapping[str, float]] = []
        progress = tqdm(range(1, config.epochs + 1), desc=name, unit="epoch", leave=False)
        for epoch in progress:
            started = time.perf_counter()
            figures = learner.train_epoch(train, epoch)
            validated = learner.validate(validation, epoch)
            history.append(
                {
                    "epoch": epoch,
                    **figures,
                    **{f"validation/{task}": loss for task, loss in validated.items()},
                    "seconds": time.perf_counter() - started,
                }
            )
            if validated[primary] < best:
                best, best_epoch, best_state = validated[primary], epoch, learner.state()
            progress.set_postfix({"validation": f"{validated[primary]:.3f}", "best": best_epoch})
            if epoch - best_epoch >= config.patience:
                break
        progress.close()
    learner.model.load_state_dict(best_state)
    learner.model.eval()
    return Fitted(learner.model, targets, scalers, tuple(history), best_epoch)


class _Learner:
    """A model with what moves it: optimizer, schedule, balancer, and the order of patients."""

    def __init__(
        self,
        config: TrainingConfig,
        in_features: int,
        targets: Sequence[Target],
        scalers: Mapping[str, Scaler],
        bags: BagStore,
        lookahead: Sequence[Patient],
        name: str,
    ) -> None:
        self.device = torch.device(config.device)
        self.targets, self.scalers, self.bags, self.name = targets, scalers, bags, name
        self.model = JointTransformer([t.width for t in targets], in_features=in_features)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # at batch 1 the step costs as much as the gradients; fused, a quarter
        )
        self.balancer: Balancer | None = None
        if config.balancer != BASELINE:
            self.balancer = _make(
                config.balancer,
                [target.name for target in targets],
                self.model.shared_modules(),
                self.optimizer,
                config.seed,
            ).to(self.device)
            if learned := list(self.balancer.parameters()):
                self.optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
            if self.balancer.weighting.needs_validation and not lookahead:
                raise ValueError(f"`lookahead` must hold patients for {config.balancer}.")
        self.scheduler: CosineAnnealingLR | None = None
        if config.schedule == "cosine":
            self.scheduler = CosineAnnealingLR(self.optimizer, T_max=config.epochs)
        self.order = np.random.default_rng(config.seed)
        self.ahead = _stream(lookahead, np.random.default_rng([config.seed, 1]))

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the model's parameters."""
        return copy.deepcopy(self.model.state_dict())

    def train_epoch(self, patients: Sequence[Patient], epoch: int) -> dict[str, float]:
        """Take one step per patient, in a new order, and return the means of what steps report."""
        self.model.train()
        means = _Means()
        for i in self.order.permutation(len(patients)):
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._losses(patients[i])
            self._require_finite(losses, patients[i], epoch)
            try:
                means.add(self._backward(losses))
            except FloatingPointError as error:  # finite losses, but a gradient is not
                where = f"{self.name}, epoch {epoch}, patient {patients[i].name}"
                raise RunError(f"{where}: {error}") from error
            self.optimizer.step()
        if self.balancer is not None:
            self.balancer.end_epoch()
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self.scheduler is not None:
            self.scheduler.step()
        return {"learning_rate": rate, **means.means()}

    def validate(self, patients: Sequence[Patient], epoch: int) -> dict[str, float]:
        """Return the mean loss per target over the patients for whom it is known."""
        self.model.eval()
        means = _Means()
        with torch.inference_mode():
            for patient in patients:
                losses = self._losses(patient)
                self._require_finite(losses, patient, epoch)
                means.add({task: float(loss) for task, loss in losses.items()})
        return means.means()

    def _backward(self, losses: Mapping[str, Tensor]) -> Mapping[str, float]:
        if self.balancer is None:
            (task, loss), *_ = losses.items()
            loss.backward()  # type: ignore[no-untyped-call]
            return {f"loss/{task}": float(loss.detach())}
        if self.balancer.weighting.needs_validation:
            record = self.balancer.backward(losses, validation=self._look_ahead)
        else:
            record = self.balancer.backward(losses)
        return record.as_dict()

    def _look_ahead(self) -> dict[str, Tensor]:
        return self._losses(next(self.ahead))

    def _losses(self, patient: Patient) -> dict[str, Tensor]:
        outputs = self.model(_tiles(self.bags, patient, self.device)).outputs
        return task_losses(outputs, patient, self.targets, self.scalers)

    def _require_finite(self, losses: Mapping[str, Tensor], patient: Patient, epoch: int) -> None:
        for task, loss in losses.items():
            if not torch.isfinite(loss):
                raise RunError(
                    f"{self.name}, epoch {epoch}: the loss of `{task}` must be finite, but is "
                    f"{float(loss.detach())} for patient {patient.name}. "
                    "A lower --learning-rate may help."
                )


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
    for patient in patients:
        with torch.inference_mode():
            outputs, embedding = fitted.model(_tiles(bags, patient, torch.device(device)))
        probabilities, numbers = {}, {}
        for target, output in zip(fitted.targets, outputs, strict=True):
            if target.kind == "classification":
                probabilities[target.name] = output[0].double().softmax(0).cpu().numpy()
            else:
                numbers[target.name] = fitted.scalers[target.name].unscale(float(output))
        predictions.append(
            PatientPrediction(patient, probabilities, numbers, embedding[0].cpu().numpy())
        )
    return predictions


def needs_lookahead(balancer: str, tasks: Sequence[str]) -> bool:
    """Return whether a balancer needs a second batch at every step; checks its name as well.

    Raises:
        UserError: The name is unknown.
    """
    if balancer == BASELINE:
        return False
    layer = torch.nn.Linear(1, 1)
    built = _make(balancer, tasks, [layer], torch.optim.AdamW(layer.parameters()), seed=0)
    return bool(built.weighting.needs_validation)


def _make(
    name: str,
    tasks: Sequence[str],
    shared: list[torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> Balancer:
    try:
        return make_balancer(
            name, tasks=tuple(tasks), shared=shared, optimizer=optimizer, seed=seed
        )
    except ValueError as error:
        raise UserError(
            f"`balancer` must be {BASELINE} or a name that mtbalance knows: {error}"
        ) from error


def _tiles(bags: BagStore, patient: Patient, device: torch.device) -> Tensor:
    return torch.from_numpy(bags.load(patient)).to(device)


def _mean_and_deviation(bags: BagStore, patients: Sequence[Patient]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every feature over all tiles, bag by bag."""
    count = 0
    total = squares = np.zeros(1)
    for patient in patients:
        tiles = bags.load(patient).astype(np.float64)
        count += len(tiles)
        total = total + tiles.sum(axis=0)
        squares = squares + np.square(tiles).sum(axis=0)
    mean = total / count
    variance = np.clip(squares / count - np.square(mean), 0.0, None)
    # What float64 leaves of a constant is not spread.
    variance[variance < 1e-12 * np.square(mean)] = 0.0
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


def _stream(patients: Sequence[Patient], order: np.random.Generator) -> Iterator[Patient]:
    """Yield patients in a new order every round, for ever."""
    return itertools.chain.from_iterable(
        (patients[i] for i in order.permutation(len(patients))) for _ in itertools.count()
    )


class _Means:
    """Running means of numbers that need not be there every time."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if not math.isnan(value):  # a figure that this step does not have
                self._sums[key] += value
                self._counts[key] += 1

    def means(self) -> dict[str, float]:
        return {key: total / self._counts[key] for key, total in self._sums.items()}
