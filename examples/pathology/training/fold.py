"""One fold: fit on the training part, stop on the validation part, hand back the best checkpoint.

The losses of all targets (`losses`) meet in a `mtbalance.Balancer`. The baseline trains the same
network with the primary target's token alone, under the same protocol. Nothing here ever sees the
test fold.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from examples.pathology.cohort.cohort import Cohort
from examples.pathology.cohort.patients import Patient
from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import RunError, UserError
from examples.pathology.settings.crossval import HEADS
from examples.pathology.training.bags import BagStore
from examples.pathology.training.checkpoint import Checkpoint, random_state, set_random_state
from examples.pathology.training.losses import Scaler, fit_scalers, task_losses
from examples.pathology.training.model import JointTransformer
from examples.pathology.training.prediction import Fitted, forward, matrix_precision
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
        schedule: ``constant``, ``cosine`` (to 0 after `epochs`), or ``cosine-per-step`` (to 0 and
            back every `epochs` steps).
        standardize: Whether features are brought to mean 0 and standard deviation 1 over the tiles
            of the training part.
        width: Width of the Transformer.
        layers: Layers of its encoder, and of its decoder.
        max_tiles: Most tiles of a patient in a step; ``None``: all.
        precision: One of `config.PRECISIONS`.
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
    width: int = 384
    layers: int = 2
    max_tiles: int | None = None
    precision: str = "float32"
    seed: int = 0
    device: str = "cpu"


def fit_fold(
    cohort: Cohort,
    train: Sequence[Patient],
    validation: Sequence[Patient],
    config: TrainingConfig,
    *,
    lookahead: Sequence[Patient] = (),
    bags: BagStore | None = None,
    name: str = "fold",
    checkpoint: Path | None = None,
) -> Fitted:
    """Train one fold.

    Args:
        cohort: Tells the targets and the length of a feature vector.
        train: Patients to step on; a step is one patient with all tiles, or `max_tiles` of them.
        validation: Patients whose mean loss of the primary target decides when to stop and what to
            keep.
        config: How.
        lookahead: Patients for the look-ahead batches of a weighting that needs them (Auto-Lambda).
            Those that are not in ``train`` count as training part too: scalers see them.
        bags: Where tiles are read; ``None``: a store of its own.
        name: What to call the fold in errors and progress.
        checkpoint: Where the state is kept after each epoch, to go on from if it is there already;
            the file of a run with other data or settings must not be there. ``None``: nowhere.

    Returns:
        The model of the best epoch and the history.

    Raises:
        RunError: A loss is not finite; the fold, epoch, patient and target are named.
        UserError: The balancer's name is unknown, or a regression target cannot be scaled.
    """
    bags = bags or BagStore()
    device = torch.device(config.device)
    targets = cohort.targets[:1] if config.balancer == BASELINE else cohort.targets
    training_part = [*train, *(p for p in lookahead if p not in train)]
    scalers = fit_scalers(targets, training_part)
    primary = targets[0].name
    saved = Checkpoint(checkpoint)
    # The caller's random numbers and settings stay as they were.
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, matrix_precision(config.precision):
        torch.manual_seed(config.seed)
        learner = _Learner(config, cohort.kind.in_features, targets, scalers, bags, lookahead, name)
        if config.standardize:
            learner.model.standardize(*_mean_and_deviation(bags, training_part))
        progress = _Progress(best_parameters=learner.parameters())
        if (state := saved.load()) is not None:
            learner.load_state(state["learner"])
            progress = _Progress(**state["progress"])
            logger.info("%s goes on after epoch %d", name, progress.epoch)
        bar = tqdm(
            total=config.epochs, initial=progress.epoch, desc=name, unit="epoch", leave=False
        )
        while progress.goes_on(config):
            started, waited = time.perf_counter(), bags.waited
            epoch = progress.epoch + 1
            figures = learner.train_epoch(train, epoch)
            validated = learner.validate(validation, epoch)
            progress.history.append(
                {
                    "epoch": epoch,
                    **figures,
                    **{f"validation/{task}": loss for task, loss in validated.items()},
                    "seconds": time.perf_counter() - started,
                    "seconds_waiting_for_data": bags.waited - waited,
                }
            )
            progress.epoch = epoch
            if validated[primary] < progress.best:
                progress.best, progress.best_epoch = validated[primary], epoch
                progress.best_parameters = learner.parameters()
            saved.save({"learner": learner.state(), "progress": vars(progress)})
            bar.update()
            bar.set_postfix(
                {"validation": f"{validated[primary]:.3f}", "best": progress.best_epoch}
            )
        bar.close()
    learner.model.load_state_dict(progress.best_parameters)
    learner.model.eval()
    return Fitted(
        learner.model,
        targets,
        scalers,
        tuple(progress.history),
        progress.best_epoch,
        config.precision,
    )


def new_model(
    targets: Sequence[Target], in_features: int, *, width: int, layers: int
) -> JointTransformer:
    """Return the network for these targets, initialised from PyTorch's random numbers."""
    return JointTransformer(
        [target.width for target in targets],
        in_features=in_features,
        d_model=width,
        layers=layers,
        heads=HEADS,
        feedforward=2 * width,  # the paper's ratio
    )


