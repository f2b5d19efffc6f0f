"""Optimizers whose state is in one process each."""

from typing import Any

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from mtbalance import Balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import AutoLambda
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool


def derivatives(here: Here, options: dict[str, Any], several: bool = False) -> torch.Tensor:
    """Return the derivatives of Auto-Lambda in each step, shape (steps, tasks).

    Args:
        here: The process.
        options: Of SGD.
        several: Whether another optimizer, whole in each process, has the trunk's parameters.
    """
    torch.manual_seed(0)
    network = Network()
    trunk = list(network.trunk.parameters()) if several else []
    others = [p for p in network.parameters() if all(p is not q for q in trunk)]
    optimizers: list[torch.optim.Optimizer] = []
    if several:
        optimizers.append(torch.optim.SGD(trunk, lr=0.02, momentum=0.5))
    if here.size > 1:
        optimizers.append(ZeroRedundancyOptimizer(others, torch.optim.SGD, **options))
    else:
        optimizers.append(torch.optim.SGD(others, **options))
    weighting = AutoLambda(optimizers if several else optimizers[0])
    found = []
    derivative = weighting.derivative

    def noted(step: Any) -> torch.Tensor:
        found.append(derivative(step))
        return found[-1]

    weighting.derivative = noted  # type: ignore[method-assign]
    balancer = Balancer(weighting, Sum(), tasks=TASKS, shared=network.trunk)
    for number in range(3):
        network.zero_grad()
        rows, held_out = (here.part(batch(8, seed=seed)) for seed in (number, 100 + number))
        balancer.backward(network.losses(rows), validation=lambda r=held_out: network.losses(r))
        for optimizer in optimizers:
            optimizer.step()
    return torch.stack(found)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_other_ranks_counts(two: Pool, momentum: float, nesterov: bool) -> None:
    """The virtual step is that of the whole optimizer, whoever holds its buffers."""
    options = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    expected = derivatives(ALONE, options)
    for found in two.run(derivatives, options):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_of_several_optimizers_one_is_spread(two: Pool) -> None:
    options = {"lr": 0.05, "momentum": 0.9}
    expected = derivatives(ALONE, options, several=True)
    for found in two.run(derivatives, options, True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
