"""The pure functions on Gramians and the convex solvers, against NumPy and SciPy."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import _active_set, _pivoting
from mtbalance._active_set import (
    minimize_linear_plus_norm,
    project_on_dual_cone,
    shortest_with_products,
)
from mtbalance._gramians import (
    FLOATS,
    TENSORS,
    equiangular,
    norm_of,
    off_the_others,
    unit_rows,
    vanishes,
    weights_of_pair,
)
from mtbalance._pivoting import minimize_by_pivoting, minimize_for_few
from mtbalance.gradient import CAGrad
from tests._oracles import (
    array,
    equiangular_by_lstsq,
    judge_cagrad,
    least_norm_weights,
    nonnegative_least_squares,
)
from tests._oracles import project_on_dual_cone as projection_by_nnls
from tests._samplers import gradients, matrix, random_gradients


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """The solvers work there, whatever the device of the other tests."""
    with torch.device("cpu"):
        yield


# --- Gramians -------------------------------------------------------------------------------------


@given(rows=gradients())
def test_unit_rows(rows: Tensor) -> None:
    """Numbers, norms and cosines of the rows that are not zero, against NumPy on the vectors."""
    units = unit_rows(rows @ rows.T)
    alive = array(rows)[array(rows).any(1)]
    assert units.numbers.tolist() == np.flatnonzero(array(rows).any(1)).tolist()
    norms = np.linalg.norm(alive, axis=1)
    assert np.allclose(array(units.norms), norms, rtol=1e-13, atol=0)
    directions = alive / norms[:, None]
    assert np.allclose(array(units.cosines), directions @ directions.T, rtol=0, atol=1e-13)
    assert torch.equal(units.cosines, units.cosines.T)
    assert torch.equal(units.cosines.diagonal(), torch.ones(len(norms), dtype=torch.float64))


def test_rows_below_the_resolution_count_as_zero() -> None:
    norms = torch.tensor([1.0, 1e-29, 1e-31, 0.0], dtype=torch.float64)
    assert unit_rows(torch.outer(norms, norms)).numbers.tolist() == [0, 1]


@given(rows=gradients(scales=[1.0]), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_norm_of_a_combination(rows: Tensor, seed: int) -> None:
    coefficients = random_gradients(1, len(rows), seed)[0]
    expected = float((coefficients @ rows).norm())
    size = float(rows.norm(dim=1).sum() * coefficients.abs().max())
    assert norm_of(coefficients, rows @ rows.T) == pytest.approx(expected, abs=1e-6 * size)


@given(rows=gradients(scales=[1.0]))
@settings(max_examples=50)
def test_vanishing_combinations(rows: Tensor) -> None:
    """A unit row is told from zero, and a row plus its opposite is not."""
    units = unit_matrix(rows)
    if not len(units):
        return
    both = torch.cat([units, -units[:1]])
    gramian = both @ both.T
    one = torch.zeros(len(both), dtype=torch.float64)
    one[0] = 3.0
    assert not vanishes(one, gramian)
    one[-1] = 3.0
    assert vanishes(one, gramian)
    one[-1] = 3.0 - 1e-4  # a length of 1e-4 among weights of 6
    assert not vanishes(one, gramian)


@given(rows=gradients(scales=[1.0]), seed=st.integers(0, 2**16))
@settings(max_examples=200)
def test_combinations_with_given_products(rows: Tensor, seed: int) -> None:
    """The Moore-Penrose inverse of the unit rows, which NumPy takes of the vectors."""
    units = unit_matrix(rows)
    if not len(units):
        return
    wanted = random_gradients(1, len(units), seed)[0].abs() + 0.1
    found = equiangular((units @ units.T).fill_diagonal_(1), wanted)
    expected, tolerance = equiangular_by_lstsq(array(units), array(wanted))
    if tolerance > 1e-3 or not expected.any():
        return
    length = np.linalg.norm(expected)
    assert np.linalg.norm(array(found.coefficients @ units) - expected) <= tolerance * length
    assert np.allclose(array(found.products), array(units) @ expected, rtol=0, atol=1e-5)
    assert found.squared_length == pytest.approx(length**2, rel=tolerance)


def test_combinations_with_given_products_that_there_are_not() -> None:
    """1 and -1 cannot both be 1; no combination is nearer to that than zero, which is exact."""
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    found = equiangular(opposite, torch.ones(2).double())
    assert not found.coefficients.any()
    assert found.squared_length == 0


def test_rows_that_are_equal_up_to_the_rounding_of_float32_are_one() -> None:
    """With (2, 0) they have the products 1 and 3 on average; exactly with (1, 2e7) only."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 1e-7]], dtype=torch.float64)
    found = equiangular(rows @ rows.T, torch.tensor([1.0, 3.0]).double())
    assert_close(found.coefficients @ rows, torch.tensor([2.0, 1e-7]).double())
    rows[1, 1] = 1e-3
    found = equiangular(rows @ rows.T, torch.tensor([1.0, 3.0]).double())
    assert_close(found.coefficients @ rows, torch.tensor([1.0, 2e3]).double(), rtol=1e-6, atol=1e-6)


