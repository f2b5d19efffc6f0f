from collections.abc import Mapping

from torch import Tensor, nn

from mtbalance._checks import check_finite, check_saved

from ._base import Weighting, held_above, task_vector


class IMTLL(Weighting):
    r"""Learn a weight for each loss that brings all weighted losses to the same size.

    With :math:`s_i`, the learned logarithm of task i's weight,

    .. math::
        \text{objective} = \sum_i e^{s_i} L_i - s_i, \qquad w_i = e^{s_i}.

    At rest :math:`s_i = -\log L_i`, so that every weighted loss :math:`w_i L_i` is 1, and the
    objective is the sum of the logarithms of the losses, plus a constant. It is twice the
    regression form of :class:`Uncertainty` at the log-variance :math:`-s_i`: under an optimizer
    such as Adam, which a factor of all gradients does not concern, the two learn alike. Weights do
    not sum to the number of tasks, and the objective may be negative: never stop or schedule on it.

    The logarithms of the weights are parameters, ``log_weight``. They must reach an optimizer, best
    with a weight decay of 0.

    Args:
        init: Logarithm of every weight at the start. Source: 0, weights of 1, in published codes.
        max_log_weight: Logarithms of weights stop here, so that a loss of 0 does not get an endless
            weight. Source of the default: that of :class:`Uncertainty`. Losses below
            :math:`e^{-10} = 4.5 \cdot 10^{-5}` would come to rest above it.

    Note:
        The loss half of IMTL; the other half chooses weights for gradients. Published codes have no
        bound.

    References:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, "Towards Impartial Multi-task Learning",
        ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr.

    Example:
        >>> import torch
        >>> weighting = IMTLL()
        >>> weighting(torch.tensor([3.0, 0.5])).sum().backward()
        >>> weighting.log_weight.grad  # w L - 1: descending it brings both to 1
        tensor([ 2.0000, -0.5000])
    """

    log_weight: nn.Parameter

    def __init__(self, *, init: float = 0.0, max_log_weight: float = 10.0) -> None:
        super().__init__()
        if not init <= max_log_weight:
            raise ValueError(
                f"`init` must be at most `max_log_weight` ({max_log_weight}), but got {init}."
            )
        self.init = check_finite("init", init)
        self.max_log_weight = max_log_weight

    def setup(self) -> None:
        self.log_weight = nn.Parameter(task_vector(self.init, self.num_tasks))

    def check_state(self, state: Mapping[str, object]) -> None:
        check_saved(self, state, numbers=("log_weight",))

    def forward(self, losses: Tensor) -> Tensor:
        log_weight = -held_above(-self.log_weight[self.active], -self.max_log_weight)
        return log_weight.exp() * losses - log_weight

    def extra_repr(self) -> str:
        return f"init={self.init}, max_log_weight={self.max_log_weight}"
