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
from mtbalance._pivoting import dot, minimize_by_pivoting

STATIONARY = "a convex combination of the task gradients vanishes, so that none serves all tasks"
"""Why there may be no balance."""
UNSOLVED = "Newton's method has not found where the gains are balanced, and weights are 0"
"""Why there may be no answer."""

_MOST_STEPS = 60
"""Newton's method takes 4 to 15 as a rule."""
_MOST_TRIALS = 60
_LARGEST_LOG = 300.0
"""Numbers with a logarithm up to this, and their squares, stay within float64."""
_LEAST = math.exp(-_LARGEST_LOG)
"""Parts of x below this fraction of the largest add nothing."""
_LAST_STEP = 1e-7
"""After a step that small, relative to x, the error is about its square."""
_ROUNDING = 1e-2
"""Below it, over q above 1, steps shrink at least by half each, unless they are rounding alone."""
_VISIBLE = 1e-14
"""Changes of less than this fraction of the largest part are lost in the sum."""
_SUSPICION = 1e-6
"""Where unit rows cancel to the root of this fraction, some combination may vanish."""
_CLOSE = 1e-5
"""How far the direction may be off at the end, as a fraction of its length."""
_FAR = 2.0
"""Parts of x that are to grow by more than this factor are looked for on their own scale."""


class Balance(NamedTuple):
    """Where the gains are balanced."""

    x: Tensor
    """The solution up to a factor, shape (k,), positive, at most 1."""
    log_scale: float
    """The factor's logarithm."""


def balance_gains(gramian: Tensor, logs: Tensor, power: float) -> Balance | str:
    r"""Return the :math:`x > 0` with :math:`(C x)_i = c_i x_i^{-q}`.

    It minimises the convex :math:`x^T C x / 2 - \sum_i c_i x_i^{1 - q} / (1 - q)` (a logarithm for
    q = 1), by Newton's method with a search along each step; parts that are far from their scale
    are minimised over one by one. Where a convex combination of the rows vanishes there is none.

    Args:
        gramian: C, shape (k, k), unit diagonal.
        logs: log c, shape (k,): c itself may be more than float64 holds.
        power: q, positive.

    Returns:
        Why there is none: ``STATIONARY`` if some convex combination cannot be told from zero by the
        Gramian, ``UNSOLVED`` if the steps end elsewhere.
    """
    if power > 1 and _some_combination_vanishes(gramian):
        return STATIONARY  # the way to infinity is too slow to be noticed
    problem = _Problem(gramian, logs.tolist(), power)
    x, short = _start(problem), _ROUNDING / max(1.0, power)
    previous, may_vanish, swept = (math.inf, math.inf), power <= 1, False
    for _ in range(_MOST_STEPS):
        point = _Point.at(problem, x)
        if may_vanish and sum(point.gains) < _SUSPICION * sum(point.x) ** 2:
            may_vanish = False
            if _some_combination_vanishes(gramian):
                return STATIONARY
        step = _newton_step(problem, point)
        length = max(map(abs, step))
        seen = max(abs(a * b) for a, b in zip(point.x, step, strict=True))
        settled = length > short and seen <= _VISIBLE
        if not math.isfinite(sum(step)) or (settled and swept):
            break
        if length > short:
            previous, swept = (math.inf, math.inf), settled
            x = point.x if settled else point.moved(step, _stretch(problem, point, step))
            if settled or max(step) > _FAR:
                x = _one_by_one(problem, point.shift, x)
            continue
        if length > 0.5 * previous[0] and seen > 0.5 * previous[1]:
            break
        x, previous = point.moved(step, 1.0), (length, seen)
        if length <= _LAST_STEP:
            break
    return _balance_at(problem, x)


def _balance_at(problem: "_Problem", x: list[float]) -> Balance | str:
    point = _Point.at(problem, x)
    if not _squared_error(problem, point) <= _CLOSE**2:
        return UNSOLVED
    return Balance(_tensor(point.x), -point.shift / (1 + problem.power))


class _Problem(NamedTuple):
    """The arguments of :func:`balance_gains`."""

    gramian: Tensor
    logs: list[float]
    power: float


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


# Vectors are lists of numbers from here on: where there are few, each call on tensors costs more.


class _Point(NamedTuple):
    """What is known at some x, in units in which x is best on its own ray."""

    x: list[float]
    """Scaled to a largest part of 1."""
    gains: list[float]
    """x_i (C x)_i."""
    wanted: list[float]
    """c_i x_i^(1 - q), what the gains are to become."""
    shift: float
    """What the units add to log c."""

    @classmethod
    def at(cls, problem: _Problem, x: list[float]) -> "_Point":
        largest = max(x)
        x = [max(part / largest, _LEAST) for part in x]
        gains = [a * b for a, b in zip(x, _image(problem, x), strict=True)]
        bend = 1 - problem.power
        logs = [log + bend * math.log(part) for log, part in zip(problem.logs, x, strict=True)]
        most = max(logs)
        total = most + math.log(sum(math.exp(log - most) for log in logs))
        shift = math.log(max(sum(gains), _LEAST)) - total
        wanted = [math.exp(max(log + shift, -2 * _LARGEST_LOG)) for log in logs]
        return cls(x, gains, wanted, shift)

    def moved(self, step: list[float], times: float) -> list[float]:
        """Return x after a step relative to it."""
        return [part * (1 + times * change) for part, change in zip(self.x, step, strict=True)]