@dataclass
class _Progress:
    """How far a fold has come.

    Args:
        best_parameters: Those of the best epoch, or the initial ones.
        epoch: The last epoch that is finished.
        best: The lowest validation loss so far.
        best_epoch: The epoch that has it; 0 before there is one.
        history: One row per epoch.
    """

    best_parameters: dict[str, Tensor]
    epoch: int = 0
    best: float = math.inf
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def goes_on(self, config: TrainingConfig) -> bool:
        """Return whether there is another epoch."""
        return self.epoch < config.epochs and self.epoch - self.best_epoch < config.patience


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
        self.config, self.lookahead = config, lookahead
        self.targets, self.scalers, self.bags, self.name = targets, scalers, bags, name
        self.model = new_model(targets, in_features, width=config.width, layers=config.layers).to(
            self.device
        )
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
            if self.looks_ahead and not lookahead:
                raise ValueError(f"`lookahead` must hold patients for {config.balancer}.")
        self.scheduler: CosineAnnealingLR | None = None
        if config.schedule != "constant":
            self.scheduler = CosineAnnealingLR(self.optimizer, T_max=config.epochs)

    @property
    def looks_ahead(self) -> bool:
        """Whether every step needs a second batch."""
        return self.balancer is not None and self.balancer.weighting.needs_validation

    def parameters(self) -> dict[str, Tensor]:
        """Return a copy of the model's parameters."""
        return copy.deepcopy(self.model.state_dict())

    def state(self) -> dict[str, Any]:
        """Return all that the next epoch depends on, besides patients and settings."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": random_state(self.device),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        set_random_state(state["random"], self.device)

    def train_epoch(self, patients: Sequence[Patient], epoch: int) -> dict[str, float]:
        """Take one step per patient, in a new order, and return the means of what steps report."""
        self.model.train()
        means = _Means()
        rate = float(self.optimizer.param_groups[0]["lr"])
        steps = self.steps(patients, epoch)
        draw = np.random.default_rng([self.config.seed, epoch, 2])
        for step, tiles in zip(steps, self.bags.stream(steps), strict=True):
            patient, *ahead = (
                (who, _some(bag, self.config.max_tiles, draw))
                for who, bag in zip(step, tiles, strict=True)
            )
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._losses(*patient)
            self._require_finite(losses, step[0], epoch)
            try:
                means.add(self._backward(losses, ahead))
            except FloatingPointError as error:  # finite losses, but a gradient is not
                where = f"{self.name}, epoch {epoch}, patient {step[0].name}"
                raise RunError(f"{where}: {error}") from error
            self.optimizer.step()
            if self.scheduler is not None and self.config.schedule == "cosine-per-step":
                self.scheduler.step()
        if self.balancer is not None:
            self.balancer.end_epoch()
        if self.scheduler is not None and self.config.schedule == "cosine":
            self.scheduler.step()
        return {"learning_rate": rate, **means.means()}

    def steps(self, patients: Sequence[Patient], epoch: int) -> list[tuple[Patient, ...]]:
        """Return who is stepped on, and whom each step looks ahead on: set by seed and epoch."""
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(patients))
        if not self.looks_ahead:
            return [(patients[i],) for i in order]
        ahead = _stream(self.lookahead, np.random.default_rng([self.config.seed, epoch, 1]))
        return [(patients[i], next(ahead)) for i in order]

    def validate(self, patients: Sequence[Patient], epoch: int) -> dict[str, float]:
        """Return the mean loss per target over the patients for whom it is known."""
        self.model.eval()
        means = _Means()
        with torch.inference_mode():
            stream = self.bags.stream([patient] for patient in patients)
            for patient, (tiles,) in zip(patients, stream, strict=True):
                losses = self._losses(patient, tiles)
                self._require_finite(losses, patient, epoch)
                means.add({task: float(loss) for task, loss in losses.items()})
        return means.means()

    def _backward(
        self, losses: Mapping[str, Tensor], ahead: Sequence[tuple[Patient, NDArray[np.float32]]]
    ) -> Mapping[str, float]:
        if self.balancer is None:
            (task, loss), *_ = losses.items()
            loss.backward()  # type: ignore[no-untyped-call]
            return {f"loss/{task}": float(loss.detach())}
        if ahead:
            record = self.balancer.backward(losses, validation=lambda: self._losses(*ahead[0]))
        else:
            record = self.balancer.backward(losses)
        return record.as_dict()

    def _losses(self, patient: Patient, tiles: NDArray[np.float32]) -> dict[str, Tensor]:
        outputs = forward(self.model, tiles, self.device, self.config.precision).outputs
        return task_losses(outputs, patient, self.targets, self.scalers)

    def _require_finite(self, losses: Mapping[str, Tensor], patient: Patient, epoch: int) -> None:
        for task, loss in losses.items():
            if not torch.isfinite(loss):
                raise RunError(
                    f"{self.name}, epoch {epoch}: the loss of `{task}` must be finite, but is "
                    f"{float(loss.detach())} for patient {patient.name}. "
                    "A lower --learning-rate may help."
                )


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


def _some(
    tiles: NDArray[np.float32], limit: int | None, draw: np.random.Generator
) -> NDArray[np.float32]:
    """Return all tiles, or as many as allowed, drawn without replacement and kept in order."""
    if limit is None or len(tiles) <= limit:
        return tiles
    return tiles[np.sort(draw.choice(len(tiles), limit, replace=False))]


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
