"""What is true of PCGrad alone; what holds for every strategy is in test_contract.py.

The oracle is the loop of the paper's Algorithm 1 on vectors (``_oracles.pcgrad_row``).
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance._gramians import TENSORS
from mtbalance.gradient import PCGrad, _pcgrad
from tests._device import on_device, randn
from tests._oracles import (
    array,
    pcgrad_expectation,
    pcgrad_fixed,
    pcgrad_outcomes,
    pcgrad_row,
    pcgrad_rows,
)
from tests._samplers import gradients, matrix

# Vector and Gramian arithmetic part where a projected gradient all but vanishes, and then decide
# differently whether it conflicts; whatever they decide moves the result by as little.
TOLERANCE = 1e-11


def near(direction: Tensor, expected: np.ndarray, rows: Tensor) -> bool:
    size = float(rows.norm(dim=1).sum())
    return bool(np.linalg.norm(array(direction) - expected) <= TOLERANCE * size)


def test_two_tasks_by_hand() -> None:
    """g1 = (1, 0) loses nothing but its part along g2 = (-1, 1): (1, 0) + 1/2 (-1, 1) = (1/2, 1/2).

    g2 loses its part along g1: (-1, 1) + (1, 0) = (0, 1).
    """
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    assert torch.equal(PCGrad()(rows), torch.tensor([0.5, 1.5]))


def test_three_tasks_by_hand_in_fixed_order() -> None:
    """Worked on paper.

    Task 1: (1, 0) + 1/2 (-1, 1) = (1/2, 1/2), then + 1/2 (0, -1) = (1/2, 0).
    Task 2: (-1, 1) + (1, 0) = (0, 1), then + (0, -1) = (0, 0).
    Task 3: orthogonal to task 1; (0, -1) + 1/2 (-1, 1) = (-1/2, -1/2).
    """
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    assert_close(PCGrad(order="fixed")(rows), torch.tensor([0.0, -0.5]))


@given(rows=gradients(m=(2, 2)))
def test_two_tasks_in_closed_form(rows: Tensor) -> None:
    """d = (1 - min(h, 0) / a) g1 + (1 - min(h, 0) / b) g2 with a, b, h = |g1|^2, |g2|^2, <g1, g2>.

    And it conflicts with neither: <g1, d> = a - h^2 / b >= 0 by Cauchy-Schwarz where h < 0.
    """
    first, second = array(rows)
    a, h, b = first @ first, first @ second, second @ second
    conflict = min(h, 0)
    expected = first + second
    if conflict:
        expected = (1 - conflict / a) * first + (1 - conflict / b) * second
    direction = PCGrad()(rows)
    assert near(direction, expected, rows)
    slack = 1e-12 * rows.norm(dim=1) * rows.norm(dim=1).sum()
    assert (rows @ direction >= -slack).all()


@given(rows=gradients())
@settings(max_examples=150)
def test_fixed_order_is_the_loop(rows: Tensor) -> None:
    alive = rows[(rows != 0).any(1)]
    expected = pcgrad_fixed(array(alive)) if len(alive) else np.zeros(rows.shape[1])
    assert near(PCGrad(order="fixed")(rows), expected, rows)


@given(rows=gradients(m=(1, 4)), seed=st.integers(0, 2**16))
@settings(max_examples=150)
def test_random_order_is_one_of_the_outcomes(rows: Tensor, seed: int) -> None:
    """At most 6^4 = 1296 choices of an order per task; the direction is one of them."""
    alive = array(rows[(rows != 0).any(1)])
    direction = PCGrad(seed=seed)(rows)
    if len(alive) == 0:
        assert not direction.any()
        return
    outcomes = np.stack(list(pcgrad_outcomes(alive)))
    distance = np.linalg.norm(outcomes - array(direction), axis=1).min()
    assert distance <= TOLERANCE * np.linalg.norm(alive, axis=1).sum()


@given(rows=gradients(m=(1, 5)))
def test_expectation_is_the_average_over_all_orders(rows: Tensor) -> None:
    alive = rows[(rows != 0).any(1)]
    expected = pcgrad_expectation(array(alive)) if len(alive) else np.zeros(rows.shape[1])
    assert near(PCGrad(expectation=True)(rows), expected, rows)


@pytest.mark.parametrize(
    ("primary", "expected"), [(0, [1.0, 1.0]), (1, [-0.5, 1.5]), (None, [0.5, 1.5])]
)
def test_two_tasks_of_which_one_is_primary_by_hand(primary, expected: list[float]) -> None:
    """As above, (1, 0) becomes (1/2, 1/2) and (-1, 1) becomes (0, 1), but the primary one stays."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    assert torch.equal(PCGrad(primary=primary)(rows), torch.tensor(expected))


