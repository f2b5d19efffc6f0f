"""What is true of Smoothed alone; what holds for every strategy is in test_contract.py."""

import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._checks import fallbacks_of
from mtbalance.gradient import (
    MGDA,
    CAGrad,
    ConFIG,
    GradVac,
    GramianStrategy,
    NashMTL,
    PCGrad,
    RandomGradient,
    Smoothed,
    Sum,
    UPGrad,
)
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._oracles import array
from tests._samplers import gradients, matrix, random_gradients

NAMES = ("a", "b", "c", "d", "e")
Make = Callable[[], GramianStrategy]
INNER = pytest.mark.parametrize(
    "make",
    [MGDA, CAGrad, UPGrad, ConFIG, lambda: PCGrad(seed=3), lambda: GradVac(0.3, seed=3), NashMTL],
)


def weights_of(strategy: GramianStrategy, rows: Tensor) -> np.ndarray:
    return array(strategy.solve(rows @ rows.T))


def test_two_steps_by_hand() -> None:
    """ConFIG's weights of (1, 0), (0, 1) are (1, 1), those of (1, 0), (0, 3) are (2, 2/3).

    (1, 1) * 3/4 + (2, 2/3) / 4 = (5/4, 11/12), times rows (5/4, 11/4).
    """
    strategy = Smoothed(ConFIG(), alpha=0.75)
    eye = on_device(torch.eye(2).double())
    assert_close(strategy(eye), eye[0] + eye[1])
    rows = eye * torch.tensor([[1.0], [3.0]]).to(eye)
    assert_close(strategy(rows), torch.tensor([1.25, 2.75]).to(eye))


@INNER
@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.3, 0.9, 0.999])
def test_averages_are_those_of_the_unrolled_sum(make: Make, m: int, alpha: float) -> None:
    """lambda_t = alpha^(t - 1) w_1 + (1 - alpha) sum over s from 2 to t of alpha^(t - s) w_s."""
    strategy, inner = Smoothed(make(), alpha), make()
    solved = []
    for step in range(12):
        rows = matrix("conflicting", m, 12, seed=step)
        solved.append(weights_of(inner, rows).astype(np.longdouble))
        t = len(solved)
        shares = np.array([(1 - alpha) * alpha ** (t - s) for s in range(1, t + 1)])
        shares[0] = alpha ** (t - 1)
        expected = (shares[:, None] * np.stack(solved)).sum(0)
        direction = strategy(rows)
        size = float(np.abs(expected) @ np.linalg.norm(array(rows), axis=1))
        assert np.linalg.norm(array(direction) - expected @ array(rows)) <= 1e-13 * size


@INNER
@pytest.mark.parametrize("m", [1, 2, 4])
def test_an_alpha_of_zero_is_the_strategy(make: Make, m: int) -> None:
    """Bit for bit."""
    strategy, inner = Smoothed(make(), alpha=0), make()
    for step in range(6):
        rows = random_gradients(m, 9, seed=step)
        assert torch.equal(strategy(rows), inner(rows))


@given(rows=gradients(m=(1, 6)), alpha=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60)
def test_constant_rows_give_what_the_strategy_gives(rows: Tensor, alpha: float) -> None:
    """Bit for bit, in every step."""
    strategy = Smoothed(UPGrad(), alpha)
    expected = UPGrad()(rows)
    for _ in range(4):
        assert torch.equal(strategy(rows), expected)


def test_noise_in_weights_shrinks_with_alpha() -> None:
    """Independent weights of variance v have averages of variance v (1 - alpha) / (1 + alpha).

    4000 steps, of which one in 20 or so is independent, tell a variance up to a tenth.
    """
    gramian = on_device(torch.eye(4).double())
    plain, averaged = RandomGradient(seed=1), Smoothed(RandomGradient(seed=1), 0.9)
    ones, others = (
        np.stack([array(strategy.solve(gramian)) for _ in range(4000)])
        for strategy in (plain, averaged)
    )
    ratio = others[200:].var(0).sum() / ones.var(0).sum()
    assert ratio == pytest.approx(0.1 / 1.9, rel=0.2)
    assert_close(others[200:].mean(0), np.ones(4), rtol=0, atol=0.1)


def test_absent_tasks_keep_their_average() -> None:
    """And a task that comes later begins with its first weight."""
    strategy, inner = Smoothed(CAGrad(), 0.8).bind(NAMES), CAGrad()
    averages: dict[int, float] = {}
    for step, there in enumerate([(0, 2), (2, 4, 0), (4, 1), (0, 1, 2, 4), (2,)]):
        rows = random_gradients(len(there), 8, seed=step)
        solved = weights_of(inner, rows)
        for task, weight in zip(there, solved, strict=True):
            averages[task] = 0.8 * averages[task] + 0.2 * weight if task in averages else weight
        expected = np.array([averages[task] for task in there]) @ array(rows)
        with strategy.only(torch.tensor(there)):
            assert_close(array(strategy(rows)), expected)
    found = array(strategy.averages.values[0])
    assert_close(found[[0, 1, 2, 4]], np.array([averages[task] for task in (0, 1, 2, 4)]))
    assert np.isnan(found[3])


