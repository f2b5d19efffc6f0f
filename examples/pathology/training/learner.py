"""What learns in a fold: the model, its optimizer, and the balancer in which the losses meet.

The losses of all targets (`losses`) meet in a `mtbalance.Balancer`. The baseline trains the same
network with the primary target's token alone, under the same protocol.
"""

import copy
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from examples.pathology.cohort.patients import Patient
from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import DivergedError, UserError
from examples.pathology.settings.crossval import BASELINE, FIXED, CrossvalConfig
from examples.pathology.training.bags import BagStore
from examples.pathology.training.checkpoint import random_state, set_random_state
from examples.pathology.training.losses import Scaler, task_losses
from examples.pathology.training.model import new_model
from examples.pathology.training.prediction import forward
from mtbalance import Balancer, make_balancer


class Learner:
    """A model with what moves it: optimizer, schedule, balancer, and the order of patients.

    Args:
        config: How to train; its seed is that of the fold alone.
        in_features: Length of a tile's feature vector.
        targets: What the model predicts, the primary target first.
        scalers: One per regression target.
        bags: Where tiles are read.
        lookahead: Patients for a second batch at every step, where the balancer needs one.
        name: What to call the fold in errors.
    """

    def __init__(
        self,
        config: CrossvalConfig,
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
        model = new_model(targets, in_features, width=config.width, layers=config.layers)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # at batch 1 the step costs as much as the gradients; fused, a quarter
        )
        self.balancer: Balancer | None = None
        if config.balancer != BASELINE:
            self.balancer = _new_balancer(
                config.balancer,
                [target.name for target in targets],
                self.model.shared_modules(),
                self.optimizer,
                config.seed,
                *(config.search_weight if config.balancer == FIXED else ()),
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
        parts = self._parts().items()
        state = {name: None if part is None else part.state_dict() for name, part in parts}
        return {**state, "random": random_state(self.device)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of `state`."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        set_random_state(state["random"], self.device)

    def _parts(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "balancer", "scheduler")
        return {name: getattr(self, name) for name in parts}

    def train_epoch(self, patients: Sequence[Patient], epoch: int) -> dict[str, float]:
        """Take one step per patient, in a new order, and return the means of what steps report."""
        self.model.train()
        reported = []
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
                reported.append(self._backward(losses, ahead))
            except FloatingPointError as error:  # finite losses, but a gradient is not
                where = f"{self.name}, epoch {epoch}, patient {step[0].name}"
                raise DivergedError(f"{where}: {error}") from error
            self.optimizer.step()
            if self.balancer is not None:
                self.balancer.after_step(functools.partial(self._losses, *patient))
            if self.scheduler is not None and self.config.schedule == "cosine-per-step":
                self.scheduler.step()
        if self.balancer is not None:
            self.balancer.end_epoch()
        if self.scheduler is not None and self.config.schedule == "cosine":
            self.scheduler.step()
        return {"learning_rate": rate, **_means(reported)}

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
        found = []
        with torch.inference_mode():
            stream = self.bags.stream([patient] for patient in patients)
            for patient, (tiles,) in zip(patients, stream, strict=True):
                losses = self._losses(patient, tiles)
                self._require_finite(losses, patient, epoch)
                found.append({task: float(loss) for task, loss in losses.items()})
        return _means(found)

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
                raise DivergedError(
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
    built = _new_balancer(balancer, tasks, [layer], torch.optim.AdamW(layer.parameters()), seed=0)
    return bool(built.weighting.needs_validation)


def _new_balancer(
    name: str,
    tasks: Sequence[str],
    shared: list[torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    seed: int,
    weight: float = 1.0,
) -> Balancer:
    options: dict[str, Any] = {"optimizer": optimizer, "seed": seed}
    if name == FIXED:
        if len(tasks) < 2:
            raise UserError(
                f"`balancer` must be {FIXED} only where there is something to weigh, but there is "
                f"no auxiliary target. Give --auxiliary, or use {BASELINE}."
            )
        name, options["weights"] = "constant", [1.0, *[weight] * (len(tasks) - 1)]
    try:
        return make_balancer(name, tasks=tuple(tasks), shared=shared, **options)
    except ValueError as error:
        raise UserError(
            f"`balancer` must be {BASELINE} or a name that mtbalance knows, or {FIXED}: {error}"
        ) from error
    except TypeError as error:  # it asks for a number that no option gives
        raise UserError(f"`balancer` must need nothing but its name here: {error}") from error


def _some(
    tiles: NDArray[np.float32], limit: int | None, draw: np.random.Generator
) -> NDArray[np.float32]:
    """Return all tiles, or as many as allowed, drawn without replacement and kept in order."""
    if limit is None or len(tiles) <= limit:
        return tiles
    return tiles[np.sort(draw.choice(len(tiles), limit, replace=False))]


def _stream(patients: Sequence[Patient], order: np.random.Generator) -> Iterator[Patient]:
    """Yield patients in a new order every round, for ever."""
    return itertools.chain.from_iterable(
        (patients[i] for i in order.permutation(len(patients))) for _ in itertools.count()
    )


def _means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every number over the rows that have it; NaN stands for not having it."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        for key, value in row.items():
            if not math.isnan(value):
                sums[key] += value
                counts[key] += 1
    return {key: total / counts[key] for key, total in sums.items()}
