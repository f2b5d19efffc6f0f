from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtbalance._checks import check_at_least, check_positive, check_saved, count_fallback
from mtbalance._remembered import dtype_of_sums

from ._base import Step, Weighting, task_vector

_BETAS = (0.9, 0.999)


class GradNorm(Weighting):
    r"""Learn weights that give each task's gradient the length its rate of training calls for.

    With :math:`n_i`, the length of the gradient of the raw loss of task i, over the m active tasks,

    .. math::
        L_{grad} = \sum_i \bigl| w_i n_i - \bar G \, r_i^\alpha \bigr|, \qquad
        \bar G = \frac1m \sum_j w_j n_j, \qquad
        r_i = \frac{L_i / L_i(0)}{\frac1m \sum_j L_j / L_j(0)}, \qquad
        \frac{\partial L_{grad}}{\partial w_i} = n_i \, \text{sign}(w_i n_i - \bar G \, r_i^\alpha),

    where :math:`L_i(0)` is the loss in the first step that task i is active in, and the target
    :math:`\bar G \, r_i^\alpha` is a constant for the derivative: a task that has come down less
    than the others is to have a longer gradient. The derivative needs lengths alone, no second
    backward pass. Adam moves the weights by it, none is left below ``minimum``, and they are
    rescaled to sum to m. As in the paper, they are those of the *next* step: the first has weights
    of 1.

    The gradients are those of everything that is balanced, all parameters of ``shared=``, averaged
    over processes and without a loss scale. With ``Sum``, which balances nothing, ``shared=`` may
    name the last shared layer alone, as in the paper. A step costs one backward pass per task,
    which serves the gradient strategy, too.

    The weights are a buffer, which Adam moves in here: they need no other optimizer. Of the tasks
    in a step, the weights are rescaled among themselves; that of a task which is absent stays, with
    its share in the sum. Steps count in training mode only. Losses must not be negative, since
    their rates would mean nothing: with a negative one, or where a gradient is not finite or too
    long for Adam to square, weights stay (``fallbacks`` counts such steps).

    Args:
        alpha: :math:`\alpha`, at least 0, how strongly tasks that train slowly are pulled; 0 gives
            all gradients one length. Source: 1.5 in the paper for NYUv2; 0.12 for its toy tasks.
        lr: Learning rate of Adam on the weights. Source: the paper.
        minimum: Positive. No weight is left below this, as a fraction of the mean weight, before
            they are rescaled. The paper has no bound, and lets a weight become negative.

    Note:
        Adam has no epsilon here, so that multiplying all losses by a constant changes no weight. A
        difference that float64 cannot tell from zero counts as zero, so that rounding does not move
        the weights of equal tasks. A first loss of 0 has no rate: the ratio of that task is 1.

    References:
        Chen, Badrinarayanan, Lee and Rabinovich, "GradNorm: Gradient Normalization for Adaptive
        Loss Balancing in Deep Multitask Networks", ICML 2018, https://arxiv.org/abs/1711.02257.

    Example:
        >>> import torch
        >>> from mtbalance import Balancer
        >>> from mtbalance.gradient import Sum
        >>> w = torch.nn.Parameter(torch.tensor(2.0))
        >>> balancer = Balancer(GradNorm(lr=0.1), Sum(), tasks=("a", "b"), shared=[w])
        >>> for _ in range(2):  # gradients of 3 and 1: a is to have less
        ...     record = balancer.backward({"a": 3 * w, "b": w + 1})
        >>> [round(float(weight), 4) for weight in record.weights.values()]
        [0.9, 1.1]
    """

    needs_gradients: ClassVar[bool] = True
    _narrowest: ClassVar[torch.dtype] = torch.float64

    weight: Tensor
    upcoming: Tensor
    first: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    def __init__(self, alpha: float = 1.5, lr: float = 0.025, *, minimum: float = 1e-3) -> None:
        super().__init__()
        self.alpha = check_at_least("alpha", alpha, 0)
        self.lr = check_at_least("lr", lr, 0)
        self.minimum = check_positive("minimum", minimum)

    def setup(self) -> None:
        # The weights of the last step and of the next, and the losses of the first.
        for name, start in (("weight", 1.0), ("upcoming", 1.0), ("first", 0.0)):
            self.register_buffer(name, task_vector(start, self.num_tasks, dtype_of_sums()))
        for name in ("exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros_like(self.first))
        self.register_buffer("steps", torch.zeros(self.num_tasks, dtype=torch.long))

    def check_state(self, state: Mapping[str, object]) -> None:
        weights = ("weight", "upcoming")
        counts = (*weights, "first", "exp_avg_sq", "steps")
        check_saved(self, state, counts=counts, finite=(*counts, "exp_avg"))

    def forward(self, losses: Tensor) -> Tensor:
        weight = self.weight[self.active]
        return (weight / weight.mean()).to(losses.dtype) * losses

    def before_step(self, step: Step) -> None:
        """Let the weights of the last step's end be those of this one, and make the next."""
        if not self.training:
            return
        active = self.active
        weight = self.upcoming[active]
        scale = weight.mean()  # which tasks that are absent have a part in
        losses, norms = step.losses.to(self.first), step.norms.to(self.first)
        first = torch.where(self.steps[active] == 0, losses, self.first[active])
        slope = self._slope(weight / scale, losses, first, norms)
        legal = torch.isfinite(slope.square()) & (losses >= 0) & (first >= 0)
        if not bool(legal.all()):
            count_fallback(self, "a loss is negative, or a norm has no finite square: weights stay")
            return
        self.first[active] = first
        self.weight[active] = weight
        moved = (weight / scale - self._adam(slope)).clamp_min(self.minimum)
        self.upcoming[active] = scale * moved / moved.mean()

    def _slope(self, weight: Tensor, losses: Tensor, first: Tensor, norms: Tensor) -> Tensor:
        """Return d L_grad / d w, shape (m,)."""
        lengths = weight * norms
        ratios = torch.where(first == 0, 1.0, losses / first)
        rates = torch.where(ratios.any(), ratios / ratios.mean(), 1.0)
        target = lengths.mean() * rates**self.alpha
        gap = lengths - target
        noise = 8 * len(gap) * torch.finfo(gap.dtype).eps * (lengths + target)
        return torch.where(gap.abs() <= noise, 0.0, gap.sign()) * norms

    def _adam(self, slope: Tensor) -> Tensor:
        """Return the step of Adam against a slope, and remember its means."""
        active = self.active
        self.steps[active] += 1
        self.exp_avg[active] = torch.lerp(slope, self.exp_avg[active], _BETAS[0])
        self.exp_avg_sq[active] = torch.lerp(slope.square(), self.exp_avg_sq[active], _BETAS[1])
        steps = self.steps[active].to(slope.dtype)
        first = self.exp_avg[active] / (1 - _BETAS[0] ** steps)
        second = self.exp_avg_sq[active] / (1 - _BETAS[1] ** steps)
        return self.lr * torch.where(second > 0, first / second.sqrt(), 0.0)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, lr={self.lr}, minimum={self.minimum}"
