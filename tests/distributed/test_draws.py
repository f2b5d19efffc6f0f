"""Random strategies draw the same numbers on all ranks, whatever these began with."""

from typing import Any

import pytest
import torch

from mtbalance import Balancer
from mtbalance.gradient import GradDrop, PCGrad, Sum
from mtbalance.weighting import AutoLambda, Equal, RandomWeighting
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.runs import Outcome, assert_equal, same_everywhere


def draw(
    here: Here, strategy: type, given: str, start: int = 5, reset: int | None = None
) -> Outcome:
    """Take steps with three tasks, the ranks having other seeds and an order of their own.

    Before step number ``reset``, the Balancer is reset.
    """
    torch.manual_seed(0)
    network = Network()
    seed = start + here.rank
    source: dict[str, Any] = {
        "seed": {"seed": seed},
        "generator": {"generator": torch.Generator().manual_seed(seed)},
    }[given]
    drawing = strategy(**source)
    pair = (drawing, Sum()) if strategy is RandomWeighting else (Equal(), drawing)
    balancer = Balancer(*pair, tasks=TASKS, shared=network.trunk)
    outcome = Outcome()
    for step in range(4):
        if step == reset:
            balancer.reset()
        losses = network.losses(here.part(batch(seed=step)))
        if here.rank:
            losses = dict(reversed(losses.items()))
        outcome.records.append(balancer.backward(losses).as_dict())
    return outcome.add(network, balancer)


@pytest.mark.parametrize("given", ["seed", "generator"])
@pytest.mark.parametrize("strategy", [GradDrop, PCGrad, RandomWeighting])
def test_the_first_rank_decides(two: Pool, strategy: type, given: str) -> None:
    """With the seed of rank 0, one process draws what both do."""
    ranks = two.run(draw, strategy, given)
    same_everywhere(ranks)
    assert_equal(ranks, draw(ALONE, strategy, given), 1e-12)
    other = draw(ALONE, strategy, given, start=6)  # and with that of rank 1, something else
    with pytest.raises(AssertionError):
        assert_equal(ranks, other, 1e-12)


@pytest.mark.parametrize("given", ["seed", "generator"])
@pytest.mark.parametrize("strategy", [GradDrop, PCGrad, RandomWeighting])
def test_a_reset_goes_to_the_start_of_the_first_rank(two: Pool, strategy: type, given: str) -> None:
    """And not to that of each rank's own stream, which would part them without a word."""
    ranks = two.run(draw, strategy, given, 5, 2)
    same_everywhere(ranks)
    alone = draw(ALONE, strategy, given, reset=2)
    assert_equal(ranks, alone, 1e-12)
    with pytest.raises(AssertionError):
        assert_equal([draw(ALONE, strategy, given)], alone, 1e-12)


def look_ahead(here: Here) -> list[torch.Tensor]:
    """Return what the validation function draws in each step."""
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    weighting = AutoLambda(optimizer, seed=here.rank)
    balancer = Balancer(weighting, PCGrad(), tasks=TASKS, shared=network.trunk)
    drawn = []

    def validation() -> dict[str, torch.Tensor]:
        drawn.append(torch.rand(3))
        return network.losses(batch())

    for reset in (False, False, True):
        if reset:
            balancer.reset()
        balancer.backward(network.losses(batch()), validation=validation)
    return drawn


def test_validation_batches_draw_alike(two: Pool) -> None:
    first, second = two.run(look_ahead)
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])  # after a reset
