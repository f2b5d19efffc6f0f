"""Loops that run, but do not do what was meant, are told in one warning; usual ones in none."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mtbalance import Balancer
from mtbalance._watch import _LONG_EPOCH
from mtbalance.gradient import CAGrad, Sum
from mtbalance.weighting import DWA, AutoLambda, Equal, Uncertainty, Weighting
from tests._networks import TASKS, Network, batch


@contextmanager
def told(words: str | None) -> Iterator[None]:
    """Expect exactly one warning, which holds these words, or none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (words is not None)
    assert words is None or re.search(words, messages[0])


# --- epochs --------------------------------------------------------------------------------------


def after_steps(steps: int, weighting: Weighting, tasks: tuple[str, ...] = ("a", "b")) -> Balancer:
    """Return a Balancer that has counted so many steps of an epoch, and takes three more."""
    balancer = Balancer(weighting, Sum(), tasks=tasks)
    balancer._epoch.steps = steps
    x = nn.Parameter(torch.ones(2))
    for _ in range(3):
        balancer.backward({task: (x * number).sum() for number, task in enumerate(tasks, 1)})
    return balancer


WAITS = r"DWA weighs all tasks alike until epochs have ended, but 3,00. steps .* end_epoch\(\)\. "


@pytest.mark.parametrize("steps", [_LONG_EPOCH - 3, _LONG_EPOCH - 1, _LONG_EPOCH])
def test_epochs_that_never_end(steps: int) -> None:
    with told(WAITS):
        balancer = after_steps(steps, DWA())
    with told(None):  # once
        balancer.backward({"a": (x := nn.Parameter(torch.ones(2))).sum(), "b": x.sum()})


class HasTwoEpochs(DWA):
    """Comes from a run whose first epochs have ended."""

    def setup(self) -> None:
        super().setup()
        for losses in ((1.0, 1.0), (1.0, 0.5)):
            self.mean.copy_(torch.tensor(losses))
            self.count.fill_(1)
            self.end_epoch()


def test_epochs_that_end_or_that_nobody_waits_for() -> None:
    with told(None):
        after_steps(_LONG_EPOCH - 4, DWA())
        after_steps(_LONG_EPOCH, Equal())
        after_steps(_LONG_EPOCH, Uncertainty())
        after_steps(_LONG_EPOCH, DWA(), ("a",))
        after_steps(_LONG_EPOCH, HasTwoEpochs())
        balancer = after_steps(0, DWA())
        balancer.end_epoch()
        balancer._epoch.steps = _LONG_EPOCH
        balancer.backward({"a": (x := nn.Parameter(torch.ones(2))).sum(), "b": x.sum()})


def test_what_is_left_over_when_an_epoch_ends() -> None:
    model = Network()
    balancer = Balancer(DWA(), CAGrad(), tasks=TASKS, shared=model.trunk)

    def epoch(micro_batches: int) -> None:
        for number in range(1, micro_batches + 1):
            balancer.accumulate(model.losses(batch(seed=number)))
            if number % 2 == 0:
                balancer.apply()
        balancer.end_epoch()

    with told(None):
        epoch(4)
    with told(r"accumulated, but not applied: they join the first step of the next\. Call"):
        epoch(5)
    with told(None):  # once
        epoch(4)


# --- the wrong thing given -----------------------------------------------------------------------


def auto_lambda(held: list[nn.Parameter], model: Network, lr: float = 0.1) -> None:
    weighting = AutoLambda(torch.optim.SGD(held, lr=lr, momentum=0.9))
    balancer = Balancer(weighting, CAGrad(), tasks=TASKS, shared=model.trunk)
    for seed in range(2):
        balancer.backward(
            model.losses(batch(seed=seed)), validation=lambda: model.losses(batch(seed=9))
        )


def test_the_optimizer_of_another_model() -> None:
    model = Network()
    with told("AutoLambda must hold the parameters that the losses reach, but holds none"):
        auto_lambda(list(Network().parameters()), model)
    with told(None):
        auto_lambda(list(model.parameters()), model)
        auto_lambda(list(model.trunk.parameters()), model)  # the heads have one of their own
        auto_lambda(list(model.parameters()), model, lr=0.0)  # a warm-up begins


