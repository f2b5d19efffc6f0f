"""What is true of CAGrad alone; what holds for every strategy is in test_contract.py.

The problem is max_d min_i <g_i, d> subject to |d - g0| <= c |g0|. A direction is judged by weak
duality, by random rivals and against SciPy; none of these shares anything with the solver.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance._gramians import TENSORS
from mtbalance._pivoting import FEW
from mtbalance.gradient import CAGrad, _cagrad
from tests._device import on_device
from tests._oracles import (
    array,
    cagrad_by_slsqp,
    divisor,
    judge_cagrad,
    least_norm_weights,
    project_on_dual_cone,
)
from tests._samplers import BY_NAME, gradients, matrix, random_gradients

RADII = st.sampled_from([0.01, 0.1, 0.4, 0.7, 0.99, 1.0, 1.5, 3.0, 100.0])
USUAL = sorted(set(BY_NAME) - {"unequal_norms"})


def mean_scaled(rows: Tensor, c: float, rescale: int = 0) -> Tensor:
    """Return the maximiser itself, on the scale of the mean."""
    return CAGrad(c=c, rescale=rescale)(rows) * (divisor(c, rescale) / len(rows))


def worst_case(rows: Tensor, direction: Tensor) -> Tensor:
    """Return min_i <g_i, d> over the tasks that have a gradient."""
    return (rows[rows.any(1)] @ direction).min()


def scale_of(rows: Tensor, c: float) -> float:
    """Return a bound of |d| and |g_i| multiplied."""
    return float((1 + c) * rows.mean(0).norm() * rows.norm(dim=1).max())


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0, 1, 2])
@pytest.mark.parametrize("c", [0.0, 0.5, 2.0])
def test_orthogonal_unit_gradients(c: float, rescale: int) -> None:
    """By symmetry w = (1/2, 1/2) and g_w = g0, so d is (1 + c) g0; on the sum's scale (1 + c)."""
    expected = torch.full((2,), (1 + c) / [1, 1 + c**2, 1 + c][rescale])
    assert_close(CAGrad(c=c, rescale=rescale)(torch.eye(2)), expected)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9, 3.0])
def test_the_weaker_of_two_tasks_that_agree(c: float) -> None:
    """g1 = (1, 0), g2 = (4, 3): all weight on g1, the unit vector (1, 0).

    g0 = (5/2, 3/2), |g0| = sqrt(34)/2. From w = (1, 0) towards g2 the dual grows by
    <g2 - g1, g0> + phi (<g1, g2>/|g1| - |g1|) = 12 + 3 phi > 0, so it stays there.
    """
    rows = torch.tensor([[1.0, 0.0], [4.0, 3.0]], dtype=torch.float64)
    expected = torch.tensor([5 + c * 34**0.5, 3.0], dtype=torch.float64)
    assert_close(CAGrad(c=c, rescale=0)(rows), expected)


def test_opposite_tasks_within_the_ball() -> None:
    """g and -2g: g0 = -g/2, the ball is t g with t in [-0.7, -0.3] for c = 0.4 (on their line).

    min(t, -2t) = t for t < 0, so t = -0.3; d = 2 * -0.3 g.
    """
    g = random_gradients(1, 6)
    assert_close(CAGrad(c=0.4, rescale=0)(torch.cat([g, -2 * g])), -0.6 * g[0])


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_opposite_tasks_with_zero_in_the_ball(c: float) -> None:
    """No t g helps both, so 0 is best: the projection of g0 on the directions orthogonal to g."""
    g = random_gradients(1, 6)
    direction = CAGrad(c=c)(torch.cat([g, -2 * g]))
    assert direction.norm() <= 1e-12 * g.norm()


def test_two_that_cancel_and_one_beside() -> None:
    """(1, 0), (-1, 0), (0, 3): nothing helps the first two, so the best worst case is 0.

    d must have a first coordinate of 0 and a second of at least 0; the nearest to g0 = (0, 1) of
    these is g0 itself.
    """
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    for c in (0.0, 0.4, 1.0, 2.0):
        expected = torch.tensor([0.0, 3.0], dtype=torch.float64)
        assert_close(CAGrad(c=c, rescale=0)(rows), expected)


