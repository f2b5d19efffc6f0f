"""What users do around a step, as docs/recipes.md shows it, against loops written out by hand."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from docs.make.stamps import blocks_of
from mtbalance import Balancer, GradientStrategy, with_tasks
from mtbalance.gradient import CAGrad, PCGrad, Sum
from mtbalance.weighting import Equal, Uncertainty
from tests._networks import TASKS, Network, batch, raw_rows
from tests.test_docs import ROOT

STRATEGIES = pytest.mark.parametrize("make", [Sum, CAGrad, lambda: PCGrad(order="fixed")])
Make = Callable[[], GradientStrategy]
Losses = Callable[[], dict[str, Tensor]]


def by_hand(model: Network, strategy: GradientStrategy, losses: dict[str, Tensor]) -> None:
    """Set ``.grad``: the strategy's direction for what is shared, and sums for the heads."""
    for parameters, combine in (
        ([p for p in model.trunk.parameters() if p.requires_grad], strategy),
        (list(model.heads.parameters()), lambda rows: rows.sum(0)),
    ):
        direction = combine(raw_rows(losses, parameters))
        parts = direction.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape)


def pair() -> tuple[Network, Network]:
    torch.manual_seed(0)
    model = Network()
    return model, copy.deepcopy(model)


def balancer_of(model: Network, strategy: GradientStrategy, **options: Any) -> Balancer:
    return Balancer(Equal(), strategy, tasks=TASKS, **{"shared": model.trunk, **options})


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(one, two, rtol=1e-10, atol=1e-12, msg=name)


@STRATEGIES
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_optimizer_with_a_closure(make: Make, search: str | None) -> None:
    """LBFGS asks for losses and gradients as often as it likes."""
    model, other = pair()
    balancer, strategy = balancer_of(model, make()), make()

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = model.losses(batch())
        balancer.backward(losses)
        return torch.stack([*losses.values()]).sum().detach()

    def closure_by_hand() -> Tensor:
        losses = other.losses(batch())
        by_hand(other, strategy, losses)
        return torch.stack([*losses.values()]).sum().detach()

    options: dict[str, Any] = {"lr": 0.1, "max_iter": 4, "line_search_fn": search}
    optimizer = torch.optim.LBFGS(model.parameters(), **options)
    slow = torch.optim.LBFGS(other.parameters(), **options)
    for _ in range(2):
        optimizer.step(closure)
        slow.step(closure_by_hand)
    assert_alike(model, other)
    calls = [state["func_evals"] for state in optimizer.state.values() if "func_evals" in state]
    assert balancer.end_epoch().steps == calls[0] >= 4


def climb(model: nn.Module) -> list[Tensor]:
    """Go up by a fixed length along ``.grad``, and return by how much."""
    found = [p for p in model.parameters() if p.grad is not None]
    length = torch.stack([p.grad.norm() for p in found]).norm()
    steps = [0.05 / length * p.grad for p in found]
    with torch.no_grad():
        for parameter, step in zip(found, steps, strict=True):
            parameter.add_(step)
    return steps


def descend(model: nn.Module, steps: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, step in zip(model.parameters(), steps, strict=True):
            parameter.sub_(step)


@STRATEGIES
def test_a_sharpness_aware_step(make: Make) -> None:
    """Balanced twice: where the parameters are, and where the balanced direction leads up to."""
    model, other = pair()
    balancer, strategy = balancer_of(model, make()), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    slow = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        balancer.backward(model.losses(batch(seed=seed)))
        steps = climb(model)
        optimizer.zero_grad()
        balancer.backward(model.losses(batch(seed=seed)))
        descend(model, steps)
        optimizer.step()
        by_hand(other, strategy, other.losses(batch(seed=seed)))
        steps = climb(other)
        by_hand(other, strategy, other.losses(batch(seed=seed)))
        descend(other, steps)
        slow.step()
    assert_alike(model, other)


@STRATEGIES
def test_clipping_by_hooks(make: Make) -> None:
    """Hooks on accumulated gradients clip what the optimizer gets, not the rows."""
    model, other = pair()
    balancer = balancer_of(model, make())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-0.5, 0.5))
    balancer.backward(model.losses(batch()))
    by_hand(other, make(), other.losses(batch()))
    clipped = 0
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(parameter.grad, twin.grad.clamp(-0.5, 0.5), rtol=1e-10, atol=1e-12)
        clipped += int((twin.grad.abs() > 0.5).sum())
    assert clipped > 0


