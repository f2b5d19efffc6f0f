"""What is true of PCD alone; what holds for every strategy is in test_contract.py.

The oracle tries every set of tasks that may hold the direction back, on vectors in long double: the
direction is the shortest step from the primary gradient that gives exactly these what they ask for,
and the right set is the one whose step harms nobody and pushes nobody away. Means are sums over all
steps, by the definition.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._gramians import FLOATS, TENSORS
from mtbalance.gradient import PCD, _pcd
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._oracles import Array, array, nonnegative_least_squares
from tests._samplers import gradients, matrix, random_gradients

NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
TAUS = st.sampled_from([0.0, 0.02, 0.3, 1.0])


class Answer(NamedTuple):
    """The direction, on the scale of m |g_p|, and how uncertain inner products leave it."""

    direction: Array
    uncertainty: float


def solve(matrix_: Array, right: Array) -> Array | None:
    """Gauss's elimination in long double; None if a pivot vanishes."""
    a = np.column_stack([matrix_, right]).astype(np.longdouble)
    for i in range(len(a)):
        pivot = i + int(np.abs(a[i:, i]).argmax())
        a[[i, pivot]] = a[[pivot, i]]
        if abs(a[i, i]) <= 1e-17:
            return None
        a[i] /= a[i, i]
        others = np.arange(len(a)) != i
        a[others] -= np.outer(a[others, i], a[i])
    return a[:, -1]


def exclude_each_other(units: Array, asked: Array) -> bool:
    """Whether a combination of unit vectors vanishes while what is asked along them does not.

    Then there is no vector whose products are what is asked, and else there is one (Farkas).
    """
    if not asked.any():
        return False
    found = scipy.optimize.linprog(
        -asked / asked.max(),
        A_eq=np.vstack([units.T, np.ones(len(units))]),
        b_eq=[0.0] * units.shape[1] + [1.0],
    )
    return found.status == 0 and found.fun < -1e-9


def pcd(rows: Array, primary: int, taus: Array, lengths: Array) -> Answer | None:
    """Return the answer for rows over these lengths, or None where constraints are infeasible."""
    wide = rows.astype(np.longdouble)
    norms = np.sqrt((wide**2).sum(1))
    nothing = Answer(np.zeros(rows.shape[1]), 1e-12)
    if norms[primary] == 0:
        return nothing
    others = [i for i in range(len(rows)) if i != primary and norms[i] > 0]
    units = wide / np.where(norms > 0, norms, 1)[:, None]
    start = wide[primary] / lengths[primary]
    asked = taus * norms / lengths
    if exclude_each_other(units[others].astype(float), asked[others].astype(float)):
        return None
    best = None
    for number in range(len(others) + 1):
        for held in map(list, itertools.combinations(others, number)):
            rows_held = units[held]
            mu = solve(rows_held @ rows_held.T, asked[held] - rows_held @ start)
            if mu is None or (mu < 0).any():
                continue
            d = start + mu @ rows_held
            weight = mu.sum() + np.sqrt(start @ start)
            lacks = max((asked[i] - units[i] @ d for i in others), default=0)
            if lacks <= 1e-15 * weight and (best is None or weight < best[0]):
                best = (weight, d)
    assert best is not None
    weight, d = best
    length = np.sqrt(d @ d)
    if length <= 1e-12 * weight:
        return nothing
    direction = d * (norms[primary] / length * (1 + len(others)))
    return Answer(direction.astype(float), 1e-13 + 1e-15 * float(weight / length) ** 2)


def mean_length(history: list[float], beta: float) -> float:
    """Return the root of a mean of squares in which each step counts beta times the next."""
    factors = [beta ** (len(history) - 1 - step) for step in range(len(history))]
    total = sum(f * h * h for f, h in zip(factors, history, strict=True))
    return math.sqrt(total / sum(factors))


def agrees(strategy: PCD, rows: Tensor, expected: Answer | None, primary: int) -> None:
    """Check a direction, and whether the strategy fell back."""
    before = strategy.fallbacks
    direction = array(strategy(rows))
    own = array(rows[primary])
    m = int(rows.any(1).sum())
    if expected is None:
        assert strategy.fallbacks == before + 1
        assert_close(direction, m * own, rtol=1e-14, atol=0)
        return
    assert strategy.fallbacks == before
    error = np.linalg.norm(direction - expected.direction)
    assert error <= expected.uncertainty * m * np.linalg.norm(own)


