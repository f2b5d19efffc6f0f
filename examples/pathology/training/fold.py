"""One fold: fit on the training part, stop on the validation part, hand back the best checkpoint.

Nothing here ever sees the test fold.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.pathology.cohort.cohort import Cohort
from examples.pathology.cohort.patients import Patient
from examples.pathology.settings.crossval import BASELINE, CrossvalConfig
from examples.pathology.training.bags import BagStore
from examples.pathology.training.checkpoint import Checkpoint
from examples.pathology.training.learner import Learner
from examples.pathology.training.losses import fit_scalers
from examples.pathology.training.prediction import Fitted, matrix_precision

logger = logging.getLogger(__name__)


def fit_fold(
    cohort: Cohort,
    train: Sequence[Patient],
    validation: Sequence[Patient],
    config: CrossvalConfig,
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
        config: How, with the seed of this fold alone, so that no fold depends on another, and the
            device resolved.
        lookahead: Patients for the look-ahead batches of a weighting that needs them (Auto-Lambda).
            Those that are not in ``train`` count as training part too: scalers see them.
        bags: Where tiles are read; ``None``: a store of its own.
        name: What to call the fold in errors and progress.
        checkpoint: Where the state is kept after each epoch, to go on from if it is there already;
            the file of a run with other data or settings must not be there. ``None``: nowhere.

    Returns:
        The model of the best epoch and the history.

    Raises:
        DivergedError: A loss is not finite; the fold, epoch, patient and target are named.
        UserError: The balancer's name is unknown, or a regression target cannot be scaled.
    """
    bags = bags or BagStore()
    device = torch.device(config.device)
    targets = cohort.targets[:1] if config.balancer == BASELINE else cohort.targets
    training_part = [*train, *(p for p in lookahead if p not in train)]
    scalers = fit_scalers(targets, training_part)
    # The caller's random numbers and settings stay as they were.
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, matrix_precision(config.precision):
        torch.manual_seed(config.seed)
        in_features = cohort.kind.in_features
        learner = Learner(config, in_features, targets, scalers, bags, lookahead, name)
        if config.standardize:
            learner.model.standardize(*mean_and_deviation(bags, training_part))
        course = _train(learner, train, validation, Checkpoint(checkpoint))
    learner.model.load_state_dict(course.best_parameters)
    learner.model.eval()
    history = tuple(course.history)
    return Fitted(learner.model, targets, scalers, history, course.best_epoch, config.precision)


@dataclass
class _Course:
    """How far a fold has come."""

    best_parameters: dict[str, Tensor]  # of the best epoch, or the initial ones
    epoch: int = 0  # the last that is finished
    best: float = math.inf  # the lowest validation loss so far
    best_epoch: int = 0  # that has it; 0 before there is one
    history: list[dict[str, float]] = field(default_factory=list)

    def goes_on(self, config: CrossvalConfig) -> bool:
        """Return whether there is another epoch."""
        return self.epoch < config.epochs and self.epoch - self.best_epoch < config.patience


def _train(
    learner: Learner, train: Sequence[Patient], validation: Sequence[Patient], saved: Checkpoint
) -> _Course:
    """Train epoch by epoch, from where an earlier run left off, until there is none to come."""
    config, name, primary = learner.config, learner.name, learner.targets[0].name
    course = _Course(best_parameters=learner.parameters())
    if (state := saved.load()) is not None:
        learner.load_state(state["learner"])
        course = _Course(**state["progress"])
        logger.info("%s goes on after epoch %d", name, course.epoch)
    bar = tqdm(total=config.epochs, initial=course.epoch, desc=name, unit="epoch", leave=False)
    while course.goes_on(config):
        started, waited = time.perf_counter(), learner.bags.waited
        epoch = course.epoch + 1
        figures = learner.train_epoch(train, epoch)
        validated = learner.validate(validation, epoch)
        course.history.append(
            {
                "epoch": epoch,
                **figures,
                **{f"validation/{task}": loss for task, loss in validated.items()},
                "seconds": time.perf_counter() - started,
                "seconds_waiting_for_data": learner.bags.waited - waited,
            }
        )
        course.epoch = epoch
        if validated[primary] < course.best:
            course.best, course.best_epoch = validated[primary], epoch
            course.best_parameters = learner.parameters()
        state = {"learner": learner.state(), "progress": vars(course)}
        saved.save(state, last=not course.goes_on(config))
        bar.update()
        bar.set_postfix({"validation": f"{validated[primary]:.3f}", "best": course.best_epoch})
    bar.close()
    return course


def mean_and_deviation(bags: BagStore, patients: Sequence[Patient]) -> tuple[Tensor, Tensor]:
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
