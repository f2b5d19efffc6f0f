import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtbalance._buffers import Buffers
from mtbalance._checks import (
    check_at_least,
    check_finite,
    check_known_tasks,
    check_saved,
    check_validation,
    count_fallback,
)
from mtbalance._optimizers import each_optimizer
from mtbalance._random import RandomSource
from mtbalance._rows import stacked
from mtbalance._shards import local

from ._base import Step, Weighting, adam, task_vector


class AutoLambda(Weighting):
    r"""Learn the weights by looking one optimizer step ahead at the primary tasks.

    With the virtual step of plain (momentum) gradient descent,

    .. math::
        \theta' = \theta - \alpha \Bigl(\mu b + \sum_i \lambda_i g_i + \gamma \theta\Bigr),
        \qquad
        \frac{\partial L_{val}(\theta')}{\partial \lambda_i}
            = -\alpha \langle \nabla L_{val}(\theta'), g_i \rangle,

    where :math:`g_i` is the gradient of the raw loss of task i, :math:`\alpha`, :math:`\gamma`,
    :math:`\mu` and b are the learning rate, weight decay, momentum and momentum buffer that the
    optimizer holds for each parameter (of several, the one that holds it), and
    :math:`L_{val}` is the sum of the primary tasks' losses on a validation batch.
    The formula is exact: :math:`g_i` does not depend on :math:`\lambda`. Adam then moves
    :math:`\lambda`, and the step's objective is :math:`\sum_i \lambda_i L_i` with the new values.

    A step costs one forward and one backward pass more, on the validation batch; the per-task
    gradients serve the virtual step, the derivative and the gradient strategy alike. Parameters
    come back bit for bit, as do the buffers of the model's modules in training mode (the running
    means of batch norm), compiled or not; caches that have grown meanwhile stay. The validation
    batch draws its random numbers (dropout) from a stream of its own.

    The weights are a buffer, ``lambdas``, which Adam moves in here: they need no other optimizer.

    Args:
        optimizer: The optimizer of the model; several, of which no two hold the same parameter; or
            None, to assign it to the attribute ``optimizer`` before the first step.
        primary: Names of the tasks whose validation loss counts; None for all.
        lr: Learning rate of Adam on the weights. Source: the authors' code.
        init: Weight of every task at the start. Source: the authors' code.
        minimum: Lower bound of the weights, for instance 0; None for none, as in the paper. A
            negative weight climbs the loss of its task and turns its row round for the gradient
            strategy.
        seed: Start of the random stream of the validation batches.
        generator: A CPU generator to draw from instead.

    Attributes:
        optimizer: The optimizer, a tuple of several, or None. Assign it where it is made later than
            the weighting, or anew: ``balancer.weighting.optimizer = optimizer``. Type checkers want
            the AutoLambda in a variable of its own, or an ``assert isinstance`` before.

    Note:
        The authors' code takes the derivative by finite differences, which with dropout is noise
        (its sign is right in 48 to 60 % of the cases), costs three more forward passes and leaves
        rounding in the parameters. As there, the virtual step of an adaptive optimizer (AdamW) is a
        plain gradient step with its weight decay. Momentum is that of ``torch.optim.SGD``
        (``momentum`` in the groups, ``momentum_buffer`` in the state); what an optimizer keeps
        under other names does not count. A parameter that the optimizer does not hold does not
        move. Where the derivative is not finite, or too large for Adam to square, weights stay
        (``fallbacks`` counts such steps).

    References:
        Liu, James, Davison and Johns, "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR
        2022, equations (5) to (7), https://arxiv.org/abs/2202.03091.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor(2.0))
        >>> weighting = AutoLambda(torch.optim.SGD([w], lr=0.1))
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor([0.1000, 0.3000])
    """

    needs_gradients: ClassVar[bool] = True
    needs_validation: ClassVar[bool] = True

    optimizer: Optimizer | Sequence[Optimizer] | None
    lambdas: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        primary: Sequence[str] | None = None,
        lr: float = 1e-4,
        init: float = 0.1,
        minimum: float | None = None,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(primary, str):
            raise TypeError(f"`primary` must be a sequence of names, but got {primary!r}.")
        if primary is not None and len(primary) == 0:
            raise ValueError("`primary` must name at least one task, but got none.")
        if minimum is not None and not init >= minimum:
            raise ValueError(f"`init` must be at least `minimum` ({minimum}), but got {init}.")
        self.optimizer = optimizer
        self.primary = None if primary is None else tuple(primary)
        self.lr = check_at_least("lr", lr, 0)
        self.init = check_finite("init", init)
        self.minimum = minimum
        self.random = RandomSource(seed, generator)
        self._model_buffers = Buffers()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "optimizer":  # no property: a module would go past it, and become a submodule
            value = _checked(value)
            self._optimizer_looked_at = False
        super().__setattr__(name, value)

    def setup(self) -> None:
        check_known_tasks("primary", self.primary or (), self.tasks or ())
        self.register_buffer("lambdas", task_vector(self.init, self.num_tasks))
        for name in ("exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros_like(self.lambdas))
        self.register_buffer("steps", torch.zeros(self.num_tasks, dtype=torch.long))

    def check_state(self, state: Mapping[str, object]) -> None:
        averages = ("exp_avg", "exp_avg_sq")
        counts = ("steps", "exp_avg_sq")
        check_saved(self, state, counts=counts, finite=("lambdas",), numbers=averages)

    def _load_from_state_dict(self, *state: Any) -> None:
        super()._load_from_state_dict(*state)
        if self.tasks is None:
            return
        # Of versions that squared derivatives whatever their size: Adam starts again there.
        stuck = ~(torch.isfinite(self.exp_avg) & torch.isfinite(self.exp_avg_sq))
        for buffer in (self.exp_avg, self.exp_avg_sq, self.steps):
            buffer.masked_fill_(stuck, 0)

    def check_ready(self) -> None:
        """Raise if there is no optimizer yet."""
        if self.optimizer is None:
            raise ValueError(
                "`optimizer` of AutoLambda must be the optimizer of the model when the first step "
                "is taken, but got None. Assign it where it is made: "
                "`balancer.weighting.optimizer = optimizer` (in Lightning, in "
                "`configure_optimizers`)."
            )

    def forward(self, losses: Tensor) -> Tensor:
        return self.lambdas[self.active].to(losses.dtype) * losses

    def before_step(self, step: Step) -> None:
        """Move the weights by one step of Adam on the derivative of the validation loss."""
        if not self.training:
            return
        self.check_ready()
        self._look_at_optimizer(step.parameters)
        derivative = self.derivative(step)
        largest = float(derivative.abs().max())  # NaN if any is
        if not math.isfinite(largest):
            count_fallback(self, "a validation loss or its gradient is not finite: weights stay")
        elif largest > math.sqrt(torch.finfo(self.exp_avg_sq.dtype).max):
            count_fallback(self, "a derivative is too large to be squared in Adam: weights stay")
        else:
            self._adam(derivative.to(self.lambdas.device))

    def derivative(self, step: Step) -> Tensor:
        """Return d L_val(theta') / d lambda, shape (m,), float64. Leaves everything as it was."""
        plans = _plans(each_optimizer(self.optimizer), step)
        held = [local(parameter.detach()) for parameter in step.parameters]
        with torch.no_grad(), _restored(held):
            weights = (self.lambdas[self.active] / step.loss_scale).tolist()
            for i, (parameter, plan) in enumerate(zip(held, plans, strict=True)):
                if plan.lr * plan.decay != 0:
                    parameter.mul_(1 - plan.lr * plan.decay)
                if plan.buffer is not None:
                    parameter.sub_(local(plan.buffer), alpha=plan.lr * plan.buffer_factor)
                for weight, gradients in zip(weights, step.gradients, strict=True):
                    if (gradient := gradients[i]) is not None:
                        parameter.sub_(gradient, alpha=plan.speed * weight)
            products = self._products(step, [plan.speed for plan in plans])
        return -products / step.loss_scale**2

    def _look_at_optimizer(self, parameters: Sequence[Tensor]) -> None:
        """Warn, in the first step, if the optimizer holds none of the model's parameters."""
        if self._optimizer_looked_at or not parameters:
            return
        self._optimizer_looked_at = True
        held = _held(each_optimizer(self.optimizer))
        if not any(id(parameter) in held for parameter in parameters):
            warnings.warn(
                "the optimizer of AutoLambda must hold the parameters that the losses reach, but "
                "holds none of them: its virtual step moves nothing, and the weights stay as they "
                "are. Give it the optimizer of this model.",
                UserWarning,
                stacklevel=2,
            )

    def _products(self, step: Step, speeds: Sequence[float]) -> Tensor:
        """Return the inner products of all rows with the validation loss's gradient, scaled."""
        devices = list({parameter.device for parameter in step.parameters})
        with (
            torch.enable_grad(),
            self.random.as_global_stream(devices),
            self._model_buffers.restored(step.parameters),
        ):
            losses: Mapping[str, Tensor] = {}
            error: Exception | None = None
            try:
                losses = self._validation_losses(step)
            except Exception as caught:  # noqa: BLE001  # raised in shares(), on all ranks
                error = caught
            primary = self.primary or self.tasks or ()
            shares = step.shares([name for name in primary if name in losses], error)
            if not shares:
                raise ValueError(
                    "`validation` must return the loss of at least one primary task "
                    f"({', '.join(map(repr, primary))}), but got {tuple(losses)}."
                )
            counted = [losses[n].reshape(()) * shares[n] for n in primary if n in losses]
            total = stacked(counted).sum() * step.loss_scale if counted else None
            return step.products(total, speeds)

    def _validation_losses(self, step: Step) -> Mapping[str, Tensor]:
        losses = check_validation(self, step.validation)()
        if not isinstance(losses, Mapping):
            raise TypeError(
                "`validation` must return a mapping from task name to loss, "
                f"but got {type(losses).__name__}."
            )
        check_known_tasks("validation", losses, self.tasks or ())
        return losses

    def _adam(self, slope: Tensor) -> None:
        slope = slope.to(self.lambdas.dtype)
        moments = self.exp_avg, self.exp_avg_sq, self.steps
        change = adam(self.lr, slope, *moments, self.active)
        self.lambdas[self.active] -= change.to(slope.dtype)
        if self.minimum is not None:
            self.lambdas.clamp_(min=self.minimum)

    def extra_repr(self) -> str:
        names = ", ".join(type(each).__name__ for each in each_optimizer(self.optimizer))
        if not isinstance(self.optimizer, Optimizer):
            names = f"({names})" if names else "None"
        return (
            f"primary={self.primary}, lr={self.lr}, init={self.init}, minimum={self.minimum}, "
            f"optimizer={names}"
        )


_Place = tuple[Optimizer | None, Mapping[str, Any]]
"""An optimizer, if any, and a group of its parameters."""


class _Plan:
    """How the optimizer would move one parameter.

    theta <- theta - lr * (decay * theta + buffer_factor * buffer + gain * gradient)
    """

    def __init__(self, group: Mapping[str, Any], buffer: Tensor | None) -> None:
        if group.get("lr") is None:
            raise ValueError(
                "`optimizer` must have a learning rate (`lr`) in each of its groups, but got None "
                "in one. The virtual step needs it: set `group['lr']` to the one that it uses."
            )
        momentum = float(group.get("momentum") or 0)
        nesterov = bool(group.get("nesterov"))
        # The first step of SGD puts the gradient into the buffer as it is, whatever the dampening.
        damping = 1 - float(group.get("dampening") or 0) if buffer is not None else 1.0
        gain = damping * (1 + momentum) if nesterov else damping
        self.lr = float(group["lr"])
        self.gain = -gain if group.get("maximize") else gain
        self.speed = self.lr * self.gain
        self.decay = float(group.get("weight_decay") or 0) * gain
        self.buffer = buffer if momentum else None
        self.buffer_factor = momentum * momentum if nesterov else momentum


def _plans(optimizers: Sequence[Optimizer], step: Step) -> list[_Plan]:
    held = _held(optimizers)
    unmoved: _Place = (None, {"lr": 0.0})  # where no optimizer holds a parameter
    places = [held.get(id(p), unmoved) for p in step.parameters]
    states = {id(each): _state(each) for each in optimizers}
    buffers = [
        None if holder is None else states[id(holder)].get(p, {}).get("momentum_buffer")
        for p, (holder, _) in zip(step.parameters, places, strict=True)
    ]
    spread = [each for each in optimizers if states[id(each)] is not each.state]
    if any(group.get("momentum") for each in spread for group in each.param_groups):
        far = [any(holder is each for each in spread) for holder, _ in places]
        told = step.from_holders([b if f else None for b, f in zip(buffers, far, strict=True)])
        buffers = [t if f else b for b, t, f in zip(buffers, told, far, strict=True)]
    return [_Plan(group, buffer) for (_, group), buffer in zip(places, buffers, strict=True)]


def _state(optimizer: Optimizer) -> Mapping[Any, Any]:
    # ZeroRedundancyOptimizer: an optimizer of the parameters that this process moves for all.
    inner = getattr(optimizer, "optim", None)
    return inner.state if isinstance(inner, Optimizer) else optimizer.state


def _held(optimizers: Sequence[Optimizer]) -> dict[int, _Place]:
    """Return who holds each parameter, by its id, and in which group."""
    held: dict[int, _Place] = {}
    for each in optimizers:
        for group in each.param_groups:
            for p in group["params"]:
                other = held.get(id(p), (each,))[0]
                if other is not each:
                    raise ValueError(
                        "`optimizer` must hold each parameter in one optimizer, but a "
                        f"{type(other).__name__} and a {type(each).__name__} hold the same one, of "
                        f"shape {tuple(p.shape)}. Leave out the optimizer that does not move it in "
                        "this step."
                    )
                held[id(p)] = each, group
    return held


def _checked(optimizer: object) -> Optimizer | tuple[Optimizer, ...] | None:
    """Return what may be assigned, a sequence as a tuple."""
    if optimizer is None or isinstance(optimizer, Optimizer):
        return optimizer
    several: list[object] = [optimizer]
    if isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        several = [*optimizer]
    optimizers = [each for each in several if isinstance(each, Optimizer)]
    if len(optimizers) < len(several):
        wrong = next(each for each in several if not isinstance(each, Optimizer))
        raise TypeError(
            "`optimizer` must be the torch.optim.Optimizer of the model, a sequence of several, or "
            f"None to assign it later, but got {type(optimizer).__name__}"
            + (f" with {type(wrong).__name__} in it." if wrong is not optimizer else ".")
        )
    if not optimizers:
        raise ValueError(
            "`optimizer` must hold at least one optimizer, but got none. Give None to assign it "
            "later."
        )
    _held(optimizers)
    return tuple(optimizers)


@contextmanager
def _restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters back bit for bit, whatever happens inside."""
    saved = [parameter.clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
