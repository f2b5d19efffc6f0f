import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_positive
from mtbalance._simplex import moved_against, project_onto_simplex, shares_of

from ._base import GramianStrategy


class MoDo(GramianStrategy):
    r"""Move the weights towards the task that gains least, by one step on independent batches.

    With :math:`J_1` and :math:`J_2` the task gradients of two independent batches, and J those of
    the batch that the step is made for,

    .. math::
        \lambda \leftarrow \Pi_\Delta \bigl(\lambda - \gamma (J_1 J_2^T + \rho I) \lambda\bigr),
        \qquad d = m \sum_i \lambda_i g_i,

    where :math:`\Pi_\Delta` is the projection onto the weights that are not negative and add up to
    1, :math:`g_i` are the m rows of J, and the weights start as 1/m each and are remembered from
    step to step. With :math:`\rho = 0` they drift towards those of ``MGDA`` for the *expected*
    gradients: :math:`J_1 J_2^T` estimates the products of these without bias, which the Gramian of
    one noisy batch does not.

    A Balancer takes the further batches as functions: ``backward(losses, batches=(one, other))``
    has :math:`J_1` and :math:`J_2` from them, and J from the losses, three batches; with one
    function, :math:`J_1 = J` and two batches serve.

    Args:
        gamma: The step size :math:`\gamma` of the weights, in units of one over a squared gradient
            norm. Source: the authors' code.
        rho: The pull :math:`\rho` towards equal weights, at least 0, in units of a squared gradient
            norm. Source: the authors' code.

    Note:
        The scale of the sum, m times the paper's. With two batches, the paper's update (2.9b) makes
        its step for the mean of both (the authors' code, for the sum); here it is made for the
        losses of the step. So the weights have seen a batch that d is made of, which biases it, as
        in the paper; the products are unbiased. With three batches both are. For (2.9b) itself,
        give the means of the losses of both batches as losses, and both batches as functions.

        Of absent tasks nothing is moved: those at hand share what weight they had together, in
        proportion, or equally where that is none. A change of all losses by a factor is one of
        gamma by its square. Float64 gradients with norms above 1e120 or below 1e-120 move the
        weights as if they had ordinary ones.

        Alone, called on one matrix of gradients, the products are those of this batch with itself.
        That is the method for gradients without noise, and biased for those of a mini-batch.

    References:
        Chen, Fernando, Ying and Chen, "Three-Way Trade-Off in Multi-Objective Learning:
        Optimization, Generalization and Conflict-Avoidance", JMLR 25, 2024, Algorithm 1,
        https://www.jmlr.org/papers/v25/23-1287.html.

    Example:
        >>> import torch
        >>> strategy = MoDo(gamma=0.125, rho=0.0)
        >>> strategy(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # weights (0.6, 0.4) nearly
        tensor([1.1875, 1.6250])
    """

    further_batches = (1, 2)

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = check_positive("gamma", gamma)
        self.rho = check_at_least("rho", rho, 0)
        self.shares = self.per_task(start=1.0)

    def weights(self, gramian: Tensor) -> Tensor:
        return self.weights_across(gramian, gramian)

    def weights_across(self, gramian: Tensor, across: Tensor) -> Tensor:
        del gramian
        before = self.shares.read(across)
        across = across.detach().to(before)
        weights = shares_of(before)
        slope = across @ weights + self.rho * weights
        new = project_onto_simplex(moved_against(weights, slope, self.gamma))
        finite = across.isfinite().all()
        self.shares.write(torch.where(finite, before.sum() * new, before))
        return torch.where(finite, len(new) * new, torch.nan).double()

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, rho={self.rho}"
