"""What one balanced step did."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._gramians import shifted

OF_GROUPS = ("gradient_norm", "share", "cosine", "conflicts")
"""What the names of a group's figures have after the group's name."""
OF_TASKS = ("loss", "weight", "gradient_norm", "share", "cosine")
"""What the names of all other figures begin with that have a task's name after it."""


class Scaled(NamedTuple):
    """Products of gradients whose squares float64 does not hold, of which each is divided."""

    gramian: Tensor
    """Inner products of the gradients, each over its own power of two, shape (m, m)."""
    exponents: Sequence[int]
    """These powers."""
    progress: Tensor
    """Inner products with the direction, all over the same number, shape (m,)."""


class _OfGradients:
    """What the gradients of m tasks are by their inner products."""

    tasks: tuple[str, ...]
    weights: dict[str, Tensor]
    gramian: Tensor | None
    progress: Tensor | None
    combination: Tensor | None
    scaled: Scaled | None

    @property
    def gradient_norms(self) -> dict[str, Tensor]:
        """Norm of each raw gradient of these parameters; empty without such gradients."""
        if self.gramian is None:
            return {}
        if self.scaled is None:
            return dict(zip(self.tasks, _norms(self.gramian), strict=True))
        norms = shifted(_norms(self.scaled.gramian), self.scaled.exponents)
        return dict(zip(self.tasks, norms, strict=True))

    @property
    def cosines(self) -> dict[tuple[str, str], Tensor]:
        """Cosine between the raw gradients of each pair of tasks, 0 where one is zero."""
        cosines = self._cosines
        # Views of one tensor, made at once: 500 tasks have 124,750 pairs.
        return {} if cosines is None else dict(zip(self._pairs, cosines.unbind(), strict=True))

    @property
    def _pairs(self) -> Iterator[tuple[str, str]]:
        return itertools.combinations(self.tasks, 2)

    @property
    def _cosines(self) -> Tensor | None:
        """The cosines of these pairs, in their order."""
        gramian = self._angles
        if gramian is None:
            return None
        norms = _norms(gramian)
        lengths = norms[:, None] * norms
        cosines = torch.where(lengths > 0, gramian / lengths, 0.0)
        rows, columns = torch.triu_indices(len(norms), len(norms), 1, device=cosines.device)
        return cosines[rows, columns]

    @property
    def conflicts(self) -> int | None:
        """Number of pairs of tasks whose gradients point apart; None without per-task gradients."""
        gramian = self._angles
        return None if gramian is None else int((torch.triu(gramian, 1) < 0).sum())

    @property
    def _angles(self) -> Tensor | None:
        """A Gramian in which each row may have another length."""
        return self.gramian if self.scaled is None else self.scaled.gramian

    @property
    def shares(self) -> dict[str, Tensor]:
        """What each task's part contributes to the direction's squared length; they sum to 1.

        A part is the task's gradient times its coefficient; where the direction is not one
        combination for all coordinates, its weighted gradient.
        """
        progress = self.progress if self.scaled is None else self.scaled.progress
        if progress is None:
            return {}
        parts = self.combination
        if parts is None:
            parts = torch.stack(list(self.weights.values()))
        parts = parts.to(progress) * progress
        total = parts.sum()
        return dict(zip(self.tasks, torch.where(total != 0, parts / total, 0.0), strict=True))

    def _numbers(self, tasks: Sequence[str]) -> dict[str, float]:
        """Return these figures of some tasks under flat names; NaN for what is not known."""
        figures = {
            f"{name}/{task}": float(values.get(task, math.nan))
            for name, values in (("gradient_norm", self.gradient_norms), ("share", self.shares))
            for task in tasks
        }
        cosines = self._cosines
        known = {} if cosines is None else dict(zip(self._pairs, cosines.tolist(), strict=True))
        for a, b in itertools.combinations(tasks, 2):
            figures[f"cosine/{a}/{b}"] = known.get((a, b), math.nan)
        conflicts = self.conflicts
        figures["conflicts"] = math.nan if conflicts is None else float(conflicts)
        return figures