def test_several_optimizers() -> None:
    """Each has its part of the parameters: what one optimizer with groups does, bit for bit."""
    model, other = pair()
    weightings = Uncertainty(), Uncertainty()
    balancers = [
        Balancer(weighting, CAGrad(), tasks=TASKS, shared=each.trunk)
        for weighting, each in zip(weightings, (model, other), strict=True)
    ]
    parts = [
        [each.trunk.parameters(), each.heads.parameters(), balancer.parameters()]
        for each, balancer in zip((model, other), balancers, strict=True)
    ]
    rates = (0.05, 0.02, 0.5)
    several = [
        torch.optim.SGD(part, lr=rate, momentum=0.9)
        for part, rate in zip(parts[0], rates, strict=True)
    ]
    one = torch.optim.SGD(
        [{"params": part, "lr": rate} for part, rate in zip(parts[1], rates, strict=True)],
        momentum=0.9,
    )
    for seed in range(3):
        for optimizer in (*several, one):
            optimizer.zero_grad()
        for each, balancer in zip((model, other), balancers, strict=True):
            balancer.backward(each.losses(batch(seed=seed)))
        for optimizer in (*several, one):
            optimizer.step()
    for first, second in zip(
        [*model.parameters(), *balancers[0].parameters()],
        [*other.parameters(), *balancers[1].parameters()],
        strict=True,
    ):
        assert torch.equal(first, second)


@STRATEGIES
@pytest.mark.parametrize("inferred", [False, True])
def test_unfreezing(make: Make, inferred: bool) -> None:
    """A layer is balanced from the first step on in which it requires a gradient."""
    model, other = pair()
    options = {"shared": None} if inferred else {}
    balancer, strategy = balancer_of(model, make(), **options), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    slow = torch.optim.SGD(other.parameters(), lr=0.05)
    start = model.trunk[0].weight.clone()
    for each in (model, other):
        each.trunk[0].requires_grad_(False)
    for seed in range(4):
        if seed == 2:
            assert torch.equal(model.trunk[0].weight, start)
            for each in (model, other):
                each.trunk[0].requires_grad_(True)
        optimizer.zero_grad()
        balancer.backward(model.losses(batch(seed=seed)))
        by_hand(other, strategy, other.losses(batch(seed=seed)))
        optimizer.step()
        slow.step()
    assert_alike(model, other)
    assert not torch.equal(model.trunk[0].weight, start)


