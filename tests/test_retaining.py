"""Graphs that last beyond a step, for another Balancer: ``retain_graph=True``."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer, GradientStrategy
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch, gradients

CASES: dict[str, tuple[type[GradientStrategy], dict[str, Any], str]] = {
    "one pass": (Sum, {}, "backward"),
    "one pass per task": (CAGrad, {}, "backward"),
    "blocks of columns": (GradDrop, {}, "backward"),
    "batched passes": (CAGrad, {"chunk": 2}, "backward"),
    "all tasks in one pass": (CAGrad, {"chunk": 3}, "backward"),
    "kept weights": (CAGrad, {"every": 3}, "backward"),
    "at features": (PCGrad, {}, "features"),
    "one pass at features": (Sum, {}, "features"),
    "micro-batches": (CAGrad, {}, "accumulate"),
    "batched micro-batches": (CAGrad, {"chunk": 3}, "accumulate"),
    "a micro-batch and the rest": (CAGrad, {}, "mixed"),
    "one of two groups": (CAGrad, {"shared": "groups"}, "backward"),
}


def take(balancer: Balancer, way: str, losses: dict[str, Tensor], h: Tensor, retain: bool) -> None:
    if way == "features":
        balancer.backward(losses, features=h, retain_graph=retain)
    elif way == "backward":
        balancer.backward(losses, retain_graph=retain)
    else:
        balancer.accumulate(losses, retain_graph=True)
        if way == "mixed":
            balancer.backward(losses, retain_graph=retain)
        else:
            balancer.accumulate(losses, retain_graph=retain)
            balancer.apply()


def train(case: str, once: bool) -> list[dict[str, Tensor | None]]:
    """Take three steps with two Balancers, on one forward pass or on one each."""
    strategy, options, way = CASES[case]
    torch.manual_seed(0)
    model = Network()
    shared: Any = model.trunk
    if options.get("shared"):
        shared = {"below": model.trunk[0], "above": model.trunk[3]}
    options = {**options, "shared": shared}
    first = Balancer(Equal(), strategy(), tasks=TASKS, **options)
    second = Balancer(Equal(), PCGrad(order="fixed"), tasks=TASKS, shared=model.trunk)
    found = []
    for seed in range(3):

        def forward(seed: int = seed) -> tuple[dict[str, Tensor], Tensor]:
            rows = batch(seed=seed)
            h = model.trunk(rows)
            targets = [rows.sum(1, keepdim=True) * (-2.0) ** number for number in range(3)]
            heads = zip(model.heads.items(), targets, strict=True)
            return {task: (head(h) - t).square().mean() for (task, head), t in heads}, h

        model.zero_grad()
        losses, h = forward()
        take(first, way, losses, h, True)
        if not once:
            losses, h = forward()
        second.backward(losses)
        found.append(gradients(model))
        with pytest.raises(RuntimeError, match="second time"):  # the last one has let go of it
            losses["c"].backward()
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_balancers_on_one_forward_pass(case: str) -> None:
    for once, twice in zip(train(case, True), train(case, False), strict=True):
        assert once.keys() == twice.keys()
        for name, gradient in once.items():
            assert_close(gradient, twice[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if "micro" not in case])
def test_the_default_lets_go(case: str) -> None:
    strategy, options, way = CASES[case]
    options = {name: value for name, value in options.items() if name != "shared"}
    model = Network()
    balancer = Balancer(Equal(), strategy(), tasks=TASKS, shared=model.trunk, **options)
    h = model.trunk(batch())
    losses = {task: head(h).square().mean() for task, head in model.heads.items()}
    take(balancer, way, losses, h, False)
    with pytest.raises(RuntimeError, match="second time"):
        losses["a"].backward()


def test_disjoint_tasks_of_one_network() -> None:
    """Each Balancer has tasks of its own; the trunk gets both directions."""
    model = Network()
    apart = copy.deepcopy(model)
    halves = (("a", "b"), ("c",))
    for each, once in ((model, True), (apart, False)):
        losses = each.losses(batch())
        for tasks in halves:
            balancer = Balancer(Equal(), PCGrad(), tasks=tasks, shared=each.trunk)
            if not once:
                losses = each.losses(batch())
            balancer.backward({task: losses[task] for task in tasks}, retain_graph=once)
    for name, gradient in gradients(model).items():
        assert_close(gradient, gradients(apart)[name], rtol=1e-12, atol=1e-12)
