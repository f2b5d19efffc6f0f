"""What gradient strategies remember is the same on all ranks, as one process would remember it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtbalance import Balancer
from mtbalance.gradient import PCD, GradientStrategy, GradVac, PCGrad, Smoothed
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.runs import Outcome, assert_equal, same_everywhere
from tests.distributed.test_resume import received
from tests.test_state import assert_equal_states


def strategy_of(name: str, seed: int) -> GradientStrategy:
    return {
        "gradvac": lambda: GradVac(0.3, seed=seed),
        "pcd": lambda: PCD("b", 0.3, beta=0.5),
        "smoothed": lambda: Smoothed(PCGrad(seed=seed), alpha=0.7),
        "smoothed gradvac": lambda: Smoothed(GradVac(0.3, seed=seed), alpha=0.7),
    }[name]()


def balancer_of(network: Network, name: str, seed: int = 0) -> Balancer:
    """Return one of two groups."""
    shared = {"first": network.trunk[0], "second": network.trunk[3]}
    return Balancer(Equal(), strategy_of(name, seed), tasks=TASKS, shared=shared)


def take(here: Here, name: str) -> tuple[Outcome, dict[str, Tensor]]:
    """Take steps in which a task is absent on all ranks, or on one of them."""
    torch.manual_seed(0)
    network = Network()
    balancer = balancer_of(network, name, seed=here.rank)
    outcome = Outcome()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        losses = network.losses(here.part(batch(seed=step)))
        if step % 3 == 1:
            del losses["b"]
        outcome.records.append(balancer.backward(losses).as_dict())
        optimizer.step()
    return outcome.add(network, balancer), dict(balancer.gradient.named_buffers())


@pytest.mark.parametrize("name", ["gradvac", "pcd", "smoothed", "smoothed gradvac"])
def test_two_processes_remember_what_one_does(two: Pool, name: str) -> None:
    ranks: list[Any] = two.run(take, name)
    same_everywhere([outcome for outcome, _ in ranks])
    assert_equal_states(ranks[0][1], ranks[1][1])  # to the last bit
    alone, buffers = take(ALONE, name)
    assert_equal([outcome for outcome, _ in ranks], alone, 1e-11)
    for key, buffer in buffers.items():
        assert buffer.shape[0] == 2
        assert not torch.equal(buffer[0], buffer[1]) or key.startswith("seen")
        torch.testing.assert_close(ranks[0][1][key], buffer)


def resume(here: Here, name: str) -> None:
    """Go on from the first rank's state, with a task on one rank only."""
    states = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        network = Network()
        balancer = balancer_of(network, name, seed=here.rank)
        for step in range(6):
            if interrupted and step == 3:
                state = received(dict(balancer.state_dict()))
                balancer = balancer_of(network, name, seed=7)
                balancer.load_state_dict(state)
            losses = network.losses(here.part(batch(seed=step)))
            if (step + here.rank) % 2:
                del losses["b"]
            balancer.backward(losses)
        states.append({"state": balancer.state_dict(), "grad": network.trunk[0].weight.grad})
    assert_equal_states(*states)


@pytest.mark.parametrize("name", ["gradvac", "pcd", "smoothed", "smoothed gradvac"])
def test_resume_is_bit_for_bit(two: Pool, name: str) -> None:
    two.run(resume, name)
