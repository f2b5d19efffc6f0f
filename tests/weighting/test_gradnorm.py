"""What is true of GradNorm alone; what holds for every weighting is in test_contract.py.

L_grad = sum |w n - mean(w n) r^alpha| by Adam, w rescaled to sum to m.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import CAGrad, GradientStrategy, PCGrad, Sum
from mtbalance.weighting import GradNorm, Step
from tests._networks import TASKS, Network, batch, flat_grad
from tests.weighting._helpers import double

POSITIVE = st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=3)
STEPS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=6)
"""Losses and norms."""


def step_of(losses: Sequence[float], norms: Sequence[float]) -> Step:
    return Step([], [], 1.0, None, losses=double(*losses), norms=double(*norms), balanced=0)


def stepped(weighting: GradNorm, losses: Sequence[float], norms: Sequence[float]) -> list[float]:
    """Take a step, and return the weights that it has."""
    if weighting.tasks is None:
        weighting.bind([str(number) for number in range(len(losses))])
    weighting.before_step(step_of(losses, norms))
    return weights(weighting, len(losses))


def weights(weighting: GradNorm, count: int) -> list[float]:
    return weighting(torch.ones(count, dtype=torch.float64)).tolist()


class Oracle:
    """The definition: L_grad by autograd, torch's Adam, rescaled by hand."""

    def __init__(self, count: int, alpha: float, lr: float, minimum: float = 1e-3) -> None:
        self.alpha, self.minimum = alpha, minimum
        self.w = nn.Parameter(torch.ones(count, dtype=torch.float64))
        self.adam = torch.optim.Adam([self.w], lr=lr, eps=0.0)
        self.first: Tensor | None = None

    def step(self, losses: Tensor, lengths: Tensor) -> Tensor:
        """Return the weights of the step, and move them by the lengths of w L's gradients."""
        used = self.w.detach().clone()
        self.first = losses.detach() if self.first is None else self.first
        ratios = losses.detach() / self.first
        target = (lengths.mean() * (ratios / ratios.mean()) ** self.alpha).detach()
        self.adam.zero_grad()
        (self.w.grad,) = torch.autograd.grad((lengths - target).abs().sum(), [self.w])
        self.adam.step()
        with torch.no_grad():
            self.w.clamp_(min=self.minimum)
            self.w.mul_(len(used) / self.w.sum())
        return used


def test_by_hand() -> None:
    """Norms of 3 and 1 have a mean of 2, losses are as at the start: slopes of 3 and -1.

    The first step of Adam is lr long: 1.9 and 2.1 over 2. Then ratios of 1/2 and 1 are 2/3 and 4/3
    of their mean. Lengths 3 * 0.9 = 2.7 and 1.1 have a mean of 1.9, targets of 1.2667 and 2.5333:
    the slopes have the same signs, and with the same norms Adam moves by lr again.
    """
    weighting = GradNorm(alpha=1.0, lr=0.1)
    assert stepped(weighting, [4.0, 5.0], [3.0, 1.0]) == [1, 1]
    assert stepped(weighting, [2.0, 5.0], [3.0, 1.0]) == pytest.approx([0.9, 1.1])
    assert stepped(weighting, [2.0, 5.0], [3.0, 1.0]) == pytest.approx([0.8, 1.2])


def test_slope_by_hand() -> None:
    """The second loss has come down less: its target is above its length, though it is longer."""
    weighting = GradNorm(alpha=2.0).bind(("a", "b"))
    # Lengths of 2 and 3, a mean of 2.5; ratios of 1/4 and 3/4, rates of 1/2 and 3/2.
    # Targets: 2.5 / 4 = 0.625 and 2.5 * 9/4 = 5.625.
    slope = weighting._slope(double(1, 1), double(1, 3), double(4, 4), double(2, 3))
    assert slope.tolist() == [2, -3]


@given(steps=STEPS, alpha=st.sampled_from([0.0, 0.12, 1.5]), lr=st.sampled_from([0.025, 0.5, 3.0]))
def test_is_the_definition(steps, alpha: float, lr: float) -> None:
    """By autograd from the weights to L_grad, and torch's Adam."""
    weighting, oracle = GradNorm(alpha, lr), Oracle(3, alpha, lr)
    for losses, norms in steps:
        lengths = oracle.w * double(*norms)
        expected = oracle.step(double(*losses), lengths)
        assert_close(double(*stepped(weighting, losses, norms)), expected, rtol=1e-9, atol=1e-12)
        ratios = double(*losses) / (oracle.first if oracle.first is not None else 1)
        target = lengths.mean() * (ratios / ratios.mean()) ** alpha
        if bool(((lengths - target).abs() < 1e-9 * lengths.mean()).any()):
            return  # rounding decides about a sign


