"""What is true of DBMTL alone; what holds for every strategy is in test_contract.py."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import DBMTL, Normalized, RowMean, Sum
from mtbalance.weighting import LogLoss
from tests._device import on_device
from tests._networks import TASKS, Network, batch, flat_grad, raw_rows
from tests._oracles import array
from tests._samplers import matrix


def test_two_steps_by_hand() -> None:
    """Means (3, 0), (0, 1); then ((1/2)(1/2)(3, 0)) / (3/4) = (1, 0), and (0, 1) again."""
    strategy = DBMTL(beta=0.5)
    first = on_device(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert strategy(first).tolist() == [3, 3]
    assert_close(strategy(first * torch.tensor([[0.0], [1.0]]).to(first)), first.new_ones(2))


def published(rows: list[np.ndarray], beta: float, sigma: float) -> tuple[np.ndarray, float]:
    """The loop of the paper in long double, and what the mean of ones would be."""
    means, share = 0 * rows[0], np.longdouble(0)
    for t, row in enumerate(rows, 1):
        part = np.longdouble(beta) / np.longdouble(t) ** np.longdouble(sigma)
        means = row + part * (means - row)
        share = 1 + part * (share - 1)
    lengths = np.sqrt((means**2).sum(1, keepdims=True))
    return lengths.max() * (means / lengths).sum(0), float(share)


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.9, 0.5), (0.3, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("correct", [True, False])
def test_the_loop_of_the_paper(m: int, beta: float, sigma: float, correct: bool) -> None:
    strategy = DBMTL(beta, sigma, correct=correct)
    seen: list[np.ndarray] = []
    for step in range(10):
        rows = matrix("generic", m, 7, seed=step)
        seen.append(array(rows).astype(np.longdouble))
        expected, share = published(seen, beta, sigma)
        if correct:
            expected = expected / share
        error = np.linalg.norm(array(strategy(rows)) - expected.astype(float))
        assert error <= 1e-14 * np.linalg.norm(expected.astype(float))


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_equal_rows_give_their_sum_in_every_step(sigma: float) -> None:
    strategy = DBMTL(sigma=sigma)
    for _ in range(5):
        rows = on_device(torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)).expand(4, 3)
        assert_close(strategy(rows), 4 * rows[0], rtol=1e-14, atol=0)


def test_without_decay_it_is_a_mean_at_one_length() -> None:
    strategy, other = DBMTL(0.8), RowMean(Normalized(Sum(), "max"), 0.8)
    for step in range(5):
        rows = matrix("generic", 4, 6, seed=step)
        assert_close(strategy(rows), other(rows), rtol=1e-13, atol=1e-13)


def test_the_factor_of_a_loss_is_lost_with_log_loss() -> None:
    """Both halves: every task has the same length, whatever its loss is multiplied by."""
    torch.manual_seed(0)
    network = Network()
    trunk = list(network.trunk.parameters())
    found = []
    for factors in ((1.0, 1.0, 1.0), (1e-6, 1.0, 1e5)):
        balancer = Balancer(LogLoss(), DBMTL(), tasks=TASKS, shared=network.trunk)
        for step in range(3):
            network.zero_grad()
            losses = network.losses(batch(seed=step))
            balancer.backward({t: losses[t] * f for t, f in zip(TASKS, factors, strict=True)})
        found.append(flat_grad(trunk))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_through_a_balancer() -> None:
    """With an absent task, whose own steps count."""
    torch.manual_seed(0)
    network = Network()
    trunk = list(network.trunk.parameters())
    balancer = Balancer(LogLoss(), DBMTL(0.7, 0.5), tasks=TASKS, shared=network.trunk)
    alone = DBMTL(0.7, 0.5).bind(TASKS)
    for step in range(6):
        network.zero_grad()
        losses = network.losses(batch(seed=step))
        if step % 3 == 1:
            del losses["b"]
        rows = raw_rows({t: loss.log() for t, loss in losses.items()}, trunk)
        with alone.only(torch.tensor([TASKS.index(task) for task in losses])):
            expected = alone(rows)
        balancer.backward(losses)
        assert_close(flat_grad(trunk), expected, rtol=1e-12, atol=1e-13)
    assert balancer.gradient.means.steps.values.tolist() == [[6, 4, 6]]


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8])
def test_degenerate_rows(size: float) -> None:
    """A zero row adds nothing; a tiny one is brought to the length of the others."""
    rows = on_device(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3e-10, 0.0]])) * size
    assert_close(DBMTL()(rows) / size, rows.new_tensor([-2.0, 4.0]))
    assert DBMTL()(0 * rows).tolist() == [0, 0]


def test_options() -> None:
    assert repr(DBMTL(0.5, 1.0, correct=False)).startswith(
        "DBMTL(\n  beta=0.5, sigma=1.0, correct=False\n"
    )
    for options in ({"beta": 1.0}, {"beta": -0.1}, {"sigma": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            DBMTL(**options)
