"""What is true of Auto-Lambda alone; what holds for every weighting is in test_contract.py.

The oracle for its derivative is double backward: the virtual step is taken with ``create_graph`` as
a function of the weights, and the validation loss at its end is differentiated by them. The virtual
step itself is held against a real step of ``torch.optim.SGD``.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.testing
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mtbalance import Balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import AutoLambda, Step, WarmUp
from tests._device import on_device, randn

pytestmark = pytest.mark.usefixtures("in_float64")

# Derivatives are on the CPU, wherever the model is.
assert_close = functools.partial(torch.testing.assert_close, check_device=False)
TASKS = ("a", "b", "c")
WEIGHTS = [0.3, -0.2, 0.5]
Validation = Callable[[], Mapping[str, Tensor]]


class Network(nn.Module):
    """A trunk, a head per task, and a parameter that only task c uses."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.between = between or nn.Identity()
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the losses of a batch, shape (n, 4)."""
        hidden = self.between(torch.tanh(self.trunk(batch)))
        target = batch.sum(1, keepdim=True)
        losses = {
            task: (head(hidden) - target).square().mean() for task, head in self.heads.items()
        }
        losses["b"] = losses["b"].sqrt()
        losses["c"] = losses["c"] * self.scale
        return losses


def batch_of(seed: int, rows: int = 6) -> Tensor:
    return randn(rows, 4, seed=seed)


TRAIN, VALIDATE = 1, 2


def rows_of(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> list:
    """Return the gradients of each loss, one autograd call per task."""
    return [
        list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for loss in losses.values()
    ]


NOT_LOOKED_AT: dict[str, Any] = {
    "losses": torch.empty(0),
    "norms": torch.empty(0),
    "balanced": 0,
}


def step_of(
    model: nn.Module,
    *,
    validation: Validation | None = None,
    tasks: Sequence[str] = TASKS,
    loss_scale: float = 1.0,
) -> Step:
    """Return what a Balancer would show the weighting: parameters that some loss reaches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = model(batch_of(TRAIN))
    rows = rows_of({task: losses[task] * loss_scale for task in tasks}, parameters)
    reached = [i for i in range(len(parameters)) if any(row[i] is not None for row in rows)]
    return Step(
        parameters=[parameters[i] for i in reached],
        gradients=[[row[i] for i in reached] for row in rows],
        loss_scale=loss_scale,
        validation=validation or (lambda: model(batch_of(VALIDATE))),
        **NOT_LOOKED_AT,
    )


def weighting_of(optimizer: torch.optim.Optimizer, **settings: object) -> AutoLambda:
    weighting = AutoLambda(optimizer, **settings).bind(TASKS)  # type: ignore[arg-type]
    weighting.lambdas.copy_(torch.tensor(WEIGHTS))
    return weighting


def warm_up(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Fill the optimizer's buffers by real steps on other batches."""
    for seed in range(steps):
        optimizer.zero_grad()
        sum(model(batch_of(10 + seed)).values()).backward()
        optimizer.step()
    optimizer.zero_grad()


def stepped(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return the parameters after a step, as a differentiable function of the gradients.

    PyTorch's documentation of SGD, line by line (without a gradient a parameter stays); for
    adaptive optimizers plain gradient descent with their learning rate and weight decay, which is
    what Auto-Lambda looks ahead with.
    """
    after = []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for p, gradient in zip(parameters, gradients, strict=True):
        if p not in groups or gradient is None:
            after.append(p)
            continue
        group = groups[p]
        slope = -gradient if group.get("maximize") else gradient
        slope = slope + group["weight_decay"] * p
        momentum = group.get("momentum", 0)
        if momentum:
            held = optimizer.state.get(p, {}).get("momentum_buffer")
            damped = (1 - group["dampening"]) * slope
            buffer = slope if held is None else momentum * held + damped
            slope = slope + momentum * buffer if group["nesterov"] else buffer
        after.append(p - group["lr"] * slope)
    return after


def by_double_backward(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tasks: Sequence[str] = TASKS,
    primary: Sequence[str] = TASKS,
) -> Tensor:
    """Return d L_val(theta') / d lambda through a graph of the whole virtual step."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.tensor([WEIGHTS[TASKS.index(task)] for task in tasks], requires_grad=True)
    losses = model(batch_of(TRAIN))
    objective = sum(w * losses[task] for w, task in zip(weights, tasks, strict=True))
    gradients = torch.autograd.grad(
        objective, list(named.values()), create_graph=True, allow_unused=True
    )
    after = stepped(optimizer, list(named.values()), gradients)
    validation = functional_call(model, dict(zip(named, after, strict=True)), (batch_of(VALIDATE),))
    (slope,) = torch.autograd.grad(sum(validation[task] for task in primary), weights)
    return slope


def sgd(**settings: object) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})  # type: ignore[arg-type]


def two_groups(model: Network) -> torch.optim.Optimizer:
    """Return SGD with its own learning rate, decay and momentum for the trunk and the heads."""
    groups = [
        {"params": model.trunk.parameters(), "lr": 0.3, "weight_decay": 0.2, "momentum": 0.5},
        {"params": [*model.heads.parameters(), model.scale], "lr": 0.02},
    ]
    return torch.optim.SGD(groups)


def trunk_alone(model: Network) -> torch.optim.Optimizer:
    """Return an optimizer that does not hold the heads."""
    return torch.optim.SGD(model.trunk.parameters(), lr=0.1, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[Network], torch.optim.Optimizer]] = {
    "plain": sgd(),
    "decay": sgd(weight_decay=0.3),
    "momentum": sgd(momentum=0.9, weight_decay=0.1),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampening": sgd(momentum=0.8, dampening=0.4, weight_decay=0.1),
    "dampening-without-momentum": sgd(dampening=0.4),
    "maximize": sgd(momentum=0.5, maximize=True, weight_decay=0.1),
    "tensor-lr": sgd(lr=torch.tensor(0.1)),
    "two-groups": two_groups,
    "trunk-alone": trunk_alone,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.2),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
}


