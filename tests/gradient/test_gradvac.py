"""What is true of GradVac alone; what holds for every strategy is in test_contract.py.

The oracle turns vectors, not Gramians: to bring a vector to the cosine rho with u, what it has
across u stays, and what it has along u becomes rho / sqrt(1 - rho^2) times as long as that.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._gramians import FLOATS, TENSORS
from mtbalance.gradient import GradVac, PCGrad
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._oracles import Array, array
from tests._samplers import gradients, matrix, random_gradients

NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
WITH_ANGLES = ("generic", "conflicting", "non_conflicting", "unequal_norms")
"""Families of rows that are seldom opposite: their sines are known."""


def turned(rows: Array, task: int, order: Sequence[int], means: Array, beta: float) -> Array:
    """Return one task's gradient after its visits, moving its means (a row), in place."""
    wide = rows.astype(np.longdouble)
    g = wide[task].copy()
    norms = np.sqrt((wide**2).sum(1))
    for other in order:
        if min(norms[task], norms[other]) <= 1e-30 * norms.max():
            continue
        length = np.sqrt(g @ g)
        if length <= 1e-7 * norms[task]:
            continue
        unit = wide[other] / norms[other]
        phi, rho = (g @ unit) / length, means[other]
        if phi < rho:
            across = g - (g @ unit) * unit
            across = across - (across @ unit) * unit
            g = across + np.sqrt(across @ across) * rho / np.sqrt(1 - rho**2) * unit
        means[other] = (1 - beta) * rho + beta * phi
    return g


def in_fixed_order(rows: Array, means: Array, beta: float) -> Array:
    """Return the direction, moving the means, shape (m, m), in place."""
    m = len(rows)
    parts = [
        turned(rows, i, [j for j in range(m) if j != i], row, beta) for i, row in enumerate(means)
    ]
    return sum(parts, np.zeros(rows.shape[1], np.longdouble))


def with_means(means: Array, beta: float = 0.3, order: str = "fixed", seed: int = 0) -> GradVac:
    strategy = GradVac(beta, order, seed=seed).bind(NAMES[: len(means)])
    with torch.no_grad():
        strategy.cosines.values[0] = on_device(means)
    return strategy


def some_means(m: int, seed: int = 0, bound: float = 0.9) -> Array:
    means = np.random.default_rng(seed).uniform(-bound, bound, (m, m))
    np.fill_diagonal(means, 0)
    return means


def means_of(strategy: GradVac) -> Array:
    return array(strategy.cosines.values[0])


def error(direction: Tensor, expected: Array, rows: Tensor) -> float:
    size = float(rows.norm(dim=1).sum())
    return float(np.linalg.norm(array(direction) - expected.astype(float))) / (size or 1.0)


def test_two_tasks_by_hand() -> None:
    """The cosine of (1, 0) and (3, 4) is 0.6. Then (1, 0) is turned to (1, 3/4), and back."""
    strategy = GradVac(beta=1.0)
    rows = on_device(torch.tensor([[1.0, 0.0], [3.0, 4.0]]).double())
    assert_close(strategy(rows), rows.sum(0))
    assert_close(means_of(strategy), np.array([[0, 0.6], [0.6, 0]]))
    assert_close(strategy(torch.eye(2).to(rows)), torch.tensor([1.75, 1.75]).to(rows))
    assert not means_of(strategy).any()  # the cosine before it was turned


def test_three_tasks_by_hand_in_fixed_order() -> None:
    """Rows (1, 0), (0, 2), (-1, 0); the targets of the first are 0.6 and 0, all others are -1.

    It is turned to (1, 3/4) by the second. With the third its cosine is then -4/5 < 0, and what it
    has along (-1, 0) goes: (0, 3/4). The means move half way, to (0.6 + 0) / 2 and (0 - 4/5) / 2.
    """
    means = np.array([[0, 0.6, 0], [-1, 0, -1], [-1, -1, 0]])
    strategy = with_means(means, beta=0.5)
    rows = on_device(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]).double())
    assert_close(strategy(rows), torch.tensor([-1, 2.75]).to(rows))
    expected = np.array([[0, 0.3, -0.4], [-0.5, 0, -0.5], [-1, -0.5, 0]])
    assert_close(means_of(strategy), expected)


@given(rows=gradients(WITH_ANGLES, m=(1, 8), p=(4, 30)), seed=st.integers(0, 999))
@settings(max_examples=150)
def test_a_step_is_the_loop_on_vectors(rows: Tensor, seed: int) -> None:
    means = some_means(len(rows), seed)
    strategy = with_means(means)
    direction = strategy(rows)
    expected = in_fixed_order(array(rows), means, 0.3)
    assert error(direction, expected, rows) <= 1e-9
    assert_close(means_of(strategy), means, rtol=0, atol=1e-9)


