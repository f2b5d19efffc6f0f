"""What is true of IMTL's loss half alone; what holds for every weighting is in test_contract.py.

e^s L - s, with s the logarithm of the weight.
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
from mtbalance.weighting import IMTLL, Uncertainty
from tests.weighting._helpers import double

LOSSES = st.lists(st.floats(1e-8, 1e4), min_size=3, max_size=3)
LOGS = st.lists(st.floats(-20, 9), min_size=3, max_size=3)
TASKS = ("a", "b", "c")


def made(log_weight: list[float], **settings: float) -> IMTLL:
    """Return a float64 weighting with these logarithms of weights."""
    weighting = IMTLL(**settings).bind(TASKS[: len(log_weight)]).double()
    weighting.log_weight.data = double(*log_weight)
    return weighting


def slopes(weighting: IMTLL, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the objective by the losses and by the logarithms."""
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(weighting(losses).sum(), (losses, weighting.log_weight))  # type: ignore[return-value]


def test_values_by_hand() -> None:
    """s = 0: L. s = log 4: 4 L - log 4."""
    assert_close(made([0, 0])(double(3, 4)), double(3, 4))
    assert_close(made([math.log(4)])(double(2)), double(8 - math.log(4)))


@given(losses=LOSSES, log_weight=LOGS)
def test_is_the_formula(losses, log_weight) -> None:
    """Against Python's own numbers: d/dL = e^s, d/ds = e^s L - 1."""
    weighting = made(log_weight)
    weighted = weighting(double(*losses)).detach()
    by_loss, by_log = slopes(weighting, double(*losses))
    for i, (loss, s) in enumerate(zip(losses, log_weight, strict=True)):
        weight = math.exp(s)
        assert weighted[i].item() == pytest.approx(weight * loss - s, rel=1e-12, abs=1e-12)
        assert by_loss[i].item() == pytest.approx(weight, rel=1e-12)
        assert by_log[i].item() == pytest.approx(weight * loss - 1, rel=1e-12, abs=1e-12)


@given(losses=LOSSES, log_weight=LOGS)
def test_is_twice_uncertainty_at_minus_s(losses, log_weight) -> None:
    weighting = made(log_weight)
    other = Uncertainty().bind(TASKS).double()
    other.log_var.data = -double(*log_weight)
    assert_close(weighting(double(*losses)), 2 * other(double(*losses)), rtol=1e-12, atol=1e-12)
    (by_log_var,) = torch.autograd.grad(other(double(*losses)).sum(), other.log_var)
    assert_close(slopes(weighting, double(*losses))[1], -2 * by_log_var, rtol=1e-12, atol=1e-12)


@given(losses=LOSSES)
def test_rest(losses) -> None:
    """At s = -log L, up to 18.4 here, weighted losses are 1 and nothing pulls at s."""
    resting = [-math.log(loss) for loss in losses]
    by_loss, by_log = slopes(made(resting, max_log_weight=20.0), double(*losses))
    assert_close(by_log, torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert_close(by_loss * double(*losses), torch.ones(3).double(), rtol=1e-12, atol=0)


def test_gradient_descent_comes_to_rest() -> None:
    """The objective is convex in s, so that plain gradient descent finds the point of rest."""
    losses = double(0.5, 2.0, 7.0)
    weighting = made([0, 0, 0])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(losses).sum().backward()
        optimizer.step()
    assert_close(weighting.log_weight.detach(), -losses.log(), rtol=0, atol=1e-9)


def test_above_the_bound_the_weight_is_that_of_the_bound() -> None:
    weighting = made([15.0, 10.0, 0.0])
    by_loss, _ = slopes(weighting, double(0, 0, 0))
    assert_close(by_loss, double(math.e**10, math.e**10, 1))
    assert_close(weighting(double(0, 0, 0)).detach(), double(-10, -10, 0))


@pytest.mark.parametrize("start", [10.0, 10.5])
def test_the_bound_stops_the_way_up_only(start: float) -> None:
    """With a loss of 0 the derivative by s is -1: descending would raise s for ever. Blocked.

    With a loss of 1 it is e^10 - 1 at the bound: s falls as without a bound.
    """
    assert float(slopes(made([start]), double(0))[1]) == 0
    assert_close(slopes(made([start]), double(1))[1], double(math.exp(10) - 1))


def test_a_bound_of_its_own() -> None:
    assert float(slopes(made([1.0], max_log_weight=1.0), double(0))[1]) == 0
    assert float(slopes(made([1.0], max_log_weight=2.0), double(0))[1]) == -1


def test_absent_tasks_get_no_gradient() -> None:
    weighting = made([0.0, 1.0, 2.0])
    with weighting.only(torch.tensor([2, 0])):
        weighted = weighting(double(3, 3))
        (slope,) = torch.autograd.grad(weighted.sum(), weighting.log_weight)
    assert_close(weighted.detach(), double(3 * math.exp(2) - 2, 3))
    assert_close(slope, double(2, 0, 3 * math.exp(2) - 1))


def test_start() -> None:
    weighting = IMTLL(init=-0.7).bind(TASKS)
    assert_close(weighting.log_weight.detach(), torch.full((3,), -0.7))
    assert [name for name, _ in weighting.named_parameters()] == ["log_weight"]


def test_learns_through_the_users_optimizer() -> None:
    """One step of SGD by hand: s = 0 - 0.1 (L - 1), for losses of 12 and 1e-8."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(IMTLL(), Sum(), tasks=("a", "b"), shared=[x])
    optimizer = torch.optim.SGD([x, *balancer.parameters()], lr=0.1)
    balancer.backward({"a": 3 * x, "b": 1e-8 * x / 4})
    assert_close(x.grad, torch.tensor(3.0))
    optimizer.step()
    (log_weight,) = balancer.parameters()
    assert_close(log_weight.detach(), torch.tensor([-1.1, 0.1]))


def test_casts_keep_small_steps() -> None:
    weighting = IMTLL().bind(TASKS).to(torch.bfloat16)
    assert weighting.log_weight.dtype == torch.float32


def test_refuses_a_damaged_state() -> None:
    weighting = IMTLL().bind(TASKS)
    state = {"log_weight": torch.tensor([0.0, math.nan, 0.0])}
    with pytest.raises(ValueError, match="of IMTLL must have `log_weight` numbers, but got"):
        weighting.load_state_dict(state)


def test_refuses_a_start_above_the_bound() -> None:
    with pytest.raises(ValueError, match=r"`init` must be at most `max_log_weight` \(10\.0\), but"):
        IMTLL(init=11)
    with pytest.raises(ValueError, match="`init` must be"):
        IMTLL(init=math.nan)


def test_by_its_short_names() -> None:
    for name in ("imtl-l", "imtll"):
        assert isinstance(make_balancer(name, tasks=("a", "b")).weighting, IMTLL)
