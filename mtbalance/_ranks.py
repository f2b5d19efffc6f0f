"""Several processes that train together: who takes part in a step, and averages over them.

Each process (*rank*) has losses of its own part of the batch. A task is active in a step if some
rank has a loss of it; its loss and its gradient are the means over *those* ranks, as they would be
if one process held the whole batch. In each step the ranks first tell each other, in one small
collective, which tasks they have, what the losses are and what they reach; only then do gradients
go round. So ranks whose tasks or whose used parameters differ neither wait for each other for ever
nor add up gradients of different parameters.
"""

import hashlib
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtbalance._buckets import Bucket, buckets
from mtbalance._jacobian import sharded_task_gradients
from mtbalance._names import Names, outermost_modules
from mtbalance._random import RandomSource
from mtbalance._rows import Rows, inner_products
from mtbalance._shards import is_sharded, sum_over_shards
from mtbalance.weighting._base import Step

_ABSENT, _ACTIVE, _NONFINITE = 0, 1, 2
BELOW = ""
"""Stands among the tasks for the features of a step, where it is balanced at these."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
T = TypeVar("T")


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step.

    Attributes:
        counts: In how many ranks each task is active, for tasks that are active in any.
        present: In how many ranks each of these has a loss, finite or not.
        losses: Their mean losses over those ranks.
        nonfinite: Tasks whose loss is not finite in some rank.
        layouts: Per task that some rank has a loss of, finite or not, the parameters that it
            reaches in some rank, in the same order in all; under ``BELOW``, if some rank has any,
            those that the features depend on.
    """

    counts: dict[str, int]
    present: dict[str, int]
    losses: dict[str, Tensor]
    nonfinite: tuple[str, ...]
    layouts: dict[str, list[Tensor]]