@given(rows=gradients(m=(1, 6), scales=[1.0]))
def test_remainders_off_the_span_of_the_others(rows: Tensor) -> None:
    """Orthogonal to all others, what they are off by is in their span, or they are zero."""
    units = unit_matrix(rows)
    values = np.linalg.svd(array(units), compute_uv=False) if len(units) else np.ones(1)
    if not len(units) or ((values > 1e-9) & (values < 1e-4)).any():
        return
    found = off_the_others(units @ units.T)
    left = found.coefficients @ units
    assert_close((left * left).sum(1), found.squared_lengths, rtol=1e-6, atol=1e-13)
    for i, remainder in enumerate(left):
        others = array(units)[np.arange(len(units)) != i]
        assert np.abs(others @ array(remainder)).max(initial=0) <= 1e-7
        nearest = np.linalg.lstsq(others.T, array(units[i]), rcond=1e-6)[0] @ others
        assert np.allclose(array(remainder), array(units[i]) - nearest, rtol=0, atol=1e-7)


# --- two rows -------------------------------------------------------------------------------------


def test_arithmetic_of_floats_and_tensors_agrees() -> None:
    """Each operation by hand, in both kinds of number."""
    for x, y in [(4.0, 9.0), (-4.0, 0.0)]:
        one, two = torch.tensor(x).double(), torch.tensor(y).double()
        assert (
            FLOATS.where(x > 0, y, 1.0) == TENSORS.where(one > 0, two, 1.0) == (y if x > 0 else 1)
        )
        assert FLOATS.positive(x) == TENSORS.positive(one) == (4 if x > 0 else 0)
        assert FLOATS.larger(x, y) == TENSORS.larger(one, two) == y
        assert FLOATS.sqrt(y) == TENSORS.sqrt(two) == (3 if y else 0)
    assert TENSORS.where(torch.tensor(1.0).double() > 0, torch.tensor(2.0).double(), 1).dtype == (
        torch.float64
    )


