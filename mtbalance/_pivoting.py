r"""Solvers that exchange many rows at once, in float64 on the CPU.

They work on the Gramian of the *unit* rows, so that neither the scale of the gradients nor ratios
between tasks (up to 1e12 and beyond) cost accuracy.

Wanted are multipliers :math:`\lambda` and a height t with :math:`\lambda \ge 0`, slack
:math:`s = C \lambda + \beta - t a \ge 0`, :math:`\lambda^T s = 0` and :math:`|U^T \lambda| = \phi`.
If the rows with a multiplier are known, :math:`\lambda = t p - q` with :math:`C p = a` and
:math:`C q = \beta` on these rows, and t is the larger root of a quadratic equation. Rows whose
multiplier comes out negative then leave and those whose slack comes out negative enter, all at
once, until none does. This is Newton's method on :math:`\min(\lambda, s) = 0`, known as block
principal pivoting (Portugal, Judice, Vicente, "A comparison of block pivoting and interior-point
algorithms for linear least squares problems with nonnegative variables", 1994). Where the number of
exchanges does not fall, rows are exchanged one by one (Murty's rule), which ends for any t that is
held.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._gramians import RESOLUTION, norm_of, vanishes

FEW = 16
"""Up to this many rows, solving with Python's numbers takes less time than with tensors."""
SOLVER_TOLERANCE = 1e-13
RIDGES = (0.0, 1e-11)
"""What pivoting adds to the diagonal, in turn; the second tells dependent rows apart."""
_MOST_PIVOTS = 30
"""Pivoting takes 2 or 3 steps as a rule."""
_MOST_PIVOTS_OF_FEW = 12
PATIENCE = 3
"""How often pivoting may go on without an improvement."""
LEAST_PIVOT = 1e-12
"""Matrices with a smaller one get the ridge: rows that depend on each other but for the rounding of
float32 would get multipliers of 1e7, which their Gramian takes for as good as small ones."""
_SUSPICION = 1e3
"""Combinations of unit rows that are shorter than their weights by this factor may vanish."""


class Face(NamedTuple):
    """Where pivoting came to rest."""

    multipliers: Tensor
    """lambda, shape (k,), zero off the face."""
    nearest: Tensor
    """C^-1 a on the face: its point of least norm, up to a factor."""


def pivot_to_face(
    gramian: Tensor, sizes: Tensor, linear: Tensor, radius: float, start: list[int], ridge: float
) -> Face | None:
    """Find the rows that count by exchanging many of them at once.

    Args:
        gramian: C = U U^T, shape (k, k), unit diagonal.
        sizes: a, shape (k,); all zero where t does not matter.
        linear: beta, shape (k,).
        radius: phi; does not matter where ``sizes`` are zero.
        start: The rows to start from.
        ridge: What is added to the diagonal while rows are exchanged.

    Returns:
        The face, whose multipliers are still to be checked; None if it was not found soon.
    """
    system = _System(torch.stack([sizes, -linear]), radius)
    identity = torch.eye(len(gramian), dtype=gramian.dtype, device="cpu")
    ridged = gramian + ridge * identity if ridge else gramian
    least = 0.0 if ridge else LEAST_PIVOT
    tolerance = SOLVER_TOLERANCE * (float(linear.abs().max()) + radius)
    rows = _Candidates(start, len(gramian))
    for _ in range(_MOST_PIVOTS):
        both = torch.outer(rows.mask, rows.mask)
        factor = torch.linalg.lu_factor_ex(torch.where(both, ridged, identity))
        if not float(factor.LU.diagonal().abs().min()) > least:
            return None
        masked = system.right * rows.mask
        solution = _solve_both(factor, masked)
        multipliers, height, weight = system.multipliers(solution)
        target = torch.add(system.right[1], sizes, alpha=height)
        # Minus the slack off the face; on it the multipliers, as the slack vanishes there.
        gain = torch.addmv(target + multipliers, gramian, multipliers, alpha=-1)
        if rows.exchange(gain > tolerance + RESOLUTION * abs(weight)):
            continue
        if ridge:  # take its effect away again: one step of iterative refinement
            face = torch.where(both, gramian, 0.0)
            residual = masked - torch.stack([face @ part for part in solution])
            solution = solution + _solve_both(factor, residual)
            multipliers, *_ = system.multipliers(solution)
        return Face(multipliers, solution[0])
    return None


class _System:
    """The equations on a face: their right-hand sides, and what their solutions amount to."""

    def __init__(self, right: Tensor, radius: float) -> None:
        self.right = right
        self._sums = torch.cat([right, torch.ones_like(right[:1])])
        self._radius = radius

    def multipliers(self, solution: Tensor) -> tuple[Tensor, float, float]:
        """Return lambda = t p - q for the solutions p and -q, with t and the sum of weights."""
        p, q = solution.unbind()
        of_p, of_q = (self._sums @ p).tolist(), (self._sums @ q).tolist()
        height, weight = _height(of_p, of_q, self._radius)
        return torch.add(q, p, alpha=height), height, weight


