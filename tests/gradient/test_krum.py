"""What is true of Krum alone; what holds for every strategy is in test_contract.py.

The oracle scores vectors in exact fractions, and sorts by score and number.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import Krum
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._oracles import array
from tests._samplers import gradients, orthogonal, random_gradients

ROUNDING = Fraction(1, 10**12)
"""Times the squared norms, scores nearer to each other than this may tie in a Gramian."""


def scores_of(rows: np.ndarray, byzantine: int) -> list[Fraction]:
    """Return the sum of squared distances of each row to those nearest to it, exactly."""
    exact = [[Fraction(float(x)) for x in row] for row in rows]
    scores = []
    for i, row in enumerate(exact):
        distances = [
            sum((x - y) ** 2 for x, y in zip(row, other, strict=True))
            for j, other in enumerate(exact)
            if j != i
        ]
        scores.append(sum(sorted(distances)[: len(rows) - byzantine - 2], Fraction()))
    return scores


def selection(scores: list[Fraction], selected: int) -> list[int]:
    """Return the numbers of the lowest scores; of those that tie, the lower numbers."""
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:selected])


def selected_by(strategy: Krum, rows: Tensor) -> list[int]:
    weights = strategy.solve(rows @ rows.T)
    numbers = weights.nonzero()[:, 0].tolist()
    assert (weights[numbers] == len(rows) / len(numbers)).all()
    return numbers


def test_by_hand() -> None:
    """Numbers on a line, 0, 1, 3, 4, 100, of which one may be anything: two neighbours each.

    Scores: 1 + 9 = 10, 1 + 4 = 5, 1 + 4 = 5, 1 + 9 = 10, 96^2 + 97^2. 1 and 3 tie: 1 is first.
    """
    rows = torch.tensor([[0.0], [1.0], [3.0], [4.0], [100.0]])
    assert Krum(byzantine=1)(rows).tolist() == [5 * 1.0]
    assert Krum(byzantine=1)(rows.flip(0)).tolist() == [5 * 3.0]
    assert Krum(byzantine=1, selected=2)(rows).tolist() == [5 * 2.0]
    assert_close(Krum(byzantine=1, selected=3)(rows), torch.tensor([5 * 4 / 3]))
    assert Krum(byzantine=1, selected=4)(rows).tolist() == [5 * 2.0]
    # Three neighbours, one, and squares, which count: 0 has 1 + 9 + 16 = 26, and 1 has 14.
    assert Krum(byzantine=0)(rows).tolist() == [5 * 1.0]
    assert Krum(byzantine=2)(rows).tolist() == [0.0]  # four scores of 1
    # By distances that are not squared, 0 would win: 3 + 3 against 1 + 5.1 and 1 + 6.
    rows = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 5.1], [-3.0, 0.0], [0.0, 6.1]])
    assert Krum(byzantine=1)(rows).tolist() == [0.0, 0.0]


@given(rows=gradients(m=(3, 8)), data=st.data())
@settings(max_examples=200)
def test_is_the_definition_in_fractions(rows: Tensor, data) -> None:
    """Exact ties, which integers have, go to the lower number; what rounding may decide is left."""
    byzantine = data.draw(st.integers(0, len(rows) - 3))
    selected = data.draw(st.integers(1, len(rows)))
    vectors = array(rows)
    scores = scores_of(vectors, byzantine)
    last = sorted(scores)[selected - 1]
    size = Fraction(float((vectors**2).sum()))
    assume(all(s == last or abs(s - last) > ROUNDING * size for s in scores))
    chosen = selection(scores, selected)
    expected = vectors[chosen].sum(0) * (len(rows) / selected)
    direction = array(Krum(byzantine, selected)(rows))
    assert np.linalg.norm(direction - expected) <= 1e-14 * np.linalg.norm(expected)
    if 1e-100 < float(size) < 1e100:
        assert selected_by(Krum(byzantine, selected), rows) == chosen


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e12])
def test_a_minority_is_ignored_whatever_it_says(seed: int, size: float) -> None:
    """Of 9 gradients, 7 near (1, ..., 1), two may be anything: none of these is followed."""
    rng = np.random.default_rng(seed)
    rows = 1 + 0.1 * rng.normal(size=(9, 20))
    places = rng.choice(9, 2, replace=False)
    rows[places] = size * rng.normal(size=(2, 20))
    for selected in (1, 4, 7):
        chosen = selected_by(Krum(2, selected), on_device(rows))
        assert not set(chosen) & set(places.tolist())
        assert len(chosen) == selected


@pytest.mark.parametrize("m", [5, 8])
@pytest.mark.parametrize("selected", [1, 3])
def test_without_ties_the_order_of_tasks_does_not_matter(m: int, selected: int) -> None:
    rows = random_gradients(m, 12, seed=m)
    direction = Krum(1, selected)(rows)
    for order in itertools.islice(itertools.permutations(range(m)), 0, 720, 37):
        assert_close(Krum(1, selected)(rows[list(order)]), direction)


@pytest.mark.parametrize("seed", range(10))
def test_who_is_selected_depends_on_differences_alone(seed: int) -> None:
    """Adding the same to all gradients moves the selected ones, and selects no others."""
    rows = random_gradients(7, 10, seed)
    offset = 10 * random_gradients(1, 10, seed + 100)
    assert selected_by(Krum(2, 3), rows + offset) == selected_by(Krum(2, 3), rows)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("m", [4, 6])
def test_ties_up_to_rounding_go_to_the_lower_number(seed: int, m: int) -> None:
    """The rows of an orthogonal matrix are equally far from each other, up to rounding.

    Next to a row a million times as long they still are, as rounding counts by pair of rows.
    """
    rows = 3 * orthogonal(m, seed)
    assert selected_by(Krum(1), rows) == [0]
    assert selected_by(Krum(0, 2), rows) == [0, 1]
    far = torch.cat([1e6 * rows[:1], 1e-3 * rows])
    assert selected_by(Krum(1, 2), far) == [1, 2]


def test_scores_that_differ_by_more_than_rounding_do_not_tie() -> None:
    rows = torch.tensor([[1.0 + 1e-12], [2.0], [3.0 - 1e-13], [0.0], [50.0]], dtype=torch.float64)
    # Two neighbours: 1 is 1 + 1e-12 from 0 and less from 2; 2 is nearer to both 1 and 3.
    exact = scores_of(array(rows), 1)
    assert 0 < abs(exact[0] - exact[1]) < 1e-11
    assert selected_by(Krum(1), rows) == selection(exact, 1) == [1]


@given(rows=gradients(m=(3, 8)))
def test_all_selected_are_the_plain_sum(rows: Tensor) -> None:
    assert_close(
        Krum(0, len(rows))(rows), rows.sum(0), rtol=0, atol=1e-15 * float(rows.abs().sum())
    )


@pytest.mark.parametrize("m", [2, 4])
def test_too_few_gradients_are_added_up(m: int) -> None:
    rows = random_gradients(m, 7)
    strategy = Krum(byzantine=m - 2)
    with pytest.warns(RuntimeWarning, match=f"Krum fell back: {m} gradients are fewer than"):
        assert_close(strategy(rows), rows.sum(0))
    assert strategy.fallbacks == 1
    assert_close(strategy(rows[:1]), rows[0])  # of one, there is nothing to choose
    assert strategy.fallbacks == 1
    assert_close(Krum(0, selected=5)(rows.repeat(2, 1)[:4]), rows.repeat(2, 1)[:4].sum(0))


@pytest.mark.parametrize("m", [3, 6])
def test_waits_for_no_device(m: int) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(m, m, dtype=torch.float64, device="meta")
    assert Krum(0, 2).weights(gramian).shape == (m,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gramian_gives_bad_weights(bad: float) -> None:
    rows = torch.eye(4, dtype=torch.float64)
    rows[3, 2] = bad
    assert not Krum(1).solve(rows @ rows.T).isfinite().any()


def test_refuses_what_cannot_be() -> None:
    for options, words in (
        ({"byzantine": 2}, "`byzantine` must be at most 3 less than the number of tasks, 4, but"),
        ({"byzantine": 1, "selected": 5}, "`selected` must be at most the number of tasks, 4, but"),
        ({"byzantine": -1}, "`byzantine` must be at least 0, but got -1"),
        ({"byzantine": 0, "selected": 0}, "`selected` must be at least 1, but got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Balancer(Equal(), Krum(**options), tasks=tuple("abcd"))
    with pytest.raises(TypeError, match=r"`byzantine` must be a whole number, but got 0\.5"):
        Krum(byzantine=0.5)  # type: ignore[arg-type]
    assert repr(Krum(1, 2)) == "Krum(byzantine=1, selected=2)"
