"""Draws by number: the hash, its statistics, and that they depend on nothing else."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtbalance._random import RandomSource, numbered_draws
from tests._oracles import numbered_draw

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 2**62 - 1),
    first=st.sampled_from([0, 1, 1000, 2**31 - 3, 2**32 - 2, 2**32, 5 * 2**33 + 7]),
)
def test_is_the_hash_with_whole_numbers(seed: int, first: int) -> None:
    drawn = numbered_draws(seed, first, 5, CPU).double().tolist()
    # Across the 2^32nd column a block would need two keys; blocks end before or begin after it.
    columns = [first + i for i in range(5)]
    expected = [numbered_draw(seed, column) for column in columns if column >> 32 == first >> 32]
    assert drawn[: len(expected)] == expected


@given(seed=st.integers(0, 2**62 - 1), cut=st.integers(0, 40), first=st.integers(0, 2**20))
def test_pieces_are_the_whole(seed: int, cut: int, first: int) -> None:
    whole = numbered_draws(seed, first, 40, CPU)
    parts = [
        numbered_draws(seed, first, cut, CPU),
        numbered_draws(seed, first + cut, 40 - cut, CPU),
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_long_blocks_are_the_same_as_short_ones() -> None:
    """Short ones come from a table of multiples, long ones are counted out."""
    whole = numbered_draws(11, 5, 2**15 + 10, CPU)
    assert torch.equal(whole[2**15 :], numbered_draws(11, 5 + 2**15, 10, CPU))


def draws(seed: int, count: int = 2**18) -> np.ndarray:
    return numbered_draws(seed, 0, count, CPU).double().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2, 2**32, 2**62 - 1, 123456789123])
def test_draws_are_uniform_and_independent(seed: int) -> None:
    """Ends not included; a goodness of fit test, of pairs too; no correlation at several lags.

    With 6 seeds and about 10 tests each, a level of 1e-6 makes a false alarm a matter of 6e-5.
    """
    x = draws(seed)
    assert np.abs(x).max() < 1
    assert scipy.stats.kstest(x, "uniform", args=(-1, 2)).pvalue > 1e-6
    counts = np.histogram2d(x[::2], x[1::2], bins=16, range=[[-1, 1], [-1, 1]])[0]
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-6
    for lag in (1, 2, 3, 8, 64, 1024, 32768):
        assert abs(np.corrcoef(x[lag:], x[:-lag])[0, 1]) < 4.9 / np.sqrt(len(x) - lag)


@pytest.mark.parametrize("difference", [1, 2, 2**31, 2**32, 2**33, 0x9E3779B1])
def test_streams_of_near_seeds_are_unrelated(difference: int) -> None:
    """Neither at the same column nor at columns a few apart, where a weak hash would repeat."""
    x, y = draws(7), draws(7 + difference)
    for lag in (0, 1, 2):
        pair = np.corrcoef(x[lag:], y[: len(y) - lag])[0, 1]
        assert abs(pair) < 4.9 / np.sqrt(len(x) - lag)


def test_a_source_gives_fresh_seeds_and_goes_back() -> None:
    source = RandomSource(3)
    seeds = [source.draw_seed() for _ in range(3)]
    assert len(set(seeds)) == 3
    source.reset()
    assert [source.draw_seed() for _ in range(3)] == seeds
