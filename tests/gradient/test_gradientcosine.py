"""What is true of GradientCosine alone; what holds for every strategy is in test_contract.py.

The oracle sums vectors, and judges by cosines in exact fractions of the rows' numbers.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import GradientCosine
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._oracles import array
from tests._samplers import gradients, matrix, orthogonal, random_gradients

HAND = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [3.0, 4.0]])
ROUNDING = 1e-14
"""Cosines nearer to 0 are not told from it."""


def inner(x: np.ndarray, y: np.ndarray) -> Fraction:
    return sum(
        (Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y, strict=True)), Fraction()
    )


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the cosine of an angle, rounded once or twice; 0 for a zero vector."""
    product, squares = inner(x, y), inner(x, x) * inner(y, y)
    return math.copysign(math.sqrt(product**2 / squares), product) if squares else 0.0


@pytest.mark.parametrize(
    ("primary", "weighted", "expected"),
    [
        (0, False, [4.0, 4.0]),  # the second opposes the first: (1, 0) + (3, 4)
        (1, False, [2.0, 5.0]),  # only the first opposes the second: (-1, 1) + (3, 4)
        (2, False, [3.0, 5.0]),  # neither opposes the third
        (0, True, [2.8, 2.4]),  # the third has the cosine 3/5: (1, 0) + 3/5 (3, 4)
        (1, True, [-1 + 3 / 50**0.5, 1 + 4 / 50**0.5]),  # 1 / (5 sqrt 2) = 50 ** -1/2
        (2, True, [3.6 - 50**-0.5, 4 + 50**-0.5]),  # 3/5 and 50 ** -1/2
    ],
)
def test_by_hand(primary: int, weighted: bool, expected: list[float]) -> None:
    assert_close(GradientCosine(primary, weighted=weighted)(HAND), torch.tensor(expected))


@given(rows=gradients(), data=st.data(), weighted=st.booleans())
def test_is_the_definition_in_fractions(rows: Tensor, data, weighted: bool) -> None:
    primary = data.draw(st.integers(0, len(rows) - 1))
    vectors = array(rows)
    expected = vectors[primary].copy()
    for i, vector in enumerate(vectors):
        if i != primary:
            c = cosine(vectors[primary], vector)
            assume(c == 0 or abs(c) > ROUNDING)
            blank = not vectors[primary].any()  # says nothing of the others
            expected += vector if blank else max(c, 0) * vector if weighted else (c >= 0) * vector
    direction = array(GradientCosine(primary, weighted=weighted)(rows))
    size = np.linalg.norm(vectors, axis=1).sum()
    assert np.linalg.norm(direction - expected) <= 1e-14 * size


@given(rows=gradients(), data=st.data(), weighted=st.booleans())
def test_the_primary_task_is_never_in_conflict(rows: Tensor, data, weighted: bool) -> None:
    """It gains at least what it would gain alone: <g_p, d> >= |g_p|^2."""
    primary = data.draw(st.integers(0, len(rows) - 1))
    own = rows[primary]
    gain = own @ GradientCosine(primary, weighted=weighted)(rows)
    assert gain >= own @ own - 1e-13 * own.norm() * rows.norm(dim=1).sum()


@pytest.mark.parametrize("seed", range(30))
def test_orthogonal_up_to_rounding_does_not_oppose(seed: int) -> None:
    """The rows of an orthogonal matrix have inner products of about 1e-17, of either sign."""
    rows = orthogonal(9, seed) * on_device(2.0 ** np.arange(9.0))[:, None]
    assert_close(GradientCosine(primary=3)(rows), rows.sum(0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("angle", [1e-3, 1e-8, 1e-13])
def test_a_hair_beyond_a_right_angle_opposes(angle: float) -> None:
    rows = on_device(np.array([[1.0, 0.0], [-angle, 1.0]]))
    assert GradientCosine(primary=0)(rows).tolist() == [1.0, 0.0]
    assert GradientCosine(primary=0)(-rows).tolist() == [-1.0, 0.0]
    other = on_device(np.array([[1.0, 0.0], [angle, 1.0]]))
    assert GradientCosine(primary=0)(other).tolist() == [1.0 + angle, 1.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_only_angles_with_the_primary_count(weighted: bool) -> None:
    """Auxiliaries may be in conflict with each other, and lengths do not matter."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 9.0, 0.0], [1.0, -9.0, 1.0]]).double()
    strategy = GradientCosine(0, weighted=weighted)
    gramian = rows @ rows.T
    assert gramian[1, 2] < 0
    weights = strategy.weights(gramian)
    assert (weights > 0).all()
    lengths = torch.tensor([1e-9, 1e7, 3.0]).double()
    assert_close(strategy.weights(gramian * torch.outer(lengths, lengths)), weights)
    for seed in range(20):
        rows = random_gradients(3, 5, seed)
        assert strategy.solve(rows @ rows.T)[0] == 1, "exactly"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_a_primary_task_without_gradient_says_nothing(weighted: bool, m: int) -> None:
    """As if it were absent: the plain sum of the others, whatever their conflicts."""
    rows = matrix("conflicting", max(m, 2), 9, seed=3)[:m]
    padded = torch.cat([rows, torch.zeros_like(rows[:1])])
    assert_close(GradientCosine(m, weighted=weighted)(padded), rows.sum(0))
    names = [str(i) for i in range(m + 1)]
    strategy = GradientCosine(names[-1], weighted=weighted).bind(names)
    with strategy.only(torch.arange(m)):
        assert_close(strategy(rows), rows.sum(0))


def test_a_task_left_out_trains_its_own_parameters() -> None:
    shared, head = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    balancer = Balancer(Equal(), GradientCosine("main"), tasks=("main", "other"), shared=[shared])
    balancer.backward({"main": 2 * shared, "other": 5 * head - 3 * shared})
    assert (shared.grad.item(), head.grad.item()) == (2.0, 5.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_waits_for_no_device(weighted: bool, m: int) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(m, m, dtype=torch.float64, device="meta")
    assert GradientCosine(0, weighted=weighted).weights(gramian).shape == (m,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gramian_gives_bad_weights(bad: float) -> None:
    for i, j in ((0, 0), (1, 0), (1, 1)):
        rows = torch.eye(3, dtype=torch.float64)
        rows[i, j] = bad
        assert not GradientCosine(0).solve(rows @ rows.T).isfinite().any()


def test_needs_a_primary_task() -> None:
    with pytest.raises(TypeError, match=r"`primary` must be one task.s name, .* but got None"):
        GradientCosine(None)  # type: ignore[arg-type]
    assert repr(GradientCosine("a")) == "GradientCosine(primary='a', weighted=False)"
