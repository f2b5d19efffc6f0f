"""What is true of smooth Tchebycheff alone; what holds for every weighting is in test_contract.py.

Warm-up: sum log L. Then m mu log sum (L / z)^(1 / mu), z the mean losses of one epoch.
"""

import io
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import STCH, LogLoss
from tests.weighting._helpers import double, weighed

pytestmark = pytest.mark.usefixtures("in_float64")

TASKS = ("a", "b", "c")
SIZES = st.lists(st.floats(1e-8, 1e4), min_size=3, max_size=3)
NEAR = st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=3)
STEPS = st.dictionaries(st.integers(0, 2), st.floats(1e-2, 1e2), min_size=1)
"""Losses by the number of the task, of which some may be absent."""


def weights(weighting: STCH, *losses: float) -> Tensor:
    """Return the weights as they are now, without letting the weighting remember."""
    weighting.eval()
    found = weighed(weighting, double(*losses))[1]
    weighting.train()
    return found


def train(weighting: STCH, *epochs: list[list[float]]) -> STCH:
    """Train on epochs of steps of losses."""
    for epoch in epochs:
        for losses in epoch:
            weighting(double(*losses))
        weighting.end_epoch()
    return weighting


class Slow:
    """The definition, number by number, with Python's own."""

    def __init__(self, mu: float, warmup_epochs: int) -> None:
        self.mu, self.warmup_epochs = mu, warmup_epochs
        self.nadir: dict[int, float] = {}
        self.epochs = dict.fromkeys(range(3), 0)
        self.seen: dict[int, list[float]] = {task: [] for task in range(3)}

    def step(self, losses: Mapping[int, float]) -> tuple[float, dict[int, float]]:
        """Return the objective and the weights."""
        for task, loss in losses.items():
            self.seen[task].append(loss)
        if not losses.keys() <= self.nadir.keys():
            objective = sum(math.log(loss) for loss in losses.values())
            return objective, {task: 1 / loss for task, loss in losses.items()}
        m = len(losses)
        powers = {task: (loss / self.nadir[task]) ** (1 / self.mu) for task, loss in losses.items()}
        total = math.fsum(powers.values())
        found = {task: m * powers[task] / total / loss for task, loss in losses.items()}
        return m * self.mu * math.log(total), found

    def end_epoch(self) -> None:
        for task, losses in self.seen.items():
            if losses and self.epochs[task] == self.warmup_epochs:
                self.nadir[task] = math.fsum(losses) / len(losses)
            self.epochs[task] += bool(losses)
            losses.clear()


def test_by_hand() -> None:
    """Ratios of 1 and 2. mu = 1: p = (1, 2) / 3. mu = 1/2: p = (1, 4) / 5. Twice p over L."""
    weighted, found = weighed(STCH(nadir=[1.0, 2.0]), double(1, 4))
    assert_close(weighted.sum(), 2 * torch.tensor(3.0).log())
    assert_close(found, double(2 / 3, 1 / 3))
    weighted, found = weighed(STCH(mu=0.5, nadir=[1.0, 2.0]), double(1, 4))
    assert_close(weighted.sum(), torch.tensor(5.0).log())
    assert_close(found, double(2 / 5, 2 / 5))


@given(
    epochs=st.lists(st.lists(STEPS, max_size=3), min_size=1, max_size=6),
    mu=st.sampled_from([0.2, 1.0, 5.0]),
    warmup=st.integers(0, 3),
)
def test_is_the_definition(epochs, mu: float, warmup: int) -> None:
    """Any epochs, empty ones and absent tasks included, step by step."""
    weighting, slow = STCH(mu, warmup_epochs=warmup).bind(TASKS), Slow(mu, warmup)
    for epoch in epochs:
        for losses in epoch:
            with weighting.only(torch.tensor(list(losses))):
                weighted, found = weighed(weighting, double(*losses.values()))
            objective, expected = slow.step(losses)
            assert float(weighted.sum()) == pytest.approx(objective, rel=1e-10, abs=1e-10)
            assert_close(found, double(*expected.values()), rtol=1e-10, atol=0)
        weighting.end_epoch()
        slow.end_epoch()


