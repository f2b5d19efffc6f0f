"""Engines of others that make backward passes of their own, which no Balancer can stand in for."""

import sys
from collections.abc import Iterable, Sequence

from torch import Tensor

from mtbalance._names import models_of


def refuse_engines(modules: Iterable[object]) -> None:
    """Raise if one of the modules is an engine of DeepSpeed."""
    for module in modules:
        kinds = [
            (kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__
        ]
        if any(package == "deepspeed" and name.endswith("Engine") for package, name in kinds):
            raise TypeError(
                "the losses must not be those of a DeepSpeed engine, but the shared parameters "
                f"belong to a {type(module).__name__}: its backward() reduces and partitions "
                "gradients by itself, and its step() counts on that. Shard the model with "
                "torch.distributed.fsdp.fully_shard, or wrap it in DistributedDataParallel, "
                "instead. To weigh losses only, keep the engine and leave the Balancer out: "
                "engine.backward(weighting(torch.stack([*losses.values()])).sum())."
            )


def refuse_engines_of(leaves: Sequence[Tensor]) -> None:
    """Raise if parameters belong to an engine of DeepSpeed, where that has been imported at all."""
    if "deepspeed" in sys.modules:
        refuse_engines(module for model in models_of(leaves) for module in model.modules())
