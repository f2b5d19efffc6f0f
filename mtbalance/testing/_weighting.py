"""What weightings are asked: one training step alone, series of losses, traits."""

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mtbalance._optimizers import each_optimizer
from mtbalance.weighting import Step, Weighting

from ._matrices import DTYPES
from ._violation import bits, told_of

TASKS = 3
"""The number of tasks for which weightings are made here."""


class Trait(enum.Enum):
    """What may be true of a weighting."""

    SUMS_TO_M = "the weights sum to the number of active tasks"
    POSITIVE = "the weights are positive"
    LINEAR = "the weighted losses are the weights times the losses"
    STARTS_EQUAL = "before it has seen anything, every task has the same weight"
    SHARED_OUT = "where a task is absent, the weights of the others keep their ratios alone"
    COUPLED = "a task's weight depends on which others are there, and on their losses"
    STATELESS = "nothing is remembered"
    LEARNS_BY_GRADIENT = "its parameters move with the optimizer of the model"


@dataclass(frozen=True)
class LossSample:
    """The losses of three tasks in a few epochs of one step each, by what makes them again."""

    seed: int = 0
    least: float = 0.1
    most: float = 10.0
    dtype: torch.dtype = torch.float32

    def epochs(self) -> list[Tensor]:
        """Return one to five vectors of losses, shape (3,): often the bounds, else in between."""
        rng = random.Random(f"losses {self.seed}")
        ratio = self.most / self.least
        drawn = [
            [self.least * ratio ** min(max(rng.uniform(-0.1, 1.1), 0), 1) for _ in range(TASKS)]
            for _ in range(rng.randint(1, 5))
        ]
        return [torch.tensor(losses, dtype=self.dtype) for losses in drawn]

    def __str__(self) -> str:
        return (
            f"LossSample(seed={self.seed}, least={self.least!r}, most={self.most!r}, "
            f"dtype={self.dtype}).epochs()"
        )

    @property
    def proof(self) -> str:
        """What the losses are."""
        shown = "; ".join(str([round(x, 6) for x in each.tolist()]) for each in self.epochs())
        return f"positive losses of {TASKS} tasks in one step per epoch: {shown}"


@dataclass(frozen=True)
class WeightingSubject:
    """A weighting that is asked."""

    make: Callable[[], Weighting]
    """Returns a new weighting for three tasks."""
    traits: frozenset[Trait] = frozenset()
    who: str = ""
    """What messages call it; by default its ``repr``."""

    @property
    def name(self) -> str:
        """What messages call the weighting."""
        return self.who or repr(self.make())


@dataclass(frozen=True)
class WeightingProperty:
    """Something that is true of a weighting for all losses of some kind."""

    body: Callable[[WeightingSubject, LossSample], None]
    says: str
    bounds: tuple[float, float] = (0.1, 10.0)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    examples: int = 5
    """How many examples a search should take."""

    @property
    def name(self) -> str:
        """What the property is called in messages."""
        return self.body.__name__

    def __call__(self, subject: WeightingSubject, sample: LossSample) -> None:
        """Raise :class:`Violation` if the property does not hold, or the weighting raises."""
        with told_of(subject, self, sample):
            self.body(subject, sample)

    def samples(self, seeds: Sequence[int]) -> list[LossSample]:
        """Return one series of losses for each seed and dtype."""
        return [LossSample(seed, *self.bounds, dtype) for seed in seeds for dtype in self.dtypes]


ALL_DTYPES = DTYPES


def weights_of(weighting: Weighting, losses: Tensor) -> Tensor:
    """Return the weights, shape (m,): the derivatives of the objective by the losses."""
    losses = losses.detach().clone().requires_grad_()
    (weights,) = torch.autograd.grad(weighting(losses).sum(), losses)
    return weights


def train_step(weighting: Weighting, losses: Tensor, active: Tensor | None = None) -> Tensor:
    """Take one training step with a weighting on its own, and return the weighted losses.

    Whatever a weighting may do in a step happens: it looks ahead if it can, weighs, its parameters
    take a gradient step, and it looks back if it can. The looking ahead is at two numbers (x, y) of
    each optimizer, whose gradient for task i is losses[i] * (1, i), and at a validation loss of
    every task, the sum of these 2y - x, against which task 0 pulls; the step takes a loss i to
    (i + 1) / 4 of it.

    Args:
        weighting: For three tasks; one that holds an ``optimizer`` or several, or is around such a
            one, looks at the first parameter of each, of shape (2,).
        losses: Shape (m,).
        active: The numbers of the tasks whose losses these are; None for all.
    """
    numbers = torch.arange(TASKS) if active is None else active
    if weighting.needs_gradients or weighting.needs_validation:
        weighting.bind([str(i) for i in range(TASKS)])
        weighting.before_step(_look_ahead(weighting, losses, numbers))
    weighted: Tensor = weighting(losses)
    parameters = list(weighting.parameters())
    if parameters:
        slopes = torch.autograd.grad(weighted.sum(), parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.sub_(0.1 * slope)
    weighting.end_step(written=True)
    if weighting.needs_after_step:
        weighting.after_step(losses.detach() * (numbers.to(losses) + 1) / 4)
    return weighted.detach()


PARAMETERS = 2
"""How many numbers there are whose gradients a weighting may look at."""


def optimizer_of_a_point() -> torch.optim.Optimizer:
    """Return SGD that moves two numbers, for weightings that look ahead.

    They are no ``nn.Parameter``, whose model AutoLambda would look for in the whole process.
    """
    return torch.optim.SGD([torch.tensor([1.0, -1.0], requires_grad=True)], lr=0.1)


def _look_ahead(weighting: Weighting, losses: Tensor, numbers: Tensor) -> Step:
    wrapped = getattr(weighting, "weighting", weighting)
    given = each_optimizer(getattr(wrapped, "optimizer", None)) or [optimizer_of_a_point()]
    points = [each.param_groups[0]["params"][0] for each in given]
    for point in points:
        if point.shape != (PARAMETERS,):
            raise ValueError(
                "the optimizers of a weighting that is checked must hold a tensor of shape "
                f"({PARAMETERS},) first, but one holds a tensor of shape {tuple(point.shape)}. "
                "Make them of torch.zeros(2, requires_grad=True), one each."
            )
    rows = [
        [loss.detach() * torch.tensor([1.0, float(i)])] * len(points)
        for i, loss in zip(numbers, losses, strict=True)
    ]
    names, slope = weighting.tasks or (), torch.tensor([-1.0, 2.0])
    return Step(
        parameters=points,
        gradients=rows,
        loss_scale=1.0,
        validation=lambda: dict.fromkeys(names, (torch.stack(points) @ slope).sum()),
        losses=losses.detach(),
        norms=torch.stack([torch.cat(row).double().norm() for row in rows]),
        balanced=len(points),
    )


def train(
    weighting: Weighting, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[bytes]:
    """Train for a while, an epoch every two steps, and return the weighted losses as bytes."""
    rng = Generator("cpu").manual_seed(seed)
    seen = []
    for step in range(steps):
        drawn = torch.rand(TASKS, generator=rng, dtype=dtype, device="cpu")
        losses = drawn.to(torch.get_default_device()) + 0.1
        seen.append(bits(train_step(weighting, losses)))
        if step % 2:
            weighting.end_epoch()
    return seen


def see(weighting: Weighting, sample: LossSample) -> Weighting:
    """Train a weighting on a series of losses, an epoch every step, and return it."""
    for losses in sample.epochs():
        train_step(weighting, losses)
        weighting.end_epoch()
    return weighting
