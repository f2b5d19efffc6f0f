"""Weights under which every task gains what a power of its own weight asks for.

In float64 on the CPU, on the Gramian of the unit rows.
"""

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from mtbalance._active_set import minimize_linear_plus_norm
from mtbalance._gramians import vanishes
from mtbalance._pivoting import minimize_by_pivoting

STATIONARY = "a convex combination of the task gradients vanishes, so that none serves all tasks"
"""Why there may be no balance."""

_MOST_STEPS = 100
"""Newton's method takes 4 to 15 as a rule."""
_MOST_TRIALS = 60
_LARGEST_LOG = 300.0
"""Numbers with a logarithm up to this, and their squares, stay within float64."""
_LEAST = math.exp(-_LARGEST_LOG)
"""Parts of x below this fraction of the largest add nothing."""
_LAST_STEP = 1e-7
"""After a step that small, relative to x, the error is about its square."""
_ROUNDING = 1e-2
"""Below it steps shrink at least by half each, unless they are rounding alone."""
_VISIBLE = 1e-14
"""Changes of less than this fraction of the largest part are lost in the sum."""
_SUSPICION = 1e-6
"""Where unit rows cancel to the root of this fraction, some combination may vanish."""
_FAR = 2.0
"""Parts of x that are to grow by more than this factor are looked for on their own scale."""


class Balance(NamedTuple):
    """Where the gains are balanced."""

    x: Tensor
    """The solution up to a factor, shape (k,), positive, at most 1."""
    log_scale: float
    """The factor's logarithm."""


def balance_gains(gramian: Tensor, logs: Tensor, power: float) -> Balance | None:
    r"""Return the :math:`x > 0` with :math:`(C x)_i = c_i x_i^{-q}`.

    It minimises the convex :math:`x^T C x / 2 - \sum_i c_i x_i^{1 - q} / (1 - q)` (a logarithm for
    q = 1), by Newton's method with a search along each step; parts that are far from their scale
    are minimised over one by one. Where a convex combination of the rows vanishes there is none.

    Args:
        gramian: C, shape (k, k), unit diagonal.
        logs: log c, shape (k,): c itself may be more than float64 holds.
        power: q, positive.

    Returns:
        None if some convex combination cannot be told from zero by the Gramian.
    """
    if power > 1 and _some_combination_vanishes(gramian):
        return None  # the way to infinity is too slow to be noticed
    x = _start(gramian, logs, power)
    previous, may_vanish, swept = (math.inf, math.inf), power <= 1, False
    for _ in range(_MOST_STEPS):
        x = (x / x.max()).clamp_min(_LEAST)
        point = _Point.at(gramian, logs, x, power)
        if may_vanish and float(point.gains.sum()) < _SUSPICION * float(x.sum()) ** 2:
            may_vanish = False
            if _some_combination_vanishes(gramian):
                return None
        step = _newton_step(point, power)
        length, seen = float(step.abs().max()), float((x * step).abs().max())
        settled = length > _ROUNDING and seen <= _VISIBLE
        if not math.isfinite(length) or (settled and swept):
            break
        if length > _ROUNDING:
            previous, swept = (math.inf, math.inf), settled
            if not settled:
                x = x * (1 + _stretch(point, step, power) * step)
            if settled or float(step.max()) > _FAR:
                x = _one_by_one(gramian, logs + point.shift, x, power)
            continue
        if length > 0.5 * previous[0] and seen > 0.5 * previous[1]:
            break
        x, previous = x * (1 + step), (length, seen)
        if length <= _LAST_STEP:
            break
    x = x / x.max()
    return Balance(x, -_shift(gramian, logs, x, power) / (1 + power))


def _some_combination_vanishes(gramian: Tensor) -> bool:
    """Whether some convex combination of the unit rows cannot be told from zero."""
    if bool((gramian >= 0).all()):
        return False
    ones = torch.ones_like(gramian[0])
    y = minimize_by_pivoting(gramian, 0 * ones, 1.0, ones)
    if y is None:
        start = ones / len(ones)
        y = minimize_linear_plus_norm(gramian, 0 * ones, 1.0, ones, start, may_vanish=True)
    return y is None or vanishes(y, gramian)


class _Point(NamedTuple):
    """What is known at some x, in units in which x is best on its own ray."""

    products: Tensor
    """x_i C_ij x_j, shape (k, k)."""
    gains: Tensor
    """x_i (C x)_i, shape (k,)."""
    wanted: Tensor
    """c_i x_i^(1 - q), what the gains are to become."""
    shift: float
    """What the units add to log c."""

    @classmethod
    def at(cls, gramian: Tensor, logs: Tensor, x: Tensor, power: float) -> "_Point":
        products = gramian * torch.outer(x, x)
        gains = products.sum(1)
        log_wanted = logs + (1 - power) * x.log()
        total = max(float(gains.sum()), _LEAST)
        shift = math.log(total) - float(torch.logsumexp(log_wanted, 0))
        wanted = (log_wanted + shift).clamp_min(-2 * _LARGEST_LOG).exp()
        return cls(products, gains, wanted, shift)


