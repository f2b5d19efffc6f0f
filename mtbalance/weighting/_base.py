"""What every weighting is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mtbalance._checks import check_losses
from mtbalance._passes import products_with_gradient
from mtbalance._random import RandomSource
from mtbalance._remembered import TaskChange, dtype_of_sums, moved, not_carried, own_state
from mtbalance._rows import at_least_float32

# Adam's, and the defaults of torch.optim.Adam.
_BETAS = (0.9, 0.999)
_EPS = 1e-8


@dataclass(frozen=True)
class Step:
    """What a weighting may look at before it weighs the losses of one step."""

    parameters: Sequence[Tensor]
    """Every parameter that some loss of this step reaches."""
    gradients: Sequence[Sequence[Tensor | None]]
    """Per active task, the gradient of its raw loss for each parameter, times ``loss_scale``; for a
    sharded parameter, this process's shard of it."""
    loss_scale: float
    """The factor that a gradient scaler has put on the losses; 1 without one."""
    validation: Callable[[], Mapping[str, Tensor]] | None
    """Returns the losses of a validation batch at the parameters of that moment."""
    losses: Tensor
    """The raw losses of the active tasks, shape (m,), the same in all processes."""
    norms: Tensor
    """Per active task, the length of its raw loss's gradient over all that is balanced, shape (m,),
    float64: without ``loss_scale``, over whole parameters, and the same in all processes."""
    balanced: int
    """How many of the parameters, the first ones, are balanced, so shared and in a group."""

    def shares(self, tasks: Collection[str], error: Exception | None = None) -> dict[str, float]:
        """Return, per task, the factor by which a validation loss of this process counts.

        Args:
            tasks: The tasks that this process has validation losses of.
            error: What kept it from having any. It is raised, and all other processes raise, too.

        Returns:
            1 for each; of several processes, their number over the number of those that have the
            task, for every task that any has.
        """
        if error is not None:
            raise error
        return dict.fromkeys(tasks, 1.0)

    def from_holders(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return, per parameter, a tensor that not every process holds, from those that do.

        Args:
            tensors: What this process holds, of the shape of each parameter.
        """
        return list(tensors)

    def products(self, loss: Tensor | None, factors: Sequence[float]) -> Tensor:
        """Return each task's inner product with the gradient of a loss, averaged over processes.

        Args:
            loss: A scalar with a graph; None where this process has none.
            factors: A factor for each parameter, by which its part of the product counts.

        Returns:
            Shape (m,), float64.
        """
        if loss is None:
            return torch.zeros(len(self.gradients), dtype=torch.float64, device="cpu")
        return products_with_gradient(loss, self.parameters, self.gradients, factors)


class Weighting(nn.Module, ABC):
    """Turns task losses, shape (m,), into weighted losses, shape (m,), whose sum is the objective.

    Subclasses write :meth:`forward`. The weights are the derivatives of the objective by the
    losses, and learned parameters of the weighting get theirs from the same derivative, so neither
    is written down a second time.

    State per task is made in :meth:`setup`, with one entry for every task. ``losses`` holds the
    *active* tasks only, so that ``self.log_var[self.active]`` picks the entries that belong to it;
    a task that is absent from a step neither weighs nor changes. After a step that writes nothing
    (skipped, an error, an overflow under a gradient scaler) a Balancer puts the buffers back.
    """

    is_sum: ClassVar[bool] = False
    """Whether the objective is always the sum of the losses, so that weights need not be asked
    for. Does not hold for a subclass of the class that says so."""
    needs_gradients: ClassVar[bool] = False
    """Whether :meth:`before_step` reads per-task gradients."""
    needs_validation: ClassVar[bool] = False
    """Whether :meth:`before_step` reads the losses of a validation batch."""
    needs_after_step: ClassVar[bool] = False
    """Whether :meth:`after_step` reads the losses that a step leads to."""
    asks_of_losses: ClassVar[str] = ""
    """A sentence on what losses must be for weights to be finite; empty if any finite ones do."""
    _narrowest: ClassVar[torch.dtype] = torch.float32
    """What casts leave of the state at least, where the device has it."""
    # On the class, for objects pickled before these were counted.
    _loads = 0
    _epochs_closed = 0
    _steps_looked_back_at = 0

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] | None = None
        self.active: Tensor | slice = slice(None)
        self.fallbacks = 0
        """How often the weighting answered with its documented substitute; see each class."""

    def __call__(self, losses: Tensor) -> Tensor:
        """Check the losses, bind to their number if that has not happened, call :meth:`forward`."""
        check_losses(losses)
        if self.tasks is None:
            self.bind([str(number) for number in range(len(losses))]).to(losses.device)
        expected = self.num_tasks if isinstance(self.active, slice) else len(self.active)
        if len(losses) != expected:
            raise ValueError(
                f"`losses` must hold one loss for each of the {expected} tasks that this "
                f"{type(self).__name__} is bound to, but got {len(losses)}. "
                "Make a new weighting for another set of tasks."
            )
        weighted: Tensor = super().__call__(losses)
        return weighted

    @abstractmethod
    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted losses, shape (m,), of the raw ``losses``, shape (m,)."""

    @property
    def num_tasks(self) -> int:
        """The number of tasks that the weighting is bound to."""
        if self.tasks is None:
            raise RuntimeError(
                f"this {type(self).__name__} must be bound to its tasks first, but it is not. "
                "Call bind(task_names), call it once on losses, or give it to a Balancer."
            )
        return len(self.tasks)

    def bind(self, tasks: Sequence[str]) -> Self:
        """Make the state for these tasks. The Balancer calls this; alone, the first call does."""
        if self.tasks is not None:
            if self.tasks == tuple(tasks):
                return self
            raise RuntimeError(
                f"this {type(self).__name__} must belong to one set of tasks, but it is bound to "
                f"{self.tasks} and was asked for {tuple(tasks)}. Make a new one."
            )
        self.tasks = tuple(tasks)
        self.setup()
        self._fresh = {name: value.clone() for name, value in self.state_dict().items()}
        return self

    def setup(self) -> None:
        """Make parameters and buffers with one entry per task (``self.num_tasks``)."""

    @contextmanager
    def only(self, active: Tensor) -> Iterator[None]:
        """Let losses belong to the tasks whose numbers are given, shape (m,), for a while."""
        self.active = active
        try:
            yield
        finally:
            self.active = slice(None)

    def check_ready(self) -> None:
        """Raise ValueError if something is missing that steps with validation losses need."""

    def before_step(self, step: Step) -> None:
        """Look at gradients or validation losses before :meth:`forward` is called in a step."""

    @property
    def rests(self) -> bool:
        """Whether, for now, it needs nothing of what its class says it needs."""
        return False

    def end_step(self, *, written: bool) -> None:
        """Take it that a step is over, and whether anything was written."""

    def after_step(self, losses: Tensor) -> None:
        """Look at what the last step made of the losses of its batch.

        Args:
            losses: The losses at the new parameters, shape (m,), of the tasks of that step.
        """

    def end_epoch(self) -> None:
        """Close an epoch."""

    def close_epoch(self) -> None:
        """Call :meth:`end_epoch`, and count that if it does anything."""
        self._epochs_closed += type(self).end_epoch is not Weighting.end_epoch
        self.end_epoch()

    def count_after_step(self) -> None:
        """Count a step that a Balancer is to look back at, before processes tell each other."""
        self._steps_looked_back_at += 1

    def tally(self) -> tuple[int, int, int]:
        """Return what several processes must have done equally often.

        Loads, ends of epochs, and steps that were looked back at.
        """
        return self._loads, self._epochs_closed, self._steps_looked_back_at

    def reset(self) -> None:
        """Forget everything learned and remembered."""
        if self.tasks is not None:
            self.load_state_dict(self._fresh)
        for child in self.children():  # what is fresh may have been loaded, or be another rank's
            if isinstance(child, RandomSource):
                child.reset()

    def check_state(self, state: Mapping[str, object]) -> None:
        """Raise ValueError if what was saved, by name, is nothing to go on with."""

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what to load, with other tasks, of what was saved, by name.

        A tensor whose first axis is as long as there are tasks has an entry for each; a new task's
        is what :meth:`setup` makes. Other tensors are no task's, and stay. Override this where it
        is not so.

        Args:
            state: What this module itself saved.
            change: The tasks then and now.

        Raises:
            ValueError: If it cannot be told.
        """
        carried: dict[str, Tensor] = {}
        for name, saved in state.items():
            start = self._fresh.get(name) if self.tasks is not None else None
            if not isinstance(saved, Tensor) or not isinstance(start, Tensor):
                raise not_carried(self, name, change)
            per_task = saved.shape[:1] == (len(change.old),)
            fits = start.shape == ((len(change.new), *saved.shape[1:]) if per_task else saved.shape)
            if not fits or len(change.old) in saved.shape[1:]:  # as where pairs have entries
                raise not_carried(self, name, change)
            carried[name] = change.along(0, saved, start) if per_task else saved
        return dict(carried)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        # A model that is cast takes its weighting with it, whose small steps and means of many
        # losses would be lost in rounding: it moves along, but keeps its numbers.
        def kept(tensor: Tensor) -> Tensor:
            return moved(fn, tensor, self._narrowest)

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A weighting on its own may be loaded before it has seen a loss: bind it to what was saved.
        if self.tasks is None:
            sizes = {
                len(value)
                for key, value in state_dict.items()
                if key.startswith(prefix)
                and "." not in key[len(prefix) :]
                and isinstance(value, Tensor)
                and value.ndim == 1
            }
            if len(sizes) == 1:
                self.bind([str(number) for number in range(sizes.pop())])
        self.check_state(own_state(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._loads += 1


def task_vector(
    values: Sequence[float] | float, count: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Return one number per task, shape (count,), in PyTorch's default dtype, at least float32."""
    dtype = dtype or at_least_float32(torch.get_default_dtype())
    return torch.as_tensor(values, dtype=dtype).expand(count).clone()


def add_to_means(means: Tensor, counts: Tensor, losses: Tensor, active: Tensor | slice) -> None:
    """Count detached losses of active tasks in running means, in place; those not finite do not."""
    finite = torch.isfinite(losses)  # anything else would stay in the mean for good
    counts[active] += finite
    mean = means[active]
    change = (losses.to(mean.dtype) - mean) / counts[active]
    means[active] = torch.where(finite, mean + change, mean)


def adam(
    lr: float,
    slope: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    active: Tensor | slice,
) -> Tensor:
    """Return what a step of Adam takes off the numbers of active tasks, shape (m,).

    Args:
        lr: The learning rate.
        slope: The derivatives by these numbers, shape (m,).
        exp_avg: Running means of derivatives, per task, which move on in place.
        exp_avg_sq: Those of their squares.
        steps: Steps behind each task.
        active: The tasks.
    """
    steps[active] += 1
    # No lerp(): it takes 1 - 0.999 in the dtype of the means, of which float32 leaves four digits.
    for means, new, beta in zip(
        (exp_avg, exp_avg_sq), (slope, slope.square()), _BETAS, strict=True
    ):
        means[active] = beta * means[active] + (1 - beta) * new
    # The powers are close to 1 in the first steps, where float32 would lose half their digits.
    taken = steps[active].to(dtype_of_sums(steps.device))
    first = exp_avg[active] / (1 - _BETAS[0] ** taken)
    second = exp_avg_sq[active] / (1 - _BETAS[1] ** taken)
    return lr * first / (second.sqrt() + _EPS)


def held_above(numbers: Tensor, bound: float) -> Tensor:
    """Return learned numbers, those below a bound as that bound, with gradients that lead off it.

    At the bound or below it, a gradient that descends further is 0; clamp() would also block the
    way back.
    """
    held = numbers + (numbers.detach().clamp_min(bound) - numbers.detach())
    if held.requires_grad:
        blocked = numbers.detach() <= bound
        held.register_hook(  # type: ignore[no-untyped-call]
            lambda slope: slope.masked_fill(blocked & (slope > 0), 0)
        )
    return held


def logarithms(losses: Tensor) -> Tensor:
    """Return the logarithms of losses, shape (m,), in float64 where the device has it.

    What is below the least normal number, 0 above all, counts as that number and has the derivative
    0: the logarithm stays finite, and a loss that has come to its end pulls no more. A negative
    loss has the logarithm NaN, and the derivative, too, so that nobody needs to wait and look.
    """
    least = torch.finfo(at_least_float32(losses.dtype)).tiny
    wide = losses.to(dtype_of_sums(losses.device))
    legal = torch.where(wide.detach() < 0, torch.nan, 1.0).to(wide.dtype)
    vanished = (wide.detach() >= 0) & (wide.detach() < least)
    return (wide * legal).masked_fill(vanished, least).log()


def across(vector: Tensor, unit: Tensor) -> Tensor:
    """Return the part of a vector at right angles to a unit vector: 0 if rounding hides it."""
    part = vector - (vector @ unit) * unit
    part = part - (part @ unit) * unit  # what rounding has left along it, or brought
    noise = 8 * len(vector) * torch.finfo(vector.dtype).eps * torch.linalg.vector_norm(vector)
    return part.masked_fill(torch.linalg.vector_norm(part) <= noise, 0.0)
