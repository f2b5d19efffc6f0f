"""Exponential means of each task's rows over the steps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mtbalance._checks import check_at_least
from mtbalance._remembered import TaskState
from mtbalance._row_state import RowState
from mtbalance._rows import at_least_float32


class Mixing(NamedTuple):
    """How rows at hand, m of them, change their means: all of shape (m,), float64."""

    keep: Tensor
    """What part of its mean each keeps."""
    gain: Tensor
    """What part of the mean is then the row's."""
    share: Tensor
    """What the mean of ones would be then, if it were not corrected."""
    steps: Tensor
    """How many rows there have been then."""


class RowMeans(nn.Module):
    r"""Exponential means of each task's rows: :math:`M \gets (1 - \beta_t) M + \beta_t r`, from 0.

    Corrected means, M over what the mean of ones would be, are kept as such: the first is the row.

    Args:
        beta: The part that stays (or, ``of_row``, that is the new row's) in the first step.
        decay: It is divided by t to this power in step t of a task.
        of_row: Whether it is the part of the new row.
        correct: Whether means are divided by what the mean of ones would be, so that they are means
            of the rows alone, and not of the zero that they start from.
        recall: Whether tasks that are absent take part with the means that they have.
    """

    def __init__(
        self,
        beta: float,
        decay: float = 0.0,
        *,
        of_row: bool = False,
        correct: bool = True,
        recall: bool = False,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.decay = check_at_least("sigma", decay, 0)
        self.of_row = of_row
        self.correct = correct
        self.recall = recall
        self.rows = RowState()
        self.share = TaskState()
        self.steps = TaskState()

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Get to know the tasks and the number of groups."""
        self.share.bind(tasks, groups)
        self.steps.bind(tasks, groups)
        return self

    def take(self, active: Tensor | slice, group: int) -> None:
        """Belong to the tasks with these numbers, in this group."""
        self.share.take(active, group)
        self.steps.take(active, group)

    def reset(self) -> None:
        """Remember nothing."""
        for state in (self.rows, self.share, self.steps):
            state.reset()

    def mixing(self, rows: Tensor) -> Mixing:
        """Return how the rows at hand change their means; :meth:`remember` makes it true.

        Args:
            rows: Anything with m entries.
        """
        steps = self.steps.read(rows) + 1
        part = self.beta / steps**self.decay
        gain = part if self.of_row else 1 - part
        keep = 1 - part if self.of_row else part
        before = keep * self.share.read(rows)
        share = before + gain
        if self.correct:
            keep, gain = before / share, gain / share
        return Mixing(keep, gain, share, steps)

    def alone(
        self,
        gradients: Tensor,
        take: Callable[[Tensor | slice, int], None],
        direction_of: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the direction of rows that are of no Balancer's, shape (m, p), and remember them.

        Args:
            gradients: The rows.
            take: Lets the strategy know whose rows it gets, and of which group.
            direction_of: Maps means, shape (m, p), to a direction.
        """
        active, group = self.share.active, self.share.group
        mixing = self.mixing(gradients)
        tasks = list(range(len(gradients))) if isinstance(active, slice) else active.tolist()
        hand = self.at_hand(tasks, group)
        rows = gradients.detach().to(at_least_float32(gradients.dtype))
        numbers = zip(mixing.keep.tolist(), mixing.gain.tolist(), strict=True)
        means = {}
        for task, row, (keep, gain) in zip(tasks, rows, numbers, strict=True):
            old = self.rows.alone(task, group, row)
            means[task] = gain * row if old is None else keep * old + gain * row
        for task in hand:
            if task not in means:
                old = self.rows.alone(task, group, rows[0])
                means[task] = torch.zeros_like(rows[0]) if old is None else old
        matrix = torch.stack([means[task] for task in hand])
        if len(hand) > len(tasks):
            take(torch.tensor(hand, device=rows.device), group)
        direction = direction_of(matrix)
        take(active, group)
        if bool(torch.isfinite(matrix).all()):
            self.remember(mixing)
            for task in tasks:
                self.rows.remember_alone(task, group, means[task])
        return direction.to(gradients.dtype)

    def remember(self, mixing: Mixing) -> None:
        """Take it that rows have changed their means."""
        self.share.write(mixing.share)
        self.steps.write(mixing.steps)

    def at_hand(self, tasks: Sequence[int], group: int) -> list[int]:
        """Return the tasks that take part, in order.

        Args:
            tasks: The numbers of those that are there.
            group: The number of the group of parameters.
        """
        if not self.recall:
            return list(tasks)
        shares = self.share.values[group].tolist()  # empty alone, before the first rows
        known = [n for n, share in enumerate(shares) if share > 0 and n not in tasks]
        return sorted([*tasks, *known])
