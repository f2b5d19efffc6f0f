"""What is true of IMTLG alone; what holds for every strategy is in test_contract.py.

The oracles are the paper's formula, on vectors, and NumPy's least squares where that has no answer.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._gramians import TENSORS
from mtbalance.gradient import IMTLG, _imtlg
from mtbalance.weighting import Equal
from tests._oracles import array, equiangular_by_lstsq
from tests._samplers import gradients, matrix, random_gradients

LEVELS = torch.tensor([[3.0, 4.0, 5.0], [3.0, -4.0, 5.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
"""Rows at 45 degrees with (0, 0, 1), of norms 5, 5 and 1 times sqrt(2).

(5, 5, -6) / 4 of the unit rows is (0, 0, 1) times sqrt(2), as 5 * 3/5 + 5 * 3/5 - 6 * 1 = 0.
"""


def paper(rows: np.ndarray) -> np.ndarray:
    """Return the weights of the paper's closed form, which sum to 1: alpha_{2:} = g1 U' (D U')^-1.

    D and U are the differences of the first gradient, or its unit vector, and the others.
    """
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    D, U = rows[0] - rows[1:], units[0] - units[1:]
    others = np.linalg.solve((D @ U.T).T, U @ rows[0])
    return np.r_[1 - others.sum(), others]


def imtlg(rows: np.ndarray, *, official: bool = False) -> tuple[np.ndarray, float]:
    """Return the direction, and how uncertain inner products leave it, relative to all lengths.

    By least squares on vectors, for x and for its coefficients. The uncertainty is infinite where
    the weights nearly sum to zero.
    """
    rows = rows[rows.any(1)]
    if len(rows) == 0:
        return np.zeros(rows.shape[1]), 0.0
    norms = np.linalg.norm(rows, axis=1)
    x, tolerance = equiangular_by_lstsq(rows, np.ones(len(rows)))
    if not x.any():
        return x, tolerance
    units = rows / norms[:, None]
    limit = 1e-6 * len(rows) ** 0.5
    shares = np.linalg.lstsq(units.T, x, rcond=limit)[0] / norms
    cancelled = np.abs(shares).sum() / abs(shares.sum())
    tolerance = tolerance * cancelled**2 if cancelled < 1e5 else np.inf
    total = shares.sum() if official else abs(shares.sum())
    return len(rows) * x / total, tolerance


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["absolute", "official"])
def test_two_tasks_by_hand(normalize: str) -> None:
    """(1, 0) and (0, 3): weights 3/4 and 1/4, times two; the projections are 3/2 each."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert_close(IMTLG(normalize)(rows), torch.tensor([1.5, 1.5]))


def test_the_sign_of_the_sum() -> None:
    """v = (5/5, 5/5, -6/n): of a third row of norm 6 the sum is 1, so d = 3 (1, 1, -1) J.

    Of one of norm 2 it is -1: the official weights are 3 (-1, -1, 3), and all tasks lose.
    """
    rows = LEVELS * torch.tensor([1.0, 1.0, 6.0]).double()[:, None]
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for normalize in ("absolute", "official"):
        assert_close(IMTLG(normalize)(rows), 3 * 4 * up)
    rows = LEVELS * torch.tensor([1.0, 1.0, 2.0]).double()[:, None]
    assert_close(IMTLG()(rows), 3 * 4 * up)
    assert_close(IMTLG("official")(rows), -3 * 4 * up)
    weights = torch.tensor([-3.0, -3.0, 9.0], dtype=torch.float64)
    assert_close(IMTLG("official").solve(rows @ rows.T), weights)


@pytest.mark.parametrize("normalize", ["absolute", "official"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_weights_that_sum_to_zero(normalize: str, scale: float) -> None:
    """v = (1, 1, -2): the projection of the sum on (0, 0, 1) takes their place. It is counted."""
    rows = LEVELS * torch.tensor([1.0, 1.0, 3.0]).double()[:, None]
    strategy = IMTLG(normalize)
    with pytest.warns(RuntimeWarning, match="IMTLG fell back: the weights sum to zero"):
        direction = strategy(scale * rows)
    assert_close(direction / scale, torch.tensor([0.0, 0.0, 13.0], dtype=torch.float64))
    strategy(scale * rows)
    assert strategy.fallbacks == 2


def test_opposite_tasks() -> None:
    """Nothing has equal projections on g and -g but zero, or what is orthogonal to both."""
    g = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    h = torch.tensor([[0.0, 0.0, 5.0]], dtype=torch.float64)
    assert IMTLG()(torch.cat([g, -2 * g])).norm() <= 1e-15
    with pytest.warns(RuntimeWarning, match="fell back"):
        assert IMTLG()(torch.cat([g, -2 * g, g, -g])).norm() == 0
    # v = (0, 0, 1/5): the weight of h is 3, as that of three tasks
    assert_close(IMTLG()(torch.cat([g, -2 * g, h])), 3 * h[0])


def test_the_record_of_a_step_shows_a_fallback() -> None:
    rows = LEVELS * torch.tensor([1.0, 1.0, 3.0]).double()[:, None]
    shared = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    balancer = Balancer(Equal(), IMTLG(), tasks=("a", "b", "c"), shared=[shared])
    with pytest.warns(RuntimeWarning, match="fell back"):
        record = balancer.backward(dict(zip("abc", rows @ shared, strict=True)))
    assert record.fallbacks == 1


# --- against the oracles --------------------------------------------------------------------------


@given(m=st.integers(2, 8), extra=st.integers(0, 9), seed=st.integers(0, 2**16))
@settings(max_examples=150)
def test_independent_rows_have_the_weights_of_the_paper(m: int, extra: int, seed: int) -> None:
    """And equal projections, of which none is negative unless all are, officially."""
    rows = random_gradients(m, m + extra, seed)
    if torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True))[-1] < 1e-2:
        return
    expected = m * paper(array(rows))
    if np.abs(expected).max() > 1e3:
        return
    weights = array(IMTLG("official").solve(rows @ rows.T))
    assert np.allclose(weights, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())
    projections = rows @ IMTLG()(rows) / rows.norm(dim=1)
    assert projections.min() > 0
    assert_close(projections, projections.mean().expand(m), rtol=1e-8, atol=0)
    official = rows @ IMTLG("official")(rows) / rows.norm(dim=1)
    assert_close(official.abs(), projections, rtol=1e-8, atol=0)


@pytest.mark.filterwarnings("ignore:IMTLG fell back")
@given(rows=gradients())
@settings(max_examples=300)
def test_against_least_squares_on_vectors(rows: Tensor) -> None:
    size = float(rows.norm(dim=1).sum())
    for normalize in ("absolute", "official"):
        expected, tolerance = imtlg(array(rows), official=normalize == "official")
        direction = IMTLG(normalize)(rows)
        assert torch.isfinite(direction).all()
        if tolerance < 1e-2:
            assert np.linalg.norm(array(direction) - expected) <= tolerance * size


@pytest.mark.parametrize("name", ["generic", "rank_deficient", "duplicate_rows", "unequal_norms"])
@pytest.mark.parametrize("m", [20, 50])
def test_many_tasks(name: str, m: int) -> None:
    for p in (m // 2, 2 * m):
        rows = matrix(name, m, p, seed=p)
        expected, tolerance = imtlg(array(rows))
        size = float(rows.norm(dim=1).sum())
        assert tolerance < 1e-4
        assert np.linalg.norm(array(IMTLG()(rows)) - expected) <= tolerance * size


def test_the_sum_of_the_official_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            rows = random_gradients(4, 6, seed)
            weights = IMTLG("official").solve(rows @ rows.T)
            assert float(weights.sum()) == pytest.approx(4, rel=1e-9)
            assert abs(float(IMTLG().solve(rows @ rows.T).sum())) == pytest.approx(4, rel=1e-9)


# --- two tasks, and the rest ----------------------------------------------------------------------


@given(rows=gradients(m=(2, 2)))
@settings(max_examples=150)
def test_two_tasks_on_a_device_get_the_same_weights(rows: Tensor) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    on_device = torch.stack(_imtlg._weights_of_pair(a, h, b, TENSORS))
    assert_close(on_device, IMTLG().weights(gramian), rtol=1e-14, atol=0)


def test_two_tasks_on_a_device_wait_for_nothing() -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = IMTLG().weights(gramian)
    assert (weights.device.type, weights.shape) == ("meta", (2,))
    with pytest.raises(NotImplementedError):  # so the test can fail
        IMTLG().weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("m", [2, 3])
def test_tasks_without_gradient_have_a_weight_of_one(m: int) -> None:
    rows = random_gradients(m, 6)
    rows[1] = 0
    assert IMTLG().solve(rows @ rows.T)[1] == 1
    assert (IMTLG().weights(0 * rows @ rows.T) == 1).all()


def test_nothing_bounds_the_direction() -> None:
    """So a Balancer looks at each before it is written."""
    assert IMTLG().growth is None
    rows = LEVELS * torch.tensor([1.0, 1.0, 3 + 1e-6]).double()[:, None]
    assert IMTLG()(rows).norm() > 1e5 * rows.norm(dim=1).sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 3])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``)."""
    rows = random_gradients(m, 5)
    rows[0, 0] = bad
    assert not torch.isfinite(IMTLG().solve(rows @ rows.T) @ rows).all()


def test_settings() -> None:
    assert repr(IMTLG()) == "IMTLG(normalize='absolute')"
    with pytest.raises(ValueError, match="`normalize` must be one of 'absolute', 'official', but"):
        IMTLG("none")
