"""Further, independent batches of a step: the inner products between the gradients of two batches.

Some methods learn weights from :math:`J_1 J_2^T`, the inner products of the task gradients of one
batch with those of another. The losses of a further batch come from a function, which is called
when its turn has come; its backward passes are made, and its graph is freed, before the next one's.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mtbalance._checks import check_known_tasks, check_losses_by_task
from mtbalance._company import Company, Losses, Validation
from mtbalance._finite import NonFinite
from mtbalance._gramians import WIDE, are_held, exponents_of
from mtbalance._places import Place
from mtbalance._products import products_between
from mtbalance._rows import finite_entries
from mtbalance._scaling import scale_of
from mtbalance._seen import Seen
from mtbalance._shards import sum_over_shards
from mtbalance._table import Part
from mtbalance._task_gradients import TaskGradients


class Across(NamedTuple):
    """What there is between two batches."""

    tasks: tuple[str, ...] = ()
    """The m tasks of the rows."""
    products: Mapping[int, Tensor] = {}
    """Per group, the inner products of one batch's rows with the other's, shape (m, m), float64,
    without the loss scale; over a power of two if float64 needs it."""
    bad_losses: tuple[str, ...] = ()
    """Tasks whose loss is not finite in a further batch."""
    bad_gradients: tuple[str, ...] = ()
    """Tasks whose gradient is not."""

    def of(self, tasks: Collection[str], groups: Collection[int]) -> dict[int, Tensor]:
        """Return the products of some of the tasks; 0 in groups that not both batches reach."""
        kept = [number for number, task in enumerate(self.tasks) if task in tasks]
        nothing = torch.zeros(len(kept), len(kept), dtype=torch.float64, device="cpu")
        return {
            number: self.products[number][kept][:, kept] if number in self.products else nothing
            for number in groups
        }


class FurtherBatches(NamedTuple):
    """The further batches of one step."""

    functions: Sequence[Validation]
    names: tuple[str, ...]
    """All tasks."""
    company: Company
    place: Place
    policy: NonFinite
    scaler: GradScaler | None

    def with_each_other(self, tasks: Sequence[str]) -> Across:
        """Return what there is between the first of them and the second.

        Args:
            tasks: The tasks of the step.
        """
        ones, bad = self._gradients(0, tasks)
        left = [task for task in tasks if task not in bad]
        if bad and not (left and self.policy.drops):  # the step ends there
            return Across(bad_losses=bad)
        others, also = self._gradients(1, left)
        left = [task for task in left if task not in also]
        return self._between(self._parts(ones, left), self._parts(others, left), left, bad + also)

    def with_rows(self, groups: Mapping[int, Part], tasks: Sequence[str]) -> Across:
        """Return what there is between the rows of the step and the only further batch.

        Args:
            groups: The rows, by the number of their group.
            tasks: Whose they are.
        """
        others, bad = self._gradients(0, tasks)
        kept = [number for number, task in enumerate(tasks) if task not in bad]
        ones = {n: Part(leaves, [rows[i] for i in kept]) for n, (leaves, rows) in groups.items()}
        left = [tasks[number] for number in kept]
        return self._between(ones, self._parts(others, left), left, bad)

    def _gradients(
        self, number: int, tasks: Sequence[str]
    ) -> tuple[TaskGradients, tuple[str, ...]]:
        """Return the gradients of a batch over all processes, and whose loss is not finite."""
        company = self.company
        seen, error = Seen(), None
        try:
            with torch.enable_grad():
                losses = self.functions[number]()
            seen = self._look(number, losses, tasks)
        except Exception as caught:  # noqa: BLE001  # raised in agree(), on all ranks
            error = caught
        seen = company.agree(seen, error)
        missing = [task for task in tasks if task not in (*seen.losses, *seen.nonfinite)]
        if missing:
            raise ValueError(
                f"`batches[{number}]` must return the loss of every task of the step "
                f"({', '.join(map(repr, tasks))}), but {missing[0]!r} is missing."
            )
        rows = self.place.rows(seen, company, self.scaler)
        return company.gather(seen, rows, self.place.dtype), seen.nonfinite

    def _look(self, number: int, losses: Losses, tasks: Sequence[str]) -> Seen:
        """Return what this process knows of a batch: of the tasks of the step, others are left."""
        name = f"batches[{number}]"
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"`{name}` must return a mapping from task name to loss, but got "
                f"{type(losses).__name__}."
            )
        check_known_tasks(name, losses, self.names)
        own = {task: losses[task] for task in tasks if task in losses}
        try:
            named = check_losses_by_task(own, self.names, may_be_empty=True)
            return self.company.look(named, self.policy.losses(named), self.place)
        except (TypeError, ValueError) as error:
            error.args = (f"{error} This is of `{name}`.",)
            raise

    def _parts(self, gradients: TaskGradients, tasks: Sequence[str]) -> dict[int, Part]:
        """Return the rows of these tasks, by the number of their group."""
        divided, _ = self.place.divide(gradients)
        return {n: Part(leaves, gradients.rows(tasks, leaves)) for n, leaves in divided.items()}

    def _between(
        self,
        ones: Mapping[int, Part],
        others: Mapping[int, Part],
        tasks: Sequence[str],
        bad_losses: tuple[str, ...],
    ) -> Across:
        products = {n: self._products(ones[n], others[n]) for n in ones if n in others}
        scale = scale_of(self.scaler)
        if scale is not None:
            products = {number: found * (1 / scale) ** 2 for number, found in products.items()}
        bad: tuple[str, ...] = ()
        if self.policy.looks:
            # What is not finite in a row is so in all of its products.
            finite = [finite_entries(found.diagonal()) for found in products.values()]
            bad = tuple(t for i, t in enumerate(tasks) if not all(good[i] for good in finite))
        return Across(tuple(tasks), products, bad_losses, bad)

    def _products(self, one: Part, other: Part) -> Tensor:
        """Return the inner products of the rows of two batches over what both reach."""
        if not one.rows:
            return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        places = {id(leaf): number for number, leaf in enumerate(other.leaves)}
        both = [(n, places[id(leaf)]) for n, leaf in enumerate(one.leaves) if id(leaf) in places]
        leaves = [one.leaves[number] for number, _ in both]
        rows = [[row[number] for number, _ in both] for row in one.rows]
        rows += [[row[number] for _, number in both] for row in other.rows]
        found = sum_over_shards(leaves, rows, products_between)
        if not (self.policy.looks and any(leaf.dtype in WIDE for leaf in leaves)):
            return found
        largest = [float(found.abs().max())]
        if are_held(largest):
            return found
        (exponent,) = exponents_of(largest)
        products = functools.partial(products_between, exponent=exponent)
        divided = sum_over_shards(leaves, rows, products)
        finite = divided.diagonal().isfinite()  # others are so whatever they are divided by
        left = found[finite][:, finite].abs().flatten().tolist()
        return found if are_held([max(left, default=1.0)]) else divided
