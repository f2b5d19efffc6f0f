"""Small pure functions on Gramians, and the convex solvers on them.

The solvers work in float64 on the CPU, on the Gramian of the *unit* rows, so that neither the scale
of the gradients nor ratios between tasks (up to 1e12 and beyond) cost accuracy. For two rows there
are formulas, which need no solver and leave the Gramian on its device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

ZERO_ROW = 1e-30
"""A row whose norm is at most this fraction of the largest counts as zero."""

FEW = 16
"""Up to this many rows, solving with Python's numbers takes less time than with tensors."""
_SOLVER_TOLERANCE = 1e-13
_SAFE_PIVOT = 1e-5
"""Factors with a smaller pivot (unit rows closer than this) go to the eigenvalue solver."""
RESOLUTION = 16 * torch.finfo(torch.float64).eps
"""Squared norms of combinations of unit rows are known up to a few of these."""
_RIDGES = (0.0, 1e-11)
"""What pivoting adds to the diagonal, in turn; the second tells dependent rows apart."""
_MOST_PIVOTS = 30
"""Pivoting takes 2 or 3 steps as a rule."""
_MOST_PIVOTS_OF_FEW = 12
_PATIENCE = 3
"""How often pivoting may go on without an improvement."""
_LEAST_PIVOT = 1e-12
"""Matrices with a smaller one get the ridge."""
_SUSPICION = 1e3
"""Combinations of unit rows that are shorter than their weights by this factor may vanish."""


# --- Gramians -------------------------------------------------------------------------------------


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


def norm_of(coefficients: Tensor, gramian: Tensor) -> float:
    """Return the length of the combination of rows with these coefficients."""
    return math.sqrt(max(float(coefficients @ gramian @ coefficients), 0.0))


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


# --- solvers --------------------------------------------------------------------------------------


def project_on_dual_cone(gramian: Tensor, start: Tensor) -> Tensor:
    r"""Return what to add to ``start`` so that the combination conflicts with no row.

    The dual cone of the rows is the set of directions with a non-negative inner product with each.
    The projection of :math:`J^T u` on it is :math:`J^T (u + \lambda)`, with :math:`\lambda \ge 0`,
    :math:`G (u + \lambda) \ge 0` and :math:`\lambda^T G (u + \lambda) = 0`: a non-negative
    least-squares problem, solved by block pivoting and, where that does not settle, by the
    active-set method of Lawson and Hanson ("Solving Least Squares Problems", 1974, chapter 23).

    Args:
        gramian: Shape (k, k), unit diagonal.
        start: The coefficients u, shape (k,).

    Returns:
        The multipliers, shape (k,).
    """
    linear = gramian @ start
    tolerance = _SOLVER_TOLERANCE * float(start.abs().sum())
    conflicting = (linear < 0).nonzero()[:, 0].tolist()
    if not conflicting:
        return torch.zeros_like(start)
    for ridge in _RIDGES:
        face = _pivot_to_face(gramian, torch.zeros_like(start), linear, 0.0, conflicting, ridge)
        if face is not None:
            multipliers = face.multipliers.clamp_min(0)
            slope = torch.addmv(linear, gramian, multipliers)
            beyond = torch.where(multipliers > 0, slope.abs(), -slope)
            if float(beyond.max()) <= tolerance:
                return multipliers
    return _add_rows_one_by_one(gramian, linear, tolerance)