def test_a_group_for_each_parameter() -> None:
    model = Network()
    named = dict(model.trunk.named_parameters())
    with told("makes 4 groups of one parameter each, .* Give the Sequential"):
        Balancer(Equal(), CAGrad(), tasks=TASKS, shared=named)
    named = dict(model.trunk[0].named_parameters())  # "weight" is no name of a group
    with (
        told("makes 2 groups of one parameter each, .* Give the Linear"),
        pytest.raises(ValueError, match="'weight'"),
    ):
        Balancer(Equal(), CAGrad(), tasks=TASKS, shared=named)
    some = {n: p for n, p in model.named_parameters() if n.startswith("trunk")}
    with told("makes 4 groups of one parameter each, .* Give the Network"):
        Balancer(Equal(), CAGrad(), tasks=TASKS, shared=some)
    x, y = (nn.Parameter(torch.ones(1)) for _ in range(2))
    usual: list[dict[str, nn.Module | Tensor]] = [
        {"scale": x, "shift": y},
        {"first": model.trunk[0], "last": model.trunk[3]},
        {"0": model.trunk[0], "3": model.trunk[3]},
        {"bias": model.trunk[0].weight, "bias.1": model.trunk[3].bias},
        {"0.weight": model.trunk[0].weight},
    ]
    with told(None):
        for shared in usual:
            Balancer(Equal(), CAGrad(), tasks=TASKS, shared=shared)


# --- losses that are scaled already --------------------------------------------------------------


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("strategy", [Sum, CAGrad])
@pytest.mark.parametrize(
    "scale",
    [
        lambda scaler, loss: scaler.scale(loss),
        lambda scaler, loss: scaler.scale(loss / 2),
        lambda scaler, loss: scaler.scale(loss) / 2,
        lambda scaler, loss: scaler.scale(loss) * torch.tensor(0.5),
    ],
)
def test_losses_that_are_scaled_already(scale, strategy, accumulates, with_scaler) -> None:
    model, scaler = Network(), new_scaler()
    balancer = Balancer(Equal(), strategy(), tasks=TASKS, shared=model.trunk)
    options = {"scaler": scaler} if with_scaler else {}

    def step(seed: int) -> None:
        losses = model.losses(batch(seed=seed))
        # One of them is enough, and the first of three steps is not the last to be looked at.
        if seed:
            losses["b"] = scale(scaler, losses["b"])
        (balancer.accumulate if accumulates else balancer.backward)(losses, **options)

    with told(None):
        step(0)
    with told("a GradScaler has scaled them already: .* scaled twice. Give .* as `scaler=`"):
        step(1)
    with told(None):
        step(2)


@pytest.mark.parametrize(
    "multiply",
    [
        lambda loss, scaler: loss,
        lambda loss, scaler: 1024.0 * loss,
        lambda loss, scaler: loss * torch.tensor(1024.0),
        lambda loss, scaler: torch.tensor(1024.0) * loss * 0.5,
        lambda loss, scaler: loss * nn.Parameter(torch.tensor(1024.0)),
        lambda loss, scaler: loss * torch.full((3,), 1024.0)[1],
        lambda loss, scaler: torch.amp.GradScaler("cpu", enabled=False).scale(loss),
    ],
)
@pytest.mark.parametrize("with_scaler", [False, True])
def test_losses_times_numbers_of_ones_own(multiply, with_scaler: bool) -> None:
    model, scaler = Network(), new_scaler()
    scaler.scale(torch.ones(()))  # which sets its scale up
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    with told(None):
        for seed in range(4):
            losses = model.losses(batch(seed=seed))
            losses = {task: multiply(loss, scaler) for task, loss in losses.items()}
            balancer.backward(losses, scaler=scaler if with_scaler else None)


def test_losses_are_looked_at_in_the_first_steps_only(monkeypatch) -> None:
    looked = []
    monkeypatch.setattr("mtbalance._watch._scales", lambda: looked.append(1) or set())
    model = Network()
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    for seed in range(5):
        losses = model.losses(batch(seed=seed))
        balancer.backward({task: loss * torch.tensor(2.0) for task, loss in losses.items()})
    assert len(looked) == 3
    balancer = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=model.trunk)
    balancer.backward(model.losses(batch()))
    assert len(looked) == 3, "plain losses need no search"
