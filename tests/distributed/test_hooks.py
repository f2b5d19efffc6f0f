"""Hooks on accumulated gradients, by several processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtbalance import make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, has_fsdp2
from tests.distributed.runs import Outcome, Whole, assert_equal, ddp, plain, same_everywhere
from tests.distributed.test_sharded import Sharding

NAMES = ("naive", "uncert+graddrop", "dwa+cagrad", "autol+pcgrad", "uncert+pcgrad")
WRAPS: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "replicas": (plain, {}),
    "ddp": (ddp(), {}),
    "kept": (plain, {"every": 2}),
    "sharded": (Sharding(), {}),
    "heads apart": (Sharding("not at all"), {}),
}


def train_in_hooks(here: Here, name: str, way: str, accumulates: bool) -> Outcome:
    """Train by optimizers that step in hooks, and look that each is called once."""
    wrap, options = WRAPS[way]
    torch.manual_seed(0)
    model = Whole(Network())
    wrapped = wrap(model)
    whole_optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    balancer = make_balancer(
        name, tasks=TASKS, shared=model.network.trunk, optimizer=whole_optimizer, **options
    )
    parameters = [*model.parameters(), *balancer.parameters()]
    optimizers = {p: torch.optim.SGD([p], lr=0.05, momentum=0.9) for p in parameters}
    calls: list[int] = []

    def step(p: Tensor) -> None:
        calls.append(id(p))
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in parameters:
        p.register_post_accumulate_grad_hook(step)
    outcome = Outcome()
    for seed in range(3):
        calls.clear()
        rows, held_out = (here.part(batch(8, seed=s)) for s in (seed, 100 + seed))
        if accumulates:
            balancer.accumulate(wrapped(rows))
            assert calls == []
            record = balancer.apply(validation=lambda rows=held_out: wrapped(rows))
        else:
            record = balancer.backward(
                wrapped(rows), validation=lambda rows=held_out: wrapped(rows)
            )
        assert sorted(calls) == sorted(map(id, parameters)), "once each"
        outcome.records.append(record.as_dict())
    return outcome.add(model, balancer)


@pytest.mark.parametrize("way", WRAPS)
@pytest.mark.parametrize("accumulates", [False, True])
def test_once_with_the_final_gradient(two: Pool, way: str, accumulates: bool) -> None:
    if way in ("sharded", "heads apart") and not has_fsdp2:
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    for name in ("dwa+cagrad",) if way == "kept" else NAMES:
        ranks = two.run(train_in_hooks, name, way, accumulates)
        assert_equal(ranks, train_in_hooks(ALONE, name, way, accumulates), 1e-12, name)
        same_everywhere(ranks)
