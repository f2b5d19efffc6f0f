"""float64 gradients whose squares float64 does not hold, of several processes: all decide alike."""

import pytest
import torch
from torch import Tensor

from mtbalance import make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import Here, Pool, has_fsdp2
from tests.distributed.runs import Outcome, Whole, same_everywhere
from tests.distributed.test_sharded import Sharding


def scaled_step(here: Here, name: str, where: str, power: int) -> Outcome:
    """Balance losses times a power of two."""
    torch.manual_seed(0)
    model = Whole(Network())
    if where == "shards":
        model = Sharding()(model)
    network = model.network
    balancer = make_balancer(name, tasks=TASKS, shared=network.trunk)
    rows = here.part(batch())
    features: Tensor | None = None
    if where == "features":
        features = network.trunk(rows)
        losses = {task: head(features).square().mean() for task, head in network.heads.items()}
        losses["b"] = -losses["b"]
    else:
        losses = model(rows)
    losses = {task: loss * 2.0**power for task, loss in losses.items()}
    record = balancer.backward(losses, features=features)
    return Outcome(records=[record.as_dict()]).add(network, balancer)


@pytest.mark.parametrize("power", [-700, 600])
@pytest.mark.parametrize(
    "where",
    [
        "parameters",
        "features",
        pytest.param("shards", marks=pytest.mark.skipif(not has_fsdp2, reason="no fully_shard")),
    ],
)
@pytest.mark.parametrize("name", ["cagrad", "pcgrad", "graddrop"])
def test_powers_of_two_change_nothing_but_the_scale(
    two: Pool, name: str, where: str, power: int
) -> None:
    before = two.run(scaled_step, name, where, 0)
    after = two.run(scaled_step, name, where, power)
    same_everywhere(before)
    for one, other in zip(before, after, strict=True):
        for key, gradient in one.gradients.items():
            found = other.gradients[key]
            assert gradient is not None
            assert found is not None
            assert torch.equal(found / 2.0**power, gradient), key
        (record,), (scaled,) = one.records, other.records
        for key, figure in record.items():
            factor = 2.0**power if key.startswith(("loss/", "gradient_norm/")) else 1.0
            assert scaled[key] / factor == figure, key
