r"""Projections of all rows on their dual cone: many problems with one Gramian, solved together.

Each row's problem is that of :func:`mtbalance._active_set.project_on_dual_cone`, with a column of
the Gramian as its linear term, and block pivoting exchanges rows in all of them at once. The faces
of different problems have much in common: so multipliers and slacks change places once for all in
the rows that most of them have on their face, and what is solved for each problem is only as large
as its face differs from that (a principal pivot transform: Cottle, Pang and Stone, "The Linear
Complementarity Problem", 1992, section 2.3).

In float64 on the CPU, on the Gramian of the unit rows.
"""

import torch
from torch import Tensor

from mtbalance._active_set import add_rows_one_by_one
from mtbalance._gramians import RESOLUTION
from mtbalance._pivoting import LEAST_PIVOT, PATIENCE, RIDGES, SOLVER_TOLERANCE

_MOST_PIVOTS = (12, 40)
"""How often rows are exchanged, for each of the ridges; 3 to 8 times as a rule."""
_UNWATCHED = 6
"""How many exchanges are made before it is watched whether they lead anywhere."""
_FEW = 64
"""Up to this many rows, to find what faces have in common takes longer than it saves."""
_SAFE_PIVOT = 1e-3
"""Rows that are closer than this to the span of others are not taken for what faces share."""
_PIVOT_IF_DEPENDENT = 1e-6
"""What stands for a row that depends on those before it. So far from a safe one that only
combinations with coefficients of a thousand could pass for independent."""
_ENTRIES = 2**20
"""Of the systems that are solved at a time, 8 MB, so that memory is that of the Gramian."""


def project_each_on_dual_cone(gramian: Tensor) -> Tensor:
    """Project every row on the dual cone of all: ``project_on_dual_cone`` of unit vectors.

    The rows' problems are solved together, pivot by pivot; those that do not settle, one by one.

    Args:
        gramian: Shape (k, k), unit diagonal.

    Returns:
        The multipliers, shape (k, k), those of one row's projection in each row.
    """
    multipliers = torch.zeros_like(gramian)
    left = (gramian < 0).any(1).nonzero()[:, 0]
    masks = gramian[left] < 0
    for ridge, most in zip(RIDGES, _MOST_PIVOTS, strict=True):
        if len(left):
            left, masks = _pivot_each(gramian, left, masks, multipliers, ridge, most)
    _project_one_by_one(gramian, left, masks, multipliers)
    return multipliers


def _project_one_by_one(gramian: Tensor, left: Tensor, masks: Tensor, multipliers: Tensor) -> None:
    r"""Write the multipliers of these problems, none twice that the answer of another tells.

    A combination :math:`y \ge 0` of the rows that vanishes tells of every row with a part in it
    that minus it is a combination of the others: :math:`y / y_i` vanishes, too.
    """
    done = torch.zeros(len(gramian), dtype=torch.bool, device="cpu")
    for number, mask in zip(left.tolist(), masks, strict=True):
        if done[number]:
            continue
        found = add_rows_one_by_one(gramian, gramian[number], SOLVER_TOLERANCE, mask)
        multipliers[number] = found
        combination = found.clone()
        combination[number] += 1
        slope = float((gramian @ combination).abs().max())
        served = left[combination[left] * RESOLUTION > slope]
        served = served[~done[served] & (served != number)]
        multipliers[served] = combination / combination[served, None]
        multipliers[served, served] = 0  # it is projected itself
        done[served] = True


def _pivot_each(
    gramian: Tensor, left: Tensor, masks: Tensor, multipliers: Tensor, ridge: float, most: int
) -> tuple[Tensor, Tensor]:
    """Write the multipliers of the problems that settle, and return the others and their faces."""
    ridged = gramian
    if ridge:
        ridged = gramian.clone()
        ridged.diagonal().add_(ridge)
    faces = _Faces(masks)
    singular, singular_masks = [], []
    for _ in range(most):
        linear = gramian[left]
        found = _Tableau(gramian, ridged, faces.masks).multipliers(faces.masks, linear)
        slope = torch.addmm(linear, found, gramian)
        wanted = torch.where(faces.masks, found, -slope) > SOLVER_TOLERANCE
        slope = torch.addmm(linear, found.clamp_(min=0), gramian)
        beyond = torch.where(found > 0, slope.abs(), -slope).amax(1)
        solved = beyond <= SOLVER_TOLERANCE
        if bool(solved.all()):
            multipliers[left] = found
            left, faces.masks = left[:0], faces.masks[:0]
            break
        multipliers[left[solved]] = found[solved]
        goes_on = beyond > SOLVER_TOLERANCE
        failed = ~(solved | goes_on)  # with NaN, of a singular system
        singular.append(left[failed])
        singular_masks.append(faces.masks[failed])
        left = left[goes_on]
        faces.exchange(wanted, goes_on)
        if len(left) == 0:
            break
    return torch.cat([*singular, left]), torch.cat([*singular_masks, faces.masks])


