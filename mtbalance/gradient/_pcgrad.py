import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice
from mtbalance._gramians import ZERO_ROW, Arithmetic, Number, weights_of_pair
from mtbalance._random import RandomSource, visiting_orders

from ._base import PrimaryStrategy

_MAX_TASKS_OF_EXPECTATION = 6
_ENTRIES = 2**16
"""Of what all walks take off their rows in one stretch: it stays in the cache."""


def _weights_of_pair(
    a: Number, h: Number, b: Number, of: Arithmetic[Number]
) -> tuple[Number, Number]:
    """Return 1 - min(h, 0) / a and 1 - min(h, 0) / b, but 1 for a zero row."""
    conflict = of.positive(-h)
    least = ZERO_ROW**2 * of.larger(a, b)
    return (
        1 + conflict / of.where(a > least, a, math.inf),
        1 + conflict / of.where(b > least, b, math.inf),
    )


class PCGrad(PrimaryStrategy):
    r"""Project each task's gradient off those that it conflicts with, then add what is left.

    For each task i, starting from :math:`g_i^{PC} = g_i` and visiting the other tasks j in random
    order:

    .. math::
        g_i^{PC} \leftarrow g_i^{PC} - \frac{\min(\langle g_i^{PC}, g_j \rangle, 0)}{|g_j|^2} g_j,
        \qquad d = \sum_i g_i^{PC}

    Every :math:`g_i^{PC}` is a combination of rows, so the walk takes place in m numbers per task,
    not in p. With two tasks there is one order, and nothing is drawn.

    Args:
        order: ``"random"`` as in the paper, or ``"fixed"`` to visit tasks by their number.
        expectation: Average over all orders instead of drawing one (at most 6 tasks), which makes
            the method deterministic and blind to how the tasks are numbered.
        primary: The name of a task, or its number in the order of the tasks, whose gradient is not
            projected: :math:`g_i^{PC} = g_i` for it. The others, its auxiliaries, are projected as
            ever: off the primary task and off each other. None, as in the paper, projects all.
        seed: Start of the random stream.
        generator: A CPU generator to draw from instead.

    Note:
        ``primary`` is an addition to the paper. With one auxiliary task the direction is no worse
        for the primary one than its own gradient: :math:`\langle g_p, d \rangle \ge |g_p|^2`. With
        more, one that is projected off another after the primary may conflict with it again. Where
        the primary task is absent, the others are projected as in the paper.

        A task is not projected off itself, as in the paper's Algorithm 1; the authors' TensorFlow
        code and several others include it, which matters from three tasks on. The authors' code
        discards its shuffle, so that its order is fixed. Zero rows are skipped; no epsilon enters
        the quotient. With three or more tasks the result may still conflict with a task.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1,
        https://arxiv.org/abs/2001.06782.

    Example:
        >>> import torch
        >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))  # (1/2, 1/2) + (0, 1)
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self,
        order: Literal["random", "fixed"] = "random",
        *,
        expectation: bool = False,
        primary: str | int | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(primary)
        check_choice("order", order, ["random", "fixed"])
        if expectation and order == "fixed":
            raise ValueError(
                "`expectation` must be False with order='fixed', but got True. "
                "It averages over the random orders: leave `order` as it is."
            )
        self.order = order
        self.expectation = expectation
        self.random = RandomSource(seed, generator)

    @property
    def growth(self) -> float:
        return 1.0  # a projection shortens

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        if m == 1:
            return torch.ones_like(gramian[0])
        if m == 2:  # the order is free, and nothing is drawn
            weights = weights_of_pair(_weights_of_pair, gramian)
            if self.primary is None:
                return weights
            # What a weight has over 1 is what the other row was projected off this one.
            return torch.where(self.is_primary(gramian).flip(0), 1.0, weights)
        gramian = gramian.detach().cpu()
        tasks, orders = self._walks(m)
        share = m / len(tasks)
        if self.primary is not None:
            projected = ~self.is_primary(gramian)[tasks]
            tasks, orders = tasks[projected], orders[projected]
        squared_norms = gramian.diagonal()
        is_zero = squared_norms <= ZERO_ROW**2 * squared_norms.max()
        divisors = torch.where(is_zero, math.inf, squared_norms)
        projections = gramian / divisors[:, None]
        # Visits of a stretch together, which is faster, but not of all: that would be (m, m, m).
        stretch = max(1, _ENTRIES // (len(tasks) * m))

        products = gramian[tasks]  # (walks, m): with each row, kept up to date
        conflicts = []
        for visits in torch.split(orders, stretch, 1) if stretch < m - 1 else (orders,):
            steps = projections[visits]  # (walks, stretch, m)
            for visited, step in zip(visits[:, :, None].unbind(1), steps.unbind(1), strict=True):
                conflict = products.gather(1, visited).clamp_max_(0)
                products.addcmul_(conflict, step, value=-1)
                conflicts.append(conflict)
        lost = torch.cat(conflicts, 1) / divisors[orders]
        weights = torch.ones_like(divisors)
        return weights.index_add_(0, orders.flatten(), lost.flatten(), alpha=-share)

    def _walks(self, m: int) -> tuple[Tensor, Tensor]:
        """Return which task each walk starts from, (walks,), and whom it visits, (walks, m - 1)."""
        tasks = torch.arange(m, device="cpu")
        if not self.expectation:
            return tasks, visiting_orders(
                m, self.random.generator if self.order == "random" else None
            )
        if m > _MAX_TASKS_OF_EXPECTATION:
            raise ValueError(
                f"`expectation` must be False with more than {_MAX_TASKS_OF_EXPECTATION} "
                f"tasks, but got True with {m}. The number of orders grows as the factorial."
            )
        positions = torch.tensor(list(itertools.permutations(range(m - 1))), device="cpu")
        tasks = tasks.repeat_interleave(len(positions))
        positions = positions.repeat(m, 1).long()
        return tasks, positions + (positions >= tasks[:, None])

    def extra_repr(self) -> str:
        options = f"order={self.order!r}, expectation={self.expectation}"
        return ", ".join(filter(None, [options, super().extra_repr()]))
