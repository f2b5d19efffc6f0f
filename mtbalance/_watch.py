"""Notices learned weights that no optimizer moves."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtbalance._shards import local

_PATIENCE = 2
_PROBED_TENSORS = 16
_PROBED_ENTRIES = 16


class OptimizerWatch:
    """Compares values from step to step until the learned weights have moved once.

    Learned weights that stand still while the model moves are in no optimizer. Once may be chance
    (two optimizers that take turns), so the warning comes at the second time in a row. Values are
    compared, not version counters: fused optimizers leave those alone.
    """

    def __init__(self) -> None:
        self._settled = False
        self._model: list[Tensor] = []
        self._learned: list[Tensor] = []
        self._stood_still = 0

    def look(self, learned: Sequence[Tensor], model: Callable[[], Sequence[Tensor]]) -> None:
        """Compare with the last call, and warn once if learned weights do not move.

        Args:
            learned: Parameters of the weighting.
            model: Returns the parameters that the losses are known to reach.
        """
        if self._settled or not learned:
            return
        probed = [local(p.detach()) for p in model()[:_PROBED_TENSORS]]
        now = [p.reshape(-1)[:_PROBED_ENTRIES].clone() for p in probed]
        values = [p.detach().clone() for p in learned]
        if self._learned:
            if not _equal(values, self._learned):
                self._settled = True
            elif not _equal(now, self._model):
                self._stood_still += 1
        self._model, self._learned = now, values
        if self._stood_still == _PATIENCE:
            self._settled = True
            warnings.warn(
                "the weighting's learned weights must be given to an optimizer, but they do not "
                "move while the model does. Add balancer.parameters() to the optimizer.",
                UserWarning,
                stacklevel=4,
            )


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(
        a.device == b.device and torch.equal(a, b) for a, b in zip(some, others, strict=False)
    )
