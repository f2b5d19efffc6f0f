"""What is true of MoDo alone; what holds for every strategy is in test_contract.py."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import MGDA, MoDo
from mtbalance.weighting import Equal
from tests._device import on_device, randn
from tests._networks import TASKS, Network, batch, flat_grad, raw_rows
from tests._oracles import array


def test_two_steps_by_hand() -> None:
    """A = (4, 1; -2, 1), gamma = 1/8, rho = 1, from (1/2, 1/2).

    First, (A + I) lambda = (3, 0): (1/8, 1/2), of which 3/8 are missing to 1: (5/16, 11/16). Then
    (A + I) lambda = (36, 12) / 16, an eighth of it is (36, 12) / 128: (40, 88) / 128 - that is
    (4, 76) / 128, of which 48 / 128 are missing: (28, 100) / 128 = (7, 25) / 32.
    """
    strategy = MoDo(gamma=0.125, rho=1.0)
    across = on_device(torch.tensor([[4.0, 1.0], [-2.0, 1.0]]).double())
    gramian = torch.full_like(across, torch.nan)  # which it does not look at
    first = strategy.weights_across(gramian, across)
    assert first.tolist() == [2 * 5 / 16, 2 * 11 / 16]
    second = strategy.weights_across(gramian, across)
    assert second.tolist() == [2 * 7 / 32, 2 * 25 / 32]


def longdouble_step(
    across: np.ndarray, weights: np.ndarray, gamma: float, rho: float
) -> np.ndarray:
    """Take one step by the formula, and find the nearest weights by bisection for the threshold."""
    across, weights = across.astype(np.longdouble), weights.astype(np.longdouble)
    slope = np.array([sum(a * w for a, w in zip(row, weights, strict=True)) for row in across])
    point = weights - np.longdouble(gamma) * (slope + np.longdouble(rho) * weights)
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(point - (low + high) / 2, 0)


@pytest.mark.parametrize("m", [1, 2, 3, 8])
@pytest.mark.parametrize("rho", [0.0, 0.1, 2.0])
def test_steps_against_long_doubles(m: int, rho: float) -> None:
    """Ten steps in a row, of products that are neither symmetric nor positive."""
    strategy, weights = MoDo(gamma=0.05, rho=rho), np.full(m, 1 / np.longdouble(m))
    for step in range(10):
        across = randn(m, m, seed=step, dtype=torch.float64)
        found = strategy.weights_across(across, across)
        weights = longdouble_step(array(across), weights, 0.05, rho)
        assert np.abs(array(found) - m * weights).max() <= 1e-14 * m


def torchjd_step(across: Tensor, weights: Tensor, gamma: float, rho: float) -> Tensor:
    """TorchJD's MoDoWeighting, restated: sort, find how many stay, shift and cut."""
    m = len(weights)
    moved = weights - gamma * (across @ weights + rho * weights)
    falling, _ = torch.sort(moved, descending=True)
    sums = torch.cumsum(falling, 0) - 1
    places = torch.arange(1, m + 1, device=moved.device)
    last = int((falling - sums / places > 0).nonzero().max())
    return (moved - sums[last] / (last + 1)).clamp(min=0)


