"""What is true of MoCo alone; what holds for every strategy is in test_contract.py."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import MGDA, MoCo
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._networks import TASKS, Network, batch, flat_grad, raw_rows
from tests._oracles import array
from tests._samplers import matrix


def test_a_step_by_hand() -> None:
    """lambda = (1/2, 1/2) - 1/4 (1/2, 2) = (3/8, 0), which is nearest to (11/16, 5/16)."""
    rows = on_device(torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    assert_close(MoCo(gamma=0.25)(rows), rows.new_tensor([11 / 8, 5 / 4]))
    published = MoCo(gamma=0.25, correct=False)  # y = g / 2, slopes (1/8, 1/2): (15/32, 3/8)
    assert_close(published(rows), rows.new_tensor([35 / 64, 29 / 32]))


def nearest_on_simplex(vector: np.ndarray) -> np.ndarray:
    """By trying every set of entries that stay positive."""
    best, least = vector, np.inf
    for kept in range(1, 2 ** len(vector)):
        chosen = np.array([(kept >> i) & 1 for i in range(len(vector))], dtype=bool)
        point = np.zeros_like(vector)
        point[chosen] = vector[chosen] + (1 - vector[chosen].sum()) / chosen.sum()
        distance = ((point - vector) ** 2).sum()
        if (point >= 0).all() and distance < least:
            best, least = point, distance
    return best


def loop(
    rows: list[np.ndarray], beta: float, gamma: float, rho: float, *, softmax: bool, correct: bool
) -> np.ndarray:
    """The paper's recursion on whole vectors, in long double but for the projection."""
    m = len(rows[0])
    y, share = 0 * rows[0], np.longdouble(0)
    lambdas = np.full(m, 1 / m, dtype=np.longdouble)
    for t, row in enumerate(rows, 1):
        part, step = (np.longdouble(x) / np.sqrt(np.longdouble(t)) for x in (beta, gamma))
        y = y - part * (y - row)
        share = share - part * (share - 1)
        hat = y / share if correct else y
        moved = lambdas - step * (hat @ (lambdas @ hat) + rho * lambdas)
        if softmax:
            powers = np.exp(moved - moved.max())
            lambdas = powers / powers.sum()
        else:
            lambdas = nearest_on_simplex(moved)
    return np.asarray(m * lambdas @ hat, dtype=float)


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(("beta", "gamma", "rho"), [(0.5, 0.1, 0.0), (1.0, 0.02, 0.5)])
def test_the_recursion_on_vectors(
    m: int, softmax: bool, correct: bool, beta: float, gamma: float, rho: float
) -> None:
    projection = "softmax" if softmax else "simplex"
    strategy = MoCo(beta, gamma, rho, projection=projection, correct=correct)
    seen: list[np.ndarray] = []
    for step in range(10):
        rows = matrix("generic", m, 7, seed=step)
        seen.append(array(rows).astype(np.longdouble))
        expected = loop(seen, beta, gamma, rho, softmax=softmax, correct=correct)
        error = np.linalg.norm(array(strategy(rows)) - expected)
        assert error <= 1e-12 * np.linalg.norm(expected)


def test_equal_rows_give_their_sum_in_every_step() -> None:
    strategy = MoCo()
    rows = on_device(torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)).expand(4, 3)
    for _ in range(5):
        assert_close(strategy(rows), 4 * rows[0], rtol=1e-14, atol=0)


def test_it_comes_to_mgda() -> None:
    """Of gradients that stay, lambda goes to the weights of the shortest combination."""
    rows = matrix("generic", 3, 5, seed=1)
    strategy = MoCo(gamma=0.05, gamma_sigma=0.0)
    for _ in range(3000):
        direction = strategy(rows)
    assert_close(direction, MGDA()(rows), rtol=1e-6, atol=1e-8)


def test_absent_tasks() -> None:
    """Those at hand share what they have together; the sum of all stays."""
    strategy = MoCo(beta=1.0, gamma=0.05, beta_sigma=0.0, gamma_sigma=0.0).bind(TASKS)
    rows = matrix("generic", 3, 5, seed=2)
    strategy(rows)
    before = strategy.lambdas.values[0].clone()
    assert_close(before.sum(), before.new_tensor(3.0))
    pair = torch.tensor([0, 2])
    with strategy.only(pair):
        direction = strategy(rows[[0, 2]])
    after = strategy.lambdas.values[0]
    assert after[1] == before[1]
    assert_close(after.sum(), before.new_tensor(3.0))
    own = array(before[pair.to(before.device)])
    own = own / own.sum()
    two = array(rows[[0, 2]])
    new = nearest_on_simplex(own - 0.05 * two @ (own @ two))
    assert_close(array(direction), 2 * new @ two, rtol=1e-12, atol=1e-12)
    assert strategy.steps.values.tolist() == [[2, 1, 2]]


def test_where_absent_tasks_have_all_of_it() -> None:
    strategy = MoCo(beta=1.0, gamma=1e6, beta_sigma=0.0).bind(("a", "b"))
    eye = on_device(torch.eye(2, dtype=torch.float64))
    strategy(eye * torch.tensor([[1.0], [5.0]]).to(eye))
    assert strategy.lambdas.values.tolist() == [[2, 0]]
    with strategy.only(torch.tensor([1])):
        assert_close(strategy(eye[1:]), eye[1])


def test_through_a_balancer() -> None:
    torch.manual_seed(0)
    network = Network()
    trunk = list(network.trunk.parameters())
    balancer = Balancer(Equal(), MoCo(gamma=1e-3), tasks=TASKS, shared=network.trunk)
    alone = MoCo(gamma=1e-3).bind(TASKS)
    for step in range(6):
        network.zero_grad()
        losses = network.losses(batch(seed=step))
        if step % 3 == 1:
            del losses["b"]
        rows = raw_rows(losses, trunk)
        with alone.only(torch.tensor([TASKS.index(task) for task in losses])):
            expected = alone(rows)
        balancer.backward(losses)
        assert_close(flat_grad(trunk), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("projection", ["simplex", "softmax"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e18])
def test_degenerate_rows(projection: str, size: float) -> None:
    for rows in ([[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]):
        strategy = MoCo(projection=projection)
        for _ in range(3):
            direction = strategy(on_device(torch.tensor(rows) * size))
            assert direction.isfinite().all()


def test_options() -> None:
    assert repr(MoCo(projection="softmax", correct=False)).startswith(
        "MoCo(\n  beta=0.5, gamma=0.1, rho=0.0, projection='softmax', correct=False\n"
    )
    for options in (
        {"beta": 0.0},
        {"beta": 1.1},
        {"gamma": -1.0},
        {"rho": -0.1},
        {"beta_sigma": -1.0},
        {"gamma_sigma": -1.0},
        {"projection": "none"},
    ):
        with pytest.raises(ValueError, match="must be"):
            MoCo(**options)
