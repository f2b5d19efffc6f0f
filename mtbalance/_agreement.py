"""What processes tell each other about a step, as numbers in one small tensor."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ABSENT, _ACTIVE, _NONFINITE = 0, 1, 2
BELOW = ""
"""Stands among the tasks for the features of a step, where it is balanced at these."""
TALLIED = ("`load_state_dict` or `reset`", "`end_epoch`", "`after_step`")
"""What changes the state of a weighting, and is not a part of any step."""
_HEAD = 1 + len(TALLIED)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def message_of(
    slots: Sequence[str],
    losses: Mapping[str, Tensor],
    nonfinite: Collection[str],
    actual: Mapping[str, Sequence[str]],
    layouts: Mapping[str, Sequence[str]],
    device: torch.device,
    *,
    stops: bool,
    tally: Sequence[int],
) -> Tensor:
    """Return what a rank tells the others, shape (4 + 5 (K + 1),).

    Whether it stops, and its tally; then, each for all slots: their states, their losses and the
    dtypes of these, a hash of all that they are known to reach, and whether they reach all of that
    in this step.

    Args:
        slots: All K tasks, and ``BELOW``.
        losses: The rank's losses.
        nonfinite: Tasks whose loss is not finite.
        actual: Names of the parameters that each active task reaches in this step.
        layouts: Names of those that each task is known to reach.
        device: Where the message is wanted.
        stops: Whether the rank stops with an error.
        tally: How often it has done each of ``TALLIED``.
    """
    rows: list[list[float]] = [
        [
            _NONFINITE if task in nonfinite else _ACTIVE if task in actual else _ABSENT
            for task in slots
        ],
        [0.0] * len(slots),
        [_DTYPES.index(losses[task].dtype) if task in losses else 0.0 for task in slots],
        [_hash(layouts.get(task)) for task in slots],
        [task not in actual or len({*actual[task]}) == len(layouts[task]) for task in slots],
    ]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    for number, task in enumerate(slots):
        if task in losses:
            table[1, number] = losses[task].detach()
    return torch.cat([table.new_tensor([float(stops), *tally]), table.reshape(-1)])


class Told:
    """What all ranks have told.

    Args:
        messages: Their messages, shape (ranks, 4 + 5 (K + 1)).
        slots: All K tasks, and ``BELOW``.
    """

    def __init__(self, messages: Tensor, slots: Sequence[str]) -> None:
        self._slots = slots
        facts = messages.cpu()
        self.stops = facts[:, 0]
        self._tallies = facts[:, 1:_HEAD].long().tolist()
        table = facts[:, _HEAD:].reshape(len(facts), 5, -1)
        states, _, dtypes, hashes, complete = table.unbind(1)
        self._sums = messages[:, _HEAD:].reshape(len(messages), 5, -1)[:, 1].sum(0)
        self._dtypes = dtypes.max(0).values.tolist()
        self._counts = dict(zip(slots, (states == _ACTIVE).sum(0).tolist(), strict=True))
        self._present = dict(zip(slots, (states != _ABSENT).sum(0).tolist(), strict=True))
        self._bad = (states == _NONFINITE).any(0).tolist()
        self._complete = dict(zip(slots, complete.all(0).tolist(), strict=True))
        self.known = [task for task in slots if self._present[task]]
        """Tasks (and ``BELOW``) that some rank has, finite or not."""
        columns = [number for number, task in enumerate(slots) if self._present[task]]
        self.same_layouts = not bool((hashes[:, columns] != hashes[:1, columns]).any())
        """Whether these are known to reach the same on all ranks."""

    def check_tallies(self) -> None:
        """Raise ValueError, in all ranks, if one has done something and another has not."""
        for rank, tally in enumerate(self._tallies):
            for name, here, first in zip(TALLIED, tally, self._tallies[0], strict=True):
                if here != first:
                    raise ValueError(
                        f"all ranks must call {name} equally often, but since the first step "
                        f"rank 0 has called it {first} times and rank {rank} {here} times. Their "
                        "weights would differ: call it in every process."
                    )

    def reaches_all(self, task: str) -> bool:
        """Return whether a task reaches, on all ranks, everything that it is known to reach."""
        return self.same_layouts and bool(self._complete[task])

    def agreement(
        self, losses: Mapping[str, Tensor], layouts: Mapping[str, list[Tensor]]
    ) -> Agreement:
        """Return what has been agreed on.

        Args:
            losses: The losses of this rank, next to which the means are put.
            layouts: What tasks reach in this step.
        """
        home = next(iter(losses.values()), self._sums).device
        active = [
            (number, task)
            for number, task in enumerate(self._slots)
            if task != BELOW and self._counts[task]
        ]
        means = {}
        for number, task in active:
            # The widest on any rank: what is computed from the means must not differ by rounding.
            dtype = _DTYPES[int(self._dtypes[number])]
            device = losses[task].device if task in losses else home
            means[task] = (self._sums[number] / self._counts[task]).to(device, dtype)
        return Agreement(
            {task: self._counts[task] for _, task in active},
            {task: self._present[task] for _, task in active},
            means,
            tuple(task for task, bad in zip(self._slots, self._bad, strict=True) if bad),
            dict(layouts),
        )


def _hash(names: Sequence[str] | None) -> float:
    """Return a whole number below 2^53, which float64 holds exactly; 0 where nothing is known."""
    if names is None:
        return 0.0
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=6).digest()
    return float(int.from_bytes(digest, "big") + 1)
