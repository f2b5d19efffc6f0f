from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mtbalance._checks import check_choice, check_finite, check_saved

from ._base import Weighting, held_above, task_vector

Kind = Literal["regression", "classification"]
"""Of which kind the loss of a task is."""

_KINDS = ("regression", "classification")
_REGULARIZERS = ("log", "log1p")


class Uncertainty(Weighting):
    r"""Weigh each loss by a learned noise level of its task.

    With :math:`s_i = \log \sigma_i^2`, the learned log-variance,

    .. math::
        \text{regression: } \tfrac12 e^{-s_i} L_i + \tfrac12 s_i, \qquad
        \text{classification: } e^{-s_i} L_i + \tfrac12 s_i.

    At rest :math:`s = \log L` (regression) or :math:`\log 2L` (classification), and both weights
    are :math:`1 / 2L`: the objective becomes half the sum of the logarithms of the losses. Weights
    do not sum to the number of tasks, and the objective may be negative: never stop or schedule on
    it.

    With ``regularizer="log1p"``, :math:`\log(1 + \sigma_i^2) = \log(1 + e^{s_i})` stands in place
    of :math:`\tfrac12 s_i`. The objective is then never negative if no loss is. With
    :math:`c = \tfrac12` (regression) or 1 (classification), the weight at rest is
    :math:`\frac{2}{L (1 + \sqrt{1 + 4 / (c L)})}`: about :math:`1 / L` for losses far above 1, and
    :math:`\sqrt{c / L}` far below, which small losses pull up less.

    The log-variances are parameters. They must reach an optimizer, best with a weight decay of 0.

    Args:
        kind: ``"regression"`` or ``"classification"`` for all tasks, or one of them per task (a
            sequence in the order of the tasks, or a mapping from task name). Source of the default:
            most implementations use the regression form for every task, cross-entropy included.
        init: Log-variance at the start. Source: 0 gives the weights 1/2 and 1; published codes
            differ (-0.5, -0.7).
        min_log_var: Log-variances stop here, so that a loss of 0 does not get an endless weight.
        regularizer: What keeps variances from growing: ``"log"``, as in the likelihood, or
            ``"log1p"``, which is never negative. Source of the default: the paper.

    Note:
        In the reference code of El Nahhas et al. (2024) the log-variances never reach the
        optimizer, so that its weights stay at :math:`1 / (2 e^{-0.7}) = 1.007`. A Balancer warns of
        that.

    References:
        Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
        Geometry and Semantics", CVPR 2018, equations (7) and (10),
        https://arxiv.org/abs/1705.07115.

        Liebel and Körner, "Auxiliary Tasks in Multi-task Learning", 2018 (``"log1p"``),
        https://arxiv.org/abs/1805.06334.

    Example:
        >>> import torch
        >>> weighting = Uncertainty(kind=["classification", "regression"])
        >>> weighting(torch.tensor([3.0, 4.0]))
        tensor([3., 2.], grad_fn=<AddBackward0>)
    """

    log_var: nn.Parameter
    regularizer = "log"  # on the class, too, for objects pickled before there was a choice

    def __init__(
        self,
        kind: Kind | Sequence[Kind] | Mapping[str, Kind] = "regression",
        *,
        init: float = 0.0,
        min_log_var: float = -10.0,
        regularizer: Literal["log", "log1p"] = "log",
    ) -> None:
        super().__init__()
        check_choice("regularizer", regularizer, _REGULARIZERS)
        kinds = kind.values() if isinstance(kind, Mapping) else kind
        for one in [kinds] if isinstance(kinds, str) else kinds:
            check_choice("kind", one, _KINDS)
        if not init >= min_log_var:
            raise ValueError(
                f"`init` must be at least `min_log_var` ({min_log_var}), but got {init}."
            )
        self.kind = kind
        self.init = check_finite("init", init)
        self.min_log_var = min_log_var
        self.regularizer = regularizer

    def setup(self) -> None:
        tasks = self.tasks or ()
        if isinstance(self.kind, str):
            kinds: list[str] = [self.kind] * len(tasks)
        elif isinstance(self.kind, Mapping):
            if set(self.kind) != set(tasks):
                raise ValueError(
                    f"`kind` must name each of the tasks {tasks}, but got {tuple(self.kind)}."
                )
            kinds = [self.kind[task] for task in tasks]
        else:
            kinds = list(self.kind)
            if len(kinds) != len(tasks):
                raise ValueError(
                    f"`kind` must have one entry per task ({len(tasks)}), but got {len(kinds)}."
                )
        factors = [0.5 if kind == "regression" else 1.0 for kind in kinds]
        self.register_buffer("factor", task_vector(factors, len(kinds)), persistent=False)
        self.log_var = nn.Parameter(task_vector(self.init, len(kinds)))

    def check_state(self, state: Mapping[str, object]) -> None:
        check_saved(self, state, numbers=("log_var",))

    def forward(self, losses: Tensor) -> Tensor:
        bounded = held_above(self.log_var[self.active], self.min_log_var)
        factor: Tensor = self.get_buffer("factor")[self.active]
        return factor * torch.exp(-bounded) * losses + self._regularizer(bounded)

    def _regularizer(self, log_var: Tensor) -> Tensor:
        if self.regularizer == "log":
            return log_var / 2
        return torch.logaddexp(log_var, torch.zeros_like(log_var))  # softplus() cuts its end off

    def extra_repr(self) -> str:
        return (
            f"kind={self.kind!r}, init={self.init}, min_log_var={self.min_log_var}, "
            f"regularizer={self.regularizer!r}"
        )
