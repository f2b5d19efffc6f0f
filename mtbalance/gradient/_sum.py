from typing import ClassVar

from torch import Tensor

from ._base import GradientStrategy


class Sum(GradientStrategy):
    r"""Add the task gradients: no surgery, ordinary multi-task training.

    .. math:: d = \sum_i g_i

    With a weighting that needs no per-task gradients, the Balancer makes one backward pass and no
    matrix.

    Example:
        >>> import torch
        >>> Sum()(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([2., 2.])
    """

    is_sum: ClassVar[bool] = True
    coordinatewise = True

    @property
    def growth(self) -> float:
        return 1.0

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0)
