"""What every method on Gramians needs: unit rows, lengths, and closed forms for two rows.

For two rows there are formulas, which need no solver and leave the Gramian on its device. For rows
whose squares float64 does not hold there are powers of two, which change no digit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from mtbalance._products import gramian_of
from mtbalance._rows import finite_entries

Number = TypeVar("Number", float, Tensor)

ZERO_ROW = 1e-30
"""A row whose norm is at most this fraction of the largest counts as zero."""
RESOLUTION = 16 * torch.finfo(torch.float64).eps
"""Squared norms of combinations of unit rows are known up to a few of these."""

_SAFE_PIVOT = 1e-5
"""With a smaller pivot in their Cholesky factor (unit rows closer than this), cosines are looked at
by their eigenvalues."""
_LEAST_EIGENVALUE = 1e-12
LOWEST, HIGHEST = 1e-240, 1e240
"""Within these, squared norms leave room in float64: below for the squares of all rows that do not
count as zero next to them, above for weights and for sums."""
WIDE = (torch.float64, torch.complex128)
"""Only squares of these may be more, or less, than float64 holds."""
_POWER = 600
"""2^600 = 4e180 takes the norms of all float64 rows that are out of this range into it."""


class UnitRows(NamedTuple):
    """The geometry of the rows that are not zero."""

    numbers: Tensor
    """Which rows they are, shape (k,)."""
    norms: Tensor
    """Their norms, shape (k,)."""
    cosines: Tensor
    """Their Gramian after scaling each to unit length, shape (k, k)."""


def unit_rows(gramian: Tensor) -> UnitRows:
    """Drop the zero rows and scale the others to unit length. On the CPU, in float64."""
    gramian = gramian.detach().to("cpu", torch.float64)
    norms = gramian.diagonal().clamp_min(0).sqrt()
    alive = norms > ZERO_ROW * norms.max()
    index = alive.nonzero()[:, 0]
    if len(index) < len(norms):
        norms, gramian = norms[index], gramian[index][:, index]
    cosines = (gramian + gramian.T) / torch.outer(norms, 2 * norms)
    cosines.clamp_(-1, 1).fill_diagonal_(1)
    return UnitRows(index, norms, cosines)


def factors_to_longest(gramian: Tensor) -> Tensor:
    """Return what brings each row to the length of the longest; 0 for rows that vanish."""
    lengths = gramian.detach().double().diagonal().clamp_min(0).sqrt()
    alive = lengths > ZERO_ROW * lengths.max()
    return torch.where(alive, lengths.max() / torch.where(alive, lengths, 1.0), 0.0)


def norm_of(coefficients: Tensor, gramian: Tensor) -> float:
    """Return the length of the combination of rows with these coefficients."""
    return math.sqrt(max(float(coefficients @ gramian @ coefficients), 0.0))


def vanishes(y: Tensor, gramian: Tensor) -> bool:
    """Whether the combination of unit rows cannot be told from zero by their Gramian."""
    bound = math.sqrt(RESOLUTION * len(y)) * float(y.abs().sum())
    return norm_of(y, gramian) <= bound


class Equiangular(NamedTuple):
    """The shortest vector x whose inner products with unit rows are as wanted, or nearest to it."""

    coefficients: Tensor
    """y, shape (k,): x is the combination of the unit rows with these."""
    products: Tensor
    """The inner products that it has, shape (k,): those wanted, if the rows are independent."""
    squared_length: float
    """|x|^2, zero where no combination comes nearer than zero does."""


def equiangular(cosines: Tensor, wanted: Tensor) -> Equiangular:
    """Find the combination of unit rows that has the inner products ``wanted`` with them.

    Combinations whose squared length is below 1e-12 of the largest count as zero, so that rows that
    are equal up to the rounding of float32 are one; of several solutions it is the shortest, and if
    there is none, that of least squares: the Moore-Penrose inverse.

    Args:
        cosines: Shape (k, k), unit diagonal.
        wanted: Shape (k,).
    """
    factor, info = torch.linalg.cholesky_ex(cosines)
    if int(info) == 0 and float(factor.diagonal().min()) > _SAFE_PIVOT:
        coefficients = torch.cholesky_solve(wanted[:, None], factor)[:, 0]
        return Equiangular(coefficients, wanted, float(wanted @ coefficients))
    values, vectors = torch.linalg.eigh(cosines)
    vectors = vectors[:, values > _LEAST_EIGENVALUE * len(values) * values[-1]]
    values = values[len(values) - vectors.shape[1] :]
    parts = vectors.T @ wanted
    if float(parts.norm()) <= RESOLUTION * len(wanted) * float(wanted.norm()):
        parts = torch.zeros_like(parts)  # what the rows span is orthogonal to what is wanted
    coefficients = vectors @ (parts / values)
    return Equiangular(coefficients, vectors @ parts, float(parts @ (parts / values)))


class Remainders(NamedTuple):
    """What is left of each unit row off the span of the others."""

    coefficients: Tensor
    """Of the unit rows, shape (k, k): those of one remainder in each row; 0 if nothing is left."""
    squared_lengths: Tensor
    """Shape (k,): at most 1, and also the inner products with the row itself."""


def off_the_others(cosines: Tensor) -> Remainders:
    """Project each unit row off the span of all others.

    What is left is orthogonal to the others, as the row of the inverse of the cosines is; of rows
    that depend on each other, that of the Moore-Penrose inverse. Nothing is left of a row that such
    a dependence has in it: a combination of length 1e-6 (times the root of k), as in
    :func:`equiangular`, of coefficients whose squares sum to 1, with one above 1e-6 for this row.

    Args:
        cosines: Shape (k, k), unit diagonal.
    """
    factor, info = torch.linalg.cholesky_ex(cosines)
    if int(info) == 0 and float(factor.diagonal().min()) > _SAFE_PIVOT:
        inverse = torch.cholesky_inverse(factor)
        squared_lengths = 1 / inverse.diagonal()
    else:
        values, vectors = torch.linalg.eigh(cosines)
        kept = values > _LEAST_EIGENVALUE * len(values) * values[-1]
        inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
        stays = vectors[:, ~kept].square().sum(1) <= _LEAST_EIGENVALUE
        squared_lengths = torch.where(stays, 1 / inverse.diagonal(), 0.0)
    return Remainders(inverse * squared_lengths[:, None], squared_lengths.clamp_max(1))


def weights_on_cpu(solver: Callable[[Tensor], Tensor], gramian: Tensor) -> Tensor:
    """Return a solver's weights, shape (m,), for the Gramian on the CPU; NaN if it is not finite.

    Solvers compare, and comparisons pass NaN by.
    """
    gramian = gramian.detach().cpu()
    if not all(finite_entries(gramian.diagonal())):
        return torch.full_like(gramian[0], torch.nan)
    return solver(gramian)


# --- rows whose squares float64 does not hold -----------------------------------------------------


def are_held(squares: Sequence[float]) -> bool:
    """Return whether float64 holds the Gramian of rows, given their squared norms.

    Where all of these are 0, that is not known. One row alone is taken for zero, which it counts as
    next to the others: of float32 it is, and looking would cost every step with a task that has
    no gradient.
    """
    return any(squares) and all(s == 0 or LOWEST <= s <= HIGHEST for s in squares)


def exponents_of(squares: Sequence[float]) -> list[int]:
    """Return what power of two takes each row into the range of float64, given squared norms."""
    return [_POWER if not s <= HIGHEST else -_POWER if s < LOWEST else 0 for s in squares]


def shifted(values: Tensor, exponents: Sequence[Any]) -> Tensor:
    """Return values times powers of two: infinity or 0 where float64 does not hold that.

    Args:
        values: Of any shape, float64.
        exponents: Even whole numbers of at most 2000, in lists of that shape.
    """
    exponent = torch.tensor(exponents, dtype=torch.int64, device="cpu")
    half = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent // 2)
    half = half.to(values.device)  # 2 ** exponent is itself out of range
    return values * half * half


def gramian_in_range(gradients: Tensor) -> Tensor:
    """Return the inner products of rows, shape (m, p), over a power of two if float64 needs it."""
    gradients = gradients.detach()
    gramian = gramian_of([[row] for row in gradients])
    if gradients.dtype == torch.float64 and not LOWEST < gramian.diagonal().max() < HIGHEST:
        return gramian_of([[row] for row in near_one(gradients)[0]])
    return gramian


def near_one(numbers: Tensor) -> tuple[Tensor, int]:
    """Return numbers over a power of two, so that the largest is near 1, and that power."""
    if numbers.numel() == 0:
        return numbers, 0
    _, exponent = torch.frexp(numbers.abs().max())
    half = exponent // 2  # twice half: a power of two that large is itself out of range
    return torch.ldexp(torch.ldexp(numbers, -half), half - exponent), int(exponent)


# --- two rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic(Generic[Number]):
    """What a formula without branches needs beside + - * /, for one kind of number."""

    where: Callable[[Any, Number | float, Number | float], Number]
    positive: Callable[[Number], Number]
    """The number, or 0 if that is larger."""
    larger: Callable[[Number, Number], Number]
    sqrt: Callable[[Number], Number]


FLOATS: Arithmetic[float] = Arithmetic(
    lambda condition, x, y: x if condition else y, lambda x: max(x, 0.0), max, math.sqrt
)
TENSORS: Arithmetic[Tensor] = Arithmetic(
    lambda condition, x, y: torch.where(condition, x, y),  # noqa: PLW0108 (its overloads)
    lambda x: x.clamp_min(0),
    torch.maximum,
    torch.sqrt,
)


class PairFormula(Protocol):
    """Two weights from |g1|^2, <g1, g2> and |g2|^2, in either kind of number."""

    def __call__(
        self, a: Number, h: Number, b: Number, of: Arithmetic[Number], /
    ) -> tuple[Number, Number]: ...


def weights_of_pair(formula: PairFormula, gramian: Tensor) -> Tensor:
    """Return a formula's weights, of shape (2,), for a Gramian of shape (2, 2).

    On the CPU with Python's numbers, which are ten times faster than tensors of one element; on
    other devices with tensors, so that the host waits for nothing.
    """
    if gramian.is_cpu:
        (a, h), (_, b) = gramian.tolist()
        return torch.tensor(formula(a, h, b, FLOATS), dtype=torch.float64, device="cpu")
    one, both, _, other = gramian.detach().double().flatten().unbind()
    return torch.stack(formula(one, both, other, TENSORS))


def numbers_of_pair(vector: Tensor) -> Any:
    """Return both entries of a vector, shape (2,), in the kind of number that the formula gets."""
    return vector.tolist() if vector.is_cpu else vector.unbind()