def test_a_task_without_gradient_counts_in_the_mean_alone() -> None:
    """g and 0: g0 = g/2, g_w = g, so d = g/2 + c |g|/2 g/|g|, twice that on the sum's scale."""
    g = random_gradients(1, 5)
    rows = torch.cat([g, torch.zeros_like(g)])
    assert_close(CAGrad(c=0.4, rescale=0)(rows), 1.4 * g[0])


def test_gradients_whose_mean_is_zero_give_zero() -> None:
    """The ball has radius c * 0 around 0; what is left is the rounding of terms that cancel."""
    g = matrix("conflicting", 2, 5)
    rows = torch.cat([g, -g])
    assert CAGrad(c=0.4)(rows).norm() <= 1e-16 * rows.norm(dim=1).sum()


# --- optimality -----------------------------------------------------------------------------------


@given(rows=gradients(USUAL), c=RADII, rescale=st.sampled_from([0, 1, 2]))
@settings(max_examples=600)
def test_duality_gap(rows: Tensor, c: float, rescale: int) -> None:
    """In the ball, and no worse than the optimum, to 1e-9 of the problem's scale."""
    if rows.mean(0).norm() <= 1e-12 * rows.norm(dim=1).max():
        return  # the ball is a point
    verdict = judge_cagrad(array(rows), array(CAGrad(c, rescale)(rows)), c, rescale)
    assert verdict.outside <= 1e-9
    assert verdict.gap <= 1e-9


@given(rows=gradients(["unequal_norms"], m=(2, 8)), c=RADII)
@settings(max_examples=300)
def test_duality_gap_with_unequal_norms(rows: Tensor, c: float) -> None:
    """Twelve decades between tasks: the ball is kept, and the gap is 1e-9 of the largest norm.

    Relative to the weighted norms, sum_i w_i |g_i|, it is nearly as small; where rows of very
    different length all but cancel, rounding of the long ones is seen by the short ones.
    """
    verdict = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c)
    assert verdict.outside <= 1e-9
    assert verdict.gap <= (1e-3 if rows.shape[1] > 1 else 1e-1)
    no_forgiveness = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c, rounding=0.0)
    assert no_forgiveness.gap_of_largest <= 1e-9


@pytest.mark.parametrize("difference", [1e-3, 1e-6, 1e-7, 4e-8, 1e-8, 1e-10, 0.0])
@pytest.mark.parametrize("c", [0.1, 0.4, 1.5])
@pytest.mark.parametrize("m", [2, 3])
def test_nearly_equal_tasks(difference: float, c: float, m: int) -> None:
    """Rows that differ by little in length and by less in direction: the shortest one counts."""
    rows = torch.ones(m, 2, dtype=torch.float64) * torch.tensor([1.0, 0.0])
    rows += difference * torch.arange(m)[:, None] * torch.tensor([1.0, 0.3])
    verdict = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c)
    assert verdict.outside <= 1e-9
    assert verdict.gap <= 1e-9


@pytest.mark.parametrize(
    ("shape", "seed", "c"),
    [
        ((6, 3), 414818287, 0.7),
        ((8, 2), 1889859164, 0.99),
        ((4, 3), 1119976883, 1.5),
        ((8, 3), 1331124092, 1.5),
        ((6, 4), 797159648, 1.0),
    ],
)
def test_where_the_gramian_cannot_tell_the_hull_from_zero(shape, seed: int, c: float) -> None:
    """Zero is inside the hull of very unequal rows, and the ball does or does not reach the cone.

    Here a solver that takes a short combination for a vanished one leaves the ball, or stays far
    from the optimum. Found by search among 50 000 matrices.
    """
    rows = matrix("unequal_norms", *shape, seed)
    verdict = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c)
    assert verdict.outside <= 1e-9
    assert verdict.gap_of_largest <= 1e-8


