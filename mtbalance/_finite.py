"""Which tasks have losses or gradients that are not finite."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtbalance._ranks import Ranks
from mtbalance._rows import Rows, all_finite, norms_of, stacked


class FiniteCheck:
    """Looks at numbers unless non-finite ones are to propagate; looking waits for the device.

    Args:
        policy: The Balancer's ``nonfinite``.
        ranks: The processes, which must come to the same answer.
    """

    def __init__(self, policy: str, ranks: Ranks) -> None:
        self.looks = policy != "propagate"
        self._ranks = ranks

    def bad_losses(self, losses: Mapping[str, Tensor]) -> list[str]:
        """Name the tasks whose loss, in this process, is not finite."""
        if not self.looks or not losses:
            return []
        finite = torch.isfinite(stacked([loss.detach() for loss in losses.values()])).tolist()
        return [name for name, good in zip(losses, finite, strict=True) if not good]

    def bad_gradients(
        self, names: Sequence[str], gramian: Tensor, leaves: Sequence[Tensor], rows: Rows
    ) -> list[str]:
        """Name the tasks whose gradient of a shared or of any other parameter is not finite.

        Args:
            names: The tasks.
            gramian: Inner products of their gradients of the shared parameters, shape (m, m).
            leaves: The other leaves.
            rows: The gradients of these. Of several processes, each has inputs of its own that
                require a gradient, which the others do not know of: those are not looked at.
        """
        if not self.looks:
            return []
        known = [not self._ranks.several or isinstance(leaf, nn.Parameter) for leaf in leaves]
        rest = [list(itertools.compress(row, known)) for row in rows]
        # All in one tensor, so that the device is waited for once.
        sums = gramian.diagonal().clone()
        for number, row in enumerate(rest):
            norms = norms_of(row)
            if norms is not None:
                sums[number] += norms.sum()
        if self._ranks.sharded:
            sums = self._ranks.sum(sums)
        # A norm may overflow where no entry does: look closer then.
        return [
            name
            for name, good, products, row in zip(
                names, torch.isfinite(sums).tolist(), gramian, rest, strict=True
            )
            if not good and not self.everywhere(all_finite([products, *row]))
        ]

    def everywhere(self, finite: bool) -> bool:  # noqa: FBT001
        """Return whether the answer is yes in all processes."""
        if not self._ranks.several:
            return finite
        return float(self._ranks.sum(torch.tensor(float(not finite), device="cpu"))) == 0


def message(what: str, names: Sequence[str]) -> str:
    """Return what an error says of these tasks."""
    return (
        f"the {what} of task {', '.join(map(repr, names))} must be finite, but holds NaN or "
        "infinity. nonfinite='drop' leaves the task out of such a step, 'skip' leaves the step out."
    )
