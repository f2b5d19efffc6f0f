"""What is true of the geometric mean alone; what holds for every weighting is in test_contract.py.

m (prod L)^(1/m), whose derivative by L_i is (prod L)^(1/m) / L_i.
"""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import GeometricMean
from tests._device import on_device
from tests.weighting import _helpers
from tests.weighting._helpers import double

LOSSES = st.lists(st.floats(1e-8, 1e4), min_size=1, max_size=8)


def weighed(losses: Tensor) -> tuple[Tensor, Tensor]:
    return _helpers.weighed(GeometricMean(), losses)


def test_by_hand() -> None:
    """(2 * 4 * 8)^(1/3) = 4, and 4 / (2, 4, 8)."""
    weighted, weights = weighed(double(2, 4, 8))
    assert_close(weighted, double(4, 4, 4))
    assert_close(weights, double(2, 1, 0.5))


@given(losses=LOSSES)
def test_is_the_geometric_mean(losses) -> None:
    """Against the standard library's, whose derivative is it over m and the loss."""
    weighted, weights = weighed(double(*losses))
    mean = statistics.geometric_mean(losses)
    assert_close(weighted, double(*[mean] * len(losses)), rtol=1e-12, atol=0)
    assert_close(weights, double(*[mean / loss for loss in losses]), rtol=1e-12, atol=0)


@given(losses=LOSSES, factor=st.floats(1e-3, 1e3))
def test_homogeneous_of_degree_one(losses, factor: float) -> None:
    """All losses c times as large: so is the objective, and the weights are the same."""
    weighted, weights = weighed(double(*losses))
    scaled, same = weighed(factor * double(*losses))
    assert_close(scaled, factor * weighted, rtol=1e-12, atol=0)
    assert_close(same, weights, rtol=1e-12, atol=0)
    assert_close(weights @ double(*losses), weighted.sum(), rtol=1e-12, atol=0)  # Euler


@given(losses=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3), factor=st.floats(1e-3, 1e3))
def test_scale_of_one_task_is_a_factor_of_all(losses, factor: float) -> None:
    weighted, _ = weighed(double(*losses))
    scaled, _ = weighed(double(factor * losses[0], *losses[1:]))
    assert_close(scaled, weighted * factor ** (1 / 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_a_dtype_does_not_hold(dtype: torch.dtype) -> None:
    """100 losses of 1e4 or 1e-8: their products are 1e400 and 1e-800."""
    for size in (1e4, 1e-8):
        losses = torch.full((100,), size, dtype=dtype)
        weighted, weights = weighed(losses)
        assert_close(weighted, losses)
        assert_close(weights, torch.ones(100, dtype=dtype))


def test_float32_is_rounded_once() -> None:
    losses = torch.tensor([1e4, 1e-8, 3.0])
    _, weights = weighed(losses)
    _, exact = weighed(losses.double())
    assert_close(weights.double(), exact, rtol=6e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_loss_of_zero(dtype: torch.dtype, zero: float) -> None:
    """The objective vanishes, and with it the weights; 1 / 0 is nowhere."""
    weighted, weights = weighed(torch.tensor([zero, 1.0], dtype=dtype))
    assert (weighted.abs() < 2e-19).all()
    assert weights[0] == 0
    assert 0 <= float(weights[1]) < 2e-19
    every, none = weighed(torch.zeros(3, dtype=dtype))
    assert (every >= 0).all()
    assert (every < 1e-37).all()
    assert (none == 0).all()


def test_the_least_losses_that_count() -> None:
    """At the least normal number the formula still holds."""
    tiny = torch.finfo(torch.float32).tiny
    _, weights = weighed(torch.tensor([tiny, 1.0]))
    assert_close(weights.double(), double(tiny**-0.5, tiny**0.5), rtol=1e-6, atol=0)


def test_a_negative_loss_makes_the_weights_nan() -> None:
    weighted, weights = weighed(double(1.0, -0.1))
    assert weighted.isnan().all()
    assert weights.isnan().all()


def test_a_balancer_says_what_is_wrong_and_writes_nothing() -> None:
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(GeometricMean(), Sum(), tasks=("a", "b"), shared=[x])
    words = r"GeometricMean must give finite .*nan.* for the losses \[12\.0, -4\.0\]\. It takes"
    with pytest.raises(FloatingPointError, match=words):
        balancer.backward({"a": 3 * x, "b": -x})
    assert x.grad is None


def test_the_mean_is_over_the_active_tasks() -> None:
    weighting = GeometricMean().bind(("a", "b", "c"))
    with weighting.only(torch.tensor([2, 0])):
        assert_close(weighting(double(2, 8)), double(4, 4))


def test_a_step_by_hand() -> None:
    """Losses x and 16 x at x = 1: the mean is 4, and 4 / 1 * 1 + 4 / 16 * 16 = 8, twice 4."""
    x = nn.Parameter(on_device(torch.tensor(1.0)))
    balancer = Balancer(GeometricMean(), Sum(), tasks=("a", "b"), shared=[x])
    record = balancer.backward({"a": x, "b": 16 * x})
    assert_close(x.grad, torch.tensor(8.0))
    assert float(record.weights["a"]) == pytest.approx(4)
    assert float(record.weights["b"]) == pytest.approx(math.sqrt(1 / 16))


def test_by_its_short_names() -> None:
    for name in ("gls", "geometricmean"):
        balancer = make_balancer(f"{name}+cagrad", tasks=("a", "b"))
        assert isinstance(balancer.weighting, GeometricMean)