def _add_rows_one_by_one(gramian: Tensor, linear: Tensor, tolerance: float) -> Tensor:
    """Lawson and Hanson's method."""
    size = len(gramian)
    target = -linear
    multipliers = torch.zeros_like(linear)
    free = torch.zeros(size, dtype=torch.bool, device="cpu")
    refused = torch.zeros(size, dtype=torch.bool, device="cpu")
    for _ in range(30 * size):
        slope = target - gramian @ multipliers
        slope[free | refused] = -math.inf
        entering = int(slope.argmax())
        if slope[entering] <= tolerance:
            return multipliers
        free[entering] = True
        while True:
            index = free.nonzero()[:, 0]
            solution = _solve(gramian[index][:, index], target[index, None])[:, 0]
            if bool((solution > 0).all()):
                break
            if float(solution[index == entering].sum()) <= 0:
                # Rounding alone made the entering row look useful.
                free[entering] = False
                refused[entering] = True
                index = solution = index[:0]
                break
            current = multipliers[index]
            shrinking = solution <= 0
            ratio = (current / (current - solution))[shrinking].min()
            current = (current + ratio * (solution - current)).clamp_min(0)
            current[shrinking & (current <= tolerance)] = 0
            blocking = torch.where(shrinking, current, math.inf).argmin()
            current[blocking] = 0
            multipliers[index] = current
            free[index[current == 0]] = False
        if len(index):
            multipliers = torch.zeros_like(linear)
            multipliers[index] = solution
            refused.zero_()
    raise ArithmeticError(f"the projection on the dual cone did not end within {30 * size} steps.")


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a positive semi-definite system; the shortest solution where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and float(factor.diagonal().min()) > _SAFE_PIVOT:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > RESOLUTION * len(values) * values[-1]
    vectors = vectors[:, kept]
    solution: Tensor = vectors @ ((vectors.T @ right) / values[kept, None])
    return solution


class _Face(NamedTuple):
    """Where pivoting came to rest."""

    multipliers: Tensor
    """lambda, shape (k,), zero off the face."""
    nearest: Tensor
    """C^-1 a on the face: its point of least norm, up to a factor."""


