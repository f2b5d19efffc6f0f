"""What is true of softmax uncertainty alone; what holds for every weighting is in test_contract.py.

w = m softmax(1 / (L T)), constants for the model.
"""

import math
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import UncertaintySoftmax
from tests.weighting._helpers import double

LOSSES = st.lists(st.floats(1e-8, 1e4), min_size=1, max_size=6)
TEMPERATURES = st.sampled_from([1e-3, 0.3, 1.0, 20.0, 1e5])
WIDE = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)
"""Sixty digits, and powers such as e^(10^11)."""


def weights_of(losses: Tensor, temperature: float = 1.0) -> Tensor:
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(UncertaintySoftmax(temperature)(losses).sum(), losses)[0]


def by_decimals(losses: Sequence[float], temperature: float) -> list[float]:
    """Return the weights by the definition, with no shift."""
    powers = [
        WIDE.exp(WIDE.divide(1, WIDE.multiply(Decimal(loss), Decimal(temperature))))
        for loss in losses
    ]
    total = Decimal(0)
    for power in powers:
        total = WIDE.add(total, power)
    return [float(WIDE.divide(WIDE.multiply(len(powers), power), total)) for power in powers]


def test_by_hand() -> None:
    """Losses 1 and 1/2: 2 e / (e + e^2) = 2 / (1 + e)."""
    first = 2 / (1 + math.e)
    assert_close(weights_of(double(1, 0.5)), double(first, 2 - first))


@given(losses=LOSSES, temperature=TEMPERATURES)
def test_is_the_formula(losses, temperature: float) -> None:
    """Exponents of up to 1e11 are rounded by 1e-5 at most, which is the relative error allowed."""
    rounding = 1e-15 / (min(losses) * temperature)
    expected = double(*by_decimals(losses, temperature))
    found = weights_of(double(*losses), temperature)
    assert_close(found, expected, rtol=1e-13 + 4 * rounding, atol=1e-300)


@given(losses=LOSSES, temperature=TEMPERATURES)
def test_float32_losses_are_weighed_in_float64(losses, temperature: float) -> None:
    single = torch.tensor(losses, dtype=torch.float32)
    expected = weights_of(single.double(), temperature)
    assert_close(weights_of(single, temperature).double(), expected, rtol=6e-8, atol=1e-44)


@given(losses=LOSSES, factor=st.floats(0.01, 100))
def test_scale_of_the_losses_is_that_of_the_temperature(losses, factor: float) -> None:
    scaled = weights_of(factor * double(*losses), 3.0 / factor)
    assert_close(scaled, weights_of(double(*losses), 3.0), rtol=1e-5, atol=1e-12)


def test_limits_of_the_temperature() -> None:
    losses = double(4, 2, 1)
    assert_close(weights_of(losses, 1e12), torch.ones(3).double())
    assert_close(weights_of(losses, 1e-3), double(0, 0, 3))
    assert_close(weights_of(losses, 5e-324), double(0, 0, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_losses_of_zero_share_all_the_weight(dtype: torch.dtype, zero: float) -> None:
    assert weights_of(torch.tensor([zero, 1e-3, 5.0], dtype=dtype)).tolist() == [3, 0, 0]
    two = weights_of(torch.tensor([zero, 1e-3, 0.0], dtype=dtype), 1e-3)
    assert two.tolist() == [1.5, 0, 1.5]


def test_negative_losses_get_less_than_positive_ones() -> None:
    """The formula holds for them, too: e^(-1/2) of (-2) against e^(1/2) of 2."""
    assert_close(weights_of(double(-2, 2)), 2 * double(1, math.e) / (1 + math.e))
    assert weights_of(double(-1e-200, 0.0)).tolist() == [0, 2]


def test_weights_are_constants_for_the_model() -> None:
    """d/dx of w_1 x + w_2 x^2 at x = 2 is w_1 + 4 w_2, the weights held fixed."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    losses = torch.stack([x, x.square()])
    (slope,) = torch.autograd.grad(UncertaintySoftmax()(losses).sum(), x)
    w = double(*by_decimals([2.0, 4.0], 1.0))
    assert_close(slope, w[0] + 4 * w[1])


def test_the_softmax_is_over_the_active_tasks() -> None:
    weighting = UncertaintySoftmax().bind(("a", "b", "c"))
    with weighting.only(torch.tensor([2, 0])):
        found = weighting(double(1, 0.5))
    assert_close(found, weights_of(double(1, 0.5)) * double(1, 0.5))


def test_a_step_by_hand() -> None:
    """3x and x^2 at x = 4, T = 1/12: exponents 1 and 3/4, the derivatives 3 and 8."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(UncertaintySoftmax(1 / 12), Sum(), tasks=("a", "b"), shared=[x])
    balancer.backward({"a": 3 * x, "b": x.square()})
    first = 2 / (1 + math.exp(-1 / 4))
    assert_close(x.grad, torch.tensor(3 * first + 8 * (2 - first)))


def test_by_its_short_names() -> None:
    for name in ("uw-so", "uncertaintysoftmax"):
        balancer = make_balancer(f"{name}+cagrad", tasks=("a", "b"), temperature=5.0)
        assert repr(balancer.weighting) == "UncertaintySoftmax(temperature=5.0)"


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, but got"):
        UncertaintySoftmax(temperature)
