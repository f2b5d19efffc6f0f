from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtbalance._checks import check_count, check_kind, check_saved
from mtbalance._remembered import TaskChange

from ._base import Step, Weighting


class WarmUp(Weighting):
    r"""Weigh all tasks alike for some epochs, and as another weighting does afterwards.

    .. math::
        w_i = \begin{cases} 1 & \text{in the first } n \text{ epochs} \\
            w_i^{\text{wrapped}} & \text{afterwards.} \end{cases}

    Call :meth:`end_epoch` (or ``Balancer.end_epoch``) after each epoch, which counts them.

    In the warm-up, the wrapped weighting sees the losses and the ends of epochs, so that what it
    *observes* is known when it takes over: the means of ``DWA``, the nadir of ``STCH`` (its own
    epochs count from the start), the scales that ``Uncertainty`` and ``IMTLL`` learn. What it would
    learn from the *effect* of its weights waits for them to have one: ``AutoLambda`` and ``FAMO``
    begin when the warm-up ends, as they would in their first step. Until then no per-task gradients
    are taken for them, and functions given as ``validation`` or to ``after_step`` are not called.
    They have to be given from the start, all the same, as has the optimizer of ``AutoLambda``: a
    loop that forgets them is told in its first steps, and not after the warm-up.

    Args:
        weighting: The weighting that takes over.
        epochs: Number of epochs with equal weights, at least 0. There is no default; the loss
            curves of a plain run show where they have settled.

    Note:
        Losses that the wrapped weighting refuses (negative ones, where it takes logarithms) are
        refused when it takes over, and not before.

    References:
        Warm-ups with equal weights are common practice; this one is from no paper.

    Example:
        >>> import torch
        >>> from mtbalance.weighting import Constant
        >>> weighting = WarmUp(Constant([0.5, 2.0]), epochs=1)
        >>> weighting(torch.tensor([3.0, 4.0]))
        tensor([3., 4.])
        >>> weighting.end_epoch()
        >>> weighting(torch.tensor([3.0, 4.0]))
        tensor([1.5000, 8.0000])
    """

    closed: Tensor

    def __init__(self, weighting: Weighting, epochs: int) -> None:
        super().__init__()
        check_kind("weighting", weighting, Weighting)
        self.weighting = weighting
        self.epochs = check_count("epochs", epochs, 0)
        self._read: tuple[Tensor, int, bool] | None = None
        # What the wrapped class says of itself is true of this one object.
        self.needs_gradients = weighting.needs_gradients  # type: ignore[misc]
        self.needs_validation = weighting.needs_validation  # type: ignore[misc]
        self.needs_after_step = weighting.needs_after_step  # type: ignore[misc]
        self.asks_of_losses = weighting.asks_of_losses  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}  # a copy's count has versions of its own

    def setup(self) -> None:
        self.weighting.bind(self.tasks or ())
        # Epochs that have ended, the same for all tasks.
        self.register_buffer("closed", torch.zeros(self.num_tasks, dtype=torch.long))

    def check_state(self, state: Mapping[str, object]) -> None:
        check_saved(self, state, counts=("closed",))

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what to load, with other tasks: new ones have the same epochs behind them."""
        carried = super().carried(state, change)
        closed = state.get("closed")
        if isinstance(closed, Tensor):
            carried["closed"] = closed[:1].expand(len(change.new)).clone()
        return carried

    @property
    def warms_up(self) -> bool:
        """Whether weights are equal."""
        if self.tasks is None:
            return self.epochs > 0
        # The count is read when it has changed, not in each step: on a GPU, reading it waits.
        version = self.closed._version
        if self._read is None or self._read[0] is not self.closed or self._read[1] != version:
            self._read = self.closed, version, int(self.closed[0]) < self.epochs
        return self._read[2]

    @property
    def rests(self) -> bool:
        """Whether, for now, it needs nothing of what the wrapped weighting says it needs."""
        return self.warms_up or self.weighting.rests

    @contextmanager
    def only(self, active: Tensor) -> Iterator[None]:
        """Let losses belong to the tasks whose numbers are given, shape (m,), for a while."""
        with super().only(active), self.weighting.only(active):
            yield

    def check_ready(self) -> None:
        """Raise if the wrapped weighting lacks something, in the warm-up, too."""
        self.weighting.check_ready()

    def before_step(self, step: Step) -> None:
        """Let the wrapped weighting look ahead, unless its weights have no effect yet."""
        if not self.warms_up:
            self.weighting.before_step(step)

    def forward(self, losses: Tensor) -> Tensor:
        warms_up = self.warms_up
        weighted: Tensor = self.weighting(losses.detach() if warms_up else losses)
        if not warms_up:
            return weighted
        if not any(parameter.requires_grad for parameter in self.weighting.parameters()):
            return losses
        return losses + (weighted - weighted.detach())  # 0, with the slopes of what is learned

    def end_step(self, *, written: bool) -> None:
        self.weighting.end_step(written=written)

    def after_step(self, losses: Tensor) -> None:
        """Let the wrapped weighting look back, unless its weights have no effect yet."""
        if not self.warms_up:
            self.weighting.after_step(losses)

    def end_epoch(self) -> None:
        """Close an epoch, also for the wrapped weighting."""
        self.closed += 1
        self.weighting.close_epoch()

    def tally(self) -> tuple[int, int, int]:
        """Return what several processes must have done equally often, with this and the wrapped."""
        loads, epochs, steps = super().tally()
        others = self.weighting.tally()
        return loads + others[0], epochs + others[1], steps + others[2]

    def reset(self) -> None:
        """Forget everything learned and remembered, and warm up again."""
        super().reset()
        self.weighting.reset()

    def extra_repr(self) -> str:
        return f"epochs={self.epochs}"
