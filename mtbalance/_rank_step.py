"""What a weighting may look at before a step that several processes take together."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtbalance._passes import sharded_task_gradients
from mtbalance._products import inner_products
from mtbalance._ranks import Ranks
from mtbalance._rows import Rows
from mtbalance._shards import is_sharded, sum_over_shards
from mtbalance.weighting._base import Step


@dataclass(frozen=True)
class RankStep(Step):
    """A step that several ranks take together, each with its part of the validation batch."""

    ranks: Ranks

    def shares(self, tasks: Collection[str], error: Exception | None = None) -> dict[str, float]:
        """Return by how much each task's loss counts: see :class:`Step`."""
        counts = self.ranks.count(tasks, error)
        return {task: self.ranks.size / count for task, count in counts.items() if count}

    def from_holders(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return each tensor as the mean over those that hold one: see :class:`Step`."""
        held = {id(p): tensor for p, tensor in zip(self.parameters, tensors, strict=True)}
        leaves = self.ranks.ordered(self.parameters)
        flags = [held[id(leaf)] is not None for leaf in leaves]
        told = self.ranks.sum(torch.tensor(flags, dtype=torch.int64, device="cpu")).tolist()
        counts = {id(leaf): count for leaf, count in zip(leaves, told, strict=True)}
        missing = [leaf for leaf in leaves if 0 < counts[id(leaf)] < self.ranks.size]
        sums = self.ranks.add_up(missing, [held[id(leaf)] for leaf in missing])
        for leaf, total in zip(missing, sums, strict=True):
            held[id(leaf)] = None if total is None else total / counts[id(leaf)]
        return [held[id(p)] for p in self.parameters]

    def products(self, loss: Tensor | None, factors: Sequence[float]) -> Tensor:
        """Return the products averaged over ranks: see :class:`Step`."""
        return self.ranks.sum(super().products(loss, factors)) / self.ranks.size


@dataclass(frozen=True)
class ShardedStep(RankStep):
    """One whose rows are shards."""

    def products(self, loss: Tensor | None, factors: Sequence[float]) -> Tensor:
        """Return the products averaged over ranks: see :class:`Step`."""
        if loss is None:
            raise ValueError(
                "`validation` must return a loss on every rank where parameters are sharded, but "
                f"got none on rank {self.ranks.rank}."
            )
        (slopes,) = sharded_task_gradients([loss], self.parameters, [False])
        scaled = [None if s is None else s * f for s, f in zip(slopes, factors, strict=True)]
        rows = [*self.gradients, scaled]
        sharded = [number for number, p in enumerate(self.parameters) if is_sharded(p)]
        plain = [number for number, p in enumerate(self.parameters) if not is_sharded(p)]
        # Slopes of shards are averaged already, all others are this rank's own.
        products = sum_over_shards(
            [self.parameters[number] for number in sharded],
            [[row[number] for number in sharded] for row in rows],
            _products_with_last,
        )
        own = _products_with_last([[row[number] for number in plain] for row in rows])
        return products + self.ranks.sum(own).to(products.device) / self.ranks.size


def _products_with_last(rows: Rows) -> Tensor:
    return inner_products(rows[:-1], rows[-1])
