import torch
from torch import Tensor

from mtbalance._random import RandomSource
from mtbalance._remembered import dtype_of_sums

from ._base import Weighting


class RandomWeighting(Weighting):
    r"""Draw new weights in every step.

    .. math::
        w_i = m \, \frac{e^{z_i}}{\sum_j e^{z_j}}, \qquad z_i \sim N(0, 1),

    where the sum is over the m active tasks, and each of all tasks has a draw in each step, active
    or not. Weights are positive and sum to the number of active tasks, and each has a mean of 1: a
    step is that of equal weights and noise. In evaluation mode nothing is drawn, and all are 1.

    Args:
        seed: Start of the random stream. Of several processes, that of the first counts.
        generator: A CPU generator to draw from instead.

    Note:
        In the paper's scale weights sum to 1. Draws are made on the CPU, so that every device and
        every process gets the same; no device is waited for.

    References:
        Lin, Ye, Zhang and Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for
        Multi-Task Learning", TMLR 2022, https://arxiv.org/abs/2111.10603.

    Example:
        >>> import torch
        >>> weighted = RandomWeighting(seed=0)(torch.ones(2))
        >>> weighted.sum()
        tensor(2.)
        >>> bool(weighted[0] == weighted[1])
        False
    """

    def __init__(self, seed: int = 0, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.random = RandomSource(seed, generator)

    def forward(self, losses: Tensor) -> Tensor:
        if not self.training:
            return losses
        draws = torch.randn(self.num_tasks, generator=self.random.generator, device="cpu")
        # From pageable memory, this returns once the few numbers are read.
        draws = draws.to(losses.device, non_blocking=True)[self.active]
        weights = len(draws) * torch.softmax(draws, 0, dtype=dtype_of_sums(losses.device))
        return weights.to(losses.dtype) * losses
