import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_below_one, check_count, check_positive
from mtbalance._rows import finite_entries
from mtbalance._simplex import nearest_weights

from ._base import Preference, PreferringStrategy

_STEEPEST = 1e60
"""Products are at most so many times what the scale makes of the diagonal: from there on no step
remembers where it began, and float64 has room for twenty of them."""


class SDMGrad(PreferringStrategy):
    r"""Take the shortest convex combination of the gradients, held near that of a preference.

    With :math:`J_1` and :math:`J_2` the task gradients of two independent batches, J those of the
    batch that the step is made for, and :math:`A = J_1 J_2^T / s^2`, steps of gradient descent with
    momentum look for the weights w that make :math:`|\sum_i (w_i + \lambda \tilde w_i) g_i|` the
    smallest,

    .. math::
        v \leftarrow \mu v + A (w + \lambda \tilde w), \qquad
        w \leftarrow \Pi_\Delta (w - \eta v), \qquad
        d = m \sum_i \frac{w_i + \lambda \tilde w_i}{1 + \lambda} \, g_i,

    where :math:`g_i` are the m rows of J, :math:`\Pi_\Delta` is the projection onto the weights
    that are not negative and add up to 1, :math:`\tilde w` are the preferred weights, 1/m each by
    default, v starts at zero in each call, and w is remembered from step to step, from 1/m each on.
    The scale s is the mean of the roots of the diagonal of :math:`J_1 J_2^T`, negative entries
    being 0, so that no factor that all losses have in common matters. As :math:`\lambda` grows, d
    goes from the shortest convex combination (``MGDA``) to m times the preferred one.

    A Balancer takes the further batches as functions: ``backward(losses, batches=(one, other))``
    has :math:`J_1` and :math:`J_2` from them, and J from the losses, three batches as in the paper;
    with one function, :math:`J_1 = J` and two batches serve.

    Args:
        lam: How much the preference counts, :math:`\lambda`, at least 0. Source: the scripts of the
            authors' code.
        n_iter: Steps per call. Source: the authors' code.
        lr: The step size :math:`\eta`. Source: the authors' code.
        momentum: :math:`\mu`, at least 0 and below 1. Source: the authors' code.
        preference: One positive number per task: a mapping from task name, or a sequence in the
            order of the tasks. Only their ratios count. None, for 1 each, is the paper's choice.

    Note:
        In the authors' code the three batches are one: what it makes for their gradients is one
        tensor under three names, and holds the last batch in the end. LibMTL has three, and a step
        size of 5. Both add a small number under a root or to the scale. Here nothing is added, and
        where no :math:`A_{ii}` is positive there is no scale, and w stays.

        Twenty steps of this size are a rule and no solution. They swing from corner to corner
        unless gradients are alike, and may magnify what rounding or noise has changed. With a small
        lr and more steps w comes to rest, for a Gramian at the minimum of
        :math:`|\sum_i (w_i + \lambda \tilde w_i) g_i|`.

        Of absent tasks nothing is moved: those at hand share what weight they had together, in
        proportion, or equally where that is none; so do the preferred weights. Alone, called on one
        matrix of gradients, the products are those of this batch with itself. That is the method
        for gradients without noise, and biased for those of a mini-batch.

    References:
        Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable
        Stochastic Algorithms", NeurIPS 2023, Algorithm 1, https://arxiv.org/abs/2305.18409.

    Example:
        >>> import torch
        >>> strategy = SDMGrad(lam=1.0, n_iter=1, lr=0.125)
        >>> strategy(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # scale 2; w = (5/8, 3/8)
        tensor([1.1250, 2.6250])
    """

    further_batches = (1, 2)

    def __init__(
        self,
        lam: float = 0.3,
        n_iter: int = 20,
        lr: float = 10.0,
        momentum: float = 0.5,
        preference: Preference | None = None,
    ) -> None:
        super().__init__(preference)
        self.lam = check_at_least("lam", lam, 0)
        self.n_iter = check_count("n_iter", n_iter)
        self.lr = check_positive("lr", lr)
        self.momentum = check_below_one("momentum", momentum, "it would never end")
        self.shares = self.per_task(start=1.0)

    def weights(self, gramian: Tensor) -> Tensor:
        return self.weights_across(gramian, gramian)

    def weights_across(self, gramian: Tensor, across: Tensor) -> Tensor:
        del gramian
        across = across.detach().to("cpu", torch.float64)  # many small steps
        before = self.shares.read(across)
        if not all(finite_entries(across.flatten())):
            return torch.full_like(across[0], torch.nan)
        held = before.tolist()
        total = math.fsum(held)
        weights = [each / total if total > 0 else 1 / len(held) for each in held]
        preferred = self.preferences(across).tolist()
        pull = [self.lam * each / math.fsum(preferred) for each in preferred]
        weights = self._moved(_scaled(across.tolist()), weights, pull)
        self.shares.write(before.new_tensor([total * each for each in weights]))
        m = len(weights)
        combined = [m * (w + p) / (1 + self.lam) for w, p in zip(weights, pull, strict=True)]
        return torch.tensor(combined, dtype=torch.float64, device="cpu")

    def _moved(
        self, across: list[list[float]], weights: list[float], pull: Sequence[float]
    ) -> list[float]:
        """Return the weights after all steps; ``pull`` is what the preference adds to them.

        With Python's numbers, and sums that do not depend on the order of the tasks: steps of this
        size may magnify what those are rounded by.
        """
        speed = [0.0] * len(weights)
        fixed = [math.fsum(map(operator.mul, row, pull)) for row in across]
        for _ in range(self.n_iter):
            some = [(number, weight) for number, weight in enumerate(weights) if weight > 0]
            slope = [
                math.fsum([of_pull, *[row[number] * weight for number, weight in some]])
                for row, of_pull in zip(across, fixed, strict=True)
            ]
            # What all weights have in common changes nothing, and might drown them if it is large.
            least = min(slope)
            speed = [self.momentum * v + (x - least) for v, x in zip(speed, slope, strict=True)]
            least = min(speed)
            weights = nearest_weights(
                [w - self.lr * (v - least) for w, v in zip(weights, speed, strict=True)]
            )
        return weights

    def extra_repr(self) -> str:
        own = f"lam={self.lam}, n_iter={self.n_iter}, lr={self.lr}, momentum={self.momentum}"
        return ", ".join(filter(None, [own, super().extra_repr()]))


def _scaled(across: list[list[float]]) -> list[list[float]]:
    """Return products over the square of the mean of the diagonal's roots; 0 where that is 0."""
    scale = math.fsum(math.sqrt(max(row[i], 0.0)) for i, row in enumerate(across)) / len(across)
    if scale == 0:
        return [[0.0] * len(across)] * len(across)
    largest = max(max(map(abs, row)) for row in across)
    scale = max(scale, math.sqrt(largest / _STEEPEST))
    return [[number / scale / scale for number in row] for row in across]
