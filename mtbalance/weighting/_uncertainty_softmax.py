import torch
from torch import Tensor

from mtbalance._checks import check_positive
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting


class UncertaintySoftmax(Weighting):
    r"""Weigh each loss by the softmax of the inverse losses, more for the smaller ones.

    .. math::
        w_i = m \, \frac{e^{1 / (L_i T)}}{\sum_j e^{1 / (L_j T)}},

    over the m active tasks, where the weights are constants for the model: no derivative goes
    through them. They sum to the number of active tasks. The inverse loss is, but for a factor, the
    weight at which uncertainty weighting would come to rest, here without learning and its inertia,
    and the softmax keeps a vanishing loss from an endless weight. Multiplying all losses by a
    constant is as multiplying the temperature by it: the temperature belongs to the scale of the
    losses.

    Made for positive losses. A loss of 0 gets all the weight, shared with others of 0; a negative
    one, less than any positive one.

    Args:
        temperature: T, positive; large values give equal weights, and small ones give everything to
            the smallest loss. Source of the default: none fits all; the authors tune it for each
            data set and network, and 1 leaves the inverse losses as they are. Losses around 0.1
            need about 10, those around 1e-3 about 1000.

    Note:
        UW-SO in the paper, on whose scale weights sum to 1. There is no epsilon under the inverse:
        it is taken in float64, and ends at what that holds.

    References:
        Kirchdorfer, Elich, Kutsche, Stuckenschmidt, Schott and Köhler, "Analytical
        Uncertainty-Based Loss Weighting in Multi-Task Learning", GCPR 2024,
        https://arxiv.org/abs/2408.07985.

    Example:
        >>> import torch
        >>> weighting = UncertaintySoftmax(temperature=1.0)
        >>> weighting(torch.tensor([1.0, 0.5]))  # 2 e / (e + e^2) = 0.538, and the rest times 1/2
        tensor([0.5379, 0.7311])
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def forward(self, losses: Tensor) -> Tensor:
        wide = losses.detach().to(dtype_of_sums(losses.device))
        inverse = (1 / wide.abs()).clamp_max(torch.finfo(wide.dtype).max)  # that of -0 as of 0
        inverse = torch.where(wide < 0, -inverse, inverse)
        # Shifted before the temperature can take what it divides out of range.
        weights = len(losses) * torch.softmax((inverse - inverse.max()) / self.temperature, 0)
        return weights.to(losses.dtype) * losses

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