def _pivot_to_face(
    gramian: Tensor, sizes: Tensor, linear: Tensor, radius: float, start: list[int], ridge: float
) -> _Face | None:
    r"""Find the rows that count by exchanging many of them at once.

    Wanted are multipliers :math:`\lambda` and a height t with :math:`\lambda \ge 0`, slack
    :math:`s = C \lambda + \beta - t a \ge 0`, :math:`\lambda^T s = 0` and :math:`|U^T \lambda| =
    \phi`. If the rows with a multiplier are known, :math:`\lambda = t p - q` with :math:`C p = a`
    and :math:`C q = \beta` on these rows, and t is the larger root of a quadratic equation. Rows
    whose multiplier comes out negative then leave and those whose slack comes out negative enter,
    all at once, until none does. This is Newton's method on :math:`\min(\lambda, s) = 0`, known
    as block principal pivoting (Portugal, Judice, Vicente, "A comparison of block pivoting and
    interior-point algorithms for linear least squares problems with nonnegative variables", 1994).
    Where the number of exchanges does not fall, rows are exchanged one by one (Murty's rule), which
    ends for any t that is held.

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
    # MKL wakes all threads for matrices, at the price of many small solves, but not for vectors: so
    # the two right-hand sides are a batch, and the matrix has an LU instead of a Cholesky factor.
    count = len(gramian)
    right = torch.stack([sizes, -linear])
    a, b = right.unbind()
    sums = torch.cat([right, torch.ones_like(right[:1])])
    identity = torch.eye(count, dtype=gramian.dtype, device="cpu")
    ridged = gramian + ridge * identity if ridge else gramian
    least = 0.0 if ridge else _LEAST_PIVOT
    tolerance = _SOLVER_TOLERANCE * (float(linear.abs().max()) + radius)
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[start] = True
    fewest, patience = count + 1, _PATIENCE
    for _ in range(_MOST_PIVOTS):
        both = torch.outer(mask, mask)
        factor = torch.linalg.lu_factor_ex(torch.where(both, ridged, identity))
        if not float(factor.LU.diagonal().abs().min()) > least:
            return None
        masked = right * mask
        solution = _solve_both(factor, masked)
        p, q = solution.unbind()
        height, weight = _height((sums @ p).tolist(), (sums @ q).tolist(), radius)
        multipliers = torch.add(q, p, alpha=height)
        target = torch.add(b, a, alpha=height)
        # Minus the slack off the face; on it the multipliers, as the slack vanishes there.
        gain = torch.addmv(target + multipliers, gramian, multipliers, alpha=-1)
        wanted = gain > tolerance + RESOLUTION * abs(weight)
        changed = (wanted != mask).nonzero()[:, 0].tolist()
        if changed:
            if len(changed) < fewest:
                fewest, patience = len(changed), _PATIENCE
            elif patience:
                patience -= 1
            else:  # one row at a time, the last first, which cannot go round in circles
                wanted = mask.clone()
                wanted[changed[-1]].logical_not_()
            mask = wanted
            continue
        if ridge:  # take its effect away again: one step of iterative refinement
            face = torch.where(both, gramian, 0.0)
            residual = torch.stack([masked[0] - face @ p, masked[1] - face @ q])
            p, q = (solution + _solve_both(factor, residual)).unbind()
            height, _ = _height((sums @ p).tolist(), (sums @ q).tolist(), radius)
            multipliers = torch.add(q, p, alpha=height)
        return _Face(multipliers, p)
    return None


def _solve_both(factor: tuple[Tensor, Tensor, Tensor], right: Tensor) -> Tensor:
    """Solve for two right-hand sides, shape (2, k)."""
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


def vanishes(y: Tensor, gramian: Tensor) -> bool:
    """Whether the combination of unit rows cannot be told from zero by their Gramian."""
    bound = math.sqrt(RESOLUTION * len(y)) * float(y.abs().sum())
    return norm_of(y, gramian) <= bound


def minimize_by_pivoting(
    gramian: Tensor,
    linear: Tensor,
    radius: float,
    sizes: Tensor,
    face: list[int] | None = None,
) -> Tensor | None:
    """Solve the problem of :func:`minimize_linear_plus_norm` in a few steps, if that works.

    Args:
        gramian: As there.
        linear: As there.
        radius: As there.
        sizes: As there.
        face: The rows to start from.

    Returns:
        y, shape (k,), which is optimal: its duality gap was checked. Or a y whose combination
        vanishes, which is optimal if the minimum is not negative. None if neither was found.
    """
    if face is None:
        order, number = _guess_face(linear.tolist(), radius, sizes.tolist())
        face = order[:number]
    for ridge in _RIDGES:
        found = _pivot_to_face(gramian, sizes, linear, radius, face, ridge)
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
    return float(beyond) <= _SOLVER_TOLERANCE * scale + rounding


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
    tolerance = _SOLVER_TOLERANCE * (max(map(abs, linear)) + radius)
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
        if pivot <= _LEAST_PIVOT:
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
    if beyond > _SOLVER_TOLERANCE * (max(map(abs, linear)) + radius) + RESOLUTION * weight * factor:
        return None
    return [factor * x for x in multipliers]


def minimize_linear_plus_norm(
    gramian: Tensor,
    linear: Tensor,
    radius: float,
    sizes: Tensor,
    start: Tensor,
    *,
    may_vanish: bool,
) -> Tensor | None:
    r"""Minimise :math:`\beta^T y + \phi |U^T y|` over :math:`y \ge 0, a^T y = 1`.

    This is the dual problem of CAGrad (and, for :math:`\beta = 0`, the search for the point of
    least norm in a convex hull, MGDA) in variables that are scaled so that the rows of U are unit
    vectors. A primal active-set method: on each face the minimum has a closed form, so the result
    is exact up to rounding.

    With :math:`M = C + a a^T` on a face, :math:`p = M^{-1} a`, :math:`q = M^{-1} \beta`, the point
    of least norm of the face's affine hull is :math:`p / a^T p`, its distance from zero is m, and
    along :math:`z = (a^T q / a^T p) p - q` the objective is least at :math:`s = m / \sqrt{\phi^2 -
    r^2}`, where :math:`r^2 = z^T C z`; if :math:`r \ge \phi`, it falls without end along z.

    Args:
        gramian: C = U U^T, shape (k, k), unit diagonal.
        linear: beta, shape (k,).
        radius: phi, positive.
        sizes: a, shape (k,), positive, at most 1.
        start: A feasible y, shape (k,).
        may_vanish: Whether the combination may vanish at the minimum. It cannot where the minimum
            is known to be negative, however short the combination looks.

    Returns:
        y, shape (k,); None if the minimum lies where the combination vanishes (to the resolution of
        the Gramian), where the objective has a kink and y decides nothing.
    """
    problem = _Problem(gramian, linear, radius, sizes, may_vanish)
    y = _walk_over_faces(problem, start)
    if y is None or _excess(problem, y) <= _SOLVER_TOLERANCE:
        return y
    # Faces whose rows are all but dependent blur their own minimum. Growing the face from the best
    # single row adds only rows that lie apart.
    vertices = (linear + radius) / sizes
    single = torch.zeros_like(start)
    best = int(vertices.argmin())
    single[best] = 1 / sizes[best]
    again = _walk_over_faces(problem, single)
    if again is None:
        return None if may_vanish else y
    return min(y, again, key=lambda end: _excess(problem, end))


class _Problem(NamedTuple):
    """The arguments of :func:`minimize_linear_plus_norm` but for the start."""

    gramian: Tensor
    linear: Tensor
    radius: float
    sizes: Tensor
    may_vanish: bool


def _excess(problem: _Problem, y: Tensor) -> float:
    """Return by how much, relative to the problem's scale, y is not optimal (its duality gap)."""
    gramian, linear, radius, sizes, _ = problem
    slope = linear + radius / norm_of(y, gramian) * (gramian @ y)
    least = (slope / sizes).min()
    return float((slope @ y - least) / ((float(linear.abs().max()) + radius) / sizes.max()))


