"""Losses at the parameters that a step leads to, for weightings that learn from what it did."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtbalance._buffers import Buffers
from mtbalance._checks import check_losses_by_task
from mtbalance._company import Losses
from mtbalance._record import Record
from mtbalance._rows import stacked
from mtbalance._step import Setting
from mtbalance.weighting._base import Weighting


class AfterSteps:
    """Knows which step may be looked back at, and tells once of loops that never do.

    Args:
        tasks: All tasks.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._buffers = Buffers()
        self._told = False
        # Where losses of the step lie, these, so that no other loss comes to lie there, and copies:
        # a CUDA graph writes the next ones to the same place.
        self._before: list[tuple[int, Tensor, Tensor]] = []
        self.due: tuple[str, ...] | None = None
        """The tasks of the step to look back at, none if it wrote nothing; None without a step."""

    def begin(self, weighting: Weighting, losses: object = None) -> None:
        """Begin a step, after which none before it can be looked back at.

        Args:
            weighting: Of the Balancer.
            losses: What the step is given, unchecked; None where it comes in micro-batches.
        """
        if weighting.needs_after_step and self.due and not self._told:
            self._told = True
            warnings.warn(
                f"{type(weighting).__name__} must see the losses that each step leads to, but two "
                "steps were taken without after_step() in between, so that it learns nothing. Call "
                "balancer.after_step(losses) after optimizer.step(), with a function that returns "
                "the losses of the same batch.",
                RuntimeWarning,
                stacklevel=3,
            )
        self.due = None
        self._before = []
        if weighting.needs_after_step and isinstance(losses, Mapping):
            given = [loss.detach() for loss in losses.values() if type(loss) is Tensor]
            self._before = [(loss.data_ptr(), loss, loss.clone()) for loss in given]

    def end(self, record: Record) -> None:
        """Note the step that has been made."""
        self.due = () if record.skipped or record.overflow else record.tasks

    def look_back(
        self,
        losses: Losses | Callable[[], Losses],
        setting: Setting,
        parameters: Callable[[], Sequence[Tensor]],
    ) -> None:
        """Show the weighting the losses after the last step, all or nothing.

        Args:
            losses: The losses of this process, or a function that returns them.
            setting: Who took the step, and with what.
            parameters: Returns the parameters that losses are known to reach.
        """
        weighting = setting.weighting
        if not weighting.needs_after_step:
            return
        if self.due is None:
            raise RuntimeError(
                "after_step() must follow backward() and optimizer.step(), once per step, but no "
                "step has been taken since the last call."
            )
        if not self.due or weighting.rests:
            self.due = None
            return
        weighting.count_after_step()
        named: Losses = {}
        error: Exception | None = None
        try:
            named = self._losses(losses, parameters(), may_lack=setting.company.size > 1)
        except Exception as caught:  # noqa: BLE001  # raised in means(), on all ranks
            error = caught
        means = setting.company.means(named, error)
        missing = [task for task in self.due if task not in means]
        if missing:
            raise ValueError(
                f"`losses` must hold the loss of every task of the step "
                f"({', '.join(map(repr, self.due))}), but {missing[0]!r} is missing."
            )
        stack = stacked([means[task] for task in self.due])
        state = next(itertools.chain(weighting.parameters(), weighting.buffers()), stack)
        numbers = [self._tasks.index(task) for task in self.due]
        self.due = None
        with torch.no_grad(), weighting.only(torch.tensor(numbers, device=state.device)):
            weighting.after_step(stack.to(state.device))

    def _losses(
        self,
        losses: Losses | Callable[[], Losses],
        parameters: Sequence[Tensor],
        *,
        may_lack: bool,
    ) -> Losses:
        """Return the detached losses that this process has."""
        if callable(losses):
            with torch.no_grad(), self._buffers.restored(parameters):
                losses = losses()
        self._check_anew(losses)
        named = check_losses_by_task(losses, self._tasks, may_be_empty=may_lack, with_graph=False)
        return {task: loss.detach() for task, loss in named.items()}

    def _check_anew(self, losses: object) -> None:
        """Raise if losses are those that the step was made of, which tell nothing of it."""
        for task, loss in losses.items() if isinstance(losses, Mapping) else ():
            if type(loss) is Tensor and any(
                loss.data_ptr() == place and torch.equal(loss, value)
                for place, _, value in self._before
            ):
                raise ValueError(
                    f"`losses` must be those after optimizer.step(), but that of {task!r} is the "
                    "one that backward() was given. Compute them anew, or give a function that "
                    "returns them."
                )
