"""TorchJD's aggregators with two processes, on replicas and on shards."""

import pytest
import torch
from torch import nn

from mtbalance import Balancer
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, RankError, has_fsdp2
from tests.distributed.runs import Outcome, Whole, assert_equal, ddp, same_everywhere
from tests.distributed.test_sharded import Sharding

pytest.importorskip("torchjd", reason='needs TorchJD: pip install "mtbalance[torchjd]"')

from mtbalance.integrations.torchjd import FromTorchJD
from tests.integrations.test_torchjd import make, step

WHOLE = ("ConFIG", "ExcessMTL", "GradDrop")
IN_PARTS = ("GradVac", "MGDA", "Mean", "PCGrad", "Random", "TrimmedMean")


def train(here: Here, names: tuple[str, ...], shards: bool) -> dict[str, Outcome]:
    """Train for three steps with each."""
    outcomes = {}
    for name in names:
        torch.manual_seed(0)
        model: nn.Module = Whole(Network())
        wrapped = (Sharding() if shards else ddp())(model)
        strategy = FromTorchJD(make(name))
        balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=model.network.trunk)
        outcome = outcomes[name] = Outcome()
        for number in range(3):
            record = balancer.backward(wrapped(here.part(batch(seed=number))))
            outcome.records.append(record.as_dict())
            step(model)
        outcome.add(model, balancer)
    return outcomes


@pytest.mark.parametrize(
    "shards",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not has_fsdp2, reason="this torch has no torch.distributed.fsdp.fully_shard"
            ),
        ),
    ],
)
def test_ranks_train_as_one_process_would(two: Pool, shards: bool) -> None:
    names = IN_PARTS if shards else WHOLE + IN_PARTS
    ranks = two.run(train, names, shards)
    alone = train(ALONE, names, shards)
    for name in names:
        outcomes = [outcomes[name] for outcomes in ranks]
        assert_equal(outcomes, alone[name], 1e-11, name)
        same_everywhere(outcomes)


@pytest.mark.skipif(not has_fsdp2, reason="this torch has no torch.distributed.fsdp.fully_shard")
def test_whole_rows_of_shards_are_refused(two: Pool) -> None:
    with pytest.raises(RankError, match="FromTorchJD needs whole rows"):
        two.run(train, ("ConFIG",), True)
