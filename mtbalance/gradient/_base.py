"""What every gradient strategy is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from mtbalance._checks import (
    check_gradients,
    check_gramian,
    check_kind,
    check_preference,
    check_primary,
    number_of_task,
    numbers_in_order,
)
from mtbalance._gramians import gramian_in_range
from mtbalance._remembered import TaskState
from mtbalance._remembering import Remembering
from mtbalance._rows import combine, is_finite


class GradientStrategy(Remembering, ABC):
    """Turns the per-task gradients, a matrix of shape (m, p), into one direction of shape (p,).

    Subclasses write :meth:`forward`. A direction is on the scale of the **sum** of the rows: m
    equal rows ``g`` give ``m * g`` unless the method's own formula says otherwise, so that changing
    the strategy leaves the learning rate alone. Input of low precision (bfloat16, float16) arrives
    as it is; the result is cast to the rows' dtype.

    What a method remembers of each task, or pair of tasks, from step to step is made in
    ``__init__`` with :meth:`per_task`. A Balancer then says in which of its groups of parameters
    the rows are, and of which tasks, so that each group has a state of its own and absent tasks
    keep theirs; after a step that writes nothing (skipped, an error, an overflow under a gradient
    scaler) it puts the state back. Not to be touched by rows that are not finite.
    """

    is_sum: ClassVar[bool] = False
    """Whether the direction is always the sum of the rows, so that one backward pass serves."""

    coordinatewise: bool = False
    """Whether each coordinate of the direction depends on its own column alone, so that the columns
    may be handed over in blocks."""

    by_gramian: bool = False
    """Whether the inner products of the rows decide by what coefficients these are combined."""

    further_batches: tuple[int, ...] = ()
    """By how many further, independent batches the method may be told :meth:`coefficients`; empty
    if it needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.fallbacks = 0
        """How often the strategy answered with its documented substitute; see each class."""

    def __call__(self, gradients: Tensor) -> Tensor:
        """Check the shape and the dtype of ``gradients``, then call :meth:`forward`."""
        check_gradients(gradients)
        direction: Tensor = super().__call__(gradients)
        if direction.shape != gradients.shape[1:]:
            raise ValueError(
                f"{type(self).__name__} must return one direction, shape "
                f"{tuple(gradients.shape[1:])}, but got shape {tuple(direction.shape)}."
            )
        return direction

    @property
    def growth(self) -> float | None:
        """How many times the sum of the rows' norms an entry of the direction is at most, if known.

        A direction that may be more than the parameters' dtype holds is looked at before it is
        written; where nothing is known, each is. Does not hold for a subclass of the class that
        says so.
        """
        return None

    @abstractmethod
    def forward(self, gradients: Tensor) -> Tensor:
        """Return the direction, of shape (p,), for ``gradients`` of shape (m, p)."""

    def coefficients(self, gramian: Tensor, across: Tensor | None = None) -> Tensor | None:
        """Return by what to combine rows of which these are the inner products, or None.

        Args:
            gramian: Shape (m, m), float64.
            across: Only with :attr:`further_batches`: the same between the rows of two independent
                batches, which is not symmetric. Row i is of task i in one, column j in the other.

        Returns:
            Shape (m,), float64, on the device of the Gramian; None where the rows themselves must
            be seen.
        """
        del across
        return torch.ones_like(gramian[0]) if self.is_sum else None

    def row_factors(self, gramian: Tensor) -> Tensor | None:
        """Return factors of the rows, shape (m,), that come before :meth:`on_columns`, or None.

        Only asked where there are no :meth:`coefficients`, which hold such factors.
        """
        del gramian
        return None

    def start(self) -> None:
        """Draw what all columns of one direction share, before its blocks are asked for."""

    def on_columns(self, gradients: Tensor, first: int) -> Tensor:
        """Return the direction, shape (n,), of a block of columns, shape (m, n).

        Only for coordinatewise strategies. Those that draw do so by the number of the column, so
        that neither the size of the blocks nor their spread over processes changes anything.

        Args:
            gradients: The block.
            first: The number of its first column.
        """
        del first
        return self(gradients)


Preference = Mapping[str, float] | Sequence[float]
"""One positive number per task, by name or in order; only their ratios count."""


