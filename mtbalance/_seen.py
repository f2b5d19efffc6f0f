"""What is known of a step before its backward passes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mtbalance._agreement import Agreement
from mtbalance._graphs import Reach
from mtbalance._task_gradients import TaskGradients


class Seen(NamedTuple):
    """The losses of a step: first what this process knows of them, then what all of them do."""

    here: Mapping[str, Tensor] = {}
    """The losses of this process, with their graphs."""
    losses: Mapping[str, Tensor] = {}
    """Detached; of several processes that have agreed, the means over those that have the task."""
    nonfinite: tuple[str, ...] = ()
    """Tasks whose loss is not finite."""
    reach: Reach = Reach([], [])
    """What the graphs of ``here`` hold."""
    reached: Mapping[str, Sequence[Tensor]] = {}
    """Per task, what its loss reaches here, where the other processes want to know."""
    agreement: Agreement | None = None
    """What the processes have told each other."""

    @classmethod
    def of_accumulated(cls, gradients: TaskGradients) -> "Seen":
        """Return what is known of a step whose backward passes have been made."""
        return cls(
            gradients.losses,
            gradients.losses,
            tuple(gradients.nonfinite),
            reached={task: gradients.leaves_of(task) for task in gradients.losses},
        )

    @property
    def finite(self) -> Mapping[str, Tensor]:
        """The losses of the tasks that have a part in the step."""
        return _without(self.losses, self.nonfinite)

    @property
    def finite_here(self) -> Mapping[str, Tensor]:
        """Those of this process, with their graphs."""
        return _without(self.here, self.nonfinite)


def _without(losses: Mapping[str, Tensor], tasks: Sequence[str]) -> Mapping[str, Tensor]:
    if not tasks:
        return losses
    return {task: loss for task, loss in losses.items() if task not in tasks}