@given(
    m=st.integers(2, 6),
    p=st.integers(1, 12),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-7, -1),
    c=RADII,
)
@settings(max_examples=200)
def test_duality_gap_near_a_stationary_point(m, p, seed, exponent, c) -> None:
    """Rows whose hull all but holds zero, where every direction is hard to tell.

    The squared length of a combination of unit rows is known to a few eps, so that lengths of e
    are uncertain by eps / e^2 relative to themselves: both that of the mean, which is the radius,
    and that of g_w, which is at least the distance of the hull from zero.
    """
    rows = matrix("stationary", m, p, seed)
    rows = rows + 10.0**exponent * rows.norm(dim=1).max() * random_gradients(m, p, seed + 1)
    units = array(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300))
    hull = float(np.linalg.norm(least_norm_weights(units, np.ones(m)) @ units))
    shortest = float(rows.mean(0).norm() / rows.norm(dim=1).max())
    if hull > 1e-10:
        shortest = min(shortest, hull)
    tolerance = max(1e-9, 3e-15 / shortest**2)
    if tolerance > 1e-4:
        return
    verdict = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c)
    assert verdict.outside <= tolerance
    assert verdict.gap <= tolerance


@given(rows=gradients(), c=RADII, seed=st.integers(0, 99))
@settings(max_examples=100)
def test_no_rival_in_the_ball_helps_the_worst_task_more(rows: Tensor, c: float, seed: int) -> None:
    """Random points on the sphere and inside it, half of them close to the answer itself."""
    mean = rows.mean(0)
    radius = c * mean.norm()
    d = mean_scaled(rows, c)
    steps = random_gradients(400, rows.shape[1], seed)
    steps[200:] = (d - mean) / radius.clamp_min(1e-300) + 0.05 * steps[200:]
    steps = steps / steps.norm(dim=1, keepdim=True)
    steps[::4] *= 0.7
    alive = rows[rows.any(1)]
    if not len(alive):
        return
    rivals = ((mean + radius * steps) @ alive.T).min(1).values
    assert rivals.max() <= worst_case(rows, d) + 1e-10 * scale_of(rows, c)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9, 1.5])
@pytest.mark.parametrize("seed", range(6))
def test_scipy_finds_the_same_direction(c: float, seed: int) -> None:
    """SLSQP on the primal problem, well scaled (unit norms, no kink since p is at least m)."""
    m = 2 + seed % 4
    rows = random_gradients(m, m + 3, seed)
    rows = rows / rows.norm(dim=1, keepdim=True)
    expected = on_device(cagrad_by_slsqp(array(rows), c))
    # Its own accuracy: the constraint is quadratic, so 1e-15 in it is 3e-8 in d.
    assert_close(mean_scaled(rows, c), expected, rtol=0, atol=2e-6)


# --- geometry -------------------------------------------------------------------------------------


def is_kink(rows: Tensor, c: float) -> bool | None:
    """Return whether the best worst case is 0, None if that is too close to call.

    It is where some combination of the rows vanishes and the ball reaches the dual cone.
    """
    alive = array(rows[rows.any(1)])
    units = alive / np.linalg.norm(alive, axis=1, keepdims=True)
    hull = np.linalg.norm(least_norm_weights(units, np.ones(len(units))) @ units)
    mean = array(rows.mean(0))
    _, distance = project_on_dual_cone(alive, mean)
    reach = c * np.linalg.norm(mean) - distance
    if 1e-10 < hull < 1e-4 or abs(reach) < 1e-6 * np.linalg.norm(mean):
        return None
    return bool(hull <= 1e-10 and reach > 0)


@given(rows=gradients(USUAL), c=RADII)
@settings(max_examples=200)
def test_lies_on_the_sphere_except_at_a_kink(rows: Tensor, c: float) -> None:
    mean = rows.mean(0)
    if (
        not rows.any()
        or mean.norm() <= 1e-9 * rows.norm(dim=1).max()
        or is_kink(rows, c)
        in (
            True,
            None,
        )
    ):
        return
    step = mean_scaled(rows, c) - mean
    assert_close(step.norm(), c * mean.norm(), rtol=1e-9, atol=0)