@pytest.mark.parametrize("gradient", [Sum(), CAGrad(), PCGrad()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("shared", ["trunk", "last"])
def test_through_a_network(gradient: GradientStrategy, shared: str) -> None:
    """L_grad by autograd through the gradients of the weighted losses: a second backward pass."""
    model = Network()
    parts = list(model.trunk.parameters())
    if shared == "last":
        parts = parts[-2:]
        if not isinstance(gradient, Sum):
            return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    balancer = Balancer(GradNorm(lr=0.1), gradient, tasks=TASKS, shared=parts)
    oracle = Oracle(len(TASKS), 1.5, 0.1)
    for number in range(6):
        losses = model.losses(batch(seed=number))
        lengths = []
        for weight, loss in zip(oracle.w, losses.values(), strict=True):
            rows = torch.autograd.grad(weight * loss, parts, create_graph=True, allow_unused=True)
            lengths.append(torch.cat([r.flatten() for r in rows if r is not None]).norm())
        expected = oracle.step(torch.stack(list(losses.values())), torch.stack(lengths))
        optimizer.zero_grad()
        record = balancer.backward(model.losses(batch(seed=number)))
        found = torch.stack(list(record.weights.values()))
        assert_close(found.double(), expected, rtol=1e-9, atol=1e-12)
        optimizer.step()
    assert not torch.allclose(expected, torch.ones_like(expected), atol=0.05)


class Spy(GradNorm):
    """Keeps what it may look at."""

    def before_step(self, step: Step) -> None:
        self.losses, self.norms, self.scale = step.losses, step.norms, step.loss_scale
        super().before_step(step)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_are_those_of_the_raw_gradients(groups: bool, scaled: bool) -> None:
    """Over all groups together, heads left out, and without the loss scale."""
    model = Network()
    parts: Any = model.trunk
    if groups:
        parts = {name: [parameter] for name, parameter in model.trunk.named_parameters()}
    weighting = Spy()
    balancer = Balancer(weighting, PCGrad(), tasks=TASKS, shared=parts)
    losses = model.losses(batch())
    expected = []
    for loss in losses.values():
        rows = torch.autograd.grad(
            loss, list(model.trunk.parameters()), retain_graph=True, allow_unused=True
        )
        expected.append(torch.cat([r.flatten() for r in rows if r is not None]).norm())
    scaler = GradScaler("cpu", init_scale=2.0**10) if scaled else None
    balancer.backward(losses, scaler=scaler)
    assert weighting.scale == (2.0**10 if scaled else 1)
    assert_close(weighting.norms, torch.stack(expected), rtol=1e-12, atol=0)
    assert_close(weighting.losses, torch.stack([loss.detach() for loss in losses.values()]))


@pytest.mark.parametrize("size", [1e-170, 1e160])
@pytest.mark.filterwarnings("ignore:Spy fell back:RuntimeWarning")  # Adam squares them, too
def test_norms_whose_squares_float64_does_not_hold(size: float) -> None:
    x = nn.Parameter(double(1, 1))
    weighting = Spy()
    balancer = Balancer(weighting, Sum(), tasks=("a", "b"), shared=[x])
    a, b = double(3, 4), double(5, 12)
    balancer.backward({"a": (x @ a) * size, "b": (x @ b) * size})
    assert_close(weighting.norms / size, double(5, 13), rtol=1e-12, atol=0)


def test_descending_gives_gradients_one_length() -> None:
    """alpha = 0, norms that stay: w n is the same for all."""
    weighting = GradNorm(alpha=0.0, lr=0.002)
    norms = [4.0, 1.0, 2.0]
    for _ in range(2000):
        found = stepped(weighting, [1.0, 1.0, 1.0], norms)
    lengths = double(*found) * double(*norms)
    assert_close(lengths / lengths.mean(), double(1, 1, 1), rtol=0.05, atol=0)


@given(steps=STEPS, factor=st.sampled_from([1e-30, 1e-8, 1e4, 1e30]))
def test_a_constant_factor_of_all_losses_does_not_matter(steps, factor: float) -> None:
    """Adam has no epsilon: not even of losses of 1e-30."""
    one, other = GradNorm(lr=0.3), GradNorm(lr=0.3)
    for losses, norms in steps:
        expected = stepped(one, losses, norms)
        scaled = [[factor * x for x in numbers] for numbers in (losses, norms)]
        assert stepped(other, *scaled) == pytest.approx(expected, rel=1e-9)


@given(loss=st.floats(1e-6, 1e6), norm=st.floats(1e-6, 1e6), count=st.integers(1, 7))
def test_equal_tasks_keep_equal_weights(loss: float, norm: float, count: int) -> None:
    """Bit for bit: rounding is no reason to move."""
    weighting = GradNorm(lr=0.3)
    for number in range(1, 4):
        stepped(weighting, [loss / number] * count, [norm * number] * count)
    assert weighting.upcoming.tolist() == [1] * count


def test_no_weight_is_left_below_the_minimum() -> None:
    """It comes back, too, where the method as published would have let it become negative."""
    weighting = GradNorm(alpha=0.0, lr=5.0, minimum=0.01)
    stepped(weighting, [1.0, 1.0], [9.0, 1.0])
    found = stepped(weighting, [1.0, 1.0], [1e-3, 1.0])
    assert found == pytest.approx([2 * 0.01 / 6.01, 2 * 6 / 6.01])
    for _ in range(30):
        found = stepped(weighting, [1.0, 1.0], [1e-3, 1.0])
    assert found[0] > 1 > found[1] > 0


def test_gradients_of_zero() -> None:
    """None: nothing moves. One: it counts in the mean, and its own slope is 0."""
    weighting = GradNorm(alpha=1.0, lr=0.1)
    for _ in range(2):
        assert stepped(weighting, [1.0, 2.0], [0.0, 0.0]) == [1, 1]
    weighting = GradNorm(alpha=1.0, lr=0.1)
    stepped(weighting, [1.0, 2.0], [0.0, 4.0])  # 4 over a mean of 2: down
    assert weights_next(weighting) == pytest.approx([2 / 1.9, 2 * 0.9 / 1.9])


def weights_next(weighting: GradNorm) -> list[float]:
    return weighting.upcoming.tolist()


def test_losses_of_zero() -> None:
    """At the start: a ratio of 1 from then on. All at once: no rate differs."""
    weighting = GradNorm(alpha=1.0, lr=0.1).bind(("a", "b"))
    slope = weighting._slope(double(1, 1), double(7, 1), double(0, 1), double(2, 1))
    assert slope.tolist() == [2, -1]  # both ratios are 1: 2 and 1 against 1.5
    slope = weighting._slope(double(1, 1), double(0, 0), double(3, 1), double(2, 1))
    assert slope.tolist() == [2, -1]
    stepped(weighting, [0.0, 1.0], [1.0, 1.0])
    stepped(weighting, [0.0, 0.0], [1.0, 1.0])
    assert torch.isfinite(weighting.upcoming).all()
    stepped(weighting, [3.0, 1.0], [1.0, 1.0])
    assert weighting.first.tolist() == [0, 1]  # no later loss is the first


@pytest.mark.parametrize(
    ("losses", "norms"),
    [
        ([-1.0, 2.0], [1.0, 1.0]),
        ([math.nan, 2.0], [1.0, 1.0]),
        ([1.0, 2.0], [math.inf, 1.0]),
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, 2.0], [1e200, 1.0]),
    ],
)
def test_weights_stay_where_they_cannot_move(losses: list[float], norms: list[float]) -> None:
    weighting = GradNorm(lr=0.1)
    stepped(weighting, [1.0, 1.0], [3.0, 1.0])
    before = {name: value.clone() for name, value in weighting.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="GradNorm fell back: a loss is negative"):
        stepped(weighting, losses, norms)
    stepped(weighting, losses, norms)
    assert weighting.fallbacks == 2
    for name, value in weighting.state_dict().items():
        assert torch.equal(value, before[name])


