import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._blocks import column_blocks
from mtbalance._checks import check_at_least, check_saved, count_fallback
from mtbalance._remembered import dtype_of_sums
from mtbalance._row_state import RowState
from mtbalance._rows import Rows
from mtbalance._shards import sum_over_shards

from ._base import Step, Weighting, task_vector


class ExcessMTL(Weighting):
    r"""Weigh tasks by how far they still are from their optimum, and not by how large losses are.

    With :math:`g_i` the gradient of the raw loss of task i, over all that is balanced, and the m
    active tasks,

    .. math::
        S_i \gets S_i + g_i^2, \qquad e_i = \sum_k \frac{g_{ik}^2}{\sqrt{S_{ik}}}, \qquad
        w_i \gets w_i \exp\Bigl(\eta \frac{e_i}{e_i^0}\Bigr),

    coordinate by coordinate, and then weights are rescaled to the sum that they had; they start
    from 1. :math:`e_i` estimates the excess of a loss over the least that the model can reach, by
    the steps that AdaGrad would take; noise in the labels, which no training removes, does not
    count. :math:`e_i^0` is that of the task's first step, in which its weight stays.

    The gradients are averaged over processes, and have no loss scale. A step costs one backward
    pass per task, which serves the gradient strategy, too; ``features=`` does not go with it. Of
    the tasks in a step, the weights are rescaled among themselves; that of a task which is absent
    stays, with its share in the sum. Steps count in training mode only.

    Args:
        lr: :math:`\eta`, at least 0. Source: the authors' code.

    Note:
        The authors' code adds 1e-7 under the root, which turns off coordinates with smaller
        gradients; here only 0/0 is guarded. A first gradient of zero has an :math:`e_i^0` of 0, by
        which it divides; here the task's weight stays until there is one. Weights are kept as
        logarithms, so that none comes to 0 for good. Where a gradient is not finite, weights stay
        (``fallbacks`` counts such steps).

        Memory: roots of :math:`S` in at least float32, a number per task and balanced parameter,
        for good; rows stay until the step is written, for one direction more.

    References:
        He, Zhou, Zhang, Yu, Chawla and Zhao, "Robust Multi-Task Learning with Excess Risks", ICML
        2024, https://arxiv.org/abs/2402.02009.

    Example:
        >>> import torch
        >>> from mtbalance import Balancer
        >>> from mtbalance.gradient import Sum
        >>> w = torch.nn.Parameter(torch.tensor(2.0))
        >>> balancer = Balancer(ExcessMTL(lr=1.0), Sum(), tasks=("a", "b"), shared=[w])
        >>> for slope in (1, 3):  # the gradient of a grows, that of b stays
        ...     record = balancer.backward({"a": slope * w, "b": 5 * w})
        >>> [
        ...     round(float(weight), 4) for weight in record.weights.values()
        ... ]  # e / e0: 2.846 and 0.707
        [1.7893, 0.2107]
    """

    needs_gradients: ClassVar[bool] = True
    _narrowest: ClassVar[torch.dtype] = torch.float64

    log_weight: Tensor
    first: Tensor

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = check_at_least("lr", lr, 0)
        self.roots = RowState()

    def setup(self) -> None:
        # Logarithms of the weights, and the first excess; 0 before there is one.
        for name in ("log_weight", "first"):
            self.register_buffer(name, task_vector(0.0, self.num_tasks, dtype_of_sums()))

    def check_state(self, state: Mapping[str, object]) -> None:
        check_saved(self, state, counts=("first",), finite=("log_weight", "first"))

    def forward(self, losses: Tensor) -> Tensor:
        weight = torch.softmax(self.log_weight[self.active], 0)
        return (len(weight) * weight).to(losses.dtype) * losses

    def before_step(self, step: Step) -> None:
        """Move the weights by the excess of each task."""
        if not self.training:
            return
        active = range(self.num_tasks) if isinstance(self.active, slice) else self.active.tolist()
        tasks = list(active)
        leaves = list(step.parameters[: step.balanced])
        rows = [list(row[: step.balanced]) for row in step.gradients]
        unscale = 1 / step.loss_scale
        excess = self._excess(leaves, rows, tasks, unscale).to(self.first)
        if not bool(excess.isfinite().all()):
            count_fallback(self, "a gradient is not finite: weights stay")
            return
        first, before = self.first[self.active], self.log_weight[self.active]
        self.first[self.active] = torch.where(first > 0, first, excess)
        moves = first > 0
        ratio = excess / torch.where(moves, first, 1.0)
        moved = before + self.lr * ratio
        sums = [torch.logsumexp(v.masked_fill(~moves, -torch.inf), 0) for v in (before, moved)]
        self.log_weight[self.active] = torch.where(moves, moved - sums[1] + sums[0], before)
        self._change_when_written(leaves, rows, tasks, unscale)

    def _excess(self, leaves: list[Tensor], rows: Rows, tasks: list[int], unscale: float) -> Tensor:
        """Return e, shape (m,), over whole parameters."""
        roots = self.roots.rows(leaves, tasks)
        within = functools.partial(_excess_within, unscale=unscale)
        return sum_over_shards(leaves, [*roots, *rows], within)

    def _change_when_written(
        self, leaves: list[Tensor], rows: Rows, tasks: list[int], unscale: float
    ) -> None:
        def of_row(old: Tensor | None, row: Tensor | None, number: int) -> Tensor | None:
            del number
            if row is None:
                return old
            row = row.to_dense() if row.is_sparse else row
            new = row.to(torch.promote_types(row.dtype, torch.float32)) * unscale
            return _hypot(torch.zeros_like(new) if old is None else old, new)

        change = functools.partial(self.roots.change, leaves, tasks, rows, of_row)
        self.roots.when_written(change)

    def end_step(self, *, written: bool) -> None:
        self.roots.end_step(written=written)

    def extra_repr(self) -> str:
        return f"lr={self.lr}"


def _hypot(roots: Tensor, new: Tensor) -> Tensor:
    """Return the roots of sums of squares, in place of the first; of parts of complex numbers."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (roots, new)]
    parts[0].hypot_(parts[1])
    return roots


def _excess_within(rows: Rows, *, unscale: float) -> Tensor:
    """Return the excess of each task, shape (m,), by its roots, shape (m, p), above its rows."""
    m = len(rows) // 2
    total = torch.zeros(m, dtype=torch.float64, device="cpu")
    for block in column_blocks(rows, torch.float64):
        before, new = block.matrix[:m], block.matrix[m:].mul_(unscale)
        roots = torch.hypot(before, new)
        part = (new * (new / roots)).masked_fill(roots == 0, 0.0).sum(1)
        total = total.to(part.device) + part
    return total
