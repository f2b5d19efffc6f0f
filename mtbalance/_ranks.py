"""Several processes that train together: who takes part in a step, and averages over them.

Each process (*rank*) has losses of its own part of the batch. A task is active in a step if some
rank has a loss of it; its loss and its gradient are the means over *those* ranks, as they would be
if one process held the whole batch. In each step the ranks first tell each other, in one small
collective, which tasks they have, what the losses are and what they reach; only then do gradients
go round. So ranks whose tasks or whose used parameters differ neither wait for each other for ever
nor add up gradients of different parameters.
"""

import copy
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mtbalance._agreement import BELOW, TALLIED, Agreement, Told, message_of
from mtbalance._buckets import Bucket, buckets
from mtbalance._names import Names, outermost_modules
from mtbalance._random import RandomSource
from mtbalance._shards import is_sharded
from mtbalance._shared import SharedParts

T = TypeVar("T")


class Ranks:
    """The processes that a Balancer averages over.

    Args:
        group: Their process group; None for all processes.
        tasks: The tasks.
        shared: The shared parameters, in groups, if they are given.
    """

    def __init__(
        self,
        group: "torch.distributed.ProcessGroup | None",
        tasks: tuple[str, ...],
        shared: SharedParts,
    ) -> None:
        self.group = group
        self._tasks = tasks
        self._slots = (*tasks, BELOW)
        self._shared = shared
        self._names: Names | None = None
        self._layouts: dict[str, list[str]] = {}
        self._around: list[weakref.ref[Tensor]] = []
        self._draws_agree = False
        self._tally = (0,) * len(TALLIED)
        """What had been counted when the ranks began to train together."""
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
        copied = Ranks(self.group, self._tasks, copy.deepcopy(self._shared, memo))
        copied._draws_agree = self._draws_agree
        copied._tally = self._tally
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None, "_names": None, "_around": []}

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return False
        return distributed.get_world_size(self.group) > 1

    @property
    def size(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size(self.group) if self.several else 1

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return torch.distributed.get_rank(self.group) if self.several else 0

    @property
    def sharded(self) -> bool:
        """Whether shared parameters are sharded, so that their gradients arrive in ``.grad``."""
        return self._shared.sharded

    def rename(self) -> None:
        """Name parameters anew: shared modules hold others than before."""
        self._names, self._layouts = None, {}

    def parameters(self) -> list[Tensor]:
        """Return every parameter that has a name; with sharded ones, all that any module holds."""
        named = self._known_names()
        around = [parameter for ref in self._around if (parameter := ref()) is not None]
        return [*named.by_name.values(), *(p for p in around if id(p) not in named.by_id)]

    def plain(self, reached: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Return the parameters among what each task reaches that are not sharded.

        Sharded parameters are represented in graphs by others, which no module holds for long.
        """
        known = {id(parameter) for parameter in self.parameters() if not is_sharded(parameter)}
        return {
            task: [leaf for leaf in leaves if id(leaf) in known] for task, leaves in reached.items()
        }

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
        tally: Sequence[int] = (0,) * len(TALLIED),
    ) -> Agreement:
        """Tell all ranks what this one has, and return what all of them have together.

        Args:
            losses: This rank's losses of its active tasks.
            nonfinite: Tasks whose loss is not finite here.
            reached: Per active task (and ``BELOW``), the leaves that its loss (the features)
                reaches. Sharded ones do not count.
            error: What keeps this rank from taking part; all ranks stop then.
            tally: How often each of ``TALLIED`` has happened here, ever.

        Raises:
            RuntimeError: If another rank cannot take part.
            ValueError: On all ranks, if something tallied has happened on some only.
        """
        actual = self._named({**losses, **reached}, reached)
        message = message_of(
            self._slots,
            losses,
            nonfinite,
            actual,
            self._layouts,
            self._device(losses.values()),
            stops=error is not None,
            tally=self._since_the_start(tally),
        )
        told = Told(self._gather(message), self._slots)
        self._stop_together(told.stops, error)
        told.check_tallies()
        if not told.same_layouts:
            self._exchange_layouts()
        layouts: dict[str, list[Tensor]] = {}
        for task in told.known:
            found = self._layout_of_step(task, actual, complete=told.reaches_all(task))
            layouts[task] = [self._known_names().by_name[name] for name in found]
        return told.agreement(losses, layouts)

    def means(
        self, losses: Mapping[str, Tensor], error: Exception | None, tally: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the mean losses over the ranks that have them, as :meth:`agree` does.

        Args:
            losses: This rank's, which need no graph.
            error: What keeps this rank from having any; all ranks stop then.
            tally: As in :meth:`agree`.
        """
        nothing: dict[str, list[str]] = {task: [] for task in losses}
        message = message_of(
            self._slots,
            losses,
            (),
            nothing,
            nothing,
            self._device(losses.values()),
            stops=error is not None,
            tally=self._since_the_start(tally),
        )
        told = Told(self._gather(message), self._slots)
        self._stop_together(told.stops, error)
        told.check_tallies()
        return told.agreement(losses, {}).losses

    def _since_the_start(self, tally: Sequence[int]) -> list[int]:
        return [now - then for now, then in zip(tally, self._tally, strict=True)]

    def _named(
        self, tasks: Iterable[str], reached: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, list[str]]:
        """Return the names of what each task reaches, and note them."""
        names = self._known_names()
        actual = {
            task: names.of(task, [leaf for leaf in reached.get(task, ()) if not is_sharded(leaf)])
            for task in tasks
        }
        for task, found in actual.items():
            # In the order of the graph, as where there is one process, and not of names.
            self._layouts[task] = list(dict.fromkeys([*self._layouts.get(task, ()), *found]))
        return actual

    def _known_names(self) -> Names:
        if self._names is None:
            self._names = Names()
            for group, parameters in self._shared.groups.items():
                self._names.give(group, parameters)
        return self._names

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
        torch.distributed.all_reduce(flags, group=self.group)
        return [name for name, count in zip(known, flags.tolist(), strict=True) if count]

    # --- collectives ------------------------------------------------------------------------------

    def _device(self, tensors: Iterable[Tensor]) -> torch.device:
        """Return where the group's collectives work on tensors."""
        if "gloo" in str(torch.distributed.get_backend(self.group)):
            return torch.device("cpu")
        known = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
        return known[0] if known else torch.device("cuda")

    def _gather(self, message: Tensor) -> Tensor:
        """Return the message of every rank, shape (ranks, n)."""
        messages = [torch.empty_like(message) for _ in range(self.size)]
        torch.distributed.all_gather(messages, message, group=self.group)
        return torch.stack(messages)

    def _gather_objects(self, thing: T) -> list[T]:
        things: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(things, thing, group=self.group)
        return things

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a small tensor over all ranks."""
        if not self.several:
            return tensor
        total = tensor.to(self._device([tensor]), copy=True)
        torch.distributed.all_reduce(total, group=self.group)
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
            bucket.send(self.group)
        for bucket in filled:
            found.update(zip(map(id, bucket.leaves), bucket.receive(divisor), strict=True))
        return [found[id(leaf)] for leaf in leaves]

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

    def begin_alike(self, owner: nn.Module, tally: tuple[int, ...]) -> None:
        """Let all ranks have the same tasks, and draw alike from now on; once, before anything.

        What has been tallied before does not count: a state loaded in the first rank alone may
        reach the others with the model.

        The random sources in a module go on as the first rank's do, and start where they start if
        they are reset, whatever their seeds and generators were: orders, masks and weights must be
        the same everywhere.

        Raises:
            ValueError: On all ranks, if their tasks have other names or another order.
        """
        if self._draws_agree:
            return
        sources = [module for module in owner.modules() if isinstance(module, RandomSource)]
        told = self._gather_objects((self._tasks, [source.places() for source in sources]))
        for rank, (tasks, _) in enumerate(told):
            if tasks != told[0][0]:
                raise ValueError(
                    "`tasks` must have the same names in the same order on all ranks, but got "
                    f"{told[0][0]} on rank 0 and {tasks} on rank {rank}. Write the names down in "
                    "one order, or sort them."
                )
        for source, places in zip(sources, told[0][1], strict=True):
            source.follow(places)
        self._draws_agree, self._tally = True, tally