@pytest.fixture(params=sorted(OPTIMIZERS))
def make_optimizer(request) -> Callable[[Network], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


# --- the derivative -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3], ids=["first-step", "live-buffers"])
def test_oracle_takes_the_steps_of_the_optimizer(make_optimizer, steps: int) -> None:
    """The oracle's virtual step is what ``optimizer.step()`` does, for every kind of SGD."""
    model = Network()
    optimizer = make_optimizer(model)
    if not isinstance(optimizer, torch.optim.SGD):
        return  # by definition another step
    warm_up(model, optimizer, steps)
    parameters = list(model.parameters())
    losses = model(batch_of(TRAIN))
    gradients = torch.autograd.grad(
        sum(w * losses[task] for w, task in zip(WEIGHTS, TASKS, strict=True)), parameters
    )
    expected = [p.detach().clone() for p in stepped(optimizer, parameters, gradients)]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()
    assert_close([p.detach() for p in parameters], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [0, 3], ids=["first-step", "live-buffers"])
@pytest.mark.parametrize("primary", [None, ("a",), ("b", "c")])
def test_derivative_is_that_of_double_backward(make_optimizer, steps: int, primary) -> None:
    model = Network()
    optimizer = make_optimizer(model)
    warm_up(model, optimizer, steps)
    expected = by_double_backward(model, optimizer, primary=primary or TASKS)
    derivative = weighting_of(optimizer, primary=primary).derivative(step_of(model))
    assert derivative.dtype == torch.float64
    assert_close(derivative, expected, rtol=1e-12, atol=1e-14)
    assert (expected != 0).all()


def test_derivative_of_the_active_tasks(make_optimizer) -> None:
    """With task b absent, the step is that of a and c, with their weights."""
    model = Network()
    optimizer = make_optimizer(model)
    warm_up(model, optimizer)
    expected = by_double_backward(model, optimizer, tasks=("c", "a"))
    weighting = weighting_of(optimizer)
    with weighting.only(torch.tensor([2, 0])):
        derivative = weighting.derivative(step_of(model, tasks=("c", "a")))
    assert_close(derivative, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [2.0**16, 1e-3])
def test_derivative_does_not_see_the_scale_of_the_losses(make_optimizer, scale: float) -> None:
    """Gradients that a gradient scaler has magnified give the same derivative."""
    model = Network()
    optimizer = make_optimizer(model)
    warm_up(model, optimizer)
    weighting = weighting_of(optimizer)
    expected = by_double_backward(model, optimizer)
    derivative = weighting.derivative(step_of(model, loss_scale=scale))
    assert_close(derivative, expected, rtol=1e-12, atol=1e-14)


def test_derivative_by_hand() -> None:
    """theta = 2, g = (3, -1), lambda = (0.3, -0.2): theta' = 2 - 0.1 (0.9 + 0.2) = 1.89.

    L_val = theta^2, so -lr * 2 theta' * g = -0.378 g.
    """
    theta = nn.Parameter(torch.tensor([2.0]))
    weighting = AutoLambda(torch.optim.SGD([theta], lr=0.1)).bind(("a", "b"))
    weighting.lambdas.copy_(torch.tensor(WEIGHTS[:2]))
    step = Step(
        parameters=[theta],
        gradients=[[torch.tensor([3.0])], [torch.tensor([-1.0])]],
        loss_scale=1.0,
        validation=lambda: {"a": theta.square().sum()},
        **NOT_LOOKED_AT,
    )
    assert_close(weighting.derivative(step), torch.tensor([-1.134, 0.378]))


def test_linear_in_the_primary_tasks() -> None:
    """The derivative for {a, b} is the sum of those for {a} and {b}."""
    model = Network()
    optimizer = sgd(momentum=0.9)(model)

    def derivative(*primary: str) -> Tensor:
        return weighting_of(optimizer, primary=primary).derivative(step_of(model)).cpu()

    assert_close(derivative("a", "b"), derivative("a") + derivative("b"), rtol=1e-12, atol=1e-14)


def test_order_of_the_primary_tasks_does_not_matter() -> None:
    model = Network()
    optimizer = sgd()(model)
    one = weighting_of(optimizer, primary=("a", "c")).derivative(step_of(model))
    other = weighting_of(optimizer, primary=("c", "a")).derivative(step_of(model))
    assert_close(one, other, rtol=1e-13, atol=0)


def test_learning_rate_of_zero() -> None:
    model = Network()
    assert not weighting_of(sgd(lr=0.0)(model)).derivative(step_of(model)).any()


def test_validation_may_leave_primary_tasks_out() -> None:
    """What is there counts: a validation batch without labels for b."""
    model = Network()
    optimizer = sgd()(model)

    def without_b() -> dict[str, Tensor]:
        losses = model(batch_of(VALIDATE))
        del losses["b"]
        return losses

    found = weighting_of(optimizer).derivative(step_of(model, validation=without_b))
    expected = by_double_backward(model, optimizer, primary=("a", "c"))
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_parameters_that_the_primary_loss_does_not_use() -> None:
    """Heads of b and c, and ``scale``, have no validation gradient when a alone is primary."""
    model = Network()
    optimizer = sgd()(model)
    step = step_of(model)
    assert any(g is None for g in step.gradients[0])
    derivative = weighting_of(optimizer, primary=("a",)).derivative(step)
    expected = by_double_backward(model, optimizer, primary=("a",))
    assert_close(derivative, expected, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_do_not_take_part() -> None:
    model = Network()
    model.trunk.bias.requires_grad_(requires_grad=False)
    optimizer = sgd(momentum=0.9)(model)
    derivative = weighting_of(optimizer).derivative(step_of(model))
    assert_close(derivative, by_double_backward(model, optimizer), rtol=1e-12, atol=1e-14)


def test_a_validation_gradient_of_zero_gives_zero() -> None:
    """At a minimum of the validation loss nothing is divided by the gradient's length."""
    model = Network()
    optimizer = sgd()(model)
    weighting = weighting_of(optimizer)

    def flat_validation() -> dict[str, Tensor]:
        return {task: 0 * loss for task, loss in model(batch_of(VALIDATE)).items()}

    before = weighting.lambdas.clone()
    weighting.before_step(step_of(model, validation=flat_validation))
    assert torch.equal(weighting.lambdas, before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_orthogonal_gradients_give_zero() -> None:
    """A task whose gradient is orthogonal to the validation gradient keeps its weight."""
    theta = nn.Parameter(torch.tensor([1.0, 1.0]))
    weighting = AutoLambda(torch.optim.SGD([theta], lr=0.1)).bind(("a", "b"))
    step = Step(
        parameters=[theta],
        gradients=[[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]],
        loss_scale=1.0,
        validation=lambda: {"a": 3 * theta[1]},
        **NOT_LOOKED_AT,
    )
    assert_close(weighting.derivative(step), torch.tensor([0.0, -0.3]))


# --- what it leaves as it was ---------------------------------------------------------------------


def snapshot(*modules: nn.Module) -> list[bytes]:
    return [
        value.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()
        for module in modules
        for value in module.state_dict().values()
    ]


def test_parameters_come_back_bit_for_bit(make_optimizer) -> None:
    """Also those for which adding and subtracting a step would not: 1e-30 next to a step of 1."""
    model = Network()
    optimizer = make_optimizer(model)
    warm_up(model, optimizer)
    with torch.no_grad():
        model.trunk.bias[0] = 1e-30
        model.trunk.bias[1] = -0.0
    weighting = weighting_of(optimizer)
    before = snapshot(model)
    state = copy.deepcopy(optimizer.state_dict())
    model.zero_grad()
    weighting.before_step(step_of(model))
    assert snapshot(model) == before
    assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_validation_sees_the_virtual_step() -> None:
    model = Network()
    optimizer = sgd(momentum=0.9, weight_decay=0.1)(model)
    warm_up(model, optimizer)
    seen = []

    def validation() -> Mapping[str, Tensor]:
        seen.extend(p.detach().clone() for p in model.parameters())
        return model(batch_of(VALIDATE))

    step = step_of(model, validation=validation)
    parameters = list(model.parameters())
    losses = model(batch_of(TRAIN))
    objective = sum(w * losses[task] for w, task in zip(WEIGHTS, TASKS, strict=True))
    expected = stepped(optimizer, parameters, torch.autograd.grad(objective, parameters))
    weighting_of(optimizer).before_step(step)
    assert_close(seen, [p.detach() for p in expected], rtol=1e-12, atol=1e-14)


def test_everything_is_restored_when_the_validation_fails() -> None:
    model = Network(nn.BatchNorm1d(5))
    optimizer = sgd(momentum=0.9)(model)
    warm_up(model, optimizer)
    weighting = weighting_of(optimizer)

    def validation() -> Mapping[str, Tensor]:
        model(batch_of(VALIDATE))
        torch.rand(3)
        raise OSError("disk is gone")

    step = step_of(model, validation=validation)
    before, generator = snapshot(model), torch.get_rng_state()
    weights = weighting.lambdas.clone()
    with pytest.raises(OSError, match="disk is gone"):
        weighting.before_step(step)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(weighting.lambdas, weights)
    assert not weighting.steps.any()
    # No hook is left behind: a forward pass in training mode moves the running means again.
    model(batch_of(VALIDATE))
    assert snapshot(model) != before


def test_batch_norm_and_the_global_generator_are_unchanged() -> None:
    model = Network(nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5)))
    optimizer = sgd()(model)
    weighting = weighting_of(optimizer)
    step = step_of(model)
    before, generator = snapshot(model), torch.get_rng_state()
    weighting.before_step(step)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    model(batch_of(VALIDATE))
    assert snapshot(model) != before


class Statistics(nn.Module):
    """Buffers alone, of several kinds, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("passing", torch.zeros(5), persistent=False)
        self.register_buffer("replaced", torch.zeros(5))
        self.register_buffer("positions", torch.arange(5).expand(3, 5), persistent=False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def note(self, rows: Tensor) -> None:
        """Take rows of features into account, shape (n, 5)."""
        rows = rows.detach()
        functional.batch_norm(rows, self.mean, torch.ones(5), training=True)
        self.passing.data.mul_(0.9).add_(rows.sum(0))
        self.replaced = self.replaced + 1
        self.cache = torch.zeros(len(rows))


class Noting(nn.Module):
    """Lets a module see features that it does not call."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.statistics = statistics

    def forward(self, rows: Tensor) -> Tensor:
        """Return the features as they are, shape (n, 5)."""
        self.statistics.note(rows)
        return rows


def test_buffers_that_are_used_outside_calls_come_back() -> None:
    """By methods and functions, persistent or not, in place or anew; a cache that grew stays."""
    statistics = Statistics()
    model = Network(Noting(statistics))
    step, weighting = step_of(model), weighting_of(sgd()(model))
    for _ in range(2):  # the second finds the modules that the first has found
        before = {name: (b, b.clone()) for name, b in statistics.named_buffers()}
        weighting.before_step(step)
        for name, (buffer, value) in before.items():
            now = statistics.get_buffer(name)
            if name != "cache":
                assert now is buffer, name
                assert torch.equal(now, value), name
        assert statistics.cache.shape == (6,)
        model(batch_of(TRAIN))
    assert torch.equal(statistics.replaced, torch.full((5,), 3.0))


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_buffers_of_a_compiled_model_come_back() -> None:
    """A compiled module calls none of those inside."""
    model = Network(nn.BatchNorm1d(5))
    optimizer = sgd()(model)
    compiled = torch.compile(model, backend="aot_eager")
    weighting = AutoLambda(optimizer)
    balancer = Balancer(weighting, Sum(), tasks=TASKS, shared=model.trunk)
    for _ in range(2):
        balancer.backward(
            compiled(batch_of(TRAIN)), validation=lambda: compiled(batch_of(VALIDATE))
        )
    assert model.between.num_batches_tracked == 2


def test_modules_put_in_later_are_found() -> None:
    """With parameters of their own or without, also in a copy."""
    model = Network()
    weighting = weighting_of(sgd()(model))
    weighting.before_step(step_of(model))
    for between in (Noting(Statistics()), nn.Sequential(Noting(Statistics()), nn.Linear(5, 5))):
        model.between = between
        step = step_of(model)
        before = [b.clone() for n, b in model.named_buffers() if "cache" not in n]
        copy.deepcopy(weighting).before_step(step)
        weighting.before_step(step)
        now = [b for n, b in model.named_buffers() if "cache" not in n]
        assert_close(now, before, rtol=0, atol=0)


def test_batch_norm_uses_the_statistics_of_the_validation_batch() -> None:
    """In training mode as double backward has it, running means or not."""
    model = Network(nn.BatchNorm1d(5))
    optimizer = sgd()(model)
    derivative = weighting_of(optimizer).derivative(step_of(model))
    assert_close(derivative, by_double_backward(model, optimizer), rtol=1e-11, atol=1e-14)


def test_dropout_draws_from_a_stream_of_its_own() -> None:
    """Same seed, same masks, whatever the global generator does; the next step has other masks."""
    model = Network(nn.Dropout(0.5))
    optimizer = sgd()(model)
    step = step_of(model)
    first, second = weighting_of(optimizer, seed=4), weighting_of(optimizer, seed=4)
    one = first.derivative(step)
    torch.manual_seed(77)
    assert torch.equal(second.derivative(step), one)
    assert not torch.equal(first.derivative(step), one)
    assert not torch.equal(weighting_of(optimizer, seed=5).derivative(step), one)


def test_dropout_noise_averages_out_to_the_derivative() -> None:
    """The mean over masks is the derivative of the mean over masks (the theorem of exchange).

    Held against the mean of double backward with masks of its own: both means scatter by their
    standard errors, and differ by less than 6 of them.
    """
    model = Network(nn.Dropout(0.3))
    optimizer = sgd(lr=0.02)(model)
    torch.manual_seed(3)
    step = step_of(model)
    weighting = weighting_of(optimizer, primary=("a",))
    found = torch.stack([weighting.derivative(step) for _ in range(200)])

    named = dict(model.named_parameters())
    gradients = [
        sum(
            w * row[i] for w, row in zip(WEIGHTS, step.gradients, strict=True) if row[i] is not None
        )
        for i in range(len(step.parameters))
    ]
    after = [p.detach() - 0.02 * g for p, g in zip(step.parameters, gradients, strict=True)]
    drawn = []
    for _ in range(200):
        moved = {name: p.clone().requires_grad_() for name, p in zip(named, after, strict=True)}
        loss = functional_call(model, moved, (batch_of(VALIDATE),))["a"]
        slopes = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
        drawn.append(
            [
                -0.02
                * sum(
                    float((s * g).sum())
                    for s, g in zip(slopes, row, strict=True)
                    if s is not None and g is not None
                )
                for row in step.gradients
            ]
        )
    expected = torch.tensor(drawn)
    error = ((found.var(0) + expected.var(0)) / 200).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() <= 6 * error).all()


