"""Who trains together in a step: one process alone, replicas of a model, or holders of its shards.

Whatever differs between these is asked here, once: what is looked at before the backward passes,
whom it is told, how the rows of single tasks come together, and what one pass for a combination of
the losses does. The rest of the library does not ask how many processes there are.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mtbalance._agreement import BELOW, Agreement
from mtbalance._exchange import Exchange
from mtbalance._graphs import Reach, reach_of
from mtbalance._passes import gradient_of, sharded_task_gradients
from mtbalance._rank_step import RankStep, ShardedStep
from mtbalance._ranks import Ranks
from mtbalance._reach import ReachLog
from mtbalance._rows import lists_of
from mtbalance._seen import Seen
from mtbalance._task_gradients import Row, TaskGradients
from mtbalance._writing import add_to_grad, fresh_grad, write
from mtbalance.weighting._base import Step, Weighting

TaskPasses = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[bool]], Iterator[list[Tensor | None]]
]
"""Yields, per loss, its gradient for each leaf; the last argument is that of a :class:`Reach`."""
Accepts = Callable[[Sequence[Tensor | None]], bool]
"""Returns whether gradients may be written."""
Losses = Mapping[str, Tensor]
Validation = Callable[[], Losses]


class Graphs(Protocol):
    """Walks graphs as far as the place where tasks are balanced wants to know."""

    def reach(self, losses: Sequence[Tensor]) -> Reach:
        """Return what the losses reach together."""

    def reached(self, losses: Losses) -> dict[str, list[Tensor]]:
        """Return what each loss reaches; under ``BELOW``, what the features depend on."""


class Company(Protocol):
    """The processes of one step."""

    size: int
    rank: int
    sharded: bool
    agrees_late: bool
    """Whether those that accumulate meet in ``apply`` only."""
    task_passes: TaskPasses | None
    """How to make the passes of single tasks, where there is but one way."""

    def look(self, losses: Losses, nonfinite: Sequence[str], graphs: Graphs) -> Seen:
        """Return what this process knows before the passes; an error if a loss is out of place."""

    def agree(self, seen: Seen, error: Exception | None = None) -> Seen:
        """Return what all processes know together, or raise in all of them.

        Args:
            seen: What this process knows.
            error: What keeps it from taking part.
        """

    def reach(self, losses: Losses, graphs: Graphs) -> Reach:
        """Return the leaves that passes of single tasks are for, and whose graph is shared."""

    def gather(self, seen: Seen, rows: Iterable[Row], dtype: torch.dtype | None) -> TaskGradients:
        """Return the rows of all processes together, in the dtype that they are kept in."""

    def share(self, seen: Seen, task: str) -> float:
        """Return the part of a task's mean loss that this process's loss makes up."""

    def leaves(self, seen: Seen) -> list[Tensor]:
        """Return all leaves that passes of combinations write to, of whichever process's losses."""

    def backward(
        self,
        seen: Seen,
        leaves: Sequence[Tensor],
        factors: Tensor,
        scale: float,
        *,
        retain_graph: bool = False,
    ) -> None:
        """Let the gradient of a combination of the losses flow into ``.grad``.

        Args:
            seen: The losses, which the processes have agreed on.
            leaves: What to take the gradient for: all leaves, or some.
            factors: Coefficients of the losses, shape (m,).
            scale: A factor for all of them.
            retain_graph: Whether another pass follows.
        """

    def backward_from(
        self,
        features: Sequence[Tensor],
        slopes: Sequence[Tensor],
        seen: Seen,
        accepts: Accepts,
        *,
        retain_graph: bool = False,
    ) -> bool:
        """Let gradients of features flow on into ``.grad`` of what these depend on.

        Returns:
            Whether that has been accepted; nothing has been written otherwise.
        """

    def step(self, step: Step) -> Step:
        """Return what a weighting that looks ahead may look at, as these processes take it."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a small tensor over the processes."""

    def numbers_over_parts(self, vectors: Sequence[Tensor]) -> list[list[float]]:
        """Return the numbers in short vectors, summed over those that hold parts of the rows."""

    def means(self, losses: Losses, error: Exception | None = None) -> Losses:
        """Return the mean of each task's loss over the processes that have it, or raise in all.

        Args:
            losses: Detached losses of this process.
            error: What keeps it from having any.
        """

    def everywhere(self, answer: bool) -> bool:  # noqa: FBT001
        """Return whether the answer is yes in all of them."""

    def knows(self, leaf: Tensor) -> bool:
        """Return whether all of them have the leaf."""


