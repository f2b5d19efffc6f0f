"""Where the tasks of a step are balanced: at the shared parameters, or at features."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mtbalance._agreement import BELOW
from mtbalance._checks import averages_rows
from mtbalance._company import Accepts, Company, TaskPasses
from mtbalance._factors import Layer, layers_of, may_pay, passes_of
from mtbalance._graphs import Reach, is_computed_from, leaves_of_each, reach_of
from mtbalance._passes import task_gradients
from mtbalance._products import gramian_of
from mtbalance._reach import ReachLog
from mtbalance._rows import Rows, columns_of, combine, sum_of
from mtbalance._scaling import scaled
from mtbalance._seen import Seen
from mtbalance._shards import sum_over_shards
from mtbalance._task_gradients import Row, TaskGradients, converted
from mtbalance._writing import write
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Weighting

_MANY = 40
"""From so many losses on, it takes less time to find out what each reaches than to ask in vain."""

Divided = tuple[dict[int, list[Tensor]], list[Tensor]]
"""What is balanced, by the number of its group, and all other leaves."""


class Place(Protocol):
    """What the tasks' rows are gradients of."""

    first: int
    """The number of the rows' first column here, counted over all processes."""
    dtype: torch.dtype | None
    """What rows are kept in; None for their own."""
    retains: bool
    """Whether the graphs of the losses are to last."""

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Raise unless the losses can be balanced here."""

    def reach(self, losses: Sequence[Tensor]) -> Reach:
        """Return what the losses reach together, as far as their rows go."""

    def reached(self, losses: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return what each loss reaches; under ``BELOW``, what the features depend on."""

    def for_combinations(self, seen: Seen) -> "Place":
        """Return the place for a step that asks rows for Gramians and combinations alone."""

    def rows(self, seen: Seen, company: Company, scaler: GradScaler | None) -> Iterator[Row]:
        """Make a backward pass for each loss of this process, and yield the gradients."""

    def divide(self, gradients: TaskGradients) -> Divided:
        """Return what is balanced, by the number of its group, and all other leaves."""

    def gramian(
        self, leaves: Sequence[Tensor], rows: Rows, exponents: Sequence[int] = ()
    ) -> Tensor:
        """Return the inner products of rows over all their columns, in whatever process.

        Args:
            leaves: What the rows are gradients of.
            rows: The rows.
            exponents: As in ``gramian_of``.
        """

    def over_all(self, products: Tensor) -> Tensor:
        """Return inner products over all columns, of those over the columns of this process."""

    def combine(
        self,
        rows: Rows,
        coefficients: Tensor,
        like: Sequence[Tensor] | None = None,
        *,
        release: bool = False,
    ) -> list[Tensor | None]:
        """Return the combination of rows, as ``_rows.combine`` does for whole gradients."""

    def write(
        self,
        leaves: Sequence[Tensor],
        directions: list[Tensor | None],
        seen: Seen,
        accepts: Accepts,
    ) -> bool:
        """Accumulate directions into ``.grad``.

        Args:
            leaves: What they are directions of.
            directions: One for each leaf.
            seen: The losses.
            accepts: Is asked about gradients that only come out on the way.

        Returns:
            Whether they have been written.
        """


