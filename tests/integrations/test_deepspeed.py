"""Engines of DeepSpeed, of which a class of the same name stands in here."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mtbalance import Balancer
from mtbalance.gradient import PCGrad, Sum
from mtbalance.weighting import Equal, Uncertainty
from tests._networks import TASKS, Network, batch


@pytest.fixture
def engine_class(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    def init(self: nn.Module, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self: nn.Module, rows: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.module.losses(rows)
        return losses

    name = "deepspeed.runtime.engine"
    members = {"__init__": init, "forward": forward, "__module__": name}
    kind = type("DeepSpeedEngine", (nn.Module,), members)
    for each in ("deepspeed", "deepspeed.runtime", name):
        monkeypatch.setitem(sys.modules, each, ModuleType(each))
    return kind


REFUSED = r"not be those of a DeepSpeed engine, but .* belong to a \w+Engine: .*fully_shard"


def test_an_engine_as_what_is_shared(engine_class: type[nn.Module]) -> None:
    engine = engine_class(Network())
    pipeline = type("PipelineEngine", (engine_class,), {})  # of another module, such as a user's
    for shared in (engine, [engine], {"all": engine}, pipeline(Network())):
        with pytest.raises(TypeError, match=REFUSED):
            Balancer(Equal(), PCGrad(), tasks=TASKS, shared=shared)


@pytest.mark.parametrize("strategy", [PCGrad, Sum])
@pytest.mark.parametrize("inferred", [False, True])
def test_an_engine_around_what_is_shared(
    engine_class: type[nn.Module], strategy: type, inferred: bool
) -> None:
    """It may come later than the Balancer, but not later than the first step."""
    model = Network()
    shared = None if inferred else model.trunk
    balancer = Balancer(Equal(), strategy(), tasks=TASKS, shared=shared)
    engine = engine_class(model)
    for _ in range(2):  # also where the first error was caught
        with pytest.raises(TypeError, match=REFUSED):
            balancer.backward(engine(batch()))
    with pytest.raises(TypeError, match=REFUSED):
        Balancer(Equal(), strategy(), tasks=TASKS).accumulate(engine(batch()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_engine_of_another_model_is_nobodys_business(engine_class: type[nn.Module]) -> None:
    engine, model = engine_class(Network()), Network()
    Balancer(Equal(), PCGrad(), tasks=TASKS).backward(model.losses(batch()))
    assert engine.module.trunk[0].weight.grad is None


def test_what_the_error_says_to_do() -> None:
    """Weighing the losses gives what a Balancer with Sum gives."""
    model, weighting = Network(), Uncertainty().bind(TASKS)
    losses = model.losses(batch())
    weighting(torch.stack([*losses.values()])).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    Balancer(Uncertainty(), Sum(), tasks=TASKS).backward(model.losses(batch()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
