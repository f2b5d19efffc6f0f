"""What is true of NashMTL alone; what holds for every strategy is in test_contract.py.

The oracle is the definition, on vectors: for weights a > 0 with a_i <g_i, d> = p_i and d the
combination with these weights, d is the only solution. SciPy maximises the product of the gains.
"""

import re

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import NashMTL
from tests._oracles import array, least_norm_weights
from tests._samplers import gradients, matrix


def distance(rows: Tensor) -> float:
    """Return how far zero is from the convex hull of the unit rows."""
    units = array(rows) / np.linalg.norm(array(rows), axis=1, keepdims=True)
    return float(np.linalg.norm(least_norm_weights(units, np.ones(len(units))) @ units))


def test_orthogonal_rows_by_hand() -> None:
    """a_i^2 |g_i|^2 = p_i: each unit row counts with the root of its preference.

    With lengths 3 and 4, |G|_F = sqrt(9^2 + 16^2), whose root is the factor of the sum scale.
    """
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    assert_close(NashMTL("official")(rows), ones)
    assert_close(NashMTL()(rows), ones * 337**0.25)
    preferred = NashMTL("official", preference=[1.0, 3.0])(rows)
    assert_close(preferred, torch.tensor([0.5, 1.5], dtype=torch.float64).sqrt())


def test_three_rows_by_hand() -> None:
    """Unit rows in one plane at -60, 0 and 60 degrees, x = (a, b, a) by symmetry.

    a (a + b / 2 - a / 2) = 1 and b (b + a) = 1 give a = 2 b and 3 b^2 = 1. The direction is along
    the middle row; its length is a + b = sqrt(3).
    """
    turn = np.sqrt(3) / 2
    rows = torch.tensor([[0.5, turn], [1.0, 0.0], [0.5, -turn]], dtype=torch.float64)
    weights = NashMTL("official").solve(rows @ rows.T)
    assert_close(weights, torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64) / 3**0.5)
    assert_close(NashMTL("official")(rows), torch.tensor([3**0.5, 0.0], dtype=torch.float64))


@given(
    rows=gradients(["generic", "conflicting", "duplicate_rows", "rank_deficient", "unequal_norms"]),
    numbers=st.lists(st.floats(0.05, 20), min_size=8, max_size=8),
    prefers=st.booleans(),
)
@settings(max_examples=200)
def test_every_task_gains_its_share(rows: Tensor, numbers: list[float], prefers: bool) -> None:
    """a > 0 and a_i <g_i, d> = p_i, as inner products of vectors; |d|^2 is their sum."""
    rows = rows[rows.any(1)]
    assume(len(rows) and distance(rows) > 1e-3)
    preference = np.array(numbers[: len(rows)]) / np.mean(numbers[: len(rows)])
    strategy = NashMTL("official", preference=list(preference) if prefers else None)
    weights = array(strategy.solve(rows @ rows.T))
    direction = weights @ array(rows)
    assert (weights > 0).all()
    shares = preference if prefers else np.ones(len(rows))
    np.testing.assert_allclose(weights * (array(rows) @ direction), shares, rtol=1e-8)
    assert direction @ direction == pytest.approx(len(rows), rel=1e-8)


@pytest.mark.parametrize("m", [2, 3, 10, 50])
def test_shares_are_exact_for_ordinary_rows(m: int) -> None:
    for seed in range(20):
        rows = matrix("generic", m, 3 * m, seed)
        weights = array(NashMTL("official").solve(rows @ rows.T))
        gains = weights * (array(rows) @ (weights @ array(rows)))
        np.testing.assert_allclose(gains, 1, rtol=3e-13)


@pytest.mark.parametrize("preference", [None, [1.0, 2.0, 4.0, 0.5]])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_scipy_on_the_product_of_gains(preference, seed: int) -> None:
    """Among directions of one length the product is largest, by a solver that knows no Gramian."""
    rows = matrix("generic", 4, 6, seed)
    p = np.ones(4) if preference is None else np.array(preference)

    def loss(d: np.ndarray) -> float:
        length = np.linalg.norm(d)  # of which the gains know nothing: a simplex would wander
        gains = array(rows) @ d / length
        return -p @ np.log(gains) + (length - 1) ** 2 if (gains > 0).all() else np.inf

    units = array(rows) / np.linalg.norm(array(rows), axis=1, keepdims=True)
    best = least_norm_weights(units, np.ones(4)) @ units
    options = {"xatol": 1e-12, "fatol": 1e-14, "maxiter": 1e5}
    for _ in range(4):  # a simplex that has grown flat starts anew
        best = scipy.optimize.minimize(loss, best, method="Nelder-Mead", options=options).x
    direction = array(NashMTL(preference=preference)(rows))
    cosine = best @ direction / np.linalg.norm(best) / np.linalg.norm(direction)
    assert cosine == pytest.approx(1, abs=1e-10)


@given(rows=gradients(["generic", "conflicting", "unequal_norms"], m=(1, 6)))
def test_the_sum_scale_is_the_official_one_times_a_factor(rows: Tensor) -> None:
    """sqrt(|G|_F), with the Gramian of the rows."""
    assume(rows.any(1).all() and distance(rows) > 1e-3)
    factor = np.sqrt(np.linalg.norm(array(rows) @ array(rows).T))
    official = array(NashMTL("official").solve(rows @ rows.T))
    np.testing.assert_allclose(array(NashMTL().solve(rows @ rows.T)), factor * official, rtol=1e-12)