@given(losses=SIZES, nadir=SIZES, mu=st.sampled_from([0.3, 1.0, 7.0]))
def test_weighted_losses_sum_to_the_number_of_tasks(losses, nadir, mu: float) -> None:
    """Sum w L = m sum p = m, with parts that are (L / z)^(1 / mu) to each other."""
    parts = weights(STCH(mu, nadir), *losses) * double(*losses)
    assert float(parts.sum()) == pytest.approx(3, rel=1e-12)
    ratios = [math.log(loss / z) / mu for loss, z in zip(losses, nadir, strict=True)]
    expected = torch.softmax(double(*ratios), 0)
    assert_close(parts, 3 * expected, rtol=1e-10, atol=1e-300)


@given(losses=NEAR, nadir=NEAR, factors=NEAR)
def test_scale_of_each_task_does_not_matter(losses, nadir, factors) -> None:
    """A loss and its nadir c times as large: the same gradients, so the weight is a c-th."""
    c = double(*factors)
    before = weights(STCH(nadir=nadir), *losses)
    after = weights(STCH(nadir=(c * double(*nadir)).tolist()), *(c * double(*losses)).tolist())
    assert_close(after, before / c, rtol=1e-12, atol=0)


@given(losses=SIZES)
def test_weights_do_not_jump_where_the_warm_up_ends(losses) -> None:
    """At the nadir they are those of the logarithms."""
    assert_close(weights(STCH(nadir=losses), *losses), 1 / double(*losses), rtol=1e-12, atol=0)


def test_warm_up_as_in_the_authors_code() -> None:
    """Logarithms in epochs 0 to 4, and from then on against the means of epoch 4, raw losses."""
    weighting = STCH()
    for epoch in range(5):
        for losses in ([1.0 + epoch, 8.0], [3.0 + epoch, 4.0]):
            weighted, found = weighed(weighting, double(*losses))
            assert_close(weighted, double(*losses).log())
            assert_close(found, 1 / double(*losses))
        weighting.end_epoch()
    # The nadir: (5 + 7) / 2 and (8 + 4) / 2.
    train(weighting, [[1.0, 1.0]], [[2.0, 2.0]])
    assert_close(weights(weighting, 6.0, 6.0), double(1 / 6, 1 / 6))
    assert_close(weights(weighting, 6.0, 12.0), 2 * double(1 / 3 / 6, 2 / 3 / 12))


def test_limits_of_mu() -> None:
    """Towards 0 the worst ratio takes all; endless: the weights of the logarithms."""
    losses, nadir = [1.0, 2.0, 4.0], [1.0, 1.0, 8.0]
    for mu in (1e-3, 1e-300, 5e-324):
        assert_close(weights(STCH(mu, nadir), *losses), double(0, 3 / 2, 0))
    assert_close(weights(STCH(1e12, nadir), *losses), 1 / double(*losses))


def test_objective_tends_to_the_largest_ratio() -> None:
    weighted, _ = weighed(STCH(1e-4, [1.0, 1.0]), double(5, 3))
    assert_close(weighted.sum(), 2 * torch.tensor(5.0).log())


def test_float32_losses_are_weighed_in_float64() -> None:
    losses = torch.tensor([1e4, 1e-8, 3.0], dtype=torch.float32)
    nadir = [2e4, 1e-8, 5.0]
    exact = weights(STCH(0.1, nadir), *losses.double().tolist())
    _, found = weighed(STCH(0.1, nadir), losses)
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_of_zero_is_out_of_the_objective(dtype: torch.dtype, zero: float) -> None:
    """(0 / z)^(1 / mu) = 0, whatever mu is; the factor m stays."""
    losses = torch.tensor([zero, 1.0, 4.0], dtype=dtype)
    for mu in (1.0, 1e3):
        weighted, found = weighed(STCH(mu, [1.0, 1.0, 4.0]), losses)
        assert torch.isfinite(weighted).all()
        assert_close(found, torch.tensor([0, 1.5, 0.375], dtype=dtype))
        every, none = weighed(STCH(mu, [1.0, 1.0, 4.0]), torch.zeros(3, dtype=dtype))
        assert torch.isfinite(every).all()
        assert none.tolist() == [0, 0, 0]


