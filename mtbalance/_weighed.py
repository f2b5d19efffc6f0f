"""Losses become weights: the one place where the weighting is asked."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._record import Record
from mtbalance._rows import stacked
from mtbalance._watch import OptimizerWatch
from mtbalance._writing import add_to_grad
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Step, Weighting


class Weighed(NamedTuple):
    """What a weighting made of the losses of m active tasks."""

    tasks: tuple[str, ...]
    stack: Tensor
    """The raw losses in one dtype and on one device, shape (m,)."""
    weights: Tensor
    """d objective / d losses, shape (m,)."""
    learned: list[tuple[Tensor, Tensor]]
    """The weighting's own parameters, and the derivatives of the objective by them."""
    numbers: list[float]
    """The weights once more, where they have been looked at."""
    active: Tensor
    """The numbers of the tasks, shape (m,)."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """The raw losses by task."""
        return dict(zip(self.tasks, self.stack.unbind(), strict=True))

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The weights by task."""
        return dict(zip(self.tasks, self.weights.unbind(), strict=True))

    def write(self, scale: float | None) -> None:
        """Accumulate the derivatives by learned parameters, times the loss scale, in ``.grad``."""
        if self.learned:
            slopes = [slope * (scale or 1.0) for _, slope in self.learned]
            add_to_grad([parameter for parameter, _ in self.learned], slopes)


def write_nothing(weighting: Weighting) -> None:
    """Accumulate the gradient 0 for learned parameters, as for those of an absent task.

    In a step that a gradient scaler is to skip: it refuses an optimizer without gradients.
    """
    learned = [parameter for parameter in weighting.parameters() if parameter.requires_grad]
    add_to_grad(learned, [torch.zeros_like(parameter) for parameter in learned])


def unless_written(
    strategies: Sequence[Weighting | GradientStrategy], step: Callable[[], Record]
) -> Record:
    """Take a step; if it writes nothing, strategies remember what they did before.

    Args:
        strategies: The strategies that remember.
        step: Takes the step.

    Returns:
        What the step did. It writes nothing if it is skipped, if a scaler skips it or if it raises.
    """
    before: list[tuple[Weighting | GradientStrategy, str, Tensor]] = [
        (strategy, name, buffer.clone())
        for strategy in strategies
        for name, buffer in strategy.named_buffers()
    ]
    written = False
    try:
        record = step()
        written = not (record.skipped or record.overflow)
    finally:
        if not written:
            with torch.no_grad():
                for strategy, name, value in before:
                    strategy.get_buffer(name).copy_(value)
        for strategy in strategies:
            strategy.end_step(written=written)
    return record


class Weigher:
    """Asks the weighting, and watches whether what it learns moves.

    Args:
        tasks: All tasks.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._watch = OptimizerWatch()
        self._numbers: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}

    def weigh(
        self,
        weighting: Weighting,
        losses: Mapping[str, Tensor],
        model: Callable[[], Sequence[Tensor]],
        step: Step | None = None,
        *,
        looks: bool,
    ) -> Weighed:
        """Return the weights of the active tasks.

        Args:
            weighting: The weighting.
            losses: Their detached losses.
            model: Returns the parameters that losses are known to reach.
            step: What the weighting may look at first, if it looks ahead.
            looks: Whether weights must be finite, which takes looking at them.
        """
        parameters = list(weighting.parameters())
        learned = [p for p in parameters if p.requires_grad]
        stack = stacked(list(losses.values()))
        state = next(itertools.chain(parameters, weighting.buffers()), stack)
        tasks = tuple(losses)
        active = self._numbers_of(tasks, state.device)
        if step is not None:
            with weighting.only(active):
                weighting.before_step(step)
        self._watch.look(learned, model)
        weights, slopes = _derivatives(weighting, stack, active, learned)
        numbers = weights.tolist() if looks else []
        if not all(map(math.isfinite, numbers)):
            raise FloatingPointError(
                f"{type(weighting).__name__} must give finite weights, but gives "
                f"{numbers} for the losses {stack.tolist()}. {weighting.asks_of_losses}".rstrip()
            )
        return Weighed(
            tasks,
            stack,
            weights.to(stack.device),
            list(zip(learned, slopes, strict=True)),
            numbers,
            active,
        )

    def _numbers_of(self, names: tuple[str, ...], device: torch.device) -> Tensor:
        """Return the tasks' numbers on a device, made once: on their way there they are awaited."""
        key = names, device
        if key not in self._numbers:
            numbers = [self._tasks.index(name) for name in names]
            self._numbers[key] = torch.tensor(numbers, device=device)
        return self._numbers[key]


def _derivatives(
    weighting: Weighting, losses: Tensor, active: Tensor, learned: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return d objective / d losses, shape (m,), and the derivatives by learned parameters."""
    if _is_sum(weighting) and not learned:
        return torch.ones_like(losses), []
    raw = losses.detach().to(active.device).requires_grad_()
    with torch.enable_grad(), _without_autocast(raw.device), weighting.only(active):
        weighted = weighting(raw)
        if weighted.shape != raw.shape:
            raise ValueError(
                f"{type(weighting).__name__} must return one weighted loss per task, "
                f"shape {tuple(raw.shape)}, but got shape {tuple(weighted.shape)}."
            )
        ones = torch.ones_like(weighted)
        if weighted is raw and not raw._backward_hooks:  # no pass is needed to know these
            return ones, [torch.zeros_like(parameter) for parameter in learned]
        weights, *slopes = torch.autograd.grad(
            weighted, [raw, *learned], ones, allow_unused=True, materialize_grads=True
        )
    return weights, slopes


def _is_sum(weighting: Weighting) -> bool:
    """Return whether a class says that its objective is the sum, and nobody has changed that."""
    changed = (
        weighting._forward_hooks or weighting._forward_pre_hooks or "forward" in vars(weighting)
    )
    return vars(type(weighting)).get("is_sum", False) and not changed


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    kind = device.type
    if _knows_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


_knows_autocast = functools.cache(torch.amp.is_autocast_available)
