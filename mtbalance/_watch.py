"""Notices learned weights that no optimizer moves."""

import warnings
from collections.abc import Sequence

from torch import Tensor

_PATIENCE = 2


class OptimizerWatch:
    """Compares version counters, which every in-place update moves, from step to step.

    Learned weights that stand still while the model moves are in no optimizer. Once may be chance
    (two optimizers that take turns), so the warning comes at the second time in a row.
    """

    def __init__(self) -> None:
        self._model: list[int] = []
        self._learned: list[int] = []
        self._stood_still = 0

    def look(self, learned: Sequence[Tensor], model: Sequence[Tensor]) -> None:
        """Compare with the last call, and warn once if learned weights do not move.

        Args:
            learned: Parameters of the weighting.
            model: Parameters that the losses are known to reach.
        """
        if not learned:
            return
        now = [parameter._version for parameter in model]
        versions = [parameter._version for parameter in learned]
        if len(versions) == len(self._learned):
            moved = any(new > old for new, old in zip(now, self._model, strict=False))
            if versions != self._learned:
                self._stood_still = 0
            elif moved:
                self._stood_still += 1
        self._model, self._learned = now, versions
        if self._stood_still == _PATIENCE:
            warnings.warn(
                "the weighting's learned weights must be given to an optimizer, but they do not "
                "move while the model does. Add balancer.parameters() to the optimizer.",
                UserWarning,
                stacklevel=4,
            )
