import torch
from torch import Tensor

from mtbalance._checks import check_named_primary
from mtbalance._gramians import RESOLUTION, ZERO_ROW

from ._base import PrimaryStrategy


class GradientCosine(PrimaryStrategy):
    r"""Leave an auxiliary task out while its gradient opposes that of the primary task.

    With the primary task p and the cosines between its gradient and those of the others,

    .. math::
        d = g_p + \sum_{i \ne p} w_i g_i, \qquad
        c_i = \frac{\langle g_p, g_i \rangle}{|g_p| |g_i|}, \qquad
        w_i = \begin{cases} {[c_i \ge 0]} & \text{unweighted} \\ \max(c_i, 0) & \text{weighted}
        \end{cases}

    An auxiliary task that is of no use to the primary one in a step does not train the shared
    parameters in it; the direction never conflicts with the primary task. The auxiliary tasks' own
    parameters are trained in every step.

    Args:
        primary: The name of the primary task, or its number in the order of the tasks.
        weighted: Whether auxiliary tasks count by their cosine, instead of in full or not at all.
            The paper has both.

    Note:
        The paper has one auxiliary task; here each is judged for itself, by its gradient on the
        shared parameters. Gradients that are orthogonal up to the rounding of their float64 inner
        product do not oppose. Where the primary task is absent, or its gradient is zero, nothing is
        known of the others' use, and d is the plain sum.

    References:
        Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", 2018,
        https://arxiv.org/abs/1812.02224.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [3.0, 4.0]])
        >>> GradientCosine(primary=0)(gradients)  # the second opposes the first
        tensor([4., 4.])
        >>> GradientCosine(primary=0, weighted=True)(gradients)  # the third has the cosine 3/5
        tensor([2.8000, 2.4000])
    """

    def __init__(self, primary: str | int, *, weighted: bool = False) -> None:
        super().__init__(primary)
        check_named_primary(primary, "Without one, use Sum.")
        self.weighted = weighted

    @property
    def growth(self) -> float:
        return 1.0

    def weights(self, gramian: Tensor) -> Tensor:
        is_primary = self.is_primary(gramian)
        norms = gramian.diagonal().clamp_min(0).sqrt()
        own = torch.where(is_primary, norms, 0.0).sum()  # 0 without a primary task
        products = torch.where(is_primary[:, None], gramian, 0.0).sum(0)
        least = ZERO_ROW * norms.max()
        known = (own > least) & (norms > least)
        cosines = products / torch.where(known, own, 1.0) / torch.where(known, norms, 1.0)
        opposes = (cosines < -RESOLUTION).double()
        weights = cosines.clamp(0, 1) if self.weighted else 1 - opposes
        weights = torch.where(known & ~is_primary, weights, 1.0)
        return weights + 0 * norms.sum()  # comparisons pass NaN by

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weighted={self.weighted}"