# --- Adam on the weights --------------------------------------------------------------------------


def feed(weighting: AutoLambda, slopes: Sequence[Tensor], monkeypatch) -> list[Tensor]:
    """Show the weighting these derivatives one after the other; return the weights after each."""
    after = []
    for slope in slopes:
        monkeypatch.setattr(weighting, "derivative", lambda step, slope=slope: slope)
        weighting.before_step(Step([], [], 1.0, None, **NOT_LOOKED_AT))
        after.append(weighting.lambdas.clone())
    return after


def random_slopes(count: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        on_device(torch.randn(3, generator=generator, device="cpu"))
        * 10.0 ** float(torch.randint(-6, 3, (), generator=generator, device="cpu"))
        for _ in range(count)
    ]


@pytest.mark.parametrize("lr", [1e-4, 0.1])
def test_weights_move_as_with_torch_adam(lr: float, monkeypatch) -> None:
    """Step by step, without weight decay, with PyTorch's own defaults."""
    weighting = weighting_of(sgd()(Network()), lr=lr)
    mirror = nn.Parameter(torch.tensor(WEIGHTS))
    adam = torch.optim.Adam([mirror], lr=lr)
    slopes = random_slopes()
    for found, slope in zip(feed(weighting, slopes, monkeypatch), slopes, strict=True):
        mirror.grad = slope.clone()
        adam.step()
        assert_close(found, mirror.detach(), rtol=1e-12, atol=1e-14)


