from typing import ClassVar

from torch import Tensor

from ._base import Weighting, logarithms


class LogLoss(Weighting):
    r"""Make the sum of the losses' logarithms the objective, so that their scales do not matter.

    .. math:: \text{objective} = \sum_i \log L_i, \qquad w_i = \frac{1}{L_i}

    A loss that falls by half moves the model as much whatever its size, and multiplying a loss by a
    constant changes no gradient at all. Weights do not sum to the number of tasks, so that the
    learning rate has to be found anew, and the objective may be negative: never stop or schedule
    on it. The gradients are those of :class:`GeometricMean`, divided by the geometric mean.

    Losses must not be negative. A negative one makes its weight NaN, at which a Balancer raises. A
    loss of 0, which has no logarithm, gets a weight of 0.

    Note:
        One half of DB-MTL, whose other half brings the task gradients to one length. There is no
        epsilon inside the logarithm, 1e-8 in the authors' code, which would turn smaller losses
        off: losses below the least normal number of their dtype (1e-38) count as 0, and all others
        as they are.

    References:
        Lin, Jiang, Ye, Zhang, Chen, Chen, Liu and Kwok, "Dual-Balancing for Multi-Task Learning",
        2023, https://arxiv.org/abs/2308.12029.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> LogLoss()(losses).sum().backward()
        >>> losses.grad
        tensor([1.0000, 0.2500])
    """

    asks_of_losses: ClassVar[str] = "It takes their logarithms: losses must be at least 0."

    def forward(self, losses: Tensor) -> Tensor:
        return logarithms(losses).to(losses.dtype)
