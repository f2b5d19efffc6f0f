"""What is true of DualProj alone; what holds for every strategy is in test_contract.py.

The oracle projects the vector of the sum with SciPy's NNLS (``_oracles.project_on_dual_cone``).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import DualProj
from tests._oracles import array, project_on_dual_cone
from tests._samplers import gradients, matrix, random_gradients

PREFERENCES = st.lists(st.floats(0.05, 20), min_size=8, max_size=8)


def near(direction: Tensor, expected: np.ndarray, rows: Tensor, tolerance: float = 1e-12) -> bool:
    size = float(rows.norm(dim=1).sum())
    return bool(np.linalg.norm(array(direction) - expected) <= tolerance * size)


# --- by hand --------------------------------------------------------------------------------------


def test_two_tasks_by_hand() -> None:
    """The sum of (1, 0) and (-2, 2) is (-1, 2); what conflicts with the first is cut off.

    Preferences 3 and 1 are 3/2 and 1/2 at a mean of 1: (3/2, 0) + (-1, 1) = (1/2, 1), whose
    products are 1/2 and 1, so it stays.
    """
    rows = torch.tensor([[1.0, 0.0], [-2.0, 2.0]])
    assert torch.equal(DualProj()(rows), torch.tensor([0.0, 2.0]))
    assert torch.equal(DualProj(preference=[3, 1])(rows), torch.tensor([0.5, 1.0]))


def test_three_tasks_by_hand() -> None:
    """(1, 0, 0), (-1, 1, 0), (-2, -3, 2): directions (x, y, z) with x >= 0, y >= x, 2z >= 2x + 3y.

    The sum is (-2, -2, 2). With x = y = 0, what has to be added is (2, 2, 0) = 4 g1 + 2 g2, whose
    multipliers are positive, and (0, 0, 2) has the product 4 with g3, which needs none.
    """
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-2.0, -3.0, 2.0]]).double()
    assert_close(DualProj()(rows), torch.tensor([0.0, 0.0, 2.0]).double())
    assert_close(DualProj().solve(rows @ rows.T), torch.tensor([5.0, 3.0, 1.0]).double())


# --- against the oracle, and what makes a projection ----------------------------------------------


@given(rows=gradients(), given_=PREFERENCES)
@settings(max_examples=300)
def test_it_is_the_projection_of_the_sum(rows: Tensor, given_: list[float]) -> None:
    """No direction is longer than ``growth`` says."""
    p = np.array(given_[: len(rows)])
    expected, _ = project_on_dual_cone(array(rows), p / p.mean() @ array(rows))
    strategy = DualProj(preference=p.tolist())
    direction = strategy(rows)
    assert near(direction, expected, rows, 1e-11)
    assert direction.norm() <= (1 + 1e-12) * strategy.growth * rows.norm(dim=1).sum()
    expected, _ = project_on_dual_cone(array(rows), array(rows).sum(0))
    assert near(DualProj()(rows), expected, rows)


@given(rows=gradients())
@settings(max_examples=150)
def test_multipliers_are_positive_only_where_nothing_is_gained(rows: Tensor) -> None:
    """lambda >= 0 and lambda_i <g_i, d> = 0, so <d, sum> = |d|^2."""
    direction = DualProj()(rows)
    added = DualProj().solve(rows @ rows.T) - 1
    size = float(rows.norm(dim=1).sum())
    assert (added >= 0).all()
    assert (added * (rows @ direction)).abs().sum() <= 1e-11 * size**2
    assert abs(float(direction @ rows.sum(0) - direction @ direction)) <= 1e-11 * size**2


@pytest.mark.parametrize("name", ["generic", "conflicting", "rank_deficient", "unequal_norms"])
@pytest.mark.parametrize("m", [20, 50])
def test_many_tasks(name: str, m: int) -> None:
    for p in (m // 2, 2 * m):
        rows = matrix(name, m, p, seed=p)
        expected, _ = project_on_dual_cone(array(rows), array(rows).sum(0))
        assert near(DualProj()(rows), expected, rows)


@given(rows=gradients(m=(2, 8)))
@settings(max_examples=100)
def test_a_sum_that_conflicts_with_nobody_stays(rows: Tensor) -> None:
    """Even where pairs of tasks conflict. Bit for bit: rows are small integers, weights are 1."""
    if (rows @ rows.sum(0) >= 0).all():
        assert (DualProj().solve(rows @ rows.T) == 1).all() or not rows.any()


# --- what is left of the settings -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 3])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``)."""
    rows = random_gradients(m, 5)
    rows[0, 0] = bad
    assert not torch.isfinite(DualProj().solve(rows @ rows.T) @ rows).all()
