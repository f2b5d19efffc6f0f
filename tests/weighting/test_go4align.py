"""What is true of GO4Align alone; what holds for every weighting is in test_contract.py.

p <- p exp(-eta L), shared out; gamma = p (sum L) / L; the mean of gamma over each group.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import GO4Align
from mtbalance.weighting._go4align import _grouped
from tests.weighting._helpers import double, weighed

TASKS = ("a", "b", "c")
STEPS = st.lists(
    st.dictionaries(st.integers(0, 3), st.floats(1e-2, 1e2), min_size=1), min_size=1, max_size=8
)
"""Losses by the number of the task, of which some may be absent."""


def partitions(items: Sequence[int], groups: int) -> Iterator[list[list[int]]]:
    """Yield every way to divide items into at most so many groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for division in partitions(rest, groups):
        for number in range(len(division)):
            yield [[first, *g] if i == number else g for i, g in enumerate(division)]
        if len(division) < groups:
            yield [[first], *division]


def cost_of(numbers: Sequence[float], division: Sequence[Sequence[int]]) -> Fraction:
    """Return the sum of squared distances from the means of the groups, exactly."""
    total = Fraction(0)
    for group in division:
        members = [Fraction(numbers[i]) for i in group]
        mean = sum(members) / len(members)
        total += sum((x - mean) ** 2 for x in members)
    return total


class Slow:
    """The definition with p itself, in extended precision, and every division into groups."""

    def __init__(self, count: int, groups: int, eta: float) -> None:
        self.groups, self.eta = groups, eta
        self.p = np.full(count, 1 / np.longdouble(count))

    def step(self, losses: Mapping[int, float]) -> tuple[np.ndarray, list[float]]:
        """Return gamma, and the weights."""
        active = list(losses)
        values = np.asarray(list(losses.values()), dtype=np.longdouble)
        held = self.p[active].sum()
        moved = self.p[active] * np.exp(-self.eta * values)
        self.p[active] = held * moved / moved.sum()
        gamma = self.p[active] / held * values.sum() / values
        numbers = [float(x) for x in gamma]
        best = min(partitions(range(len(active)), self.groups), key=lambda d: cost_of(numbers, d))
        weights = [0.0] * len(active)
        for group in best:
            for i in group:
                weights[i] = float(sum(gamma[j] for j in group) / len(group))
        return gamma, weights


def test_by_hand() -> None:
    """p = 1/3; losses of 1, 8 and 9: gamma = 6 (1, 1/8, 1/9), the last two together.

    Then with eta = log 2: p = (1/2, 2^-8, 2^-9) / 3 shared out, (256, 2, 1) / 259.
    """
    weighted, found = weighed(GO4Align(eta=0.0), double(1, 8, 9))
    mean = (6 / 8 + 6 / 9) / 2
    assert_close(found, double(6, mean, mean))
    assert_close(weighted, double(6, 8 * mean, 9 * mean))
    _, found = weighed(GO4Align(groups=3, eta=math.log(2)), double(1, 8, 9))
    assert_close(found, 18 * double(256, 2 / 8, 1 / 9) / 259)


@given(steps=STEPS, groups=st.integers(1, 5), eta=st.sampled_from([0.0, 1e-4, 0.05]))
def test_is_the_definition(steps, groups: int, eta: float) -> None:
    """Any steps, absent tasks included."""
    weighting, slow = GO4Align(groups, eta).bind(list("abcd")), Slow(4, groups, eta)
    for losses in steps:
        with weighting.only(torch.tensor(list(losses))):
            weighted, found = weighed(weighting, double(*losses.values()))
        gamma, expected = slow.step(losses)
        if _is_close_call([float(x) for x in gamma], groups):
            continue
        assert_close(found, double(*expected), rtol=1e-11, atol=0)
        assert torch.equal(weighted, found * double(*losses.values()))


