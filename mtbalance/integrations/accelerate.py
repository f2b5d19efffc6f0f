"""Loops with Hugging Face Accelerate that balance their tasks.

Needs Accelerate (``pip install "mtbalance[accelerate]"``). ``prepare(accelerator, balancer)`` comes
once, and ``backward(accelerator, balancer, losses)`` where ``accelerator.backward(loss)`` was.
"Training loops of others" in the documentation has a script.

>>> import torch
>>> from accelerate import Accelerator
>>> from mtbalance import make_balancer
>>> from mtbalance.integrations.accelerate import backward, prepare
>>> trunk, head_a, head_b = (torch.nn.Linear(4, n) for n in (4, 1, 1))
>>> accelerator = Accelerator(cpu=True)
>>> balancer = make_balancer("pcgrad", tasks=("a", "b"), shared=trunk)
>>> balancer = prepare(accelerator, balancer)
>>> h = trunk(torch.ones(8, 4))
>>> losses = {"a": head_a(h).mean(), "b": head_b(h).square().mean()}
>>> record = backward(accelerator, balancer, losses)
>>> sorted(record.weights)
['a', 'b']
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mtbalance._balancer import Balancer
from mtbalance._record import Record

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        "mtbalance.integrations.accelerate needs Accelerate. Run "
        '`pip install "mtbalance[accelerate]"`.'
    ) from error

__all__ = ["backward", "prepare"]


def prepare(accelerator: Accelerator, balancer: Balancer) -> Balancer:
    """Put a Balancer on the accelerator's device; ``save_state`` and ``load_state`` know it then.

    Call it once, before the optimizer is made from ``balancer.parameters()``, if it has any. The
    Balancer is not wrapped: it averages over the processes by itself.

    Args:
        accelerator: The accelerator.
        balancer: The Balancer.

    Returns:
        The same Balancer.
    """
    if accelerator.device_placement:
        balancer.to(accelerator.device)
    accelerator.register_for_checkpointing(balancer)
    return balancer


def backward(
    accelerator: Accelerator,
    balancer: Balancer | nn.Module,
    losses: Mapping[str, Tensor],
    **options: Any,
) -> Record | None:
    """Balance the losses of a batch, as ``accelerator.backward(loss)`` differentiates one.

    Inside ``accelerator.accumulate(model)``, batches are added up, each divided by their number,
    and balanced in the one that steps (``accelerator.sync_gradients``). The gradient scaler of
    ``mixed_precision="fp16"`` is passed on, so that ``accelerator.clip_grad_norm_`` and
    ``optimizer.step()`` follow as ever.

    Args:
        accelerator: The accelerator.
        balancer: The Balancer, also as ``accelerator.prepare(balancer)`` has wrapped it.
        losses: As in :meth:`mtbalance.Balancer.backward`: raw, neither scaled nor divided.
        options: Other arguments of that method but for ``scaler``; used in the last of several
            batches.

    Returns:
        What the step did, or None if further batches follow.

    Raises:
        RuntimeError: With DeepSpeed or Megatron-LM, whose engines make the backward pass.
    """
    _refuse_engines(accelerator.distributed_type)
    bare: Any = balancer
    if not isinstance(bare, Balancer):
        bare = accelerator.unwrap_model(balancer)
    batches = accelerator.gradient_accumulation_steps
    if batches > 1:
        losses = {task: loss / batches for task, loss in losses.items()}
    if not accelerator.sync_gradients:
        bare.accumulate(losses, scaler=accelerator.scaler)
        return None
    record: Record = bare.backward(losses, scaler=accelerator.scaler, **options)
    return record


def _refuse_engines(kind: DistributedType) -> None:
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RuntimeError(
            f"{kind.value} makes the backward pass in an engine of its own, where tasks cannot be "
            "balanced. Use DistributedDataParallel, or FSDP2 with `fully_shard`."
        )
