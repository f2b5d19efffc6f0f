"""What a property of gradient strategies is, and what it is asked of."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtbalance.gradient import GradientStrategy

from ._matrices import BY_NAME, DTYPES, SCALES, Sample
from ._violation import Violation, require_close, require_equal, told_of


def size_of(rows: Tensor) -> float:
    """Return the sum of the norms of the rows, which bounds every direction by a small factor."""
    return float(rows.double().norm(dim=1).sum())


def turned(rows: Tensor, towards: float) -> Tensor:
    """Return the rows turned towards their mean direction or, by a negative number, away from it.

    Permuting, rotating, scaling or repeating rows, and adding rows of zeros, commutes with this.
    """
    wide = rows.double()
    # A power of two changes no digit: squares of rows of any scale are in range.
    scale = torch.frexp(wide.abs().amax() if wide.numel() else wide.new_zeros(())).exponent
    wide = torch.ldexp(wide, -scale)
    norms = wide.norm(dim=1, keepdim=True)
    units = torch.where(norms > 0, wide / norms, 0.0)
    mean = units.sum(0) / (norms > 0).sum().clamp_min(1)
    return torch.ldexp(norms * (units + towards * mean), scale).to(rows.dtype)


def rounding(dtype: torch.dtype) -> float:
    """Return what rounding to a dtype may take from a number, relative, a few times over.

    The tolerances are those of float64; what is narrower is rounded once more.
    """
    return 0.0 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Subject:
    """A gradient strategy that is asked, and how closely."""

    make: Callable[[], GradientStrategy]
    """Returns a new strategy, whose random numbers start at the same place each time."""
    identical: float = 1.0
    """m equal rows g give this times m g."""
    max_tasks: int | None = None
    """More tasks than these are not asked for."""
    tolerance: float | Callable[[Tensor], float] = 1e-9
    """By how much two directions that should agree may differ, relative to the sum of the rows'
    norms: a number, or a function of the rows. What is narrower than float64 is rounded on top."""
    unclear: Callable[[Tensor], bool] = lambda _: False
    """Whether rounding decides about the direction of these rows, so that they prove nothing."""
    slack: float | Callable[[Tensor], float] = 1e-12
    """How far <g, d> may be below zero, relative to ``|g|`` and the sum of the norms: a number, or
    a function of the rows. What is narrower than float64 is rounded on top."""
    exact: bool = False
    """Whether what needs no rounding must hold bit for bit."""
    who: str = ""
    """What messages call it; by default its ``repr``."""
    steps: int = 0
    """How many steps it has taken before, on such rows but closer together, then apart, ..."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the direction of a new strategy, or one that has taken ``steps`` before."""
        strategy = self.make()
        for step in range(self.steps):
            strategy(turned(rows, -0.8 if step % 2 else 4.0))
        return strategy(rows)

    @property
    def name(self) -> str:
        """What messages call the strategy."""
        return self.who or repr(self.make())

    def tolerance_at(self, rows: Tensor) -> float:
        """Return the tolerance for directions of these rows in float64."""
        return self.tolerance(rows) if callable(self.tolerance) else self.tolerance

    def slack_at(self, rows: Tensor) -> float:
        """Return the slack for directions of these rows in float64."""
        return self.slack(rows) if callable(self.slack) else self.slack

    def close(self, got: Tensor, expected: Tensor, rows: Tensor, times: float = 1.0) -> None:
        """Require that two directions, for such rows times a factor, agree up to rounding."""
        relative = self.tolerance_at(rows) + rounding(rows.dtype)
        require_close(got, expected, relative * size_of(rows) * times, "coordinate")

    def equal(
        self,
        got: Tensor,
        expected: Tensor,
        rows: Tensor,
        times: float = 1.0,
        *,
        least: float = 0.0,
    ) -> None:
        """Require that two directions agree bit for bit if that is asked, else up to rounding.

        What is less than ``least`` may be lost in any case.
        """
        if self.exact:
            require_equal(got, expected, "coordinate", least)
        else:
            self.close(got, expected, rows, times)


@dataclass(frozen=True)
class Property:
    """Something that is true of a strategy at every matrix of some kind.

    It is called with a :class:`Subject` and a :class:`Sample`, and raises :class:`Violation`.
    """

    body: Callable[[Subject, Sample], None]
    says: str
    families: Sequence[str] = tuple(BY_NAME)
    m: tuple[int, int] = (1, 8)
    p: tuple[int, int] = (1, 30)
    dtypes: Sequence[torch.dtype] = DTYPES
    scales: Sequence[float] = SCALES
    adds: int = 0
    """How many rows it adds to those of the sample."""
    clear: bool = False
    """Whether matrices prove nothing where rounding decides about the direction."""
    examples: int = 50
    """How many examples a search should take."""

    @property
    def name(self) -> str:
        """What the property is called in messages."""
        return self.body.__name__

    def __call__(self, subject: Subject, sample: Sample) -> bool:
        """Return False if the sample proves nothing, True if the property holds.

        Raises:
            Violation: If it does not, or the strategy raised something.
        """
        if self.clear and subject.unclear(sample.rows()):
            return False
        with told_of(subject, self, sample):
            self.body(subject, sample)
        return True

    def shapes(self, subject: Subject, family: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the bounds of m and of p for samples of a family; the first may be empty."""
        _, least_m, least_p = BY_NAME[family]
        most = self.m[1]
        if subject.max_tasks is not None:
            most = min(most, subject.max_tasks - self.adds)
        return (max(self.m[0], least_m), most), (max(self.p[0], least_p), self.p[1])

    def samples(
        self, subject: Subject, seeds: Sequence[int], dtypes: Sequence[torch.dtype]
    ) -> list[Sample]:
        """Return one sample for each seed, family and dtype; shape and scale follow from these."""
        found = []
        for seed in seeds:
            for family in self.families:
                m, p = self.shapes(subject, family)
                draw = random.Random(f"{self.name} {family} {seed}")  # a function of the words
                for dtype in (dtype for dtype in dtypes if dtype in self.dtypes):
                    scale = draw.choice(self.scales)
                    shape = draw.randint(m[0], max(m)), draw.randint(*p)
                    if m[0] <= m[1]:
                        found.append(Sample(family, *shape, seed, scale, dtype))
        return found


def holds(subject: Subject, prop: Property, sample: Sample) -> bool:
    """Whether a property holds at a sample, or the sample proves nothing."""
    try:
        prop(subject, sample)
    except Violation:
        return False
    return True
