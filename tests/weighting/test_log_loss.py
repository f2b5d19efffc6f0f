"""What is true of logarithms of losses alone; what holds for all weightings is in test_contract.py.

sum log L, whose derivative by L_i is 1 / L_i.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import GeometricMean, LogLoss, Weighting
from tests.weighting import _helpers
from tests.weighting._helpers import double

LOSSES = st.lists(st.floats(1e-8, 1e4), min_size=1, max_size=8)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def weighed(losses: Tensor, weighting: Weighting | None = None) -> tuple[Tensor, Tensor]:
    return _helpers.weighed(weighting or LogLoss(), losses)


def test_by_hand() -> None:
    weighted, weights = weighed(double(1, 0.25, math.e))
    assert_close(weighted, double(0, -2 * math.log(2), 1))
    assert_close(weights, double(1, 4, 1 / math.e))


@given(losses=LOSSES)
def test_is_the_formula(losses) -> None:
    """Against Python's own logarithm and quotient."""
    weighted, weights = weighed(double(*losses))
    assert_close(weighted, double(*map(math.log, losses)), rtol=1e-12, atol=1e-15)
    assert_close(weights, double(*[1 / loss for loss in losses]), rtol=1e-15, atol=0)


@given(losses=LOSSES)
def test_is_the_geometric_mean_but_for_a_factor(losses) -> None:
    """Its weights are the geometric mean times these."""
    mean, weights_of_mean = weighed(double(*losses), GeometricMean())
    assert_close(weights_of_mean, mean * weighed(double(*losses))[1], rtol=1e-12, atol=0)


@given(loss=st.floats(1e-6, 1e2), factor=st.floats(1e-3, 1e3))
def test_scales_of_losses_change_no_gradient(loss: float, factor: float) -> None:
    """The derivative of log(c L(x)) by x, with L = x^2 + loss at x = 3."""
    slopes = []
    for scale in (1.0, factor):
        x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        losses = torch.stack([scale * (x.square() + loss), x])
        slopes.append(torch.autograd.grad(LogLoss()(losses).sum(), x)[0])
    assert_close(slopes[1], slopes[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_loss_of_zero_pulls_no_more(dtype: torch.dtype, zero: float) -> None:
    """It is at its end; its logarithm is that of the least normal number, and all is finite."""
    weighted, weights = weighed(torch.tensor([zero, 2.0], dtype=dtype))
    least = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    assert_close(weighted[0], torch.tensor(math.log(least), dtype=dtype))
    assert weights.tolist() == [0, 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_losses_that_count(dtype: torch.dtype) -> None:
    least = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    _, weights = weighed(torch.tensor([least, 1.0], dtype=dtype))
    assert float(weights[0]) == pytest.approx(1 / least, rel=1e-6)


def test_a_negative_loss_makes_its_weight_nan() -> None:
    """Its own alone: a derivative of -10 would climb it."""
    weighted, weights = weighed(double(-0.1, 2))
    assert weighted.isnan().tolist() == [True, False]
    assert weights.isnan().tolist() == [True, False]


def test_a_balancer_says_what_is_wrong_and_writes_nothing() -> None:
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(LogLoss(), Sum(), tasks=("a", "b"), shared=[x])
    words = r"LogLoss must give finite weights, but .* \[12\.0, -4\.0\]\. It takes their logarithms"
    with pytest.raises(FloatingPointError, match=words):
        balancer.backward({"a": 3 * x, "b": -x})
    assert x.grad is None


def test_a_step_by_hand() -> None:
    """The logarithms of x^2 and 1e4 x^-1 have the derivatives 2 / x and -1 / x."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(LogLoss(), Sum(), tasks=("a", "b"), shared=[x])
    record = balancer.backward({"a": x.square(), "b": 1e4 / x})
    assert_close(x.grad, torch.tensor(0.25))
    assert float(record.weights["a"]) == pytest.approx(1 / 16)
    assert float(record.weights["b"]) == pytest.approx(4e-4)


def test_by_its_short_name() -> None:
    assert isinstance(make_balancer("logloss", tasks=("a", "b")).weighting, LogLoss)
