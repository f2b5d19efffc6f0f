"""What is true of DWA alone; what holds for every weighting is in test_contract.py.

w_i = m softmax_i(r_i / T), r_i the mean loss of the last epoch over that of the epoch before.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.weighting import DWA
from tests._device import on_device
from tests._oracles import dwa_weights
from tests.weighting._helpers import double

pytestmark = pytest.mark.usefixtures("in_float64")

MEANS = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3)


def train(weighting: DWA, *epochs: list[list[float]]) -> DWA:
    """Train on epochs of steps of losses."""
    for epoch in epochs:
        for losses in epoch:
            weighting(torch.tensor(losses, dtype=torch.float64))
        weighting.end_epoch()
    return weighting


def weights(weighting: DWA, active: list[int] | None = None, count: int = 3) -> Tensor:
    """Return the weights as they are now, without letting the weighting remember."""
    weighting.eval()
    tasks = torch.arange(count) if active is None else torch.tensor(active)
    with weighting.only(tasks):
        found = weighting(torch.ones(len(tasks), dtype=torch.float64))
    weighting.train()
    return found


def test_by_hand() -> None:
    """Means (2, 4), then (1, 4): ratios 1/2 and 1, T = 2: weights 2 e^(1/4), 2 e^(1/2) over sum.

    e^0.25 = 1.2840254, e^0.5 = 1.6487213: 2 * 1.2840254 / 2.9327467 = 0.8756, the rest 1.1244.
    """
    weighting = train(DWA(), [[1.0, 4.0], [3.0, 4.0]], [[1.0, 4.0]])
    assert_close(weights(weighting, count=2), double(0.8756, 1.1244), rtol=0, atol=5e-5)


def test_two_epochs_of_ones() -> None:
    """There is no ratio before two epochs are over: in them, all weights are exactly 1."""
    weighting = DWA()
    ones = torch.ones(3)
    for epoch in ([[5.0, 1.0, 0.1]], [[1.0, 1.0, 0.2], [2.0, 1.0, 0.3]]):
        for losses in epoch:
            assert torch.equal(weighting(double(*losses)), double(*losses))
            assert torch.equal(weights(weighting), ones)
        weighting.end_epoch()
    assert not torch.equal(weights(weighting), ones)


@given(before=MEANS, last=MEANS, temperature=st.sampled_from([0.5, 2.0, 10.0]))
def test_is_the_formula(before, last, temperature: float) -> None:
    """Against the softmax written out, for ratios that its powers can hold."""
    ratios = [a / b for a, b in zip(last, before, strict=True)]
    if max(ratios) > 300:
        return
    weighting = train(DWA(temperature), [before], [last])
    expected = double(*dwa_weights(last, before, temperature))
    assert_close(weights(weighting), expected, rtol=1e-10, atol=1e-12)


@given(epochs=st.lists(st.lists(MEANS, min_size=1, max_size=4), min_size=2, max_size=5))
def test_looks_at_the_means_of_the_last_two_epochs(epochs) -> None:
    """Raw losses, averaged over each epoch's steps; older epochs are forgotten."""
    weighting = train(DWA(50.0), *epochs)
    before, last = (torch.tensor(epoch).mean(0) for epoch in epochs[-2:])
    ratio = (last / before).clamp_max(1000)
    assert_close(weights(weighting), 3 * torch.softmax(ratio / 50, 0), rtol=1e-9, atol=1e-12)


@given(before=MEANS, last=MEANS, factors=MEANS)
def test_scale_of_each_task_does_not_matter(before, last, factors) -> None:
    """Losses enter as ratios to themselves."""
    scaled = [[f * x for f, x in zip(factors, losses, strict=True)] for losses in (before, last)]
    one = train(DWA(), [before], [last])
    other = train(DWA(), [scaled[0]], [scaled[1]])
    assert_close(weights(other), weights(one), rtol=1e-9, atol=1e-12)


def test_equal_ratios_give_equal_weights() -> None:
    """Constant losses, and losses that all halve: a shift of all ratios changes nothing."""
    losses = [[3.0, 0.1, 40.0]]
    halved = [[1.5, 0.05, 20.0]]
    assert_close(weights(train(DWA(), losses, losses)), torch.ones(3))
    assert_close(weights(train(DWA(), losses, halved)), torch.ones(3))


def test_limits_of_the_temperature() -> None:
    """Endless: equal weights. Near zero: everything for the slowest task."""
    epochs = [[[4.0, 2.0, 1.0]], [[2.0, 1.5, 0.9]]]
    assert_close(weights(train(DWA(1e9), *epochs)), torch.ones(3))
    assert_close(weights(train(DWA(1e-3), *epochs)), double(0, 0, 3))


def test_ratios_beyond_the_exponential_do_not_overflow() -> None:
    """e^(1e6 / 2) is infinite; the weights are not. Ratios end at 1000."""
    weighting = train(DWA(), [[1e-3, 1.0, 1.0]], [[1e3, 1.0, 2.0]])
    assert_close(weights(weighting), double(3, 0, 0))
    gentle = train(DWA(1000.0), [[1e-3, 1.0]], [[1e9, 1.0]])
    e = math.e / (math.e + math.exp(1e-3))
    assert_close(weights(gentle, count=2), double(2 * e, 2 - 2 * e))


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e20, 1e300])
def test_scale_of_all_losses_does_not_matter(scale: float) -> None:
    weighting = train(DWA(), [[2 * scale, 4 * scale]], [[1 * scale, 4 * scale]])
    assert_close(weights(weighting, count=2), double(0.8756, 1.1244), rtol=0, atol=5e-5)


