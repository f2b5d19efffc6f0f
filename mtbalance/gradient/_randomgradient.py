import torch
from torch import Tensor

from mtbalance._random import RandomSource

from ._base import GramianStrategy


class RandomGradient(GramianStrategy):
    r"""Weigh the task gradients at random, anew in each step.

    With m independent normal draws z,

    .. math:: d = m \sum_i \frac{e^{z_i}}{\sum_j e^{z_j}} \, g_i.

    A baseline: a method that is to be better than chance is to be better than this one. The weights
    are positive, sum to m and have a mean of 1 each over the draws, so that d is the plain sum on
    average. Unlike random weights of the losses, they leave the tasks' own parameters alone.

    Args:
        seed: Start of the random stream.
        generator: A CPU generator to draw from instead.

    Note:
        The paper weighs losses, with weights that sum to 1; m times as much is the scale of the
        sum. A task whose gradient is zero takes part in the draw, so that what is drawn depends on
        the number of tasks alone. A single task has the weight 1, and nothing is drawn.

    References:
        Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
        Learning", TMLR 2022, https://arxiv.org/abs/2111.10603.

    Example:
        >>> import torch
        >>> direction = RandomGradient(seed=1)(torch.eye(3))
        >>> direction.sum()  # of the weights
        tensor(3.)
    """

    def __init__(self, seed: int = 0, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.random = RandomSource(seed, generator)

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        if m == 1:
            return torch.ones_like(gramian[0])
        draws = torch.randn(m, generator=self.random.generator, dtype=torch.float64, device="cpu")
        return m * draws.softmax(0)