def test_float32_weights_move_as_with_torch_adam(monkeypatch) -> None:
    """In the dtype that they have by default, to the rounding of that dtype."""
    weighting = weighting_of(sgd()(Network()), lr=0.1).float()
    mirror = nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float32))
    adam = torch.optim.Adam([mirror], lr=0.1)
    slopes = random_slopes()
    for found, slope in zip(feed(weighting, slopes, monkeypatch), slopes, strict=True):
        mirror.grad = slope.float()
        adam.step()
        assert_close(found, mirror.detach(), rtol=0, atol=1e-6)


def test_first_step_by_hand(monkeypatch) -> None:
    """Adam's first step is lr times the sign of the derivative (up to its 1e-8)."""
    weighting = AutoLambda(sgd()(Network()), lr=0.01, init=0.1).bind(TASKS)
    (found,) = feed(weighting, [torch.tensor([5.0, -1e-3, 0.0])], monkeypatch)
    assert_close(found, torch.tensor([0.09, 0.11, 0.1]), rtol=1e-6, atol=0)


def test_absent_tasks_keep_their_place_in_adam(monkeypatch) -> None:
    """Each weight is as far as its own steps: a mirror per task steps only when it is there."""
    weighting = weighting_of(sgd()(Network()), lr=0.1)
    mirrors = [nn.Parameter(torch.tensor([w])) for w in WEIGHTS]
    adams = [torch.optim.Adam([mirror], lr=0.1) for mirror in mirrors]
    plan = [[0, 1, 2], [2, 0], [1], [0, 1], [2, 1, 0]]
    for active, slope in zip(plan, random_slopes(5), strict=True):
        part = slope[: len(active)]
        with weighting.only(torch.tensor(active)):
            feed(weighting, [part], monkeypatch)
        for task, one in zip(active, part, strict=True):
            mirrors[task].grad = one.reshape(1)
            adams[task].step()
    assert_close(weighting.lambdas, torch.cat([mirror.detach() for mirror in mirrors]))
    assert weighting.steps.tolist() == [4, 4, 3]


