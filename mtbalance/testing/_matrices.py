"""Gradient matrices whose structure is proven, each made again from a family, a shape and a seed.

Except where a family's docstring says otherwise, all entries are integers of at most 8 bits, so
that float32, float64 and bfloat16 hold them exactly and the proofs, which are about integers, hold
for the numbers that a strategy sees. Matrices are scaled by powers of two, from below 1e-20 to
above 1e20, which is exact too.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from typing_extensions import Self

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SCALES = tuple(2.0**k for k in (-67, -20, 0, 20, 67))  # 6.8e-21, 9.5e-7, 1, 1.0e6, 1.5e20


def _between(rng: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Return integers from ``low`` to ``high``, both included, as float64."""
    return torch.randint(low, high + 1, shape, generator=rng, device="cpu").double()


def _one_of(rng: Generator, count: int) -> int:
    return int(_between(rng, 0, count - 1))


def _normal(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")


def _shuffled(rng: Generator, count: int) -> Tensor:
    return torch.randperm(count, generator=rng, device="cpu")


def _nonzero_row(rng: Generator, p: int, bound: int = 4) -> Tensor:
    row = _between(rng, -bound, bound, p)
    if not row.any():
        row[_one_of(rng, p)] = 1.0
    return row


def _two_of(rng: Generator, m: int) -> tuple[int, int]:
    first, second = _shuffled(rng, m)[:2].tolist()
    return first, second


def generic(rng: Generator, m: int, p: int) -> Tensor:
    """Normal entries, rounded to the dtype: full rank with probability one, nothing else."""
    return _normal(rng, m, p)


def conflicting(rng: Generator, m: int, p: int) -> Tensor:
    """Some pair of rows has a negative inner product (m >= 2).

    For a row g that is not zero and any h with <g, h> >= 0, the row -h - g has
    <g, -h - g> = -<g, h> - |g|^2 < 0. Entries are at most 8 in size.
    """
    rows = _between(rng, -4, 4, m, p)
    i, j = _two_of(rng, m)
    rows[i] = _nonzero_row(rng, p)
    if rows[i] @ rows[j] >= 0:
        rows[j] = -rows[j] - rows[i]
    return rows


def non_conflicting(rng: Generator, m: int, p: int) -> Tensor:
    """No pair of rows has a negative inner product.

    Inner products of rows without negative entries are sums of products without negative terms;
    turning the sign of a whole column leaves every inner product as it is.
    """
    return _between(rng, 0, 4, m, p) * (2 * _between(rng, 0, 1, p) - 1)


def rank_deficient(rng: Generator, m: int, p: int) -> Tensor:
    """The rank is below min(m, p) (m, p >= 2).

    A product of an (m, r) and an (r, p) matrix has rank at most r, and r = min(3, min(m, p) - 1).
    Entries are at most 3 * 3 * 3 = 27 in size.
    """
    rank = min(3, m - 1, p - 1)
    return _between(rng, -3, 3, m, rank) @ _between(rng, -3, 3, rank, p)


def duplicate_rows(rng: Generator, m: int, p: int) -> Tensor:
    """Two rows are equal (m >= 2), by copying one."""
    rows = _between(rng, -4, 4, m, p)
    i, j = _two_of(rng, m)
    rows[i] = _nonzero_row(rng, p)
    rows[j] = rows[i]
    return rows


def opposite_rows(rng: Generator, m: int, p: int) -> Tensor:
    """One row is -1, -2, -3 or -4 times another, which is not zero (m >= 2)."""
    rows = _between(rng, -4, 4, m, p)
    i, j = _two_of(rng, m)
    rows[i] = _nonzero_row(rng, p)
    rows[j] = -_between(rng, 1, 4) * rows[i]
    return rows


def zero_rows(rng: Generator, m: int, p: int) -> Tensor:
    """At least one row is zero, by construction; sometimes all are."""
    rows = _between(rng, -4, 4, m, p)
    rows[_shuffled(rng, m)[: 1 + _one_of(rng, m)]] = 0
    return rows


def near_parallel(rng: Generator, m: int, p: int) -> Tensor:
    """All rows point almost the same way.

    Rows are g + e h_i with |h_i| <= |g| and e = 2^-k, k from 2 to 26. Each makes an angle with g of
    at most arcsin(e), so that any two have a cosine of at least 1 - 2 e^2, up to the rounding of
    the dtype (which is why only float64 keeps all of them apart). Entries are not integers.
    """
    g = _nonzero_row(rng, p)
    h = _normal(rng, m, p)
    h *= g.norm() / h.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return g + 2.0 ** -(2 + _one_of(rng, 25)) * h


def unequal_norms(rng: Generator, m: int, p: int) -> Tensor:
    """Norms spread over up to 12 decades.

    Rows of integers between 1 and 4 * sqrt(30) < 22 in norm, times powers of two from 2^-20 to
    2^20, one of each where m >= 2: the largest norm is at least 2^40 / 22 = 5e10 times the least.
    """
    rows = torch.stack([_nonzero_row(rng, p) for _ in range(m)])
    exponents = _between(rng, -20, 20, m)
    exponents[0], exponents[-1] = -20, 20
    return rows * 2.0 ** exponents[_shuffled(rng, m)][:, None]


def stationary(rng: Generator, m: int, p: int) -> Tensor:
    """Some convex combination of the rows is zero (m >= 2).

    The last row is minus the sum of k_i times the others with integers k_i from 1 to 3, so the
    weights (k_1, ..., k_{m-1}, 1) give zero. Entries are at most 7 * 3 * 4 = 84 in size.
    """
    rows = _between(rng, -4, 4, m, p)
    rows[0] = _nonzero_row(rng, p)
    rows[-1] = -(_between(rng, 1, 3, m - 1) @ rows[:-1])
    return rows[_shuffled(rng, m)]


class Family(NamedTuple):
    """A way to make matrices, and the least shape for which its claim makes sense."""

    make: Callable[[Generator, int, int], Tensor]
    """Returns a matrix of shape (m, p), given a generator, m and p."""
    least_m: int = 1
    """The least number of rows."""
    least_p: int = 1
    """The least number of columns."""

    @property
    def name(self) -> str:
        """What the family is called in :func:`matrix`."""
        return self.make.__name__

    @property
    def proof(self) -> str:
        """What is true of its matrices, and why."""
        return inspect.getdoc(self.make) or ""


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
    family: str,
    m: int,
    p: int,
    seed: int = 0,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return one matrix of a family, of shape (m, p), on PyTorch's default device.

    Args:
        family: A key of ``BY_NAME``; ``BY_NAME[family].proof`` says what is true of its matrices.
        m: The number of tasks.
        p: The number of parameters.
        seed: The same gives the same matrix, of any scale and dtype.
        scale: A factor for all entries, exact if it is a power of two.
        dtype: The dtype of the matrix, made in float64 and rounded once.

    Example:
        >>> matrix("conflicting", 2, 3, seed=1, dtype=torch.float32)
        tensor([[-1., -5.,  8.],
                [ 1.,  4., -4.]])
    """
    if family not in BY_NAME:
        raise ValueError(f"`family` must be one of {', '.join(BY_NAME)}, but got {family!r}.")
    _, least_m, least_p = BY_NAME[family]
    if m < least_m or p < least_p:
        raise ValueError(
            f"`m` and `p` must be at least {least_m} and {least_p} for {family!r}, "
            f"but got {m} and {p}."
        )
    rows = BY_NAME[family].make(Generator("cpu").manual_seed(seed), m, p) * scale
    return rows.to(torch.get_default_device(), dtype)


def orthogonal(p: int, seed: int = 0) -> Tensor:
    """Return an orthogonal matrix of shape (p, p), float64, on PyTorch's default device."""
    rotation: Tensor = torch.linalg.qr(_normal(Generator("cpu").manual_seed(seed), p, p))[0]
    return rotation.to(torch.get_default_device())


@dataclass(frozen=True)
class Sample:
    """One matrix, by what it takes to make it again."""

    family: str
    m: int
    p: int
    seed: int = 0
    scale: float = 1.0
    dtype: torch.dtype = torch.float64

    def rows(self) -> Tensor:
        """Return the matrix."""
        return matrix(self.family, self.m, self.p, self.seed, scale=self.scale, dtype=self.dtype)

    def but(self, **changes: float | torch.dtype) -> Self:
        """Return the sample with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def draws(self) -> Generator:
        """Return a generator for what else a property draws: permutations, factors, places."""
        return Generator("cpu").manual_seed(self.seed + 2**32)

    def __str__(self) -> str:
        scale = "" if self.scale == 1 else f", scale={self.scale!r}"
        return (
            f'matrix("{self.family}", {self.m}, {self.p}, seed={self.seed}{scale}, '
            f"dtype={self.dtype})"
        )

    @property
    def proof(self) -> str:
        """What is true of the matrix, and why."""
        return BY_NAME[self.family].proof