class GramianStrategy(GradientStrategy):
    """A gradient strategy whose direction is a combination of the rows that the Gramian decides.

    Subclasses write :meth:`weights`; the Gramian (in float64), the combination, devices
    and dtypes come for free.
    """

    by_gramian = True

    @abstractmethod
    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weights, of shape (m,), of the rows whose inner products are given.

        Args:
            gramian: Shape (m, m), float64, finite; entry (i, j) is the inner product of the
                gradients of tasks i and j.
        """

    def weights_across(self, gramian: Tensor, across: Tensor) -> Tensor:
        """Return the weights by further batches, as :meth:`weights`; see :meth:`coefficients`."""
        del across
        return self.weights(gramian)

    def forward(self, gradients: Tensor) -> Tensor:
        """Return the combination of the rows of ``gradients``, of shape (p,).

        Rows that are not finite give a direction of NaN and leave the strategy's state alone. Of a
        strategy that has :meth:`mean_rows`, it is the combination of these.
        """
        means = self.row_means
        if means is not None:
            return means.alone(gradients, self.take, self._combined)
        return self._combined(gradients)

    def on_columns(self, gradients: Tensor, first: int) -> Tensor:
        del first
        return self._combined(gradients)  # of means already, where there are any

    def _combined(self, gradients: Tensor) -> Tensor:
        rows = [[row] for row in gradients.detach()]
        gramian = gramian_in_range(gradients)
        if not is_finite(gramian):
            return torch.full_like(gradients[0], torch.nan)
        (direction,) = combine(rows, self.solve(gramian))
        return gradients[0] if direction is None else direction

    def coefficients(self, gramian: Tensor, across: Tensor | None = None) -> Tensor:
        return self.solve(gramian, across)

    def solve(self, gramian: Tensor, across: Tensor | None = None) -> Tensor:
        """Check the Gramian, and return the weights in float64 on its device."""
        check_gramian(gramian)
        wide = gramian.double()
        weights = self.weights(wide) if across is None else self.weights_across(wide, across)
        if not isinstance(weights, Tensor) or weights.shape != (len(gramian),):
            got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"{weights!r}"
            raise ValueError(
                f"{type(self).__name__}.weights must return one weight per row, a tensor of shape "
                f"({len(gramian)},), but got {got}."
            )
        # On the way to a device, what is sent is safe when the call returns: no need to wait. Of
        # Apple's, PyTorch does not say that.
        return weights.to(gramian.device, non_blocking=gramian.device.type != "mps")


class WrappingStrategy(GradientStrategy):
    """A gradient strategy around another, which gets to know all that this one does.

    Args:
        strategy: The strategy within.
    """

    def __init__(self, strategy: GradientStrategy) -> None:
        super().__init__()
        check_kind("strategy", strategy, GradientStrategy)
        if strategy.row_means is not None:
            raise TypeError(
                f"`strategy` must get the rows of its step, but {type(strategy).__name__} averages "
                "them over steps. Put RowMean around all others."
            )
        self.strategy = strategy
        self.further_batches = strategy.further_batches

    @property
    def remembers(self) -> bool:
        return super().remembers or self.strategy.remembers

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        self.strategy.bind(tasks, groups)
        return super().bind(tasks, groups)

    def take(self, active: Tensor | slice, group: int) -> None:
        self.strategy.take(active, group)
        super().take(active, group)

    def start(self) -> None:
        self.strategy.start()


class BoundStrategy(GramianStrategy):
    """A Gramian strategy to which it may matter whose rows they are.

    Subclasses say whether it does, :attr:`is_of_tasks`, and get to know the tasks, once, in
    :meth:`learn`. Such a strategy belongs to one set of tasks; others belong to nobody.
    """

    because: ClassVar[str]
    """Why it belongs to its tasks, in words that follow "as it"."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] | None = None
        self._active: Tensor | None = None

    @property
    @abstractmethod
    def is_of_tasks(self) -> bool:
        """Whether it matters whose rows they are."""

    @abstractmethod
    def learn(self, tasks: Sequence[str]) -> None:
        """Take what this strategy was told of these tasks, or raise ValueError."""

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Get to know the tasks. The Balancer calls this; alone, the first call.

        Raises:
            ValueError: If what the strategy was told is not about these tasks.
            RuntimeError: If the strategy has been bound to other tasks.
        """
        super().bind(tasks, groups)
        if not self.is_of_tasks or self.tasks == tuple(tasks):
            return self
        if self.tasks is not None:
            raise RuntimeError(
                f"this {type(self).__name__} must belong to one set of tasks, as it "
                f"{self.because}, but it is bound to {self.tasks} and was asked for "
                f"{tuple(tasks)}. Make a new one."
            )
        self.learn(tasks)
        self.tasks = tuple(tasks)
        return self

    def take(self, active: Tensor | slice, group: int) -> None:
        """Let rows belong to these tasks and this group from now on."""
        super().take(active, group)
        self._active = None if isinstance(active, slice) else active

    def numbers_of_rows(self, gramian: Tensor) -> Tensor:
        """Return the numbers of the tasks whose rows have this Gramian, shape (m,), beside it."""
        if self.tasks is None:
            for state in self._states:
                if isinstance(state, TaskState):
                    state.read(gramian)  # binds it to these rows, where they are
            self.bind([str(number) for number in range(len(gramian))])
        active = self._active
        if active is None:
            active = torch.arange(len(self.tasks or ()), device=gramian.device)
        if len(active) != len(gramian):
            raise ValueError(
                f"`gradients` must have one row for each of the {len(active)} tasks that this "
                f"{type(self).__name__} is bound to, but got {len(gramian)}."
            )
        return active.to(gramian.device)


class PreferringStrategy(BoundStrategy):
    """A Gramian strategy that may prefer some tasks to others.

    Subclasses ask :meth:`preferences` in :meth:`weights`. Preferences are scaled to a mean of 1
    over all tasks, so that equal ones change nothing and no choice of them changes the learning
    rate; an absent task takes its own away and leaves the others' alone.

    Args:
        preference: One positive number per task: a mapping from task name, or a sequence in the
            order of the tasks. None for no preference.
    """

    because: ClassVar[str] = "prefers some of them"

    def __init__(self, preference: Preference | None = None) -> None:
        super().__init__()
        self.preference = check_preference(preference)
        self._numbers: list[float] = []

    @property
    def is_of_tasks(self) -> bool:
        return self.preference is not None

    def learn(self, tasks: Sequence[str]) -> None:
        if self.preference is not None:
            self._numbers = _in_order(self.preference, tasks)

    def preferences(self, gramian: Tensor) -> Tensor:
        """Return the preferences of the tasks whose rows have this Gramian, shape (m,), like it."""
        if self.preference is None:
            return gramian.new_ones(len(gramian))
        rows = self.numbers_of_rows(gramian)
        return gramian.new_tensor(self._numbers)[rows]

    def pair_of_preferences(self) -> tuple[float, float]:
        """Return the preferences of two tasks as numbers, for which no device is waited."""
        if self.preference is None:
            return 1.0, 1.0
        one, other = self.preferences(torch.ones(2, dtype=torch.float64, device="cpu")).tolist()
        return one, other

    @property
    def largest_preference(self) -> float:
        """The largest of the preferences, whose mean is 1."""
        return max(self._given())

    @property
    def smallest_preference(self) -> float:
        """The smallest of the preferences, whose mean is 1."""
        return min(self._given())

    def _given(self) -> list[float]:
        """Return the preferences in the order in which they were given."""
        given = [1.0] if self.preference is None else self.preference
        return _scaled(list(given.values() if isinstance(given, Mapping) else given))

    def extra_repr(self) -> str:
        return "" if self.preference is None else f"preference={self.preference}"


class PrimaryStrategy(BoundStrategy):
    """A Gramian strategy that may favour one task, the primary, over the others, its auxiliaries.

    Subclasses ask :meth:`is_primary` in :meth:`weights`. Where the primary task is absent, all rows
    are those of auxiliaries.

    Args:
        primary: The task's name, or its number in the order of the tasks. None for no primary task.
    """

    because: ClassVar[str] = "favours one of them"

    def __init__(self, primary: str | int | None = None) -> None:
        super().__init__()
        self.primary = check_primary(primary)
        self._number = -1

    @property
    def is_of_tasks(self) -> bool:
        return self.primary is not None

    def learn(self, tasks: Sequence[str]) -> None:
        if self.primary is not None:
            self._number = number_of_task("primary", self.primary, tasks)

    def is_primary(self, gramian: Tensor) -> Tensor:
        """Return whether each row of this Gramian is the primary task's, shape (m,), beside it.

        At most one is. Waits for no device.
        """
        if self.primary is None:
            return torch.zeros(len(gramian), dtype=torch.bool, device=gramian.device)
        if self.tasks is None and isinstance(self.primary, str):
            raise ValueError(
                "`primary` must be a number while the strategy does not know the tasks' names, but "
                f"got {self.primary!r}. Give it to a Balancer, or call bind(tasks) first."
            )
        return self.numbers_of_rows(gramian) == self._number

    def extra_repr(self) -> str:
        return "" if self.primary is None else f"primary={self.primary!r}"


def _in_order(preference: Preference, tasks: Sequence[str]) -> list[float]:
    """Return the preferences in the order of the tasks, with a mean of 1."""
    return _scaled(numbers_in_order("preference", preference, tasks))


def _scaled(preference: Sequence[float]) -> list[float]:
    """Return the preferences with a mean of 1."""
    mean = sum(preference) / len(preference)
    return [number / mean for number in preference]
