"""What is true of MGDA alone; what holds for every strategy is in test_contract.py.

The oracle is SciPy's NNLS on vectors (``_oracles.least_norm_weights``); the conditions of
optimality are checked with numbers of 80 bits.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance._gramians import TENSORS
from mtbalance._pivoting import FEW
from mtbalance.gradient import MGDA, _mgda
from tests._oracles import array, least_norm_weights
from tests._samplers import BY_NAME, gradients, matrix, random_gradients

PREFERENCES = st.lists(st.floats(0.05, 20), min_size=8, max_size=8)
USUAL = sorted(set(BY_NAME) - {"zero_rows"})


def shortest(rows: np.ndarray) -> np.ndarray:
    """Return the shortest convex combination of rows, by NNLS on rows of a length around 1."""
    size = np.linalg.norm(rows, axis=1).min()
    if size == 0:
        return np.zeros(rows.shape[1])
    return least_norm_weights(rows / size, np.ones(len(rows))) @ rows


def missed_by(rows: Tensor, direction: Tensor, p: np.ndarray | None = None) -> float:
    """Return by how much a direction misses what makes it optimal, relative to all lengths.

    A point q of the convex hull of r_i = g_i / p_i is the shortest exactly if <r_i, q> >= |q|^2 for
    every row. That it is in the hull is checked through the weights.
    """
    p = np.ones(len(rows)) if p is None else p
    r = array(rows).astype(np.longdouble) / p[:, None]
    q = array(direction).astype(np.longdouble) / (len(rows) * p.max())
    lengths = np.sqrt((r * r).sum(1))
    return float(((q @ q - r @ q) / np.maximum(lengths * lengths.max(), 1e-300)).max())


# --- by hand --------------------------------------------------------------------------------------


def test_orthogonal_gradients() -> None:
    """w = (9, 1) / 10 makes (9, 3) / 10 of (1, 0) and (0, 3); on the scale of the sum twice that.

    Its products with the rows are both 18/10.
    """
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert_close(MGDA()(rows), torch.tensor([1.8, 0.6]))


def test_the_shorter_of_two_tasks_that_agree_counts_alone() -> None:
    """(1, 0) and (4, 3): towards the second the combination grows by <g2 - g1, g1> = 3 > 0."""
    rows = torch.tensor([[1.0, 0.0], [4.0, 3.0]])
    assert_close(MGDA()(rows), torch.tensor([2.0, 0.0]))
    assert_close(MGDA()(rows.flip(0)), torch.tensor([2.0, 0.0]))


def test_preferences_by_hand() -> None:
    """(1, 0) and (0, 1), preferred 3 to 1, or 3/2 to 1/2 at a mean of 1.

    Of (2/3, 0) and (0, 2), the shortest is w = (9, 1) / 10: (6, 2) / 10. Times 2 * 3/2 that is
    (18, 6) / 10, of which the first task gains three times what the second does.
    """
    for rows in (torch.eye(2), torch.eye(3)[:2], torch.eye(2).repeat(2, 1)):
        preference = [3.0, 1.0] * (len(rows) // 2)
        expected = torch.zeros(rows.shape[1])
        expected[:2] = torch.tensor([1.8, 0.6]) * (len(rows) / 2)
        assert_close(MGDA(preference=preference)(rows), expected)


def test_three_tasks_by_hand() -> None:
    """The corners (0, 2), (2, 1), (-2, 1) of a triangle: its point nearest to zero is (0, 1)."""
    rows = torch.tensor([[0.0, 2.0], [2.0, 1.0], [-2.0, 1.0]], dtype=torch.float64)
    assert_close(MGDA()(rows), torch.tensor([0.0, 3.0], dtype=torch.float64))
    assert_close(MGDA().solve(rows @ rows.T), torch.tensor([0.0, 1.5, 1.5]).double())


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_a_task_without_gradient(m: int, number: int) -> None:
    """Zero is in the hull of the rows, unless the row is left out; then there is one less."""
    rows = random_gradients(m, 6)
    rows[number] = 0
    assert not MGDA()(rows).any()
    assert_close(MGDA().solve(rows @ rows.T).sum(), torch.tensor(m).double())
    ignoring = MGDA(ignore_zero_rows=True)
    assert_close(ignoring(rows), MGDA()(rows[rows.any(1)]))
    assert ignoring.solve(rows @ rows.T)[number] == 0


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_weights_where_no_task_has_a_gradient(m: int, *, ignore: bool) -> None:
    weights = MGDA(ignore_zero_rows=ignore).weights(torch.zeros(m, m, dtype=torch.float64))
    assert (weights == 1).all()


# --- optimality -----------------------------------------------------------------------------------


@given(rows=gradients(USUAL))
@settings(max_examples=400)
def test_no_convex_combination_is_shorter(rows: Tensor) -> None:
    if not rows.any(1).all():
        return
    weights = MGDA().solve(rows @ rows.T)
    assert (weights >= 0).all()
    assert float(weights.sum()) in (0.0, pytest.approx(len(rows), rel=1e-12))
    assert missed_by(rows, MGDA()(rows)) <= 1e-14


@given(rows=gradients(USUAL), given_=PREFERENCES)
@settings(max_examples=300)
def test_no_combination_of_rows_over_preferences_is_shorter(rows: Tensor, given_) -> None:
    """No direction is longer than ``growth`` says."""
    if not rows.any(1).all():
        return
    p = np.array(given_[: len(rows)])
    strategy = MGDA(preference=p.tolist())
    direction = strategy(rows)
    assert missed_by(rows, direction, p / p.mean()) <= 1e-13
    assert direction.norm() <= (1 + 1e-12) * strategy.growth * rows.norm(dim=1).sum()


@given(rows=gradients(USUAL, scales=[1.0]), given_=PREFERENCES)
@settings(max_examples=200)
def test_against_nnls(rows: Tensor, given_: list[float]) -> None:
    """As exact as NNLS, which takes squares of what is to be zero."""
    if not rows.any(1).all():
        return
    p = np.array(given_[: len(rows)])
    p /= p.mean()
    for direction, over in (
        (MGDA()(rows), np.ones(len(rows))),
        (MGDA(preference=p.tolist())(rows), p),
    ):
        expected = len(rows) * over.max() * shortest(array(rows) / over[:, None])
        size = float(rows.norm(dim=1).sum())
        assert np.linalg.norm(array(direction) - expected) <= 1e-6 * size


@pytest.mark.parametrize("m", [2, 3, 8, 20, 50])
def test_independent_rows_against_nnls(m: int) -> None:
    for seed in range(5):
        rows = random_gradients(m, 3 * m, seed)
        rows = rows * 10.0 ** torch.linspace(-2, 2, m, dtype=rows.dtype)[:, None]
        expected = m * shortest(array(rows))
        assert np.linalg.norm(array(MGDA()(rows)) - expected) <= 1e-11 * np.linalg.norm(expected)


@pytest.mark.parametrize("m", [FEW, FEW + 1, 50])
@pytest.mark.parametrize("name", USUAL)
def test_many_tasks(name: str, m: int) -> None:
    for p in (m // 2, 2 * m):
        rows = matrix(name, m, p, seed=p)
        if rows.any(1).all():
            assert missed_by(rows, MGDA()(rows)) <= 1e-13


@pytest.mark.parametrize("way", ["tensors", "walk"])
@pytest.mark.parametrize("name", ["generic", "conflicting", "duplicate_rows", "stationary"])
def test_every_way_leads_to_the_solution(name: str, way: str, monkeypatch) -> None:
    """Few tasks the way of many; all the way of the cases where pivoting fails."""
    monkeypatch.setattr(_mgda, "minimize_for_few", lambda *args: None)
    if way != "tensors":
        monkeypatch.setattr(_mgda, "minimize_by_pivoting", lambda *args: None)
    for seed in range(12):
        rows = matrix(name, 3 + seed % 5, 2 + seed, seed)
        if rows.any(1).all():
            assert missed_by(rows, MGDA()(rows)) <= 1e-13


# --- geometry -------------------------------------------------------------------------------------


@given(rows=gradients(["opposite_rows", "stationary"], m=(2, 8)))
@settings(max_examples=100)
def test_zero_where_no_direction_helps_everyone(rows: Tensor) -> None:
    assert MGDA()(rows).norm() <= 1e-15 * rows.norm(dim=1).sum()


@given(rows=gradients(USUAL), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_more_tasks_make_the_combination_shorter(rows: Tensor, seed: int) -> None:
    """And those that are themselves convex combinations change nothing."""
    if not rows.any(1).all():
        return
    m = len(rows)
    one = MGDA()(rows) / m
    weights = torch.as_tensor(np.random.default_rng(seed).dirichlet(np.ones(m)), device=rows.device)
    between = MGDA()(torch.cat([rows, (weights @ rows)[None]])) / (m + 1)
    size = rows.norm(dim=1).sum()
    if float(rows.norm(dim=1).max() / rows.norm(dim=1).min()) < 1e6:
        assert (between - one).norm() <= 1e-6 * size
    other = torch.cat([rows, rows[:1].roll(1, 1) + rows[-1:]])
    if other.any(1).all():
        assert (MGDA()(other) / (m + 1)).norm() <= one.norm() + 1e-7 * size
    assert one.norm() <= (1 + 1e-12) * rows.norm(dim=1).min()


# --- two tasks ------------------------------------------------------------------------------------


@given(rows=gradients(m=(2, 2)), p=st.floats(0.05, 20), ignore=st.booleans())
@settings(max_examples=300)
def test_two_tasks_on_a_device_get_the_same_weights(rows: Tensor, p: float, ignore: bool) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    strategy = MGDA(preference=[p, 1.0], ignore_zero_rows=ignore)
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    on_device = torch.stack(strategy._weights_of_pair(a, h, b, TENSORS))
    assert_close(on_device, strategy.weights(gramian), rtol=1e-13, atol=0)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("preference", [None, [1.0, 2.0]])
def test_two_tasks_on_a_device_wait_for_nothing(preference, *, ignore: bool) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = MGDA(preference=preference, ignore_zero_rows=ignore).weights(gramian)
    assert (weights.device.type, weights.shape) == ("meta", (2,))
    with pytest.raises(NotImplementedError):  # so the test can fail
        MGDA().weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("exponent", [-15, -12, -6, 6, 12, 15])
@pytest.mark.parametrize("angle", [0.3, 1.5707963, 2.8])
def test_two_tasks_of_any_ratio_of_norms(exponent: int, angle: float) -> None:
    """The weights are not kept from becoming small."""
    rows = torch.tensor([[1.0, 0.0], [np.cos(angle), np.sin(angle)]], dtype=torch.float64)
    rows[1] *= 10.0**exponent
    assert missed_by(rows, MGDA()(rows)) <= 1e-15
    least = min(1.0, 10.0**exponent)
    expected = 2 * least * (np.sin(angle) if angle > 1.6 else 1.0)
    assert MGDA()(rows).norm() == pytest.approx(expected, rel=1e-5 if abs(exponent) < 12 else 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("ignore", [False, True])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int, *, ignore: bool) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``)."""
    rows = random_gradients(m, 5)
    rows[0, 0] = bad
    strategy = MGDA(ignore_zero_rows=ignore)
    assert not torch.isfinite(strategy.solve(rows @ rows.T) @ rows).all()


def test_repr() -> None:
    assert repr(MGDA()) == "MGDA(ignore_zero_rows=False)"
    expected = "MGDA(preference=[1.0, 2.0], ignore_zero_rows=True)"
    assert repr(MGDA([1, 2], ignore_zero_rows=True)) == expected
