"""The task gradients of one step, averaged over processes while further ones are computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtbalance._agreement import Agreement
from mtbalance._buckets import Bucket, buckets
from mtbalance._task_gradients import Row, TaskGradients


class Exchange:
    """Averages the task gradients of one step over the ranks, while further ones are computed.

    Gradients come task by task, in the order of the tasks; each is sent off at once in buckets.

    Args:
        group: The process group.
        agreement: What all ranks know of the step.
        dtype: What gradients are kept in, and sent in; by default that of their leaf.
    """

    def __init__(
        self,
        group: "torch.distributed.ProcessGroup | None",
        agreement: Agreement,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._group = group
        self._agreement = agreement
        self._dtype = dtype
        self._gradients = TaskGradients(agreement.nonfinite)
        self._waiting = [t for t in agreement.counts if t not in agreement.nonfinite]
        self._sent: list[_Sent] = []

    def add(self, row: Row) -> None:
        """Send a task's gradients off; those of tasks before it that are absent here are zero."""
        while self._waiting and self._waiting[0] != row.task:
            self._send(self._waiting.pop(0), [], [])
        if self._waiting:
            self._send(self._waiting.pop(0), row.leaves, row.gradients)

    def _send(self, task: str, leaves: Sequence[Tensor], row: Sequence[Tensor | None]) -> None:
        here = {id(leaf): gradient for leaf, gradient in zip(leaves, row, strict=True)}
        layout = self._agreement.layouts[task]
        sent = _Sent(task)
        for bucket in buckets(layout):
            gradients = [here.pop(id(leaf), None) for leaf in bucket]
            sent.buckets.append(Bucket(bucket, gradients, self._dtype))
            sent.buckets[-1].send(self._group)
        known = {id(leaf): leaf for leaf in leaves}
        # Not averaged: shards, which are averaged already, and leaves of this rank alone (inputs).
        sent.own = [(known[key], gradient) for key, gradient in here.items()]
        self._sent.append(sent)

    def finish(self) -> TaskGradients:
        """Wait for everything, and return the averaged gradients, the same on all ranks."""
        while self._waiting:
            self._send(self._waiting.pop(0), [], [])
        for sent in self._sent:
            leaves: list[Tensor] = []
            row: list[Tensor | None] = []
            for bucket in sent.buckets:
                leaves += bucket.leaves
                row += bucket.receive(self._agreement.counts[sent.task])
            leaves += [leaf for leaf, _ in sent.own]
            row += [gradient for _, gradient in sent.own]
            loss = self._agreement.losses[sent.task]
            self._gradients.add(Row(sent.task, loss, leaves, row))
        self._sent.clear()
        return self._gradients


@dataclass
class _Sent:
    task: str
    buckets: list[Bucket] = field(default_factory=list)
    own: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
