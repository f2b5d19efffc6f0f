"""What is true of ConFIG alone; what holds for every strategy is in test_contract.py.

The oracle solves for the direction on vectors, by NumPy's least squares.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance._gramians import TENSORS
from mtbalance.gradient import ConFIG, _config
from tests._oracles import array, equiangular_by_lstsq
from tests._samplers import gradients, matrix, random_gradients

PREFERENCES = st.lists(st.floats(0.05, 20), min_size=8, max_size=8)


def config(rows: np.ndarray, p: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Return the direction, and how uncertain inner products leave it, relative to all lengths."""
    alive = rows.any(1)
    if not alive.any():
        return np.zeros(rows.shape[1]), 0.0
    wanted = np.ones(len(rows)) if p is None else p
    x, tolerance = equiangular_by_lstsq(rows[alive], wanted[alive])
    if not x.any():
        return x, tolerance
    return (rows @ x).sum() / (x @ x) * x, tolerance


# --- by hand --------------------------------------------------------------------------------------


def test_two_tasks_by_hand() -> None:
    """(1, 0) and (0, 3): along (1, 1), as long as (1 + 3) / sqrt(2).

    With preferences 3 to 1 along (3, 1); the rows' products with that are 3 and 3, which sum to 6
    for a squared length of 10.
    """
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert_close(ConFIG()(rows), torch.tensor([2.0, 2.0]))
    assert_close(ConFIG(preference=[3, 1])(rows), torch.tensor([1.8, 0.6]))


def test_three_tasks_by_hand() -> None:
    """All three are at 45 degrees with (0, 0, 1); projections on it are 5, 5 and 2."""
    rows = torch.tensor([[3.0, 4.0, 5.0], [3.0, -4.0, 5.0], [2.0, 0.0, 2.0]], dtype=torch.float64)
    assert_close(ConFIG()(rows), torch.tensor([0.0, 0.0, 12.0], dtype=torch.float64))


def test_opposite_tasks() -> None:
    """Nothing has a product of 1 with g and with -2g; nearest to it comes zero.

    With an orthogonal h, that comes nearest which has 0 with the two and 1 with h. With preferences
    3 to 1 it is (3 - 1) / 2 with g and -1 with -2g, so the direction is on their line: their sum.
    """
    g = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    h = torch.tensor([[0.0, 0.0, 5.0]], dtype=torch.float64)
    assert ConFIG()(torch.cat([g, -2 * g])).norm() <= 1e-15
    assert ConFIG()(torch.cat([g, -2 * g, g, -g])).norm() == 0
    assert_close(ConFIG()(torch.cat([g, -2 * g, h])), h[0])
    assert_close(ConFIG(preference=[3, 1])(torch.cat([g, -2 * g])), -g[0])


def test_a_long_gradient_turns_the_step_round_where_gradients_depend_on_each_other() -> None:
    """In one dimension, the x of least squares for signs +, +, - is 1/3, and d the plain sum.

    In the plane, (1, 0), (1, 0), (-3, 4) / 5 and (-3, -4) / 5: C has the eigenvectors (1, 1, 0, 0),
    (0, 0, 1, -1) and the like; the second coordinate of x is 0 by symmetry, and the first is
    (1 + 1 - 3/5 - 3/5) / (1 + 1 + 9/25 + 9/25) = 5/17. So d is along (1, 0) and as long as the sum
    of the first coordinates.
    """
    signs = torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert_close(ConFIG()(signs), signs.sum(0))
    assert_close(
        ConFIG()(signs * torch.tensor([[1.0], [1.0], [5.0]])), torch.tensor([-3.0]).double()
    )
    plane = torch.tensor([[1.0, 0], [1.0, 0], [-3.0, 4], [-3.0, -4]], dtype=torch.float64)
    assert_close(ConFIG()(plane), torch.tensor([-4.0, 0.0]).double())
    plane[2:] /= 5
    assert_close(ConFIG()(plane), torch.tensor([0.8, 0.0]).double())