class Ranks:
    """The processes that a Balancer averages over.

    Args:
        group: Their process group; None for all processes.
        tasks: The tasks.
        shared: The parameters of each group of shared ones, by name, if they are given.
    """

    def __init__(
        self,
        group: "torch.distributed.ProcessGroup | None",
        tasks: tuple[str, ...],
        shared: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> None:
        self._group = group
        self._tasks = tasks
        self._slots = (*tasks, BELOW)
        self._shared = shared or {}
        self._names: Names | None = None
        self._layouts: dict[str, list[str]] = {}
        self._around: list[weakref.ref[Tensor]] = []
        if self.sharded:
            # Now, before a forward pass: in between, the model holds whole parameters instead.
            names = self._known_names()
            names.add_model()
            self._around = [
                weakref.ref(parameter)
                for root in outermost_modules()
                for parameter in root.parameters()
                if id(parameter) not in names.by_id
            ]

    # Process groups can be neither copied nor pickled; a copy belongs to the same one.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        shared = {
            group: {name: memo.get(id(p), p) for name, p in parameters.items()}
            for group, parameters in self._shared.items()
        }
        return Ranks(self._group, self._tasks, shared)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None, "_names": None, "_around": []}

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return False
        return distributed.get_world_size(self._group) > 1

    @property
    def size(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size(self._group) if self.several else 1

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return torch.distributed.get_rank(self._group) if self.several else 0

    @property
    def sharded(self) -> bool:
        """Whether shared parameters are sharded, so that their gradients arrive in ``.grad``."""
        return any(is_sharded(p) for group in self._shared.values() for p in group.values())

    def parameters(self) -> list[Tensor]:
        """Return every parameter that has a name; with sharded ones, all that any module holds."""
        named = self._known_names()
        around = [parameter for ref in self._around if (parameter := ref()) is not None]
        return [*named.by_name.values(), *(p for p in around if id(p) not in named.by_id)]

    def plain(self, leaves: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters among these leaves that are not sharded.

        Sharded parameters are represented in graphs by others, which no module holds for long.
        """
        known = {id(parameter) for parameter in self.parameters() if not is_sharded(parameter)}
        return [leaf for leaf in leaves if id(leaf) in known]

    def ordered(self, leaves: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters among these leaves, each once, in the same order on all ranks."""
        names = self._known_names()
        return [names.by_name[name] for name in sorted({*names.of("all", list(leaves))})]

    # --- agreement --------------------------------------------------------------------------------

    def agree(
        self,
        losses: Mapping[str, Tensor],
        nonfinite: Collection[str],
        reached: Mapping[str, Sequence[Tensor]],
        error: Exception | None = None,
    ) -> Agreement:
        """Tell all ranks what this one has, and return what all of them have together.

        Args:
            losses: This rank's losses of its active tasks.
            nonfinite: Tasks whose loss is not finite here.
            reached: Per active task (and ``BELOW``), the leaves that its loss (the features)
                reaches. Sharded ones do not count.
            error: What keeps this rank from taking part; all ranks stop then.

        Raises:
            RuntimeError: If another rank cannot take part.
        """
        names = self._known_names()
        actual = {
            task: names.of(task, [leaf for leaf in reached.get(task, ()) if not is_sharded(leaf)])
            for task in {**losses, **reached}
        }
        for task, found in actual.items():
            # In the order of the graph, as where there is one process, and not of names.
            self._layouts[task] = list(dict.fromkeys([*self._layouts.get(task, ()), *found]))
        told = self._gather(self._message(losses, nonfinite, actual, stops=error is not None))
        facts = told.cpu()
        self._stop_together(facts[:, 0], error)
        states, _, dtypes, hashes, complete = facts[:, 1:].reshape(len(facts), 5, -1).unbind(1)
        counts = dict(zip(self._slots, (states == _ACTIVE).sum(0).tolist(), strict=True))
        active = [number for number, task in enumerate(self._tasks) if counts[task]]
        known = (states != _ABSENT).any(0).nonzero().flatten().tolist()
        if bool((hashes[:, known] != hashes[:1, known]).any()):
            self._exchange_layouts()
            complete = torch.zeros_like(complete)
        layouts = {
            self._slots[number]: self._layout_of_step(
                self._slots[number], actual, complete=bool(complete[:, number].all())
            )
            for number in known
        }
        sums = told[:, 1:].reshape(len(told), 5, -1)[:, 1].sum(0)
        # The widest on any rank: what is computed from the means must not differ by rounding.
        widest = [_DTYPES[int(code)] for code in dtypes.max(0).values.tolist()]
        home = next(iter(losses.values()), sums).device
        return Agreement(
            {self._tasks[number]: counts[self._tasks[number]] for number in active},
            {self._tasks[number]: int((states[:, number] != _ABSENT).sum()) for number in active},
            {
                (task := self._tasks[number]): (sums[number] / counts[task]).to(
                    losses[task].device if task in losses else home, widest[number]
                )
                for number in active
            },
            tuple(
                task
                for task, bad in zip(
                    self._slots, (states == _NONFINITE).any(0).tolist(), strict=True
                )
                if bad
            ),
            {task: [names.by_name[name] for name in found] for task, found in layouts.items()},
        )

    def _known_names(self) -> Names:
        if self._names is None:
            self._names = Names()
            for group, parameters in self._shared.items():
                self._names.give(group, parameters)
        return self._names

    def _message(
        self,
        losses: Mapping[str, Tensor],
        nonfinite: Collection[str],
        actual: Mapping[str, list[str]],
        *,
        stops: bool,
    ) -> Tensor:
        """Return what this rank tells the others, shape (1 + 5(K + 1),).

        Whether it stops; then, each for all tasks and ``BELOW``: their states, their losses and the
        dtypes of these, a hash of all that they are known to reach, and whether they reach all of
        that in this step.
        """
        rows: list[list[float]] = [
            [
                _NONFINITE if task in nonfinite else _ACTIVE if task in actual else _ABSENT
                for task in self._slots
            ],
            [0.0] * len(self._slots),
            [_DTYPES.index(losses[task].dtype) if task in losses else 0.0 for task in self._slots],
            [_hash(self._layouts.get(task)) for task in self._slots],
            [
                task not in actual or len({*actual[task]}) == len(self._layouts[task])
                for task in self._slots
            ],
        ]
        device = self._device(losses.values())
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        for number, task in enumerate(self._tasks):
            if task in losses:
                table[1, number] = losses[task].detach()
        return torch.cat([table.new_full((1,), float(stops)), table.reshape(-1)])

    def _exchange_layouts(self) -> None:
        """Let every rank know what any rank's losses have reached."""
        merged: dict[str, dict[str, None]] = {}
        for layouts in self._gather_objects(self._layouts):
            for task, found in layouts.items():
                merged.setdefault(task, {}).update(dict.fromkeys(found))
        self._layouts = {task: list(found) for task, found in merged.items()}
        names = self._known_names()
        wanted = set().union(*merged.values())
        if wanted - names.by_name.keys():
            names.add_model()
        unknown = self._gather_objects(sorted(wanted - names.by_name.keys()))
        for rank, missing in enumerate(unknown):
            if missing:
                raise RuntimeError(
                    f"all ranks must hold the same parameters, but rank {rank} does not know "
                    f"{missing[0]!r}, which a loss of another rank reaches. Build the same "
                    "model in every process, as one module that holds the shared parameters and "
                    "all heads."
                )

    def _layout_of_step(
        self, task: str, actual: Mapping[str, list[str]], *, complete: bool
    ) -> list[str]:
        """Return what a task reaches in this step on any rank."""
        known = self._layouts.get(task, [])
        if complete or not known:
            return known
        here = set(actual.get(task, ()))
        flags = torch.tensor([name in here for name in known], dtype=torch.int64, device="cpu")
        flags = flags.to(self._device([]))
        torch.distributed.all_reduce(flags, group=self._group)
        return [name for name, count in zip(known, flags.tolist(), strict=True) if count]

    # --- collectives ------------------------------------------------------------------------------

    def _device(self, tensors: Iterable[Tensor]) -> torch.device:
        """Return where the group's collectives work on tensors."""
        if "gloo" in str(torch.distributed.get_backend(self._group)):
            return torch.device("cpu")
        known = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
        return known[0] if known else torch.device("cuda")

    def _gather(self, message: Tensor) -> Tensor:
        """Return the message of every rank, shape (ranks, n)."""
        messages = [torch.empty_like(message) for _ in range(self.size)]
        torch.distributed.all_gather(messages, message, group=self._group)
        return torch.stack(messages)

    def _gather_objects(self, thing: T) -> list[T]:
        things: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(things, thing, group=self._group)
        return things

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a small tensor over all ranks."""
        if not self.several:
            return tensor
        total = tensor.to(self._device([tensor]), copy=True)
        torch.distributed.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def add_up(
        self,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        divisor: int = 1,
    ) -> list[Tensor | None]:
        """Return the sums of gradients over all ranks, divided; leaves without names keep theirs.

        All ranks must have the same parameters in the same order among their leaves.
        """
        known = self._known_names().by_id
        found = {id(leaf): g for leaf, g in zip(leaves, gradients, strict=True)}
        filled = [
            Bucket(part, [found[id(leaf)] for leaf in part])
            for part in buckets([leaf for leaf in leaves if id(leaf) in known])
        ]
        for bucket in filled:
            bucket.send(self._group)
        for bucket in filled:
            found.update(zip(map(id, bucket.leaves), bucket.receive(divisor), strict=True))
        return [found[id(leaf)] for leaf in leaves]

    def check_same_tasks(self, agreement: Agreement) -> None:
        """Raise, on all ranks, unless all have the same tasks."""
        for task, count in agreement.present.items():
            if count != self.size:
                raise ValueError(
                    f"all ranks must have a loss of task {task!r} where parameters are sharded, "
                    f"but {count} of {self.size} have. Their backward passes wait for each other: "
                    "leave the task out in all of them."
                )

    def count(self, tasks: Collection[str], error: Exception | None = None) -> dict[str, int]:
        """Return on how many ranks each task is among those given; all stop if one has an error."""
        own = [error is not None, *(task in tasks for task in self._tasks)]
        told = self._gather(torch.tensor(own, dtype=torch.int64, device=self._device([])))
        self._stop_together(told[:, 0], error)
        return dict(zip(self._tasks, told[:, 1:].sum(0).tolist(), strict=True))

    def _stop_together(self, stop: Tensor, error: Exception | None) -> None:
        """Raise this rank's own error, or one that names the first rank which has one."""
        if error is not None:
            raise error
        if bool(stop.any()):
            raise RuntimeError(
                f"rank {stop.tolist().index(1)} stopped with an error in this step, so that rank "
                f"{self.rank} cannot go on. Its own message says why."
            )

    def same_draws(self, sources: Sequence[RandomSource]) -> None:
        """Let the random sources of all ranks go on from the state of the first one's."""
        first, *_ = self._gather_objects([source.get_extra_state() for source in sources])
        for source, state in zip(sources, first, strict=True):
            source.set_extra_state(state)


@dataclass(frozen=True)
class RankStep(Step):
    """A step that several ranks take together, each with its part of the validation batch."""

    ranks: Ranks

    def shares(self, tasks: Collection[str], error: Exception | None = None) -> dict[str, float]:
        """Return by how much each task's loss counts: see :class:`Step`."""
        counts = self.ranks.count(tasks, error)
        return {task: self.ranks.size / count for task, count in counts.items() if count}

    def products(self, loss: Tensor | None, factors: Sequence[float]) -> Tensor:
        """Return the products averaged over ranks: see :class:`Step`."""
        if not self.ranks.sharded:
            return self.ranks.sum(super().products(loss, factors)) / self.ranks.size
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


def _hash(names: Sequence[str] | None) -> float:
    """Return a whole number below 2^53, which float64 holds exactly; 0 where nothing is known."""
    if names is None:
        return 0.0
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=6).digest()
    return float(int.from_bytes(digest, "big") + 1)
