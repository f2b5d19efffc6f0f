"""What is true of RandomGradient alone; what holds for every strategy is in test_contract.py."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import RandomGradient
from tests._oracles import array
from tests._samplers import matrix


def weights(strategy: RandomGradient, m: int, steps: int) -> np.ndarray:
    """Return the weights of some steps, shape (steps, m)."""
    gramian = torch.eye(m, dtype=torch.float64)
    return np.stack([array(strategy.solve(gramian)) for _ in range(steps)])


@pytest.mark.parametrize("m", [1, 2, 3, 10])
def test_weights_are_positive_and_sum_to_the_number_of_tasks(m: int) -> None:
    found = weights(RandomGradient(seed=m), m, 50)
    assert (found > 0).all()
    np.testing.assert_allclose(found.sum(1), m, rtol=1e-14)


def test_weights_are_the_softmax_of_normal_draws() -> None:
    """Number by number, with Python's exponential, of what a generator with the seed draws."""
    generator = torch.Generator().manual_seed(7)
    for row in weights(RandomGradient(seed=7), 4, 5):
        draws = torch.randn(4, generator=generator, dtype=torch.float64, device="cpu").tolist()
        powers = [math.exp(z) for z in draws]
        assert row == pytest.approx([4 * power / sum(powers) for power in powers], rel=1e-14)


def test_logarithms_of_ratios_are_normal() -> None:
    """log(w_i / w_j) = z_i - z_j has mean 0 and variance 2; 5 standard errors of 4000 draws."""
    found = np.log(weights(RandomGradient(seed=3), 3, 4000))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        ratio = found[:, i] - found[:, j]
        assert abs(ratio.mean()) < 5 * (2 / 4000) ** 0.5
        assert abs(ratio.var() - 2) < 5 * 2 * (2 / 4000) ** 0.5


def test_the_sum_on_average() -> None:
    """By symmetry each weight has the mean 1; its standard deviation is less than m = 3."""
    found = weights(RandomGradient(seed=5), 3, 4000)
    errors = found.std(0) / 4000**0.5
    assert (np.abs(found.mean(0) - 1) < 5 * errors).all()
    assert (errors < 3 / 4000**0.5).all()


def test_the_direction_is_the_weighted_sum() -> None:
    rows = matrix("generic", 5, 9)
    expected = weights(RandomGradient(seed=2), 5, 1)[0] @ array(rows)
    np.testing.assert_allclose(array(RandomGradient(seed=2)(rows)), expected, rtol=1e-12)


def test_seeds_and_generators() -> None:
    """The same seed gives the same stream, another seed another; a generator is used as it is."""
    rows = matrix("generic", 4, 9)

    def stream(strategy: RandomGradient) -> Tensor:
        return torch.stack([strategy(rows) for _ in range(3)])

    assert torch.equal(stream(RandomGradient(seed=5)), stream(RandomGradient(seed=5)))
    assert not torch.equal(stream(RandomGradient(seed=5)), stream(RandomGradient(seed=6)))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(stream(RandomGradient(generator=generator)), stream(RandomGradient(seed=5)))
    first, second, _ = stream(RandomGradient())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("m", range(1, 5))
def test_what_is_drawn_depends_on_the_number_of_tasks_alone(m: int) -> None:
    """So processes with different rows draw alike; one task draws nothing."""
    states = []
    for name in ("generic", "zero_rows", "non_conflicting"):
        strategy = RandomGradient(seed=3)
        strategy(matrix(name, m, 20, seed=m))
        states.append(strategy.random.generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    drawn = not torch.equal(states[0], torch.Generator().manual_seed(3).get_state())
    assert drawn == (m > 1)


def test_changing_the_dtype_of_a_model_leaves_the_stream_alone() -> None:
    rows = matrix("generic", 3, 9)
    first, second = RandomGradient(seed=1), RandomGradient(seed=1).to(torch.bfloat16)
    assert_close(first(rows), second(rows), rtol=0, atol=0)
