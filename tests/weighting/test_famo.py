"""What is true of FAMO alone; what holds for every weighting is in test_contract.py.

The oracle is the authors' form: an objective with logarithms, differentiated by autograd, logits
with a graph through their softmax, and ``torch.optim.Adam``.
"""

import io
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import PCGrad, Sum
from mtbalance.weighting import FAMO
from tests._networks import TASKS, Network, batch
from tests.weighting._helpers import double

pytestmark = pytest.mark.usefixtures("in_float64")

LOSSES = st.floats(1e-8, 1e4)
CHANGES = st.lists(st.tuples(LOSSES, LOSSES), min_size=3, max_size=3)


def weights(weighting: FAMO, losses: Tensor) -> Tensor:
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(weighting(losses).sum(), losses)[0]


class Slow:
    """One logit, and one Adam, per task: those of absent tasks do not move."""

    def __init__(self, gamma: float, lr: float) -> None:
        self.logits = [torch.zeros((), requires_grad=True) for _ in range(3)]
        self.adams = [torch.optim.Adam([x], lr=lr, weight_decay=gamma) for x in self.logits]

    def weights(self, losses: Mapping[int, float]) -> Tensor:
        """Return the derivatives of the authors' objective, times the number of tasks."""
        raw = double(*losses.values()).requires_grad_()
        shares = torch.stack([self.logits[task] for task in losses]).softmax(0).detach()
        constant = 1 / (shares / raw).sum().detach()
        objective = constant * (shares * raw.log()).sum()
        return len(losses) * torch.autograd.grad(objective, raw)[0]

    def after_step(self, before: Mapping[int, float], after: Mapping[int, float]) -> None:
        fall = double(*before.values()).log() - double(*after.values()).log()
        for task in before:
            self.logits[task].grad = None
        shares = torch.stack([self.logits[task] for task in before]).softmax(0)
        shares.backward(fall)
        for task in before:
            self.adams[task].step()


def numbers(slow: Slow) -> Tensor:
    return torch.stack([logit.detach() for logit in slow.logits])


def test_by_hand() -> None:
    """Losses (1, 3), equal logits: w = 2 (1, 1/3) / (4/3) = (3/2, 1/2).

    They go to (1/2, 3): delta = (log 2, 0), slope = (1, -1) log 2 / 4. Adam's first step is the
    learning rate against the sign. Then z_1 / z_2 = exp(-2 lr), and so on.
    """
    weighting = FAMO(gamma=0.0, lr=0.1)
    assert_close(weights(weighting, double(1, 3)), double(1.5, 0.5))
    weighting.after_step(double(0.5, 3))
    assert_close(weighting.logits, double(-0.1, 0.1), rtol=1e-6, atol=0)
    ratio = math.exp(-0.2) * 3 / 0.5
    found = weights(weighting, double(0.5, 3))
    assert_close(found[0] / found[1], torch.tensor(ratio), rtol=1e-6, atol=0)
    assert_close(found.sum(), torch.tensor(2.0))


def test_the_objective_is_a_harmonic_mean() -> None:
    """With equal logits, m over the sum of 1 / (m L): positive, whatever the losses are."""
    assert_close(FAMO()(double(0.25, 1.0)).sum(), torch.tensor(2 * 2 / (4 + 1)))