def test_minimum_bounds_the_weights(monkeypatch) -> None:
    """A weight stays at the bound, and comes back from it as its derivative turns."""
    weighting = AutoLambda(sgd()(Network()), lr=0.06, init=0.1, minimum=0.0).bind(TASKS)
    down = torch.tensor([1.0, -1.0, 0.0])
    weights = feed(weighting, [down] * 5, monkeypatch)
    assert float(weights[-1][0]) == 0.0
    assert_close(weights[-1][1], torch.tensor(0.4))
    assert all((w >= 0).all() for w in weights)
    weights = feed(weighting, [-down] * 40, monkeypatch)
    assert float(weights[-1][0]) > 0.05


def test_without_a_minimum_weights_may_turn_negative(monkeypatch) -> None:
    """As in the authors' code."""
    weighting = AutoLambda(sgd()(Network()), lr=0.06, init=0.1).bind(TASKS)
    weights = feed(weighting, [torch.ones(3)] * 5, monkeypatch)
    assert_close(weights[-1], torch.full((3,), 0.1 - 5 * 0.06), rtol=1e-6, atol=0)


def test_a_step_moves_the_weights_against_the_derivative() -> None:
    """The whole of it: the first step is lr times the sign, from double backward."""
    model = Network()
    optimizer = sgd(momentum=0.9)(model)
    warm_up(model, optimizer)
    weighting = weighting_of(optimizer, lr=1e-3)
    weighting.before_step(step_of(model))
    sign = by_double_backward(model, optimizer).sign()
    assert_close(weighting.lambdas, torch.tensor(WEIGHTS) - 1e-3 * sign, rtol=0, atol=1e-8)
    losses = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(weighting(losses), weighting.lambdas * losses)


