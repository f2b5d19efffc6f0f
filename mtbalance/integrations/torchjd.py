r"""TorchJD's aggregators as gradient strategies here, and gradient strategies as aggregators there.

Needs TorchJD (``pip install "mtbalance[torchjd]"``; some of its aggregators need solvers, which
their own errors name).

>>> import torch
>>> from torchjd.aggregation import MGDA
>>> from mtbalance import Balancer
>>> from mtbalance.weighting import Equal
>>> x = torch.nn.Parameter(torch.ones(2))
>>> balancer = Balancer(Equal(), FromTorchJD(MGDA()), tasks=("a", "b"), shared=[x])
>>> record = balancer.backward({"a": x.sum(), "b": x[0] - x[1]})
>>> x.grad
tensor([1., 0.])
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mtbalance._checks import check_gramian, check_kind, check_positive
from mtbalance._gramians import gramian_in_range
from mtbalance._random import RandomSource
from mtbalance._remembered import TaskChange, not_carried
from mtbalance._rows import at_least_float32, combine, is_finite
from mtbalance.gradient import GradientStrategy
from mtbalance.integrations._memory import Memory, memory_of, packed, remember, unpacked

try:
    from torchjd import Stateful
    from torchjd.aggregation import (
        Aggregator,
        ConstantWeighting,
        GramianWeightedAggregator,
        MeanWeighting,
        RandomWeighting,
        SumWeighting,
        TrimmedMean,
        WeightedAggregator,
        Weighting,
    )
except ImportError as error:
    raise ImportError(
        'mtbalance.integrations.torchjd needs TorchJD. Run `pip install "mtbalance[torchjd]"`.'
    ) from error

__all__ = ["FromTorchJD", "as_aggregator"]

_BLIND = (ConstantWeighting, MeanWeighting, RandomWeighting, SumWeighting)
"""Weightings of a matrix that look at nothing but how many rows it has."""


class FromTorchJD(GradientStrategy):
    r"""Ask an aggregator of TorchJD for the direction.

    .. math:: d = s \, \mathcal{A}(J),

    with the rows :math:`w_i g_i` as the matrix J, and a factor s. Aggregators that combine rows by
    their Gramian, or by weights that depend on no matrix (``Mean``, ``Sum``, ``Constant``,
    ``Random``), are asked for the weights of a Gramian in float64; no matrix is made, and they work
    on shards, with ``every=`` and with several processes at ``features=``. ``TrimmedMean`` gets
    blocks of columns. All others get one matrix of all shared parameters, in float32 or more.

    Args:
        aggregator: The aggregator. It is copied: one copy for each group of shared parameters.
        scale: Factor s: a number, or ``"rows"`` for the number of rows m. Strategies of mtbalance
            are on the scale of the sum of the rows, most of TorchJD's on that of their mean
            (``AlignedMTL``, ``CAGrad``, ``DualProj``, ``ExcessMTL``, ``IMTLG``, ``Krum``, ``Mean``,
            ``MGDA``, ``PCD``, ``Random``, ``TrimmedMean``, ``UPGrad``), ``FairGrad`` and
            ``NashMTL`` on one of their own: with ``"rows"``, the former need no other learning
            rate than strategies of mtbalance. Source of 1: what TorchJD itself would write.
        seed: Where the stream of random numbers starts from which the aggregator draws, instead of
            from PyTorch's global one. The same on all ranks gives the same draws on all ranks.

    Note:
        What an aggregator remembers (``torchjd.Stateful``) is saved, loaded and reset with the
        Balancer, and put back after a step that writes nothing, for which a copy of it exists
        during each step. TorchJD knows no absent tasks: its aggregators that remember begin anew,
        or raise, where the number of rows changes. Rows that are not finite are not shown to it.

    References:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024,
        https://arxiv.org/abs/2406.16232.

    Example:
        >>> import torch
        >>> from torchjd.aggregation import Mean
        >>> FromTorchJD(Mean(), scale="rows")(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([4., 6.])
    """

    def __init__(
        self, aggregator: Aggregator, scale: float | Literal["rows"] = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        check_kind("aggregator", aggregator, Aggregator)
        self.scale: float | Literal["rows"] = (
            "rows" if scale == "rows" else check_positive("scale", scale)
        )
        self.random = RandomSource(seed)
        self.by_gramian = _weighting_of(aggregator) is not None
        self.coordinatewise = type(aggregator) is TrimmedMean and not _has_hooks(aggregator)
        self._aggregators = [copy.deepcopy(aggregator)]
        self._of: tuple[tuple[str, ...], int] | None = None
        self._group = 0
        self._is_stateful = any(_stateful(aggregator))
        self._past: dict[int, Memory] = {}
        """What was remembered in each group before the step at hand."""

    @property
    def aggregator(self) -> Aggregator:
        """The copy that is asked for the directions of the group at hand."""
        return self._aggregators[self._group]

    @property
    def remembers(self) -> bool:
        """Whether the aggregator has state, which a step that writes nothing leaves alone."""
        return self._is_stateful

    def bind(self, tasks: Sequence[str], groups: int = 1) -> Self:
        """Copy the aggregator for each group.

        Raises:
            RuntimeError: If what it remembers is of other tasks, or in other groups.
        """
        asked = tuple(tasks), groups
        if self.remembers and self._of not in (None, asked):
            raise RuntimeError(
                "what an aggregator remembers must belong to one set of tasks and groups, but is "
                f"of {self._of} and was asked for {asked}. Make a new strategy."
            )
        self._of = asked
        first = self._aggregators[0]
        while len(self._aggregators) < groups:
            self._aggregators.append(copy.deepcopy(first))
        return super().bind(tasks, groups)

    def take(self, active: Tensor | slice, group: int) -> None:
        """Let rows belong to these tasks and this group from now on."""
        super().take(active, group)
        self._group = group

    def coefficients(self, gramian: Tensor, across: Tensor | None = None) -> Tensor | None:
        """Return the aggregator's weights times s; None if it needs the rows."""
        del across
        if not self.by_gramian:
            return None
        check_gramian(gramian)
        gramian = gramian.detach().double()
        if not is_finite(gramian):
            return torch.full_like(gramian[0], torch.nan)
        weighting = _weighting_of(self.aggregator)
        assert weighting is not None  # noqa: S101
        return self._asked(weighting, gramian).to(gramian) * self._factor(gramian)

    def forward(self, gradients: Tensor) -> Tensor:
        """Return the aggregation of the rows times s; NaN for rows that are not finite."""
        gradients = gradients.detach()
        if self.by_gramian:
            weights = self.coefficients(gramian_in_range(gradients))
            assert weights is not None  # noqa: S101
            (direction,) = combine([[row] for row in gradients], weights)
            return torch.zeros_like(gradients[0]) if direction is None else direction
        finite = gradients.isfinite().all(0)
        if not self.coordinatewise:
            finite = finite.all().expand_as(finite)
            if not finite.all():
                return torch.full_like(gradients[0], torch.nan)
        wide = gradients.to(at_least_float32(gradients.dtype))
        direction = self._asked(self.aggregator, wide) * self._factor(wide)
        return torch.where(finite, direction, torch.nan).to(gradients.dtype)

    def end_step(self, *, written: bool) -> None:
        """Take it that a step is over: what it left is forgotten if nothing was written."""
        super().end_step(written=written)
        if not written:
            for group, memory in self._past.items():
                remember(_stateful(self._aggregators[group]), memory)
        self._past.clear()

    def reset(self) -> None:
        """Forget everything remembered from earlier steps."""
        super().reset()
        for aggregator in self._aggregators:
            for module in _stateful(aggregator):
                module.reset()

    def carried(self, state: Mapping[str, object], change: TaskChange) -> dict[str, object]:
        """Return what was saved, if an aggregator remembers nothing, or the tasks are the same."""
        saved = state.get("_extra_state")
        if change.old != change.new and (not isinstance(saved, Tensor) or unpacked(saved)):
            raise not_carried(self, "_extra_state", change)
        return dict(state)

    def get_extra_state(self) -> Tensor:
        """Return what the aggregators remember, a byte tensor."""
        return packed(
            [memory_of(_stateful(each)) for each in self._aggregators] if self.remembers else []
        )

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with what was saved."""
        memories = unpacked(state)
        if not self.remembers and not memories:
            return
        kinds = [len(list(_stateful(each))) for each in self._aggregators]
        if not self.remembers or [len(memory) for memory in memories] != kinds:
            raise ValueError(
                f"the saved state must be that of {self.aggregator!r} in {len(kinds)} groups of "
                "shared parameters, but is that of another. Give the Balancer the same aggregator."
            )
        for aggregator, memory in zip(self._aggregators, memories, strict=True):
            remember(_stateful(aggregator), memory)
            for module in _stateful(aggregator):  # NashMTL's problem cannot be saved
                if getattr(module, "step", 0) and hasattr(module, "_init_optim_problem"):
                    module._init_optim_problem()

    def extra_repr(self) -> str:
        """Return the aggregator and the factor."""
        return f"{self._aggregators[0]!r}, scale={self.scale!r}"

    def _factor(self, matrix: Tensor) -> float:
        return len(matrix) if isinstance(self.scale, str) else self.scale

    def _asked(self, ask: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
        """Return what the aggregator, or a part of it, says of a matrix."""
        if self._is_stateful and self._of is not None:
            self._past[self._group] = memory_of(_stateful(self.aggregator))
        for module in self.aggregator.modules():
            if isinstance(module, ConstantWeighting):  # preferences, of whatever dtype they were
                module.weights = module.weights.to(matrix)
        with torch.no_grad(), self.random.as_global_stream([matrix.device]):
            return ask(matrix)


def as_aggregator(strategy: GradientStrategy) -> Aggregator:
    """Return an aggregator of TorchJD that asks a gradient strategy.

    Strategies that combine rows by their Gramian become a ``GramianWeightedAggregator``, whose
    ``gramian_weighting`` serves TorchJD's ``autogram`` and ``optimize_gramian_computation=True``
    (where TorchJD computes the Gramian, in the precision of the gradients; else it is accumulated
    in float64). Directions are on the scale of the sum of the rows, as in mtbalance.

    Args:
        strategy: The strategy, which is not copied. What it remembers and draws is
            in the ``state_dict`` of the aggregator, whose ``reset`` is the strategy's.

    Raises:
        ValueError: If the strategy learns from further batches, which TorchJD does not give.

    Example:
        >>> import torch
        >>> from mtbalance.gradient import PCGrad
        >>> as_aggregator(PCGrad())(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """
    check_kind("strategy", strategy, GradientStrategy)
    if strategy.further_batches:
        raise ValueError(
            f"`strategy` must need no further batches to be an aggregator, but {strategy} learns "
            "from them. Use it in a Balancer."
        )
    if (strategy.by_gramian or strategy.is_sum) and strategy.row_means is None:
        return _GramianAggregator(strategy)
    return _MatrixAggregator(strategy)


class _MatrixAggregator(Aggregator, Stateful):
    """A strategy that needs the rows."""

    def __init__(self, strategy: GradientStrategy) -> None:
        super().__init__()
        self.strategy = strategy

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        direction: Tensor = self.strategy(matrix)
        return direction

    def reset(self) -> None:
        self.strategy.reset()

    def __repr__(self) -> str:
        return f"as_aggregator({self.strategy!r})"


class _GramianAggregator(GramianWeightedAggregator, Stateful):
    """A strategy that needs the Gramian."""

    gramian_weighting: "_OfGramians"

    def __init__(self, strategy: GradientStrategy) -> None:
        super().__init__(_OfGramians(strategy))
        self.weighting = _OfRows(self.gramian_weighting)

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        (direction,) = combine([[row] for row in matrix], self.weighting(matrix))
        return torch.zeros_like(matrix[0]) if direction is None else direction

    def reset(self) -> None:
        self.gramian_weighting.strategy.reset()

    def __repr__(self) -> str:
        return f"as_aggregator({self.gramian_weighting.strategy!r})"


class _OfGramians(Weighting[Any]):
    """The weights that a strategy gives for a Gramian."""

    def __init__(self, strategy: GradientStrategy) -> None:
        super().__init__()
        self.strategy = strategy

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        if not is_finite(gramian):
            return torch.full_like(gramian[0], torch.nan)
        weights = self.strategy.coefficients(gramian.double())
        assert weights is not None  # noqa: S101
        return weights.to(gramian)


class _OfRows(Weighting[Any]):
    """The same for rows, whose Gramian is accumulated in float64."""

    def __init__(self, weighting: _OfGramians) -> None:
        super().__init__()
        self._weighting = (weighting,)  # once in the state is enough

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        weights: Tensor = self._weighting[0](gramian_in_range(matrix))
        return weights


# --- what aggregators are, and what they remember -------------------------------------------------


def _weighting_of(aggregator: Aggregator) -> Weighting[Any] | None:
    """Return what gives the weights of rows by their Gramian, if that is all that is done to them.

    Hooks of the aggregator see the rows.
    """
    if not isinstance(aggregator, WeightedAggregator) or _has_hooks(aggregator):
        return None
    if type(aggregator).forward is not WeightedAggregator.forward:
        return None
    if isinstance(aggregator, GramianWeightedAggregator):
        return None if _has_hooks(aggregator.weighting) else aggregator.gramian_weighting
    return aggregator.weighting if type(aggregator.weighting) in _BLIND else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _stateful(aggregator: Aggregator) -> Iterator[Any]:
    """Yield the modules that remember."""
    return (module for module in aggregator.modules() if isinstance(module, Stateful))