@given(
    steps=st.lists(
        st.tuples(CHANGES, st.lists(st.integers(0, 2), min_size=1, unique=True)), max_size=12
    ),
    gamma=st.sampled_from([0.0, 0.01, 0.5]),
    lr=st.sampled_from([0.025, 1.0]),
)
@settings(max_examples=60)
def test_is_the_definition(steps, gamma: float, lr: float) -> None:
    """Any losses, any tasks absent from any step, in any order."""
    weighting, slow = FAMO(gamma, lr).bind(TASKS), Slow(gamma, lr)
    for changes, active in steps:
        before = {task: changes[task][0] for task in active}
        after = {task: changes[task][1] for task in active}
        with weighting.only(torch.tensor(active)):
            found = weights(weighting, double(*before.values()))
            assert_close(found, slow.weights(before), rtol=1e-11, atol=0)
            weighting.after_step(double(*after.values()))
        slow.after_step(before, after)
        assert_close(weighting.logits, numbers(slow), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", [Sum, PCGrad])
def test_a_run_is_that_of_a_slow_loop(gradient: type) -> None:
    """200 steps of a network: parameters and logits, with the losses recomputed by hand."""
    torch.manual_seed(0)
    model, other = Network(), Network()
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    its = torch.optim.SGD(other.parameters(), lr=0.02)
    balancer = Balancer(FAMO(), gradient(), tasks=TASKS, shared=model.trunk)
    constant = Balancer(Given(), gradient(), tasks=TASKS, shared=other.trunk)
    slow = Slow(0.01, 0.025)
    for seed in range(200):
        rows = batch(seed=seed)
        optimizer.zero_grad()
        balancer.backward(model.losses(rows))
        optimizer.step()
        balancer.after_step(lambda rows=rows: model.losses(rows))

        its.zero_grad()
        losses = other.losses(rows)
        before = {number: loss.item() for number, loss in enumerate(losses.values())}
        constant.weighting.vector = slow.weights(before)
        constant.backward(losses)
        its.step()
        after = {n: loss.item() for n, loss in enumerate(other.losses(rows).values())}
        slow.after_step(before, after)
    assert_close(balancer.weighting.logits, numbers(slow), rtol=1e-9, atol=1e-9)
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(ours, expected, rtol=1e-8, atol=1e-9)
    assert float(balancer.weighting.logits.abs().max()) > 0.1


class Given(FAMO):
    """Weights that somebody else writes."""

    needs_after_step = False
    vector: Tensor

    def forward(self, losses: Tensor) -> Tensor:
        return self.vector * losses


# --- degenerate losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_all_sizes(dtype: torch.dtype) -> None:
    losses = torch.tensor([1e4, 1.0, 6e-8], dtype=dtype)
    found = weights(FAMO(), losses)
    inverse = 1 / losses.double()
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(found.double(), 3 * inverse / inverse.sum(), rtol=tolerance, atol=1e-7)


def test_losses_at_the_ends_of_float64() -> None:
    weighting = FAMO()
    assert_close(weights(weighting, double(1e300, 1e-300)), double(0, 2))
    weighting.after_step(double(1e-300, 1e300))
    assert torch.isfinite(weighting.logits).all()
    assert weighting.logits[0] < 0 < weighting.logits[1]


def test_a_loss_of_zero_is_out() -> None:
    """Of the objective; and of the comparison, also if it came to 0 or left it in the step."""
    weighting = FAMO(gamma=0.0).bind(TASKS)
    assert_close(weights(weighting, double(1, 0, 3)), double(9 / 4, 0, 3 / 4))
    weighting.after_step(double(0.5, 1, 3))
    two = FAMO(gamma=0.0)
    two(double(1, 3))
    two.after_step(double(0.5, 3))
    assert torch.equal(weighting.logits, double(two.logits[0], 0, two.logits[1]))
    assert weighting.steps.tolist() == [1, 0, 1]
    before = weighting.logits.clone()
    weighting(double(1, 1, 1))
    weighting.after_step(double(0, 1, 0))
    assert weighting.steps.tolist() == [1, 1, 1]
    assert torch.equal(weighting.logits, before)  # one task alone has nothing to compare with
    assert_close(weights(weighting, double(0, 0, 0)), 3 * before.softmax(0))


def test_one_task_alone_has_a_weight_of_one() -> None:
    weighting = FAMO()
    for after in (0.5, 2.0):
        assert weights(weighting, double(1.0)).tolist() == [1.0]
        weighting.after_step(double(after))
    assert weighting.logits.tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_bad_loss_after_the_step_moves_nothing(bad: float) -> None:
    weighting = FAMO()
    weighting(double(1, 2))
    with pytest.warns(RuntimeWarning, match=r"FAMO fell back: .* not finite, or below 0"):
        weighting.after_step(double(0.5, bad))
    assert weighting.fallbacks == 1
    assert weighting.logits.tolist() == [0.0, 0.0]
    assert weighting.steps.tolist() == [0, 0]


def test_a_negative_loss_is_refused() -> None:
    x = torch.nn.Parameter(torch.tensor(1.0))
    balancer = Balancer(FAMO(), Sum(), tasks=("a", "b"))
    with pytest.raises(FloatingPointError, match="losses must be at least 0"):
        balancer.backward({"a": x * 1, "b": -x})


def test_evaluation_looks_at_nothing() -> None:
    weighting = FAMO()
    weighting(double(1, 2))
    weighting.eval()
    weighting.after_step(double(0.5, 2))
    assert weighting.logits.tolist() == [0.0, 0.0]
    assert weighting.before.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": -0.1}, r"`gamma` must be at least 0, but got -0\.1\."),
        ({"lr": -1.0}, r"`lr` must be at least 0, but got -1\.0\."),
        ({"lr": math.nan}, "`lr` must be at least 0, but got nan"),
    ],
)
def test_refuses_options(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FAMO(**options)


def test_casts_leave_the_state_alone() -> None:
    weighting = FAMO()
    weighting(double(1, 2))
    weighting.after_step(double(0.5, 2))
    logits = weighting.logits.clone()
    weighting.to(torch.bfloat16)
    assert torch.equal(weighting.logits, logits)


@pytest.mark.parametrize("wait", [False, True])
def test_a_run_resumes_bit_for_bit(wait: bool) -> None:
    """Saved after a step, before it has been looked back at, or afterwards."""

    def start() -> tuple[Network, torch.optim.Optimizer, Balancer]:
        torch.manual_seed(1)
        model = Network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, make_balancer("famo+cagrad", tasks=TASKS, shared=model.trunk)

    def step(run, seed: int) -> None:
        model, optimizer, balancer = run
        optimizer.zero_grad()
        balancer.backward(model.losses(batch(seed=seed)))
        optimizer.step()

    def look_back(run, seed: int) -> None:
        run[2].after_step(lambda: run[0].losses(batch(seed=seed)))

    whole = start()
    for seed in range(6):
        step(whole, seed)
        look_back(whole, seed)
    first, second = start(), start()
    for seed in range(3):
        step(first, seed)
        if seed < 2 or not wait:
            look_back(first, seed)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    if wait:
        look_back(second, 2)
    for seed in range(3, 6):
        step(second, seed)
        look_back(second, seed)
    for ours, expected in zip(second, whole, strict=True):
        for name, value in expected.state_dict().items():
            if isinstance(value, Tensor):
                assert torch.equal(ours.state_dict()[name], value), name
