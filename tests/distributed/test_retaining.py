"""``retain_graph=True`` with several processes."""

import pytest
import torch
from torch import nn

from mtbalance import Balancer
from mtbalance.gradient import CAGrad, PCGrad, Sum
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, has_fsdp2
from tests.distributed.runs import Outcome, Whole, assert_equal, ddp, plain, same_everywhere
from tests.distributed.test_sharded import Sharding

WRAPS = {"no wrapper": plain, "DDP": ddp(), "shards": Sharding()}


def train(here: Here, wrapper: str) -> Outcome:
    """Let three Balancers follow one forward pass."""
    torch.manual_seed(0)
    model: nn.Module = Whole(Network())
    wrapped = WRAPS[wrapper](model)
    outcome = Outcome()
    losses = wrapped(here.part(batch()))
    for strategy in (Sum(), CAGrad(), PCGrad(), Sum()):
        balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=model.network.trunk)
        balancer.backward(losses, retain_graph=True)
    return outcome.add(model, balancer)


@pytest.mark.parametrize("wrapper", WRAPS)
def test_several_balancers_on_one_forward_pass(two: Pool, wrapper: str) -> None:
    if wrapper == "shards" and not has_fsdp2:
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    ranks = two.run(train, wrapper)
    assert_equal(ranks, train(ALONE, wrapper), 1e-12)
    same_everywhere(ranks)
