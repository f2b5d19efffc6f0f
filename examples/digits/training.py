"""One training: the network, the loop that a Balancer stands in, and what comes of it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits.data import SIDE, Pictures, data_of, stream
from examples.digits.methods import SINGLE, balancer_of
from examples.digits.setting import TASKS, Setting

CLASSES = 10
DIGITS = 6
"""After the point, of what is measured: as many as are written down."""


@dataclass(frozen=True)
class Measured:
    """What a network gets right on one part.

    Args:
        upper_left: Share of upper-left digits that are told right; NaN if not learned.
        lower_right: Share of lower-right digits that are told right; NaN if not learned.
        ink: Root of the mean squared error, in grey values from 0 to 16; NaN if not learned.
        explained: Share of the ink's variance that is explained, R²; NaN if not learned.
    """

    upper_left: float
    lower_right: float
    ink: float
    explained: float

    @property
    def score(self) -> float:
        """Mean of the two accuracies and R², of those that were learned."""
        shares = (self.upper_left, self.lower_right, self.explained)
        learned = [share for share in shares if not math.isnan(share)]
        return sum(learned) / len(learned)


class Network(nn.Module):
    """Two hidden layers that all tasks share, and a linear head for each.

    Args:
        setting: Size of the pictures and width of the layers.
        seed: Of the initial weights.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__()
        pixels, width = (SIDE + setting.shift) ** 2, setting.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "weights").initial_seed())
            self.trunk = nn.Sequential(
                nn.Flatten(),
                nn.Linear(pixels, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
            )
            outputs = dict(zip(TASKS, (CLASSES, CLASSES, 1), strict=True))
            self.heads = nn.ModuleDict({task: nn.Linear(width, n) for task, n in outputs.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the logits of both digits, and the standardised ink."""
        features = self.trunk(pixels)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


class Training:
    """A network that is being trained with one method.

    Args:
        method: A name of `methods.catalogue`, or ``single-task:`` and a task.
        seed: Of data, initial weights and batches, none of which depends on the method.
        rate: Highest learning rate of Adam.
        setting: What all trainings have in common.
    """

    def __init__(self, method: str, seed: int, rate: float, setting: Setting) -> None:
        self.setting, self.data = setting, data_of(seed, setting)
        self.network = Network(setting, seed)
        parts = (self.network.trunk, self.network.heads)
        self.optimizer = torch.optim.Adam([{"params": [*p.parameters()]} for p in parts], lr=rate)
        self.batches = stream(seed, "batches")
        self._further = stream(seed, "further")
        alone, _, task = method.partition(":")
        self.tasks = (task,) if alone == SINGLE else TASKS
        self.balancer = None
        if alone != SINGLE:
            self.balancer = balancer_of(
                method, shared=self.network.trunk, optimizer=self.optimizer, seed=seed
            )
            if self.balancer.gradient.row_means is not None:
                # These average gradients themselves; twice is a lag that high rates do not bear.
                self.optimizer.param_groups[0]["betas"] = (0.0, 0.999)
            if learned := list(self.balancer.parameters()):  # such as Uncertainty's
                self.optimizer.add_param_group({"params": learned})
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, setting.share_of_rate)

    def step(self, batch: Pictures) -> None:
        """Train on one batch."""
        losses = self.losses(batch)
        self.optimizer.zero_grad()
        if self.balancer is None:
            torch.autograd.backward(losses[self.tasks[0]])
            self.optimizer.step()
        else:
            self.balancer.backward(losses, **self._more_batches())
            self.optimizer.step()
            self.balancer.after_step(lambda: self.losses(batch))
        self.schedule.step()

    def losses(self, batch: Pictures) -> dict[str, Tensor]:
        """Return the losses of the tasks that are learned: cross-entropies, squared error."""
        outputs = self.network(batch.pixels)
        mean, deviation = self.data.ink_scale
        losses = {
            "upper-left": lambda output: F.cross_entropy(output, batch.upper_left),
            "lower-right": lambda output: F.cross_entropy(output, batch.lower_right),
            "ink": lambda output: F.mse_loss(output, (batch.ink - mean) / deviation),
        }
        return {task: losses[task](outputs[task]) for task in self.tasks}

    def _more_batches(self) -> dict[str, Any]:
        """Return the arguments of methods that look at more than one batch of the training part."""
        if self.balancer is None:
            return {}
        if self.balancer.weighting.needs_validation:
            return {"validation": self._losses_of_another}
        if counts := self.balancer.gradient.further_batches:
            return {"batches": [self._losses_of_another] * max(counts)}
        return {}

    def _losses_of_another(self) -> dict[str, Tensor]:
        picked = torch.randint(len(self.data.train), (self.setting.batch,), generator=self._further)
        return self.losses(self.data.train[picked])

    def epoch(self) -> Iterator[Pictures]:
        """Return the batches of an epoch, in a new order."""
        train, size = self.data.train, self.setting.batch
        order = torch.randperm(len(train), generator=self.batches)
        for start in range(0, len(train) - size + 1, size):
            yield train[order[start : start + size]]

    def end_epoch(self) -> None:
        """Tell methods that look at whole epochs."""
        if self.balancer is not None:
            self.balancer.end_epoch()

    @torch.no_grad()
    def measure(self, pictures: Pictures) -> Measured:
        """Return what the network gets right.

        Raises:
            FloatingPointError: If it answers with numbers that are not finite.
        """
        outputs = self.network(pictures.pixels)
        if not all(output.isfinite().all() for output in outputs.values()):
            raise FloatingPointError("The trained network's outputs are not finite.")
        mean, deviation = self.data.ink_scale
        error = float((outputs["ink"] * deviation + mean - pictures.ink).square().mean())
        found = {
            "upper-left": [_share_right(outputs["upper-left"], pictures.upper_left)],
            "lower-right": [_share_right(outputs["lower-right"], pictures.lower_right)],
            "ink": [math.sqrt(error), 1 - error / float(pictures.ink.var(correction=0))],
        }
        return Measured(
            *(
                round(value, DIGITS) if task in self.tasks else math.nan
                for task, values in found.items()
                for value in values
            )
        )


def _share_right(logits: Tensor, classes: Tensor) -> float:
    return float((logits.argmax(1) == classes).double().mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as all processes of a study do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(method: str, seed: int, rate: float, setting: Setting) -> tuple[Measured, Measured]:
    """Train once; return what the network gets right for validation, and in the test."""
    with one_thread():
        training = Training(method, seed, rate, setting)
        for _ in range(setting.epochs):
            for batch in training.epoch():
                training.step(batch)
            training.end_epoch()
        data = training.data
        return training.measure(data.validation), training.measure(data.test)
