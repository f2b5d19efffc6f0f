import torch
from torch import Tensor

from mtbalance._checks import check_below_one
from mtbalance._gramians import ZERO_ROW

from ._base import GradientStrategy, GramianStrategy, WrappingStrategy


class Smoothed(WrappingStrategy, GramianStrategy):
    r"""Average the weights of another strategy over the steps.

    With the weights :math:`\hat\lambda_t` that the strategy gives to the rows of step t,

    .. math::
        \lambda_t = \alpha \lambda_{t-1} + (1 - \alpha) \hat\lambda_t, \qquad
        \lambda_1 = \hat\lambda_1, \qquad d_t = \sum_i \lambda_{t,i} \, g_i.

    Weights that follow every mini-batch are correlated with its gradients, which biases the
    direction; an average over many steps nearly is not.

    Args:
        strategy: The strategy, which the Gramian decides; so does it about ``Normalized(Sum())``.
        alpha: How much of the last average stays, at least 0 (the strategy itself) and below 1. The
            average reaches about 1 / (1 - alpha) steps back. No default: the paper's convergence
            needs it to approach 1 as the steps of the optimizer become smaller.

    Note:
        Called CR-MOGM in the paper, around MGDA, PCGrad, CAGrad and others. An average begins
        with its task's first step. A task that is absent, or whose gradient is zero, keeps its
        average: the weight of such a row means nothing. What holds of every single direction of the
        strategy, such as that no task is in conflict with it, need not hold of averages.

    References:
        Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
        Beyond", NeurIPS 2022, Algorithm 1.

    Example:
        >>> import torch
        >>> from mtbalance.gradient import ConFIG
        >>> strategy = Smoothed(ConFIG(), alpha=0.75)
        >>> strategy(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # weights (1, 1)
        tensor([1., 1.])
        >>> strategy(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # (2, 2/3): averages (5/4, 11/12)
        tensor([1.2500, 2.7500])
    """

    def __init__(self, strategy: GradientStrategy, alpha: float) -> None:
        super().__init__(strategy)
        if not strategy.by_gramian:
            raise TypeError(
                "`strategy` must be a GramianStrategy, or Normalized around one or around Sum, but "
                f"got {type(strategy).__name__}."
            )
        self.alpha = check_below_one("alpha", alpha, "it would never move")
        self.averages = self.per_task(start=torch.nan)

    def weights(self, gramian: Tensor) -> Tensor:
        return self._averaged(self.strategy.coefficients(gramian), gramian)

    def weights_across(self, gramian: Tensor, across: Tensor) -> Tensor:
        return self._averaged(self.strategy.coefficients(gramian, across), gramian)

    def _averaged(self, weights: Tensor | None, gramian: Tensor) -> Tensor:
        """Return the new average of weights, which is remembered."""
        if weights is None:
            raise TypeError(
                f"{type(self.strategy).__name__}.coefficients must return one number per row, as "
                "`by_gramian` says, but got None."
            )
        before = self.averages.read(gramian)
        gramian, weights = gramian.detach().to(before.device), weights.detach().to(before)
        # In this form an alpha of 0 and weights that stay are exact.
        new = weights + self.alpha * (before - weights)
        new = torch.where(before.isnan(), weights, new)
        squares = gramian.diagonal()
        counts = (squares > ZERO_ROW**2 * squares.max()) & new.isfinite().all()
        self.averages.write(torch.where(counts, new, before))
        return new.double()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