@pytest.mark.parametrize("m", [2, 3, 5])
def test_a_zero_row_is_as_good_as_an_absent_task(m: int) -> None:
    """For a strategy that ignores it: later directions are the same, too."""
    one, other = (Smoothed(UPGrad(), 0.7).bind(NAMES[:m]) for _ in range(2))
    keep = torch.arange(1, m)
    for step in range(6):
        rows = matrix("conflicting", m, 9, seed=step)
        if step % 2:
            rows[0] = 0
            with other.only(keep):
                expected = other(rows[1:])
        else:
            expected = other(rows)
        assert_close(one(rows), expected)
    assert_close(one.averages.values, other.averages.values)


def test_averages_of_several_are_averages_of_averages() -> None:
    twice = Smoothed(Smoothed(ConFIG(), 0.5), 0.75)
    once, outer = Smoothed(ConFIG(), 0.5), None
    for step in range(5):
        rows = random_gradients(3, 7, seed=step)
        solved = weights_of(once, rows)
        outer = solved if outer is None else 0.75 * outer + 0.25 * solved
        assert_close(array(twice(rows)), outer @ array(rows))


def test_preferences_reach_the_strategy() -> None:
    """By name, and with a task that is absent."""
    x = nn.Parameter(on_device(torch.ones(3, dtype=torch.float64)))
    inner = UPGrad(preference={"b": 2, "a": 1, "c": 3})
    balancer = Balancer(Equal(), Smoothed(inner, 0.5), tasks=("a", "b", "c"), shared=[x])
    balancer.backward({"a": x[0], "b": x[1], "c": x[2]})
    assert x.grad is not None
    assert_close(x.grad, torch.tensor([0.5, 1, 1.5]).to(x))
    x.grad = None
    balancer.backward({"a": x[0], "c": x[2]})
    assert_close(x.grad, torch.tensor([0.5, 0, 1.5]).to(x))


@INNER
def test_a_reset_and_a_loaded_state_reach_the_strategy(make: Make) -> None:
    rows = [random_gradients(4, 9, seed=step) for step in range(6)]
    strategy = Smoothed(make(), 0.6)
    first = [strategy(each) for each in rows]
    strategy.reset()
    for each, expected in zip(rows[:3], first[:3], strict=True):
        assert torch.equal(strategy(each), expected)
    resumed = Smoothed(make(), 0.6)
    resumed.load_state_dict(copy.deepcopy(strategy.state_dict()))
    for each, expected in zip(rows[3:], first[3:], strict=True):
        assert torch.equal(resumed(each), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_come_out_and_are_forgotten(bad: float) -> None:
    class Sometimes(GramianStrategy):
        weight = 2.0

        def weights(self, gramian: Tensor) -> Tensor:
            weights = torch.ones_like(gramian[0])
            weights[0] = self.weight
            return weights

    inner = Sometimes()
    strategy = Smoothed(inner, 0.5)
    eye = on_device(torch.eye(3).double())
    strategy(eye)
    inner.weight = bad
    assert not torch.isfinite(strategy(eye)[0])
    inner.weight = 4.0
    assert strategy(eye).tolist() == [3, 1, 1]


def test_fallbacks_of_the_strategy_are_counted() -> None:
    class Falls(GramianStrategy):
        def weights(self, gramian: Tensor) -> Tensor:
            self.fallbacks += 1
            return torch.ones_like(gramian[0])

    strategy = Smoothed(Falls(), 0.5)
    x = nn.Parameter(on_device(torch.ones(2)))
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x])
    for _ in range(3):
        assert balancer.backward({"a": x[0], "b": x[1]}).fallbacks == 1
    assert fallbacks_of(strategy) == 3


@pytest.mark.parametrize(
    ("strategy", "alpha", "error", "words"),
    [
        (Sum(), 0.5, TypeError, "`strategy` must be a GramianStrategy, or Normalized"),
        (UPGrad, 0.5, TypeError, "must be a GradientStrategy, but got the class UPGrad."),
        (UPGrad(), -0.1, ValueError, "`alpha` must be at least 0, but got -0.1."),
        (UPGrad(), 1.0, ValueError, "`alpha` must be below 1, but got 1.0"),
        (UPGrad(), float("nan"), ValueError, "`alpha` must be at least 0, but got nan."),
    ],
)
def test_refuses_other_arguments(
    strategy: object, alpha: float, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        Smoothed(strategy, alpha)  # type: ignore[arg-type]


def test_repr_names_the_settings() -> None:
    assert "alpha=0.5" in repr(Smoothed(CAGrad(c=0.3), 0.5))
    assert "CAGrad(c=0.3" in repr(Smoothed(CAGrad(c=0.3), 0.5))