fell_back = pytest.mark.filterwarnings("ignore:PCD fell back:RuntimeWarning")


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "tau", "expected"),
    [
        ([0.0, 2.0], 0.75, [8.0, 6.0]),  # along (1, 3/4), 2 * 5 long
        ([-9.0, 0.0], 0.02, [-10.0, 0.0]),  # along (-0.02, 0): against the primary task
        ([-9.0, 0.0], 0.0, [0.0, 0.0]),  # what sets neither back
        ([-3.0, 4.0], 0.0, [8.0, 6.0]),  # (1, 0) off (-0.6, 0.8): 0.8 (0.8, 0.6)
        ([3.0, 4.0], 0.6, [10.0, 0.0]),  # has the cosine 0.6
        ([0.0, 0.0], 1.0, [5.0, 0.0]),  # one task has a gradient
    ],
)
@pytest.mark.parametrize("primary", [0, 1])
def test_two_tasks_by_hand(second, tau: float, expected, primary: int) -> None:
    rows = on_device(torch.tensor([[5.0, 0.0], second], dtype=torch.float64))
    rows = rows if primary == 0 else rows.flip(0)
    assert_close(PCD(primary, tau)(rows), torch.tensor(expected).to(rows))


def test_three_tasks_by_hand() -> None:
    """Orthogonal tasks get what they ask for: (1, 0.3, 0.4), whose length is the root of 5/4."""
    rows = on_device(torch.tensor([[0.0, 0.0, 3.0], [4.0, 0.0, 0.0], [0.0, 7.0, 0.0]]).double())
    strategy = PCD(1, tau=[0.4, 0.3])
    expected = torch.tensor([1.0, 0.3, 0.4]).to(rows) * (3 * 4 / 1.25**0.5)
    assert_close(strategy(rows), expected)


def test_lengths_are_over_those_of_steps_before_by_hand() -> None:
    """With beta = 1/2 the squares 1 and 9 have the mean (1 + 2 * 9) / 3, and 4 stays 4."""
    strategy = PCD(0, tau=0.6, beta=0.5)
    rows = on_device(torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double())
    strategy(rows)
    rows[0] *= 3
    along = torch.tensor([3 / (19 / 3) ** 0.5, 0.6]).double()
    assert_close(strategy(rows).cpu(), 6 * along / along.norm())


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_without_anybody_to_look_after_it_is_the_primary_gradient(m: int) -> None:
    """m times, bit for bit, as its cosine with the others is enough for each."""
    rows = 3 * torch.eye(m, 7, dtype=torch.float64) + 1
    for primary in range(m):
        assert torch.equal(PCD(primary, tau=0.01)(rows), m * rows[primary])


# --- against the oracle ---------------------------------------------------------------------------


@fell_back
@given(rows=gradients(m=(1, 6)), data=st.data())
@settings(max_examples=250)
def test_is_the_best_of_all_sets(rows: Tensor, data) -> None:
    m = len(rows)
    primary = data.draw(st.integers(0, m - 1))
    taus = np.array([data.draw(TAUS) for _ in range(m)])
    strategy = PCD(primary, [tau for i, tau in enumerate(taus) if i != primary])
    lengths = np.linalg.norm(array(rows), axis=1)
    expected = pcd(array(rows), primary, taus, np.where(lengths > 0, lengths, 1))
    agrees(strategy, rows, expected, primary)