def _is_close_call(numbers: Sequence[float], groups: int) -> bool:
    """Whether two divisions with other means are as good up to rounding."""
    ranked = sorted(
        (float(cost_of(numbers, d)), tuple(sorted(_means(numbers, d))))
        for d in partitions(range(len(numbers)), groups)
    )
    best, means = ranked[0]
    largest = max(numbers)
    return any(
        cost - best < 1e-10 * largest**2
        and not np.allclose(other, means, rtol=1e-13, atol=1e-13 * largest)
        for cost, other in ranked[1:]
    )


def _means(numbers: Sequence[float], division: Sequence[Sequence[int]]) -> list[float]:
    means = [0.0] * len(numbers)
    for group in division:
        for i in group:
            means[i] = math.fsum(numbers[j] for j in group) / len(group)
    return means


@given(
    numbers=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    groups=st.integers(1, 7),
    size=st.sampled_from([1e-300, 1.0, 1e38]),
)
def test_no_division_is_better(numbers, groups: int, size: float) -> None:
    """Among all divisions, by exact arithmetic; equal numbers have equal means."""
    means = _grouped([size * number for number in numbers], groups)
    distances = sum(((size * n - mean) / size) ** 2 for n, mean in zip(numbers, means, strict=True))
    best = min(cost_of(numbers, d) for d in partitions(range(len(numbers)), groups))
    assert distances == pytest.approx(float(best), rel=1e-9, abs=1e-12)
    assert len(set(means)) <= groups
    for one, mean in zip(numbers, means, strict=True):
        assert {m for n, m in zip(numbers, means, strict=True) if n == one} == {mean}


def test_equally_good_divisions() -> None:
    """0.5, 1 and 1.5: the smaller group is that of the large number, in any order."""
    assert _grouped([0.5, 1.0, 1.5], 2) == [0.75, 0.75, 1.5]
    assert _grouped([1.5, 0.5, 1.0], 2) == [1.5, 0.75, 0.75]


def test_numbers_far_apart_are_divided_well() -> None:
    """Costs of the small numbers do not vanish next to those of the large ones."""
    numbers = [1e12, 1.0, 1.1, 3.0, 3.2]
    assert _grouped(numbers, 3) == pytest.approx([1e12, 1.05, 1.05, 3.1, 3.1])


def test_equal_losses_have_weights_of_one() -> None:
    for groups in (1, 2, 3):
        _, found = weighed(GO4Align(groups), double(0.3, 0.3, 0.3))
        assert_close(found, double(1, 1, 1))


def test_scale_of_losses_counts_in_p_alone() -> None:
    """Losses c times as large with a c-th of eta: the same weights."""
    one, other = GO4Align(2, 0.1), GO4Align(2, 1e-4)
    for losses in ([1.0, 2.0, 5.0], [4.0, 0.5, 5.0]):
        first = weighed(one, double(*losses))[1]
        assert_close(weighed(other, 1000 * double(*losses))[1], first, rtol=1e-12, atol=0)


def test_absent_tasks_keep_what_they_have_of_p() -> None:
    weighting = GO4Align(3, 0.5).bind(TASKS)
    with weighting.only(torch.tensor([2, 0])):
        weighed(weighting, double(1, 3))
    share = 2 / 3 * torch.softmax(double(-1.5, -0.5), 0)
    assert_close(weighting.log_share.exp(), torch.stack([share[0], double(1 / 3)[0], share[1]]))
    before = weighting.log_share.clone()
    with weighting.only(torch.tensor([1])):
        assert weighed(weighting, double(100))[1].tolist() == [1]
    assert_close(weighting.log_share, before)  # nobody to share it with


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_as_an_absent_one_for_p(bad: float) -> None:
    weighting, other = GO4Align(3, 0.5).bind(TASKS), GO4Align(3, 0.5).bind(TASKS)
    assert weighed(weighting, double(bad, 1, 3))[1].isnan().all()
    with other.only(torch.tensor([1, 2])):
        weighed(other, double(1, 3))
    assert_close(weighting.log_share, other.log_share)


