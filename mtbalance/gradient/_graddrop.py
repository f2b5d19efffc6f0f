from collections.abc import Sequence

import torch
from torch import Tensor

from mtbalance._checks import check_fraction
from mtbalance._random import RandomSource, numbered_draws

from ._base import GradientStrategy


class GradDrop(GradientStrategy):
    r"""Keep, in each coordinate, only the gradients of one sign, drawn by how much they dominate.

    .. math::
        P = \tfrac12 \Bigl(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\Bigr), \qquad
        M_i = [P > U][g_i > 0] + [P \le U][g_i < 0], \qquad
        d = \sum_i \bigl(\ell_i + (1 - \ell_i) M_i\bigr) g_i

    coordinate by coordinate, where :math:`U` is one uniform draw in [0, 1) for all tasks, :math:`P`
    the *positive purity* and :math:`\ell_i` the leak of task i. Coordinates on which the tasks
    agree are kept as they are, and the mean over draws is the plain sum.

    Args:
        leak: The part of each gradient that passes whatever the draw, between 0 (all is subject to
            the draw) and 1 (the plain sum); one number, or one per task. Source: 0 in the paper's
            experiments.
        seed: Start of the random stream.
        generator: A CPU generator to draw from instead.

    Note:
        The paper applies the rule to the gradients of a shared *activation*, times its sign and
        summed over the batch; here, as in the code of Auto-Lambda and CAGrad, it acts on the
        gradients of the parameters. Their denominator has ``1e-8`` added, which drops unanimous
        coordinates where gradients are small; here only 0/0 is guarded. ``leak`` counts as in the
        paper, not reversed as in SamsungLabs/MTL. Leaks by task need all tasks present.

    References:
        Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
        Dropout", NeurIPS 2020, Algorithm 1, https://arxiv.org/abs/2010.06808.

    Example:
        >>> import torch
        >>> d = GradDrop(seed=0)(torch.tensor([[1.0, 1.0, 0.0], [3.0, -1.0, -2.0]]))
        >>> d[0].item(), abs(d[1].item()), d[2].item()  # they agree on the first and the last
        (4.0, 1.0, -2.0)
    """

    coordinatewise = True

    def __init__(
        self,
        leak: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        leaks = [leak] if isinstance(leak, int | float) else list(leak)
        if not leaks:
            raise ValueError("`leak` must be one number or one per task, but got none.")
        self.leak = [check_fraction("leak", value) for value in leaks]
        self.random = RandomSource(seed, generator)
        self._seed = 0

    @property
    def growth(self) -> float:
        return 1.0

    def start(self) -> None:
        self._seed = self.random.draw_seed()

    def forward(self, gradients: Tensor) -> Tensor:
        self.start()
        return self.on_columns(gradients, 0)

    def on_columns(self, gradients: Tensor, first: int) -> Tensor:
        if len(self.leak) not in (1, len(gradients)):
            raise ValueError(
                f"`leak` must be one number or one per task ({len(gradients)}), "
                f"but got {len(self.leak)}."
            )
        g = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
        draw = numbered_draws(self._seed, first, g.shape[1], g.device).to(g.dtype)
        # Row by row into two vectors, which stay in the cache.
        row, *others = g.unbind()
        total, size = row.clone(), row.abs()
        for row in others:
            total.add_(row)
            size.add_(row.abs())
        # P > U without the quotient, which is 0/0 where all gradients are zero: the draw is 2U - 1,
        # and the sign of this is that of what is kept.
        sign = torch.addcmul(total, draw, size, value=-1)
        # The sum of one sign is half the total plus or minus half the size; exactly the total where
        # tasks agree. NaN and infinity stay.
        direction = total.add_(size.copysign_(sign)).mul_(0.5)
        if any(self.leak):
            for row, leak in zip(g, g.new_tensor(self.leak).expand(len(g)), strict=True):
                lost = row - torch.copysign(row, sign)  # twice the row, or nothing
                direction.addcmul_(lost, leak, value=0.5)
        return direction.to(gradients.dtype)

    def extra_repr(self) -> str:
        return f"leak={self.leak[0] if len(self.leak) == 1 else self.leak}"