class AtParameters:
    """Balancing at the shared parameters themselves.

    Args:
        log: Knows which parameters are shared.
        passes: Makes the backward passes of single tasks.
        dtype: What rows are kept in; None for their own.
    """

    first = 0
    retains = False
    combine = staticmethod(combine)

    def __init__(self, log: ReachLog, passes: TaskPasses, dtype: torch.dtype | None) -> None:
        self._log = log
        self._passes = passes
        self._one_by_one = passes is task_gradients
        self.dtype = dtype

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Let all pass: what losses must reach is checked with what they reach."""

    def reach(self, losses: Sequence[Tensor]) -> Reach:
        """Return what the losses reach together."""
        return reach_of(losses)

    def reached(self, losses: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return what each loss reaches."""
        return {task: reach_of([loss]).leaves for task, loss in losses.items()}

    def for_combinations(self, seen: Seen) -> "Place":
        """Return where the gradients of large linear layers are factors, if that saves time."""
        if self._passes is not task_gradients:
            return self  # the user has said how gradients are to be made
        losses = list(seen.finite_here.values())
        large = [leaf for leaf in seen.reach.leaves if may_pay(leaf, len(losses))]
        if not large:
            return self
        groups, _ = self._log.divide(large)
        layers = layers_of(losses, list(itertools.chain(*groups.values())))
        if not layers:
            return self
        place = WithFactors(self._log, layers, self.dtype)
        place.retains = self.retains
        return place

    def rows(self, seen: Seen, company: Company, scaler: GradScaler | None) -> Iterator[Row]:
        """Make a backward pass for each loss of this process, and yield the gradients."""
        losses = seen.finite_here
        if not losses:
            return
        leaves, shares_graph = company.reach(losses, self) if seen.nonfinite else seen.reach
        if self.retains:
            shares_graph = [True] * len(losses)
        passes = company.task_passes or self._passes
        apart = self._one_by_one and company.size == 1 and company.task_passes is None
        if apart and len(losses) >= _MANY:
            yield from self._rows_apart(losses, leaves, shares_graph, scaler)
            return
        gradients = passes(scaled(losses.values(), scaler), leaves, shares_graph)
        for (task, loss), row in zip(losses.items(), gradients, strict=True):
            yield Row(task, loss.detach(), leaves, converted(row, self.dtype))

    def _rows_apart(
        self,
        losses: Mapping[str, Tensor],
        leaves: Sequence[Tensor],
        shares_graph: Sequence[bool],
        scaler: GradScaler | None,
    ) -> Iterator[Row]:
        """Yield the same of passes that ask for nothing which other losses alone reach.

        To ask takes time for each leaf, so that heads would cost the square of their number.
        """
        places = {id(leaf): place for place, leaf in enumerate(leaves)}
        each = leaves_of_each(list(losses.values()))
        values = scaled(losses.values(), scaler)
        for (task, loss), value, found, shares in zip(
            losses.items(), values, each, shares_graph, strict=True
        ):
            wanted = [leaves[place] for place in sorted(places[id(leaf)] for leaf in found)]
            (row,) = self._passes([value], wanted, [shares])
            yield Row(task, loss.detach(), wanted, converted(row, self.dtype))

    def divide(self, gradients: TaskGradients) -> Divided:
        """Return the shared parameters of each group, and all other leaves."""
        groups, rest = self._log.divide(gradients.leaves.values())
        self._log.check_rows(gradients, groups)
        return groups, rest

    def gramian(
        self, leaves: Sequence[Tensor], rows: Rows, exponents: Sequence[int] = ()
    ) -> Tensor:
        """Return the inner products of the rows, shards of other processes included."""
        return sum_over_shards(leaves, rows, functools.partial(gramian_of, exponents=exponents))

    def over_all(self, products: Tensor) -> Tensor:
        """Return them as they are: shards have been added up leaf by leaf."""
        return products

    def write(
        self,
        leaves: Sequence[Tensor],
        directions: list[Tensor | None],
        seen: Seen,
        accepts: Accepts,
    ) -> bool:
        """Accumulate directions into ``.grad``."""
        del seen, accepts
        write(leaves, directions)
        return True


class WithFactors(AtParameters):
    """Balancing at the shared parameters, with factors for the gradients of some layers' weights.

    Args:
        log: Knows which parameters are shared.
        layers: The layers, by the identity of their weights.
        dtype: What rows, and factors, are kept in; None for their own.
    """

    def __init__(
        self, log: ReachLog, layers: Mapping[int, Layer], dtype: torch.dtype | None
    ) -> None:
        super().__init__(log, functools.partial(passes_of, layers), dtype)
        self._one_by_one = True
        self._layers = layers

    def gramian(
        self, leaves: Sequence[Tensor], rows: Rows, exponents: Sequence[int] = ()
    ) -> Tensor:
        """Return the inner products of the gradients, of which some are factors."""
        plain = [number for number, leaf in enumerate(leaves) if id(leaf) not in self._layers]
        others = [[row[number] for number in plain] for row in rows]
        parts = [super().gramian([leaves[number] for number in plain], others, exponents)]
        for number, leaf in enumerate(leaves):
            if id(leaf) in self._layers:
                factors = [row[number] for row in rows]
                parts.append(self._layers[id(leaf)].gramian(factors, exponents))
        return sum_of(parts, parts[0].shape)

    def combine(
        self,
        rows: Rows,
        coefficients: Tensor,
        like: Sequence[Tensor] | None = None,
        *,
        release: bool = False,
    ) -> list[Tensor | None]:
        """Return the combination of the gradients: factors become gradients when combined."""
        combined = super().combine(rows, coefficients, like, release=release)
        for number, leaf in enumerate(like or ()):
            factor = combined[number]
            if id(leaf) in self._layers and factor is not None:
                combined[number] = self._layers[id(leaf)].gradient(factor)
        return combined


