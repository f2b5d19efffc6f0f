"""What is true of GradDrop alone; what holds for every strategy is in test_contract.py.

Its uniform draws are those of a generator of the same seed, so that a slow loop over the paper's
Algorithm 1 (``_oracles.graddrop``) can be held against it number by number.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.gradient import GradDrop
from tests._device import on_device
from tests._oracles import array, graddrop, numbered_draw
from tests._samplers import BY_NAME, DTYPES, SCALES, gradients, matrix

LEAKS = st.floats(0, 1)


def draws_of(seed: int, p: int) -> Tensor:
    """Return the draws U in (0, 1) that GradDrop makes from this seed in its first step."""
    drawn = int(
        torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed), device="cpu")
    )
    return torch.tensor([(1 + numbered_draw(drawn, k)) / 2 for k in range(p)], dtype=torch.float64)


def bounds(rows: Tensor) -> Tensor:
    """Return the rounding that each coordinate may have, shape (p,), in units of the sum."""
    return 8 * torch.finfo(rows.dtype).eps * rows.double().abs().sum(0)


def test_value_by_hand() -> None:
    """Columns: agreement; 3 against -1, P = (1 + 2/4) / 2 = 3/4; -3 against 1, P = 1/4; nothing.

    Keep the positive part where U is below P, the negative part elsewhere.
    """
    rows = torch.tensor([[1.0, 3.0, -3.0, 0.0], [2.0, -1.0, 1.0, 0.0]])
    for seed in range(20):
        u = draws_of(seed, 4)
        expected = [3.0, 3.0 if u[1] < 0.75 else -1.0, 1.0 if u[2] < 0.25 else -3.0, 0.0]
        assert torch.equal(GradDrop(seed=seed)(rows), torch.tensor(expected))


@given(rows=gradients(dtypes=DTYPES), seed=st.integers(0, 2**16))
@settings(max_examples=150)
def test_is_the_loop_over_the_definition(rows: Tensor, seed: int) -> None:
    expected = graddrop(array(rows), array(draws_of(seed, rows.shape[1])), [0] * 8)
    error = (GradDrop(seed=seed)(rows).double() - on_device(expected)).abs()
    assert (error <= bounds(rows)).all()


@given(
    rows=gradients(dtypes=DTYPES),
    seed=st.integers(0, 2**16),
    leaks=st.lists(LEAKS, min_size=8, max_size=8),
)
@settings(max_examples=100)
def test_is_the_loop_over_the_definition_with_leaks_by_task(
    rows: Tensor, seed: int, leaks: list[float]
) -> None:
    expected = graddrop(array(rows), array(draws_of(seed, rows.shape[1])), leaks)
    direction = GradDrop(leak=leaks[: len(rows)], seed=seed)(rows).double()
    assert ((direction - on_device(expected)).abs() <= bounds(rows)).all()


@given(rows=gradients(dtypes=[torch.float64]), seed=st.integers(0, 2**16))
def test_each_coordinate_is_the_sum_of_one_sign(rows: Tensor, seed: int) -> None:
    direction = GradDrop(seed=seed)(rows)
    positive, negative = rows.clamp_min(0).sum(0), rows.clamp_max(0).sum(0)
    off = torch.minimum((direction - positive).abs(), (direction - negative).abs())
    assert (off <= bounds(rows)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [*SCALES, 2.0**-120, 2.0**120])
def test_unanimous_coordinates_are_kept_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    """Columns of one sign pass whatever the draw, also where 1e-8 would swamp them."""
    strategy = GradDrop(seed=0)
    for seed in range(20):
        rows = matrix("non_conflicting", 5, 30, seed, scale=scale, dtype=dtype)
        assert torch.equal(strategy(rows), rows.sum(0))


@given(rows=gradients(dtypes=DTYPES), seed=st.integers(0, 99))
def test_full_leak_is_the_sum(rows: Tensor, seed: int) -> None:
    direction = GradDrop(leak=1.0, seed=seed)(rows).double()
    assert ((direction - rows.double().sum(0)).abs() <= bounds(rows)).all()


@given(rows=gradients(), leak=LEAKS, seed=st.integers(0, 99))
def test_linear_in_the_leak(rows: Tensor, leak: float, seed: int) -> None:
    """d(leak) = leak times the sum plus (1 - leak) times d(0), for the same draws."""
    expected = leak * rows.sum(0) + (1 - leak) * GradDrop(seed=seed)(rows)
    error = (GradDrop(leak=leak, seed=seed)(rows) - expected).abs()
    assert (error <= bounds(rows)).all()


@given(rows=gradients(m=(2, 4)), leak=LEAKS, seed=st.integers(0, 99))
def test_one_leak_for_all_is_the_same_leak_for_each(rows: Tensor, leak: float, seed: int) -> None:
    one, each = GradDrop(leak=leak, seed=seed), GradDrop(leak=[leak] * len(rows), seed=seed)
    assert ((one(rows) - each(rows)).abs() <= bounds(rows)).all()


def test_a_leak_of_one_task_lets_that_task_through() -> None:
    """Leaks (1, 0): the first row always passes; of the second only the sign that is drawn."""
    rows = matrix("conflicting", 2, 30, seed=4)
    u = draws_of(0, 30)
    purity = rows.clamp_min(0).sum(0) / rows.abs().sum(0).clamp_min(1)
    kept = torch.where(purity > u, rows[1].clamp_min(0), rows[1].clamp_max(0))
    assert_close(GradDrop(leak=(1.0, 0.0), seed=0)(rows), rows[0] + kept)


@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_the_mean_over_draws_is_the_sum(leak: float) -> None:
    """Unbiased: P (S+) + (1 - P) (S-) = sum, exactly.

    A coordinate is S+ with probability P, else S-, so its variance is P (1 - P) (S+ - S-)^2, at
    most (sum |g|)^2 / 4. Over n draws the mean lies within 5 standard deviations of the sum; that
    one of 60 coordinates does not, has a chance of 4e-5.
    """
    n = 4000
    rows = torch.cat(
        [matrix(name, 3, 10, seed=2) for name in sorted(BY_NAME) if name != "unequal_norms"], 1
    )
    strategy = GradDrop(leak=leak, seed=3)
    mean = torch.stack([strategy(rows) for _ in range(n)]).mean(0)
    total = rows.abs().sum(0)
    purity = torch.where(total > 0, rows.clamp_min(0).sum(0) / total, 0.5)
    deviation = (1 - leak) * (purity * (1 - purity)).sqrt() * total / n**0.5
    assert ((mean - rows.sum(0)).abs() <= 5 * deviation + 1e-12 * total).all()
    spread = ((mean - rows.sum(0)) / deviation)[deviation > 0]
    assert spread.square().mean() > 0.3, "as much noise as the formula says"


@given(rows=gradients(p=(2, 12), dtypes=DTYPES), seed=st.integers(0, 99), cut=st.integers(1, 11))
def test_in_blocks_in_any_order(rows: Tensor, seed: int, cut: int) -> None:
    """Draws go by the number of the column, so that blocks may be taken in any order."""
    whole = GradDrop(seed=seed)(rows)
    strategy = GradDrop(seed=seed)
    strategy.start()
    last = strategy.on_columns(rows[:, cut:], cut)
    first = strategy.on_columns(rows[:, :cut], 0)
    assert torch.equal(torch.cat([first, last]), whole)


@given(rows=gradients(), seed=st.integers(0, 99))
def test_turning_the_signs_mirrors_the_draws(rows: Tensor, seed: int) -> None:
    """d(-J; 1 - U) = -d(J; U), with the draws replayed through the slow loop."""
    draws = array(draws_of(seed, rows.shape[1]))
    mirrored = -graddrop(-array(rows), np.nextafter(1 - draws, 2), [0] * 8)
    error = (GradDrop(seed=seed)(rows) - on_device(mirrored)).abs()
    assert (error <= bounds(rows)).all()


def test_draws_are_fresh_in_every_step() -> None:
    rows = matrix("opposite_rows", 2, 30)
    strategy = GradDrop(seed=0)
    assert not torch.equal(strategy(rows), strategy(rows))


def test_seeds_and_generators() -> None:
    rows = matrix("opposite_rows", 2, 30)

    def stream(strategy: GradDrop) -> Tensor:
        return torch.stack([strategy(rows) for _ in range(3)])

    assert torch.equal(stream(GradDrop(seed=5)), stream(GradDrop(seed=5)))
    assert not torch.equal(stream(GradDrop(seed=5)), stream(GradDrop(seed=6)))
    shared = GradDrop(generator=torch.Generator().manual_seed(5))
    assert torch.equal(stream(shared), stream(GradDrop(seed=5)))


@pytest.mark.parametrize("leak", [-0.1, 1.1, float("nan"), [0.5, 2.0]])
def test_refuses_leaks_that_are_no_fractions(leak: float) -> None:
    with pytest.raises(ValueError, match="`leak` must be between 0 and 1, but got"):
        GradDrop(leak=leak)


def test_refuses_leaks_for_another_number_of_tasks() -> None:
    words = r"`leak` must be one number or one per task \(3\), but got 2\."
    with pytest.raises(ValueError, match=words):
        GradDrop(leak=[0.1, 0.2])(matrix("generic", 3, 4))
