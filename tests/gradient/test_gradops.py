"""What is true of GradOPS alone; what holds for every strategy is in test_contract.py.

The oracle projects vectors, in long double, off an orthonormal basis of the others.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance._gramians import TENSORS
from mtbalance.gradient import GradOPS, PCGrad, _gradops
from tests._device import on_device
from tests._oracles import Array, array
from tests._samplers import gradients, matrix, orthogonal, random_gradients

ALPHAS = st.sampled_from([0.0, -3.0, -1.0, 0.5, 2.0])
HAND = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)


def off(vector: Array, others: Array) -> Array:
    """Project a unit vector off the span of others, by Gram and Schmidt, each step twice."""
    basis: list[Array] = []
    for other in (*others, vector):
        left = other
        for _ in range(3):
            for direction in basis:
                left = left - (left @ direction) * direction
        length = np.sqrt(left @ left)
        if other is vector:
            return left if length > 1e-6 else 0 * left
        if length > 1e-6:
            basis.append(left / length)
    raise AssertionError


def gradops(rows: Array, alpha: float) -> Array:
    wide = rows[rows.any(1)].astype(np.longdouble)
    if not len(wide):
        return np.zeros(rows.shape[1])
    norms = np.sqrt((wide**2).sum(1))
    units = wide / norms[:, None]
    left = units.copy()
    for i, unit in enumerate(units):
        if (units @ unit < -1e-14).any():
            left[i] = off(unit, np.delete(units, i, 0))
    left *= norms[:, None]
    if not alpha:
        return left.sum(0).astype(float)
    gains = units @ left.sum(0)
    gaining = gains > 1e-16 * norms.sum()
    if not gaining.any():
        return np.zeros(rows.shape[1])
    powers = (gains[gaining] / gains.max()) ** alpha
    weights = len(powers) * powers / powers.sum()
    return (weights @ left[gaining]).astype(float)


def conditioning(rows: Array) -> tuple[float, bool]:
    """Return the least singular value of unit rows that is not zero, and whether that is clear."""
    alive = rows[rows.any(1)]
    if not len(alive):
        return 1.0, True
    values = np.linalg.svd(alive / np.linalg.norm(alive, axis=1, keepdims=True), compute_uv=False)
    limit = 1e-6 * len(alive) ** 0.5 * values[0]
    clear = not ((values > 1e-9) & (values < 10 * limit)).any()
    return float(values[values > limit].min()), clear


# --- by hand --------------------------------------------------------------------------------------


def test_three_tasks_by_hand() -> None:
    """(1, 0, 0) has -1 with (-1, 1, 0), which has 0 with (1, 1, 1): this one stays.

    Orthogonal to the others are (1, 1, -2), and (0, -1, 1) for the second: what is left is (1, 1,
    -2) / 6 and (0, 1, -1) / 2.
    """
    expected = torch.tensor([7 / 6, 5 / 3, 1 / 6]).double()
    assert_close(GradOPS()(HAND), expected)


@pytest.mark.parametrize("alpha", [-1, 2])
def test_weights_by_hand(alpha: float) -> None:
    """Gains are <(7, 10, 1) / 6, u>: 7/6, (10 - 7) / 6 / sqrt(2) and 3 / sqrt(3)."""
    gains = torch.tensor([7 / 6, 0.5 / 2**0.5, 3**0.5]).double()
    w = 3 * gains**alpha / (gains**alpha).sum()
    left = torch.tensor([[1, 1, -2], [0, 3, -3], [6, 6, 6]]).double() / 6
    assert_close(GradOPS(alpha)(HAND), w @ left)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 2.0])
def test_opposite_gradients_by_hand(alpha: float) -> None:
    """Nothing is left of two; a third that is orthogonal goes on alone, with a weight of 1."""
    g = torch.tensor([[2.0, 0.0, 0.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 5.0]]).double()
    strategy = GradOPS(alpha)
    assert not strategy(g[:2]).any()
    assert torch.equal(strategy(g), g[2])


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_three_in_a_plane_are_all_lost(alpha: float) -> None:
    """Each of three that conflict is in the span of the other two."""
    angles = 2 * np.pi / 3 * np.arange(3)
    rows = on_device(np.column_stack([np.cos(angles), np.sin(angles), 0 * angles]))
    assert not GradOPS(alpha)(rows).any()


# --- against the oracle ---------------------------------------------------------------------------


@given(rows=gradients(), alpha=ALPHAS)
@settings(max_examples=200)
def test_is_the_definition_on_vectors(rows: Tensor, alpha: float) -> None:
    least, clear = conditioning(array(rows))
    assume(clear)
    size = float(rows.norm(dim=1).sum())
    m = len(rows) if alpha else 1
    tolerance = (1e-13 + 1e-14 / least**2) * m * (1 + abs(alpha)) * size
    error = np.linalg.norm(array(GradOPS(alpha)(rows)) - gradops(array(rows), alpha))
    assert error <= tolerance


@pytest.mark.parametrize("name", ["generic", "conflicting", "unequal_norms", "duplicate_rows"])
@pytest.mark.parametrize("m", [20, 50])
@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_many_tasks(name: str, m: int, alpha: float) -> None:
    rows = matrix(name, m, 2 * m, seed=m)
    expected = gradops(array(rows), alpha)
    error = np.linalg.norm(array(GradOPS(alpha)(rows)) - expected)
    assert error <= 1e-11 * float(rows.norm(dim=1).sum())


@given(rows=gradients(["conflicting"], p=(9, 30)), alpha=ALPHAS)
@settings(max_examples=100)
def test_what_is_projected_moves_nobody_else(rows: Tensor, alpha: float) -> None:
    """If all tasks conflict, each gains what is left of its own gradient, squared, times w."""
    least, clear = conditioning(array(rows))
    assume(clear and least > 1e-3)
    assume((rows @ rows.T < -1e-6).any(1).all())
    left = [off(*parts(array(rows), i)) for i in range(len(rows))]
    gains = array(rows @ GradOPS(alpha)(rows))
    squares = np.array([float(x @ x) for x in left]) * np.linalg.norm(array(rows), axis=1) ** 2
    r = squares / np.linalg.norm(array(rows), axis=1)
    weights = len(r) * (r / r.max()) ** alpha / ((r / r.max()) ** alpha).sum()
    assert np.allclose(gains, weights * squares, rtol=1e-8 / least**2, atol=1e-10 * squares.max())


def parts(rows: Array, i: int) -> tuple[Array, Array]:
    units = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.longdouble)
    return units[i], np.delete(units, i, 0)


@pytest.mark.parametrize("distance", [1e-4, 1e-5, 2e-8, 1e-9])
def test_rows_that_nearly_depend(distance: float) -> None:
    """Of two nearly opposite rows what is left is that short, or nothing; of a third, 2 long."""
    rows = on_device(np.array([[1.0, 0, 0], [-3.0, 3 * distance, 0], [0.5, 0.0, 2.0]]))
    weights = GradOPS().solve(rows @ rows.T)
    left = weights @ rows
    if distance < 1e-6:
        assert weights[2] == 1
        assert_close(left, torch.tensor([0.0, 0.0, 2.0]).to(rows), rtol=0, atol=distance)
    else:
        assert abs(float(left[1])) == pytest.approx(4 * distance, rel=1e-6)
        error = np.linalg.norm(array(left) - gradops(array(rows), 0.0))
        assert error <= 1e-15 / distance


@pytest.mark.parametrize("seed", range(20))
def test_orthogonal_up_to_rounding_is_no_conflict(seed: int) -> None:
    """The rows of an orthogonal matrix have inner products of about 1e-17, of either sign."""
    rows = orthogonal(9, seed)[:4]
    rows = torch.cat([rows, rows[:1] + rows[1:2]])  # in the span of two of them
    assert_close(GradOPS()(rows), rows.sum(0))
    rows[4] = 1e-12 * rows[2] - rows[0]
    assert (GradOPS()(rows) - rows[[1, 3]].sum(0)).norm() > 0.5  # the third begins to conflict


@pytest.mark.parametrize("alpha", [-1.5, -0.1, 0.5])
def test_orthogonal_up_to_rounding_is_no_gain(alpha: float) -> None:
    """e1 and -2 e1 are lost, and e2, turned anyhow, helps neither: it has all the weight, of 1.

    A gain of 1e-17 would count as a task, and be most of the weight by a negative exponent.
    """
    rows = torch.tensor([[1.0, 0, 0, 0], [-2.0, 0, 0, 0], [0, 3.0, 0, 0]], dtype=torch.float64)
    for seed in range(60):
        turn = orthogonal(4, seed).to(rows)
        assert_close(GradOPS(alpha)(rows @ turn), rows[2] @ turn, rtol=1e-12, atol=1e-12)


@given(
    rows=gradients(["generic", "conflicting"], m=(2, 8), p=(9, 30)),
    exponents=st.lists(st.floats(-6, 6), min_size=8, max_size=8),
)
@settings(max_examples=60)
def test_each_remainder_is_as_long_as_its_row(rows: Tensor, exponents: list[float]) -> None:
    """Over twelve decades: what one task adds is proportional to the length of its row."""
    least, clear = conditioning(array(rows))
    assume(clear and least > 1e-3)
    f = 10.0 ** np.array(exponents[: len(rows)])
    scaled = rows * on_device(f)[:, None]
    expected = gradops(array(scaled), 0.0)
    size = float(scaled.norm(dim=1).sum())
    assert np.linalg.norm(array(GradOPS()(scaled)) - expected) <= 1e-12 / least**2 * size


@pytest.mark.parametrize("alpha", [-60.0, 60.0])
def test_large_exponents_are_those_of_one_task(alpha: float) -> None:
    """The task that gains least, or most, has all the weight: nothing overflows."""
    rows = on_device(torch.diag(torch.tensor([1e-8, 1.0, 1e9])).double())
    winner = 0 if alpha < 0 else 2
    assert_close(GradOPS(alpha)(rows), 3 * rows[winner], rtol=1e-12, atol=0)


@given(rows=gradients(m=(1, 6)))
@settings(max_examples=60)
def test_the_plain_sum_is_the_limit_of_small_exponents(rows: Tensor) -> None:
    """Where something is left of every gradient: else m is another."""
    assume(
        all(off(*parts(array(rows[rows.any(1)]), i)).any() for i in range(int(rows.any(1).sum())))
    )
    near, plain = GradOPS(1e-9)(rows), GradOPS()(rows)
    assert (near - plain).norm() <= 1e-7 * rows.norm(dim=1).sum()


# --- two tasks, and the rest ----------------------------------------------------------------------


@given(rows=gradients(m=(2, 2)))
@settings(max_examples=150)
def test_two_tasks_are_those_of_pcgrad(rows: Tensor) -> None:
    error = (GradOPS()(rows) - PCGrad()(rows)).norm()
    assert error <= 1e-14 * rows.norm(dim=1).sum()
    assert (GradOPS(1e-300)(rows) - GradOPS()(rows)).norm() <= 1e-12 * rows.norm(dim=1).sum()


@given(rows=gradients(m=(2, 2)))
@settings(max_examples=100)
def test_two_tasks_on_a_device_get_the_same_weights(rows: Tensor) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    of_tensors = torch.stack(_gradops._weights_of_pair(a, h, b, TENSORS))
    assert_close(of_tensors, GradOPS().weights(gramian), rtol=1e-14, atol=0)


def test_two_tasks_on_a_device_wait_for_nothing() -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = GradOPS().weights(gramian)
    assert (weights.device.type, weights.shape) == ("meta", (2,))
    with pytest.raises(NotImplementedError):  # so the test can fail
        GradOPS().weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 3])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``)."""
    rows = random_gradients(m, 5)
    rows[0, 0] = bad
    for alpha in (0.0, -1.0):
        assert not torch.isfinite(GradOPS(alpha).solve(rows @ rows.T) @ rows).all()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_refuses_other_exponents(alpha: float) -> None:
    with pytest.raises(ValueError, match="`alpha` must be finite, but got"):
        GradOPS(alpha)


def test_repr_names_the_settings() -> None:
    assert repr(GradOPS(-1)) == "GradOPS(alpha=-1.0)"
