"""Training runs that several ranks and one process do alike, and how to compare them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtbalance import PAPER_COMBINATIONS, Balancer, make_balancer
from mtbalance._factory import GRADIENTS, WEIGHTINGS
from tests._networks import TASKS, Network, batch, gradients
from tests.distributed.harness import Here

Losses = dict[str, Tensor]

CATALOGUE = tuple(
    dict.fromkeys(
        kind.__name__.lower()
        for names in (WEIGHTINGS, GRADIENTS)
        for name, kind in names.items()
        if kind not in {k for n, k in names.items() if n in PAPER_COMBINATIONS}
    )
)
"""Names of the strategies that are in none of the paper's combinations."""
CHOICES = {"weights": [1, 2, 3], "primary": TASKS[0], "byzantine": 0, "trim": 1}
"""Their options that have no default, and who is favoured where one may be."""


class Whole(nn.Module):
    """A network whose forward pass ends in losses, as wrappers need it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Losses:
        return self.network.losses(rows)


@dataclass
class Outcome:
    """What a run leaves, the same on all ranks: everything by name, whole, detached."""

    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    records: list[dict[str, float]] = field(default_factory=list)
    learned: list[Tensor] = field(default_factory=list)

    def add(self, model: nn.Module, balancer: Balancer, prefix: str = "") -> "Outcome":
        """Add parameters, ``.grad`` and learned weights."""
        for name, parameter in model.named_parameters():
            self.values[prefix + name] = whole(parameter.detach()).clone()
        for name, gradient in gradients(model).items():
            self.gradients[prefix + name] = None if gradient is None else whole(gradient)
        self.learned += [p.detach().clone() for p in balancer.parameters()]
        self.learned += [p.grad for p in balancer.parameters() if p.grad is not None]
        return self


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded, dense."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to_dense() if tensor.is_sparse else tensor


def assert_equal(ranks: Iterable[Outcome], alone: Outcome, tolerance: float, why: str = "") -> None:
    """Every rank has what one process has, up to a part of each tensor's (or the run's) size."""
    for rank, outcome in enumerate(ranks):
        where = f"{why} rank {rank}"
        _assert_close(outcome.values, alone.values, tolerance, where)
        _assert_close(outcome.gradients, alone.gradients, tolerance, where)
        numbered = [dict(enumerate(one.learned)) for one in (outcome, alone)]
        _assert_close(numbered[0], numbered[1], tolerance, where)
        assert len(outcome.records) == len(alone.records)
        for step, (record, expected) in enumerate(zip(outcome.records, alone.records, strict=True)):
            close = pytest.approx(expected, rel=10 * tolerance, abs=10 * tolerance, nan_ok=True)
            assert record == close, f"{where} step {step}"


def _assert_close(
    some: Mapping[Any, Tensor | None],
    others: Mapping[Any, Tensor | None],
    tolerance: float,
    where: str,
) -> None:
    assert some.keys() == others.keys(), where
    size = max((float(t.norm()) for t in others.values() if t is not None), default=0.0)
    for name, expected in others.items():
        actual = some[name]
        assert (actual is None) == (expected is None), f"{where}: {name}"
        if actual is not None and expected is not None:
            assert actual.dtype == expected.dtype, f"{where}: {name}"
            error = float((actual - expected).norm())
            assert error <= tolerance * size, f"{where}: {name} is off by {error / size:.1e}"


def same_everywhere(ranks: Sequence[Outcome]) -> None:
    """Ranks do not drift apart, not even by rounding."""
    first, *others = ranks
    for other in others:
        assert_equal([other], first, 0.0, "against rank 0,")


Wrap = Callable[[nn.Module], nn.Module]


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(**options: bool) -> Wrap:
    """Return a function that wraps a model where there is more than one process."""

    def wrap(model: nn.Module) -> nn.Module:
        several = torch.distributed.is_initialized()
        return DistributedDataParallel(model, **options) if several else model

    return wrap


def train(
    here: Here,
    name: str,
    *,
    wrap: Wrap = plain,
    precision: torch.dtype = torch.float64,
    steps: int = 3,
    micro: int = 1,
    further: int | None = None,
    **options: Any,
) -> Outcome:
    """Train for some steps on this process's part of each batch, and of further ones if needed."""
    torch.manual_seed(0)
    model = Whole(Network().to(precision))
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options.setdefault("shared", model.network.trunk)
    balancer = make_balancer(name, tasks=TASKS, optimizer=optimizer, lr=0.01, **options)
    if learned := list(balancer.parameters()):
        optimizer.add_param_group({"params": learned, "lr": 0.01})
    if further is None:
        further = max(balancer.gradient.further_batches, default=0)
    outcome = Outcome()
    for step in range(steps):
        optimizer.zero_grad()
        rows = here.part(batch(8, seed=step).to(precision))
        held_out = here.part(batch(8, seed=100 + step).to(precision))

        def validation(rows: Tensor = held_out) -> Losses:
            losses: Losses = wrapped(rows)
            return losses

        batches = [
            functools.partial(wrapped, here.part(batch(8, seed=seed + 3 * step).to(precision)))
            for seed in range(200, 200 + further)
        ]
        if micro == 1:
            record = balancer.backward(wrapped(rows), validation=validation, batches=batches)
        else:
            for part in rows.chunk(micro):
                balancer.accumulate({t: loss / micro for t, loss in wrapped(part).items()})
            record = balancer.apply(validation=validation, batches=batches)
        outcome.records.append(record.as_dict())
        optimizer.step()
        balancer.after_step(lambda rows=rows: wrapped(rows))
        if step != 1:
            balancer.end_epoch()
    return outcome.add(model, balancer)
