"""What is true of SDMGrad alone; what holds for every strategy is in test_contract.py."""

import copy
import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import MGDA, SDMGrad
from mtbalance.weighting import Equal
from tests._device import on_device, randn
from tests._networks import TASKS, Network, batch, flat_grad, raw_rows
from tests._oracles import array
from tests._samplers import matrix

Array = np.ndarray
Long = np.longdouble


def asked(strategy: SDMGrad, across: Tensor) -> Tensor:
    """Return the weights for products, of which the Gramian makes no difference."""
    return strategy.weights_across(torch.full_like(across, torch.nan), across)


def test_two_calls_of_two_steps_by_hand() -> None:
    """A = (1, 2; -1, 9), s = (1 + 3) / 2 = 2, lambda = 1, eta = 1/8, mu = 1/2.

    A / 4 (w + (1/2, 1/2)), from w = (1/2, 1/2), is (3/4, 2) = v. w - v / 8 = (13/32, 8/32), of
    which 11/32 are missing: w = (37, 27) / 64. Again A / 4 (w + (1/2, 1/2)) =
    (69 + 118, -69 + 531) / 256 = (187, 462) / 256, v = (96 + 187, 256 + 462) / 256 =
    (283, 718) / 256, an eighth of it is (283, 718) / 2048: w - that is (901, 146) / 2048, and what
    is missing 1001 / 2048: w = (2803, 1293) / 4096. d has 2 (w + (1/2, 1/2)) / 2.
    """
    strategy = SDMGrad(lam=1.0, n_iter=2, lr=0.125, momentum=0.5)
    across = on_device(torch.tensor([[1.0, 2.0], [-1.0, 9.0]]).double())
    assert asked(strategy, across).tolist() == [4851 / 4096, 3341 / 4096]
    one = SDMGrad(lam=1.0, n_iter=1, lr=0.125, momentum=0.5)
    assert asked(one, across).tolist() == [69 / 64, 59 / 64]
    # The second call goes on from there, without the speed: v = (187, 462) / 256,
    # w - v / 8 = (997, 402) / 2048, of which 649 are missing: (2643, 1453) / 4096.
    assert asked(one, across).tolist() == [4691 / 4096, 3501 / 4096]


def nearest(point: Array) -> Array:
    """Return the nearest weights by bisection for the threshold, in long double."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(point - (low + high) / 2, 0)


class Oracle:
    """The method, number by number, in long double."""

    def __init__(
        self, m: int, lam: float, n_iter: int, lr: float, momentum: float, wanted: Sequence[float]
    ) -> None:
        self.lam, self.n_iter, self.lr, self.momentum = lam, n_iter, lr, momentum
        self.wanted = np.array(wanted, dtype=Long) / sum(map(Long, wanted))
        self.weights = np.full(m, 1 / Long(m))

    def __call__(self, across: Array) -> Array:
        across, m = across.astype(Long), len(across)
        root = sum(np.sqrt(max(across[i, i], Long(0))) for i in range(m)) / m
        across = across / root**2 if root > 0 else 0 * across
        speed = np.zeros(m, dtype=Long)
        for _ in range(self.n_iter):
            for i in range(m):
                slope = sum(
                    across[i, j] * (self.weights[j] + Long(self.lam) * self.wanted[j])
                    for j in range(m)
                )
                speed[i] = Long(self.momentum) * speed[i] + slope
            self.weights = nearest(self.weights - Long(self.lr) * speed)
        return m * (self.weights + Long(self.lam) * self.wanted) / (1 + Long(self.lam))


@pytest.mark.parametrize("m", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    ("lam", "n_iter", "lr", "momentum"),
    [(0.3, 20, 10.0, 0.5), (0.3, 3, 5.0, 0.5), (0.0, 7, 0.3, 0.0), (2.0, 40, 0.1, 0.9)],
)
def test_calls_against_long_doubles(
    m: int, lam: float, n_iter: int, lr: float, momentum: float
) -> None:
    """Ten calls in a row, each from where the last has ended, of products without symmetry.

    Where steps are so large that they magnify rounding, the oracle says by how much.
    """
    wanted = [1.0 + i for i in range(m)]
    strategy = SDMGrad(lam, n_iter, lr, momentum, preference=wanted)
    oracle = Oracle(m, lam, n_iter, lr, momentum, wanted)
    sharp = 0
    for step in range(10):
        one, other, noise, tremor = (
            randn(m, k, seed=4 * step + n, dtype=torch.float64)
            for n, k in enumerate((2 * m, 2 * m, 2 * m, m))
        )
        across = (noise + one / 2) @ (noise + other / 2).T
        before = oracle.weights
        oracle(array(across * (1 + 1e-15 * tremor)))
        shaken, oracle.weights = oracle.weights, before
        found, expected = array(asked(strategy, across)), oracle(array(across))
        slack = np.abs(shaken - oracle.weights).max()
        sharp += slack <= 1e-11
        assert np.abs(found - expected).max() <= m * (1e-14 + 10 * slack)
        oracle.weights = array(strategy.shares.values[0]).astype(Long) / m
    assert sharp >= 6


def torchjd_weights(
    across: Tensor, weights: Tensor, lam: float, n_iter: int, lr: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """TorchJD's SDMGradWeighting, restated; return the weights that it remembers and gives."""
    m = len(across)
    target = torch.full_like(weights, 1 / m)
    scale = across.diagonal().clamp(min=0).sqrt().mean()
    across = across / (scale**2 + 1e-8)
    places = torch.arange(1, m + 1, device=across.device)
    speed = torch.zeros_like(weights)
    for _ in range(n_iter):
        speed = momentum * speed + across @ (weights + lam * target)
        moved = weights - lr * speed
        falling, _ = torch.sort(moved, descending=True)
        sums = torch.cumsum(falling, 0) - 1
        last = int((falling - sums / places > 0).nonzero().max())
        weights = (moved - sums[last] / (last + 1)).clamp(min=0)
    return weights, (weights + lam * target) / (1 + lam)