@given(rows=gradients(["stationary", "opposite_rows", "generic"], m=(2, 8), p=(1, 6)), c=RADII)
@settings(max_examples=300)
def test_at_a_kink_it_is_the_projection_of_the_mean(rows: Tensor, c: float) -> None:
    """Where the best worst case is 0: of all that reach it, the nearest to the mean (by NNLS)."""
    mean = array(rows.mean(0))
    if not rows.any() or np.linalg.norm(mean) <= 1e-9 * float(rows.norm(dim=1).max()):
        return
    if is_kink(rows, c) is not True:
        return
    expected, distance = project_on_dual_cone(array(rows), mean)
    assert distance <= c * np.linalg.norm(mean)
    error = np.linalg.norm(array(mean_scaled(rows, c)) - expected)
    assert error <= 1e-9 * np.linalg.norm(mean)


def test_kinks_are_met() -> None:
    """The two tests above are not empty: both answers of ``is_kink`` are frequent."""
    answers = [
        is_kink(matrix("stationary", 4, 3, seed), c) for seed in range(20) for c in (0.1, 1.5)
    ]
    assert answers.count(True) >= 10
    assert answers.count(False) >= 10


@given(rows=gradients())
@settings(max_examples=50)
def test_without_a_ball_it_is_the_sum(rows: Tensor) -> None:
    bound = 1e-14 * rows.norm(dim=1).sum()
    for rescale in (0, 1, 2):
        assert (CAGrad(c=0, rescale=rescale)(rows) - rows.sum(0)).norm() <= bound


@given(m=st.integers(1, 6), extra=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_an_endless_ball_points_at_the_least_convex_combination(m, extra, seed) -> None:
    """c to infinity: d / c tends to |g0| g_w / |g_w| with g_w of least norm (MGDA, by NNLS).

    At c = 1e9 what is left of g0 is 1e-9 of the length; independent rows keep g_w away from zero.
    """
    rows = random_gradients(m, m + extra, seed)
    least = least_norm_weights(array(rows), np.ones(m)) @ array(rows)
    if np.linalg.norm(least) < 1e-3:
        return
    direction = array(CAGrad(c=1e9, rescale=0)(rows))
    cosine = direction / np.linalg.norm(direction) - least / np.linalg.norm(least)
    assert np.linalg.norm(cosine) < 1e-6


@given(rows=gradients(USUAL))
@settings(max_examples=60)
def test_a_larger_ball_never_hurts_the_worst_task(rows: Tensor) -> None:
    """The maximum over a larger set: min_i <g_i, d(c)> does not fall as c grows.

    And it starts from the mean's: d(c) is at least as good as g0.
    """
    if not rows.any():
        return
    before = worst_case(rows, rows.mean(0))
    for c in (0.05, 0.2, 0.4, 0.8, 0.99, 1.0, 1.3, 4.0):
        value = worst_case(rows, mean_scaled(rows, c))
        assert value >= before - 1e-11 * scale_of(rows, c)
        before = value


@given(rows=gradients(), c=st.floats(0, 0.99))
@settings(max_examples=60)
def test_is_a_descent_direction_of_the_mean(rows: Tensor, c: float) -> None:
    """<d, g0> >= (1 - c) |g0|^2, since d lies within c |g0| of g0."""
    mean = rows.mean(0)
    assert mean @ mean_scaled(rows, c) >= (1 - c - 1e-9) * (mean @ mean)


@given(rows=gradients(), c=st.floats(0, 3))
@settings(max_examples=60)
def test_rescaling_divides(rows: Tensor, c: float) -> None:
    raw = CAGrad(c=c, rescale=0)(rows)
    bound = 1e-13 * (1 + c) * rows.norm(dim=1).sum()
    assert (CAGrad(c=c, rescale=1)(rows) * (1 + c**2) - raw).norm() <= bound
    assert (CAGrad(c=c, rescale=2)(rows) * (1 + c) - raw).norm() <= bound


@given(rows=gradients(USUAL, m=(2, 2)), c=RADII)
@settings(max_examples=200)
def test_two_tasks_in_closed_form_are_the_general_case(rows: Tensor, c: float) -> None:
    """The pair's closed form and the active-set method on the same Gramian."""
    strategy = CAGrad(c=c, rescale=0)
    gramian = rows @ rows.T
    if rows.mean(0).norm() <= 1e-9 * rows.norm(dim=1).max() or is_kink(rows, c) is None:
        return
    general = (1 + 2 * strategy._pull(gramian)).to(rows) @ rows
    bound = 1e-7 * (1 + c) * rows.norm(dim=1).max()
    assert (strategy(rows) - general).norm() <= bound


# --- two tasks, a formula -------------------------------------------------------------------------

PAIRS = gradients(m=(2, 2))


@given(rows=PAIRS, c=RADII)
@settings(max_examples=400)
def test_duality_gap_of_two_tasks(rows: Tensor, c: float) -> None:
    """The formula is exact: in the ball, and no worse than the optimum."""
    if rows.mean(0).norm() <= 1e-12 * rows.norm(dim=1).max():
        return  # the ball is a point
    verdict = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c)
    assert verdict.outside <= 1e-12
    assert verdict.gap <= 1e-12


