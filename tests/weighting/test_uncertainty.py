"""What is true of uncertainty weighting alone; the rest is in test_contract.py.

With s the log-variance: regression 1/2 e^-s L + 1/2 s, classification e^-s L + 1/2 s; log(1 + e^s)
in place of 1/2 s where that is asked for.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mtbalance.weighting import Uncertainty
from tests.weighting._helpers import double

LOSSES = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3)
LOG_VARS = st.lists(st.floats(-9, 5), min_size=3, max_size=3)
KINDS = st.lists(st.sampled_from(["regression", "classification"]), min_size=3, max_size=3)
TASKS = ("a", "b", "c")


def made(log_var: list[float], **settings: object) -> Uncertainty:
    """Return a float64 weighting with these log-variances."""
    weighting = Uncertainty(**settings).bind(TASKS[: len(log_var)]).double()  # type: ignore[arg-type]
    weighting.log_var.data = double(*log_var)
    return weighting


def slopes(weighting: Uncertainty, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the objective by the losses and by the log-variances."""
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(weighting(losses).sum(), (losses, weighting.log_var))  # type: ignore[return-value]


def test_values_by_hand() -> None:
    """s = 0: 1/2 L and L. s = log 4: L / 8 + log 2, and L / 4 + log 2."""
    assert_close(made([0, 0])(double(3, 4)), double(1.5, 2))
    assert_close(made([0, 0], kind="classification")(double(3, 4)), double(3, 4))
    mixed = made([math.log(4)] * 2, kind=["regression", "classification"])
    half = math.log(2)
    assert_close(mixed(double(8, 8)), double(1 + half, 2 + half))


@given(losses=LOSSES, log_var=LOG_VARS, kinds=KINDS)
def test_is_the_formula(losses, log_var, kinds) -> None:
    """Value and derivatives against the formula written out with Python's own numbers.

    d/dL = f e^-s, d/ds = 1/2 - f e^-s L with f = 1/2 (regression) or 1 (classification).
    """
    weighting = made(log_var, kind=kinds)
    weighted = weighting(double(*losses)).detach()
    by_loss, by_log_var = slopes(weighting, double(*losses))
    for i, (loss, s, kind) in enumerate(zip(losses, log_var, kinds, strict=True)):
        factor = 0.5 if kind == "regression" else 1.0
        weight = factor * math.exp(-s)
        assert weighted[i].item() == pytest.approx(weight * loss + s / 2, rel=1e-12, abs=1e-12)
        assert by_loss[i].item() == pytest.approx(weight, rel=1e-12)
        assert by_log_var[i].item() == pytest.approx(0.5 - weight * loss, rel=1e-12, abs=1e-12)


