"""The projection onto the probability simplex."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from mtbalance._simplex import nearest_weights, project_onto_simplex


def slow_projection(vector: list[float]) -> list[Fraction]:
    """Try every set of tasks that may keep a weight, in exact arithmetic."""
    exact = [Fraction(number) for number in vector]
    best: tuple[Fraction, list[Fraction]] | None = None
    for count in range(1, len(exact) + 1):
        for kept in itertools.combinations(range(len(exact)), count):
            threshold = (sum(exact[i] for i in kept) - 1) / count
            point = [exact[i] - threshold if i in kept else Fraction(0) for i in range(len(exact))]
            if min(point) < 0:
                continue
            distance = sum((x - y) ** 2 for x, y in zip(point, exact, strict=True))
            if best is None or distance < best[0]:
                best = distance, point
    assert best is not None
    return best[1]


@pytest.mark.parametrize(
    ("vector", "nearest"),
    [
        ([0.25, 0.75], [0.25, 0.75]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([2.0, 0.5], [1.0, 0.0]),
        ([0.5, 0.75, -3.0], [0.375, 0.625, 0.0]),
        ([-5.0, -5.0, -5.0, -5.0], [0.25, 0.25, 0.25, 0.25]),
        ([7.0], [1.0]),
    ],
)
def test_by_hand(vector: list[float], nearest: list[float]) -> None:
    assert project_onto_simplex(torch.tensor(vector)).tolist() == nearest
    assert nearest_weights(vector) == nearest


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_against_enumeration_in_exact_arithmetic(count: int, size: float) -> None:
    torch.manual_seed(count)
    for _ in range(20):
        vector = (torch.randn(count, dtype=torch.float64) * size).tolist()
        expected = [float(x) for x in slow_projection(vector)]
        for found in (
            project_onto_simplex(torch.tensor(vector, dtype=torch.float64)).tolist(),
            nearest_weights(vector),
        ):
            assert found == pytest.approx(expected, abs=1e-15 * (1 + size), rel=0)
            assert sum(found) == pytest.approx(1, abs=1e-15)
            assert min(found) >= 0


def test_differences_of_large_entries_count() -> None:
    vector = torch.tensor([1e9 + 0.25, 1e9, -1e300], dtype=torch.float64)
    assert project_onto_simplex(vector).tolist() == [0.625, 0.375, 0.0]
    assert nearest_weights(vector.tolist()) == [0.625, 0.375, 0.0]


def test_entries_near_the_end_of_the_range_are_held() -> None:
    vector = torch.tensor([1e308, -1e308, 1e308], dtype=torch.float64)
    assert project_onto_simplex(vector).tolist() == [0.5, 0.0, 0.5]
    assert nearest_weights([1e308, -math.inf, 1e308]) == [0.5, 0.0, 0.5]


def test_a_point_of_the_simplex_stays() -> None:
    weights = torch.rand(5, dtype=torch.float64)
    weights /= weights.sum()
    torch.testing.assert_close(project_onto_simplex(weights), weights, rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan(number: float) -> None:
    assert project_onto_simplex(torch.tensor([0.5, number])).isnan().all()


def test_no_digit_depends_on_the_order() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        numbers = (0.3 * torch.randn(9, dtype=torch.float64)).tolist()
        weights = dict(zip(numbers, nearest_weights(numbers), strict=True))
        assert 1 < sum(weight > 0 for weight in weights.values()) < 9
        for shift in range(1, 9):
            turned = numbers[shift:] + numbers[:shift]
            assert nearest_weights(turned) == [weights[number] for number in turned]