def _shift(gramian: Tensor, logs: Tensor, x: Tensor, power: float) -> float:
    """Return what to add to log c so that x is best on its own ray."""
    return _Point.at(gramian, logs, x, power).shift


def _start(gramian: Tensor, logs: Tensor, power: float) -> Tensor:
    """Return the better of the answers for orthogonal and for parallel rows."""
    best, least = torch.ones_like(logs), math.inf
    for exponent in (1 / (1 + power), 1 / power):
        x = ((logs - logs.max()) * exponent).clamp_min(-_LARGEST_LOG).exp()
        # On the best scale the objective is (1 + q) / (2 q - 2) times the gains, or minus a sum of
        # logarithms: this grows with both.
        shift = _shift(gramian, logs, x, power)
        if power == 1:
            value = shift / 2 * float(logs.exp().sum()) - float(logs.exp() @ x.log())
        else:
            log_gains = math.log(max(float(x @ gramian @ x), _LEAST)) - 2 * shift / (1 + power)
            value = log_gains * (power - 1)
        if value < least:
            best, least = x, value
    return best


def _newton_step(point: _Point, power: float) -> Tensor:
    """Return Newton's step relative to x."""
    roots = point.wanted.sqrt()
    matrix = point.products / torch.outer(roots, roots)
    matrix.diagonal().add_(power)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    right = ((point.wanted - point.gains) / roots)[:, None]
    step: Tensor = torch.cholesky_solve(right, factor)[:, 0] / roots
    return step


def _stretch(point: _Point, step: Tensor, power: float) -> float:
    """Return about how many steps away the objective is least along the step."""
    curvature = float(step @ point.products @ step)
    constant = float(step @ point.gains)
    parts: list[tuple[float, float]]
    parts = list(zip(step.tolist(), point.wanted.tolist(), strict=True))

    def slope(t: float) -> float:
        logs = [-power * math.log(max(1 + t * d, sys.float_info.min)) for d, _ in parts]
        powers = [math.exp(min(log, _LARGEST_LOG)) for log in logs]
        return (
            constant
            + t * curvature
            - sum(d * e * p for (d, e), p in zip(parts, powers, strict=True))
        )

    enough = 0.1 * abs(slope(0.0))
    shortest = min(d for d, _ in parts)
    low, high = 0.0, -1 / shortest if shortest < 0 else math.inf
    t = 1.0 if high > 1 else 0.9 * high
    for _ in range(_MOST_TRIALS):
        at = slope(t)
        if abs(at) <= enough:
            break
        if at < 0:
            low, t = t, min(4 * t, (t + high) / 2)
        else:
            high, t = t, (low + t) / 2
    return t


def _one_by_one(gramian: Tensor, logs: Tensor, x: Tensor, power: float) -> Tensor:
    """Minimise over each part of x in turn, which finds parts of any size at once."""
    parts = x.tolist()
    for i, (row, log) in enumerate(zip(gramian.tolist(), logs.tolist(), strict=True)):
        parts[i] = 0.0
        parts[i] = _minimum(sum(map(float.__mul__, row, parts)), log, power)
    return torch.tensor(parts, dtype=torch.float64, device="cpu")


def _minimum(others: float, log: float, power: float) -> float:
    r"""Return the x with x + r = c x^(-q) for r = ``others`` and log c = ``log``.

    With r below 0, y = x + r takes the place of x. Either way log(e^z + |r|) and z, one of them
    times q, add up to log c: Newton's method, from where the lower of two bounds is met.
    """
    size = abs(others)
    inner, outer = (1.0, power) if others >= 0 else (power, 1.0)
    z = log / (1 + power)
    if size > 0:
        log_size = math.log(size)
        z = min(z, (log - inner * log_size) / outer)
        for _ in range(_MOST_TRIALS):
            share = 1 / (1 + math.exp(min(log_size - z, _LARGEST_LOG)))
            joined = max(z, log_size) + math.log1p(math.exp(-abs(z - log_size)))
            change = (inner * joined + outer * z - log) / (inner * share + outer)
            z -= change
            if abs(change) <= _ROUNDING:
                break
    y = math.exp(max(-_LARGEST_LOG, min(z, _LARGEST_LOG)))
    return y if others >= 0 else y + size
