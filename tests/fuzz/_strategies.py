"""The strategies once more, slowly: loops over vectors in float64, and nothing of the library."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tests import _oracles

Array = np.ndarray
_VANISHES = 1e-9
"""A combination of unit rows that is shorter is taken for zero."""


KEPT = ("PCGrad", "CAGrad", "Normalized")
"""Strategies whose coefficients are unique, so that steps may be told which were kept."""

OTHERS = ["UPGrad", "Normalized"]
"""Strategies that stand for all of their kind: solved for on the Gramian, or around another."""


class Answer(NamedTuple):
    """The directions that are right."""

    directions: Array
    """Shape (k, p): any of them, or entry by entry."""
    coefficients: Array | None
    """Shape (k, m), of the weighted rows, where each direction is one combination."""
    slack: Array
    """How uncertain float64 leaves the entries, shape (p,)."""
    entrywise: bool = False
    """Whether each entry may come from any of the directions."""


class Strategy:
    """A gradient strategy with its memory.

    Args:
        name: Its class.
        options: What the class is made with.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.options = dict(options)
        self.reset()

    def reset(self) -> None:
        self.generator = torch.Generator().manual_seed(self.options.get("seed", 0))

    def answer(self, rows: Array, *, ordered: bool, tremor: float) -> Answer:
        """Return the right directions for rows of shape (m, p).

        Args:
            rows: The weighted rows.
            ordered: Whether the columns are in the library's order, on which draws depend.
            tremor: How far, relative to their entries, the library's rows may be from these: the
                direction may be as far off as moving them by that moves it.
        """
        if self.name == "GradDrop":
            return self._graddrop(rows, ordered=ordered, tremor=tremor)
        coefficients = np.array(list(self._coefficients(rows)))
        directions = coefficients @ rows
        slack = np.zeros(rows.shape[1])
        drawn = np.random.default_rng(0)
        if len(rows) > 1 and not self._is_kink(rows):
            for _ in range(2):
                moved = rows * (1 + tremor * drawn.standard_normal(rows.shape))
                other = np.array(list(self._coefficients(moved))) @ moved
                slack = np.maximum(slack, 10 * np.abs(other - directions).max())
        else:
            slack += 1e-8 * np.abs(rows).sum(0)
        return Answer(directions, coefficients, slack)

    def _coefficients(self, rows: Array) -> Iterator[Array]:
        m = len(rows)
        if self.name == "Sum":
            yield np.ones(m)
        elif self.name == "CAGrad":
            yield cagrad(rows, self.options["c"], self.options["rescale"])
        elif self.name == "UPGrad":
            yield sum(self._projected(rows, task) for task in range(m))
        elif self.name == "Normalized":
            yield self._to_one_length(rows)
        else:
            yield from self._pcgrad(rows)

    def _projected(self, rows: Array, task: int) -> Array:
        """Return the coefficients of a row's projection on the dual cone of all rows."""
        norms = np.linalg.norm(rows, axis=1)
        alive = norms > 1e-30 * norms.max()
        found = np.eye(len(rows))[task]
        if alive[task]:
            units = rows[alive] / norms[alive, None]
            added = _oracles.nonnegative_least_squares(units.T, -rows[task] / norms[task])
            found[alive] += added * norms[task] / norms[alive]
        return found

    def _to_one_length(self, rows: Array) -> Array:
        """Return by what each row is multiplied, on its own; the strategy within is `Sum`."""
        norms = np.linalg.norm(rows, axis=1)
        alive = norms > 1e-30 * norms.max(initial=0)
        if not alive.any():
            return np.zeros(len(rows))
        length = {"mean": np.mean, "max": np.max, "min": np.min}[self.options["scale"]]
        factors = np.zeros(len(rows))
        factors[alive] = length(norms[alive]) / norms[alive]
        return factors

    def _pcgrad(self, rows: Array) -> Iterator[Array]:
        """Project vectors that remember of what they are made."""
        m, p = rows.shape
        marked = np.hstack([rows, np.eye(m)])
        norms = np.linalg.norm(rows, axis=1)
        counts = norms > 1e-30 * norms.max()
        outcomes = []
        for task in range(m):
            others = [j for j in range(m) if j != task]
            orders = [others] if self.options.get("order") == "fixed" else None
            found = []
            for order in orders or itertools.permutations(others):
                g = marked[task].copy()
                for j in order:
                    length = rows[j] @ rows[j]
                    inner = g[:p] @ rows[j]
                    if counts[j] and inner < 0:
                        g -= inner / length * marked[j]
                found.append(g[p:])
            if self.options.get("expectation"):
                found = [np.mean(found, axis=0)]
            outcomes.append(found)
        for choice in itertools.product(*outcomes):
            yield np.sum(choice, axis=0)

    def _is_kink(self, rows: Array) -> bool:
        return self.name == "CAGrad" and vanishing(rows)

    def _graddrop(self, rows: Array, *, ordered: bool, tremor: float) -> Answer:
        seed = int(torch.randint(2**62, (), generator=self.generator))
        leak = self.options["leak"]
        positive, negative = np.maximum(rows, 0).sum(0), np.minimum(rows, 0).sum(0)
        ends = np.array([positive, negative])
        both = leak * (positive + negative) + (1 - leak) * ends
        slack = (1e-15 + tremor) * np.abs(rows).sum(0)
        if not ordered:
            return Answer(both, None, slack, entrywise=True)
        chosen = []
        for column in range(rows.shape[1]):
            draw = (1 + _oracles.numbered_draw(seed, column)) / 2
            size = positive[column] - negative[column]
            purity = positive[column] / size if size else 0.5
            # float32 may see the two the other way round where they are almost equal.
            close = abs(purity - draw) < 1e-6 + tremor
            chosen.append([0, 1] if close else [0, 0] if purity > draw else [1, 1])
        picked = np.array(chosen).T
        return Answer(np.take_along_axis(both, picked, 0), None, slack, entrywise=True)


