"""What is true of UPGrad alone; what holds for every strategy is in test_contract.py.

The oracle projects vectors with SciPy's NNLS (``_oracles.project_on_dual_cone``), one by one.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import PCGrad, UPGrad
from tests._oracles import array, project_on_dual_cone
from tests._samplers import gradients, matrix, random_gradients

PREFERENCES = st.lists(st.floats(0.05, 20), min_size=8, max_size=8)


def projections(rows: Tensor) -> np.ndarray:
    """Return the projection of each row on the dual cone of all."""
    return np.stack([project_on_dual_cone(array(rows), row)[0] for row in array(rows)])


def near(direction: Tensor, expected: np.ndarray, rows: Tensor, tolerance: float = 1e-12) -> bool:
    size = float(rows.norm(dim=1).sum())
    return bool(np.linalg.norm(array(direction) - expected) <= tolerance * size)


# --- by hand --------------------------------------------------------------------------------------


def test_two_tasks_by_hand() -> None:
    """g1 = (1, 0) loses its part along -g2: (1, 0) + 1/2 (-1, 1) = (1/2, 1/2); g2 becomes (0, 1).

    Preferences 1 and 3 are 1/2 and 3/2 at a mean of 1: (1/4, 1/4) + (0, 3/2).
    """
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    assert torch.equal(UPGrad()(rows), torch.tensor([0.5, 1.5]))
    assert torch.equal(UPGrad(preference=[1, 3])(rows), torch.tensor([0.25, 1.75]))


def test_three_tasks_by_hand() -> None:
    """(1, 0, 0), (-1, 1, 0), (0, -1, 1): directions (x, y, z) with x >= 0, y >= x, z >= y.

    The nearest of these to a point are the averages that put its coordinates in order (isotonic
    regression), at least 0. (1, 0, 0): all are 1/3. (-1, 1, 0): the last two are 1/2, the first 0.
    (0, -1, 1): -1/2 twice, so 0, then 1. With preferences 2, 1 and 3, that is 1, 1/2 and 3/2:
    (1/3, 1/3, 1/3) + (0, 1/4, 1/4) + (0, 0, 3/2).
    """
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([1 / 3, 5 / 6, 11 / 6], dtype=torch.float64)
    assert_close(UPGrad()(rows), expected)
    expected = torch.tensor([1 / 3, 7 / 12, 25 / 12], dtype=torch.float64)
    assert_close(UPGrad(preference=(2, 1, 3))(rows), expected)


# --- against the oracle ---------------------------------------------------------------------------


@given(rows=gradients())
@settings(max_examples=300)
def test_it_is_the_sum_of_the_projections(rows: Tensor) -> None:
    assert near(UPGrad()(rows), projections(rows).sum(0), rows)


@given(rows=gradients(), given_=PREFERENCES)
@settings(max_examples=150)
def test_preferences_weigh_the_projections(rows: Tensor, given_: list[float]) -> None:
    """No direction is longer than ``growth`` says."""
    p = np.array(given_[: len(rows)])
    strategy = UPGrad(preference=p.tolist())
    direction = strategy(rows)
    assert near(direction, p / p.mean() @ projections(rows), rows, 1e-11)
    assert direction.norm() <= (1 + 1e-12) * strategy.growth * rows.norm(dim=1).sum()


@pytest.mark.parametrize("name", ["generic", "conflicting", "rank_deficient", "unequal_norms"])
@pytest.mark.parametrize("m", [20, 50])
def test_many_tasks(name: str, m: int) -> None:
    for p in (m // 2, 2 * m):
        rows = matrix(name, m, p, seed=p)
        assert near(UPGrad()(rows), projections(rows).sum(0), rows)


@given(rows=gradients(), factors=st.lists(st.floats(-6, 6), min_size=8, max_size=8))
@settings(max_examples=60)
def test_linear_in_the_norms_of_the_rows(rows: Tensor, factors: list[float]) -> None:
    """The dual cone of diag(f) J is that of J, so d = sum_i f_i pi(g_i)."""
    f = 10.0 ** np.array(factors[: len(rows)])
    scaled = rows * torch.as_tensor(f, device=rows.device)[:, None]
    assert near(UPGrad()(scaled), f @ projections(rows), scaled, 1e-11)


@given(rows=gradients(scales=[1.0]))
@settings(max_examples=60)
def test_gains_of_tasks_grow_with_their_preference(rows: Tensor) -> None:
    """d is linear in the preferences, and <g_i, pi(g_i)> = |pi(g_i)|^2 is the slope of task i's."""
    if len(rows) < 3:
        return
    p = np.full(len(rows), 1.0)
    q = np.array([2.0, *np.full(len(rows) - 1, 1 - 1 / (len(rows) - 1))])  # the same mean
    change = array(UPGrad(preference=q.tolist())(rows)) - array(UPGrad(preference=p.tolist())(rows))
    parts = projections(rows)
    size = float(rows.norm(dim=1).sum())
    expected = parts[0] - parts[1:].sum(0) / (len(rows) - 1)
    assert np.linalg.norm(change - expected) <= 1e-12 * size


# --- two tasks ------------------------------------------------------------------------------------

PAIRS = gradients(m=(2, 2))


@given(rows=PAIRS)
def test_two_tasks_are_those_of_pcgrad(rows: Tensor) -> None:
    assert torch.equal(UPGrad()(rows), PCGrad()(rows))


# --- what is left of the settings -----------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
def test_tasks_without_gradient_keep_the_weight_of_their_preference(m: int) -> None:
    """It shows in the record, and changes no direction: 2 of m - 1 + 2."""
    rows = random_gradients(m, 6)
    rows[1] = 0
    strategy = UPGrad(preference=[1.0, 2.0, 1.0, 1.0][:m])
    assert strategy.solve(rows @ rows.T)[1] == pytest.approx(2 * m / (m + 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 3])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``)."""
    rows = random_gradients(m, 5)
    rows[0, 0] = bad
    assert not torch.isfinite(UPGrad().solve(rows @ rows.T) @ rows).all()
