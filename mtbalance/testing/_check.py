"""Hold a gradient strategy to its contract and its claims, or find out what it may claim."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Generator, nn

from mtbalance._checks import nearest
from mtbalance.gradient import GradientStrategy

from ._claims import CLAIMED, Claim
from ._contract import ALWAYS
from ._matrices import FAMILIES, Sample
from ._property import Property, Subject, holds, size_of
from ._violation import Violation
from ._weighting import Trait, WeightingProperty

_Named = TypeVar("_Named", Property, WeightingProperty)

_CHANGES = 8
"""In how many ways rows are changed. Where weights are not unique, as of dependent rows, one change
may leave those alone that a strategy has chosen, and remembers."""


@dataclass(frozen=True)
class Report:
    """What was checked and held."""

    who: str
    held: tuple[str, ...]
    """The properties that were checked."""
    samples: int
    """At how many matrices, or series of losses."""
    unclaimed: frozenset[Claim] | frozenset[Trait] = frozenset()
    """Claims or traits that were not made, and that nothing speaks against."""

    def __str__(self) -> str:
        also = "".join(
            f"\n  may also claim {each.name}: {each.value}"
            for each in (*Claim, *Trait)
            if each in self.unclaimed
        )
        return f"{self.who}: {len(self.held)} properties held, at {self.samples:,} samples{also}"


def check_gradient_strategy(
    make: Callable[[], GradientStrategy] | Subject,
    *,
    claims: Iterable[Claim] = (),
    seeds: Iterable[int] = range(3),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    without: Iterable[str] = (),
) -> Report:
    """Check what holds for every gradient strategy, and what this one claims.

    Args:
        make: Returns a new strategy, such as the class itself; one that draws starts at the same
            seed each time. A :class:`Subject` says more: how closely to look, and at how many rows.
        claims: What is claimed of it. A claim that does not hold is an error; one that is not made
            but would hold is in the report.
        seeds: One matrix of each family is made for each of these.
        dtypes: Dtypes of the rows. Some properties are about one of them alone.
        without: Names of properties that are not asked, such as "low_precision_only_rounds".

    Raises:
        Violation: If a property does not hold. The message names it, the call that makes the matrix
            again, the proof of its structure and both numbers.
        TypeError: If ``make`` makes something else.

    Example:
        >>> from mtbalance.gradient import PCGrad
        >>> report = check_gradient_strategy(PCGrad, claims=[Claim.ODD], seeds=range(1))
        >>> Claim.SUM_WITHOUT_CONFLICT in report.unclaimed
        True
    """
    subject = make if isinstance(make, Subject) else Subject(make)
    check_maker(subject.make, GradientStrategy, "check_weighting")
    claimed, given = frozenset(claims), tuple(seeds)
    every = [*ALWAYS, *(each for claim in Claim if claim in claimed for each in CLAIMED[claim])]
    properties = left(every, without)
    count = 0
    with trials():
        for each in properties:
            for sample in each.samples(subject, given, dtypes):
                count += each(subject, sample)
    unclaimed = _found(subject, frozenset(Claim) - claimed, given)
    return Report(subject.name, tuple(each.name for each in properties), count, unclaimed)


def properties_of(
    make: Callable[[], GradientStrategy],
    *,
    seeds: Iterable[int] = range(5),
    max_tasks: int | None = None,
    tolerance: float = 1e-6,
    steps: int = 0,
) -> frozenset[Claim]:
    """Return the claims that held in all trials, in float64.

    A matrix at which a claim fails speaks against it only if the direction is settled there: one
    that changes as much by some change of the rows of 1e-12 says nothing.

    Args:
        make: Returns a new strategy.
        seeds: One matrix of each family is tried for each of these.
        max_tasks: The most rows that the strategy takes.
        tolerance: By how much directions may differ, relative to the sum of the rows' norms.
        steps: How many steps a strategy that remembers has taken before.

    Example:
        >>> from mtbalance.gradient import UPGrad
        >>> Claim.NO_CONFLICT_LEFT in properties_of(UPGrad, seeds=range(1))
        True
    """
    subject = Subject(make, max_tasks=max_tasks, tolerance=tolerance, slack=tolerance, steps=steps)
    return _found(subject, frozenset(Claim), tuple(seeds))


def check_differ(
    make: Callable[[], GradientStrategy],
    other: Callable[[], GradientStrategy],
    *,
    seeds: Iterable[int] = range(3),
    by: float = 1e-3,
    max_tasks: int = 4,
) -> Sample:
    """Check that two strategies, or two settings of one, are not the same in disguise.

    Args:
        make: Returns one.
        other: Returns the other.
        seeds: One matrix of each family is tried for each of these.
        by: How far the directions must be apart, relative to the sum of the rows' norms.
        max_tasks: The most rows that both strategies take.

    Returns:
        The first matrix at which the directions differ by that much.

    Raises:
        Violation: If there is none.

    Example:
        >>> from mtbalance.gradient import PCGrad, Sum
        >>> print(check_differ(Sum, PCGrad))
        matrix("generic", 2, 4, seed=0, dtype=torch.float64)
    """
    one, two = Subject(make, max_tasks=max_tasks), Subject(other, max_tasks=max_tasks)
    widest, where = -1.0, Sample("generic", 1, 1)
    with trials():
        for seed in seeds:
            for family in FAMILIES:
                sample = Sample(family.name, min(max_tasks, 2 + seed % 3), 4 + seed % 5, seed)
                rows = sample.rows()
                off = float((one(rows) - two(rows)).abs().max()) / max(size_of(rows), 1e-300)
                if off >= by:
                    return sample
                if off > widest:
                    widest, where = off, sample
    found = f"the widest difference is {widest!r}, but expected {by!r} of the sum of the norms"
    says = f"it must differ from {two.name} at some matrix"
    call = f"mtbalance.testing.{where}"
    raise Violation(one.name, "differs", says, call, where.proof, found)


def check_maker(make: Callable[[], object], kind: type[nn.Module], other: str) -> None:
    """Raise TypeError unless ``make`` makes what the check is for.

    Args:
        make: Was given as what makes a strategy.
        kind: What it is to make.
        other: The check of the other kind.
    """
    if isinstance(make, nn.Module):
        name = type(make).__name__
        raise TypeError(
            f"`make` must return a new strategy in each call, but got one {name}. Give the class, "
            f"or a function: lambda: {name}(...)."
        )
    made = make()
    if not isinstance(made, kind):
        raise TypeError(
            f"`make` must return a {kind.__name__}, but returned {type(made).__name__}. What is "
            f"of the other kind is for {other}."
        )


def left(properties: Sequence[_Named], without: Iterable[str]) -> list[_Named]:
    """Return the properties but for those of these names."""
    known, left_out = {each.name for each in properties}, set(without)
    for name in sorted(left_out - known):
        raise ValueError(f"`without` must name properties, but got {name!r}.{nearest(name, known)}")
    return [each for each in properties if each.name not in left_out]


@contextmanager
def trials() -> Iterator[None]:
    """Let strategies say that there is no answer, as of some matrices made here there is none.

    Matrices are small: threads that wait for each other take ten times as long as one alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* fell back", RuntimeWarning)
            yield
    finally:
        torch.set_num_threads(threads)


def _found(subject: Subject, claims: Collection[Claim], seeds: Sequence[int]) -> frozenset[Claim]:
    """Return those claims that hold wherever the direction is settled."""
    loose = replace(subject, exact=False)
    with trials():
        return frozenset(claim for claim in claims if _survives(loose, claim, seeds))


def _survives(subject: Subject, claim: Claim, seeds: Sequence[int]) -> bool:
    for each in CLAIMED[claim]:
        for sample in each.samples(subject, seeds, [torch.float64]):
            if not holds(subject, each, sample) and _settled(subject, sample):
                return False
    return True


def _settled(subject: Subject, sample: Sample) -> bool:
    """Whether a direction changes little where the rows do, in any of some ways."""
    rows = sample.rows()
    draws = Generator("cpu").manual_seed(1)
    most = 0.1 * subject.tolerance_at(rows) * size_of(rows)
    try:
        direction = subject(rows)
        for _ in range(_CHANGES):
            noise = torch.randn(rows.shape, generator=draws, device="cpu").to(rows)
            if (subject(rows * (1 + 1e-12 * noise)) - direction).abs().max() > most:
                return False
    except Exception:  # noqa: BLE001
        return True  # what raises claims nothing
    return True