def company_of(ranks: Ranks, log: ReachLog, owner: nn.Module) -> Company:
    """Return who takes the step that begins now.

    Args:
        ranks: The processes that the Balancer may average over.
        log: What tasks have reached.
        owner: The Balancer, whose weighting and random sources must be alike in all processes.
    """
    if log.renew():
        ranks.rename()
    if ranks.sharded:
        return Sharded(ranks, log, owner)
    return Replicas(ranks, log, owner) if ranks.several else Alone(log)


class Alone:
    """One process."""

    size = 1
    rank = 0
    sharded = False
    agrees_late = False
    task_passes: TaskPasses | None = None

    def __init__(self, log: ReachLog) -> None:
        self._log = log

    def look(self, losses: Losses, nonfinite: Sequence[str], graphs: Graphs) -> Seen:
        self._log.note_graphs(losses)
        detached = {task: loss.detach() for task, loss in losses.items()}
        return Seen(losses, detached, tuple(nonfinite), graphs.reach(list(losses.values())))

    def agree(self, seen: Seen, error: Exception | None = None) -> Seen:
        if error is not None:
            raise error
        return seen

    def reach(self, losses: Losses, graphs: Graphs) -> Reach:
        return graphs.reach(list(losses.values()))

    def gather(self, seen: Seen, rows: Iterable[Row], dtype: torch.dtype | None) -> TaskGradients:
        del dtype
        gradients = TaskGradients(seen.nonfinite)
        for row in rows:
            gradients.add(row)
        self._log.note_gradients(gradients)
        return gradients

    def share(self, seen: Seen, task: str) -> float:
        del seen, task
        return 1.0

    def leaves(self, seen: Seen) -> list[Tensor]:
        return seen.reach.leaves

    def backward(
        self,
        seen: Seen,
        leaves: Sequence[Tensor],
        factors: Tensor,
        scale: float,
        *,
        retain_graph: bool = False,
    ) -> None:
        losses = list(seen.here.values())
        slopes = [factor.to(loss) for factor, loss in zip(factors.unbind(), losses, strict=True)]
        if scale != 1:
            slopes = [slope * scale for slope in slopes]
        inputs = None if len(leaves) == len(seen.reach.leaves) else list(leaves)
        torch.autograd.backward(losses, slopes, retain_graph=retain_graph, inputs=inputs)

    def backward_from(
        self,
        features: Sequence[Tensor],
        slopes: Sequence[Tensor],
        seen: Seen,
        accepts: Accepts,
        *,
        retain_graph: bool = False,
    ) -> bool:
        del seen
        below = reach_of(features).leaves
        with fresh_grad(below) as fresh:
            torch.autograd.backward(features, slopes, retain_graph=retain_graph)
            fresh.kept = accepts([leaf.grad for leaf in below])
        return fresh.kept

    def step(self, step: Step) -> Step:
        return step

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def numbers_over_parts(self, vectors: Sequence[Tensor]) -> list[list[float]]:
        return lists_of(vectors)

    def means(self, losses: Losses, error: Exception | None = None) -> Losses:
        if error is not None:
            raise error
        return losses

    def everywhere(self, answer: bool) -> bool:  # noqa: FBT001
        return answer

    def knows(self, leaf: Tensor) -> bool:
        del leaf
        return True


