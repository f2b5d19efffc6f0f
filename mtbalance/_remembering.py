"""What a gradient strategy remembers from step to step, and whose rows it gets."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from typing_extensions import Self

from mtbalance._random import RandomSource
from mtbalance._remembered import TaskChange, TaskState, not_carried
from mtbalance._row_means import RowMeans


class Remembering(nn.Module):
    """May remember numbers of tasks and means of rows, per group of parameters."""

    _states: tuple[TaskState | RowMeans, ...] = ()  # on the class, for objects pickled before

    def per_task(self, start: float = 0.0, *, pairs: bool = False) -> TaskState:
        """Return a new state to be assigned to an attribute: a number per task and group.

        Args:
            start: The number before anything has been remembered.
            pairs: Whether there is one for each ordered pair of tasks instead.
        """
        state = TaskState(axes=2 if pairs else 1, start=start)
        self._states = (*self._states, state)
        return state

    def mean_rows(self, beta: float, decay: float = 0.0, **options: bool) -> RowMeans:
        """Return new :class:`RowMeans`, for an attribute: what it gets to see instead of rows."""
        means = RowMeans(beta, decay, **options)
        self._states = (*self._states, means)
        return means

    @property
    def row_means(self) -> RowMeans | None:
        """The means that the strategy gets to see instead of rows, if any."""
        return next((state for state in self._states if isinstance(state, RowMeans)), None)

    @property
    def remembers(self) -> bool:
        """Whether there are buffers to be put back after a step that writes nothing."""
        return bool(self._states or self._buffers)

    def end_step(self, *, written: bool) -> None:
        """Take it that a step is over, and whether anything was written."""
        for state in self._states:
            if isinstance(state, RowMeans):
                state.rows.end_step(written=written)

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Get to know the tasks, where it matters whose rows they are; the Balancer calls this.

        Args:
            tasks: All tasks.
            groups: In how many groups the shared parameters are.
        """
        for state in self._states:
            state.bind(tasks, groups)
        return self

    @contextmanager
    def only(self, active: Tensor, group: int = 0) -> Iterator[None]:
        """Let rows belong to the tasks whose numbers are given, shape (m,), for a while.

        Args:
            active: The numbers.
            group: The number of the group of parameters that the rows are of.
        """
        self.take(active, group)
        try:
            yield
        finally:
            self.take(slice(None), 0)

    def take(self, active: Tensor | slice, group: int) -> None:
        """Let rows belong to these tasks and this group from now on; see :meth:`only`."""
        for state in self._states:
            state.take(active, group)

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what to load, with other tasks, of what was saved, by name.

        What :meth:`per_task` and :meth:`mean_rows` made says so for itself. Own buffers are no
        task's, and stay; override this where it is not so.

        Args:
            state: What this module itself saved.
            change: The tasks then and now.

        Raises:
            ValueError: If it cannot be told.
        """
        own = {
            **dict(self.named_buffers(recurse=False)),
            **dict(self.named_parameters(recurse=False)),
        }
        for name, saved in state.items():
            shape = own[name].shape if name in own else None
            if not isinstance(saved, Tensor) or saved.shape != shape:
                raise not_carried(self, name, change)
        return dict(state)

    def reset(self) -> None:
        """Forget everything remembered from earlier steps."""
        for child in self.children():
            if isinstance(child, RandomSource | TaskState | RowMeans | Remembering):
                child.reset()
