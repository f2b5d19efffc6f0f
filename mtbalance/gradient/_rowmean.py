from torch import Tensor

from mtbalance._checks import check_below_one

from ._base import GradientStrategy, WrappingStrategy


class RowMean(WrappingStrategy):
    r"""Let a strategy get means of each task's gradients over the steps, instead of the gradients.

    With :math:`g_i` the gradient of task i in this step, already times its weight, and
    :math:`t_i`, how often the task has been there,

    .. math::
        M_i \gets \beta M_i + (1 - \beta)\, g_i, \qquad
        d = \text{strategy}\Bigl(\frac{M_1}{1 - \beta^{t_1}}, \dots,
            \frac{M_m}{1 - \beta^{t_m}}\Bigr),

    starting from :math:`M_i = 0`. Gradients of mini-batches conflict by chance, too; their means do
    so less, and lag behind. A task that is absent keeps its mean. Inner products are those of the
    means, over all processes and shards, while the record tells about the gradients of the step.

    **One task per step.** With ``recall=True``, tasks that are absent take part with the means that
    they have. A step may then bring the loss of a single task, in turn, and costs one backward
    pass, while the strategy sees all tasks: around ``ConFIG``, these are the directions of
    momentum ConFIG. Rows are then those of all tasks that have a mean, in the order of ``tasks``.

    Args:
        strategy: Any gradient strategy, which then gets means. Only another that averages rows
            cannot be within.
        beta: The part of its mean that a task keeps, at least 0 (the strategy itself) and below 1.
            A mean reaches about 1 / (1 - beta) steps back. Source: 0.9 in DB-MTL and in momentum
            ConFIG.
        correct: Whether means are divided by :math:`1 - \beta^{t_i}`, so that the first ones have
            the length of gradients. Without, as in DB-MTL, the first step has 1 - beta of it.
        recall: Whether absent tasks take part with their means.

    Note:
        Memory: one number of at least float32 per task and parameter, for good (times m shared
        parameters, as the rows), and one more direction, since rows stay until the step is written.
        Time: no further backward pass; means are made while rows are read anyway. ``features=`` and
        ``every`` do not go with it. The optimizer should have no momentum of its own: averaged
        twice, directions lag so far behind that high learning rates, which Adam bears otherwise,
        ruin a training (``Adam(betas=(0.0, 0.999))`` does without).

        Momentum ConFIG also has a second moment, of gradients that it finds from the change of the
        direction; here that is the business of the optimizer (``Adam(betas=(0.0, 0.999))``), which
        sees the direction itself. Every task keeps the weight with which it came.

    References:
        Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks", https://arxiv.org/abs/2408.11104, Algorithm 2, for ``recall``; Lin et al.,
        "Dual-Balancing for Multi-Task Learning", https://arxiv.org/abs/2308.12029.

    Example:
        >>> import torch
        >>> from mtbalance.gradient import Sum
        >>> strategy = RowMean(Sum(), beta=0.5)
        >>> strategy(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([2., 4.])
        >>> strategy(torch.tensor([[8.0, 0.0], [0.0, 4.0]]))  # (2/4 + 8/2) / (3/4) = 6
        tensor([6., 4.])
    """

    def __init__(
        self,
        strategy: GradientStrategy,
        beta: float = 0.9,
        *,
        correct: bool = True,
        recall: bool = False,
    ) -> None:
        super().__init__(strategy)
        if strategy.further_batches:
            raise TypeError(
                "`strategy` must do with the gradients of one batch, but "
                f"{type(strategy).__name__} needs those of several, which have no means."
            )
        self.beta = check_below_one("beta", beta, "means would never move")
        self.correct = correct
        self.recall = recall
        self.means = self.mean_rows(beta, correct=correct, recall=recall)
        self.by_gramian = strategy.by_gramian or strategy.is_sum
        self.coordinatewise = strategy.coordinatewise and not self.by_gramian

    def coefficients(self, gramian: Tensor, across: Tensor | None = None) -> Tensor | None:
        del across
        return self.strategy.coefficients(gramian)

    def row_factors(self, gramian: Tensor) -> Tensor | None:
        return self.strategy.row_factors(gramian)

    def on_columns(self, gradients: Tensor, first: int) -> Tensor:
        return self.strategy.on_columns(gradients, first)

    def forward(self, gradients: Tensor) -> Tensor:
        return self.means.alone(gradients, self.take, self.strategy.forward)

    def extra_repr(self) -> str:
        options = f"beta={self.beta}"
        options += "" if self.correct else ", correct=False"
        return options + (", recall=True" if self.recall else "")