# --- against the oracle ---------------------------------------------------------------------------


@given(rows=gradients(), given_=PREFERENCES)
@settings(max_examples=400)
def test_against_least_squares_on_vectors(rows: Tensor, given_: list[float]) -> None:
    """No direction is longer than the rows together."""
    p = np.array(given_[: len(rows)])
    size = float(rows.norm(dim=1).sum())
    for direction, preferences in (
        (ConFIG()(rows), None),
        (ConFIG(preference=p.tolist())(rows), p),
    ):
        expected, tolerance = config(array(rows), preferences)
        assert np.linalg.norm(array(direction) - expected) <= tolerance * size
        assert direction.norm() <= (1 + 1e-6) * size


@given(m=st.integers(1, 8), extra=st.integers(0, 9), seed=st.integers(0, 2**16), given_=PREFERENCES)
@settings(max_examples=150)
def test_angles_of_independent_rows(m, extra, seed, given_) -> None:
    """Cosines are in the ratio of the preferences, and none is negative; d is the sum projected."""
    rows = random_gradients(m, m + extra, seed)
    p = given_[:m]
    if torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True))[-1] < 1e-2:
        return
    for direction, wanted in ((ConFIG()(rows), np.ones(m)), (ConFIG(preference=p)(rows), p)):
        ratios = array(rows @ direction / rows.norm(dim=1)) / wanted
        assert np.allclose(ratios, ratios.mean(), rtol=1e-9)
        assert ratios.mean() > 0
        assert_close(direction @ rows.sum(0), direction @ direction, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["generic", "rank_deficient", "duplicate_rows", "unequal_norms"])
@pytest.mark.parametrize("m", [20, 50])
def test_many_tasks(name: str, m: int) -> None:
    for p in (m // 2, 2 * m):
        rows = matrix(name, m, p, seed=p)
        expected, tolerance = config(array(rows))
        size = float(rows.norm(dim=1).sum())
        assert tolerance < 1e-6
        assert np.linalg.norm(array(ConFIG()(rows)) - expected) <= tolerance * size


@given(rows=gradients(["generic", "conflicting"]), f=st.lists(st.floats(-6, 6), min_size=8))
@settings(max_examples=60)
def test_the_line_does_not_depend_on_the_norms(rows: Tensor, f: list[float]) -> None:
    if not rows.any(1).all():
        return
    scaled = rows * 10.0 ** torch.tensor(f[: len(rows)], dtype=rows.dtype)[:, None]
    _, tolerance = config(array(rows))
    one, other = ConFIG()(rows), ConFIG()(scaled)
    if tolerance < 1e-6 and min(one.norm() / rows.norm(), other.norm() / scaled.norm()) > 1e-3:
        cosine = one @ other / (one.norm() * other.norm())
        assert abs(abs(float(cosine)) - 1) <= 1e-8


# --- two tasks, and the rest ----------------------------------------------------------------------


@given(rows=gradients(m=(2, 2)))
@settings(max_examples=150)
def test_two_tasks_on_a_device_get_the_same_weights(rows: Tensor) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    on_device = torch.stack(_config._weights_of_pair(a, h, b, TENSORS))
    assert_close(on_device, ConFIG().weights(gramian), rtol=1e-14, atol=0)


def test_two_tasks_on_a_device_wait_for_nothing() -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = ConFIG().weights(gramian)
    assert (weights.device.type, weights.shape) == ("meta", (2,))
    with pytest.raises(NotImplementedError):  # so the test can fail
        ConFIG().weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("m", [2, 3])
def test_tasks_without_gradient_have_a_weight_of_one(m: int) -> None:
    rows = random_gradients(m, 6)
    rows[1] = 0
    assert ConFIG().solve(rows @ rows.T)[1] == 1
    assert (ConFIG().weights(0 * rows @ rows.T) == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 3])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``)."""
    rows = random_gradients(m, 5)
    rows[0, 0] = bad
    assert not torch.isfinite(ConFIG().solve(rows @ rows.T) @ rows).all()
