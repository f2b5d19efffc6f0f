"""Where the tasks of a step are balanced: at the shared parameters, or at features."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtbalance._jacobian import TaskGradients, add_to_grad, gradient_of, reach_of
from mtbalance._ranks import Ranks
from mtbalance._rows import Rows, columns_of, gramian_of
from mtbalance._shards import like_sharded, sum_over_shards
from mtbalance._split import ReachLog


class Place(Protocol):
    """What the tasks' rows are gradients of."""

    first: int
    """The number of the rows' first column here, counted over all processes."""

    def divide(self, gradients: TaskGradients) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return what is balanced, by the number of its group, and all other leaves."""

    def gramian(self, leaves: Sequence[Tensor], rows: Rows) -> Tensor:
        """Return the inner products of rows over all their columns, in whatever process."""

    def over_all(self, products: Tensor) -> Tensor:
        """Return inner products over all columns, of those over the columns of this process."""

    def write(self, leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
        """Accumulate directions into ``.grad``."""


class AtParameters:
    """Balancing at the shared parameters themselves."""

    first = 0

    def __init__(self, reach: ReachLog) -> None:
        self._reach = reach

    def divide(self, gradients: TaskGradients) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return the shared parameters of each group, and all other leaves."""
        groups, rest = self._reach.divide(gradients.leaves.values())
        self._reach.check_inferred(gradients, groups)
        return groups, rest

    def gramian(self, leaves: Sequence[Tensor], rows: Rows) -> Tensor:
        """Return the inner products of the rows, shards of other processes included."""
        return sum_over_shards(leaves, rows, gramian_of)

    def over_all(self, products: Tensor) -> Tensor:
        """Return them as they are: shards have been added up leaf by leaf."""
        return products

    def write(self, leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
        """Accumulate directions into ``.grad``."""
        write(leaves, directions)


class AtFeatures:
    """Balancing at the output of the shared part, which one pass then goes back through.

    Args:
        parts: The features, one tensor or several; with several processes, those of its part of
            the batch.
        below: The leaves that they depend on, in any process.
        ranks: The processes.
    """

    def __init__(self, parts: Sequence[Tensor], below: Sequence[Tensor], ranks: Ranks) -> None:
        self._parts = parts
        self._below = below
        self._ranks = ranks
        # As if the parts of all processes, one after the other, were one tensor.
        self.first = ranks.rank * sum(map(columns_of, parts))

    def divide(self, gradients: TaskGradients) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return the features as the only group, and all leaves that are not before them."""
        own = {id(part) for part in self._parts}
        rest = [leaf for key, leaf in gradients.leaves.items() if key not in own]
        return {0: list(self._parts)}, rest

    def gramian(self, leaves: Sequence[Tensor], rows: Rows) -> Tensor:
        """Return the inner products of the rows, which each process has some columns of."""
        del leaves
        return self.over_all(gramian_of(rows))

    def over_all(self, products: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return self._ranks.sum(products)

    def write(self, leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
        """Let the directions flow back into ``.grad`` of what the features depend on."""
        reached = [(f, d) for f, d in zip(leaves, directions, strict=True) if d is not None]
        features, slopes = [f for f, _ in reached], [d for _, d in reached]
        if not self._ranks.several:
            torch.autograd.backward(features, slopes)
            return
        gradients: list[Tensor | None] = [None] * len(self._below)
        if features:
            gradients = gradient_of(features, self._below, slopes)
        write(self._below, self._ranks.add_up(self._below, gradients))


def write(leaves: Sequence[Tensor], directions: Sequence[Tensor | None]) -> None:
    """Accumulate directions, of sharded leaves this process's shards, into ``.grad``."""
    add_to_grad(leaves, [like_sharded(d, f) for d, f in zip(directions, leaves, strict=True)])


def check_between(features: Sequence[Tensor], losses: Mapping[str, Tensor]) -> None:
    """Raise unless each loss reaches what the features depend on, and only through them."""
    below = {id(leaf) for leaf in reach_of(features).leaves}
    for task, loss in losses.items():
        if not any(id(leaf) in below for leaf in reach_of([loss]).leaves):
            raise ValueError(f"the loss of task {task!r} must reach `features`, but does not.")
        past = [leaf for leaf in reach_of([loss], until=features).leaves if id(leaf) in below]
        if past:
            raise ValueError(
                "`features` must be all that the losses get from the shared part of the network, "
                f"but the loss of task {task!r} reaches {len(past)} of its parameters (one of "
                f"shape {tuple(past[0].shape)}) past them, too. Leave `features` out."
            )
