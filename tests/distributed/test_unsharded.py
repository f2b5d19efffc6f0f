"""Whole parameters that FSDP has gathered from shards: a step that reaches them is refused.

Gradients that are captured there reach no shard: without the error they are lost, or wrong.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp

from mtbalance import make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import Here, Pool, has_fsdp2
from tests.distributed.runs import Whole
from tests.distributed.test_errors import message_of

Shard = Callable[[Whole], nn.Module]
needs_fsdp2 = pytest.mark.skipif(
    not has_fsdp2, reason="this torch has no torch.distributed.fsdp.fully_shard"
)
NAMES = ("naive", "equal+cagrad", "uncert+pcgrad")


def layers(model: Whole, **options: Any) -> nn.Module:
    for layer in (model.network.trunk[0], model.network.trunk[3]):
        fsdp.fully_shard(layer, mesh=mesh(), **options)
    return root(model, **options)


def layers_kept(model: Whole) -> nn.Module:
    return layers(model, reshard_after_forward=False)


def root(model: Whole, **options: Any) -> nn.Module:
    fsdp.fully_shard(model, mesh=mesh(), **options)
    return model


def root_let_go(model: Whole) -> nn.Module:
    return root(model, reshard_after_forward=True)


def trunk(model: Whole) -> nn.Module:
    fsdp.fully_shard(model.network.trunk, mesh=mesh())
    return model


def heads(model: Whole) -> nn.Module:
    for head in model.network.heads.values():
        fsdp.fully_shard(head, mesh=mesh())
    return model


def flat(model: Whole) -> nn.Module:
    return fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def flat_with_originals(model: Whole) -> nn.Module:
    cpu = torch.device("cpu")
    return fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)


def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def refused(here: Here, shard: Shard, shared: str) -> list[str]:
    """Return the errors of steps and of micro-batches, none of which leaves a gradient.

    Args:
        here: Which process this is.
        shard: Shards the model.
        shared: When the Balancer is told what is shared: "never", "before" or "after" the first
            forward pass.
    """
    messages = []
    for name in NAMES:
        model = Whole(Network())
        wrapped = shard(model)
        make = functools.partial(make_balancer, name, tasks=TASKS)
        balancer = make(shared=None if shared == "never" else model.network.trunk)
        for _ in range(2):  # also where the first error was caught
            losses = wrapped(here.part(batch()))
            if shared == "after":
                balancer = make(shared=model.network.trunk)
            messages.append(message_of(functools.partial(balancer.backward, losses)))
        losses = wrapped(here.part(batch()))
        messages.append(message_of(functools.partial(balancer.accumulate, losses)))
        assert all(parameter.grad is None for parameter in wrapped.parameters())
    return messages


def assert_refused(pool: Pool, pattern: str, shard: Shard, shared: str = "never") -> None:
    """In all processes alike."""
    ranks = pool.run(refused, shard, shared)
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 3 * len(NAMES)
    for message in ranks[0]:
        assert re.match(pattern, message), message


MUST = r"ValueError: `shared` must be given, and sharded, where fully_shard has sharded the model, "
REMEDY = r" of shape \(\d.* make the Balancer, with shared=, before the first forward pass\.$"


@needs_fsdp2
@pytest.mark.parametrize("shard", [layers, layers_kept, root, root_let_go, trunk, heads])
def test_shared_must_be_given(two: Pool, shard: Shard) -> None:
    """Modules hold the whole parameters no more after the forward pass, some of them, or all."""
    assert_refused(two, MUST + "but nothing is given: .*" + REMEDY, shard)


@needs_fsdp2
@pytest.mark.parametrize(("shard", "shared"), [(heads, "before"), (layers_kept, "after")])
def test_what_is_given_must_be_sharded(two: Pool, shard: Shard, shared: str) -> None:
    """Others are, or the modules held whole parameters at the time."""
    pattern = MUST + "but what is given was not sharded: .*" + REMEDY
    assert_refused(two, pattern, shard, shared)


@pytest.mark.parametrize("shard", [flat, flat_with_originals])
def test_flat_parameters(two: Pool, shard: Shard) -> None:
    pattern = (
        r"TypeError: the losses must not be those of FullyShardedDataParallel, but .* \(\d+ "
        r"entries\).* Shard the model with torch\.distributed\.fsdp\.fully_shard instead"
    )
    assert_refused(two, pattern, shard)


def below_features(here: Here) -> str:
    network = trunk(Whole(Network())).network
    hidden = network.trunk(here.part(batch()))
    losses = {task: head(hidden).square().mean() for task, head in network.heads.items()}
    balancer = make_balancer("cagrad", tasks=TASKS)
    return message_of(lambda: balancer.backward(losses, features=hidden))


@needs_fsdp2
def test_below_features(two: Pool) -> None:
    for message in two.run(below_features):
        assert re.match(MUST + ".*" + REMEDY, message)


def alone_in_a_mesh(here: Here) -> str:
    from torch.distributed.device_mesh import DeviceMesh

    groups = [dist.new_group([rank]) for rank in range(here.size)]
    model = Whole(Network())
    fsdp.fully_shard(model, mesh=DeviceMesh.from_group(groups[here.rank], "cpu"))
    balancer = make_balancer("cagrad", tasks=TASKS, process_group=groups[here.rank])
    return message_of(lambda: balancer.backward(model(batch())))


@needs_fsdp2
def test_one_process(two: Pool) -> None:
    for message in two.run(alone_in_a_mesh):
        assert re.match(MUST + ".*" + REMEDY, message)


def beside_a_sharded_one(here: Here) -> dict[str, Tensor | None]:
    """Train an ordinary model on what a sharded one of the same shapes has been shown, too."""
    other, model = layers_kept(Whole(Network())), Whole(Network())
    held = other(here.part(batch()))  # with whole parameters
    make_balancer("cagrad", tasks=TASKS).backward(model(here.part(batch())))
    del held
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@needs_fsdp2
def test_another_model_that_is_sharded_is_nobodys_business(two: Pool) -> None:
    for gradients in two.run(beside_a_sharded_one):
        assert all(gradient is not None for gradient in gradients.values())
