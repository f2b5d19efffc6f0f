from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import (
    check_at_least,
    check_finite,
    check_numbers,
    check_preference,
    numbers_in_order,
)
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting, across, task_vector


class PBI(Weighting):
    r"""Descend along a ray that you choose, and pay for the distance from it.

    With preferences r, scaled to sum to m over the m active tasks, and an ideal point z from which
    the ray starts,

    .. math::
        \text{objective} = |r| \, (d_1 + \theta \, d_2), \qquad
        d_1 = \sum_i \frac{r_i}{|r|} (L_i - z_i), \qquad
        d_2 = |e|, \qquad
        e = L - z - d_1 \frac{r}{|r|}, \qquad
        w_i = r_i + \theta \, |r| \, \frac{e_i}{d_2}.

    :math:`d_1` is how far the losses are along the ray, and :math:`d_2` how far off it. On the ray
    the losses, counted from z, are in the proportions of r: a task with a *larger* number may keep
    a larger loss. There, :math:`d_2` has a kink, and its part of the weights is 0; they jump as the
    losses leave the ray. What float64 cannot tell from the ray is on it.

    Weights are **negative** where the penalty outweighs the preference: of two tasks with equal
    ones, the larger loss has the weight :math:`1 + \theta` and the smaller :math:`1 - \theta`. A
    Balancer with a gradient strategy then balances a row that is turned round.

    Args:
        theta: :math:`\theta`, at least 0, the penalty for the distance from the ray; 0 leaves the
            weighted sum. Source: 5 in the paper, for populations of solutions rather than networks.
        preference: One positive number per task, a mapping from task name or a sequence in the
            order of the tasks, of which only the proportions matter. None for equal ones.
        ideal: z, one number per task, by name or in order: the losses that no training can go
            below. None for zeros.

    Note:
        The paper's function for minimising, times :math:`|r|`, so that the part along the ray is on
        the scale of the sum. What is given is configuration, and not saved. z does not move with
        the least losses seen, as it does in the paper's algorithm.

    References:
        Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE
        Transactions on Evolutionary Computation 11(6), 2007,
        https://doi.org/10.1109/TEVC.2007.892759.

    Example:
        >>> import torch
        >>> weighting = PBI(theta=0.5)
        >>> weighting(torch.tensor([3.0, 1.0]))  # weights of 1.5 and 0.5
        tensor([4.5000, 0.5000])
    """

    _narrowest: ClassVar[torch.dtype] = torch.float64

    def __init__(
        self,
        theta: float = 5.0,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        ideal: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.theta = check_at_least("theta", theta, 0)
        self.preference = check_preference(preference)
        self.ideal = None if ideal is None else check_numbers("ideal", ideal, check_finite)

    def setup(self) -> None:
        tasks = self.tasks or ()
        given = {"preference": (self.preference, 1.0), "ideal": (self.ideal, 0.0)}
        for name, (numbers, default) in given.items():
            values = default if numbers is None else numbers_in_order(name, numbers, tasks)
            vector = task_vector(values, self.num_tasks, dtype_of_sums())
            self.register_buffer(f"{name}_vector", vector, persistent=False)

    def forward(self, losses: Tensor) -> Tensor:
        wide = losses.to(dtype_of_sums(losses.device))
        chosen: Tensor = self.get_buffer("preference_vector")[self.active].to(wide)
        preference = len(chosen) * (chosen / chosen.max()) / (chosen / chosen.max()).sum()
        length: Tensor = torch.linalg.vector_norm(preference)
        gap = wide - self.get_buffer("ideal_vector")[self.active].to(wide)
        # Divided by the largest before squares can leave the range.
        size = gap.detach().abs().max()
        off = across((gap.detach() / size).masked_fill(size == 0, 0.0), preference / length)
        distance: Tensor = torch.linalg.vector_norm(off)
        slopes = (off / distance).masked_fill(distance == 0, 0.0)
        # The objective is the sum of its derivatives times what the losses are above the ideal.
        return ((preference + self.theta * length * slopes) * gap).to(losses.dtype)

    def extra_repr(self) -> str:
        return f"theta={self.theta}, preference={self.preference}, ideal={self.ideal}"
