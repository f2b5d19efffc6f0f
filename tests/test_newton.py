"""The solver that balances gains, for powers and factors beyond those of the strategies."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtbalance._gramians import unit_rows
from mtbalance._newton import (
    STATIONARY,
    UNSOLVED,
    Balance,
    _minimum,
    _one_by_one,
    _Point,
    _Problem,
    _squared_error,
    balance_gains,
)
from mtbalance.gradient import FairGrad, NashMTL
from tests._oracles import array
from tests._samplers import matrix

LOGS = st.floats(-80, 80)


@given(
    others=st.tuples(LOGS, st.sampled_from([-1.0, 0.0, 1.0])),
    log=LOGS,
    power=st.floats(0.05, 20),
)
def test_one_part_solves_its_equation(
    others: tuple[float, float], log: float, power: float
) -> None:
    """x + r = c x^(-q), found by bisection of its logarithm."""
    r = others[1] * math.exp(others[0])

    def excess(z: float) -> float:
        left = math.exp(z) + r
        return math.log(left) + power * z - log if left > 0 else -math.inf

    low = max(-2500.0, math.log(-r) if r < 0 else -2500.0)
    if log / power - others[0] / power < -250 or log > 250 * min(1.0, power):
        return  # the answer itself is at the end of what is kept
    high = 700.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    if low < -250 or low > 250:
        return
    # It is to be near: Newton's method does the rest.
    assert math.log(_minimum(r, log, power)) == pytest.approx(low, abs=1e-2)


@pytest.mark.parametrize("power", [0.05, 0.5, 1.0, 2.0, 20.0])
def test_one_by_one_lowers_the_objective(power: float) -> None:
    """Each part goes to its own minimum: the convex objective never rises, from anywhere."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cosines = unit_rows(matrix("generic", 6, 9, seed) @ matrix("generic", 6, 9, seed).T).cosines
        logs = torch.tensor(rng.uniform(-3, 3, 6))
        x = torch.tensor(np.exp(rng.uniform(-3, 3, 6)))

        c = np.exp(array(logs))

        def objective(x: np.ndarray, cosines: np.ndarray, c: np.ndarray) -> float:
            barrier = c * np.log(x) if power == 1 else c * x ** (1 - power) / (1 - power)
            return x @ cosines @ x / 2 - barrier.sum()

        moved = torch.tensor(_one_by_one(_Problem(cosines, logs.tolist(), power), 0.0, x.tolist()))
        lower, before = (objective(array(y), array(cosines), c) for y in (moved, x))
        assert lower <= before + 1e-3 * abs(lower)


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_gains_are_balanced(power: float, spread: float) -> None:
    """(C x)_i = c_i x_i^(-q) for factors c of any size, up to the rounding of C x."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        m = int(rng.integers(1, 12))
        rows = matrix("generic", m, 20, seed)
        cosines = unit_rows(rows @ rows.T).cosines
        logs = rng.uniform(-spread, spread, m)
        found = balance_gains(cosines, torch.tensor(logs), power)
        assert isinstance(found, Balance)
        x = array(found.x)
        assert x.max() == 1
        wanted = np.exp(logs - (1 + power) * found.log_scale - power * np.log(x))
        slack = 1e-14 * (np.abs(array(cosines)) @ x)
        assert (np.abs(array(cosines) @ x - wanted) <= 1e-9 * wanted + slack).all()


def test_agrees_with_scipy() -> None:
    """On the convex problem itself, in logarithms of x."""
    for seed in range(10):
        rows = matrix("generic", 4, 7, seed)
        cosines = array(unit_rows(rows @ rows.T).cosines)
        c = np.random.default_rng(seed).uniform(0.5, 2, 4)

        def residual(z: np.ndarray, cosines=cosines, c=c) -> np.ndarray:
            return cosines @ np.exp(z) - c * np.exp(-0.7 * z)

        z = scipy.optimize.least_squares(residual, np.zeros(4), xtol=1e-15, ftol=1e-15).x
        found = balance_gains(torch.tensor(cosines), torch.tensor(np.log(c)), 0.7)
        assert isinstance(found, Balance)
        np.testing.assert_allclose(array(found.x) * math.exp(found.log_scale), np.exp(z), rtol=1e-7)


@pytest.mark.parametrize("power", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("name", ["stationary", "opposite_rows"])
def test_nothing_balances_rows_that_cancel(power: float, name: str) -> None:
    for seed in range(20):
        rows = matrix(name, 4, 12, seed)
        found = unit_rows(rows @ rows.T)
        if name == "opposite_rows" or len(found.numbers) == 4:
            assert balance_gains(found.cosines, 0 * found.norms, power) == STATIONARY


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_rows_that_all_but_cancel(power: float, angle: float) -> None:
    """Two equal factors: x^(1 + q) (1 + r) = c, with 1 + r known to float64's rounding."""
    cosine = -math.cos(angle)
    gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    found = balance_gains(gramian, torch.zeros(2, dtype=torch.float64), power)
    assert isinstance(found, Balance)
    logs = array(found.x.log()) + found.log_scale
    np.testing.assert_allclose((1 + power) * logs, -math.log1p(cosine), atol=1e-15 / angle**2)