@given(
    rows=gradients(["generic"], m=(2, 6), scales=[1.0]),
    factors=st.lists(st.floats(-6, 6), min_size=6, max_size=6),
)
def test_how_long_a_gradient_is_does_not_matter(rows: Tensor, factors: list[float]) -> None:
    assume(distance(rows) > 1e-3)
    f = torch.tensor([10.0**x for x in factors[: len(rows)]], dtype=torch.float64)
    first, second = NashMTL("official")(rows), NashMTL("official")(f[:, None] * rows)
    assert_close(second, first, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("preference", [None, [1.0, 5.0], [7.0, 1.0], [1.0, 1e-6]])
@pytest.mark.parametrize("scale", ["sum", "official"])
@given(rows=gradients(m=(2, 2)))
@settings(max_examples=80)
def test_the_closed_form_is_the_solution(preference, scale: str, rows: Tensor) -> None:
    """Two tasks take a formula; the same two among three, with one that is zero, do not.

    The third preference leaves the ratio of the others and takes its part of the mean.
    """
    assume(not rows.any(1).all() or distance(rows) > 1e-3)
    two = NashMTL(scale, preference=preference).solve(rows @ rows.T)
    padded = torch.cat([rows, torch.zeros_like(rows[:1])])
    third = None if preference is None else [*preference, sum(preference) / 2]
    three = NashMTL(scale, preference=third).solve(padded @ padded.T)
    if rows.any():
        assert three[2] == 0
        assert_close(three[:2], two, rtol=1e-9, atol=0)


def test_two_tasks_halve_the_angle() -> None:
    """d is along u1 + u2, worked on vectors, for angles down to 1e-4 from opposite."""
    for angle in (3.0, 0.1, 1e-2, 1e-3, 1e-4):
        first = np.array([1.0, 0.0])
        second = np.array([-np.cos(angle), np.sin(angle)])
        # The sum of both unit rows, without cancellation.
        along = np.array([2 * np.sin(angle / 2) ** 2, np.sin(angle)])
        expected = np.sqrt(2) * along / np.linalg.norm(along)
        direction = NashMTL("official")(torch.tensor(np.stack([3 * first, 50 * second])))
        # Of the cosine float64 leaves 2e-16 / angle^2.
        assert np.linalg.norm(array(direction) - expected) <= 1e-15 / angle**2 + 1e-14


@pytest.mark.parametrize("scale", ["sum", "official"])
@given(rows=gradients(m=(2, 2)))
@settings(max_examples=80)
@pytest.mark.filterwarnings("ignore:NashMTL fell back")
def test_two_tasks_on_a_device_get_the_same_weights(scale: str, rows: Tensor) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    strategy = NashMTL(scale, preference=[1.0, 2.0])
    gramian = rows @ rows.T

    class Elsewhere(Tensor):
        is_cpu = False

    elsewhere = strategy.weights(gramian.as_subclass(Elsewhere)).as_subclass(Tensor)
    assert_close(elsewhere, strategy.weights(gramian), rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", ["sum", "official"])
def test_two_tasks_on_a_device_wait_for_nothing(scale: str) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    weights = NashMTL(scale).weights(torch.empty(2, 2, dtype=torch.float64, device="meta"))
    assert weights.device.type == "meta"
    assert weights.shape == (2,)


@pytest.mark.filterwarnings("ignore:NashMTL fell back")
@given(rows=gradients(["stationary", "opposite_rows"], m=(2, 8)))
@settings(max_examples=100)
def test_no_direction_where_none_serves_all(rows: Tensor) -> None:
    """Some convex combination of the rows that are not zero vanishes: zero, and counted."""
    alive = rows[rows.any(1)]
    strategy = NashMTL()
    direction = strategy(rows)
    if distance(alive) < 1e-9:
        assert not direction.any()
        assert strategy.fallbacks == 1
    else:
        assert strategy.fallbacks == 0
        assert (alive @ direction > 0).all()


@pytest.mark.parametrize("m", [2, 3])
def test_the_fallback_is_not_silent(m: int) -> None:
    rows = torch.eye(m, dtype=torch.float64)
    rows[1] = -5 * rows[0]
    strategy = NashMTL()
    words = "NashMTL fell back: a convex combination of the task gradients vanishes"
    with pytest.warns(RuntimeWarning, match=re.escape(words)):
        strategy(rows)
    strategy(rows)
    assert strategy.fallbacks == 2


@given(rows=gradients(["generic", "near_parallel", "unequal_norms", "conflicting"], m=(3, 8)))
@settings(max_examples=150)
def test_falls_back_only_where_it_must(rows: Tensor) -> None:
    alive = rows[rows.any(1)]
    assume(len(alive) and distance(alive) > 1e-6)
    strategy = NashMTL()
    strategy(rows)
    assert strategy.fallbacks == 0


def test_a_task_without_gradient_is_left_out() -> None:
    """What it prefers goes with it: p = (1/2, 1, 3/2) for the three, (1/2, 3/2) for the others."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    strategy = NashMTL("official", preference={"a": 1.0, "b": 2.0, "c": 3.0}).bind("abc")
    expected = torch.tensor([0.5, 1.5], dtype=torch.float64).sqrt()
    assert_close(strategy(rows), expected)
    with strategy.only(torch.tensor([0, 2])):
        assert_close(strategy(rows[[0, 2]]), expected)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_gramians_that_are_not_finite_come_out_as_nan(m: int) -> None:
    gramian = torch.eye(m, dtype=torch.float64)
    for bad in (torch.nan, torch.inf):
        gramian[1, 1] = bad
        assert NashMTL().weights(gramian).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": "mean"}, "`scale` must be one of 'sum', 'official', but got 'mean'."),
        ({"preference": [1.0, -1.0]}, "`preference[1]` must be positive, but got -1.0."),
    ],
)
def test_refuses_what_has_no_meaning(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        NashMTL(**arguments)
