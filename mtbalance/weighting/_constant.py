from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_numbers, numbers_in_order
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting, task_vector


class Constant(Weighting):
    r"""Weigh each loss by a number of its own that never changes.

    .. math:: \text{objective} = \sum_i w_i L_i

    with :math:`w_i` the weight given for task i. Weights are taken as they are, **not** rescaled:
    their size is a factor of the learning rate, so that weights which sum to the number of tasks
    leave it what it is under :class:`Equal`. A task that is absent from a step takes its weight
    away, and the others keep theirs. A task of weight 0 is not trained, but its loss is recorded.

    Args:
        weights: One number per task, each at least 0 and at least one of them above: a mapping from
            task name, or a sequence in the order of the tasks. There is no default; what a search
            over such weights finds is a strong baseline.

    Note:
        Scalarisation, as papers call it. What is given is configuration and not state: it is not
        saved, and a run may be resumed with other weights.

    References:
        Xin, Ghorbani, Gilmer, Garg and Firat, "Do Current Multi-Task Optimization Methods in Deep
        Learning Even Help?", NeurIPS 2022, https://arxiv.org/abs/2209.11379.

    Example:
        >>> import torch
        >>> weighting = Constant([0.5, 2.0])
        >>> weighting(torch.tensor([3.0, 4.0]))
        tensor([1.5000, 8.0000])
    """

    _narrowest: ClassVar[torch.dtype] = torch.float64

    def __init__(self, weights: Mapping[str, float] | Sequence[float]) -> None:
        super().__init__()
        self.weights = check_numbers("weights", weights, _check_weight)
        numbers = self.weights.values() if isinstance(self.weights, dict) else self.weights
        if not any(number > 0 for number in numbers):
            raise ValueError(
                f"`weights` must have at least one number above 0, but got {self.weights}."
            )

    def setup(self) -> None:
        numbers = numbers_in_order("weights", self.weights, self.tasks or ())
        vector = task_vector(numbers, self.num_tasks, dtype_of_sums())
        self.register_buffer("vector", vector, persistent=False)

    def forward(self, losses: Tensor) -> Tensor:
        return self.get_buffer("vector")[self.active].to(losses.dtype) * losses

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _check_weight(name: str, value: float) -> float:
    return check_at_least(name, value, 0)