@pytest.mark.parametrize("count", [1, 2])
def test_training_against_three_batches_of_autograd(count: int) -> None:
    """Like TorchJD but for its 1e-8 next to the scale, and the scale of the sum."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shared = list(model.trunk.parameters())
    options = (0.3, 20, 0.5, 0.5)
    balancer = Balancer(Equal(), SDMGrad(*options), tasks=TASKS, shared=model.trunk)
    oracle = Oracle(3, *options, wanted=[1, 1, 1])
    weights = on_device(torch.full((3,), 1 / 3, dtype=torch.float64))
    for step in range(6):
        optimizer.zero_grad()
        seeds = [3 * step, 3 * step + 1, 3 * step + 2]
        rows = [raw_rows(model.losses(batch(seed=seed)), shared) for seed in seeds]
        pair = rows[:2] if count == 1 else rows[1:]
        across = pair[0] @ pair[1].T
        weights, given = torchjd_weights(across, weights, *options)
        functions = [lambda seed=seed: model.losses(batch(seed=seed)) for seed in seeds[1:]]
        balancer.backward(model.losses(batch(seed=seeds[0])), batches=functions[:count])
        found = flat_grad(shared)
        assert_close(found, 3 * given @ rows[0], rtol=1e-5, atol=1e-6)
        expected = oracle(array(across)) @ array(rows[0])
        assert np.abs(array(found) - expected).max() <= 1e-11 * np.abs(array(rows[0])).max()
        optimizer.step()


def shortest(rows: Array, lam: float, wanted: Array) -> Array:
    """Return argmin |sum (w_i + lam wanted_i) g_i| by solving for each set of tasks that count."""
    gramian = (rows.astype(Long) @ rows.astype(Long).T).astype(float)
    m, best = len(rows), None
    for size in range(1, m + 1):
        for kept in itertools.combinations(range(m), size):
            # G w + lam G wanted = t on those kept, sum w = 1
            index = list(kept)
            system = np.zeros((size + 1, size + 1))
            system[:size, :size] = gramian[np.ix_(index, index)]
            system[:size, size], system[size, :size] = -1, 1
            right = np.append(-lam * (gramian @ wanted)[index], 1.0)
            weights = np.zeros(m)
            weights[index] = np.linalg.solve(system, right)[:size]
            if weights.min() < 0:
                continue
            length = np.linalg.norm((weights + lam * wanted) @ rows)
            if best is None or length < best[0]:
                best = length, weights
    assert best is not None
    return best[1]


@pytest.mark.parametrize("kind", ["conflicting", "generic"])
@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.5])
def test_where_many_small_steps_end(m: int, lam: float, kind: str) -> None:
    """Of a Gramian: at the minimum of |g_w + lam g_0|, with g_0 the preferred mean."""
    rows = matrix(kind, m, 12, seed=m)
    wanted = np.arange(1.0, m + 1)
    strategy = SDMGrad(lam, 4000, 0.05, 0.5, preference=list(wanted))
    found = array(strategy.solve(rows @ rows.T))
    expected = shortest(array(rows), lam, wanted / wanted.sum())
    expected = m * (expected + lam * wanted / wanted.sum()) / (1 + lam)
    assert np.abs(found - expected).max() <= 1e-9 * m
    if lam == 0:
        length = float(MGDA()(rows).norm())
        assert float((torch.as_tensor(found) @ rows).norm()) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("m", [2, 3, 8])
def test_no_digit_depends_on_the_order_of_tasks(m: int) -> None:
    """Steps this large would magnify it to the first one."""
    strategy = SDMGrad(lr=10.0, n_iter=20)
    drawn = torch.Generator().manual_seed(m)
    order = on_device(torch.randperm(m, generator=drawn, device="cpu"))
    turned = copy.deepcopy(strategy)
    for step in range(5):
        across = randn(m, m, seed=step, dtype=torch.float64) + torch.eye(m).double()
        expected = asked(strategy, across)[order]
        assert asked(turned, across[order][:, order]).tolist() == expected.tolist()


def test_no_common_factor_matters() -> None:
    across = torch.tensor([[2.0, 0.3, -1.0], [0.1, 1.0, 0.4], [-2.0, 0.0, 3.0]]).double()
    expected = asked(SDMGrad(lr=0.3), across)
    assert expected.max() - expected.min() > 0.1
    for size in (1e-200, 1e-9, 1e9, 1e200):
        assert_close(asked(SDMGrad(lr=0.3), across * size), expected, rtol=1e-12, atol=0)
    for power in (-600, 600):  # not even in the last digit, whatever the steps
        one, other = SDMGrad(), SDMGrad()
        assert torch.equal(asked(one, across * 2.0**power), asked(other, across))


@pytest.mark.parametrize("diagonal", [(0.0, 0.0), (-1.0, -2.0), (0.0, -1.0)])
def test_without_a_positive_product_there_is_no_scale(diagonal: tuple[float, float]) -> None:
    strategy = SDMGrad(lam=0.0, lr=0.1)
    asked(strategy, torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double())
    before = strategy.shares.values.clone()
    across = torch.tensor([[diagonal[0], 0.7], [-0.4, diagonal[1]]]).double()
    assert torch.equal(asked(strategy, across), before[0])
    assert torch.equal(strategy.shares.values, before)


def test_products_far_from_their_scale() -> None:
    """The direction of the steps is all that counts then; nothing leaves float64."""
    for least in (1e-40, 5e-324):
        across = torch.tensor([[least, 1.0], [-1.0, least]], dtype=torch.float64)
        weights = asked(SDMGrad(lam=0.0, n_iter=1), across)
        assert weights.tolist() == [0.0, 2.0]
        weights = asked(SDMGrad(), across * 1e200)
        assert weights.isfinite().all()
        assert float(weights.sum()) == pytest.approx(2)


def test_absent_tasks_keep_their_share_and_preference() -> None:
    """3/8 and 1/8 of all weight are 3/4 and 1/4 of theirs; preferences 1 and 3 are 1/4 and 3/4."""
    preference = {"a": 1.0, "b": 3.0, "c": 7.0}
    strategy = SDMGrad(lam=1.0, n_iter=1, lr=0.25, preference=preference).bind(TASKS)
    strategy.shares.values[0] = torch.tensor([9 / 8, 3 / 8, 3 / 2])  # times three tasks
    across = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    with strategy.only(torch.tensor([0, 1])):
        weights = asked(strategy, across)
    # w + pull = (1, 1), the same step for both
    assert weights.tolist() == [1.0, 1.0]
    assert strategy.shares.values.tolist() == [[9 / 8, 3 / 8, 3 / 2]]
    across[1, 1] = 9.0  # s = 2: slope (1/4, 9/4), w - slope / 4 = (11/16, -5/16): (1, 0)
    with strategy.only(torch.tensor([0, 1])):
        assert asked(strategy, across).tolist() == [5 / 4, 3 / 4]
    assert strategy.shares.values.tolist() == [[3 / 2, 0, 3 / 2]]
    with strategy.only(torch.tensor([1])):
        assert asked(strategy, across[:1, :1]).tolist() == [1.0]
    assert strategy.shares.values.tolist() == [[3 / 2, 0, 3 / 2]]


def test_one_task_has_all_weight() -> None:
    strategy = SDMGrad()
    assert strategy(torch.tensor([[2.0, -3.0]])).tolist() == pytest.approx([2, -3])
    assert strategy.shares.values.tolist() == [[1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_remembered(bad: float) -> None:
    strategy = SDMGrad(lr=0.1)
    strategy(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    before = strategy.shares.values.clone()
    across = torch.tensor([[1.0, bad], [0.0, 2.0]], dtype=torch.float64)
    assert asked(strategy, across).isnan().all()
    assert strategy(torch.tensor([[1.0, bad], [0.0, 2.0]])).isnan().all()
    assert torch.equal(strategy.shares.values, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "`lam` must be at least 0, but got -0.1."),
        ({"n_iter": 0}, "`n_iter` must be at least 1, but got 0."),
        ({"lr": 0.0}, "`lr` must be positive, but got 0.0."),
        ({"momentum": 1.0}, "`momentum` must be below 1, but got 1.0: it would never end."),
        ({"momentum": -0.5}, "`momentum` must be at least 0, but got -0.5."),
        ({"preference": [1.0, 0.0]}, "`preference[1]` must be positive, but got 0.0."),
    ],
)
def test_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SDMGrad(**options)
    shown = "SDMGrad(\n  lam=0.3, n_iter=20, lr=10.0, momentum=0.5, preference=[1.0, 2.0]"
    assert repr(SDMGrad(preference=[1.0, 2.0])).startswith(shown)