def _walk_over_faces(problem: _Problem, start: Tensor) -> Tensor | None:
    gramian, linear, radius, sizes, may_vanish = problem
    count = len(gramian)
    y = start.clone()
    scale = float(linear.abs().max()) + radius
    best = math.inf
    for _ in range(50 * count):
        face = (y > 0).nonzero()[:, 0]
        target, unbounded = _minimum_on_face(
            gramian[face][:, face], linear[face], radius, sizes[face]
        )
        direction = target if unbounded else target - y[face]
        ratios = torch.where(direction < 0, -y[face] / direction, math.inf)
        blocking = int(ratios.argmin())
        step = float(ratios[blocking])
        if (unbounded and step < math.inf) or step < 1:
            moved = (y[face] + step * direction).clamp_min(0)
            moved[blocking] = 0
            y[face] = moved
            y /= sizes @ y
            continue
        if not unbounded:
            y[face] = target
        image = gramian @ y
        length = math.sqrt(max(float(y @ image), 0.0))
        if length == 0 or (may_vanish and length <= math.sqrt(RESOLUTION * count) * float(y.sum())):
            return None
        slope = linear + radius / length * image
        value = float(slope @ y)
        reduced = slope - value * sizes
        reduced[face] = math.inf
        entering = int(reduced.argmin())
        # A value that no longer falls means that only rounding keeps the walk alive.
        if float(reduced[entering]) >= -_SOLVER_TOLERANCE * scale or value >= best:
            return y
        best = value
        y[entering] = torch.finfo(torch.float64).tiny  # on the face, and nothing else has changed
    raise ArithmeticError(f"the minimum on the simplex was not reached in {50 * count} steps.")


def _minimum_on_face(
    gramian: Tensor, linear: Tensor, radius: float, sizes: Tensor
) -> tuple[Tensor, bool]:
    """Return the minimiser on the affine hull, or a direction of endless descent and True."""
    largest = sizes.max()
    sizes = sizes / largest  # keeps the two terms of the matrix comparable
    matrix = gramian + sizes[:, None] * sizes
    p, q = _solve(matrix, torch.stack([sizes, linear], 1)).unbind(1)
    nearest = p / (sizes @ p)
    z = nearest * (sizes @ q) - q
    squared_speed = float(z @ gramian @ z)
    if squared_speed >= radius * radius:
        return z, True
    length = norm_of(nearest, gramian)
    target = nearest + length / math.sqrt(radius * radius - squared_speed) * z
    return target / largest, False