def test_a_task_whose_mean_is_zero_waits_for_an_epoch_in_which_it_is_not() -> None:
    """0 is no nadir: what comes later would be endlessly worse."""
    weighting = train(STCH(warmup_epochs=0), [[0.0, 2.0]], [[0.0, 5.0]])
    assert_close(weights(weighting, 1.0, 4.0), double(1, 1 / 4))
    train(weighting, [[3.0, 7.0]])
    assert_close(weights(weighting, 3.0, 4.0), 2 * double(1 / 9, 1 / 6))


def test_a_negative_loss_makes_the_weights_nan() -> None:
    _, found = weighed(STCH(nadir=[1.0, 1.0]), double(-1, 2))
    assert found.isnan().all()
    _, found = weighed(STCH(), double(-1, 2))
    assert found[0].isnan()


def test_a_balancer_says_what_is_wrong_and_remembers_nothing() -> None:
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(STCH(), Sum(), tasks=("a", "b"), shared=[x])
    words = r"STCH must give finite weights, but .* \[12\.0, -4\.0\]\. It takes their logarithms"
    with pytest.raises(FloatingPointError, match=words):
        balancer.backward({"a": 3 * x, "b": -x})
    assert x.grad is None
    assert not any(buffer.any() for buffer in balancer.weighting.buffers())


def test_a_task_counts_its_own_epochs() -> None:
    """Task 1 sits out epoch 0: its nadir comes an epoch later, and its steps are warm-up steps."""
    weighting = STCH(warmup_epochs=1).bind(("a", "b"))
    with weighting.only(torch.tensor([0])):
        train(weighting, [[9.0]])
    train(weighting, [[2.0, 3.0]])
    assert_close(weights(weighting, 4.0, 4.0), double(1 / 4, 1 / 4))  # b has none
    with weighting.only(torch.tensor([0])):
        assert_close(weighed(weighting, double(4.0))[0], torch.tensor([2.0]).log())  # 4 over 2
    weighting.end_epoch()
    train(weighting, [[5.0, 6.0]])
    assert_close(weights(weighting, 4.0, 4.0), 2 * double(2 / (2 + 2 / 3), 1 - 3 / 4) / 4)


def test_steps_count_in_training_mode_only() -> None:
    weighting = train(STCH(warmup_epochs=0).bind(("a", "b")))
    weights(weighting, 100.0, 1.0)
    train(weighting, [[2.0, 3.0]])
    assert_close(weighting.nadir, double(2, 3))


def saved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Through a file, as the safe loader accepts it."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", range(1, 7))
def test_resumes_in_the_middle_of_an_epoch(steps: int) -> None:
    """Before, in and after the epoch of the nadir, two steps each, bit for bit."""
    rows = [[1.0 + i, 7.0 - i, 0.5 * i + 0.1] for i in range(8)]

    def run(weighting: STCH, first: int, last: int) -> list[list[float]]:
        found = []
        for i in range(first, last):
            found.append(weighed(weighting, double(*rows[i]))[1].tolist())
            if i % 2:
                weighting.end_epoch()
        return found

    straight = run(STCH(warmup_epochs=1), 0, 8)
    first, second = STCH(warmup_epochs=1), STCH(warmup_epochs=1).bind(TASKS)
    shapes = {name: value.shape for name, value in second.state_dict().items()}
    run(first, 0, steps)
    state = saved(first.state_dict())
    assert {name: value.shape for name, value in state.items()} == shapes
    second.load_state_dict(state)
    assert run(second, steps, 8) == straight[steps:]