def vanishing(rows: Array) -> bool:
    """Return whether some convex combination of the rows that count vanishes."""
    rows, norms = _alive(rows)
    if len(rows) == 0:
        return True
    units = rows / norms[:, None]
    y = _oracles.least_norm_weights(units, np.ones(len(units)))
    return bool(np.linalg.norm(y @ units) < _VANISHES)


def _alive(rows: Array) -> tuple[Array, Array]:
    norms = np.linalg.norm(rows, axis=1)
    alive = norms > 1e-30 * norms.max(initial=0)
    return rows[alive], norms[alive]


def cagrad(rows: Array, c: float, rescale: int) -> Array:
    """Return the coefficients of CAGrad's direction, by trying every set of worst-off tasks.

    On a set S, the direction is g0 + phi u with |u| = 1 and <g_i, g0 + phi u> = t for all i in S,
    u in the span of S: a quadratic equation for t. All of these lie in the ball, so that the one
    with the largest worst case is the solution.
    """
    m = len(rows)
    norms = np.linalg.norm(rows, axis=1)
    alive = [i for i in range(m) if norms[i] > 1e-30 * norms.max()]
    mean = rows.sum(0) / m
    length = np.linalg.norm(mean)
    factor = m / _oracles.divisor(c, rescale)
    base = np.full(m, 1 / m)
    if not alive:
        return factor * base
    if c == 0 or length <= 1e-15 * norms.max():
        return factor * base
    phi = c * length
    if vanishing(rows):
        chosen, norm = rows[alive], norms[alive]
        units = chosen / norm[:, None]
        y = _oracles.nonnegative_least_squares(units.T, -mean)
        if np.linalg.norm(y @ units) <= phi:
            base[alive] += y / norm
            return factor * base
    best, found = -math.inf, base
    for size in range(1, len(alive) + 1):
        for chosen_tasks in itertools.combinations(alive, size):
            for y in _worst_off(rows[list(chosen_tasks)], mean, phi):
                if (y < -1e-9 * np.abs(y).max()).any():
                    continue
                coefficients = base.copy()
                coefficients[list(chosen_tasks)] += phi * y
                worst = min(rows[i] @ (coefficients @ rows) / norms[i] for i in alive)
                worst = min(rows[i] @ (coefficients @ rows) for i in alive)
                if worst > best:
                    best, found = worst, coefficients
    return factor * found