def far_apart(seed: int, decades: float) -> tuple[Tensor, np.ndarray]:
    """Return the Gramian of unit rows, and logarithms of norms."""
    rng = np.random.default_rng(seed)
    rows = matrix("generic", 5, 9, seed)
    return unit_rows(rows @ rows.T).cosines, rng.uniform(-decades, 0, 5) * math.log(10)


@pytest.mark.parametrize(
    ("alpha", "decades", "unsolved"), [(100, 3.0, 0), (300, 1.0, 0), (100, 6.0, 2)]
)
def test_parts_too_small_to_add_anything(alpha: float, decades: float, unsolved: int) -> None:
    """Near max-min, tasks that gain more than they ask for get next to no weight, and block none.

    Where norms are very far apart, steps may lead nowhere: then there is no answer.
    """
    power, least, missing = 1 / alpha, 0, 0
    for seed in range(30):
        cosines, norms = far_apart(seed, decades)
        logs = (power - 1) * norms
        found = balance_gains(cosines, torch.tensor(logs), power)
        if not isinstance(found, Balance):
            assert found == UNSOLVED
            missing += 1
            continue
        x = array(found.x)
        gained = array(cosines) @ x
        wanted = np.exp(logs - (1 + power) * found.log_scale - power * np.log(x))
        held, seen = x <= 2 * math.exp(-300), x > 1e-12  # in between, the gains hardly tell
        least += held.sum()
        np.testing.assert_allclose(gained[seen], wanted[seen], rtol=1e-6)
        assert (gained[held] >= wanted[held]).all()
    assert least > 2
    assert missing <= unsolved


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0, 5.0])
def test_the_error_is_bounded(power: float) -> None:
    """By the distance from the solution, both on the scale that is best on their own ray."""
    for seed in range(20):
        cosines, logs = far_apart(seed, 1.0)
        found = balance_gains(cosines, torch.tensor(logs), power)
        assert isinstance(found, Balance)
        problem = _Problem(cosines, logs.tolist(), power)
        rng = np.random.default_rng(seed)
        for size in (1e-4, 1e-2, 1.0, 0.0):
            x = array(found.x) * np.exp(size * rng.standard_normal(5))
            x[0] *= 1 if size else 1e-3  # one part alone is far too small
            point = _Point.at(problem, x.tolist())
            scale = math.exp(found.log_scale + point.shift / (1 + power))
            off = np.array(point.x) - scale * array(found.x)
            here = np.array(point.x)
            squared = (off @ array(cosines) @ off) / (here @ array(cosines) @ here)
            bound = _squared_error(problem, point)
            assert bound >= squared
            if size == 1e-4:  # not by far, near the solution
                condition = np.linalg.cond(array(cosines))
                assert bound <= 10 * (1 + 1 / power) * condition * squared


@pytest.mark.parametrize("power", [0.2, 1.0, 5.0])
def test_an_answer_that_has_not_been_found_is_none(
    power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are cut short end in no answer, or in the one that all of them lead to."""
    answers = []
    for steps in (0, 1, 2, 60):
        monkeypatch.setattr("mtbalance._newton._MOST_STEPS", steps)
        answers.append([])
        for seed in range(10):
            cosines, logs = far_apart(seed, 1.0)
            answers[-1].append(balance_gains(cosines, torch.tensor(logs), power))
    *short, full = answers
    assert all(found == UNSOLVED for found in short[0])
    for found, expected in zip(itertools.chain(*short), full * 3, strict=True):
        assert isinstance(expected, Balance)
        if found != UNSOLVED:
            assert isinstance(found, Balance)
            np.testing.assert_allclose(array(found.x), array(expected.x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", [NashMTL(), FairGrad(0.3), FairGrad(3.0)])
def test_strategies_count_it_as_a_fallback(
    strategy: NashMTL | FairGrad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtbalance._newton._MOST_STEPS", 1)
    rows = matrix("generic", 5, 9, 0) * torch.logspace(-3, 0, 5)[:, None]
    with pytest.warns(RuntimeWarning, match="Newton's method has not found where the gains are"):
        direction = strategy(rows)
    assert strategy.fallbacks == 1
    assert not direction.any()
