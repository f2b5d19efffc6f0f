from torch import Tensor

from mtbalance._checks import check_at_least, check_below_one
from mtbalance._gramians import factors_to_longest

from ._base import GramianStrategy


class DBMTL(GramianStrategy):
    r"""Bring running means of the task gradients to the length of the longest, and add them.

    With :math:`g_i` the gradient of task i in this step, already times its weight, and
    :math:`t_i`, how often the task has been there,

    .. math::
        G_i \gets g_i + \beta_{t_i} (G_i - g_i), \qquad \beta_t = \frac{\beta}{t^\sigma}, \qquad
        d = \max_j |\hat G_j| \sum_i \frac{\hat G_i}{|\hat G_i|}, \qquad
        \hat G_i = \frac{G_i}{c_i},

    starting from :math:`G_i = 0`, where :math:`c_i` is what the mean of ones would be, so that
    means have the length of gradients from the first step on. Every task moves the model as far,
    however long its gradient is.

    This is the half of DB-MTL that balances gradients. The other half, logarithms of the losses, is
    the weighting ``LogLoss``; ``make_balancer("dbmtl")`` gives both.

    Args:
        beta: :math:`\beta`, the part of its mean that a task keeps, at least 0 (gradients of the
            step alone) and below 1. Source: the authors' code.
        sigma: :math:`\sigma`, at least 0: how fast that part becomes smaller. Source: 0 in the
            authors' code.
        correct: Whether means are divided by :math:`c_i`; without, as published, the first step
            has 1 - beta of the length of the others.

    Note:
        The authors' code adds 1e-8 to each length, which takes tasks with shorter gradients out;
        here a mean that vanishes next to the longest (1e-30 of it) counts as zero, and any other as
        it is. It does not correct means: its first step is 1 - beta of ours, and the later ones
        approach it. Memory is that of ``RowMean``: one more number per task and parameter. As with
        ``RowMean``, the optimizer should have no momentum of its own.

    References:
        Lin, Jiang, Ye, Zhang, Chen, Chen, Liu and Kwok, "Dual-Balancing for Multi-Task Learning",
        2023, https://arxiv.org/abs/2308.12029.

    Example:
        >>> import torch
        >>> strategy = DBMTL(beta=0.5)
        >>> strategy(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([3., 3.])
        >>> strategy(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))  # means (1, 0) and (0, 1)
        tensor([1., 1.])
    """

    def __init__(self, beta: float = 0.9, sigma: float = 0.0, *, correct: bool = True) -> None:
        super().__init__()
        self.beta = check_below_one("beta", beta, "means would never move")
        self.sigma = check_at_least("sigma", sigma, 0)
        self.correct = correct
        self.means = self.mean_rows(beta, sigma, correct=correct)

    def weights(self, gramian: Tensor) -> Tensor:
        return factors_to_longest(gramian)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, sigma={self.sigma}" + ("" if self.correct else ", correct=False")