def test_weights_of_pair_stay_on_the_device() -> None:
    """The meta device raises where a number is read, so that nothing here waits for a device."""
    seen = []

    def formula(a, h, b, of):
        seen.append((a, h, b))
        return a + 10 * h, b

    gramian = torch.tensor([[1.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    assert weights_of_pair(formula, gramian).tolist() == [21.0, 3.0]
    assert seen == [(1.0, 2.0, 3.0)]
    weights = weights_of_pair(formula, gramian.to("meta"))
    assert weights.device.type == "meta"
    assert (weights.shape, weights.dtype) == ((2,), torch.float64)


# --- solvers --------------------------------------------------------------------------------------


def unit_matrix(rows: Tensor) -> Tensor:
    """Return the rows that are not zero, scaled to unit length."""
    rows = rows[rows.any(1)]
    return rows / rows.norm(dim=1, keepdim=True)


@given(rows=gradients(scales=[1.0]), seed=st.integers(0, 2**16), positive=st.booleans())
@settings(max_examples=400)
def test_projection_on_the_dual_cone(rows: Tensor, seed: int, positive: bool) -> None:
    """Karush, Kuhn, Tucker: multipliers and inner products are >= 0 and complementary.

    These conditions are sufficient, the problem being convex. And the point itself, which is
    unique, is the one that SciPy's NNLS finds on the vectors.
    """
    units = unit_matrix(rows)
    if not len(units):
        return
    gramian = units @ units.T
    start = random_gradients(1, len(units), seed)[0] * 10.0 ** (seed % 5 - 2)
    if positive:
        start = start.abs()  # as CAGrad asks: the mean of the rows
    multipliers = project_on_dual_cone(gramian, start)
    scale = float(start.abs().sum())
    products = gramian @ (start + multipliers)
    assert (multipliers >= 0).all()
    assert (products >= -1e-12 * scale).all()
    assert abs(float(multipliers @ products)) <= 1e-11 * scale * max(scale, 1e-300)
    expected, _ = projection_by_nnls(array(units), array(start @ units))
    assert np.linalg.norm(array((start + multipliers) @ units) - expected) <= 2e-6 * scale


@given(rows=gradients(["non_conflicting"], scales=[1.0]))
@settings(max_examples=20)
def test_projection_of_what_is_in_the_cone(rows: Tensor) -> None:
    """Nothing has to be added."""
    units = unit_matrix(rows)
    start = torch.ones(len(units), dtype=torch.float64)
    assert not project_on_dual_cone(units @ units.T, start).any()


def test_projection_by_hand() -> None:
    """(1, 0) and (-4, 3)/5; start = their sum times (1, 2): (1 - 8/5, 6/5) = (-0.6, 1.2).

    Conflict with the first: -0.6. Adding 0.6 of it gives (0, 1.2), whose product with the second
    is 0.72. So the multipliers are (0.6, 0).
    """
    units = torch.tensor([[1.0, 0.0], [-0.8, 0.6]], dtype=torch.float64)
    multipliers = project_on_dual_cone(units @ units.T, torch.tensor([1.0, 2.0]).double())
    assert_close(multipliers, torch.tensor([0.6, 0.0]).double())


class Problem(NamedTuple):
    """Minimise beta^T y + phi |U^T y| over y >= 0, a^T y = 1, with beta as CAGrad has it."""

    units: Tensor
    gramian: Tensor
    linear: Tensor
    radius: float
    sizes: Tensor

    def excess_of(self, y: Tensor) -> float:
        """Return by how much y misses the first-order conditions, relative to the scale.

        They are sufficient since the objective is convex: at the minimum, slope_i / a_i is the same
        for every row in use and no smaller for the others, with slope = beta + phi C y / |U^T y|.
        """
        _, gramian, linear, radius, sizes = self
        assert (y >= 0).all()
        assert float(sizes @ y) == pytest.approx(1)
        slope = (linear + radius * (gramian @ y) / norm_of(y, gramian)) / sizes
        scale = float((linear.abs().max() + radius) / sizes.min())
        return (float((sizes * y) @ slope) - float(slope.min())) / scale


def problem(rows: Tensor, seed: int, radius: float) -> Problem | None:
    units = unit_matrix(rows)
    k = len(units)
    rng = np.random.default_rng(seed)
    mean = torch.from_numpy(rng.uniform(0.1, 1.0, k))
    sizes = torch.from_numpy(10.0 ** rng.uniform(-3, 0, k))
    gramian = units @ units.T
    phi = radius * norm_of(mean, gramian)
    if not k or phi < 1e-6:
        return None
    return Problem(units, gramian, gramian @ mean, phi, sizes / sizes.max())


PROBLEMS = given(
    rows=gradients(scales=[1.0]),
    seed=st.integers(0, 2**16),
    radius=st.sampled_from([0.05, 0.4, 1.0, 3.0]),
)


@PROBLEMS
@settings(max_examples=300)
def test_minimum_of_linear_plus_norm(rows: Tensor, seed: int, radius: float) -> None:
    given_ = problem(rows, seed, radius)
    if given_ is None:
        return
    units, gramian, linear, phi, sizes = given_
    start = 1 / sizes
    start = start / (sizes @ start)
    y = minimize_linear_plus_norm(gramian, linear, phi, sizes, start, may_vanish=True)
    if y is None:
        least = least_norm_weights(array(units), array(sizes)) @ array(units)
        assert np.linalg.norm(least) <= 1e-6 * np.linalg.norm(1 / array(sizes))
        return
    assert given_.excess_of(y) <= 1e-9


@PROBLEMS
@settings(max_examples=300)
def test_pivoting_finds_the_minimum_or_says_that_it_did_not(rows, seed, radius) -> None:
    given_ = problem(rows, seed, radius)
    if given_ is None:
        return
    units, gramian, linear, phi, sizes = given_
    y = minimize_by_pivoting(gramian, linear, phi, sizes)
    if y is not None and vanishes(y, gramian):
        assert (y >= 0).all()
        assert np.linalg.norm(array(y) @ array(units)) <= 1e-6 * float(y.sum())
    elif y is not None:
        assert given_.excess_of(y) <= 1e-11

    step = minimize_for_few(gramian.tolist(), linear.tolist(), phi, sizes.tolist())
    if step is not None:
        multipliers = torch.tensor(step, dtype=torch.float64)
        assert norm_of(multipliers, gramian) == pytest.approx(phi, rel=1e-9)
        assert given_.excess_of(multipliers / (sizes @ multipliers)) <= 1e-11


@pytest.mark.parametrize("name", ["generic", "conflicting", "unequal_norms", "near_parallel"])
@pytest.mark.parametrize("m", [3, 8, 40])
def test_pivoting_usually_works(name: str, m: int) -> None:
    """Otherwise the test above would be empty. Independent rows always get there."""
    for seed in range(10):
        given_ = problem(matrix(name, m, 3 * m, seed), seed, 0.4)
        assert given_ is not None
        _, gramian, linear, phi, sizes = given_
        assert minimize_by_pivoting(gramian, linear, phi, sizes) is not None
        if name != "near_parallel":  # closer than the pivots allowed
            assert minimize_for_few(gramian.tolist(), linear.tolist(), phi, sizes.tolist())


def test_parallel_rows_are_told_by_their_length() -> None:
    """Of the first, the third and the last row the third counts: the shortest, and the earlier."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]).double()
    norms = rows.norm(dim=1)
    units = rows / norms[:, None]
    assert _pivoting._shortest_of_parallel(units @ units.T, 1 / norms).tolist() == [1, 2, 3]


@pytest.mark.parametrize("m", [20, 40])
def test_pivoting_works_where_rows_are_parallel(m: int) -> None:
    """Every second row is a multiple of its neighbour: no face that holds both has an inverse."""
    for seed in range(10):
        rows = random_gradients(m, 2 * m, seed)
        rows[1::2] = rows[::2]
        given_ = problem(rows, seed, 0.4)
        assert given_ is not None
        _, gramian, linear, phi, sizes = given_
        y = minimize_by_pivoting(gramian, linear, phi, sizes)
        assert y is not None
        assert given_.excess_of(y) <= 1e-11


@pytest.mark.parametrize("seed", [38, 76, 112])
def test_pivoting_gives_up_soon(seed: int, monkeypatch) -> None:
    """Rows that depend on each other may take turns in any order, and 16 have 2e13 orders.

    These do for hundreds of steps if nothing stops them; found by search. Counted are solutions
    of linear systems.
    """
    calls = []
    eliminate = _pivoting._eliminate
    monkeypatch.setattr(_pivoting, "_eliminate", lambda rows: calls.append(1) or eliminate(rows))
    rows = matrix("stationary", 16, 9, seed)
    verdict = judge_cagrad(array(rows), array(CAGrad(c=1.5)(rows)), 1.5)
    assert max(verdict.outside, verdict.gap) <= 1e-10
    assert 1 < len(calls) <= 20


@pytest.mark.parametrize("size", [1, 2, 7])
def test_elimination(size: int) -> None:
    """Against NumPy; and a row that depends on others is left out, as if it were not there."""
    rows = random_gradients(size, size + 3, seed=size)
    matrix_ = array(rows @ rows.T)
    right = array(random_gradients(size, 2, seed=9))
    expected = np.linalg.solve(matrix_, right)
    found = np.array(_pivoting._eliminate(np.hstack([matrix_, right]).tolist())).T
    assert np.allclose(found, expected, rtol=1e-9)
    twice = np.arange(size + 1).clip(0, size - 1)  # the last row once more
    repeated = np.hstack([matrix_[twice][:, twice], right[twice]])
    found = np.array(_pivoting._eliminate(repeated.tolist())).T
    assert np.allclose(found[:-1], expected, rtol=1e-9)
    assert not found[-1].any()


def test_first_face_is_right_where_rows_are_orthogonal() -> None:
    """beta = (1, 2, 4), a = 1, phi = 2: at height t the multipliers are max(t - beta, 0).

    (t - 1)^2 + (t - 2)^2 = 4 has the root t = (3 + sqrt(7)) / 2 = 2.8, between 2 and 4. So the
    first two count. And with beta = (1, 3), a = (1/2, 1) the second counts from t = 3 on, where the
    first has a multiplier of 3/2 - 1 = 1/2.
    """
    assert _pivoting._guess_face([1.0, 4.0, 2.0], 2.0, [1.0, 1.0, 1.0]) == ([0, 2, 1], 2)
    assert _pivoting._guess_face([3.0, 1.0], 0.49, [1.0, 0.5]) == ([1, 0], 1)
    assert _pivoting._guess_face([3.0, 1.0], 0.51, [1.0, 0.5]) == ([1, 0], 2)


def test_a_duality_gap_is_noticed() -> None:
    """Orthogonal rows, beta = 0, a = 1: by symmetry equal multipliers are best, others are not."""
    for multipliers, right in [([1.0, 1.0], True), ([1.0, 1.0 + 1e-9], False), ([1.0, 0.0], False)]:
        step = _pivoting._scaled_to_optimum(multipliers, multipliers, [0.0, 0.0], 1.0, [1.0, 1.0])
        assert (step is not None) == right
        if step is not None:
            assert step == pytest.approx([0.5**0.5] * 2)


@given(m=st.integers(1, 8), extra=st.integers(0, 8), seed=st.integers(0, 2**16))
def test_without_a_linear_term_it_is_the_point_of_least_norm(m, extra, seed) -> None:
    """MGDA, against SciPy's NNLS; unequal sizes stand for unequal norms."""
    units = unit_matrix(random_gradients(m, m + extra, seed))
    sizes = torch.from_numpy(np.random.default_rng(seed).uniform(0.05, 1, m))
    zero = torch.zeros(m, dtype=torch.float64)
    start = 1 / (m * sizes)
    gramian = units @ units.T
    y = minimize_linear_plus_norm(gramian, zero, 1.0, sizes, start, may_vanish=True)
    assert y is not None
    expected = least_norm_weights(array(units), array(sizes)) @ array(units)
    if np.linalg.norm(expected) > 1e-3:
        assert np.allclose(array(y) @ array(units), expected, rtol=0, atol=1e-9)


@given(rows=gradients(scales=[1.0]), seed=st.integers(0, 2**16), decades=st.integers(-9, 9))
@settings(max_examples=150)
def test_shortest_with_given_products(rows: Tensor, seed: int, decades: int) -> None:
    """First-order conditions; or the multipliers that prove that there is none, by SciPy's NNLS."""
    units = unit_matrix(rows)
    if not len(units):
        return
    wanted = (
        torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, len(units))) * 10.0**decades
    )
    found = shortest_with_products(units @ units.T, wanted)
    if found is None:  # a combination of the rows vanishes while what is wanted of it is positive
        beside = np.column_stack([array(units), array(wanted) / float(wanted.max())])
        target = np.r_[np.zeros(units.shape[1]), 1.0]
        multipliers = nonnegative_least_squares(beside.T, target)
        assert np.linalg.norm(multipliers @ beside - target) <= 1e-6 * multipliers.sum()
        return
    slack = units @ (found @ units) - wanted
    tolerance = 1e-11 * float(wanted.max().clamp_min(0) + found.sum())
    assert (found >= 0).all()
    assert (slack >= -tolerance).all()
    assert (slack[found > 0] <= tolerance).all()


def test_shortest_with_given_products_by_hand() -> None:
    """Of (x, y) with x >= 1 and (-3x + 4y) / 5 >= 1 it is (1, 2), of x >= 1 and -x >= -2 (1, 0).

    Nothing has x >= 1 and -x >= -1/2; zero has x >= -1.
    """
    one, other, opposite = (
        torch.tensor([[1, c], [c, 1]], dtype=torch.float64) for c in (0.0, -0.6, -1.0)
    )
    for gramian, wanted, expected in [
        (other, [1, 1], [2.5, 2.5]),  # (2.5 - 1.5, 2)
        (opposite, [1, -2], [1, 0]),
        (opposite, [1, -1], [1, 0]),  # of many
        (opposite, [1, -1 / 2], None),
        (one, [3e-9, -1e200], [3e-9, 0]),
        (one, [-1, 0], [0, 0]),
    ]:
        found = shortest_with_products(gramian, torch.tensor(wanted, dtype=torch.float64))
        assert (found is None) == (expected is None)
        if found is not None:
            difference = found[0] - found[1] if gramian is opposite else found
            right = expected[0] - expected[1] if gramian is opposite else expected
            assert_close(difference, torch.tensor(right, dtype=torch.float64), rtol=1e-9, atol=0)


@given(rows=gradients(m=(1, 6), scales=[1.0]), seed=st.integers(0, 99))
def test_linear_systems_also_singular_ones(rows: Tensor, seed: int) -> None:
    """The solution solves the system wherever the right-hand side lies in the range."""
    units = unit_matrix(rows)
    if not len(units):
        return
    gramian = units @ units.T
    right = gramian @ random_gradients(len(units), 2, seed)
    solution = _active_set._solve(gramian, right)
    assert_close(gramian @ solution, right, rtol=0, atol=1e-8)


def test_nonnegative_least_squares_oracle() -> None:
    """The oracle's own first-order conditions, so that nothing rests on SciPy alone."""
    matrix_, right = array(matrix("generic", 6, 4)), array(random_gradients(1, 6)[0])
    x = nonnegative_least_squares(matrix_, right)
    slope = matrix_.T @ (matrix_ @ x - right)
    assert (x >= 0).all()
    assert (slope >= -1e-12).all()
    assert abs(x @ slope) < 1e-12