def _worst_off(rows: Array, mean: Array, phi: float) -> Iterator[Array]:
    """Yield y with u = y @ rows, |u| = 1 and equal <g_i, mean + phi u> on all rows."""
    norms = np.linalg.norm(rows, axis=1)
    inverse = np.linalg.pinv(rows / norms[:, None], rcond=1e-12)  # (p, k)
    b = rows @ mean / norms
    # u = inverse (t / norms - b) / phi, whose squared length is a t^2 - 2 h t + e = 1.
    left, right = inverse @ (1 / norms) / phi, inverse @ b / phi
    a, h, e = left @ left, left @ right, right @ right - 1
    root = h * h - a * e
    if root < 0 or a == 0:
        return
    for sign in (1, -1):
        t = (h + sign * math.sqrt(root)) / a
        u = left * t - right
        yield (inverse.T @ u) / norms


class Weighting:
    """A weighting with its memory, in float64."""

    def __init__(self, name: str, options: Mapping[str, Any], tasks: Sequence[str]) -> None:
        self.name = name
        self.options = dict(options)
        self.tasks = list(tasks)
        self.reset()

    def reset(self) -> None:
        zeros = dict.fromkeys(self.tasks, 0.0)
        self.sums, self.counts = dict(zeros), dict.fromkeys(self.tasks, 0)
        self.means: dict[str, list[float]] = {task: [] for task in self.tasks}
        init = self.options.get("init", 0.0)
        self.lambdas = dict.fromkeys(self.tasks, init)
        self.first, self.second = dict(zeros), dict(zeros)
        self.steps = dict.fromkeys(self.tasks, 0)

    def weights(
        self, losses: Mapping[str, float], log_var: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the weights, and the slopes of the learned log-variances of all tasks."""
        if self.name == "Uncertainty":
            kinds = dict(zip(self.tasks, self.options["kind"], strict=True))
            slopes = dict.fromkeys(self.tasks, 0.0)
            weights = {}
            for task, loss in losses.items():
                half = 0.5 if kinds[task] == "regression" else 1.0
                weights[task] = half * math.exp(-log_var[task])
                slopes[task] = 0.5 - weights[task] * loss
            return weights, slopes
        if self.name == "AutoLambda":
            return {task: self.lambdas[task] for task in losses}, {}
        if self.name == "DWA":
            return self._dwa(losses), {}
        if self.name == "Constant":
            given = dict(zip(self.tasks, self.options["weights"], strict=True))
            return {task: given[task] for task in losses}, {}
        return dict.fromkeys(losses, 1.0), {}

    def remember(self) -> None:
        """Remember what there is before a step."""
        names = ("sums", "counts", "lambdas", "first", "second", "steps")
        self.before = {name: dict(getattr(self, name)) for name in names}

    def undo(self) -> None:
        """Forget what the last step has left."""
        for name, value in self.before.items():
            setattr(self, name, value)

    def _dwa(self, losses: Mapping[str, float]) -> dict[str, float]:
        for task, loss in losses.items():
            if math.isfinite(loss):
                self.sums[task] += loss
                self.counts[task] += 1
        ratios = []
        for task in losses:
            last = self.means[task][-2:]
            ratio = 1.0
            if len(last) == 2:
                ratio = last[1] / last[0] if last[0] else (1.0 if last[1] == 0 else 1e3)
            ratios.append(min(max(ratio, -1e3), 1e3) / self.options["temperature"])
        powers = [math.exp(ratio - max(ratios)) for ratio in ratios]
        return {t: len(powers) * p / sum(powers) for t, p in zip(losses, powers, strict=True)}

    def end_epoch(self) -> None:
        for task in self.tasks:
            if self.counts[task]:
                self.means[task].append(self.sums[task] / self.counts[task])
            self.sums[task], self.counts[task] = 0.0, 0

    def adam(self, slopes: Mapping[str, float]) -> None:
        """Move the lambdas of the tasks that have a slope."""
        for task, slope in slopes.items():
            self.steps[task] += 1
            n = self.steps[task]
            self.first[task] = 0.9 * self.first[task] + 0.1 * slope
            self.second[task] = 0.999 * self.second[task] + 0.001 * slope**2
            mean, square = self.first[task] / (1 - 0.9**n), self.second[task] / (1 - 0.999**n)
            self.lambdas[task] -= self.options["lr"] * mean / (math.sqrt(square) + 1e-8)
            if self.options["minimum"] is not None:
                self.lambdas[task] = max(self.lambdas[task], self.options["minimum"])
