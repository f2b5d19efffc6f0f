"""Gradient matrices whose structure is proven, for property tests.

A *family* makes a matrix of shape (m, p) from a seed. Except where its docstring says otherwise,
all entries are integers of at most 8 bits, so that float32, float64 and bfloat16 hold them exactly
and the proofs, which are about integers, hold for the numbers that a strategy sees. Matrices are
scaled by powers of two, from below 1e-20 to above 1e20, which is exact too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests._device import on_device

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SCALES = tuple(2.0**k for k in (-67, -20, 0, 20, 67))  # 6.8e-21, 9.5e-7, 1, 1.0e6, 1.5e20

Matrix = np.ndarray


def _integers(rng: np.random.Generator, m: int, p: int, bound: int = 4) -> Matrix:
    return rng.integers(-bound, bound + 1, (m, p)).astype(np.float64)


def _nonzero_row(rng: np.random.Generator, p: int, bound: int = 4) -> Matrix:
    row = _integers(rng, 1, p, bound)[0]
    if not row.any():
        row[rng.integers(p)] = 1.0
    return row


def _two_of(rng: np.random.Generator, m: int) -> tuple[int, int]:
    first, second = rng.permutation(m)[:2]
    return int(first), int(second)


def generic(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """Normal entries, rounded to the dtype: full rank with probability one, nothing else."""
    return rng.standard_normal((m, p))


def conflicting(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """Some pair of rows has a negative inner product (m >= 2).

    For a row g that is not zero and any h with <g, h> >= 0, the row -h - g has
    <g, -h - g> = -<g, h> - |g|^2 < 0. Entries are at most 8 in size.
    """
    rows = _integers(rng, m, p)
    i, j = _two_of(rng, m)
    rows[i] = _nonzero_row(rng, p)
    if rows[i] @ rows[j] >= 0:
        rows[j] = -rows[j] - rows[i]
    return rows


def non_conflicting(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """No pair of rows has a negative inner product.

    Inner products of rows without negative entries are sums of products without negative terms;
    turning the sign of a whole column leaves every inner product as it is.
    """
    return rng.integers(0, 5, (m, p)) * rng.choice([-1.0, 1.0], p)


def rank_deficient(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """The rank is below min(m, p) (m, p >= 2).

    A product of an (m, r) and an (r, p) matrix has rank at most r, and r = min(3, min(m, p) - 1).
    Entries are at most 3 * 3 * 3 = 27 in size.
    """
    rank = min(3, m - 1, p - 1)
    return _integers(rng, m, rank, 3) @ _integers(rng, rank, p, 3)


def duplicate_rows(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """Two rows are equal (m >= 2), by copying one."""
    rows = _integers(rng, m, p)
    i, j = _two_of(rng, m)
    rows[i] = _nonzero_row(rng, p)
    rows[j] = rows[i]
    return rows


def opposite_rows(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """One row is -1, -2, -3 or -4 times another, which is not zero (m >= 2)."""
    rows = _integers(rng, m, p)
    i, j = _two_of(rng, m)
    rows[i] = _nonzero_row(rng, p)
    rows[j] = -rng.integers(1, 5) * rows[i]
    return rows


def zero_rows(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """At least one row is zero, by construction; sometimes all are."""
    rows = _integers(rng, m, p)
    rows[rng.permutation(m)[: rng.integers(1, m + 1)]] = 0
    return rows


def near_parallel(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """All rows point almost the same way.

    Rows are g + e h_i with |h_i| <= |g| and e = 2^-k, k from 2 to 26. Each makes an angle with g of
    at most arcsin(e), so that any two have a cosine of at least 1 - 2 e^2, up to the rounding of
    the dtype (which is why only float64 keeps all of them apart). Entries are not integers.
    """
    g = _nonzero_row(rng, p)
    h = rng.standard_normal((m, p))
    h *= np.linalg.norm(g) / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-300)
    return g + 2.0 ** -rng.integers(2, 27) * h


def unequal_norms(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """Norms spread over up to 12 decades.

    Rows of integers between 1 and 4 * sqrt(30) < 22 in norm, times powers of two from 2^-20 to
    2^20, one of each where m >= 2: the largest norm is at least 2^40 / 22 = 5e10 times the least.
    """
    rows = np.stack([_nonzero_row(rng, p) for _ in range(m)])
    exponents = rng.integers(-20, 21, m)
    exponents[[0, -1]] = [-20, 20]
    return rows * 2.0 ** rng.permutation(exponents)[:, None]


def stationary(rng: np.random.Generator, m: int, p: int) -> Matrix:
    """Some convex combination of the rows is zero (m >= 2).

    The last row is minus the sum of k_i times the others with integers k_i from 1 to 3, so the
    weights (k_1, ..., k_{m-1}, 1) give zero. Entries are at most 7 * 3 * 4 = 84 in size.
    """
    rows = _integers(rng, m, p)
    rows[0] = _nonzero_row(rng, p)
    rows[-1] = -(rng.integers(1, 4, m - 1) @ rows[:-1])
    return rows[rng.permutation(m)]


class Family(NamedTuple):
    """A way to make matrices, and the least shape for which its claim makes sense."""

    make: Callable[[np.random.Generator, int, int], Matrix]
    least_m: int = 1
    least_p: int = 1

    @property
    def name(self) -> str:
        return self.make.__name__


FAMILIES = (
    Family(generic),
    Family(conflicting, 2),
    Family(non_conflicting),
    Family(rank_deficient, 2, 2),
    Family(duplicate_rows, 2),
    Family(opposite_rows, 2),
    Family(zero_rows),
    Family(near_parallel),
    Family(unequal_norms),
    Family(stationary, 2),
)
BY_NAME = {family.name: family for family in FAMILIES}


def matrix(
    name: str,
    m: int,
    p: int,
    seed: int = 0,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return one matrix of a family, of shape (m, p)."""
    rows = BY_NAME[name].make(np.random.default_rng(seed), m, p)
    return on_device(rows * scale).to(dtype)


@st.composite
def gradients(
    draw: st.DrawFn,
    names: Sequence[str] = tuple(BY_NAME),
    *,
    m: tuple[int, int] = (1, 8),
    p: tuple[int, int] = (1, 30),
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    scales: Sequence[float] = SCALES,
) -> Tensor:
    """Draw a matrix of one of the families: m and p within bounds, any of the scales and dtypes."""
    family = BY_NAME[draw(st.sampled_from(list(names)))]
    return matrix(
        family.name,
        draw(st.integers(max(m[0], family.least_m), m[1])),
        draw(st.integers(max(p[0], family.least_p), p[1])),
        draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from(list(scales))),
        dtype=draw(st.sampled_from(list(dtypes))),
    )


def random_gradients(m: int, p: int, seed: int = 0) -> Tensor:
    """Return a generic float64 matrix of shape (m, p)."""
    return matrix("generic", m, p, seed)


def orthogonal(p: int, seed: int = 0) -> Tensor:
    """Return an orthogonal matrix of shape (p, p), float64."""
    return on_device(np.linalg.qr(np.random.default_rng(seed).standard_normal((p, p)))[0])