class _Faces:
    """The rows that are taken for those with a multiplier, in each of n problems.

    Args:
        masks: The rows to start from, shape (n, k).
    """

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks
        self._rounds = 0
        self._fewest = self._patience = torch.empty(0, device="cpu")

    def exchange(self, wanted: Tensor, goes_on: Tensor) -> None:
        """Go on to what some of the problems want, or by one row where that goes in circles."""
        self._rounds += 1
        if self._rounds <= _UNWATCHED:
            self.masks = wanted[goes_on]
            return
        masks = self.masks[goes_on]
        changes = wanted[goes_on] != masks
        count = changes.sum(1)
        if self._rounds == _UNWATCHED + 1:
            fewest, patience = count, torch.full_like(count, PATIENCE)
        else:
            fewest, patience = self._fewest[goes_on], self._patience[goes_on]
            patience = torch.where(count < fewest, PATIENCE, patience - 1)
        # The last row, as no order of exchanges comes back to a face then (Murty's rule).
        last = changes & (changes.flip(1).cumsum(1).flip(1) == 1)
        self.masks = masks ^ torch.where((patience < 0)[:, None], last, changes)
        self._fewest, self._patience = torch.minimum(count, fewest), patience


class _Tableau:
    r"""The equations :math:`w = q + C \lambda` after an exchange of both sides in some rows.

    Args:
        gramian: C, shape (k, k).
        ridged: The same with a ridge, which systems are solved with.
        masks: The faces that it is to serve, shape (n, k).
    """

    def __init__(self, gramian: Tensor, ridged: Tensor, masks: Tensor) -> None:
        self._gramian = gramian
        self._least = LEAST_PIVOT if ridged is gramian else 0.0
        self._base = _shared_by(masks, ridged) if len(gramian) > _FEW else None
        self._matrix = ridged if self._base is None else _exchanged(ridged, self._base)
        self._is_exact = self._matrix is gramian

    def multipliers(self, masks: Tensor, linear: Tensor) -> Tensor:
        """Return the multipliers on each face, shape (n, k); NaN where a system is singular.

        Args:
            masks: The faces, shape (n, k).
            linear: q, shape (n, k).
        """
        differs = masks if self._base is None else masks ^ self._base
        sizes = differs.sum(1)
        largest = int(sizes.max())
        if len(masks) * largest**2 <= _ENTRIES:
            return self._solve(masks, differs, linear, largest)
        found = torch.empty_like(linear)
        order = sizes.argsort()
        while len(order):  # the largest first, as many as there is room for
            largest = max(int(sizes[order[-1]]), 1)
            part = order[-max(1, _ENTRIES // largest**2) :]
            order = order[: -len(part)]
            found[part] = self._solve(masks[part], differs[part], linear[part], largest)
        return found

    def _solve(self, masks: Tensor, differs: Tensor, linear: Tensor, largest: int) -> Tensor:
        """Return the multipliers of some problems, in whose systems there are so many rows."""
        index = differs.to(torch.int8).argsort(1, descending=True)[:, :largest]
        within = differs.gather(1, index)
        both = within[:, :, None] & within[:, None, :]
        identity = torch.eye(largest, dtype=linear.dtype, device="cpu")
        systems = self._matrix[index[:, :, None], index[:, None, :]]
        factor = torch.linalg.lu_factor_ex(torch.where(both, systems, identity))

        def solution(right: Tensor) -> Tensor:
            exchanged = self._exchange(right)
            numbers = torch.where(within, -exchanged.gather(1, index), 0.0)
            x = torch.linalg.lu_solve(factor.LU, factor.pivots, numbers[:, :, None])[:, :, 0]
            entering = torch.zeros_like(right).scatter_(1, index, x)
            if self._base is None:
                return entering
            others = torch.addmm(exchanged, entering, self._matrix.T)
            return torch.where(masks, torch.where(self._base, others, entering), 0.0)

        found = solution(linear)
        small = factor.LU.diagonal(dim1=1, dim2=2).abs() <= self._least
        found.masked_fill_(small.any(1, keepdim=True), torch.nan)
        if self._is_exact:
            return found
        # One step of iterative refinement takes away the ridge, and the rounding of the exchange.
        return found + solution(torch.addmm(linear, found, self._gramian))

    def _exchange(self, right: Tensor) -> Tensor:
        """Return q after the exchange, shape (n, k)."""
        if self._base is None:
            return right
        moved = torch.where(self._base, right, 0.0)
        return torch.addmm(right - moved, moved, self._matrix.T, alpha=-1)


def _shared_by(masks: Tensor, gramian: Tensor) -> Tensor | None:
    """Return which rows most faces have, but those near the span of others, (k,); None if none."""
    popularity = masks.sum(0)
    order = popularity.argsort(descending=True, stable=True)
    order = order[: int((2 * popularity > len(masks)).sum())]
    part = gramian[order][:, order]
    part.diagonal().add_(_PIVOT_IF_DEPENDENT**2)
    factor, info = torch.linalg.cholesky_ex(part)
    apart = order[factor.diagonal() > _SAFE_PIVOT]
    if int(info) or len(apart) == 0:
        return None
    base = torch.zeros_like(masks[0])
    base[apart] = True
    return base


def _exchanged(gramian: Tensor, base: Tensor) -> Tensor:
    """Return the matrix of the equations after the exchange in the rows of the base, (k, k)."""
    rows, others = base.nonzero()[:, 0], (~base).nonzero()[:, 0]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gramian[rows][:, rows]))
    across = inverse @ gramian[rows][:, others]
    matrix = torch.empty_like(gramian)
    matrix[rows[:, None], rows] = inverse
    matrix[rows[:, None], others] = -across
    matrix[others[:, None], rows] = across.T
    matrix[others[:, None], others] = gramian[others][:, others] - gramian[others][:, rows] @ across
    return matrix
