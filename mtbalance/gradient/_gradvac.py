from typing import Literal

import torch
from torch import Tensor

from mtbalance._checks import check_choice, check_fraction
from mtbalance._gramians import FLOATS, TENSORS, ZERO_ROW, Arithmetic, Number, weights_on_cpu
from mtbalance._random import RandomSource, visiting_orders

from ._base import GramianStrategy

_LARGEST_TARGET = 1 - 5e-13
"""A target above it, an angle of 1e-6, counts as it: to bring two gradients as close as float64 can
tell would make one of them longer without bound."""
_VANISHED = 1e-14
"""The part of its squared length below which a changed gradient has no direction but rounding."""


def _pull(phi: Number, rho: Number, of: Arithmetic[Number]) -> Number:
    """Return how much of a unit row brings a unit vector with the cosine phi to the cosine rho."""
    rho = of.where(rho > _LARGEST_TARGET, _LARGEST_TARGET, rho)
    sine = of.sqrt(of.positive((1 - rho) * (1 + rho)))
    sine = of.where(sine > 0, sine, 1.0)  # a target of -1, which no cosine is below
    pull = rho * of.sqrt(of.positive((1 - phi) * (1 + phi))) / sine - phi
    return of.where(phi < rho, pull, 0.0)


class GradVac(GramianStrategy):
    r"""Turn tasks' gradients towards each other until they are as similar as they usually are.

    What is usual is a running mean :math:`\rho_{ij}` of cosines, 0 at the start. For each task i,
    starting from :math:`g_i' = g_i` and visiting the other tasks j in random order, with
    :math:`\phi = \cos(g_i', g_j)`: where :math:`\phi < \rho_{ij}`,

    .. math::
        g_i' \leftarrow g_i' + \frac{|g_i'|}{|g_j|} \,
        \frac{\rho_{ij} \sqrt{1 - \phi^2} - \phi \sqrt{1 - \rho_{ij}^2}}{\sqrt{1 - \rho_{ij}^2}} \,
        g_j,

    after which the cosine is :math:`\rho_{ij}`. Whether or not that was so,
    :math:`\rho_{ij} \leftarrow (1 - \beta) \rho_{ij} + \beta \phi` with the cosine before. The
    direction is :math:`d = \sum_i g_i'`.

    The walk takes place in m numbers per task. In the first step the targets are 0, and the method
    is PCGrad. With two tasks there is one order, and nothing is drawn.

    Args:
        beta: How much of today's cosine enters the mean, between 0 (PCGrad for good) and 1 (that of
            the last step). Source of 1e-2: the paper.
        order: ``"random"`` as in the paper, or ``"fixed"`` to visit tasks by their number.
        seed: Start of the random stream.
        generator: A CPU generator to draw from instead.

    Note:
        Several packages have a beta of 0.5, and some move the mean only where a gradient is
        changed; here it moves always, as in the paper. The mean of pairs with an absent task or a
        zero row stays, and so do both gradients; a changed gradient that is shorter than 1e-7 of
        its length meets nobody any more. A mean above 1 - 5e-13, as of tasks that have long been
        parallel, counts as that. From a Gramian, the sine of two rows that are opposite is known up
        to 1e-8 only. Each group of parameters of a Balancer has means of its own, as each layer has
        in the paper.

    References:
        Wang, Tsvetkov, Firat and Cao, "Gradient Vaccine: Investigating and Improving Multi-task
        Optimization in Massively Multilingual Models", ICLR 2021, Algorithm 1,
        https://arxiv.org/abs/2010.05874.

    Example:
        >>> import torch
        >>> strategy = GradVac(beta=1.0)
        >>> strategy(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))  # no conflict; the cosine is 0.6
        tensor([4., 4.])
        >>> strategy(torch.eye(2))  # each is turned until the cosine is 0.6
        tensor([1.7500, 1.7500])
    """

    def __init__(
        self,
        beta: float = 1e-2,
        order: Literal["random", "fixed"] = "random",
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.beta = check_fraction("beta", beta)
        check_choice("order", order, ["random", "fixed"])
        self.order = order
        self.random = RandomSource(seed, generator)
        self.cosines = self.per_task(pairs=True)

    def weights(self, gramian: Tensor) -> Tensor:
        gramian = gramian.detach()
        if len(gramian) == 2:
            return self._weights_of_pair(gramian)
        return weights_on_cpu(self._weights_of_more, gramian)

    def _weights_of_more(self, gramian: Tensor) -> Tensor:
        means = self.cosines.read(gramian).to(gramian)
        orders = visiting_orders(
            len(means), self.random.generator if self.order == "random" else None
        )
        squares = gramian.diagonal()
        alive = squares > ZERO_ROW**2 * squares.max()
        norms = torch.where(alive, squares, 1.0).sqrt()
        cosines = (gramian / norms / norms[:, None]).clamp_(-1, 1).fill_diagonal_(1)
        added = self._walk(cosines, alive, orders, means)
        self.cosines.write(means)
        return 1 + (added * norms[:, None]).sum(0) / norms

    def _walk(self, cosines: Tensor, alive: Tensor, orders: Tensor, means: Tensor) -> Tensor:
        """Let each task visit others, and move the means, in place.

        Args:
            cosines: The cosines of the rows, shape (m, m).
            alive: Which rows are not zero, shape (m,).
            orders: Whom each visits, shape (m, m - 1).
            means: The means of the cosines, shape (m, m).

        Returns:
            How much of each unit row is added to each, shape (m, m).
        """
        products = cosines.clone()  # of each changed unit row with all unit rows, kept up to date
        shares = torch.eye(len(cosines), dtype=torch.float64, device="cpu")
        for visited in orders[:, :, None].unbind(1):
            squares = (shares * products).sum(1, keepdim=True)
            lengths = squares.clamp_min(_VANISHED).sqrt()
            phi = (products.gather(1, visited) / lengths).clamp_(-1, 1)
            rho = means.gather(1, visited).clamp_(-1, 1)
            meet = (squares > _VANISHED) & alive[:, None] & alive[visited]
            pull = torch.where(meet, lengths * _pull(phi, rho, TENSORS), 0.0)
            shares.scatter_add_(1, visited, pull)
            products.addcmul_(pull, cosines[visited[:, 0]])
            means.scatter_(1, visited, torch.where(meet, self._moved(rho, phi), rho))
        return shares.fill_diagonal_(0)  # a task is not visited by itself

    def _weights_of_pair(self, gramian: Tensor) -> Tensor:
        """Return the weights of two tasks, where the means are, without waiting for a device."""
        means = self.cosines.read(gramian)
        gramian = gramian.to(means)
        if means.is_cpu:
            (a, h), (_, b) = gramian.tolist()
            (_, rho), (other, _) = means.tolist()
            *weights, rho, other = self._pair(a, h, b, rho, other, FLOATS)
            new = [*weights, 0.0, rho, other, 0.0]
            both = torch.tensor(new, dtype=torch.float64, device="cpu")
            self.cosines.write(both[2:].reshape(2, 2))
            return both[:2]
        a, h, _, b = gramian.flatten().unbind()
        _, rho, other, _ = means.flatten().unbind()
        *weights, rho, other = self._pair(a, h, b, rho, other, TENSORS)
        zero = torch.zeros_like(rho)
        self.cosines.write(torch.stack([zero, rho, other, zero]).reshape(2, 2))
        return torch.stack(weights).double()

    def _pair(
        self, a: Number, h: Number, b: Number, rho: Number, other: Number, of: Arithmetic[Number]
    ) -> tuple[Number, Number, Number, Number]:
        """Return two weights, and both means moved, from the Gramian and the means."""
        least = ZERO_ROW**2 * of.larger(a, b)
        meet = (a > least) & (b > least)
        x, y = of.sqrt(of.where(meet, a, 1.0)), of.sqrt(of.where(meet, b, 1.0))
        phi = of.where(meet, h / x / y, 0.0)
        phi = of.where(phi > 1, 1.0, of.where(phi < -1, -1.0, phi))
        first = of.where(meet, _pull(phi, rho, of), 0.0)
        second = of.where(meet, _pull(phi, other, of), 0.0)
        return (
            1 + second * (y / x),
            1 + first * (x / y),
            of.where(meet, self._moved(rho, phi), rho),
            of.where(meet, self._moved(other, phi), other),
        )

    def _moved(self, rho: Number, phi: Number) -> Number:
        """Return a mean after a cosine more."""
        return rho * (1 - self.beta) + phi * self.beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}, order={self.order!r}"