def test_p_counts_in_training_mode_only() -> None:
    weighting = GO4Align(eta=0.1).bind(TASKS).eval()
    weighed(weighting, double(1, 2, 3))
    assert_close(weighting.log_share.exp(), double(1, 1, 1) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_of_zero_is_in_no_group(dtype: torch.dtype) -> None:
    for zero in (0.0, -0.0, torch.finfo(dtype).smallest_normal / 4):
        losses = torch.tensor([zero, 1.0, 4.0], dtype=dtype)
        weighted, found = weighed(GO4Align(2, 0.0), losses)
        assert_close(found, torch.tensor([0, 5 / 3, 5 / 12], dtype=dtype))
        assert torch.isfinite(weighted).all()
        assert weighed(GO4Align(), torch.full((3,), zero, dtype=dtype))[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_end_at_what_their_dtype_holds(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    losses = torch.tensor([2 * limits.tiny, limits.max / 4], dtype=dtype)
    weighted, found = weighed(GO4Align(2, 0.0), losses)
    assert torch.isfinite(found).all()
    assert torch.isfinite(weighted).all()


def test_a_loss_far_above_the_others_for_long() -> None:
    """p leaves the range of float64: its weight tends to 0, and nothing is NaN."""
    weighting = GO4Align(2, 1.0)
    for _ in range(3):
        _, found = weighed(weighting, double(1, 1e4))
    assert_close(found[0], torch.tensor(10001, dtype=torch.float64))
    assert 0 <= found[1] < 1e-300
    assert torch.isfinite(weighting.log_share).all()


def test_a_negative_loss_makes_the_weights_nan() -> None:
    _, found = weighed(GO4Align(), double(-1, 2, 3))
    assert found.isnan().all()


def test_a_balancer_says_what_is_wrong_and_remembers_nothing() -> None:
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(GO4Align(), Sum(), tasks=("a", "b"), shared=[x])
    words = r"GO4Align must give finite weights, but .* \[12\.0, -4\.0\]\. It divides by them"
    with pytest.raises(FloatingPointError, match=words):
        balancer.backward({"a": 3 * x, "b": -x})
    assert x.grad is None
    assert_close(balancer.weighting.log_share.exp(), double(0.5, 0.5))


@pytest.mark.parametrize("steps", range(1, 5))
def test_resumes_bit_for_bit(steps: int) -> None:
    rows = [[1.0 + i, 7.0 - i, 0.5 * i + 0.1] for i in range(6)]

    def run(weighting: GO4Align, first: int, last: int) -> list[list[float]]:
        return [weighed(weighting, double(*rows[i]))[1].tolist() for i in range(first, last)]

    straight = run(GO4Align(eta=0.1), 0, 6)
    first, second = GO4Align(eta=0.1), GO4Align(eta=0.1).bind(TASKS)
    run(first, 0, steps)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, steps, 6) == straight[steps:]


def test_casting_the_model_keeps_p() -> None:
    weighting = GO4Align().bind(TASKS).to(torch.bfloat16)
    assert weighting.log_share.tolist() == [-math.log(3)] * 3


def test_through_the_balancer() -> None:
    """3x and x^2 at x = 4 are 12 and 16: gamma = 14 / L, so derivatives of 3.5 and 7."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(GO4Align(eta=0.0), Sum(), tasks=("a", "b"), shared=[x])
    balancer.backward({"a": 3 * x, "b": x.square()})
    assert_close(x.grad, torch.tensor(3.5 + 7))


def test_by_its_short_name() -> None:
    balancer = make_balancer("go4align+cagrad", tasks=("a", "b"), groups=3, eta=0.01)
    assert repr(balancer.weighting) == "GO4Align(groups=3, eta=0.01)"


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"groups": 0}, ValueError, "`groups` must be at least 1, but got 0"),
        ({"groups": 2.0}, TypeError, r"`groups` must be a whole number, but got 2\.0"),
        ({"eta": -0.1}, ValueError, r"`eta` must be at least 0, but got -0\.1\."),
    ],
)
def test_refuses_what_it_cannot_do_with(settings, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        GO4Align(**settings)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_refuses_a_damaged_state(bad: float) -> None:
    state = {"log_share": double(bad, 0)}
    with pytest.raises(ValueError, match="of GO4Align must have `log_share` finite"):
        GO4Align().load_state_dict(state)
