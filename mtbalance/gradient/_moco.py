from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_choice
from mtbalance._simplex import moved_against, project_onto_simplex, shares_of

from ._base import GramianStrategy


class MoCo(GramianStrategy):
    r"""Track each task's gradient over the steps, and follow the shortest combination of these.

    With :math:`g_i` the gradient of task i in this step, already times its weight, m tasks and
    step t,

    .. math::
        y_i \gets y_i - \beta_t (y_i - g_i), \qquad
        \lambda \gets \Pi\bigl(\lambda - \gamma_t (\hat Y \hat Y^\top + \rho I) \lambda\bigr),
        \qquad d = m\, \hat Y^\top \lambda

    with :math:`\beta_t = \beta / t^{\sigma_\beta}` and :math:`\gamma_t = \gamma /
    t^{\sigma_\gamma}`, starting from :math:`y_i = 0` and equal :math:`\lambda`. The rows of
    :math:`\hat Y` are :math:`y_i` over what the mean of ones would be, and :math:`\Pi` is the
    nearest point of the simplex. One step of projected gradient descent per step of training goes
    towards the weights of MGDA, of gradients whose noise is averaged out: a single mini-batch
    biases these.

    Lengths count: with gradients ten times as long, :math:`\lambda` moves a hundred times as far.

    Args:
        beta: :math:`\beta`, what part of a tracked gradient the new one is in the first step, above
            0 and at most 1. Source: the authors' code, as for all others.
        gamma: :math:`\gamma`, at least 0: the step size of :math:`\lambda`.
        rho: :math:`\rho`, at least 0: pulls :math:`\lambda` towards equal numbers.
        beta_sigma: :math:`\sigma_\beta`, at least 0.
        gamma_sigma: :math:`\sigma_\gamma`, at least 0.
        projection: ``"simplex"`` as in the paper, or ``"softmax"`` as in the authors' code, where
            :math:`\Pi` is the softmax, which gives every task some weight.
        correct: Whether tracked gradients are divided by what the mean of ones would be; without,
            as published, the first step has beta of the length of others.

    Note:
        The paper sums up with weights of sum 1, an m-th of the direction here. The authors' code
        tracks :math:`g_i / |g_i|` times the loss of task i instead of :math:`g_i`. That needs the
        losses and is left out; ``LogLoss`` makes gradients free of a loss's scale.

        Each task counts its own steps t. One that is absent keeps its gradient and its part of the
        sum of :math:`\lambda`; the others share what they have together. Memory is that of
        ``RowMean``: one more number per task and parameter. As with ``RowMean``, the optimizer
        should have no momentum of its own.

    References:
        Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, "Mitigating Gradient Bias in
        Multi-objective Learning: A Provably Convergent Approach", ICLR 2023.

    Example:
        >>> import torch
        >>> strategy = MoCo(gamma=0.25)
        >>> strategy(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # (1/2, 1/2) - 1/4 (1/2, 2): 11/16
        tensor([1.3750, 1.2500])
    """

    def __init__(
        self,
        beta: float = 0.5,
        gamma: float = 0.1,
        rho: float = 0.0,
        *,
        beta_sigma: float = 0.5,
        gamma_sigma: float = 0.5,
        projection: Literal["simplex", "softmax"] = "simplex",
        correct: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < beta <= 1:
            raise ValueError(f"`beta` must be above 0 and at most 1, but got {beta}.")
        self.beta = beta
        self.gamma = check_at_least("gamma", gamma, 0)
        self.rho = check_at_least("rho", rho, 0)
        self.beta_sigma = check_at_least("beta_sigma", beta_sigma, 0)
        self.gamma_sigma = check_at_least("gamma_sigma", gamma_sigma, 0)
        check_choice("projection", projection, ["simplex", "softmax"])
        self.projection = projection
        self.correct = correct
        self.means = self.mean_rows(beta, beta_sigma, of_row=True, correct=correct)
        self.lambdas = self.per_task(start=1.0)  # times the number of tasks
        self.steps = self.per_task()

    def weights(self, gramian: Tensor) -> Tensor:
        before, steps = self.lambdas.read(gramian), self.steps.read(gramian) + 1
        gramian = gramian.detach().to(before)
        own = shares_of(before)  # equal where absent tasks have all there is
        slope = gramian @ own + self.rho * own
        moved = moved_against(own, slope, self.gamma / steps**self.gamma_sigma)
        new = (
            torch.softmax(moved, 0) if self.projection == "softmax" else project_onto_simplex(moved)
        )
        good = new.isfinite().all()
        self.lambdas.write(torch.where(good, new * before.sum(), before))
        self.steps.write(torch.where(good, steps, steps - 1))
        return len(new) * new

    def extra_repr(self) -> str:
        options = f"beta={self.beta}, gamma={self.gamma}, rho={self.rho}"
        options += "" if self.projection == "simplex" else f", projection={self.projection!r}"
        return options + ("" if self.correct else ", correct=False")