@pytest.mark.parametrize(
    ("primary", "expected"), [(0, [0.5, -0.5]), (1, [-1.0, 0.5]), (2, [0.5, -1.0])]
)
def test_three_tasks_of_which_one_is_primary_by_hand(primary: int, expected: list[float]) -> None:
    """Above, (1, 0), (-1, 1), (0, -1) become (1/2, 0), (0, 0), (-1/2, -1/2); one of them stays."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    assert_close(PCGrad(order="fixed", primary=primary)(rows), torch.tensor(expected))


@given(rows=gradients(), data=st.data())
@settings(max_examples=150)
def test_the_primary_row_stays_and_the_others_are_the_loop(rows: Tensor, data) -> None:
    """In fixed and in all orders: the loop's sum, with the primary row in place of its projection.

    Zero rows are skipped, whichever is primary.
    """
    alive = [i for i, row in enumerate(rows) if row.any()]
    primary = data.draw(st.integers(0, len(rows) - 1))
    expected = np.zeros(rows.shape[1])
    mean = np.zeros(rows.shape[1])
    for task in range(len(alive)):
        others = [j for j in range(len(alive)) if j != task]
        stays = alive[task] == primary
        vectors = array(rows[alive])
        expected += vectors[task] if stays else pcgrad_row(vectors, task, others)
        if len(alive) <= 5:
            mean += vectors[task] if stays else np.mean(pcgrad_rows(vectors, task), axis=0)
    assert near(PCGrad(order="fixed", primary=primary)(rows), expected, rows)
    if len(rows) <= 5:
        assert near(PCGrad(expectation=True, primary=primary)(rows), mean, rows)


@given(rows=gradients(m=(3, 5)), seed=st.integers(0, 2**16), data=st.data())
def test_who_is_primary_changes_no_draw(rows: Tensor, seed: int, data) -> None:
    """The parts that are left out are those of the same walks: over all primaries they add up.

    Each direction is the plain one plus what its primary row has lost, so that those of all m
    primaries sum to (m - 1) times the plain direction plus the sum of the rows.
    """
    m = len(rows)
    total = torch.stack([PCGrad(seed=seed, primary=i)(rows) for i in range(m)]).sum(0)
    assert near(total, array((m - 1) * PCGrad(seed=seed)(rows) + rows.sum(0)), m * rows)
    one, other = PCGrad(seed=seed), PCGrad(seed=seed, primary=data.draw(st.integers(0, m - 1)))
    one(rows)
    other(rows)
    assert torch.equal(one.random.generator.get_state(), other.random.generator.get_state())


@given(rows=gradients(m=(2, 2)), primary=st.integers(0, 1))
def test_an_auxiliary_takes_nothing_from_the_primary(rows: Tensor, primary: int) -> None:
    """<g_p, d> >= |g_p|^2, as what is left of the only other row does not conflict with it."""
    own = rows[primary]
    gain = own @ PCGrad(primary=primary)(rows)
    assert gain >= own @ own - 1e-12 * own.norm() * rows.norm(dim=1).sum()


def test_every_order_is_drawn_equally_often() -> None:
    """Three tasks have 2^3 outcomes, each with probability 1/8.

    Among 4000 draws the count of one has standard deviation sqrt(4000 * 7/64) = 21: 5 of them are
    105. A biased permutation would shift the counts, a shared one would leave outcomes out.
    """
    rows = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, -2.0], [-2.0, -2.0, 1.0]]).double()
    outcomes = np.stack(list(pcgrad_outcomes(array(rows))))
    distances = np.linalg.norm(outcomes[:, None] - outcomes, axis=2)
    assert (distances + np.eye(8)).min() > 0.1, "the outcomes differ"
    strategy = PCGrad(seed=1)
    counts = np.zeros(8)
    gramian = rows @ rows.T
    for _ in range(4000):
        direction = array(strategy.solve(gramian)) @ array(rows)
        distances = np.linalg.norm(outcomes - direction, axis=1)
        assert distances.min() < 1e-12
        counts[distances.argmin()] += 1
    assert np.abs(counts - 500).max() < 105


def test_each_order_of_four_tasks_occurs() -> None:
    """Of the six orders in which one task visits three others, none is impossible.

    The chance that one of them is missed in 300 draws is below 6 * (5/6)^300 = 1e-23.
    """
    _, orders = zip(*[PCGrad(seed=seed)._walks(4) for seed in range(300)], strict=True)
    seen = {tuple(order[0].tolist()) for order in orders}
    assert seen == set(itertools.permutations([1, 2, 3]))


@pytest.mark.parametrize("strategy", [PCGrad(), PCGrad("fixed"), PCGrad(expectation=True)])
@pytest.mark.parametrize("m", range(1, 7))
def test_a_task_is_never_projected_off_itself(strategy: PCGrad, m: int) -> None:
    """Every walk visits each of the others once, and not the task that it starts from."""
    tasks, orders = strategy._walks(m)
    for task, order in zip(tasks.tolist(), orders.tolist(), strict=True):
        assert sorted([task, *order]) == list(range(m))


def test_a_visit_to_itself_would_show() -> None:
    """Rows for which the third task, had it visited itself last, would be projected once more.

    On paper: (2, -2, -1) + 7/6 (-1, 2, 1) = (5, 2, 1) / 6; the inner product with (-2, 1, -1) is
    -9/6, so + 1/4 (-2, 1, -1) = (4, 7, -1) / 12, whose inner product with (2, -2, -1) is -5/12.
    """
    rows = torch.tensor([[-1.0, 2.0, 1.0], [-2.0, 1.0, -1.0], [2.0, -2.0, -1.0]]).double()
    third = np.array([4.0, 7.0, -1.0]) / 12
    assert np.allclose(pcgrad_row(array(rows), 2, [0, 1]), third)
    assert third @ array(rows[2]) == pytest.approx(-5 / 12)
    # Tasks 1 and 2 agree (their inner product is 3) and meet each other before they meet task 3,
    # with which their inner products are -7 and -5.
    first = np.array([-1.0, 2.0, 1.0]) + 7 / 9 * array(rows[2])
    second = np.array([-2.0, 1.0, -1.0]) + 5 / 9 * array(rows[2])
    assert near(PCGrad(order="fixed")(rows), first + second + third, rows)


@given(rows=gradients(["generic", "conflicting"], m=(2, 6)), seed=st.integers(0, 99))
def test_projection_never_lengthens(rows: Tensor, seed: int) -> None:
    """|g_i^PC| <= |g_i| for each i, as every step is an orthogonal projection: |d| <= sum |g_i|."""
    direction = PCGrad(seed=seed)(rows)
    assert direction.norm() <= rows.norm(dim=1).sum() * (1 + 1e-12)


@given(rows=gradients(["conflicting", "rank_deficient"], m=(2, 5)), where=st.integers(0, 5))
@settings(max_examples=30)
def test_zero_rows_are_skipped_in_every_mode(rows: Tensor, where: int) -> None:
    """With a zero row the outcomes are those without it; nothing is divided by zero."""
    padded = torch.cat([rows[:where], torch.zeros_like(rows[:1]), rows[where:]])
    if len(rows) <= 4:
        outcomes = np.stack(list(pcgrad_outcomes(array(rows))))
        distance = np.linalg.norm(outcomes - array(PCGrad(seed=where)(padded)), axis=1).min()
        assert distance <= TOLERANCE * float(rows.norm(dim=1).sum())
    expected = PCGrad(order="fixed")(rows)
    assert_close(PCGrad(order="fixed")(padded), expected)
    assert_close(PCGrad(expectation=True)(padded), PCGrad(expectation=True)(rows))


@given(
    rows=gradients(["conflicting", "generic"], m=(2, 6), p=(2, 30), scales=[1.0]),
    factors=st.lists(st.floats(-6, 6), min_size=6, max_size=6),
)
def test_linear_in_the_norms_of_the_rows(rows: Tensor, factors: list[float]) -> None:
    """What a task loses depends on the others' directions alone: g_i^PC(diag(f) J) = f_i g_i^PC.

    Compared task by task through the weights: column j of the sum over tasks is what f weighs.
    """
    f = 10.0 ** np.array(factors[: len(rows)])
    parts = np.stack(
        [
            pcgrad_row(array(rows), i, [j for j in range(len(rows)) if j != i])
            for i in range(len(rows))
        ]
    )
    scaled = rows * on_device(f)[:, None]
    assert near(PCGrad(order="fixed")(scaled), f @ parts, scaled)


def test_seeds_and_generators() -> None:
    """The same seed gives the same stream, another seed another, and a generator is used as it is.

    A caller's generator is shared: what it draws in between moves the strategy's stream on.
    """
    rows = matrix("conflicting", 6, 20, seed=1)

    def stream(strategy: PCGrad) -> Tensor:
        return torch.stack([strategy(rows) for _ in range(8)])

    assert torch.equal(stream(PCGrad(seed=5)), stream(PCGrad(seed=5)))
    assert not torch.equal(stream(PCGrad(seed=5)), stream(PCGrad(seed=6)))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(stream(PCGrad(generator=generator)), stream(PCGrad(seed=5)))
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    first, moved = PCGrad(generator=torch.Generator().manual_seed(5)), PCGrad(seed=5)
    torch.rand(3, generator=first.random.generator, device="cpu")
    assert not torch.equal(stream(first), stream(moved))


@pytest.mark.parametrize("strategy", [PCGrad("fixed"), PCGrad(expectation=True)])
def test_deterministic_settings_draw_nothing(strategy: PCGrad) -> None:
    before = strategy.random.generator.get_state()
    rows = matrix("conflicting", 5, 20)
    assert torch.equal(strategy(rows), strategy(rows))
    assert torch.equal(strategy.random.generator.get_state(), before)


@pytest.mark.parametrize("m", range(1, 6))
def test_what_is_drawn_depends_on_the_number_of_tasks_alone(m: int) -> None:
    """So processes with different rows draw alike. Up to two tasks have one order: nothing."""
    states = []
    for name in ("non_conflicting", "zero_rows", "generic"):
        strategy = PCGrad(seed=3)
        strategy(matrix(name, m, 20, seed=m))
        states.append(strategy.random.generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    drawn = not torch.equal(states[0], torch.Generator().manual_seed(3).get_state())
    assert drawn == (m > 2)


@given(rows=gradients(m=(2, 2)))
@settings(max_examples=200)
def test_two_tasks_on_a_device_get_the_same_weights(rows: Tensor) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    on_device = torch.stack(_pcgrad._weights_of_pair(a, h, b, TENSORS))
    assert_close(on_device, PCGrad().weights(gramian), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "strategy",
    [PCGrad(), PCGrad("fixed"), PCGrad(expectation=True), PCGrad(primary=0), PCGrad(primary=1)],
)
def test_two_tasks_on_a_device_wait_for_nothing(strategy: PCGrad) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    weights = strategy.weights(torch.empty(2, 2, dtype=torch.float64, device="meta"))
    assert weights.device.type == "meta"
    assert weights.shape == (2,)


def test_expectation_has_a_limit() -> None:
    assert PCGrad(expectation=True)(matrix("generic", 6, 9)).shape == (9,)
    words = r"`expectation` must be False with more than 6 tasks, but got True with 7\."
    with pytest.raises(ValueError, match=words):
        PCGrad(expectation=True)(matrix("generic", 7, 9))


@pytest.mark.parametrize("entries", [1, 50, 200])
@pytest.mark.parametrize("order", ["random", "fixed"])
def test_the_stretches_change_nothing(entries: int, order: str, monkeypatch) -> None:
    rows = randn(11, 30, seed=1, dtype=torch.float64)
    whole = PCGrad(order, seed=2)(rows)
    monkeypatch.setattr("mtbalance.gradient._pcgrad._ENTRIES", entries)
    assert torch.equal(PCGrad(order, seed=2)(rows), whole)