def test_zero_over_zero_counts_as_one() -> None:
    weighting = train(DWA(), [[0.0, 2.0]], [[0.0, 2.0]])
    assert_close(weights(weighting, count=2), torch.ones(2))


def test_something_over_zero_counts_as_the_largest_ratio() -> None:
    weighting = train(DWA(1000.0), [[0.0, 2.0]], [[1.0, 2.0]])
    e = math.e / (math.e + math.exp(1e-3))
    assert_close(weights(weighting, count=2), double(2 * e, 2 - 2 * e))


def test_an_empty_epoch_keeps_the_means() -> None:
    """An epoch without a step (or twice ``end_epoch``) is no epoch."""
    weighting = train(DWA(), [[4.0, 4.0, 1.0]], [[2.0, 4.0, 1.0]])
    before = weights(weighting)
    weighting.end_epoch()
    assert torch.equal(weights(weighting), before)
    train(weighting, [[2.0, 1.0, 1.0]])
    expected = double(*dwa_weights([2.0, 1.0, 1.0], [2.0, 4.0, 1.0], 2.0))
    assert_close(weights(weighting), expected)


def test_a_task_absent_for_an_epoch_keeps_its_means() -> None:
    """Task 1 sits out the second epoch: its ratio is that of its own last two epochs."""
    weighting = train(DWA(), [[4.0, 8.0, 1.0]])
    with weighting.only(torch.tensor([0, 2])):
        weighting(double(2.0, 1.0))
    weighting.end_epoch()
    # It has one epoch behind it, the others two.
    assert_close(weights(weighting), double(*dwa_weights([2, 1, 1], [4, 1, 1], 2.0)))
    train(weighting, [[1.0, 2.0, 1.0]])
    expected = double(*dwa_weights([1.0, 2.0, 1.0], [2.0, 8.0, 1.0], 2.0))
    assert_close(weights(weighting), expected)


def test_a_task_absent_from_a_step_is_averaged_over_its_own_steps() -> None:
    """Task 1 has one step of two in the epoch: its mean is that step's loss."""
    weighting = train(DWA(), [[1.0, 1.0]])
    weighting(double(1.0, 3.0))
    with weighting.only(torch.tensor([0])):
        weighting(double(5.0))
    weighting.end_epoch()
    expected = double(*dwa_weights([3.0, 3.0], [1.0, 1.0], 2.0))
    assert_close(weights(weighting, count=2), expected)


def test_weights_are_shared_out_among_the_active_tasks() -> None:
    """Softmax over the active tasks alone, which sums to their number."""
    weighting = train(DWA(), [[4.0, 4.0, 1.0]], [[2.0, 4.0, 3.0]])
    found = weights(weighting, active=[2, 0])
    assert_close(found, double(*dwa_weights([3.0, 2.0], [1.0, 4.0], 2.0)))


def test_resumes_in_the_middle_of_an_epoch() -> None:
    """Sums, counts and the means of two epochs are all in ``state_dict``."""
    first = train(DWA(), [[4.0, 4.0, 1.0]], [[2.0, 4.0, 3.0]])
    first(double(1.0, 2.0, 3.0))
    second = DWA()
    second.load_state_dict(first.state_dict(), strict=True)
    for weighting in (first, second):
        weighting(double(5.0, 1.0, 1.0))
        weighting.end_epoch()
    expected = double(*dwa_weights([3.0, 1.5, 2.0], [2.0, 4.0, 3.0], 2.0))
    assert_close(weights(first), expected)
    assert torch.equal(weights(second), weights(first))


def test_remembers_the_raw_losses() -> None:
    """Not the weighted ones: with unequal weights in force, the next ratio is of raw means."""
    epochs = [[[4.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]]
    assert_close(weights(train(DWA(), *epochs), count=2), torch.ones(2))


def test_means_hold_no_graph() -> None:
    weighting = DWA()
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    weighting(x).sum().backward()
    weighting.end_epoch()
    assert not any(buffer.requires_grad for buffer in weighting.buffers())
    assert torch.equal(x.grad, torch.ones(2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, but got"):
        DWA(temperature=temperature)


def test_rounding_of_many_steps_does_not_show_in_the_weights() -> None:
    """At a low temperature, by the definition in float64 over the losses as they are."""
    generator = torch.Generator().manual_seed(0)
    weighting = DWA(temperature=0.05)
    drawn = torch.rand(2, 20_000, 2, generator=generator, device="cpu")
    epochs = on_device(drawn + 5).unbind()
    for losses in epochs:
        for row in losses.unbind():
            weighting(row)
        weighting.end_epoch()
    ratio = epochs[1].double().mean(0) / epochs[0].double().mean(0)
    expected = 2 * torch.softmax(ratio / 0.05, 0)
    found = weighting(torch.ones(2, dtype=torch.float64))
    assert_close(found, expected, rtol=1e-9, atol=0)