@given(rows=PAIRS, c=st.one_of(RADII, st.just(0.0)), rescale=st.sampled_from([0, 1, 2]))
@settings(max_examples=400)
def test_two_tasks_on_a_device_get_the_same_weights(rows: Tensor, c: float, rescale: int) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU.

    They differ by rounding at most: the operations are the same.
    """
    strategy = CAGrad(c=c, rescale=rescale)
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    on_device = torch.stack(strategy._weights_of_pair(a, h, b, TENSORS))
    assert_close(on_device, strategy.weights(gramian), rtol=1e-14, atol=0)


@pytest.mark.parametrize("c", [0.0, 0.4, 1.5])
def test_two_tasks_on_a_device_wait_for_nothing(c: float) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = CAGrad(c=c).weights(gramian)
    assert weights.device.type == "meta"
    assert weights.shape == (2,)
    with pytest.raises(NotImplementedError):  # so the test can fail
        CAGrad(c=c).weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("c", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("exponent", [-15, -13, -12, -6, 6, 12, 13, 15])
def test_two_tasks_of_any_ratio_of_norms(exponent: int, c: float) -> None:
    """Up to thirty decades between squared norms, orthogonal, at an acute and an obtuse angle."""
    for angle in (0.3, 1.5707963, 2.8):
        rows = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]]) * [[1.0], [10.0**exponent]]
        verdict = judge_cagrad(rows, array(CAGrad(c)(on_device(rows))), c, rounding=0.0)
        assert verdict.outside <= 1e-12
        assert verdict.gap_of_largest <= 1e-14


# --- the ways to the solution ---------------------------------------------------------------------

DEGENERATE = ["generic", "conflicting", "rank_deficient", "duplicate_rows", "opposite_rows"]


@pytest.fixture(params=["tensors", "walk"])
def without_the_fast_way(request, monkeypatch) -> None:
    """Let few tasks go the way of many, or all tasks go that of the cases where pivoting fails."""
    monkeypatch.setattr(_cagrad, "minimize_for_few", lambda *args: None)
    if request.param == "walk":
        monkeypatch.setattr(_cagrad, "minimize_by_pivoting", lambda *args: None)


@pytest.mark.usefixtures("without_the_fast_way")
@pytest.mark.parametrize("c", [0.1, 0.4, 0.99, 1.5])
@pytest.mark.parametrize("name", DEGENERATE)
def test_every_way_leads_to_the_solution(name: str, c: float) -> None:
    for seed in range(12):
        rows = matrix(name, 3 + seed % 5, 2 + seed, seed)
        if rows.mean(0).norm() <= 1e-9 * rows.norm(dim=1).max():
            continue
        verdict = judge_cagrad(array(rows), array(CAGrad(c)(rows)), c)
        assert verdict.outside <= 1e-9
        assert verdict.gap <= 1e-9


def test_a_solver_that_does_not_end_raises(monkeypatch) -> None:
    """Never a wrong answer instead."""

    def endless(*args, **kwargs):
        raise ArithmeticError("the minimum on the simplex was not reached in 150 steps.")

    monkeypatch.setattr(_cagrad, "minimize_for_few", lambda *args: None)
    monkeypatch.setattr(_cagrad, "minimize_by_pivoting", lambda *args: None)
    monkeypatch.setattr(_cagrad, "minimize_linear_plus_norm", endless)
    with pytest.raises(ArithmeticError, match="was not reached"):
        CAGrad()(random_gradients(3, 5))


@pytest.mark.parametrize("m", [FEW, FEW + 1])
def test_few_tasks_and_many_take_different_ways(m: int, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(_cagrad, "minimize_for_few", lambda *args: calls.append(1))
    CAGrad()(random_gradients(m, 2 * m))
    assert len(calls) == (m <= FEW)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.99, 1.5])
@pytest.mark.parametrize("m", [20, 50, 64])
def test_many_tasks(m: int, c: float) -> None:
    """In few dimensions, where zero is far inside the hull, in many, and of very unequal norms."""
    for p in (10, m + 10):
        rows = random_gradients(m, p, seed=p)
        exponents = torch.linspace(-3, 3, m).double()[:, None]
        for scaled in (rows, rows * 10**exponents if p > m else rows[: m // 2].repeat(2, 1)):
            verdict = judge_cagrad(array(scaled), array(CAGrad(c)(scaled)), c)
            assert max(verdict.outside, verdict.gap) <= 1e-10


# --- precision, arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.4, 1.5])
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_precision_of_the_rows_is_what_remains(name: str, c: float) -> None:
    """float32 rows give the float64 direction of the same numbers up to float32 rounding."""
    for seed in range(5):
        rows = matrix(name, 4, 12, seed, dtype=torch.float32)
        direction, exact = CAGrad(c)(rows), CAGrad(c)(rows.double())
        size = rows.double().norm(dim=1).sum()
        assert (direction.double() - exact).norm() <= 1e-6 * (1 + c) * size


@pytest.mark.parametrize("c", [-0.1, float("nan"), float("inf")])
def test_refuses_a_bad_radius(c: float) -> None:
    with pytest.raises(ValueError, match="`c` must be at least 0, but got"):
        CAGrad(c=c)


def test_refuses_an_unknown_rescaling() -> None:
    with pytest.raises(ValueError, match="`rescale` must be one of 0, 1, 2, but got 3"):
        CAGrad(rescale=3)


@pytest.mark.parametrize("angle", [1e-3, 1e-4, 1e-5, 1e-6])
def test_how_exact_it_is_for_rows_that_are_nearly_opposite(angle: float) -> None:
    """As the docstring says.

    For rows (1, 0) and 2 (-1, a), by the closed form with D = 4 a^2 known to all digits.
    """
    c = 1.5
    rows = torch.tensor([[1.0, 0.0], [-2.0, 2 * angle]], dtype=torch.float64)
    a, h, b = 1.0, -2.0, 4 + 4 * angle**2
    half = (a - b) / 2
    rho = math.sqrt(c**2 + (c**2 - 1) * half**2 / (4 * angle**2))
    weights = torch.tensor([rho * (b - h) - half, rho * (a - h) + half], dtype=torch.float64)
    mean = rows.mean(0)
    pull = weights @ rows
    expected = 2 * (mean + c * mean.norm() * pull / pull.norm()) / (1 + c**2)
    error = (CAGrad(c=c)(rows) - expected).norm() / expected.norm()
    assert error <= 1e-14 + 5e-16 / angle**2