@pytest.mark.parametrize("count", [1, 2])
def test_training_against_three_batches_of_autograd(count: int) -> None:
    """And against TorchJD's formula; its weights add up to 1 and ours to the number of tasks."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shared = list(model.trunk.parameters())
    balancer = Balancer(Equal(), MoDo(gamma=0.003), tasks=TASKS, shared=model.trunk)
    weights = on_device(torch.full((3,), 1 / 3, dtype=torch.float64))
    exact = np.full(3, 1 / np.longdouble(3))
    for step in range(8):
        optimizer.zero_grad()
        seeds = [3 * step, 3 * step + 1, 3 * step + 2]
        rows = [raw_rows(model.losses(batch(seed=seed)), shared) for seed in seeds]
        pair = rows[:2] if count == 1 else rows[1:]
        across = pair[0] @ pair[1].T
        weights = torchjd_step(across, weights, 0.003, 0.1)
        exact = longdouble_step(array(across), exact, 0.003, 0.1)
        functions = [lambda seed=seed: model.losses(batch(seed=seed)) for seed in seeds[1:]]
        balancer.backward(model.losses(batch(seed=seeds[0])), batches=functions[:count])
        found = flat_grad(shared)
        assert_close(found, 3 * weights @ rows[0], rtol=1e-10, atol=1e-12)
        expected = (3 * exact) @ array(rows[0])
        assert np.abs(array(found) - expected).max() <= 1e-12 * np.abs(array(rows[0])).max()
        optimizer.step()
    assert 0 < float(weights.min()) < 0.3  # or little of the formula has been seen


def test_the_step_of_the_paper_for_two_batches() -> None:
    """Equation (2.9b): the mean of both, given as losses, next to each of them as a function."""
    model = Network()
    shared = list(model.trunk.parameters())
    one, other = (raw_rows(model.losses(batch(seed=seed)), shared) for seed in (1, 2))
    first, second = (model.losses(batch(seed=seed)) for seed in (1, 2))
    losses = {task: (first[task] + second[task]) / 2 for task in TASKS}
    functions = [lambda seed=seed: model.losses(batch(seed=seed)) for seed in (1, 2)]
    balancer = Balancer(Equal(), MoDo(gamma=0.003), tasks=TASKS, shared=model.trunk)
    balancer.backward(losses, batches=functions)
    weights = longdouble_step(array(one @ other.T), np.full(3, 1 / np.longdouble(3)), 0.003, 0.1)
    expected = 3 * weights @ (array(one) + array(other)) / 2
    assert_close(array(flat_grad(shared)), expected.astype(float), rtol=1e-12, atol=1e-12)


def test_it_finds_the_weights_of_mgda_without_noise() -> None:
    rows = randn(3, 6, seed=4, dtype=torch.float64)
    strategy = MoDo(gamma=0.05, rho=0.0)
    for _ in range(4000):
        direction = strategy(rows)
    assert_close(direction, MGDA()(rows), rtol=1e-9, atol=1e-9)


def test_noise_does_not_move_the_mean_of_the_step() -> None:
    """Where no weight ends at 0, the step is linear in A, which independent noise leaves unbiased.

    The Gramian of one noisy batch is off by the variances of the rows: 4 and 0 here.
    """
    torch.manual_seed(0)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    size = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    means = {"two batches": torch.zeros(2).double(), "one": torch.zeros(2).double()}
    tries = 4000
    for _ in range(tries):
        one, other = (rows + size * torch.randn(2, 2).double() for _ in range(2))
        for name, pair in (("two batches", (one, other)), ("one", (one, one))):
            across = pair[0] @ pair[1].T
            means[name] += MoDo(gamma=0.01, rho=0.0).weights_across(across, across) / tries
    assert_close(means["two batches"], torch.ones(2).double(), rtol=0, atol=0.002)
    assert float(means["one"][0]) < 1 - 0.01 * 2 / 2 + 0.002


def test_equal_rows_and_large_ones() -> None:
    """What all weights have in common is left out before it drowns them."""
    strategy = MoDo(gamma=0.5, rho=0.0)
    strategy.weights(torch.diag(torch.tensor([0.5, 1.0], dtype=torch.float64)))
    before = strategy.shares.values.clone()
    assert before.tolist() == [[1.125, 0.875]]
    for size in (1.0, 1e12, 1e200):
        across = torch.full((2, 2), size, dtype=torch.float64)
        assert strategy.weights_across(across, across).tolist() == [1.125, 0.875]
    across[0, 0] *= 2
    assert strategy.weights_across(across, across).tolist() == [0.0, 2.0]


def test_absent_tasks_keep_their_share() -> None:
    """Those at hand have what they had together, in proportion: 3/8 and 1/8 are 3/4 and 1/4."""
    strategy = MoDo(gamma=0.5, rho=0.0).bind(TASKS)
    strategy.shares.values[0] = torch.tensor([9 / 8, 3 / 8, 3 / 2])  # times three tasks
    across = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    with strategy.only(torch.tensor([0, 1])):
        weights = strategy.weights_across(across, across)
    # (3/4, 1/4) - (3/8, 1/4), and what is missing to 1: (11/16, 5/16)
    assert weights.tolist() == [2 * 11 / 16, 2 * 5 / 16]
    assert strategy.shares.values.tolist() == [[3 / 2 * 11 / 16, 3 / 2 * 5 / 16, 3 / 2]]


def test_tasks_that_have_nothing_share_equally() -> None:
    strategy = MoDo(gamma=0.25, rho=0.0).bind(TASKS)
    strategy.shares.values[0] = torch.tensor([0.0, 0.0, 3.0])
    across = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    with strategy.only(torch.tensor([0, 1])):
        assert strategy.weights_across(across, across).tolist() == [2 * 9 / 16, 2 * 7 / 16]
    assert strategy.shares.values.tolist() == [[0, 0, 3]]


def test_one_task_has_all_weight() -> None:
    strategy = MoDo()
    row = torch.tensor([[2.0, -3.0]])
    assert strategy(row).tolist() == [2, -3]
    assert strategy.shares.values.tolist() == [[1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_remembered(bad: float) -> None:
    strategy = MoDo()
    strategy(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    before = strategy.shares.values.clone()
    across = torch.tensor([[1.0, bad], [0.0, 2.0]], dtype=torch.float64)
    assert strategy.weights_across(across, across).isnan().all()
    assert strategy(torch.tensor([[1.0, bad], [0.0, 2.0]])).isnan().all()
    assert torch.equal(strategy.shares.values, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "`gamma` must be positive, but got 0.0."),
        ({"gamma": torch.inf}, "`gamma` must be positive, but got inf."),
        ({"rho": -0.5}, "`rho` must be at least 0, but got -0.5."),
    ],
)
def test_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MoDo(**options)
    assert repr(MoDo(gamma=0.5)).startswith("MoDo(\n  gamma=0.5, rho=0.1")
