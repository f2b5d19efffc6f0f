from typing import ClassVar

from torch import Tensor

from ._base import Weighting, logarithms


class GeometricMean(Weighting):
    r"""Make the geometric mean of the losses the objective, so that their scales do not matter.

    .. math::
        \text{objective} = m \Bigl(\prod_i L_i\Bigr)^{1/m}, \qquad
        w_i = \frac{1}{L_i} \Bigl(\prod_j L_j\Bigr)^{1/m},

    over the m active tasks. Each weighted loss :math:`w_i L_i` is the geometric mean itself: tasks
    have equal parts in the objective, and a loss that falls by half moves the model as much
    whatever its size. Multiplying one loss by a constant multiplies all weighted losses by its m-th
    root. Where all losses are equal, all weights are 1.

    Losses must not be negative. A negative one makes the weights NaN, at which a Balancer raises. A
    loss of 0 makes the objective 0: the other tasks get weights of about 0 in that step, and the
    task itself one of 0, in place of the endless one that the formula has.

    Note:
        The mean is taken of logarithms in float64; a product of losses overflows or vanishes with
        many tasks. The paper's objective is the m-th part of this one; the factor keeps the scale
        of a sum of losses.

    References:
        Chennupati, Sistu, Yogamani and Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and
        Geometric Loss Strategy for Multi-Task Learning", CVPR Workshops 2019,
        https://arxiv.org/abs/1904.08492.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> weighted = GeometricMean()(losses)  # the root of 4, twice
        >>> weighted.sum().backward()
        >>> losses.grad
        tensor([2.0000, 0.5000])
    """

    asks_of_losses: ClassVar[str] = "It takes their logarithms: losses must be at least 0."

    def forward(self, losses: Tensor) -> Tensor:
        mean = logarithms(losses).mean().exp()
        return mean.expand(len(losses)).to(losses.dtype)