@given(rows=gradients(m=(1, 8)), seed=st.integers(0, 999))
@settings(max_examples=150)
def test_of_any_rows_directions_are_the_loops(rows: Tensor, seed: int) -> None:
    """Gramians tell the sine of opposite rows up to 1e-8, and a target of 0.9 doubles that."""
    means = some_means(len(rows), seed)
    direction = with_means(means)(rows)
    assert error(direction, in_fixed_order(array(rows), means, 0.3), rows) <= 1e-6


@pytest.mark.parametrize("m", [2, 3, 6])
@pytest.mark.parametrize("beta", [1e-2, 0.5, 1.0])
def test_many_steps_are_the_loop_on_vectors(m: int, beta: float) -> None:
    """From the start, with rows that resemble each other more and more."""
    strategy, means = GradVac(beta, order="fixed"), np.zeros((m, m))
    base = array(random_gradients(1, 20, seed=99))
    turned_steps = 0
    for step in range(40):
        noise = random_gradients(m, 20, seed=step)
        rows = noise + on_device(base * 0.1 * step)
        expected = in_fixed_order(array(rows), means, beta)
        assert error(strategy(rows), expected, rows) <= 1e-11
        turned_steps += error(rows.sum(0), expected, rows) > 1e-3
    assert_close(means_of(strategy), means, rtol=0, atol=1e-11)
    assert turned_steps >= 2


@given(rows=gradients(["generic", "conflicting"], m=(3, 4), p=(5, 20)), seed=st.integers(0, 999))
@settings(max_examples=60)
def test_random_orders_are_those_of_the_means(rows: Tensor, seed: int) -> None:
    """The means of each task tell in which order it has visited; the direction must be of these."""
    m = len(rows)
    means = some_means(m, seed)
    strategy = with_means(means, order="random", seed=seed)
    direction, found = strategy(rows), means_of(strategy)
    expected = np.zeros(rows.shape[1], np.longdouble)
    for i in range(m):
        outcomes = []
        for order in itertools.permutations([j for j in range(m) if j != i]):
            moved = means[i].copy()
            g = turned(array(rows), i, order, moved, 0.3)
            outcomes.append((float(np.abs(moved - found[i]).max()), order, g))
        distance, _, g = min(outcomes, key=lambda outcome: outcome[0])
        assert distance <= 1e-9
        expected += g
    assert error(direction, expected, rows) <= 1e-8


@pytest.mark.parametrize("order", ["random", "fixed"])
@given(rows=gradients(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_the_first_step_is_pcgrads(order: str, rows: Tensor, seed: int) -> None:
    """With the same draws."""
    expected = PCGrad(order, seed=seed)(rows)
    assert error(GradVac(order=order, seed=seed)(rows), array(expected), rows) <= 1e-11


def test_without_beta_every_step_is_pcgrads() -> None:
    strategy, other = GradVac(0.0, seed=3), PCGrad(seed=3)
    for seed in range(5):
        rows = matrix("conflicting", 4, 9, seed)
        assert_close(strategy(rows), other(rows))


def test_means_are_of_the_cosines() -> None:
    """Rows that are never turned: the mean after n steps is (1 - (1 - beta)^n) cos."""
    strategy = GradVac(beta=0.1)
    rows = matrix("non_conflicting", 4, 9, seed=1)
    units = array(rows) / np.linalg.norm(array(rows), axis=1, keepdims=True)
    for n in range(1, 30):
        assert_close(strategy(rows), rows.sum(0))
        expected = (1 - 0.9**n) * (units @ units.T)
        np.fill_diagonal(expected, 0)
        assert_close(means_of(strategy), expected)


@given(
    rows=gradients(["conflicting", "generic"], m=(2, 6), p=(6, 30), scales=[1.0]),
    exponents=st.lists(st.floats(-6, 6), min_size=6, max_size=6),
)
@settings(max_examples=60)
def test_lengths_of_rows_do_not_matter_to_angles(rows: Tensor, exponents: list[float]) -> None:
    """Each part scales with its own row: d(diag(f) J) = f^T parts, and the means are the same."""
    m = len(rows)
    f = 10.0 ** np.array(exponents[:m])
    means = some_means(m)
    one, other = with_means(means), with_means(means)
    scaled = rows * on_device(f)[:, None]
    direction = other(scaled)
    one(rows)
    assert_close(means_of(other), means_of(one), rtol=0, atol=1e-9)
    parts = [
        turned(array(rows), i, [j for j in range(m) if j != i], means[i].copy(), 0.3)
        for i in range(m)
    ]
    assert error(direction, f @ np.stack(parts), scaled) <= 1e-9


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**40])
def test_later_steps_are_homogeneous_bit_for_bit(m: int, scale: float) -> None:
    one, other = (with_means(some_means(m)) for _ in range(2))
    for seed in range(3):
        rows = matrix("conflicting", m, 9, seed)
        assert torch.equal(other(rows * scale), one(rows) * scale)
        assert torch.equal(other(-rows * scale), -one(rows) * scale)
    assert (means_of(one) == means_of(other)).all()