class Replicas:
    """Several processes, each with the whole model and its part of the batch."""

    sharded = False
    agrees_late = True
    task_passes: TaskPasses | None = None

    def __init__(self, ranks: Ranks, log: ReachLog, owner: nn.Module) -> None:
        self._ranks = ranks
        self._log = log
        self._owner = owner
        self.size = ranks.size
        self.rank = ranks.rank

    def look(self, losses: Losses, nonfinite: Sequence[str], graphs: Graphs) -> Seen:
        reached = graphs.reached(losses)
        whole = reached  # noted when all ranks have told what they reach
        if BELOW in reached:
            whole = {task: reach_of([loss]).leaves for task, loss in losses.items()}
        self._log.check(whole, losses)
        self._log.look_for_compiled(losses)
        detached = {task: loss.detach() for task, loss in losses.items()}
        return Seen(losses, detached, tuple(nonfinite), self.reach(losses, graphs), reached)

    def agree(self, seen: Seen, error: Exception | None = None) -> Seen:
        agreed = self._tell(seen, error)
        below = agreed.layouts.get(BELOW, [])
        self._log.note(
            {task: [*leaves, *below] for task, leaves in agreed.layouts.items() if task != BELOW}
        )
        return seen._replace(losses=agreed.losses, nonfinite=agreed.nonfinite, agreement=agreed)

    def _tell(self, seen: Seen, error: Exception | None) -> Agreement:
        tally = self._begin()
        return self._ranks.agree(seen.here, seen.nonfinite, seen.reached, error, tally)

    def _begin(self) -> tuple[int, ...]:
        """Let all begin alike if that has not happened, and return what is tallied here."""
        tally = next(m.tally() for m in self._owner.children() if isinstance(m, Weighting))
        self._ranks.begin_alike(self._owner, tally)
        return tally

    def reach(self, losses: Losses, graphs: Graphs) -> Reach:
        return graphs.reach(list(losses.values()))

    def gather(self, seen: Seen, rows: Iterable[Row], dtype: torch.dtype | None) -> TaskGradients:
        """Return the rows averaged, each on its way while the next is computed."""
        exchange = Exchange(self._ranks.group, _agreement(seen), dtype)
        for row in rows:
            exchange.add(row)
            del row  # which goes once its bucket is filled
        gradients = exchange.finish()
        self._log.note_gradients(gradients)
        return gradients

    def share(self, seen: Seen, task: str) -> float:
        return 1 / _agreement(seen).counts[task]

    def leaves(self, seen: Seen) -> list[Tensor]:
        inputs = [leaf for leaf in seen.reach.leaves if not isinstance(leaf, nn.Parameter)]
        return [*self._plain(seen), *inputs]

    def backward(
        self,
        seen: Seen,
        leaves: Sequence[Tensor],
        factors: Tensor,
        scale: float,
        *,
        retain_graph: bool = False,
    ) -> None:
        # Captured, not accumulated: no hook (of DistributedDataParallel) averages once more.
        gradients: list[Tensor | None] = [None] * len(leaves)
        losses = list(seen.here.values())
        if losses:
            slopes = self._slopes(seen, factors, scale)
            gradients = gradient_of(losses, leaves, slopes, retain_graph=retain_graph)
        add_to_grad(leaves, self._ranks.add_up(leaves, gradients, divisor=self.size))

    def _plain(self, seen: Seen) -> list[Tensor]:
        """Return the parameters, none of them sharded, that any rank's losses reach."""
        return self._ranks.ordered(itertools.chain(*_agreement(seen).layouts.values()))

    def _slopes(self, seen: Seen, factors: Tensor, scale: float) -> list[Tensor]:
        """Return by how much the losses of this rank count in the mean over all of them."""
        factor_of = dict(zip(seen.losses, factors.unbind(), strict=True))
        counts = _agreement(seen).counts
        return [
            factor_of[task].to(loss) * (self.size / counts[task] * scale)
            for task, loss in seen.here.items()
        ]

    def backward_from(
        self,
        features: Sequence[Tensor],
        slopes: Sequence[Tensor],
        seen: Seen,
        accepts: Accepts,
        *,
        retain_graph: bool = False,
    ) -> bool:
        below = _agreement(seen).layouts[BELOW]
        gradients: list[Tensor | None] = [None] * len(below)
        if features:
            gradients = gradient_of(features, below, slopes, retain_graph=retain_graph)
        sums = self._ranks.add_up(below, gradients)  # the same in all processes
        if not accepts(sums):
            return False
        write(below, sums)
        return True

    def step(self, step: Step) -> Step:
        return RankStep(**vars(step), ranks=self._ranks)

    def sum(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum(tensor)

    def numbers_over_parts(self, vectors: Sequence[Tensor]) -> list[list[float]]:
        return lists_of(vectors)

    def means(self, losses: Losses, error: Exception | None = None) -> Losses:
        return self._ranks.means(losses, error, self._begin())

    def everywhere(self, answer: bool) -> bool:  # noqa: FBT001
        return float(self._ranks.sum(torch.tensor(float(not answer), device="cpu"))) == 0

    def knows(self, leaf: Tensor) -> bool:
        return isinstance(leaf, nn.Parameter)


class Sharded(Replicas):
    """Processes that hold a shard each of the shared parameters: their passes are collective."""

    sharded = True
    agrees_late = False
    task_passes: TaskPasses | None = staticmethod(sharded_task_gradients)

    def look(self, losses: Losses, nonfinite: Sequence[str], graphs: Graphs) -> Seen:
        # Graphs hold other parameters than the shards: what is missing, the gradients tell.
        reached = self._ranks.plain(graphs.reached(losses))
        detached = {task: loss.detach() for task, loss in losses.items()}
        return Seen(losses, detached, tuple(nonfinite), self.reach(losses, graphs), reached)

    def agree(self, seen: Seen, error: Exception | None = None) -> Seen:
        agreed = self._tell(seen, error)
        for task, count in agreed.present.items():
            if count != self.size:
                raise ValueError(
                    f"all ranks must have a loss of task {task!r} where parameters are sharded, "
                    f"but {count} of {self.size} have. Their backward passes wait for each other: "
                    "leave the task out in all of them."
                )
        return seen._replace(losses=agreed.losses, nonfinite=agreed.nonfinite, agreement=agreed)

    def reach(self, losses: Losses, graphs: Graphs) -> Reach:
        found = graphs.reach(list(losses.values()))
        inputs = [leaf for leaf in found.leaves if not isinstance(leaf, nn.Parameter)]
        return Reach([*self._ranks.parameters(), *inputs], found.shares_graph)

    def gather(self, seen: Seen, rows: Iterable[Row], dtype: torch.dtype | None) -> TaskGradients:
        """Return the rows averaged, when all are there: passes have collectives of their own."""
        return super().gather(seen, iter(list(rows)), dtype)

    def leaves(self, seen: Seen) -> list[Tensor]:
        return seen.reach.leaves

    def backward(
        self,
        seen: Seen,
        leaves: Sequence[Tensor],
        factors: Tensor,
        scale: float,
        *,
        retain_graph: bool = False,
    ) -> None:
        del leaves
        losses, slopes = list(seen.here.values()), self._slopes(seen, factors, scale)
        torch.autograd.backward(losses, slopes, retain_graph=retain_graph)
        # Shards are averaged where they arrive, other parameters are not.
        plain = self._plain(seen)
        means = self._ranks.add_up(plain, [leaf.grad for leaf in plain], divisor=self.size)
        for leaf, mean in zip(plain, means, strict=True):
            leaf.grad = mean

    def step(self, step: Step) -> Step:
        return ShardedStep(**vars(step), ranks=self._ranks)

    def numbers_over_parts(self, vectors: Sequence[Tensor]) -> list[list[float]]:
        together = torch.cat([vector.to(vectors[0]) for vector in vectors])
        return lists_of(torch.split(self._ranks.sum(together), list(map(len, vectors))))

    def knows(self, leaf: Tensor) -> bool:
        return self.size == 1 or super().knows(leaf)


def _agreement(seen: Seen) -> Agreement:
    """Return what the processes have told each other, which they must have."""
    if seen.agreement is None:
        raise RuntimeError("the processes must have agreed first.")
    return seen.agreement
