"""What is true of random weights alone; what holds for every weighting is in test_contract.py.

w = m softmax(z), z standard normal, new in every step.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import RandomWeighting
from tests._device import DEVICE

TASKS = ("a", "b", "c")


def drawn(weighting: RandomWeighting, steps: int, count: int = 3) -> Tensor:
    """Return the weights of some steps, shape (steps, count)."""
    return torch.stack([weighting(torch.ones(count)) for _ in range(steps)])


def expected(draws: list[float]) -> list[float]:
    """Return the weights of these normal draws, with Python's own numbers."""
    powers = [math.exp(z) for z in draws]
    return [len(powers) * power / sum(powers) for power in powers]


def test_is_the_softmax_of_the_streams_normal_numbers() -> None:
    """Against the formula, over the draws of a generator with the same seed."""
    twin = torch.Generator().manual_seed(11)
    weighting = RandomWeighting(seed=11)
    for _ in range(50):
        numbers = expected(torch.randn(3, generator=twin, device="cpu").tolist())
        losses = torch.ones(3, dtype=torch.float64)
        assert_close(weighting(losses), losses.new_tensor(numbers), rtol=1e-14, atol=0)


def test_logarithms_are_normal() -> None:
    """log w_i - log w_j = z_i - z_j has mean 0 and variance 2; each weight has mean 1.

    5 standard errors over 4000 steps: sqrt(2 / 4000) = 0.022 for the mean and
    2 * sqrt(2 / 4000) = 0.045 for the variance of the difference; a weight's variance is below 1.
    """
    weights = drawn(RandomWeighting(seed=1), 4000).double()
    difference = weights[:, 0].log() - weights[:, 1].log()
    assert abs(float(difference.mean())) < 5 * 0.023
    assert abs(float(difference.var()) - 2) < 5 * 0.046
    assert_close(weights.mean(0), torch.ones(3).double(), rtol=0, atol=5 * 0.016)
    assert_close(weights.sum(1), torch.full((4000,), 3.0).double(), rtol=1e-6, atol=0)
    steps = difference - difference.mean()  # each step draws anew
    assert abs(float((steps[1:] * steps[:-1]).mean())) < 5 * 2 / math.sqrt(4000)


def test_absent_tasks_leave_the_others_draws_as_they_are() -> None:
    """The weights of (2, 0) keep the ratio that all three would have, in this step and later."""
    everyone = drawn(RandomWeighting(seed=5), 2)
    weighting = RandomWeighting(seed=5).bind(TASKS)
    with weighting.only(torch.tensor([2, 0])):
        two = weighting(torch.ones(2))
    assert_close(two, 2 * everyone[0, [2, 0]] / everyone[0, [2, 0]].sum())
    assert torch.equal(weighting(torch.ones(3)), everyone[1])


def test_one_task_has_the_weight_one() -> None:
    assert torch.equal(RandomWeighting()(torch.tensor([7.0])), torch.tensor([7.0]))


def test_evaluation_weighs_equally_and_draws_nothing() -> None:
    weighting = RandomWeighting(seed=3)
    weighting.eval()
    losses = torch.tensor([1.0, 2.0, 1e-8])
    assert torch.equal(weighting(losses), losses)
    weighting.train()
    assert torch.equal(drawn(weighting, 2), drawn(RandomWeighting(seed=3), 2))


def test_a_generator_of_the_users() -> None:
    generator = torch.Generator().manual_seed(9)
    first = drawn(RandomWeighting(generator=generator), 1)
    assert torch.equal(first, drawn(RandomWeighting(seed=9), 1))
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(9).get_state())


def test_reset_after_loading_goes_to_the_start_of_the_own_stream() -> None:
    """Even if the state came before the first loss."""
    trained = RandomWeighting(seed=1)
    drawn(trained, 5)
    other = RandomWeighting(seed=2)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(drawn(other, 2), drawn(trained, 2))
    other.reset()
    assert torch.equal(drawn(other, 2), drawn(RandomWeighting(seed=2), 2))


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert not torch.equal(drawn(RandomWeighting(seed=1), 1), drawn(RandomWeighting(seed=2), 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_rounds_the_weights_once(dtype: torch.dtype) -> None:
    weights = RandomWeighting(seed=4)(torch.ones(3, dtype=torch.float64))
    assert torch.equal(RandomWeighting(seed=4)(torch.ones(3, dtype=dtype)), weights.to(dtype))


def test_through_the_balancer() -> None:
    """3x and x^2 at x = 4 have the derivatives 3 and 8; losses of 1e4 and 1e-8 weigh alike."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(RandomWeighting(seed=2), Sum(), tasks=("a", "b"), shared=[x])
    twin = RandomWeighting(seed=2)
    record = balancer.backward({"a": 3 * x, "b": x.square()})
    w = twin(torch.ones(2))
    assert_close(torch.stack(list(record.weights.values())), w)
    assert_close(x.grad, 3 * w[0] + 8 * w[1])
    record = balancer.backward({"a": 1e4 * x, "b": 1e-8 * x})
    assert_close(torch.stack(list(record.weights.values())), twin(torch.ones(2)))


def test_by_its_short_names() -> None:
    for name in ("rlw", "randomweighting"):
        balancer = make_balancer(f"{name}+pcgrad", tasks=("a", "b"), seed=3)
        assert isinstance(balancer.weighting, RandomWeighting)
        assert torch.equal(drawn(balancer.weighting, 1, 2), drawn(RandomWeighting(3), 1, 2))


def test_refuses_a_generator_of_another_device() -> None:
    with pytest.raises(ValueError, match=r"`generator` must be a torch\.Generator on the CPU"):
        RandomWeighting(generator="cpu")  # type: ignore[arg-type]


def test_weights_are_where_the_losses_are() -> None:
    assert RandomWeighting()(torch.ones(2, device=DEVICE)).device.type == torch.device(DEVICE).type