@fell_back
@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999])
def test_many_steps_are_those_of_the_definition(m: int, beta: float) -> None:
    """With rows whose lengths change by decades, and are zero every now and then."""
    strategy = PCD("a", tau=0.3, beta=beta).bind(NAMES[:m])
    histories: list[list[float]] = [[] for _ in range(m)]
    held = 0
    for step in range(30):
        exponents = np.random.default_rng(step).uniform(-2, 2, m)
        rows = random_gradients(m, 6, seed=step) * on_device(10**exponents)[:, None]
        rows[step % m] *= step % 4 != 3
        for history, row in zip(histories, array(rows), strict=True):
            history.extend([float(np.linalg.norm(row))] if row.any() else [])
        lengths = np.array([mean_length(h, beta) if h else 1.0 for h in histories])
        expected = pcd(array(rows), 0, np.full(m, 0.3), lengths)
        agrees(strategy, rows, expected, 0)
        held += expected is not None and np.linalg.norm(expected.direction - m * array(rows[0])) > 0
    assert held >= 15


@pytest.mark.parametrize("name", ["generic", "conflicting", "duplicate_rows", "unequal_norms"])
@pytest.mark.parametrize("m", [20, 50])
def test_many_tasks_against_nonnegative_least_squares(name: str, m: int) -> None:
    """From the definition of the multipliers: the step is the nearest in a cone to what lacks.

    min |x| for U x >= h is (x, -1) / (|x|^2 + 1) = U'^T y - (0, 1) for the least |U'^T y - (0, 1)|
    with y >= 0, where U' = (U, h) (Lawson and Hanson, chapter 23).
    """
    rows = matrix(name, m, 2 * m, seed=m)
    units = array(rows / rows.norm(dim=1, keepdim=True))
    start, others = units[0], units[1:]
    lacking = 0.1 - others @ start
    target = np.r_[np.zeros(2 * m), 1.0]
    beside = np.column_stack([others, lacking])
    residual = nonnegative_least_squares(beside.T, target) @ beside - target
    x = start - residual[:-1] / residual[-1]
    expected = x / np.linalg.norm(x) * m * float(rows[0].norm())
    agrees(PCD(0, 0.1), rows, Answer(expected, 1e-11), 0)


@given(rows=gradients(m=(2, 8)), tau=TAUS)
@settings(max_examples=150)
def test_what_makes_a_minimum(rows: Tensor, tau: float) -> None:
    """Multipliers are not negative, all get what they ask for, and who gets more has none."""
    strategy = PCD(0, tau)
    units = rows / torch.where(rows.any(1), rows.norm(dim=1), 1.0)[:, None]
    asked = np.full(int(rows[1:].any(1).sum()), tau)
    assume(rows[0].any() and not exclude_each_other(array(units[1:][rows[1:].any(1)]), asked))
    weights = strategy.solve(rows @ rows.T)
    assume(weights[0] > 0)  # but for a direction of zero
    norms = rows.norm(dim=1)
    multipliers = (weights * norms / (weights[0] * norms[0]))[1:]
    d = units[0] + multipliers @ units[1:]
    slack = (units @ d - tau)[1:]
    tolerance = 1e-11 * (1 + float(multipliers.sum())) ** 2
    alive = rows[1:].any(1)
    assert (multipliers >= 0).all()
    assert (slack[alive] >= -tolerance).all()
    assert (multipliers * slack).abs().max() <= tolerance
    length = float((weights @ rows).norm())
    m = int(rows.any(1).sum())
    assert length == pytest.approx(
        m * float(norms[0]), rel=1e-12 + tolerance / float(d.norm()) ** 2
    )


@fell_back
@given(
    rows=gradients(["generic", "conflicting", "duplicate_rows"], m=(2, 6), p=(7, 20), scales=[1.0]),
    exponents=st.lists(st.floats(-6, 6), min_size=6, max_size=6),
)
@settings(max_examples=80)
def test_lengths_of_rows_do_not_matter_to_where_it_points(rows: Tensor, exponents) -> None:
    """In no step, over twelve decades; it is as long as the primary task's."""
    f = 10.0 ** np.array(exponents[: len(rows)])
    one, other = (PCD(0, 0.1, beta=0.9) for _ in range(2))
    for step in range(3):
        rows = rows * on_device(np.linspace(0.5, 2, len(rows)) ** step)[:, None]
        first, second = one(rows), other(rows * on_device(f)[:, None])
        error = (second - f[0] * first).norm()
        assert error <= 1e-9 * f[0] * first.norm()
        assert one.fallbacks == other.fallbacks


# --- constraints that exclude each other ----------------------------------------------------------


