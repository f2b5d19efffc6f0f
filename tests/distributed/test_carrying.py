"""A saved state for other tasks: several processes, also with shards, do what one does."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, GradientStrategy, with_tasks
from mtbalance.gradient import CAGrad, GradVac, MoCo, RowMean
from mtbalance.weighting import DWA, ExcessMTL, Uncertainty, Weighting
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, has_fsdp2
from tests.distributed.runs import Whole
from tests.distributed.test_sharded import Sharding

BEFORE, AFTER = ("a", "b", "c"), ("d", "c", "a")
Strategies = tuple[Callable[[], Weighting], Callable[[], GradientStrategy]]
CASES: dict[str, Strategies] = {
    "means": (DWA, lambda: RowMean(CAGrad(), 0.5)),
    "recalled": (ExcessMTL, lambda: RowMean(CAGrad(), 0.5, recall=True)),
    "tracked": (Uncertainty, MoCo),
    "cosines": (DWA, lambda: GradVac(0.3)),
}


def whole(tensor: Tensor) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def carry(here: Here, names: Sequence[str], shard: bool, inferred: bool) -> dict[str, Any]:
    """Train with tasks a, b, c, then with c, d, a, and return all parameters by case and name."""
    return {name: _carry(here, *CASES[name], shard, inferred) for name in names}


def _carry(
    here: Here, weighting: Any, gradient: Any, shard: bool, inferred: bool
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: nn.Module = Whole(Network((*TASKS, "d")))
    if shard:
        model = Sharding()(model)
    shared = None if inferred else model.network.trunk
    old = Balancer(weighting(), gradient(), tasks=BEFORE, shared=shared)
    steps(here, old, model, [BEFORE, ("b", "c"), BEFORE], 0)
    new = Balancer(weighting(), gradient(), tasks=AFTER, shared=shared)
    new.load_state_dict(with_tasks(old.state_dict(), new))
    steps(here, new, model, [("c", "a"), AFTER, ("d",), AFTER], 3)
    parameters = {**dict(model.named_parameters()), **dict(new.named_parameters())}
    return {name: whole(parameter) for name, parameter in parameters.items()}


def steps(
    here: Here, balancer: Balancer, model: nn.Module, presents: list[tuple[str, ...]], seed: int
) -> None:
    parameters = [*model.parameters(), *balancer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for number, present in enumerate(presents, seed):
        optimizer.zero_grad()
        losses = model(here.part(batch(seed=number)))
        balancer.backward({task: losses[task] for task in balancer.tasks if task in present})
        optimizer.step()


@pytest.mark.parametrize(
    ("shard", "inferred"),
    [
        (False, False),
        (False, True),
        pytest.param(
            True, False, marks=pytest.mark.skipif(not has_fsdp2, reason="has no fully_shard")
        ),
    ],
    ids=["copies", "copies, inferred", "shards"],
)
def test_two_processes_equal_one(two: Pool, shard: bool, inferred: bool) -> None:
    wanted = carry(ALONE, list(CASES), False, inferred)
    for found in two.run(carry, list(CASES), shard, inferred):
        for case, parameters in wanted.items():
            for name, value in parameters.items():
                ours = found[case][name]
                assert_close(ours, value, rtol=1e-9, atol=1e-11, msg=f"{case}: {name}")