def test_casting_the_model_keeps_the_means() -> None:
    weighting = train(STCH(warmup_epochs=0), [[0.1, 1 / 3]]).to(torch.bfloat16)
    assert weighting.nadir.tolist() == [0.1, 1 / 3]
    assert weighting.epochs.dtype == torch.long


def test_a_given_nadir_is_configuration() -> None:
    """By name, from the first step on, unmoved by epochs, and not saved."""
    weighting = STCH(nadir={"b": 2.0, "a": 1.0}).bind(("a", "b"))
    for _ in range(7):
        train(weighting, [[3.0, 3.0]])
    assert_close(weights(weighting, 1.0, 4.0), double(2 / 3, 1 / 3))
    assert weighting.state_dict() == {}
    weighting.reset()
    assert_close(weights(weighting, 1.0, 4.0), double(2 / 3, 1 / 3))


def test_is_the_log_loss_in_the_warm_up() -> None:
    losses = double(1e4, 1e-8, 3)
    assert torch.equal(STCH()(losses), LogLoss()(losses))


def test_through_the_balancer() -> None:
    """3x and x^2 at x = 4 in the nadir's epoch, 12 and 16. Then x = 8: ratios of 2 and 4.

    With derivatives of 3 and 16, 2 (1/3 / 24 * 3 + 2/3 / 64 * 16) = 2 (1/24 + 1/6) = 5/12.
    """
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(STCH(warmup_epochs=0), Sum(), tasks=("a", "b"), shared=[x])
    balancer.backward({"a": 3 * x, "b": x.square()})
    assert_close(x.grad, torch.tensor(3 / 12 + 8 / 16))
    balancer.end_epoch()
    x.data, x.grad = torch.tensor(8.0), None
    balancer.backward({"a": 3 * x, "b": x.square()})
    assert_close(x.grad, torch.tensor(5 / 12))


def test_by_its_short_name() -> None:
    balancer = make_balancer("stch+cagrad", tasks=("a", "b"), mu=0.5, warmup_epochs=0)
    assert repr(balancer.weighting) == "STCH(mu=0.5, nadir=None, warmup_epochs=0)"


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"mu": 0.0}, ValueError, r"`mu` must be positive, but got 0\.0\."),
        ({"mu": math.nan}, ValueError, "`mu` must be positive, but got nan"),
        ({"nadir": [1.0, 0.0]}, ValueError, r"`nadir\[1\]` must be positive, but got 0\.0\."),
        ({"nadir": 3.0}, TypeError, "`nadir` must map task names to numbers, or be a sequence"),
        ({"warmup_epochs": -1}, ValueError, "`warmup_epochs` must be at least 0, but got -1"),
        ({"warmup_epochs": 1.5}, TypeError, "`warmup_epochs` must be a whole number, but got 1.5"),
    ],
)
def test_refuses_what_it_cannot_do_with(settings, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        STCH(**settings)


def test_a_nadir_for_every_task() -> None:
    with pytest.raises(ValueError, match=r"`nadir` must have one number for each task \('a', "):
        STCH(nadir={"a": 1.0}).bind(TASKS)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("nadir", math.nan, "`nadir` at least 0"),
        ("nadir", math.inf, "`nadir` finite"),
        ("mean", math.nan, "`mean` finite"),
        ("count", -1, "`count` at least 0"),
        ("epochs", -1, "`epochs` at least 0"),
    ],
)
def test_refuses_a_damaged_state(name: str, bad: float, words: str) -> None:
    weighting = train(STCH(warmup_epochs=0), [[1.0, 2.0]])
    state = {key: value.clone() for key, value in weighting.state_dict().items()}
    state[name].fill_(bad)
    with pytest.raises(ValueError, match=f"of STCH must have {words}"):
        weighting.load_state_dict(state)