class _Candidates:
    """The rows that are taken for those with a multiplier."""

    def __init__(self, start: list[int], count: int) -> None:
        self.mask = torch.zeros(count, dtype=torch.bool, device="cpu")
        self.mask[start] = True
        self._fewest, self._patience = count + 1, PATIENCE

    def exchange(self, wanted: Tensor) -> bool:
        """Go on to the rows that are wanted, or some of the way; False if they are the same."""
        changed = (wanted != self.mask).nonzero()[:, 0].tolist()
        if not changed:
            return False
        if len(changed) < self._fewest:
            self._fewest, self._patience = len(changed), PATIENCE
        elif self._patience:
            self._patience -= 1
        else:  # one row at a time, the last first, which cannot go round in circles
            wanted = self.mask.clone()
            wanted[changed[-1]].logical_not_()
        self.mask = wanted
        return True


def _solve_both(factor: tuple[Tensor, Tensor, Tensor], right: Tensor) -> Tensor:
    """Solve for two right-hand sides, shape (2, k)."""
    # MKL wakes all threads for matrices, at the price of many small solves, but not for vectors: so
    # the two right-hand sides are a batch, and the matrix has an LU instead of a Cholesky factor.
    lu, pivots, _ = factor
    lu, pivots = lu.expand(2, *lu.shape), pivots.expand(2, -1)
    solution: Tensor = torch.linalg.lu_solve(lu, pivots, right[:, :, None])
    return solution.squeeze(2)


def _height(of_p: list[float], of_q: list[float], radius: float) -> tuple[float, float]:
    """Return t such that t p - q has length phi (or as near as can be), and its sum of weights.

    Args:
        of_p: Inner products of p with a, -beta and 1.
        of_q: Inner products of -q with the same.
        radius: phi.
    """
    squared, _, weight_of_p = of_p
    mixed, constant, weight_of_q = of_q
    if squared <= 0:
        return 0.0, weight_of_q
    root = mixed * mixed - squared * (constant - radius * radius)
    height = (math.sqrt(max(root, 0.0)) - mixed) / squared
    return height, height * weight_of_p + weight_of_q


def _guess_face(linear: list[float], radius: float, sizes: list[float]) -> tuple[list[int], int]:
    """Return the rows in the order of beta_i / a_i, and how many would have a multiplier.

    If all rows were orthogonal, it would be lambda_i = max(t a_i - beta_i, 0), so that rows count
    from a height of beta_i / a_i on.
    """
    order = sorted(range(len(linear)), key=lambda i: linear[i] / sizes[i])
    squared = mixed = constant = 0.0
    for number, i in enumerate(order):
        t = linear[i] / sizes[i]
        if number and t * (t * squared - 2 * mixed) + constant >= radius * radius:
            return order, number
        squared += sizes[i] * sizes[i]
        mixed += sizes[i] * linear[i]
        constant += linear[i] * linear[i]
    return order, len(order)


def minimize_by_pivoting(
    gramian: Tensor,
    linear: Tensor,
    radius: float,
    sizes: Tensor,
    face: list[int] | None = None,
) -> Tensor | None:
    """Solve the problem of :func:`minimize_linear_plus_norm` in a few steps, if that works.

    ``face`` holds the rows to start from; the other arguments are those of that function.

    Returns:
        y, shape (k,), which is optimal: its duality gap was checked. Or a y whose combination
        vanishes, which is optimal if the minimum is not negative. None if neither was found.
    """
    if face is None:
        order, number = _guess_face(linear.tolist(), radius, sizes.tolist())
        face = order[:number]
    for ridge in RIDGES:
        found = pivot_to_face(gramian, sizes, linear, radius, face, ridge)
        if found is not None:
            y = found.multipliers.clamp_min(0)
            y /= torch.dot(sizes, y)
            if not norm_of(y, gramian) * _SUSPICION > float(y.sum()):
                nearest = found.nearest.clamp_min(0)
                nearest /= torch.dot(sizes, nearest)
                if vanishes(nearest, gramian):
                    return nearest
            if _is_optimal(y, gramian, linear, radius, sizes):
                return y
        elif not ridge:
            kept = _shortest_of_parallel(gramian, sizes)
            if len(kept) == len(linear):
                continue
            part = minimize_by_pivoting(gramian[kept][:, kept], linear[kept], radius, sizes[kept])
            if part is not None:
                y = torch.zeros_like(linear)
                y[kept] = part
                if vanishes(y, gramian) or _is_optimal(y, gramian, linear, radius, sizes):
                    return y
    return None


