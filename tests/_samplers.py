"""The matrices of ``mtbalance.testing``, drawn by Hypothesis."""

from collections.abc import Sequence

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


def random_gradients(m: int, p: int, seed: int = 0) -> Tensor:
    """Return a generic float64 matrix of shape (m, p)."""
    return matrix("generic", m, p, seed)
