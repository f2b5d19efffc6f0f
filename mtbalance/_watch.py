"""Notices loops that run, but do not do what was meant: each is told in one warning."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mtbalance._names import alive, outermost_modules
from mtbalance._record import EpochSummary, Record
from mtbalance._shards import local
from mtbalance.weighting._base import Weighting

_PATIENCE = 2
_LONG_EPOCH = 3000
"""Steps after which a weighting that looks at epochs should have seen the end of one."""
_FIRST_STEPS = 3
"""In so many, losses are looked at; what a loop does to them it does from the start."""
_FACTORS = 3
_PROBED_TENSORS = 16
_PROBED_ENTRIES = 16


class OptimizerWatch:
    """Compares values from step to step until the learned weights have moved once.

    Learned weights that stand still while the model moves are in no optimizer. Once may be chance
    (two optimizers that take turns), so the warning comes at the second time in a row. Values are
    compared, not version counters: fused optimizers leave those alone.
    """

    def __init__(self) -> None:
        self._settled = False
        self._model: list[Tensor] = []
        self._learned: list[Tensor] = []
        self._stood_still = 0

    def look(self, learned: Sequence[Tensor], model: Callable[[], Sequence[Tensor]]) -> None:
        """Compare with the last call, and warn once if learned weights do not move.

        Args:
            learned: Parameters of the weighting.
            model: Returns the parameters that the losses are known to reach.
        """
        if self._settled or not learned:
            return
        probed = [local(p.detach()) for p in model()[:_PROBED_TENSORS]]
        now = [p.reshape(-1)[:_PROBED_ENTRIES].clone() for p in probed]
        values = [p.detach().clone() for p in learned]
        if self._learned:
            if not _equal(values, self._learned):
                self._settled = True
            elif not _equal(now, self._model):
                self._stood_still += 1
        self._model, self._learned = now, values
        if self._stood_still == _PATIENCE:
            self._settled = True
            warnings.warn(
                "the weighting's learned weights must be given to an optimizer, but they do not "
                "move while the model does. Add balancer.parameters() to the optimizer, without "
                "weight decay.",
                UserWarning,
                stacklevel=4,
            )


class ScaledLossWatch:
    """Looks, in the first steps, whether a gradient scaler has scaled the losses already.

    Its scale is then a factor in their graphs: not a number like it, but the same tensor.
    """

    def __init__(self) -> None:
        self._steps_left = _FIRST_STEPS

    def look(self, losses: Iterable[Tensor]) -> bool:
        """Look at the losses of a step, and warn once; waits for no device.

        Returns:
            Whether it is one of the first steps.
        """
        if self._steps_left == 0:
            return False
        self._steps_left -= 1
        factors = {factor for loss in losses for factor in _factors_of(loss)}
        if factors and not factors.isdisjoint(_scales()):
            self._steps_left = 0
            warnings.warn(
                "the losses must be raw, but a GradScaler has scaled them already: weightings see "
                "other numbers than the losses, an overflow is taken for an error, and with "
                "`scaler=` they are scaled twice. Give backward, accumulate and apply what you "
                "gave to scaler.scale(), and the scaler as `scaler=`.",
                UserWarning,
                stacklevel=4,
            )
        return True


def _factors_of(loss: Tensor) -> Iterator[int]:
    """Yield where in memory the scalars are that a loss has been multiplied by last."""
    node = loss.grad_fn
    for _ in range(_FACTORS):
        if node is None or node.name() not in ("MulBackward0", "DivBackward0"):
            return
        if node.name() == "MulBackward0":
            try:
                saved = [node._saved_self, node._saved_other]  # type: ignore[attr-defined]
            except RuntimeError:  # let go, or written to since: the backward pass says so
                return
            for factor in saved:
                if type(factor) is Tensor and factor.ndim == 0:
                    yield factor.data_ptr()
        node = node.next_functions[0][0]


def _scales() -> set[int]:
    """Return where in memory the scales of this process's gradient scalers are."""
    scales = [getattr(scaler, "_scale", None) for scaler in alive(GradScaler)]
    return {scale.data_ptr() for scale in scales if isinstance(scale, Tensor)}


class EpochWatch:
    """Looks whether epochs end where a weighting waits for that, and with nothing left over.

    Args:
        weighting: The weighting.
    """

    def __init__(self, weighting: Weighting) -> None:
        waits = type(weighting).end_epoch is not Weighting.end_epoch
        self._waits_for = type(weighting).__name__ if waits else None
        self._left_over_told = False

    def step(self, record: Record, steps: int) -> None:
        """Look at a step, the last of so many in this epoch: at one of them, as that may wait."""
        if self._waits_for is None or steps < _LONG_EPOCH or len(record.weights) < 2:
            return
        waits_for, self._waits_for = self._waits_for, None
        first, *others = map(float, record.weights.values())
        if all(weight == first for weight in others):
            warnings.warn(
                f"{waits_for} weighs all tasks alike until epochs have ended, but {steps:,} steps "
                "were taken since the last end_epoch(). Call balancer.end_epoch() after each epoch "
                "(if this one is that long, all is well).",
                UserWarning,
                stacklevel=4,
            )

    def end(self, summary: EpochSummary, *, left_over: bool) -> None:
        """Look at an epoch that ends.

        Args:
            summary: What was counted in it.
            left_over: Whether gradients have been accumulated that were not applied.
        """
        self._waits_for = None
        if summary.steps and summary.never_active:
            warnings.warn(
                f"no step of this epoch ({summary.steps} steps) had a usable loss for "
                f"{', '.join(map(repr, summary.never_active))}. Are the labels joined correctly?",
                UserWarning,
                stacklevel=3,
            )
        if left_over and not self._left_over_told:
            self._left_over_told = True
            warnings.warn(
                "gradients of this epoch were accumulated, but not applied: they join the first "
                "step of the next. Call balancer.apply() after the last micro-batch, or "
                "balancer.discard().",
                UserWarning,
                stacklevel=3,
            )


def look_at_groups(shared: object) -> None:
    """Warn if groups of shared parameters are the parameters of a module, by name.

    Args:
        shared: What is given as shared.
    """
    if not isinstance(shared, Mapping) or len(shared) < 2:
        return
    if not all(isinstance(member, Tensor) for member in shared.values()):
        return
    for module in (inner for outer in outermost_modules() for inner in outer.modules()):
        named = dict(module.named_parameters())
        if all(named.get(name) is parameter for name, parameter in shared.items()):
            warnings.warn(
                f"`shared` makes {len(shared)} groups of one parameter each, which are balanced "
                f"each on its own. Give the {type(module).__name__}, or its parameters(), to "
                "balance them together.",
                UserWarning,
                stacklevel=3,
            )
            return


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(
        a.device == b.device and torch.equal(a, b) for a, b in zip(some, others, strict=False)
    )
