"""Hooks on accumulated gradients: once per step, with the final gradient, for every strategy."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtbalance import PAPER_COMBINATIONS, Balancer, make_balancer
from mtbalance.gradient import CAGrad, PCGrad, Sum
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch

Calls = list[tuple[int, Tensor]]


def watched(parameters: Iterable[Tensor]) -> Calls:
    """Return a list of the calls of hooks: the parameter's number, and a copy of its gradient."""
    calls: Calls = []
    for number, parameter in enumerate(parameters):

        def note(p: Tensor, number: int = number) -> None:
            assert not torch.is_grad_enabled()
            assert p.grad is not None
            calls.append((number, p.grad.clone()))

        parameter.register_post_accumulate_grad_hook(note)
    return calls


def assert_once_and_final(calls: Calls, parameters: list[nn.Parameter]) -> None:
    found = dict(calls)
    assert len(found) == len(calls), "once each"
    reached = {number for number, p in enumerate(parameters) if p.grad is not None}
    assert found.keys() == reached
    for number, gradient in calls:
        assert torch.equal(gradient, parameters[number].grad)


def of(model: Network, name: str, **options: Any) -> tuple[Balancer, list[nn.Parameter]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options.setdefault("shared", model.trunk)
    balancer = make_balancer(name, tasks=TASKS, optimizer=optimizer, **options)
    return balancer, [*model.parameters(), *balancer.parameters()]


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
@pytest.mark.parametrize("earlier", [False, True])
def test_once_with_the_final_gradient(name: str, earlier: bool) -> None:
    model = Network()
    balancer, parameters = of(model, name)
    if earlier:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    calls = watched(parameters)
    held_out = batch(seed=9)
    balancer.backward(model.losses(batch()), validation=lambda: model.losses(held_out))
    assert len(calls) == len(parameters)
    assert_once_and_final(calls, parameters)


@pytest.mark.parametrize("name", ["naive", "uncert+pcgrad", "dwa+cagrad", "equal+graddrop"])
@pytest.mark.parametrize("way", ["every", "features", "accumulate", "chunk", "groups"])
def test_once_whatever_the_passes(name: str, way: str) -> None:
    if way == "every" and "cagrad" not in name:
        pytest.skip("keeps the weights of a Gramian strategy")
    model = Network()
    options: dict[str, Any] = {"every": {"every": 2}, "chunk": {"chunk": 2}}.get(way, {})
    if way == "groups":
        options = {"shared": {"first": model.trunk[0], "last": model.trunk[3]}}
    balancer, parameters = of(model, name, **options)
    calls = watched(parameters)
    for step in range(3):
        calls.clear()
        model.zero_grad()
        balancer.zero_grad()
        if way == "accumulate":
            for seed in range(2):
                balancer.accumulate(model.losses(batch(seed=seed)))
            assert calls == []
            balancer.apply()
        elif way == "features":
            h = model.trunk(batch())
            losses = {t: head(h).square().mean() for t, head in model.heads.items()}
            balancer.backward(losses, features=h)
        else:
            record = balancer.backward(model.losses(batch(seed=step)))
            assert record.reused == (way == "every" and step == 1)
        assert len(calls) == len(parameters)
        assert_once_and_final(calls, parameters)


def test_what_is_not_reached_has_none() -> None:
    model = Network()
    balancer, parameters = of(model, "equal+pcgrad")
    calls = watched(parameters)
    losses = model.losses(batch())
    del losses["b"]
    balancer.backward(losses)
    assert len(calls) == len(parameters) - 2
    assert_once_and_final(calls, parameters)


# --- steps that write nothing -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Sum, PCGrad, CAGrad])
@pytest.mark.parametrize("bad", ["loss", "gradient", "below the features"])
@pytest.mark.parametrize("policy", ["skip", "drop", "raise"])
def test_none_in_a_step_that_writes_nothing(strategy, bad: str, policy: str) -> None:
    w = nn.Parameter(torch.zeros(3))
    h = w.sqrt() if bad == "below the features" else w * 1.0
    factor = {"loss": torch.nan, "gradient": 0.0}.get(bad, 1.0)
    inner = h.square().sum().sqrt() if bad == "gradient" else h.sum()
    losses = {"a": inner + h.sum() + factor, "b": (h - 1).square().sum()}
    if policy == "drop":  # all of them, so that none is left
        losses = {"a": losses["a"]}
    balancer = Balancer(Equal(), strategy(), tasks=("a", "b"), shared=[w], nonfinite=policy)
    calls = watched([w])
    features = h if bad == "below the features" else None
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            balancer.backward(losses, features=features)
    else:
        balancer.backward(losses, features=features)
    assert calls == []
    assert w.grad is None
    h = w * 2
    balancer.backward({"a": h.sum(), "b": h.square().sum()})  # hooks are as they were
    assert len(calls) == 1


def test_none_after_an_error_in_a_backward_pass() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("broken on purpose")

    for strategy in (Sum(), PCGrad()):
        w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[w])
        calls = watched([w, v])
        with pytest.raises(RuntimeError, match="on purpose"):
            balancer.backward({"a": (w * v).sum(), "b": Broken.apply(w).sum()})
        assert calls == []
        balancer.backward({"a": (w * v).sum(), "b": w.sum()})
        assert len(calls) == 2


def test_those_that_are_removed_or_come_later() -> None:
    w = nn.Parameter(torch.ones(2))
    balancer = Balancer(Equal(), Sum(), tasks=("a", "b"), shared=[w])
    found: list[str] = []
    first = w.register_post_accumulate_grad_hook(lambda _: found.append("first"))

    def once(_: Tensor) -> None:
        found.append("once")
        handle.remove()

    handle = w.register_post_accumulate_grad_hook(once)
    balancer.backward({"a": w.sum(), "b": w.sum()})
    assert found == ["first", "once"]
    first.remove()
    w.register_post_accumulate_grad_hook(lambda _: found.append("last"))
    balancer.backward({"a": w.sum(), "b": w.sum()})
    assert found == ["first", "once", "last"]


# --- an optimizer in the backward pass --------------------------------------------------------


@pytest.mark.parametrize("name", PAPER_COMBINATIONS)
def test_an_optimizer_in_the_backward_pass_trains_as_one_after_it(name: str) -> None:
    def trained(*, inside: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Network()
        balancer, parameters = of(model, name)
        optimizers = {p: torch.optim.SGD([p], lr=0.05, momentum=0.9) for p in parameters}

        def step(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        if inside:
            for p in parameters:
                p.register_post_accumulate_grad_hook(step)
        for seed in range(4):
            held_out = batch(seed=100 + seed)
            balancer.backward(
                model.losses(batch(seed=seed)),
                validation=lambda rows=held_out: model.losses(rows),
            )
            if not inside:
                for p in parameters:
                    step(p)
            if seed == 1:
                balancer.end_epoch()
        return [p.detach() for p in parameters]

    for a, b in zip(trained(inside=True), trained(inside=False), strict=True):
        assert torch.equal(a, b)


def test_plain_tensor_hooks_see_the_rows_of_single_tasks() -> None:
    """What docs/how-it-works.md says of `Tensor.register_hook`."""
    for strategy, expected in ((Sum(), [3.0]), (PCGrad(), [1.0, 2.0])):
        w = nn.Parameter(torch.ones(()))
        seen: list[float] = []
        w.register_hook(lambda g, seen=seen: seen.append(float(g)))
        balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[w])
        balancer.backward({"a": 1 * w, "b": 2 * w})
        assert seen == expected
