"""The pure functions on Gramians and the convex solvers, against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import _linalg
from mtbalance._linalg import (
    minimize_linear_plus_norm,
    minimize_on_segment,
    norm_of,
    project_on_dual_cone,
    unit_rows,
)
from tests._oracles import array, least_norm_weights, nonnegative_least_squares
from tests._oracles import project_on_dual_cone as projection_by_nnls
from tests._samplers import gradients, matrix, random_gradients

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


@given(
    rows=gradients(scales=[1.0]),
    seed=st.integers(0, 2**16),
    radius=st.sampled_from([0.05, 0.4, 1.0, 3.0]),
)
@settings(max_examples=300)
def test_minimum_of_linear_plus_norm(rows: Tensor, seed: int, radius: float) -> None:
    """First-order conditions, sufficient since the objective is convex.

    At the minimum, slope_i / a_i is the same for every row in use and no smaller for the others,
    with slope = beta + phi C y / |U^T y|. The linear term is that of CAGrad: beta = C mean.
    """
    units = unit_matrix(rows)
    if not len(units):
        return
    k = len(units)
    gramian = units @ units.T
    rng = np.random.default_rng(seed)
    mean = torch.from_numpy(rng.uniform(0.1, 1.0, k))
    sizes = torch.from_numpy(10.0 ** rng.uniform(-3, 0, k))
    sizes = sizes / sizes.max()
    linear = gramian @ mean
    phi = radius * norm_of(mean, gramian)
    if phi < 1e-6:
        return
    start = 1 / sizes
    start = start / (sizes @ start)
    y = minimize_linear_plus_norm(gramian, linear, phi, sizes, start, may_vanish=True)
    if y is None:
        least = least_norm_weights(array(units), array(sizes)) @ array(units)
        assert np.linalg.norm(least) <= 1e-6 * np.linalg.norm(1 / array(sizes))
        return
    assert (y >= 0).all()
    assert float(sizes @ y) == pytest.approx(1)
    slope = (linear + phi * (gramian @ y) / norm_of(y, gramian)) / sizes
    value = float((sizes * y) @ slope)
    assert float(slope.min()) >= value - 1e-9 * float((linear.abs().max() + phi) / sizes.min())


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


@given(rows=gradients(m=(2, 2), scales=[1.0]), radius=st.sampled_from([0.1, 0.4, 0.99, 1.5, 9.0]))
@settings(max_examples=200)
def test_segment_against_a_fine_search(rows: Tensor, radius: float) -> None:
    """The closed form for two rows is no worse than any of many points of the segment."""
    if not rows.any(1).all():
        return
    rows = rows / rows.norm(dim=1).max()
    mean = rows.mean(0)
    phi = radius * float(mean.norm())
    if phi < 1e-6:
        return
    (a, h), (_, b) = (rows @ rows.T).tolist()
    found = minimize_on_segment(a, h, b, phi)

    def objective(x: Tensor) -> Tensor:
        g_w = torch.stack([x, 1 - x], 1) @ rows
        return g_w @ mean + phi * g_w.norm(dim=1)

    grid = torch.cat([torch.linspace(0, 1, 2001).double(), torch.logspace(-12, -3, 200).double()])
    best = float(objective(torch.cat([grid, 1 - grid])).min())
    if found is None:
        assert best >= -1e-7  # where the combination vanishes the objective is zero
        return
    x, y = found
    assert min(x, y) >= 0
    assert x + y == pytest.approx(1)
    # Rows closer than 1e-7 are one: whatever the weights, g_w points the same way to that squared.
    apart = float((rows[0] - rows[1]).norm())
    slack = 1e-12 if apart > 1e-7 else 1e-12 + (1 + radius) * apart
    assert float(objective(torch.tensor([x]).double())) <= best + slack


def test_segment_of_equal_rows() -> None:
    assert minimize_on_segment(1.0, 1.0, 1.0, 0.4) == (0.5, 0.5)


def test_segment_that_holds_zero() -> None:
    """Rows 1 and -1/2 on a line: g_w = 0 for w = (1/3, 2/3), the minimum if phi > |g0|."""
    assert minimize_on_segment(1.0, -0.5, 0.25, 0.3) is None
    assert minimize_on_segment(1.0, -0.5, 0.25, 0.2) == (0.0, 1.0)


@given(rows=gradients(m=(1, 6), scales=[1.0]), seed=st.integers(0, 99))
def test_linear_systems_also_singular_ones(rows: Tensor, seed: int) -> None:
    """The solution solves the system wherever the right-hand side lies in the range."""
    units = unit_matrix(rows)
    if not len(units):
        return
    gramian = units @ units.T
    right = gramian @ random_gradients(len(units), 2, seed)
    solution = _linalg._solve(gramian, right)
    assert_close(gramian @ solution, right, rtol=0, atol=1e-8)


def test_nonnegative_least_squares_oracle() -> None:
    """The oracle's own first-order conditions, so that nothing rests on SciPy alone."""
    matrix_, right = array(matrix("generic", 6, 4)), array(random_gradients(1, 6)[0])
    x = nonnegative_least_squares(matrix_, right)
    slope = matrix_.T @ (matrix_ @ x - right)
    assert (x >= 0).all()
    assert (slope >= -1e-12).all()
    assert abs(x @ slope) < 1e-12
