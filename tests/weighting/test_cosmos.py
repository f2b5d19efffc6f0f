"""What is true of COSMOS alone; what holds for every weighting is in test_contract.py.

r L - m lambda cos(r, L), with r scaled to sum to m.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import COSMOS
from tests.weighting._helpers import double, weighed

SIZES = st.lists(st.floats(1e-8, 1e4), min_size=3, max_size=3)
NEAR = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3)
PENALTIES = st.sampled_from([0.0, 0.01, 1.0, 8.0])


def slow(losses, preference, penalty: float) -> tuple[float, list[float], float]:
    """Return the objective, the weights and how large their terms are, in extended precision.

    r_i - c_i L_i with c = cos / |L| as one sum: that of L_j (r_i L_j - r_j L_i).
    """
    loss = np.asarray(losses, dtype=np.longdouble)
    r = np.asarray(preference, dtype=np.longdouble)
    m = len(loss)
    r = m * r / r.sum()
    length, ray = np.sqrt((loss * loss).sum()), np.sqrt((r * r).sum())
    cosine = (r * loss).sum() / length / ray
    found = []
    for i in range(m):
        pairs = sum(loss[j] * (r[i] * loss[j] - r[j] * loss[i]) for j in range(m))
        found.append(r[i] - m * penalty * pairs / ray / length**3)
    objective = (r * loss).sum() - m * penalty * cosine
    return float(objective), [float(w) for w in found], float(m + m * penalty / length)


def test_by_hand() -> None:
    """L = (3, 4) and (1, 1): |L| = 5, cos = 7 / (5 sqrt 2). 2 * 12.5 / 5 = 5.

    Weights: 1 - 5 / sqrt 2 (1 - 7/5 * 3/5) and 1 - 5 / sqrt 2 (1 - 7/5 * 4/5).
    """
    weighted, found = weighed(COSMOS(12.5), double(3, 4))
    root = math.sqrt(2)
    assert_close(found, double(1 - 0.8 / root, 1 + 0.6 / root))
    assert_close(weighted.sum(), torch.tensor(7 - 25 * 7 / 5 / root, dtype=torch.float64))


@given(losses=SIZES, preference=SIZES, penalty=PENALTIES)
def test_is_the_definition(losses, preference, penalty: float) -> None:
    weighted, found = weighed(COSMOS(penalty, preference), double(*losses))
    objective, expected, size = slow(losses, preference, penalty)
    assert float(weighted.sum()) == pytest.approx(objective, rel=1e-12, abs=1e-14 * (1 + penalty))
    assert_close(found, double(*expected), rtol=1e-12, atol=2e-14 * size)


@given(losses=NEAR, preference=NEAR, penalty=PENALTIES)
def test_weights_are_the_derivatives_of_the_objective(losses, preference, penalty: float) -> None:
    """By autograd, through the formula as the paper writes it."""
    chosen = double(*preference)
    chosen = 3 * chosen / chosen.sum()
    x = double(*losses).requires_grad_()
    objective = chosen @ x - 3 * penalty * torch.cosine_similarity(chosen, x, dim=0, eps=0)
    (expected,) = torch.autograd.grad(objective, x)
    weighted, found = weighed(COSMOS(penalty, preference), double(*losses))
    assert_close(weighted.sum(), objective.detach(), rtol=1e-12, atol=1e-12)
    assert_close(found, expected, rtol=1e-11, atol=1e-11)


@given(losses=NEAR, preference=NEAR, penalty=PENALTIES)
def test_weighted_losses_sum_to_the_weighted_sum(losses, preference, penalty: float) -> None:
    """w L = r L, as the cosine has no derivative along L."""
    _, found = weighed(COSMOS(penalty, preference), double(*losses))
    chosen = double(*preference) * 3 / sum(preference)
    assert_close(found @ double(*losses), chosen @ double(*losses), rtol=1e-12, atol=1e-12)


@given(preference=NEAR, size=st.sampled_from([1e-300, 1e-30, 1.0, 1e150, 1e300]))
def test_on_the_ray_the_cosine_has_no_part(preference, size: float) -> None:
    """Not even by rounding, which divided by small losses would be more than the weights."""
    losses = size * double(*preference)
    _, found = weighed(COSMOS(8.0, preference), losses)
    assert_close(found, double(*preference) * 3 / sum(preference), rtol=1e-12, atol=0)


def test_proportions_are_all_that_counts() -> None:
    for preference in ([2.0, 6.0], [1e300, 3e300], [1e-300, 3e-300], {"1": 3.0, "0": 1.0}):
        _, found = weighed(COSMOS(2.0, preference), double(3, 4))
        assert_close(found, weighed(COSMOS(2.0, [1.0, 3.0]), double(3, 4))[1])


def test_without_a_penalty_it_is_the_weighted_sum() -> None:
    weighted, found = weighed(COSMOS(0.0, [1.0, 3.0]), double(4, 5))
    assert_close(found, double(0.5, 1.5))
    assert_close(weighted, double(2, 7.5))


def test_descending_brings_losses_to_the_ray() -> None:
    """The cosine alone, of losses that may be anything: its slope is the weights less r."""
    losses = double(5, 1, 1)
    preference = double(1, 2, 3) / 2
    for _ in range(2000):
        _, found = weighed(COSMOS(1.0, [1.0, 2.0, 3.0]), losses)
        losses -= 0.1 * (found - preference)
    assert_close(losses / losses.sum(), preference / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_that_are_all_zero(dtype: torch.dtype) -> None:
    """And those below the least normal number: the weighted sum is what is left."""
    for size in (0.0, torch.finfo(dtype).smallest_normal / 4):
        losses = torch.tensor([size, 0.0, 0.0], dtype=dtype)
        weighted, found = weighed(COSMOS(8.0), losses)
        assert found.tolist() == [1, 1, 1]
        assert torch.equal(weighted, losses)


def test_one_task_and_absent_ones() -> None:
    """Preferences are scaled to the tasks that are there."""
    assert weighed(COSMOS(8.0, [7.0]), double(1e-3))[1].tolist() == [1]
    weighting = COSMOS(2.0, [1.0, 100.0, 3.0]).bind(["a", "b", "c"])
    with weighting.only(torch.tensor([2, 0])):
        _, found = weighed(weighting, double(4, 3))
    assert_close(found, weighed(COSMOS(2.0, [3.0, 1.0]), double(4, 3))[1])


def test_float32_losses_are_weighed_in_float64() -> None:
    losses = torch.tensor([1e4, 1e-8, 3.0], dtype=torch.float32)
    preference = [1e4, 3e-8, 3.0]
    _, exact, _ = slow(losses.double().tolist(), preference, 8.0)
    _, found = weighed(COSMOS(8.0, preference), losses)
    assert found.dtype == torch.float32
    assert_close(found.double(), double(*exact), rtol=1e-7, atol=1e-14)


def test_casting_the_model_keeps_the_preference() -> None:
    weighting = COSMOS(1.0, [0.1, 1 / 3]).bind(["a", "b"]).to(torch.bfloat16)
    assert weighting.get_buffer("vector").tolist() == [0.1, 1 / 3]
    assert weighting.state_dict() == {}


def test_through_the_balancer() -> None:
    """3x and x^2 at x = 1.5 are 4.5 and 2.25: cos = 3 / sqrt 10, L^ = (2, 1) / sqrt 5.

    |L| = 2.25 sqrt 5. The cosine's slopes are (1 - 6/5, 1 - 3/5) / sqrt 2 / |L|.
    """
    x = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    balancer = Balancer(COSMOS(3.0), Sum(), tasks=("a", "b"), shared=[x])
    record = balancer.backward({"a": 3 * x, "b": x.square()})
    slope = 6 / math.sqrt(2) / (2.25 * math.sqrt(5))
    assert float(record.weights["a"]) == pytest.approx(1 + slope / 5)
    assert float(record.weights["b"]) == pytest.approx(1 - slope * 2 / 5)
    assert float(x.grad) == pytest.approx(3 * (1 + slope / 5) + 3 * (1 - slope * 2 / 5))


def test_by_its_short_name() -> None:
    balancer = make_balancer("cosmos+cagrad", tasks=("a", "b"), penalty=2.0, preference=[1, 2])
    assert repr(balancer.weighting) == "COSMOS(penalty=2.0, preference=[1.0, 2.0])"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"penalty": -1.0}, r"`penalty` must be at least 0, but got -1\.0\."),
        ({"penalty": math.nan}, "`penalty` must be at least 0, but got nan"),
        ({"preference": [1.0, 0.0]}, r"`preference\[1\]` must be positive, but got 0\.0\."),
    ],
)
def test_refuses_what_it_cannot_do_with(settings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        COSMOS(**settings)


def test_a_preference_for_every_task() -> None:
    with pytest.raises(ValueError, match=r"`preference` must have one number for each task"):
        COSMOS(preference={"a": 1.0}).bind(("a", "b"))