def test_absent_tasks() -> None:
    """The others share out what they have; each counts its own steps, and has its own first."""
    weighting = GradNorm(alpha=1.0, lr=0.1).bind(TASKS)
    stepped(weighting, [1.0, 1.0, 1.0], [3.0, 1.0, 2.0])
    assert weights_next(weighting) == pytest.approx([0.9, 1.1, 1.0])
    before = {name: value.clone() for name, value in weighting.state_dict().items()}
    with weighting.only(torch.tensor([2, 0])):
        found = stepped(weighting, [1.0, 1.0], [1.0, 3.0])
        assert found == pytest.approx([2 * 1.0 / 1.9, 2 * 0.9 / 1.9])
    for name, value in weighting.state_dict().items():
        assert torch.equal(value[1], before[name][1]), name
    assert weighting.steps.tolist() == [2, 1, 2]
    assert sum(weights_next(weighting)) == pytest.approx(3)


def test_a_late_task_has_its_own_first_loss() -> None:
    weighting = GradNorm().bind(("a", "b"))
    with weighting.only(torch.tensor([0])):
        assert stepped(weighting, [8.0], [1.0]) == [1]
    stepped(weighting, [4.0, 5.0], [1.0, 1.0])
    assert weighting.first.tolist() == [8, 5]