class AtFeatures:
    """Balancing at the output of the shared part, which one pass then goes back through.

    Args:
        parts: The features, one tensor or several; with several processes, those of its part of
            the batch.
        company: The processes.
    """

    dtype: torch.dtype | None = None
    retains = False
    combine = staticmethod(combine)

    def __init__(self, parts: Sequence[Tensor], company: Company) -> None:
        self._parts = parts
        self._company = company
        # As if the parts of all processes, one after the other, were one tensor.
        self.first = company.rank * sum(map(columns_of, parts))

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Raise unless each loss reaches what the features depend on, and only through them."""
        for one, other in itertools.permutations(self._parts, 2):
            if (one.grad_fn, one.output_nr) == (other.grad_fn, other.output_nr):
                raise ValueError(
                    "`features` must hold each tensor once, but the one of shape "
                    f"{tuple(one.shape)} is there twice, and would count as often."
                )
            if is_computed_from(one, other):
                raise ValueError(
                    "`features` must not be computed from each other, but the one of shape "
                    f"{tuple(one.shape)} is computed from that of shape {tuple(other.shape)}. "
                    "Give the first of them alone, through which all losses go."
                )
        below = {id(leaf) for leaf in reach_of(self._parts).leaves}
        for task, loss in losses.items():
            if not any(id(leaf) in below for leaf in reach_of([loss]).leaves):
                raise ValueError(f"the loss of task {task!r} must reach `features`, but does not.")
            above = reach_of([loss], until=self._parts).leaves
            past = [leaf for leaf in above if id(leaf) in below]
            if past:
                raise ValueError(
                    "`features` must be all that the losses get from the shared part of the "
                    f"network, but the loss of task {task!r} reaches {len(past)} of its parameters "
                    f"(one of shape {tuple(past[0].shape)}) past them, too. Leave `features` out."
                )

    def reach(self, losses: Sequence[Tensor]) -> Reach:
        """Return the features, and what the losses reach besides."""
        above = reach_of(losses, until=self._parts)
        return Reach([*self._parts, *above.leaves], above.shares_graph)

    def reached(self, losses: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return what each loss reaches besides the features, and what these depend on."""
        found = {task: reach_of([loss], until=self._parts).leaves for task, loss in losses.items()}
        return {**found, BELOW: reach_of(self._parts).leaves}

    def for_combinations(self, seen: Seen) -> "Place":
        """Return this one."""
        del seen
        return self

    def rows(self, seen: Seen, company: Company, scaler: GradScaler | None) -> Iterator[Row]:
        """Make a backward pass down to the features for each loss of this process."""
        losses = seen.finite_here
        leaves, shares_graph = company.reach(losses, self) if seen.nonfinite else seen.reach
        if self.retains:
            shares_graph = [True] * len(losses)
        gradients = task_gradients(scaled(losses.values(), scaler), leaves, shares_graph)
        own = len(self._parts)
        for (task, loss), row in zip(losses.items(), gradients, strict=True):
            # Rows of the features are those of the whole batch, of which this rank has a part.
            share = company.share(seen, task)
            row[:own] = [None if g is None else g * share for g in row[:own]]
            yield Row(task, loss.detach(), leaves, row)

    def divide(self, gradients: TaskGradients) -> Divided:
        """Return the features as the only group, and all leaves that are not before them."""
        own = {id(part) for part in self._parts}
        rest = [leaf for key, leaf in gradients.leaves.items() if key not in own]
        return {0: list(self._parts)}, rest

    def gramian(
        self, leaves: Sequence[Tensor], rows: Rows, exponents: Sequence[int] = ()
    ) -> Tensor:
        """Return the inner products of the rows, which each process has some columns of."""
        del leaves
        return self.over_all(gramian_of(rows, exponents))

    def over_all(self, products: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return self._company.sum(products)

    def write(
        self,
        leaves: Sequence[Tensor],
        directions: list[Tensor | None],
        seen: Seen,
        accepts: Accepts,
    ) -> bool:
        """Let the directions flow back into ``.grad`` of what the features depend on."""
        reached = [(f, d) for f, d in zip(leaves, directions, strict=True) if d is not None]
        features, slopes = [f for f, _ in reached], [d for _, d in reached]
        return self._company.backward_from(
            features, slopes, seen, accepts, retain_graph=self.retains
        )


def features_of(
    features: Tensor | Sequence[Tensor],
    weighting: Weighting,
    gradient: GradientStrategy,
    company: Company,
) -> AtFeatures:
    """Return the features as where to balance, or raise if they cannot be."""
    if gradient.row_means is not None:
        raise averages_rows("`features` must be None", "tensors", gradient)
    parts = [features] if isinstance(features, Tensor) else list(features)
    _check_features(parts, weighting, gradient, sharded=company.sharded)
    if company.size > 1 and not (gradient.coordinatewise or gradient.by_gramian):
        raise TypeError(
            "the gradient strategy must be coordinatewise or a GramianStrategy for `features` "
            f"of several processes, but {type(gradient).__name__} needs whole rows."
        )
    return AtFeatures(parts, company)


def _check_features(
    features: Sequence[object], weighting: Weighting, gradient: GradientStrategy, *, sharded: bool
) -> None:
    """Raise unless the features are tensors with a graph that these strategies can do with."""
    if gradient.further_batches:
        raise ValueError(
            f"`features` must be None with {type(gradient).__name__}, but got tensors. It "
            "multiplies gradients of several batches, whose features have nothing in common."
        )
    if weighting.needs_gradients:
        raise ValueError(
            f"`features` must be None with {type(weighting).__name__}, but got tensors. It reads "
            "the gradients of all parameters."
        )
    if sharded:
        raise ValueError(
            "`features` must be None with sharded parameters, but got tensors. Balance at the "
            "parameters, or use DistributedDataParallel."
        )
    if not features:
        raise ValueError("`features` must hold at least one tensor, but got none.")
    for feature in features:
        if not isinstance(feature, Tensor):
            raise TypeError(f"`features` must be tensors, but got {type(feature).__name__}.")
        if feature.grad_fn is None:
            raise ValueError(
                "`features` must be outputs of the shared part of the network, but got a tensor "
                f"of shape {tuple(feature.shape)} that was not computed from its parameters, or "
                "from frozen ones alone (requires_grad is False)."
            )
