"""What is true of PBI alone; what holds for every weighting is in test_contract.py.

|r| (d1 + theta d2): along the ray of the preferences from the ideal point, and off it.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import PBI
from tests.weighting._helpers import double, weighed

SIZES = st.lists(st.floats(1e-8, 1e4), min_size=3, max_size=3)
NEAR = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3)
ANYWHERE = st.lists(st.floats(-10.0, 10.0), min_size=3, max_size=3)
THETAS = st.sampled_from([0.0, 0.3, 1.0, 5.0])


def slow(losses, preference, theta: float, ideal) -> tuple[float, list[float], float]:
    """Return the objective, the weights, and d2 over |L - z|, in extended precision.

    The part off the ray by Lagrange's identity: the sum of r_j (r_j G_i - r_i G_j) over |r|^2.
    """
    gap = np.asarray(losses, dtype=np.longdouble) - np.asarray(ideal, dtype=np.longdouble)
    r = np.asarray(preference, dtype=np.longdouble)
    m = len(gap)
    r = m * r / r.sum()
    square = (r * r).sum()
    off = [sum(r[j] * (r[j] * gap[i] - r[i] * gap[j]) for j in range(m)) / square for i in range(m)]
    distance = np.sqrt(sum(e * e for e in off))
    factor = theta * np.sqrt(square)
    found = [float(r[i] + factor * off[i] / distance) if distance else 0.0 for i in range(m)]
    objective = (r * gap).sum() + factor * distance
    return float(objective), found, float(distance / max(np.sqrt((gap * gap).sum()), 1e-300))


def test_by_hand() -> None:
    """Two equal preferences: the larger loss has 1 + theta, the other 1 - theta.

    With r = (3, 1) / 2 and L = (2, 4): d1 = 10 / sqrt 10, so L less (3, 1) is (-1, 3).
    """
    weighted, found = weighed(PBI(0.5), double(3, 1))
    assert_close(found, double(1.5, 0.5))
    assert_close(weighted.sum(), torch.tensor(4 + 0.5 * 2, dtype=torch.float64))
    weighted, found = weighed(PBI(2.0, [3.0, 1.0]), double(2, 4))
    # theta |r| e / d2 = 2 sqrt(10) / 2 (-1, 3) / sqrt 10 = (-1, 3).
    assert_close(found, double(1.5 - 1, 0.5 + 3))
    assert_close(weighted.sum(), torch.tensor(5 + 10, dtype=torch.float64))


@given(losses=SIZES, preference=SIZES, theta=THETAS, ideal=ANYWHERE)
def test_is_the_definition(losses, preference, theta: float, ideal) -> None:
    objective, expected, share = slow(losses, preference, theta, ideal)
    assume(share > 1e-13)
    weighted, found = weighed(PBI(theta, preference, ideal), double(*losses))
    # The direction off the ray is known to rounding over how far off it the losses are.
    noise = 1e-14 * (1 + theta) / share
    size = sum(abs(loss - z) for loss, z in zip(losses, ideal, strict=True))
    assert float(weighted.sum()) == pytest.approx(objective, rel=1e-12, abs=10 * noise * size)
    assert_close(found, double(*expected), rtol=1e-12, atol=3 * noise)


@given(losses=NEAR, preference=NEAR, theta=THETAS, ideal=ANYWHERE)
def test_weights_are_the_derivatives_of_the_objective(losses, preference, theta, ideal) -> None:
    """By autograd, through the formula as the paper writes it."""
    chosen = double(*preference)
    chosen = 3 * chosen / chosen.sum()
    x = double(*losses).requires_grad_()
    unit = chosen / chosen.norm()
    gap = x - double(*ideal)
    along = gap @ unit
    off = (gap - along * unit).norm()
    assume(float(off.detach()) > 1e-3)
    objective = chosen.norm() * (along + theta * off)
    (expected,) = torch.autograd.grad(objective, x)
    weighted, found = weighed(PBI(theta, preference, ideal), double(*losses))
    assert_close(weighted.sum(), objective.detach(), rtol=1e-10, atol=1e-10)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


@given(preference=NEAR, size=st.sampled_from([1e-300, 1e-30, 1.0, 1e150, 1e300]))
def test_on_the_ray_the_distance_has_no_part(preference, size: float) -> None:
    """Rounding does not decide which way it points."""
    _, found = weighed(PBI(5.0, preference), size * double(*preference))
    assert_close(found, double(*preference) * 3 / sum(preference), rtol=1e-12, atol=0)


def test_just_off_the_ray_the_penalty_is_whole() -> None:
    _, found = weighed(PBI(0.5), double(1 + 1e-12, 1))
    assert_close(found, double(1.5, 0.5))


@given(losses=NEAR, theta=THETAS)
def test_equal_preferences_leave_the_sum_of_the_weights(losses, theta: float) -> None:
    """What is off the ray sums to 0 then."""
    _, found = weighed(PBI(theta), double(*losses))
    assert float(found.sum()) == pytest.approx(3, rel=1e-12)


@given(losses=NEAR, preference=NEAR, theta=THETAS)
def test_the_size_of_the_losses_does_not_matter(losses, preference, theta: float) -> None:
    """A power of two, at which nothing is rounded."""
    before = weighed(PBI(theta, preference), double(*losses))[1]
    for power in (-900, 900):
        scaled = double(*losses) * 2.0**power
        assert torch.equal(weighed(PBI(theta, preference), scaled)[1], before)


def test_the_ideal_point_is_where_the_ray_starts() -> None:
    """Weights are those of the losses above it; the objective is 0 at it."""
    ideal = {"1": -1.0, "0": 2.0}
    _, found = weighed(PBI(0.7, [1.0, 3.0], ideal), double(5, 3))
    assert_close(found, weighed(PBI(0.7, [1.0, 3.0]), double(3, 4))[1])
    weighted, found = weighed(PBI(0.7, [1.0, 3.0], [2.0, -1.0]), double(2, -1))
    assert weighted.tolist() == [0, 0]
    assert_close(found, double(0.5, 1.5))


def test_proportions_are_all_that_counts() -> None:
    for preference in ([2.0, 6.0], [1e300, 3e300], [1e-300, 3e-300], {"1": 3.0, "0": 1.0}):
        _, found = weighed(PBI(2.0, preference), double(3, 4))
        assert_close(found, weighed(PBI(2.0, [1.0, 3.0]), double(3, 4))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_that_are_all_zero(dtype: torch.dtype) -> None:
    weighted, found = weighed(PBI(), torch.zeros(3, dtype=dtype))
    assert found.tolist() == [1, 1, 1]
    assert weighted.tolist() == [0, 0, 0]


def test_one_task_and_absent_ones() -> None:
    """Preferences and ideal numbers are those of the tasks that are there."""
    assert weighed(PBI(8.0, [7.0]), double(1e-3))[1].tolist() == [1]
    weighting = PBI(2.0, [1.0, 100.0, 3.0], [0.5, 9.0, 0.25]).bind(["a", "b", "c"])
    with weighting.only(torch.tensor([2, 0])):
        _, found = weighed(weighting, double(4, 3))
    assert_close(found, weighed(PBI(2.0, [3.0, 1.0], [0.25, 0.5]), double(4, 3))[1])


def test_float32_losses_are_weighed_in_float64() -> None:
    losses = torch.tensor([1e4, 1e-8, 3.0], dtype=torch.float32)
    preference = [1e4, 3e-8, 30.0]
    _, exact, _ = slow(losses.double().tolist(), preference, 5.0, [0.0] * 3)
    _, found = weighed(PBI(5.0, preference), losses)
    assert found.dtype == torch.float32
    assert_close(found.double(), double(*exact), rtol=1e-7, atol=1e-10)


def test_casting_the_model_keeps_what_is_given() -> None:
    weighting = PBI(1.0, [0.1, 1 / 3], [0.7, 1 / 7]).bind(["a", "b"]).to(torch.bfloat16)
    assert weighting.get_buffer("preference_vector").tolist() == [0.1, 1 / 3]
    assert weighting.get_buffer("ideal_vector").tolist() == [0.7, 1 / 7]
    assert weighting.state_dict() == {}


def test_through_the_balancer() -> None:
    """3x and x^2 at x = 4 are 12 and 16: weights 0.5 and 1.5, derivatives 3 and 8."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(PBI(0.5), Sum(), tasks=("a", "b"), shared=[x])
    balancer.backward({"a": 3 * x, "b": x.square()})
    assert_close(x.grad, torch.tensor(1.5 + 12))


def test_by_its_short_name() -> None:
    balancer = make_balancer("pbi+cagrad", tasks=("a", "b"), theta=2.0, ideal={"b": 1, "a": 0})
    expected = "PBI(theta=2.0, preference=None, ideal={'b': 1.0, 'a': 0.0})"
    assert repr(balancer.weighting) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"theta": -1.0}, r"`theta` must be at least 0, but got -1\.0\."),
        ({"theta": math.nan}, "`theta` must be at least 0, but got nan"),
        ({"preference": [1.0, 0.0]}, r"`preference\[1\]` must be positive, but got 0\.0\."),
        ({"ideal": [1.0, math.inf]}, r"`ideal\[1\]` must be finite, but got inf"),
    ],
)
def test_refuses_what_it_cannot_do_with(settings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PBI(**settings)


@pytest.mark.parametrize("name", ["preference", "ideal"])
def test_numbers_for_every_task(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must have one number for each task"):
        PBI(**{name: {"a": 1.0}}).bind(("a", "b"))  # type: ignore[arg-type]