def test_in_evaluation_mode_nothing_moves() -> None:
    model = Network()
    weighting = weighting_of(sgd()(model), lr=1e-3)
    weighting.eval().before_step(step_of(model))
    assert torch.equal(weighting.lambdas, torch.tensor(WEIGHTS))
    weighting.train().before_step(step_of(model))
    assert not torch.equal(weighting.lambdas, torch.tensor(WEIGHTS))


def test_learns_to_ignore_noise_and_to_follow_help() -> None:
    """Task b's gradients are those of the primary task a, c's are opposite: b rises, c falls."""
    theta = nn.Parameter(torch.tensor([3.0]))
    weighting = AutoLambda(torch.optim.SGD([theta], lr=0.01), primary=("a",), lr=0.01).bind(TASKS)
    for _ in range(20):
        g = theta.detach() * 2
        weighting.before_step(
            Step(
                parameters=[theta],
                gradients=[[g], [g], [-g]],
                loss_scale=1.0,
                validation=lambda: {"a": theta.square().sum()},
                **NOT_LOOKED_AT,
            )
        )
    a, b, c = weighting.lambdas.tolist()
    assert a == b > 0.1 > c


# --- several optimizers, and one that comes later -------------------------------------------------


class Together:
    """What the oracle reads of one optimizer, of several."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.param_groups = [group for each in optimizers for group in each.param_groups]
        self.state = {p: kept for each in optimizers for p, kept in each.state.items()}


def sgd_and_adamw(model: Network) -> list[torch.optim.Optimizer]:
    """Return optimizers of different kinds; nobody holds the heads of tasks b and c."""
    return [
        torch.optim.AdamW([*model.heads["a"].parameters(), model.scale], lr=0.05, weight_decay=0.2),
        torch.optim.SGD(
            model.trunk.parameters(), lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1
        ),
    ]


def two_of_sgd(model: Network) -> list[torch.optim.Optimizer]:
    """Return the groups of ``two_groups``, an optimizer each; the heads come first."""
    trunk, heads = two_groups(model).param_groups
    return [torch.optim.SGD([heads]), torch.optim.SGD([trunk])]


def trained(model: Network, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for each in optimizers:
        warm_up(model, each)


def one_per_parameter(model: Network) -> list[torch.optim.Optimizer]:
    """Return what optimizers in the backward pass are."""
    return [
        torch.optim.SGD([p], lr=0.1 / (i + 1), momentum=0.5)
        for i, p in enumerate(model.parameters())
    ]


@pytest.mark.parametrize("make", [two_of_sgd, sgd_and_adamw, one_per_parameter])
@pytest.mark.parametrize("live", [False, True], ids=["first-step", "live-buffers"])
def test_several_optimizers_move_what_each_holds(make, live: bool) -> None:
    model = Network()
    optimizers = make(model)
    if live:
        trained(model, optimizers)
    derivative = weighting_of(optimizers).derivative(step_of(model))
    expected = by_double_backward(model, Together(optimizers))  # type: ignore[arg-type]
    assert_close(derivative, expected, rtol=1e-12, atol=1e-14)


def test_two_optimizers_are_one_with_two_groups() -> None:
    """Bit for bit, through a training in which momentum is alive."""
    found = []
    for several in (False, True):
        torch.manual_seed(0)
        model = Network()
        optimizers = two_of_sgd(model) if several else [two_groups(model)]
        weighting = AutoLambda(optimizers if several else optimizers[0], lr=0.05)
        balancer = Balancer(weighting, Sum(), tasks=TASKS, shared=model.trunk)
        for number in range(5):
            for each in optimizers:
                each.zero_grad()
            batch, held_out = batch_of(number), batch_of(20 + number)
            balancer.backward(model(batch), validation=functools.partial(model, held_out))
            for each in optimizers:
                each.step()
        found.append(snapshot(model, weighting))
    assert found[0] == found[1]
    assert (weighting.lambdas - 0.1).abs().min() > 0.01


def test_an_optimizer_that_is_assigned_later() -> None:
    """Before the first step, and anew between steps, as the one that was given at once."""
    model = Network()
    step = step_of(model)
    first, second = sgd(lr=0.1)(model), two_of_sgd(model)
    weighting = weighting_of(None)
    assert "optimizer=None" in repr(weighting)
    for optimizer in (first, second):
        weighting.optimizer = optimizer
        expected = weighting_of(optimizer).derivative(step)
        assert torch.equal(weighting.derivative(step), expected)
    assert weighting.optimizer == tuple(second)
    assert "optimizer=(SGD, SGD)" in repr(weighting)


def test_parameters_of_another_model_are_told_of_each_assigned_optimizer() -> None:
    model = Network()
    weighting = weighting_of(sgd()(model))
    weighting.before_step(step_of(model))
    weighting.optimizer = two_of_sgd(Network())
    with pytest.warns(UserWarning, match="holds none of them"):
        weighting.before_step(step_of(model))


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: WarmUp(w, epochs=1)], ids=["alone", "up"])
def test_an_optimizer_that_never_comes(wrap) -> None:
    """Told in the first step, also of a warm-up, and then it can be assigned; nothing is left."""
    model = Network()
    balancer = Balancer(wrap(AutoLambda(None)), Sum(), tasks=TASKS, shared=model.trunk)
    balancer.weighting(torch.ones(3))  # looks at no optimizer
    inner = getattr(balancer.weighting, "weighting", balancer.weighting)
    with pytest.raises(ValueError, match=r"but got None\. Assign it .*`balancer\.weighting\.opt"):
        balancer.backward(model(batch_of(TRAIN)), validation=lambda: model(batch_of(VALIDATE)))
    assert all(p.grad is None for p in model.parameters())
    inner.optimizer = sgd()(model)
    balancer.backward(model(batch_of(TRAIN)), validation=lambda: model(batch_of(VALIDATE)))
    assert inner.steps.tolist() == [1 if inner is balancer.weighting else 0] * 3


def test_a_weighting_on_its_own_without_an_optimizer() -> None:
    with pytest.raises(ValueError, match=r"`optimizer` of AutoLambda must be .* but got None"):
        weighting_of(None).before_step(step_of(Network()))


def test_a_parameter_in_two_optimizers() -> None:
    """Told when they are given, and in the step where it is added later."""
    model = Network()
    both = [*two_of_sgd(model), torch.optim.AdamW([model.scale])]
    words = r"a SGD and a AdamW hold the same one, of shape \(\)"
    with pytest.raises(ValueError, match=words):
        AutoLambda(both)
    weighting = weighting_of(both[:2])
    with pytest.raises(ValueError, match=words):
        weighting.optimizer = both
    assert weighting.optimizer == tuple(both[:2])
    both[1].add_param_group({"params": [model.scale]})
    with pytest.raises(ValueError, match=r"a SGD and a SGD hold the same one, of shape \(\)"):
        weighting.before_step(step_of(model))


FORMS: dict[str, Callable[[Network], Any]] = {
    "one": two_groups,
    "several": two_of_sgd,
    "none": lambda model: None,
}


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("loaded", FORMS)
def test_saved_state_loads_whatever_form_was_given(saved: str, loaded: str) -> None:
    """A weighting goes on from it as the one that was saved, once both have the same optimizers."""
    model = Network()
    start = weighting_of(FORMS[saved](model), lr=0.05)
    again = AutoLambda(FORMS[loaded](model), lr=0.05).bind(TASKS)
    start.optimizer = two_of_sgd(model)
    start.before_step(step_of(model))
    if saved == "none":
        start.optimizer = None
    again.load_state_dict(start.state_dict())
    again.optimizer = again.optimizer or two_of_sgd(model)
    start.optimizer = start.optimizer or two_of_sgd(model)
    for each in (start, again):
        each.before_step(step_of(model))
    assert snapshot(start) == snapshot(again)


def test_a_copy_has_a_copy_of_the_optimizers() -> None:
    """Of a model that is copied with them, as of one optimizer."""
    model = Network()
    weighting = weighting_of(two_of_sgd(model))
    model_too, weighting_too = copy.deepcopy((model, weighting))
    first = {id(p) for each in weighting_too.optimizer for p in each.param_groups[0]["params"]}
    assert first == {id(p) for p in model_too.parameters()}


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_validation_loss_leaves_the_weights(bad: float) -> None:
    """Counted, and warned of once: the documented substitute is to keep the weights."""
    model = Network()
    weighting = weighting_of(sgd()(model))
    before, parameters = snapshot(weighting)[:4], snapshot(model)

    def validation() -> dict[str, Tensor]:
        return {task: loss * bad for task, loss in model(batch_of(VALIDATE)).items()}

    step = step_of(model, validation=validation)
    with pytest.warns(RuntimeWarning, match="AutoLambda fell back: .* weights stay"):
        weighting.before_step(step)
    weighting.before_step(step)  # says nothing more
    assert weighting.fallbacks == 2
    assert snapshot(weighting)[:4] == before
    assert snapshot(model) == parameters


@pytest.mark.parametrize("size", [1e21, 1e39, -1e300])
def test_a_huge_derivative_leaves_adam_as_it_is(size: float, monkeypatch) -> None:
    """Its square is no float32: it is counted as one that is not finite, and the next one counts.

    By hand: after one ordinary derivative, the weights have moved by lr times its sign.
    """
    weighting = AutoLambda(sgd()(Network()), lr=0.01).bind(TASKS).float()
    huge, ordinary = torch.tensor([1.0, size, 1.0]), torch.tensor([1.0, -2.0, 3.0])
    with pytest.warns(RuntimeWarning, match="too large to be squared in Adam: weights stay"):
        feed(weighting, [huge], monkeypatch)
    assert weighting.fallbacks == 1
    assert not weighting.steps.any()
    (found,) = feed(weighting, [ordinary], monkeypatch)
    expected = torch.tensor([0.09, 0.11, 0.09], dtype=torch.float32)
    assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_state_that_was_infinite_starts_again(monkeypatch) -> None:
    """As versions saved it that squared derivatives of any size; other tasks go on."""
    weighting = weighting_of(sgd()(Network()), lr=0.01)
    feed(weighting, random_slopes(3), monkeypatch)
    saved = copy.deepcopy(weighting.state_dict())
    saved["exp_avg_sq"][1] = math.inf
    weighting.load_state_dict(saved)
    assert weighting.steps.tolist() == [3, 0, 3]
    AutoLambda(weighting.optimizer).load_state_dict({}, strict=False)  # of nothing, no error
    assert weighting.exp_avg_sq[1] == weighting.exp_avg[1] == 0
    before = weighting.lambdas[1].clone()
    found = feed(weighting, [torch.full((3,), 2.0)], monkeypatch)[0]
    assert_close(found[1], before - 0.01)


@pytest.mark.parametrize("groups", [{}, {"lr": None}], ids=["no-lr", "lr-is-None"])
def test_refuses_an_optimizer_without_a_learning_rate(groups: dict[str, None]) -> None:
    """As one that takes its rate from elsewhere (Adafactor with relative steps)."""
    model = Network()

    class Relative(torch.optim.Optimizer):
        pass

    optimizer = Relative(model.parameters(), dict(groups))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"`optimizer` must have a learning rate .* got None"):
        weighting_of(optimizer).before_step(step_of(model))
    assert snapshot(model) == before


def test_settings_of_an_optimizer_that_are_none_are_zero() -> None:
    model = Network()
    optimizer = sgd()(model)
    expected = weighting_of(optimizer).derivative(step_of(model))
    optimizer.param_groups[0].update(momentum=None, weight_decay=None, dampening=None)
    assert torch.equal(weighting_of(optimizer).derivative(step_of(model)), expected)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (
            [1.0],
            TypeError,
            "`validation` must return a mapping from task name to loss, but got list",
        ),
        ({"d": 1.0}, ValueError, "`validation` must name tasks among 'a', 'b', 'c', but got 'd'"),
        ({}, ValueError, "`validation` must return the loss of at least one primary task"),
    ],
)
def test_refuses_what_is_no_validation_loss(returned, error, words: str) -> None:
    model = Network()
    with pytest.raises(error, match=words):
        weighting_of(sgd()(model)).before_step(step_of(model, validation=lambda: returned))


def test_refuses_wrong_settings() -> None:
    optimizer = sgd()(Network())
    with pytest.raises(TypeError, match=r"`optimizer` must be the torch\.optim\.Optimizer"):
        AutoLambda(Network())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="but got list with Network in it"):
        AutoLambda([optimizer, Network()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="or None to assign it later, but got function"):
        AutoLambda(lambda: optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`optimizer` must hold at least one optimizer, but got"):
        AutoLambda([])
    weighting = AutoLambda(optimizer)
    with pytest.raises(TypeError, match="but got Network"):
        weighting.optimizer = Network()  # type: ignore[assignment]
    assert weighting.optimizer is optimizer
    with pytest.raises(TypeError, match="`primary` must be a sequence of names, but got 'a'"):
        AutoLambda(optimizer, primary="a")
    with pytest.raises(ValueError, match="`primary` must name at least one task, but got none"):
        AutoLambda(optimizer, primary=())
    with pytest.raises(ValueError, match="`init` must be at least `minimum`"):
        AutoLambda(optimizer, init=-0.1, minimum=0)
    with pytest.raises(ValueError, match="`lr` must be at least 0, but got -1"):
        AutoLambda(optimizer, lr=-1)
    with pytest.raises(ValueError, match="`primary` must name tasks among 'a', 'b', 'c'"):
        AutoLambda(optimizer, primary=("d",)).bind(TASKS)