@dataclass(frozen=True)
class GroupFigures(_OfGradients):
    """What a step did to one group of shared parameters; empty where that is not known.

    Attributes:
        tasks: The tasks that were active in the step, m of them.
        weights: Their weights, by name; the same in all groups.
        gramian: Inner products of the raw gradients of the group's parameters, shape (m, m).
        progress: Inner products of these with the group's direction, shape (m,).
        combination: Coefficients of the raw gradients in the direction, shape (m,), or None.
        scaled: Where float64 does not hold squares of the gradients, what it does hold.
    """

    tasks: tuple[str, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)
    gramian: Tensor | None = None
    progress: Tensor | None = None
    combination: Tensor | None = None
    scaled: Scaled | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Record(_OfGradients):
    """What one balanced step did. Tensors are detached; only reading them waits for a device.

    Attributes:
        tasks: The tasks that were active in the step, in the order of the Balancer; m of them.
        losses: Their raw losses, by name.
        weights: Their weights (derivatives of the objective by the losses), by name.
        gramian: Inner products of the raw gradients of the shared parameters, shape (m, m),
            float64, off by some 1e-8 of their lengths (see "How exact a Gramian is"
            in the documentation); None where one ordinary backward pass did, so that there are no
            per-task gradients. Infinity or 0 for float64 gradients with norms above 1e154 or below
            1e-162, of which everything else is right.
        progress: Inner products of the raw gradients with the direction, shape (m,), float64 (and
            as far as that holds them), or None.
        combination: Coefficients of the raw gradients in the direction, shape (m,), or None where
            the direction is not one combination for all coordinates.
        absent: Tasks of the Balancer that had no loss in the step.
        nonfinite: Tasks whose loss or gradient was not finite, as far as it is known whose it was.
        dropped: Tasks left out because of that (``nonfinite="drop"``).
        skipped: Whether nothing was written because of a non-finite loss or gradient.
        overflow: Whether non-finite gradients were passed on for the gradient scaler to see; in
            one ordinary backward pass nobody knows of which task.
        fallbacks: How often strategies answered with their documented substitute in this step.
        reused: Whether weights of an earlier step served (``every`` above 1).
        groups: The same figures of each group of shared parameters that was given a name, by that
            name: ``gramian``, ``progress``, ``combination`` and what follows from them. Empty where
            nothing is known of a group: in a step that makes no per-task gradients of it, and where
            tasks are balanced at ``features``.
        scaled: Where float64 does not hold squares of the gradients, what it does hold.
        all_tasks: All tasks of the Balancer, in its order.
    """

    tasks: tuple[str, ...]
    losses: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    gramian: Tensor | None = None
    progress: Tensor | None = None
    combination: Tensor | None = None
    absent: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    skipped: bool = False
    overflow: bool = False
    fallbacks: int = 0
    reused: bool = False
    groups: dict[str, GroupFigures] = field(default_factory=dict)
    scaled: Scaled | None = field(default=None, repr=False)
    all_tasks: tuple[str, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, float]:
        """Return everything as plain floats under flat names ("loss/msi"), for any logger.

        Figures of a group have its name in front ("trunk/cosine/msi/lymphocytes"). All records of a
        Balancer have the same names in the same order. What a step does not know is NaN: figures of
        absent tasks, and those of gradients where one ordinary backward pass did.
        """
        names = self.all_tasks or self.tasks
        figures = {
            f"{name}/{task}": float(values.get(task, math.nan))
            for name, values in (("loss", self.losses), ("weight", self.weights))
            for task in names
        }
        figures.update(
            **self._numbers(names),
            active=float(len(self.tasks)),
            absent=float(len(self.absent)),
            nonfinite=float(len(self.nonfinite)),
            dropped=float(len(self.dropped)),
            skipped=float(self.skipped),
            overflow=float(self.overflow),
            fallbacks=float(self.fallbacks),
            reused=float(self.reused),
        )
        for group, found in self.groups.items():
            numbers = found._numbers(names)
            figures.update({f"{group}/{name}": number for name, number in numbers.items()})
        return figures


def _norms(gramian: Tensor) -> Tensor:
    return gramian.diagonal().clamp_min(0).sqrt()


@dataclass(frozen=True)
class EpochSummary:
    """What the steps since the last ``end_epoch`` did.

    Attributes:
        steps: Number of steps.
        active: Number of steps in which each task was active, by name.
        dropped: Number of steps in which each task was dropped as non-finite, by name.
        skipped: Number of steps in which nothing was written.
    """

    steps: int
    active: dict[str, int]
    dropped: dict[str, int]
    skipped: int

    @property
    def never_active(self) -> tuple[str, ...]:
        """Tasks that were active in no step."""
        return tuple(task for task, count in self.active.items() if count == 0)


class EpochCounts:
    """Counts the steps of an epoch."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.steps = 0
        self.skipped = 0
        self.active = dict.fromkeys(tasks, 0)
        self.dropped = dict.fromkeys(tasks, 0)

    def add(self, record: Record) -> None:
        """Count one step."""
        self.steps += 1
        self.skipped += record.skipped
        for task in () if record.skipped else record.tasks:
            self.active[task] += 1
        for task in record.dropped:
            self.dropped[task] += 1

    def summary(self) -> EpochSummary:
        """Return the counts."""
        return EpochSummary(self.steps, dict(self.active), dict(self.dropped), self.skipped)

    def as_tensor(self) -> Tensor:
        """Return the counts as one tensor, shape (2 + 2K,)."""
        counts = [self.steps, self.skipped, *self.active.values(), *self.dropped.values()]
        return torch.tensor(counts, device="cpu")

    @classmethod
    def from_tensor(cls, tasks: Sequence[str], state: Tensor) -> "EpochCounts":
        """Undo :meth:`as_tensor`."""
        counts = cls(tasks)
        counts.steps, counts.skipped, *rest = state.tolist()
        counts.active = dict(zip(tasks, rest[: len(tasks)], strict=True))
        counts.dropped = dict(zip(tasks, rest[len(tasks) :], strict=True))
        return counts
