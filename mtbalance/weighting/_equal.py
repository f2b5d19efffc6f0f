from typing import ClassVar

from torch import Tensor

from ._base import Weighting


class Equal(Weighting):
    r"""Leave the losses as they are: every weight is 1.

    .. math:: \text{objective} = \sum_i L_i

    Example:
        >>> import torch
        >>> Equal()(torch.tensor([0.5, 2.0]))
        tensor([0.5000, 2.0000])
    """

    is_sum: ClassVar[bool] = True

    def forward(self, losses: Tensor) -> Tensor:
        return losses