@pytest.mark.parametrize("tau", [1e-9, 0.02, 1.0])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_opposite_tasks_are_left_out(tau: float, length: float) -> None:
    """However little they ask for, and however long the primary gradient is."""
    rows = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.0], [0.0, -3.0, 0.0], [-1.0, 0.0, 1.0]])
    rows = on_device(rows.double())
    rows[0] *= length
    strategy = PCD(0, tau)
    with pytest.warns(RuntimeWarning, match="PCD fell back: what the other tasks ask for excludes"):
        direction = strategy(rows)
    assert_close(direction, 4 * rows[0])
    assert strategy.fallbacks == 1


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6, 1e-9, 0.0])
def test_nearly_opposite_tasks(angle: float) -> None:
    """As long as a Gramian tells, there is a wedge between them, around y.

    Of (1, 0, 1) / sqrt(2), z goes and y comes: both get as much as they ask for.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    rows = on_device(np.array([[1.0, 0.0, 1.0], [0.0, sine, cosine], [0.0, 5 * sine, -5 * cosine]]))
    if angle < 1e-8:
        with pytest.warns(RuntimeWarning, match="PCD fell back"):
            assert_close(PCD(0)(rows), 3 * rows[0])
        return
    expected = np.array([0.5**0.5, 0.02 / sine, 0.0])
    expected *= 3 * 2**0.5 / np.linalg.norm(expected)
    assert_close(array(PCD(0)(rows)), expected, rtol=0, atol=1e-15 / angle**2)


def test_that_they_set_nobody_back_can_be_asked_of_all() -> None:
    """With tau = 0 nothing is excluded: opposite tasks lose their line, others what conflicts."""
    rows = torch.tensor([[1.0, 4.0, 0.0], [0.0, 2.0, 0.0], [0.0, -3.0, 0.0], [-1.0, 0.0, 1.0]])
    strategy = PCD(0, tau=0.0)
    direction = strategy(on_device(rows.double()))
    along = torch.tensor([0.5, 0.0, 0.5]).double()
    assert_close(direction.cpu(), along * (4 * 17**0.5 / along.norm()))
    assert strategy.fallbacks == 0


# --- who is there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 5])
def test_without_the_primary_task_it_is_the_sum(m: int) -> None:
    rows = matrix("conflicting", max(m, 2), 9, seed=3)[:m]
    strategy = PCD("h", tau=0.5).bind([*NAMES[:m], "h"])
    with strategy.only(torch.arange(m)):
        assert_close(strategy(rows), rows.sum(0))
    zeros = torch.zeros_like(rows[:1])
    assert not strategy(torch.cat([rows, zeros])).any()  # it is there, without a gradient


@pytest.mark.parametrize("m", [2, 3, 4])
def test_tasks_without_gradient_or_absent_keep_their_means(m: int) -> None:
    strategy = PCD(0, beta=0.9).bind(NAMES[: m + 1])
    rows = random_gradients(m + 1, 8)
    strategy(rows)
    before = [array(state.values).copy() for state in (strategy.lengths, strategy.seen)]
    rows[m] = 0
    strategy(2 * rows)
    with strategy.only(torch.arange(m)):
        strategy(5 * rows[:m])
    after = array(strategy.lengths.values), array(strategy.seen.values)
    for old, new in zip(before, after, strict=True):
        assert old[0, m] == new[0, m]
        assert (old[0, :m] != new[0, :m]).all()


def test_a_balancer_keeps_means_by_task_and_group() -> None:
    """Against the oracle on the rows of each."""
    x, y = (nn.Parameter(random_gradients(1, 6, seed)[0]) for seed in (1, 2))
    balancer = Balancer(
        Equal(),
        PCD("b", tau={"a": 0.4, "c": 0.1, "d": 0.0}, beta=0.5),
        tasks=NAMES[:4],
        shared={"x": [x], "y": [y]},
    )
    taus = np.array([0.4, 0.0, 0.1, 0.0])
    histories: dict[tuple[int, int], list[float]] = {}
    for step in range(8):
        there = [[0, 1, 2, 3], [1, 2, 3], [1, 3], [0, 2]][step % 4]
        slopes = [random_gradients(4, 6, seed=10 * step + k) * 2.0**step for k in (0, 1)]
        x.grad = y.grad = None
        balancer.backward({NAMES[i]: slopes[0][i] @ x + slopes[1][i] @ y for i in reversed(there)})
        for group, parameter in enumerate((x, y)):
            rows = array(slopes[group])
            for i in there:
                histories.setdefault((group, i), []).append(float(np.linalg.norm(rows[i])))
            lengths = np.array([mean_length(histories[group, i], 0.5) for i in there])
            if 1 in there:
                expected = pcd(rows[there], there.index(1), taus[there], lengths)
                assert expected is not None
                found = expected.direction
            else:
                found = rows[there].sum(0)
            assert_close(array(parameter.grad), found, rtol=1e-10, atol=0)


# --- two tasks, and the rest ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FLOATS, TENSORS])
@given(rows=gradients(m=(2, 2)), tau=TAUS)
@settings(max_examples=80)
def test_both_kinds_of_numbers_for_two_tasks(kind, rows: Tensor, tau: float) -> None:
    """Tensors of one element, as on other devices than the CPU, give what numbers give."""
    lengths = rows.norm(dim=1).cpu()
    ratios = (lengths > 0).double()
    g = (rows @ rows.T).cpu()
    numbers = [g[0, 0], g[0, 1], g[1, 1]]
    if kind is FLOATS:
        numbers = [float(number) for number in numbers]
    weights = _pcd._weights_of_pair(ratios, tau * ratios, *numbers, kind)
    direction = array(PCD(0, tau)(rows))
    found = float(weights[0]) * array(rows[0]) + float(weights[1]) * array(rows[1])
    assert np.linalg.norm(found - direction) <= 1e-12 * np.linalg.norm(direction)


@pytest.mark.parametrize("tau", [0.02, {"0": 0.3}])
def test_two_tasks_on_a_device_wait_for_nothing(tau) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = PCD(1, tau).weights(gramian)
    assert (weights.device.type, weights.shape) == ("meta", (2,))
    with pytest.raises(NotImplementedError):  # so the test can fail
        PCD(0).weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_rows_that_are_not_finite_come_out_so(bad: float, m: int) -> None:
    """Where nothing is looked at before (``nonfinite="propagate"``); means stay as they are."""
    rows = random_gradients(m, 5)
    for strategy in (PCD(0), PCD(m - 1)):
        strategy.solve(rows @ rows.T)
        before = array(strategy.lengths.values).copy()
        poisoned = rows.clone()
        poisoned[0, 0] = bad
        weights = strategy.solve(poisoned @ poisoned.T)
        assert not torch.isfinite(weights @ poisoned).all()
        assert not torch.isfinite(weights).any() or m == 1
        others = array(strategy.lengths.values)[0, 1:]
        assert np.isfinite(others).all()
        assert array(strategy.lengths.values)[0, 0] == before[0, 0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tau": -0.1}, ValueError, "`tau` must be between 0 and 1, but got -0.1."),
        ({"tau": [0.1, 1.1]}, ValueError, "`tau[1]` must be between 0 and 1, but got 1.1."),
        ({"tau": {"b": math.nan, "c": 0}}, ValueError, "`tau['b']` must be between 0 and 1, but"),
        ({"tau": [0.1]}, ValueError, "`tau` must have one number for each of 2 tasks, but has 1."),
        ({"tau": {"a": 0, "b": 0, "c": 0}}, ValueError, "one number for each task ('b', 'c'), but"),
        ({"beta": 1}, ValueError, "`beta` must be below 1, but got 1."),
        ({"beta": -1}, ValueError, "`beta` must be between 0 and 1, but got -1."),
        ({"primary": None}, TypeError, "got None. Without one, use DualProj."),
    ],
)
def test_refuses_other_options(options, error, words: str) -> None:
    with pytest.raises(error) as caught:
        PCD(**{"primary": "a", **options}).bind(("a", "b", "c"))
    assert words in str(caught.value)


def test_repr_names_the_settings() -> None:
    assert repr(PCD("a")).startswith("PCD(\n  primary='a', tau=0.02, beta=0.999")
