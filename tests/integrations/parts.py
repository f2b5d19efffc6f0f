"""What is trained in every framework, and the plain loop that each is compared with."""

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mtbalance import make_balancer
from tests.distributed.harness import Here

TASKS = ("a", "b", "c")
BATCHES = 6


def data() -> Tensor:
    """Return all batches, shape (batches, rows, 4)."""
    return torch.randn(BATCHES, 8, 4, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """A trunk and heads, whose losses differ in scale and pull apart."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        sums = x.sum(1, keepdim=True)
        found = enumerate(self.heads.items())
        return {t: (head(h) - sums * (-2.0) ** i).square().mean() for i, (t, head) in found}


class Parts(nn.Module):
    """The network and its Balancer."""

    def __init__(self, method: str, *, given: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Network()
        shared = self.network.trunk if given else None
        self.balancer = make_balancer(method, tasks=TASKS, shared=shared)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.network(x)
        return losses

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def plain(
    method: str = "pcgrad",
    *,
    epochs: int = 2,
    clip: float = 0.0,
    every: int = 1,
    fewer: bool = False,
    unlabelled: int | None = None,
    dtype: torch.dtype | None = None,
    scaler: Any = None,
) -> Parts:
    """The loop that one writes without a framework.

    Args:
        method: Weighting and gradient strategy.
        epochs: How many.
        clip: Norm to clip gradients to, or 0.
        every: How many batches make a step.
        fewer: Whether fewer batches left over are divided by their own number.
        unlabelled: The number of a batch in each epoch, from 1, without any loss.
        dtype: That of autocast.
        scaler: A gradient scaler.
    """
    parts = Parts(method)
    optimizer = parts.optimizer()
    for _ in range(epochs):
        for number, x in enumerate(data(), 1):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                losses = {} if number == unlabelled else parts.losses(x)
            count = every
            if fewer and number > BATCHES // every * every:
                count = BATCHES % every
            if every > 1:
                losses = {t: l / count for t, l in losses.items()}
            if number % every and number != BATCHES:
                parts.balancer.accumulate(losses, scaler=scaler)
                continue
            optimizer.zero_grad()
            parts.balancer.backward(losses, scaler=scaler)
            if scaler:
                scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(parts.parameters(), clip)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            parts.balancer.after_step(lambda x=x: parts.losses(x))
        parts.balancer.end_epoch()
    return parts


def assert_same(
    found: nn.Module, wanted: nn.Module, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    state = found.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(
            state[name], value, rtol=rtol, atol=atol, equal_nan=True, msg=name
        )


def tell_as_torchrun(here: Here) -> None:
    """Tell frameworks, in a rank of a pool, what the launcher would."""
    rank, size = str(here.rank), str(here.size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def forget_accelerators() -> None:
    """Forget what accelerators share for the life of a process, if there have been any."""
    if state := sys.modules.get("accelerate.state"):
        for kind in (state.AcceleratorState, state.GradientState, state.PartialState):
            kind._reset_state()