class Field(nn.Module):
    """u(x), which is to solve u'' = -u with u(0) = 0 and u'(0) = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.out = nn.Linear(5, 1)
        self.double()

    def derivatives(self, x: Tensor) -> Iterator[Tensor]:
        """Yield u and its derivatives, each of whose graphs leads to the parameters."""
        value = self.out(self.net(x))
        while True:
            yield value
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)

    def losses(self) -> dict[str, Tensor]:
        x = torch.linspace(0, 3, 16, dtype=torch.float64)[:, None].requires_grad_()
        u, _, bent = (d for d, _ in zip(self.derivatives(x), range(3), strict=False))
        zero = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        start, slope = (d for d, _ in zip(self.derivatives(zero), range(2), strict=False))
        return {
            "equation": (bent + u).square().mean(),
            "start": start.square().mean(),
            "slope": (slope - 1).square().mean(),
        }


@STRATEGIES
@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"shared": None}], ids=str)
def test_second_derivatives_in_a_loss(make: Make, options: dict[str, Any]) -> None:
    """Residuals of a differential equation, whose gradients are derivatives of the third kind."""
    torch.manual_seed(0)
    field = Field()
    parameters = list(field.parameters())
    strategy = make()
    balancer = Balancer(
        Equal(), make(), tasks=("equation", "start", "slope"), **{"shared": field, **options}
    )
    for _ in range(3):
        rows = raw_rows(field.losses(), parameters)
        direction = strategy(rows).split([p.numel() for p in parameters])
        field.zero_grad()
        record = balancer.backward(field.losses())
        assert record.fallbacks == 0
        for parameter, part in zip(parameters, direction, strict=True):
            expected = part.reshape(parameter.shape)
            assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(parameter.grad, alpha=0.01)


def test_a_task_that_comes_later() -> None:
    """Named from the start and left out until then, it changes nothing for the others."""
    model, other = pair()
    waiting = balancer_of(model, CAGrad())
    without = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=other.trunk)
    for each, balancer in ((model, waiting), (other, without)):
        losses = each.losses(batch())
        balancer.backward({task: losses[task] for task in ("a", "b")})
    for one, two in zip(model.trunk.parameters(), other.trunk.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert waiting.backward(model.losses(batch())).tasks == TASKS


def test_micro_batches_with_unequal_numbers_of_labels() -> None:
    """Sums over the number of labels in the whole batch are the whole batch."""
    torch.manual_seed(0)
    run: dict[str, Any] = {}
    first, recipe, *_ = blocks_of(ROOT / "docs" / "recipes.md")
    exec(first, run)  # noqa: S102
    trunk, heads, x, y, balancer = (run[n] for n in ("trunk", "heads", "x", "y", "balancer"))
    balancer.backward(run["losses"]())
    whole = [p.grad.clone() for p in run["model"].parameters()]
    exec(recipe.partition("optimizer.step()")[0], run)  # noqa: S102
    for p, grad in zip(run["model"].parameters(), whole, strict=True):
        assert_close(p.grad, grad)

    run["model"].zero_grad()
    known = {"price": torch.arange(32) % 5 < 2, "stars": torch.arange(32) < 11}
    labels = {task: int(rows.sum()) for task, rows in known.items()}
    h = trunk(x)
    parts = {task: (heads[task](h) - y[task]).square()[known[task]] for task in known}
    balancer.backward({task: part.mean() for task, part in parts.items()})
    whole = [p.grad.clone() for p in run["model"].parameters()]
    run["model"].zero_grad()
    for rows in torch.arange(32).split(8):
        h = trunk(x[rows])
        parts = {t: (heads[t](h) - y[t][rows]).square()[known[t][rows]] for t in known}
        balancer.accumulate({t: part.sum() / labels[t] for t, part in parts.items() if len(part)})
    balancer.apply()
    for p, grad in zip(run["model"].parameters(), whole, strict=True):
        assert_close(p.grad, grad)


def test_an_optimizer_saved_before_a_task_came_and_one_went() -> None:
    """Against one that was never saved, and forgot what it knew of what is gone."""
    torch.manual_seed(0)
    blocks = blocks_of(ROOT / "docs" / "recipes.md")
    (recipe,) = (block for block in blocks if "def optimizer_with_tasks" in block)
    run: dict[str, Any] = {"with_tasks": with_tasks}
    for block in (blocks[0], recipe):
        exec(block, run)  # noqa: S102
    after, new, optimizer, trunk, x = (run[n] for n in ("after", "new", "optimizer", "trunk", "x"))

    twin, twins = copy.deepcopy((after, new))
    other = run["make_optimizer"](twin, twins)
    moments = {
        name: run["checkpoint"]["optimizer"]["state"][n] for n, name in enumerate(run["names"])
    }
    assert set(moments) == {*dict(run["before"].named_parameters()), "balancer.weighting.log_var"}
    for name, parameter in twin.named_parameters():
        if "returns" not in name:
            other.state[parameter] = copy.deepcopy(moments[name])
    assert len(other.state) == len(list(trunk.parameters())) + 2
    for model, balancer, each in ((after, new, optimizer), (twin, twins, other)):
        for _ in range(2):
            each.zero_grad()
            h = model["trunk"](x)
            losses = {task: head(h).square().mean() for task, head in model["heads"].items()}
            balancer.backward(losses)
            each.step()
    assert_alike(after, twin)
    assert_alike(new, twins)

    saved = copy.deepcopy(run["checkpoint"]["optimizer"])
    saved["param_groups"][0]["lr"], saved["param_groups"][1]["lr"] = 0.5, 0.25
    carried = run["optimizer_with_tasks"](saved, run["names"], optimizer, after, new)
    optimizer.load_state_dict(carried)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
