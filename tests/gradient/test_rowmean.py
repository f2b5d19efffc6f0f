"""What is true of RowMean alone; what is remembered, and where, is in tests/test_row_means.py."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import (
    MGDA,
    CAGrad,
    ConFIG,
    DualProj,
    GradDrop,
    GradientStrategy,
    GradVac,
    MoDo,
    Normalized,
    PCGrad,
    RowMean,
    Smoothed,
    Sum,
    TrimmedMean,
    UPGrad,
)
from tests._device import on_device
from tests._oracles import array
from tests._samplers import matrix

Make = Callable[[], GradientStrategy]
INNER: list[Make] = [
    Sum,
    UPGrad,
    MGDA,
    CAGrad,
    ConFIG,
    lambda: PCGrad(seed=3),
    lambda: GradVac(0.3, seed=3),
    lambda: Normalized(DualProj()),
    lambda: Smoothed(UPGrad(), 0.5),
    lambda: TrimmedMean(trim=1),
    lambda: Normalized(TrimmedMean(trim=1)),
    lambda: GradDrop(seed=3),
]


def test_two_steps_by_hand() -> None:
    """M = (1/2)(2, 0), then (1/2)(1, 0) + (1/2)(8, 0) = (4.5, 0), over 1 - 1/4: (6, 0)."""
    for correct, first, second in ((True, [2.0, 4.0], [6.0, 4.0]), (False, [1, 2], [4.5, 3])):
        strategy = RowMean(Sum(), beta=0.5, correct=correct)
        rows = [on_device(torch.tensor([[a, 0.0], [0.0, 4.0]])) for a in (2.0, 8.0)]
        assert strategy(rows[0]).tolist() == first
        assert strategy(rows[1]).tolist() == second


def unrolled(rows: list[np.ndarray], beta: float, *, correct: bool) -> np.ndarray:
    """(1 - beta) sum over s of beta^(t - s) r_s, over 1 - beta^t, in long double."""
    t = len(rows)
    powers = np.array([np.longdouble(beta) ** (t - 1 - s) for s in range(t)])
    total = (1 - np.longdouble(beta)) * np.einsum("s,smp->mp", powers, np.stack(rows))
    return total / (1 - np.longdouble(beta) ** t) if correct else total


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(("m", "beta"), [(3, 0.3), (4, 0.9), (5, 0.999)])
def test_the_strategy_gets_the_unrolled_sums(
    make: Make, m: int, beta: float, correct: bool
) -> None:
    strategy, inner = RowMean(make(), beta, correct=correct), make()
    seen: list[np.ndarray] = []
    for step in range(8):
        rows = matrix("conflicting", m, 12, seed=step)
        seen.append(array(rows).astype(np.longdouble))
        means = unrolled(seen, beta, correct=correct)
        expected = array(inner(on_device(torch.tensor(means.astype(np.float64)))))
        error = np.linalg.norm(array(strategy(rows)) - expected)
        assert error <= 1e-12 * np.linalg.norm(means)


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_the_first_step_and_a_beta_of_zero_are_the_strategy(make: Make, beta: float) -> None:
    strategy, inner = RowMean(make(), beta), make()
    for step in range(1 if beta else 4):
        rows = matrix("generic", 4, 9, seed=step)
        assert torch.equal(strategy(rows), inner(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_means_are_at_least_float32(dtype: torch.dtype) -> None:
    """In bfloat16, where 258 follows 256, what 258 adds to it would be lost: it is at most 1."""
    strategy = RowMean(Sum(), beta=0.99)
    for first in (256.0, *[258.0] * 99):
        direction = strategy(on_device(torch.tensor([[first, 1.0]], dtype=dtype)))
    assert direction.dtype == dtype
    (mean,) = strategy.means.rows.state_dict().values()
    assert mean.dtype == torch.float32
    share = 0.01 * 0.99**99 / (1 - 0.99**100)
    expected = torch.tensor([258 - 2 * share, 1.0])
    assert_close(mean, on_device(expected), rtol=2e-6, atol=0)


def rows_of(*numbers: float) -> Tensor:
    return on_device(torch.tensor([[number] for number in numbers], dtype=torch.float64))


def test_absent_tasks_keep_their_means() -> None:
    strategy = RowMean(Sum(), beta=0.5).bind(("a", "b"))
    assert strategy(rows_of(1, 10)).item() == 11
    with strategy.only(torch.tensor([1])):
        assert strategy(rows_of(20)).item() == pytest.approx((2.5 + 10) / 0.75)
    assert strategy(rows_of(4, 0)).item() == pytest.approx((0.25 + 2) / 0.75 + 6.25 / 0.875)


def test_recalled_tasks_take_part_in_their_order() -> None:
    """ConFIG of e1 and of e2 with length 3, one after the other: weights (2, 2/3)."""
    strategy = RowMean(ConFIG(), recall=True).bind(("a", "b", "c"))
    first, second = on_device(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).split(1)
    with strategy.only(torch.tensor([2])):
        assert_close(strategy(second), second[0])  # nothing else is known
    with strategy.only(torch.tensor([0])):
        assert_close(strategy(first), on_device(torch.tensor([2.0, 2.0])))
    assert strategy.means.share.values.tolist() == [[pytest.approx(0.1), 0, pytest.approx(0.1)]]
    with strategy.only(torch.tensor([1])):
        strategy(first)
    favouring = RowMean(UPGrad(preference=[1, 2, 6]), recall=True).bind(("a", "b", "c"))
    for task, row in ((2, second), (0, first)):
        with favouring.only(torch.tensor([task])):
            direction = favouring(row)
    assert_close(direction, on_device(torch.tensor([1 / 3, 6.0])))


def test_momentum_config() -> None:
    """Algorithm 2 of the paper, in NumPy: one task in turn, surgery on the corrected means."""
    rng = np.random.default_rng(0)
    beta, lengths = 0.9, [0, 0, 0]
    strategy = RowMean(ConFIG(), beta, recall=True).bind(("a", "b", "c"))
    means = np.zeros((3, 7))
    for step in range(12):
        task, row = step % 3, rng.standard_normal(7)
        lengths[task] += 1
        means[task] = beta * means[task] + (1 - beta) * row
        known = [i for i in range(3) if lengths[i]]
        hats = np.stack([means[i] / (1 - beta ** lengths[i]) for i in known])
        units = hats / np.linalg.norm(hats, axis=1, keepdims=True)
        unit = np.linalg.pinv(units) @ np.ones(len(known))
        unit /= np.linalg.norm(unit)
        expected = (hats @ unit).sum() * unit
        with strategy.only(torch.tensor([task])):
            direction = strategy(on_device(torch.tensor(row[None])))
        assert_close(array(direction), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", [UPGrad, GradDrop, ConFIG])
def test_rows_that_are_not_finite_come_out_and_leave_no_trace(make: Make) -> None:
    strategy = RowMean(make())
    rows = matrix("generic", 3, 4, seed=0)
    strategy(rows)
    before = {name: value.clone() for name, value in strategy.state_dict().items()}
    for bad in (torch.nan, torch.inf):
        spoilt = rows.clone()
        spoilt[1, 2] = bad
        assert not torch.isfinite(strategy(spoilt)).all()
    after = strategy.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "random" not in name:
            assert torch.equal(value, after[name]), name


def test_rows_of_another_length_are_refused() -> None:
    strategy = RowMean(Sum())
    strategy(rows_of(1, 2))
    with pytest.raises(ValueError, match="must have 1 columns, as those that the strategy rem"):
        strategy(on_device(torch.ones(2, 3)))
    strategy.reset()
    assert strategy(on_device(torch.ones(2, 3))).tolist() == [2, 2, 2]


def test_alone_a_state_is_enough() -> None:
    first, second = RowMean(UPGrad()), RowMean(UPGrad())
    rows = [matrix("conflicting", 3, 5, seed=seed) for seed in range(3)]
    for each in rows[:2]:
        first(each)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(rows[2]), second(rows[2]))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RowMean(Sum(), beta=1.0), ValueError, "must be below 1"),
        (lambda: RowMean(Sum(), beta=-0.1), ValueError, "`beta` must be at least 0"),
        (lambda: RowMean(MoDo()), TypeError, "must do with the gradients of one batch, but MoDo"),
        (lambda: RowMean(RowMean(Sum())), TypeError, "averages them over steps"),
        (lambda: Normalized(RowMean(Sum())), TypeError, "Put RowMean around all others"),
        (lambda: Smoothed(RowMean(UPGrad()), 0.5), TypeError, "averages them over steps"),
    ],
)
def test_options(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_repr() -> None:
    assert repr(RowMean(Sum(), 0.5, correct=False, recall=True)).startswith(
        "RowMean(\n  beta=0.5, correct=False, recall=True\n  (strategy): Sum()"
    )