@given(losses=LOSSES, log_var=LOG_VARS, kinds=KINDS)
def test_derivatives_are_those_of_autograd(losses, log_var, kinds) -> None:
    weighting = made(log_var, kind=kinds)
    x, s = double(*losses).requires_grad_(), double(*log_var).requires_grad_()
    factor = double(*[0.5 if kind == "regression" else 1 for kind in kinds])
    expected = torch.autograd.grad((factor * (-s).exp() * x + s / 2).sum(), (x, s))
    for ours, theirs in zip(slopes(weighting, double(*losses)), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(losses=LOSSES, kinds=KINDS)
def test_rest(losses, kinds) -> None:
    """s = log L (regression) or log 2L (classification) is at rest, and the weight is 1 / 2L."""
    log_var = [
        math.log(loss if kind == "regression" else 2 * loss)
        for loss, kind in zip(losses, kinds, strict=True)
    ]
    by_loss, by_log_var = slopes(made(log_var, kind=kinds), double(*losses))
    assert_close(by_log_var, torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert_close(by_loss, 1 / (2 * double(*losses)), rtol=1e-12, atol=0)


def test_gradient_descent_comes_to_rest() -> None:
    """The objective is convex in s, so that plain gradient descent finds the point of rest."""
    losses = double(0.5, 2.0, 7.0)
    weighting = made([0, 0, 0], kind=["regression", "regression", "classification"])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(losses).sum().backward()
        optimizer.step()
    expected = torch.log(losses * double(1, 1, 2))
    assert_close(weighting.log_var.detach(), expected, rtol=0, atol=1e-9)


@given(losses=LOSSES, log_var=LOG_VARS, factor=st.floats(0.1, 10))
def test_scaling_a_loss_shifts_its_log_variance(losses, log_var, factor: float) -> None:
    """c L at s + log c has the weighted loss of L at s, plus 1/2 log c."""
    shift = math.log(factor)
    before = made(log_var)(double(*losses))
    after = made([s + shift for s in log_var], min_log_var=-20.0)(factor * double(*losses))
    assert_close(after, before + shift / 2, rtol=1e-10, atol=1e-10)


def test_below_the_bound_the_weight_is_that_of_the_bound() -> None:
    weighting = made([-15.0, -10.0, 0.0])
    by_loss, _ = slopes(weighting, double(0, 0, 0))
    assert_close(by_loss, double(0.5 * math.e**10, 0.5 * math.e**10, 0.5))
    value = weighting(double(0, 0, 0)).detach()
    assert_close(value, double(-5, -5, 0))


@pytest.mark.parametrize("start", [-10.0, -10.5])
def test_the_bound_stops_the_way_down_only(start: float) -> None:
    """With a loss of 0 the derivative by s is 1/2: descending would lower s for ever. Blocked.

    With a loss of 1 it is 1/2 (1 - e^10) at the bound, negative: s rises as without a bound.
    """
    _, downwards = slopes(made([start]), double(0))
    assert float(downwards) == 0
    _, upwards = slopes(made([start]), double(1))
    assert_close(upwards, double(0.5 * (1 - math.exp(10))))


def test_training_stops_at_the_bound_and_comes_back() -> None:
    """100 steps on a loss of 0 end a step or less below the bound; then a loss of 1 brings s up."""
    weighting = made([-9.0])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1)

    def train(loss: float, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            weighting(double(loss)).sum().backward()
            optimizer.step()
        return float(weighting.log_var.detach())

    assert -10.05 - 1e-9 <= train(0.0, 100) <= -10
    resting = train(0.0, 100)
    assert train(0.0, 1) == resting
    assert train(1e-4, 200) > -9.9  # at rest at log 1e-4 = -9.2


def test_a_bound_of_its_own() -> None:
    _, slope = slopes(made([-1.0], min_log_var=-1.0), double(0))
    assert float(slope) == 0
    _, free = slopes(made([-1.0], min_log_var=-2.0), double(0))
    assert float(free) == 0.5


def test_kinds_by_name_follow_the_order_of_the_tasks() -> None:
    kinds = {"b": "classification", "a": "regression"}
    weighting = Uncertainty(kind=kinds).bind(["a", "b"])
    assert_close(weighting(torch.tensor([2.0, 2.0])).detach(), torch.tensor([1.0, 2.0]))


def test_kinds_follow_the_active_tasks() -> None:
    weighting = made([0.0, 1.0, 2.0], kind=["regression", "regression", "classification"])
    with weighting.only(torch.tensor([2, 1])):
        weighted = weighting(double(1, 1)).detach()
    expected = double(math.exp(-2) + 1, 0.5 * math.exp(-1) + 0.5)
    assert_close(weighted, expected)


def test_log_variances_of_absent_tasks_get_no_gradient() -> None:
    weighting = made([0.0, 1.0, 2.0])
    with weighting.only(torch.tensor([2, 0])):
        (slope,) = torch.autograd.grad(weighting(double(3, 3)).sum(), weighting.log_var)
    assert float(slope[1]) == 0
    assert (slope[[0, 2]] != 0).all()


@given(losses=LOSSES, log_var=LOG_VARS, kinds=KINDS)
def test_the_default_is_the_formula_to_the_last_bit(losses, log_var, kinds) -> None:
    """In float32, where one operation more would show."""
    weighting = Uncertainty(kind=kinds).bind(TASKS)
    weighting.log_var.data = s = torch.tensor(log_var, dtype=torch.float32)
    factor = torch.tensor([0.5 if kind == "regression" else 1.0 for kind in kinds])
    x = torch.tensor(losses, dtype=torch.float32)
    assert torch.equal(weighting(x).detach(), factor * torch.exp(-s) * x + s / 2)
    assert weighting.regularizer == "log"


@given(losses=LOSSES, log_var=st.lists(st.floats(-9, 40), min_size=3, max_size=3), kinds=KINDS)
def test_log1p_is_the_formula(losses, log_var, kinds) -> None:
    """Against Python's own numbers: d/ds = 1 / (1 + e^-s) - f e^-s L, also where e^s is large."""
    weighting = made(log_var, kind=kinds, regularizer="log1p")
    weighted = weighting(double(*losses)).detach()
    by_loss, by_log_var = slopes(weighting, double(*losses))
    for i, (loss, s, kind) in enumerate(zip(losses, log_var, kinds, strict=True)):
        weight = (0.5 if kind == "regression" else 1.0) * math.exp(-s)
        value = weight * loss + math.log1p(math.exp(s))
        assert weighted[i].item() == pytest.approx(value, rel=1e-12)
        assert by_loss[i].item() == pytest.approx(weight, rel=1e-12)
        slope = 1 / (1 + math.exp(-s)) - weight * loss
        assert by_log_var[i].item() == pytest.approx(slope, rel=1e-12, abs=1e-12)


def test_log1p_by_hand() -> None:
    """s = 0: 1/2 L + log 2. The variance 3, s = log 3: 6 / 6 + log 4."""
    weighting = made([0, math.log(3)], regularizer="log1p")
    assert_close(weighting(double(4, 6)), double(2 + math.log(2), 1 + math.log(4)))


@given(losses=st.lists(st.floats(0, 1e3), min_size=3, max_size=3), log_var=LOG_VARS)
def test_log1p_is_never_negative(losses, log_var) -> None:
    """Where the plain logarithm is, for small variances."""
    assert (made(log_var, regularizer="log1p")(double(*losses)) > 0).all()
    assert (made([-9, -9, -9])(double(0, 1e-6, 1e-9)) < 0).all()


@given(losses=LOSSES, kinds=KINDS)
def test_log1p_rest(losses, kinds) -> None:
    """f L e^-s = e^s / (1 + e^s) is a quadratic in e^s, whose positive root is where s rests."""
    factors = [0.5 if kind == "regression" else 1.0 for kind in kinds]
    sizes = [f * loss for f, loss in zip(factors, losses, strict=True)]
    variances = [(a + math.sqrt(a * a + 4 * a)) / 2 for a in sizes]
    weighting = made(list(map(math.log, variances)), kind=kinds, regularizer="log1p")
    by_loss, by_log_var = slopes(weighting, double(*losses))
    assert_close(by_log_var, torch.zeros(3).double(), rtol=0, atol=1e-12)
    documented = [
        2 / (loss * (1 + math.sqrt(1 + 4 / a))) for loss, a in zip(losses, sizes, strict=True)
    ]
    assert_close(by_loss, double(*documented), rtol=1e-10, atol=0)


def test_log1p_stops_at_the_bound_too() -> None:
    """The derivative by s is above 0 with a loss of 0, and descending would never end."""
    weighting = made([-10.0, -9.0], regularizer="log1p")
    _, slope = slopes(weighting, double(0, 0))
    assert_close(slope, double(0, 1 / (1 + math.exp(9))))


def test_refuses_an_unknown_regularizer() -> None:
    with pytest.raises(ValueError, match=r"`regularizer` must be one of 'log', 'log1p', but got"):
        Uncertainty(regularizer="l2")


def test_start() -> None:
    weighting = Uncertainty(init=-0.7).bind(TASKS)
    assert_close(weighting.log_var.detach(), torch.full((3,), -0.7))
    assert [name for name, _ in weighting.named_parameters()] == ["log_var"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (["regression"] * 2, r"`kind` must have one entry per task \(3\), but got 2\."),
        ({"a": "regression"}, r"`kind` must name each of the tasks"),
    ],
)
def test_kinds_must_fit_the_tasks(kind: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Uncertainty(kind=kind).bind(TASKS)  # type: ignore[arg-type]


def test_refuses_unknown_kinds_and_bounds() -> None:
    with pytest.raises(ValueError, match=r"`kind` must be one of .* Did you mean 'regression'"):
        Uncertainty(kind=["regresion", "classification"])
    with pytest.raises(ValueError, match=r"`init` must be at least `min_log_var`"):
        Uncertainty(init=-11)