def _image(problem: _Problem, x: list[float]) -> list[float]:
    """Return C x."""
    image: list[float] = (problem.gramian @ _tensor(x)).tolist()
    return image


def _tensor(numbers: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _start(problem: _Problem) -> list[float]:
    """Return the better of the answers for orthogonal and for parallel rows."""
    power, most = problem.power, max(problem.logs)
    best, least = [1.0] * len(problem.logs), math.inf
    if min(problem.logs) == most:
        return best
    for exponent in (1 / (1 + power), 1 / power):
        logs = [max((log - most) * exponent, -_LARGEST_LOG) for log in problem.logs]
        x = [math.exp(log) for log in logs]
        point = _Point.at(problem, x)
        # On the best scale the objective is (1 + q) / (2 q - 2) times the gains, or minus a sum of
        # logarithms: this grows with both.
        if power == 1:
            weights = [math.exp(log) for log in problem.logs]
            value = point.shift / 2 * sum(weights) - dot(weights, logs)
        else:
            log_gains = math.log(max(sum(point.gains), _LEAST)) - 2 * point.shift / (1 + power)
            value = log_gains * (power - 1)
        if value < least:
            best, least = x, value
    return best


def _newton_step(problem: _Problem, point: _Point) -> list[float]:
    """Return Newton's step relative to x."""
    roots = [math.sqrt(part) for part in point.wanted]
    scaled = [part / root for part, root in zip(point.x, roots, strict=True)]
    right = [(w - g) / r for w, g, r in zip(point.wanted, point.gains, roots, strict=True)]
    both = _tensor([scaled, right])
    matrix = problem.gramian * torch.outer(both[0], both[0])
    matrix.diagonal().add_(problem.power)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(both[1, :, None], factor)[:, 0].tolist()
    step = [part / root for part, root in zip(solution, roots, strict=True)]
    # Parts that are as small as can be stay, or steps would be cut short to keep them positive.
    held = [part <= _LEAST and change < 0 for part, change in zip(point.x, step, strict=True)]
    return [0.0 if hold else change for hold, change in zip(held, step, strict=True)]


def _squared_error(problem: _Problem, point: _Point) -> float:
    r"""Return how far the direction may be off, squared, as a fraction of its squared length.

    Half of it bounds the gap to the dual problem, and so to the least value, which the quadratic
    term turns into a distance. With :math:`l_i` the logarithm of what is wanted over what is gained
    and n the larger of 1 and 1 / q, a part adds at most its gain times
    :math:`l_i^2 e^{n \max(l_i, 0)} / q`, or twice its gain if it gains more than is wanted. Gains
    count as those next to what is wanted that rounding leaves possible.
    """
    rounding = _VISIBLE * sum(point.x)
    steepness = max(1.0, 1 / problem.power)
    error = 0.0
    for part, gain, wanted in zip(*point[:3], strict=True):
        possible = min(max(wanted, gain - rounding * part), gain + rounding * part)
        if possible <= 0:
            return math.inf
        log = math.log(wanted) - math.log(possible)
        if log > 0:
            growth = math.exp(min(steepness * log, _LARGEST_LOG))
            error += possible * log**2 / problem.power * growth
        else:
            error += possible * min(log**2 / problem.power, 2.0)
    return error / max(sum(point.gains), _LEAST)


def _stretch(problem: _Problem, point: _Point, step: list[float]) -> float:
    """Return about how many steps away the objective is least along the step."""
    change = [a * b for a, b in zip(point.x, step, strict=True)]
    curvature = dot(change, _image(problem, change))
    constant = dot(step, point.gains)
    parts = list(zip(step, point.wanted, strict=True))

    def slope(t: float) -> float:
        logs = [-problem.power * math.log(max(1 + t * d, sys.float_info.min)) for d, _ in parts]
        powers = [math.exp(min(log, _LARGEST_LOG)) for log in logs]
        return (
            constant
            + t * curvature
            - sum(d * e * p for (d, e), p in zip(parts, powers, strict=True))
        )

    enough = 0.1 * abs(slope(0.0))
    shortest = min(step)
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


def _one_by_one(problem: _Problem, shift: float, x: list[float]) -> list[float]:
    """Minimise over each part of x in turn, which finds parts of any size at once."""
    parts = list(x)
    for i, (row, log) in enumerate(zip(problem.gramian.tolist(), problem.logs, strict=True)):
        parts[i] = 0.0
        parts[i] = _minimum(dot(row, parts), log + shift, problem.power)
    return parts


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
