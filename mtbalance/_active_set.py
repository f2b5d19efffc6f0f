"""Solvers that go from row to row, and end where pivoting does not settle.

In float64 on the CPU, on the Gramian of the unit rows, as the pivoting that they start from.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._gramians import RESOLUTION, norm_of, vanishes
from mtbalance._pivoting import RIDGES, SOLVER_TOLERANCE, pivot_to_face

_SAFE_PIVOT = 1e-5
"""Factors with a smaller pivot (unit rows closer than this) go to the eigenvalue solver."""


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
    tolerance = SOLVER_TOLERANCE * float(start.abs().sum())
    conflicting = (linear < 0).nonzero()[:, 0].tolist()
    if not conflicting:
        return torch.zeros_like(start)
    for ridge in RIDGES:
        face = pivot_to_face(gramian, torch.zeros_like(start), linear, 0.0, conflicting, ridge)
        if face is not None:
            multipliers = face.multipliers.clamp_min(0)
            slope = torch.addmv(linear, gramian, multipliers)
            beyond = torch.where(multipliers > 0, slope.abs(), -slope)
            if float(beyond.max()) <= tolerance:
                return multipliers
    return add_rows_one_by_one(gramian, linear, tolerance)


def shortest_with_products(gramian: Tensor, wanted: Tensor) -> Tensor | None:
    r"""Return the combination of unit rows that is the shortest with at least these products.

    Wanted is :math:`\min |x|` subject to :math:`\langle u_i, x \rangle \ge h_i`. With each row
    longer by what is wanted of it, :math:`(u_i, h_i)`, the projection of :math:`(0, -1)` on the
    dual cone of these is :math:`(x, -1) / (|x|^2 + 1)`, and 0 if there is no such x: the
    multipliers then combine the rows to zero and what is wanted of them to more than that, which
    proves it ("Least Distance Programming" in Lawson and Hanson, chapter 23).

    Args:
        gramian: C = U U^T, shape (k, k), unit diagonal.
        wanted: h, shape (k,).

    Returns:
        The coefficients, shape (k,), which are not negative; None if there is no such combination.
        That is said of projections which cannot be told from zero by the Gramian: of an x some 1e7
        times longer than what is wanted.
    """
    largest = float(wanted.max())
    if largest <= 0:
        return torch.zeros_like(wanted)
    count = len(wanted)
    # What is longer than any x that is found asks for nothing.
    heights = (wanted / largest).clamp_min(-1 / RESOLUTION)
    sizes = torch.hypot(heights, torch.ones_like(heights))
    lifted = torch.ones(count + 1, count + 1, dtype=gramian.dtype, device="cpu")
    lifted[:count, :count] = (gramian + torch.outer(heights, heights)) / torch.outer(sizes, sizes)
    lifted[count, :count] = lifted[:count, count] = -heights / sizes
    lifted.clamp_(-1, 1).fill_diagonal_(1)
    # The last row is what is projected. As a constraint it changes nothing: no projection conflicts
    # with its original.
    start = torch.zeros_like(lifted[0])
    start[count] = 1
    multipliers = project_on_dual_cone(lifted, start)
    if vanishes(start + multipliers, lifted):
        return None
    found = multipliers[:count] / sizes
    return found * (largest / (1 - float(found @ heights)))


def add_rows_one_by_one(
    gramian: Tensor, linear: Tensor, tolerance: float, face: Tensor | None = None
) -> Tensor:
    r"""Minimise :math:`\lambda^T G \lambda / 2 + q^T \lambda` by Lawson and Hanson's method.

    It begins with the rows of ``face``, a mask, but for those that would have no multiplier.
    """
    size = len(gramian)
    target = -linear
    none = torch.zeros(size, dtype=torch.bool, device="cpu")
    free, multipliers = _positive_part(gramian, target, none if face is None else face)
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


def _positive_part(gramian: Tensor, target: Tensor, face: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of a face that have positive multipliers on their own, and all multipliers."""
    free, multipliers = face.clone(), torch.zeros_like(target)
    while free.any():
        index = free.nonzero()[:, 0]
        solution = _solve(gramian[index][:, index], target[index, None])[:, 0]
        if bool((solution > 0).all()):
            multipliers[index] = solution
            break
        free[index[~(solution > 0)]] = False
    return free, multipliers


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
    if y is None or _excess(problem, y) <= SOLVER_TOLERANCE:
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
        if float(reduced[entering]) >= -SOLVER_TOLERANCE * scale or value >= best:
            return y
        best = value
        y[entering] = torch.finfo(torch.float64).tiny  # on the face, and nothing else has changed
    raise ArithmeticError(f"the minimum on the simplex was not reached in {50 * count} steps.")


def _minimum_on_face(
    gramian: Tensor, linear: Tensor, radius: float, sizes: Tensor
) -> tuple[Tensor, bool]:
    r"""Return the minimiser on the affine hull, or a direction of endless descent and True.

    With :math:`M = C + a a^T` on a face, :math:`p = M^{-1} a`, :math:`q = M^{-1} \beta`, the point
    of least norm of the face's affine hull is :math:`p / a^T p`, its distance from zero is m, and
    along :math:`z = (a^T q / a^T p) p - q` the objective is least at :math:`s = m / \sqrt{\phi^2 -
    r^2}`, where :math:`r^2 = z^T C z`; if :math:`r \ge \phi`, it falls without end along z.
    """
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