def _is_optimal(y: Tensor, gramian: Tensor, linear: Tensor, radius: float, sizes: Tensor) -> bool:
    """Whether y has no duality gap but what rounding leaves."""
    image = gramian @ y
    length = math.sqrt(max(float(torch.dot(y, image)), 0.0))
    if not length > 0:
        return False
    slope = torch.add(linear, image, alpha=radius / length)
    beyond = torch.sub(sizes * torch.dot(slope, y), slope).max()
    scale = float(linear.abs().max()) + radius
    rounding = RESOLUTION * radius * float(y.sum()) / length
    return float(beyond) <= SOLVER_TOLERANCE * scale + rounding


def _shortest_of_parallel(gramian: Tensor, sizes: Tensor) -> Tensor:
    """Return the numbers of the rows without a shorter (or an equal, earlier) parallel one."""
    parallel = gramian > 1 - RESOLUTION
    earlier = torch.ones_like(parallel).tril(-1)
    same = sizes == sizes[:, None]
    beaten = parallel & ((sizes > sizes[:, None]) | (same & earlier))
    return (~beaten.any(1)).nonzero()[:, 0]


def minimize_for_few(
    gramian: list[list[float]], linear: list[float], radius: float, sizes: list[float]
) -> list[float] | None:
    r"""Solve the problem of :func:`minimize_linear_plus_norm` by pivoting, on Python's numbers.

    For few rows this takes less time than the calls alone that tensors would need.

    Returns:
        :math:`\lambda = \phi y / |U^T y|` for the optimal y, whose duality gap was checked. None
        where rows depend on each other or nearly cancel, or if pivoting goes round in circles.
    """
    tolerance = SOLVER_TOLERANCE * (max(map(abs, linear)) + radius)
    order, number = _guess_face(linear, radius, sizes)
    face = order[:number]
    seen: set[tuple[int, ...]] = set()
    # Faces may come back in another order, as often as there are orders: so both bounds are needed.
    while face and tuple(face) not in seen and len(seen) < _MOST_PIVOTS_OF_FEW:
        seen.add(tuple(face))
        a, b = [sizes[i] for i in face], [-linear[i] for i in face]
        p, q = _eliminate(
            [[*(gramian[i][j] for j in face), *ab] for i, *ab in zip(face, a, b, strict=True)]
        )
        height, weight = _height([dot(a, p), 0.0, sum(p)], [dot(a, q), dot(b, q), sum(q)], radius)
        multipliers = [0.0] * len(linear)
        for i, p_i, q_i in zip(face, p, q, strict=True):
            multipliers[i] = height * p_i + q_i
        image = [dot(row, multipliers) for row in gramian]
        least = tolerance + RESOLUTION * abs(weight)
        gain = [
            m + height * x - y - z
            for m, x, y, z in zip(multipliers, sizes, linear, image, strict=True)
        ]
        previous = face
        # Rows without a multiplier first: if left out before, they replace what they depend on.
        face = [i for i in order if gain[i] > least and not multipliers[i]]
        face += [i for i in previous if gain[i] > least and multipliers[i]]
        if face == previous:
            return _scaled_to_optimum(multipliers, image, linear, radius, sizes)
    return None


def dot(x: list[float], y: list[float]) -> float:
    """Return the inner product of two vectors."""
    return sum(map(float.__mul__, x, y))


def _eliminate(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    """Solve a positive definite system for two right-hand sides, the last two columns.

    A row that depends on those before it is left out: its unknown is 0.
    """
    tops = []
    while rows:
        top = rows[0]
        pivot = top[0]
        if pivot <= LEAST_PIVOT:
            tops.append([math.inf, *[0.0] * (len(top) - 1)])
            rows = [row[1:] for row in rows[1:]]
            continue
        tops.append(top)
        rows = [_reduce(row, row[0] / pivot, top) for row in rows[1:]]
    p: list[float] = []
    q: list[float] = []
    for top in reversed(tops):
        pivot, *middle, right, other = top
        p.insert(0, (right - dot(middle, p)) / pivot)
        q.insert(0, (other - dot(middle, q)) / pivot)
    return p, q


def _reduce(row: list[float], factor: float, top: list[float]) -> list[float]:
    reduced = [x - factor * y for x, y in zip(row, top, strict=True)]
    del reduced[0]
    return reduced


def _scaled_to_optimum(
    multipliers: list[float],
    image: list[float],
    linear: list[float],
    radius: float,
    sizes: list[float],
) -> list[float] | None:
    """Return the multipliers scaled to the radius; None if that leaves a duality gap."""
    squared = dot(multipliers, image)
    weight = sum(multipliers)
    if squared * _SUSPICION**2 <= weight * weight:
        return None
    factor = radius / math.sqrt(squared)
    slope = [b + factor * x for b, x in zip(linear, image, strict=True)]
    value = dot(multipliers, slope) / dot(multipliers, sizes)
    beyond = max(value * a - s for a, s in zip(sizes, slope, strict=True))
    if beyond > SOLVER_TOLERANCE * (max(map(abs, linear)) + radius) + RESOLUTION * weight * factor:
        return None
    return [factor * x for x in multipliers]