@pytest.mark.parametrize("m", [2, 3, 5])
def test_parallel_tasks_that_part(m: int) -> None:
    """Means of 1, which nothing can reach: what is turned stays below 1e6 times its length."""
    g = random_gradients(1, 7)
    strategy = with_means(np.ones((m, m)) - np.eye(m), beta=0.0)
    assert torch.equal(strategy(g.expand(m, 7)), with_means(np.zeros((m, m)))(g.expand(m, 7)))
    near = g + 1e-9 * random_gradients(m, 7, seed=1)
    assert error(strategy(near), array(near.sum(0)), near) <= 1e-6
    apart = random_gradients(m, 7, seed=2)
    direction = strategy(apart)
    assert torch.isfinite(direction).all()
    assert direction.norm() <= 1.01e6 ** (m - 1) * apart.norm(dim=1).sum()


@pytest.mark.parametrize("m", [2, 3, 6])
def test_zero_rows_meet_nobody(m: int) -> None:
    """Neither the means of their pairs nor the other rows change."""
    means = some_means(m)
    strategy = with_means(means)
    rows = random_gradients(m, 8)
    rows[1] = 0
    direction = strategy(rows)
    keep = [i for i in range(m) if i != 1]
    without = with_means(means[np.ix_(keep, keep)])
    assert_close(direction, without(rows[keep]))
    expected = means.copy()
    expected[np.ix_(keep, keep)] = means_of(without)
    assert_close(means_of(strategy), expected)


def test_a_gradient_that_has_vanished_meets_nobody() -> None:
    """Nothing is left of the first row after the second; its mean with the third stays."""
    rows = on_device(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.6, 0.8]]).double())
    strategy = with_means(np.array([[0, 0, 0.7], [-1, 0, -1], [-1, -1, 0]]))
    assert_close(strategy(rows), torch.tensor([-1.4, 0.8]).to(rows))
    assert means_of(strategy)[0].tolist() == [0, -0.3, 0.7]


@pytest.mark.parametrize("kind", [FLOATS, TENSORS])
@given(rows=gradients(m=(2, 2)), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_both_kinds_of_numbers_for_two_tasks(kind, rows: Tensor, seed: int) -> None:
    """Tensors of one element, as on other devices than the CPU, give what numbers give."""
    means = some_means(2, seed)
    strategy = with_means(means)
    g = array(rows @ rows.T)
    given_numbers = (g[0, 0], g[0, 1], g[1, 1], means[0, 1], means[1, 0])
    numbers = [float(number) for number in given_numbers]
    if kind is TENSORS:
        numbers = [torch.tensor(number, dtype=torch.float64) for number in numbers]
    *weights, rho, other = strategy._pair(*numbers, kind)
    direction = float(weights[0]) * array(rows[0]) + float(weights[1]) * array(rows[1])
    assert error(rows[0] * 0, direction - in_fixed_order(array(rows), means, 0.3), rows) <= 1e-6
    assert float(rho) == pytest.approx(means[0, 1], abs=1e-9)
    assert float(other) == pytest.approx(means[1, 0], abs=1e-9)


def test_a_balancer_keeps_means_of_pairs_that_are_there() -> None:
    """By task and by group, against the loop on the rows of each."""
    x, y = (torch.nn.Parameter(random_gradients(1, 6, seed)[0]) for seed in (1, 2))
    strategy = GradVac(0.4, order="fixed")
    balancer = Balancer(Equal(), strategy, tasks=NAMES[:4], shared={"x": [x], "y": [y]})
    means = np.zeros((2, 4, 4))
    for step in range(6):
        there = [0, 1, 2, 3] if step % 3 == 0 else [0, 2, 3] if step % 3 == 1 else [3, 1]
        slopes = [random_gradients(4, 6, seed=10 * step + k) for k in (0, 1)]
        x.grad = y.grad = None
        balancer.backward({NAMES[i]: slopes[0][i] @ x + slopes[1][i] @ y for i in there})
        for group, parameter in enumerate((x, y)):
            block = means[group][np.ix_(there, there)]
            order = sorted(range(len(there)), key=lambda k, there=there: there[k])
            block = block[np.ix_(order, order)]
            numbers = [there[k] for k in order]
            expected = in_fixed_order(array(slopes[group][numbers]), block, 0.4)
            means[group][np.ix_(numbers, numbers)] = block
            assert parameter.grad is not None
            assert error(parameter.grad, expected, slopes[group]) <= 1e-12
    assert_close(array(strategy.cosines.values), means)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_refuses_other_betas(beta: float) -> None:
    with pytest.raises(ValueError, match="`beta` must be between 0 and 1"):
        GradVac(beta)
    with pytest.raises(ValueError, match="`order` must be"):
        GradVac(order="given")


def test_repr_names_the_settings() -> None:
    assert repr(GradVac(0.5, "fixed")).startswith("GradVac(\n  beta=0.5, order='fixed'")
