"""What is true of TrimmedMean alone; what holds for every strategy is in test_contract.py.

The oracle sorts the exact fractions of one column at a time.
"""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import TrimmedMean
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._oracles import array
from tests._samplers import DTYPES, gradients, random_gradients


def trimmed(column: np.ndarray, trim: int) -> float:
    """Return m times the mean of what is left of m numbers, rounded once."""
    m = len(column)
    trim = min(trim, (m - 1) // 2)
    kept = sorted(Fraction(float(x)) for x in column)[trim : m - trim]
    return float(m * sum(kept, Fraction()) / len(kept))


def bounds(rows: Tensor) -> Tensor:
    """Return the rounding that each coordinate may have, shape (p,)."""
    return 4 * torch.finfo(rows.dtype).eps * rows.double().abs().sum(0)


def test_by_hand() -> None:
    """Columns 3, 1, 2, 90, -5 and 0, 0, 7, 1, -1: without both ends 1, 2, 3 and 0, 0, 1."""
    rows = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 7.0], [90.0, 1.0], [-5.0, -1.0]])
    assert_close(TrimmedMean(1)(rows), torch.tensor([5 * 2.0, 5 / 3]))
    assert_close(TrimmedMean(2)(rows), torch.tensor([5 * 2.0, 0.0]))
    assert_close(TrimmedMean(0)(rows), torch.tensor([91.0, 7.0]))


@given(rows=gradients(m=(1, 8), dtypes=DTYPES), trim=st.integers(0, 5))
@settings(max_examples=200)
def test_is_the_definition_in_fractions(rows: Tensor, trim: int) -> None:
    expected = on_device(np.array([trimmed(column, trim) for column in array(rows).T]))
    direction = TrimmedMean(trim)(rows).double()
    assert ((direction - expected).abs() <= bounds(rows)).all()


@pytest.mark.parametrize("m", range(1, 24))
def test_any_number_of_tasks_is_brought_in_order(m: int) -> None:
    """Against SciPy's, for random numbers, which are in no order that favours an exchange."""
    rows = random_gradients(m, 200, seed=m)
    for trim in range((m - 1) // 2 + 1):
        expected = m * scipy.stats.trim_mean(array(rows), (trim + 0.5) / m, axis=0)
        assert_close(array(TrimmedMean(trim)(rows)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("m", range(1, 9))
def test_too_few_tasks_have_their_median(m: int) -> None:
    rows = random_gradients(m, 30, seed=m)
    for trim in range((m - 1) // 2, 6):
        if 2 * trim >= m - 2:
            assert_close(array(TrimmedMean(trim)(rows)), m * np.median(array(rows), axis=0))


@pytest.mark.parametrize("seed", range(10))
def test_up_to_t_of_them_move_nothing_out_of_range(seed: int) -> None:
    """In each coordinate, d / m is no more than the largest honest entry, and no less."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(9, 50))
    bad = rng.choice(9, 3, replace=False)
    honest = np.delete(rows, bad, axis=0)
    rows[bad] = 10.0 ** rng.integers(-3, 30, (3, 50)) * rng.normal(size=(3, 50))
    mean = array(TrimmedMean(3)(on_device(rows))) / 9
    assert (mean <= honest.max(0) + 1e-12).all()
    assert (mean >= honest.min(0) - 1e-12).all()
    worse = array(TrimmedMean(2)(on_device(rows))) / 9
    assert (worse > honest.max(0) + 1).any() or (worse < honest.min(0) - 1).any()


@pytest.mark.parametrize("trim", range(5))
def test_growth_is_reached(trim: int) -> None:
    """By a column of t zeros and t + 1 ones: the median is 1, d = 2 t + 1, and the sum t + 1."""
    column = torch.cat([torch.zeros(trim), torch.ones(trim + 1)])[:, None].double()
    strategy = TrimmedMean(trim)
    assert strategy(column).item() == pytest.approx(strategy.growth * float(column.sum()))


@given(rows=gradients(m=(1, 9)), trim=st.integers(0, 4))
def test_no_entry_grows_by_more(rows: Tensor, trim: int) -> None:
    strategy = TrimmedMean(trim)
    assert (strategy(rows).abs() <= (strategy.growth + 1e-12) * rows.abs().sum(0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trim", [1, 2, 3])
@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_outlier(dtype, trim: int, row: int, bad: float) -> None:
    """It comes out in its own coordinate, though it would be trimmed, and in no other."""
    rows = random_gradients(5, 4).to(dtype)
    rows[row, 2] = bad
    assert TrimmedMean(trim)(rows).isfinite().tolist() == [True, True, False, True]


def test_large_numbers_do_not_overflow_on_the_way() -> None:
    """The sum of what is kept is within range, though the sum of all is not."""
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([[largest], [largest], [largest / 8], [-largest / 8], [-largest / 2]])
    expected = trimmed(rows[:, 0].numpy(), 2)
    assert_close(TrimmedMean(2)(rows).item(), expected, rtol=1e-6, atol=0)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="`trim` must be less than half the number of tasks, 4"):
        Balancer(Equal(), TrimmedMean(2), tasks=tuple("abcd"))
    Balancer(Equal(), TrimmedMean(1), tasks=tuple("abc"))
    with pytest.raises(ValueError, match="`trim` must be at least 0, but got -1"):
        TrimmedMean(-1)
    with pytest.raises(TypeError, match=r"`trim` must be a whole number, but got 0\.1"):
        TrimmedMean(0.1)  # type: ignore[arg-type]
    assert repr(TrimmedMean(1)) == "TrimmedMean(trim=1)"
