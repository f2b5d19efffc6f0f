from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_preference, numbers_in_order
from mtbalance._remembered import dtype_of_sums
from mtbalance._rows import at_least_float32

from ._base import Weighting, across, task_vector


class COSMOS(Weighting):
    r"""Pull the losses towards a ray that you choose, by their cosine with it.

    With preferences r, scaled to sum to m over the m active tasks,

    .. math::
        \text{objective} = \sum_i r_i L_i - m \lambda \cos(r, L), \qquad
        w_i = r_i - \frac{m \lambda}{|L|} \Bigl(\frac{r_i}{|r|} - \cos(r, L) \frac{L_i}{|L|}\Bigr),

    where :math:`\cos(r, L) = \sum_i r_i L_i / (|r| \, |L|)`. The cosine is largest where the losses
    are in the proportions of r: a task with a *larger* number has more weight in the sum, and may
    keep a larger share of the losses. The weighted losses :math:`w_i L_i` sum to
    :math:`\sum_i r_i L_i` whatever the penalty, as the cosine does not depend on the size of L.

    A weight is **negative** where the penalty is large and a loss is far below its share; the
    smaller the losses all are, the larger is what the cosine puts on the weights. If all losses are
    zero, or below the least normal number, the cosine has no part in them. Where losses are on the
    ray up to the rounding of float64, it has none either. The objective may be negative: never stop
    or schedule on it.

    Args:
        penalty: :math:`\lambda`, at least 0; 0 leaves the weighted sum. Source of the default: none
            fits all; the authors choose between 0.01 and 8 for each data set.
        preference: One positive number per task, a mapping from task name or a sequence in the
            order of the tasks, of which only the proportions matter. None for equal ones.

    Note:
        The objective of the paper, in which r sums to 1, times m: the scale of the sum. The
        authors draw r anew in each step, and give it to the network as a further input, to learn
        all trade-offs in one network. Here, it is one that you choose. It is configuration, and
        not saved.

    References:
        Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective
        Learning", ICDM 2021, https://arxiv.org/abs/2103.13392.

    Example:
        >>> import torch
        >>> losses = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> weighting = COSMOS(penalty=12.5)
        >>> weighting(losses).sum().backward()
        >>> losses.grad * 2**0.5  # sqrt(2) - 5 (1 - 7/5 * 3/5), and sqrt(2) - 5 (1 - 7/5 * 4/5)
        tensor([0.6142, 2.0142])
    """

    _narrowest: ClassVar[torch.dtype] = torch.float64

    def __init__(
        self,
        penalty: float = 1.0,
        preference: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.penalty = check_at_least("penalty", penalty, 0)
        self.preference = check_preference(preference)

    def setup(self) -> None:
        given, tasks = self.preference, self.tasks or ()
        numbers = 1.0 if given is None else numbers_in_order("preference", given, tasks)
        vector = task_vector(numbers, self.num_tasks, dtype_of_sums())
        self.register_buffer("vector", vector, persistent=False)

    def forward(self, losses: Tensor) -> Tensor:
        wide = losses.to(dtype_of_sums(losses.device))
        chosen: Tensor = self.get_buffer("vector")[self.active].to(wide)
        preference = len(chosen) * (chosen / chosen.max()) / (chosen / chosen.max()).sum()
        ray: Tensor = preference / torch.linalg.vector_norm(preference)
        # Divided by the largest before squares can leave the range.
        size = wide.detach().abs().max()
        vanished = size < torch.finfo(at_least_float32(losses.dtype)).tiny
        relative = (wide.detach() / size).masked_fill(vanished, 1.0)
        length: Tensor = torch.linalg.vector_norm(relative)
        unit = relative / length
        slopes = (across(ray, unit) / length / size).masked_fill(vanished, 0.0)
        cosines = (ray * unit).masked_fill(vanished, 0.0)  # each task's part of the cosine
        cosines = cosines + slopes * (wide - wide.detach())
        return (preference * wide - len(chosen) * self.penalty * cosines).to(losses.dtype)

    def extra_repr(self) -> str:
        return f"penalty={self.penalty}, preference={self.preference}"
