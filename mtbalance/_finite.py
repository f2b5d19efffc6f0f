"""What becomes of losses and gradients that are not finite."""

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mtbalance._company import Company
from mtbalance._record import Record
from mtbalance._rows import all_finite, finite_entries, norms_of, stacked
from mtbalance._table import Table


class NonFinite:
    """The policy for what is not finite; looking for it waits for the device.

    Args:
        policy: The Balancer's ``nonfinite``.
        tasks: All tasks.
    """

    def __init__(self, policy: str, tasks: tuple[str, ...]) -> None:
        self.looks = policy != "propagate"
        self.raises = policy == "raise"
        self.drops = policy == "drop"
        self._skips = policy == "skip"
        self._tasks = tasks

    def losses(self, losses: Mapping[str, Tensor]) -> list[str]:
        """Name the tasks whose loss, in this process, is not finite."""
        if not self.looks or not losses:
            return []
        finite = finite_entries(stacked([loss.detach() for loss in losses.values()]))
        return [name for name, good in zip(losses, finite, strict=True) if not good]

    def rows(self, table: Table, company: Company) -> list[str]:
        """Name the tasks whose gradient of a shared or of any other parameter is not finite.

        Of several processes, each has inputs of its own that require a gradient, which the others
        do not know of: those are not looked at.
        """
        if not self.looks:
            return []
        gramian = table.gramian
        rest: Sequence[Sequence[Tensor | None]] = table.rest.rows
        known = [company.knows(leaf) for leaf in table.rest.leaves]
        if not all(known):
            rest = [list(itertools.compress(row, known)) for row in rest]
        # All in one tensor, so that the device is waited for once.
        sums = gramian.diagonal()
        norms = [norms_of(row) for row in rest]
        if any(norm is not None for norm in norms):
            none = sums.new_zeros(())
            sums = sums + torch.stack([none if n is None else n.sum().to(sums) for n in norms])
        finite = finite_entries(company.sum_over_parts(sums))
        # A norm may overflow where no entry does: look closer then.
        return [
            name
            for name, good, products, row in zip(table.losses, finite, gramian, rest, strict=True)
            if not good and not company.everywhere(all_finite([products, *row]))
        ]

    def accepts(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether gradients may be written, which are the same in all processes."""
        return not self.looks or all_finite(gradients)

    def ended(
        self,
        what: str,
        losses: Mapping[str, Tensor],
        nonfinite: Collection[str],
    ) -> Record | None:
        """Return the record of a step that ends here, or raise; None if it goes on.

        Args:
            what: What is not finite, a loss or a gradient.
            losses: Losses of the tasks that are left.
            nonfinite: The tasks that are not.
        """
        bad = self.ordered(nonfinite)
        if bad and self.raises:
            raise FloatingPointError(_message(what, bad))
        if bad and self._skips:
            return self._skipped(losses, bad)
        if losses:
            return None
        return Record((), {}, absent=self.absent(bad), nonfinite=bad, dropped=bad)

    def ended_by_sum(self, losses: Mapping[str, Tensor]) -> Record:
        """Return the record of a step whose sum of gradients is not finite, or raise."""
        if self.raises:
            raise FloatingPointError(
                f"the gradients of the tasks {', '.join(map(repr, losses))} must be finite, "
                "but their sum holds NaN or infinity though the losses do not. "
                "nonfinite='drop' takes them one by one and tells which it is."
            )
        return self._skipped(losses, ())

    def ended_below_features(self, losses: Mapping[str, Tensor]) -> Record:
        """Return the record of a step whose gradient below the features is not finite, or raise."""
        if self.raises:
            raise FloatingPointError(
                "the gradient below `features` must be finite, but holds NaN or infinity though "
                "those of the features do not. nonfinite='skip' leaves out such a step, as 'drop' "
                "does where no task is to blame."
            )
        return self._skipped(losses, ())

    def overflow(
        self, losses: Mapping[str, Tensor], found: tuple[str, ...], earlier: Collection[str]
    ) -> Record:
        """Return the record of a step whose gradients are passed on for a gradient scaler to see.

        Args:
            losses: Losses of the tasks whose gradients are passed on.
            found: The tasks among them whose gradients are not finite.
            earlier: Tasks whose loss was not, and that have no part in it.
        """
        absent = self.absent([*losses, *earlier])
        return Record(tuple(losses), dict(losses), absent=absent, nonfinite=found, overflow=True)

    def _skipped(self, losses: Mapping[str, Tensor], nonfinite: tuple[str, ...]) -> Record:
        names = self.ordered(losses)
        return Record(
            names,
            dict(losses),
            absent=self.absent([*names, *nonfinite]),
            nonfinite=nonfinite,
            skipped=True,
        )

    def absent(self, present: Collection[str]) -> tuple[str, ...]:
        """Return the tasks that are not present."""
        return tuple(task for task in self._tasks if task not in present)

    def ordered(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return the tasks in the order of the Balancer."""
        return tuple(task for task in self._tasks if task in tasks)


def _message(what: str, names: Collection[str]) -> str:
    """Return what an error says of these tasks."""
    return (
        f"the {what} of task {', '.join(map(repr, names))} must be finite, but holds NaN or "
        "infinity. nonfinite='drop' leaves the task out of such a step, 'skip' leaves the step out."
    )
