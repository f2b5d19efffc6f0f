"""The matrices of ``mtbalance.testing``, drawn by Hypothesis or by chance, which is quicker."""

import random
from collections.abc import Iterator, Sequence
from itertools import count, cycle

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtbalance.testing import (
    BY_NAME,
    DTYPES,
    FAMILIES,
    SCALES,
    LossSample,
    Property,
    Sample,
    Subject,
    WeightingProperty,
    WeightingSubject,
    matrix,
    orthogonal,
)

__all__ = ["BY_NAME", "DTYPES", "FAMILIES", "SCALES", "matrix", "orthogonal"]

SEEDS = st.integers(0, 2**16)


@st.composite
def samples(
    draw: st.DrawFn,
    names: Sequence[str] = tuple(BY_NAME),
    *,
    m: tuple[int, int] = (1, 8),
    p: tuple[int, int] = (1, 30),
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    scales: Sequence[float] = SCALES,
) -> Sample:
    """Draw what makes a matrix of one of the families, m and p within bounds."""
    family = BY_NAME[draw(st.sampled_from(list(names)))]
    return Sample(
        family.name,
        draw(st.integers(max(m[0], family.least_m), m[1])),
        draw(st.integers(max(p[0], family.least_p), p[1])),
        draw(SEEDS),
        scale=draw(st.sampled_from(list(scales))),
        dtype=draw(st.sampled_from(list(dtypes))),
    )


def gradients(
    names: Sequence[str] = tuple(BY_NAME),
    *,
    m: tuple[int, int] = (1, 8),
    p: tuple[int, int] = (1, 30),
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    scales: Sequence[float] = SCALES,
) -> st.SearchStrategy[Tensor]:
    """Draw a matrix of one of the families: m and p within bounds, any of the scales and dtypes."""
    return samples(names, m=m, p=p, dtypes=dtypes, scales=scales).map(Sample.rows)


def samples_for(prop: Property, subject: Subject) -> st.SearchStrategy[Sample]:
    """Draw a sample of the kind that a property is about, of as many tasks as a strategy takes."""
    drawn = []
    for family in prop.families:
        m, p = prop.shapes(subject, family)
        if m[0] <= m[1]:
            drawn.append(samples([family], m=m, p=p, dtypes=prop.dtypes, scales=prop.scales))
    return st.one_of(drawn)


def losses_for(prop: WeightingProperty) -> st.SearchStrategy[LossSample]:
    """Draw a series of losses of the kind that a property is about."""
    bounds = st.just(prop.bounds[0]), st.just(prop.bounds[1])
    return st.builds(LossSample, SEEDS, *bounds, st.sampled_from(list(prop.dtypes)))


def chances_for(prop: Property, subject: Subject) -> Iterator[Sample]:
    """Draw samples as ``samples_for`` does, without end, of every family in turn.

    They are the same in every run. Hypothesis takes as long to draw a small matrix as a strategy
    takes to look at it.
    """
    draw = random.Random(f"{subject.who} {prop.name}")  # a function of the words
    shapes = {family: prop.shapes(subject, family) for family in prop.families}
    families = [family for family, (m, _) in shapes.items() if m[0] <= m[1]]
    draw.shuffle(families)  # few examples are of some families: of others for others
    for family in cycle(families):
        m, p = (_often_an_end(draw, *bounds) for bounds in shapes[family])
        seed, scale = draw.randint(0, 2**16), draw.choice(prop.scales)
        yield Sample(family, m, p, seed, scale=scale, dtype=draw.choice(prop.dtypes))


def _often_an_end(draw: random.Random, low: int, high: int) -> int:
    return draw.choice((low, high)) if draw.random() < 0.25 else draw.randint(low, high)


def chances_of_losses_for(
    prop: WeightingProperty, subject: WeightingSubject
) -> Iterator[LossSample]:
    """Draw series of losses as ``losses_for`` does, without end: the same each time."""
    draw = random.Random(f"{subject.who} {prop.name}")
    for _ in count():
        yield LossSample(draw.randint(0, 2**16), *prop.bounds, draw.choice(prop.dtypes))


def random_gradients(m: int, p: int, seed: int = 0) -> Tensor:
    """Return a generic float64 matrix of shape (m, p)."""
    return matrix("generic", m, p, seed)