def test_steps_count_in_training_mode_only() -> None:
    weighting = GradNorm(lr=0.1).bind(("a", "b")).eval()
    for _ in range(2):
        assert stepped(weighting, [1.0, 1.0], [3.0, 1.0]) == [1, 1]
    assert weighting.steps.tolist() == [0, 0]


def test_a_step_that_raises_leaves_no_trace() -> None:
    class Broken(PCGrad):
        def forward(self, gradients: Tensor) -> Tensor:
            raise ArithmeticError

        weights = forward

    x = nn.Parameter(double(1, 1))
    balancer = Balancer(GradNorm(), Broken(), tasks=("a", "b"), shared=[x])
    before = {name: value.clone() for name, value in balancer.weighting.state_dict().items()}
    with pytest.raises(ArithmeticError):
        balancer.backward({"a": x.square().sum(), "b": x[0] + 3})
    for name, value in balancer.weighting.state_dict().items():
        assert torch.equal(value, before[name])


def saved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", range(1, 5))
def test_resumes_bit_for_bit(steps: int) -> None:
    rows = [([1.0 + i, 7.0 - i, 0.5 * i + 0.1], [2.0, 1.0 + i, 3.0]) for i in range(6)]

    def run(weighting: GradNorm, first: int, last: int) -> list[list[float]]:
        return [stepped(weighting, *rows[i]) for i in range(first, last)]

    straight = run(GradNorm(lr=0.1), 0, 6)
    first, second = GradNorm(lr=0.1), GradNorm(lr=0.1).bind(TASKS)
    run(first, 0, steps)
    second.load_state_dict(saved(first.state_dict()))
    assert run(second, steps, 6) == straight[steps:]


def test_casting_the_model_keeps_the_state() -> None:
    weighting = GradNorm(lr=0.1)
    stepped(weighting, [1 / 3, 0.1], [3.0, 1.0])
    before = {name: value.clone() for name, value in weighting.state_dict().items()}
    weighting.to(torch.bfloat16)
    for name, value in weighting.state_dict().items():
        assert torch.equal(value, before[name])


def test_features_are_refused() -> None:
    model = Network()
    balancer = Balancer(GradNorm(), CAGrad(), tasks=TASKS, shared=model.trunk)
    hidden = model.trunk(batch())
    with pytest.raises(ValueError, match="`features` must be None with GradNorm"):
        balancer.backward({task: hidden.sum() for task in TASKS}, features=hidden)


def test_by_its_short_name() -> None:
    balancer = make_balancer("gradnorm+cagrad", tasks=("a", "b"), alpha=0.5, lr=0.1)
    assert repr(balancer.weighting) == "GradNorm(alpha=0.5, lr=0.1, minimum=0.001)"


def test_surgery_acts_on_the_weighted_rows() -> None:
    """With weights of 0.9 and 1.1, as the directions of the same rows weighted by hand."""
    model = Network()
    weighting = GradNorm(lr=0.1).bind(TASKS)
    weighting.upcoming.copy_(double(0.9, 1.1, 1.0))
    Balancer(weighting, PCGrad(order="fixed"), tasks=TASKS, shared=model.trunk).backward(
        model.losses(batch())
    )
    found = flat_grad(list(model.trunk.parameters())).clone()
    model.zero_grad()
    by_hand = make_balancer(
        "constant+pcgrad", tasks=TASKS, shared=model.trunk, weights=[0.9, 1.1, 1.0], order="fixed"
    )
    by_hand.backward(model.losses(batch()))
    assert_close(found, flat_grad(list(model.trunk.parameters())), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -1.0}, r"`alpha` must be at least 0, but got -1\.0\."),
        ({"lr": math.nan}, "`lr` must be at least 0, but got nan"),
        ({"minimum": 0.0}, r"`minimum` must be positive, but got 0\.0\."),
    ],
)
def test_refuses_what_it_cannot_do_with(settings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradNorm(**settings)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("weight", math.nan, "`weight` at least 0"),
        ("upcoming", -1, "`upcoming` at least 0"),
        ("first", math.inf, "`first` finite"),
        ("exp_avg", math.nan, "`exp_avg` finite"),
        ("exp_avg_sq", -1, "`exp_avg_sq` at least 0"),
        ("steps", -1, "`steps` at least 0"),
    ],
)
def test_refuses_a_damaged_state(name: str, bad: float, words: str) -> None:
    weighting = GradNorm()
    stepped(weighting, [1.0, 2.0], [3.0, 1.0])
    state = {key: value.clone() for key, value in weighting.state_dict().items()}
    state[name].fill_(bad)
    with pytest.raises(ValueError, match=f"of GradNorm must have {words}"):
        weighting.load_state_dict(state)
