"""The one place where losses, weighting, task gradients, gradient strategy and ``.grad`` meet."""

import functools
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from typing_extensions import Self

from mtbalance._checks import (
    check_choice,
    check_count,
    check_features,
    check_kind,
    check_losses_by_task,
    check_process_group,
    check_row_dtype,
    check_task_names,
    check_validation,
    count_fallback,
)
from mtbalance._direction import direction_of
from mtbalance._exchange import Exchange
from mtbalance._finite import FiniteCheck
from mtbalance._finite import message as nonfinite_message
from mtbalance._jacobian import (
    BatchedPasses,
    FreshGrad,
    TaskGradients,
    add_to_grad,
    converted,
    fresh_grad,
    gradient_of,
    reach_of,
    sharded_task_gradients,
    task_gradients,
)
from mtbalance._kept import KeptWeights
from mtbalance._places import AtFeatures, AtParameters, Place, check_between, write
from mtbalance._random import RandomSource
from mtbalance._ranks import BELOW, Agreement, Ranks, RankStep
from mtbalance._record import EpochCounts, EpochSummary, Record
from mtbalance._rows import combine, is_finite, stacked, sum_of
from mtbalance._split import Explanation, ReachLog, Shared, named_groups
from mtbalance._watch import OptimizerWatch
from mtbalance.gradient._base import GradientStrategy, GramianStrategy
from mtbalance.weighting._base import Step, Weighting

Losses = Mapping[str, Tensor]
Validation = Callable[[], Losses]


class Balancer(nn.Module):
    r"""Balances the tasks of a multi-task model: any weighting with any gradient strategy.

    ``backward`` stands where ``loss.backward()`` stood. In order, it takes the gradient :math:`g_i`
    of each raw loss, asks the weighting for the weights :math:`w_i`, hands the rows :math:`w_i g_i`
    of the shared parameters to the gradient strategy and accumulates the direction into their
    ``.grad``; every other parameter gets :math:`\sum_i w_i g_i`. With ``Sum`` and a weighting that
    needs no per-task gradients it makes one ordinary backward pass and no matrix.

    A task missing from ``losses`` is *absent*: it has no row, and its weighting state stays as it
    was. Absent is neither NaN nor 0. (Where an outer optimizer moves learned weights, the entry of
    an absent task gets the gradient 0.)

    Args:
        weighting: Turns losses into weighted losses.
        gradient: Turns per-task gradients into one direction.
        tasks: Names of the tasks, in the order of the rows.
        shared: What is balanced: modules or parameters, one or several, or a mapping from group
            name to these, each group being balanced on its own. None: whatever two or more losses
            reach.
        process_group: The processes that train together, each on its part of the batch; None for
            all of ``torch.distributed``. Losses and per-task gradients are averaged over them
            before they are balanced, inside ``DistributedDataParallel`` and without it; see "Many
            devices" in docs/.
        nonfinite: What a non-finite loss or gradient does: ``"raise"`` an error that names the
            task, ``"drop"`` the task from this step, ``"skip"`` the step (no gradient is written),
            or ``"propagate"`` it to ``.grad`` as ``Tensor.backward`` does. Under a gradient scaler
            non-finite *gradients* are passed on, so that the scaler skips the step. With one
            ordinary backward pass the gradients of single tasks are not known: ``"drop"`` then
            makes per-task passes. Looking waits for the device twice in a step; only with
            ``"propagate"`` may a step of a strategy with a closed form on the device (two tasks)
            wait for nothing.
        every: Solve for the weights of a Gramian strategy in every n-th step only, and use the last
            ones in between, where one backward pass serves as for ``Sum``. 1 is exact.
        dtype: What per-task gradients are kept in between their backward pass and the direction,
            for instance ``torch.bfloat16`` for half the memory; None for their own. The Gramian is
            accumulated in float64 from the kept numbers.
        chunk: How many tasks share one vectorised backward pass (``is_grads_batched``); None for
            one pass per task. It saves time where launching kernels is what takes it, on a GPU with
            small batches; on a CPU, and where an operation has no vectorised form, it costs time.
            What cannot be vectorised runs one by one, with one warning, counted in the record.

    Attributes:
        history: The last records; keeps none by default. Assign a ``deque(maxlen=n)`` to keep n.

    Raises:
        ValueError: If names repeat, ``shared`` holds no parameters or one parameter in two groups,
            or an option does not go with the strategies.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> from mtbalance.gradient import PCGrad
        >>> from mtbalance.weighting import Equal
        >>> trunk, head_a, head_b = (torch.nn.Linear(4, n) for n in (4, 1, 1))
        >>> balancer = Balancer(Equal(), PCGrad(), tasks=("a", "b"), shared=trunk)
        >>> h = trunk(torch.ones(8, 4))
        >>> record = balancer.backward({"a": head_a(h).mean(), "b": head_b(h).square().mean()})
        >>> trunk.weight.grad.shape, sorted(record.weights)
        (torch.Size([4, 4]), ['a', 'b'])
    """

    weighting: Weighting
    gradient: GradientStrategy

    def __init__(
        self,
        weighting: Weighting,
        gradient: GradientStrategy,
        *,
        tasks: Sequence[str],
        shared: Shared | Mapping[str, Shared] | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        nonfinite: str = "raise",
        every: int = 1,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_kind("weighting", weighting, Weighting)
        check_kind("gradient", gradient, GradientStrategy)
        check_choice("nonfinite", nonfinite, ["raise", "drop", "skip", "propagate"])
        check_process_group(process_group)
        check_row_dtype(dtype)
        self.tasks = check_task_names(tasks)
        self.weighting = weighting.bind(self.tasks)
        self.gradient = gradient
        self.nonfinite = nonfinite
        self.process_group = process_group
        self.history: deque[Record] = deque(maxlen=0)
        self.every = check_count("every", every)
        self.dtype = dtype
        self.chunk = None if chunk is None else check_count("chunk", chunk)
        self.fallbacks = 0
        """How often batched backward passes (``chunk``) ran one by one instead."""
        groups = None if shared is None else named_groups(shared)
        self._reach = ReachLog(self.tasks, groups)
        self._ranks = Ranks(process_group, self.tasks, groups)
        self._batched = None if self.chunk is None else BatchedPasses(self.chunk)
        self._finite = FiniteCheck(nonfinite, self._ranks)
        self._at_parameters = AtParameters(self._reach)
        self._kept = KeptWeights(self.tasks, 1 if groups is None else len(groups))
        self._watch = OptimizerWatch()
        self._pending = TaskGradients()
        self._epoch = EpochCounts(self.tasks)
        self._counted = 0
        self._draws_agree = False
        self._index: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self._check_options()

    def _check_options(self) -> None:
        """Refuse options that would do nothing, or not what they promise."""
        if self.every > 1:
            if not isinstance(self.gradient, GramianStrategy) or self.weighting.needs_gradients:
                raise ValueError(
                    "`every` must be 1 unless a GramianStrategy meets a weighting that needs no "
                    f"per-task gradients, but got {self.every} with "
                    f"{type(self.weighting).__name__} and {type(self.gradient).__name__}."
                )
            if self._ranks.sharded:
                raise ValueError(
                    f"`every` must be 1 with sharded parameters, but got {self.every}. Their "
                    "backward passes cannot be confined to some of the parameters."
                )

    # --- one step ---------------------------------------------------------------------------------

    def backward(
        self,
        losses: Losses,
        *,
        validation: Validation | None = None,
        scaler: GradScaler | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> Record:
        """Balance the losses and accumulate into ``.grad``, where ``loss.backward()`` would.

        Args:
            losses: Scalar loss with a graph per task; tasks left out are absent. With several
                processes, the losses of this one's part of the batch.
            validation: For weightings that look ahead (``needs_validation``): a function without
                arguments that returns the losses of a validation batch at the parameters as they
                are when called.
            scaler: The gradient scaler of mixed-precision training with float16. ``.grad`` is then
                scaled, as after ``scaler.scale(loss).backward()``.
            features: The output of the shared part of the network, through which all losses reach
                it (one tensor or several). Tasks are then balanced by their gradients of the
                *features*, and one backward pass goes through the shared part, whatever the number
                of tasks. This is an approximation: gradients that conflict at the features need not
                do so at the parameters, and the other way round. ``dtype`` and ``chunk`` do not
                apply: rows of features are small, and so are the passes down to them.

        Returns:
            What the step did.

        Raises:
            ValueError: If a loss is not a scalar with a graph, a name is unknown, a loss reaches no
                shared parameter, or ``validation`` is missing.
            FloatingPointError: If a loss or gradient is not finite and ``nonfinite="raise"``;
                nothing has been written then.
            RuntimeError: If another process has stopped with an error.
        """
        self._check_call(validation)
        if features is not None:
            return self._finish(self._at_features(losses, features, scaler))
        if not self._pending:
            if self._one_pass_serves:
                return self._finish(self._in_one_pass(losses, scaler))
            if self._kept.age < self.every:
                record = self._with_kept_weights(losses, scaler)
                if record is not None:
                    return self._finish(record)
            if self._ranks.several and not self._ranks.sharded:
                self._pending = self._averaged_while_computed(losses, scaler)
                return self._finish(self._balance_pending(validation, scaler))
        self.accumulate(losses, scaler=scaler)
        return self.apply(validation=validation, scaler=scaler)

    def accumulate(self, losses: Losses, *, scaler: GradScaler | None = None) -> None:
        """Add the gradients of a micro-batch to the per-task gradients, and free its graph.

        Gradients add up, as with repeated ``loss.backward()``: divide mean losses by the number of
        micro-batches to get the gradients of the mean over the whole batch. Tasks may come one at a
        time, each from a dataloader of its own.

        Args:
            losses: As in :meth:`backward`.
            scaler: As in :meth:`backward`; the same for all calls of a step.
        """
        named, error = self._checked(losses)
        bad = self._finite.bad_losses(named)
        if self._ranks.sharded:
            # Its backward passes are collective: all ranks must make the same ones.
            agreement = self._told(named, bad, {}, error)
            self._ranks.check_same_tasks(agreement)
            bad = list(agreement.nonfinite)
        elif error is not None:
            self._pending = TaskGradients()
            self._told({}, (), {}, error)  # the others wait in apply()
        if bad and self.nonfinite == "raise" and not self._ranks.several:
            self._pending = TaskGradients()
            raise FloatingPointError(nonfinite_message("loss", bad))
        self._pending.mark_nonfinite(bad)
        named = {name: loss for name, loss in named.items() if name not in bad}
        if named:
            rows = list(self._passes(named, scaler))  # all of them, or an error and none
            for name, leaves, row in rows:
                self._pending.add(name, named[name].detach(), leaves, row)

    @overload
    def apply(self, fn: Callable[[nn.Module], None]) -> Self: ...

    @overload
    def apply(
        self, *, validation: Validation | None = None, scaler: GradScaler | None = None
    ) -> Record: ...

    def apply(
        self,
        fn: Callable[[nn.Module], None] | None = None,
        *,
        validation: Validation | None = None,
        scaler: GradScaler | None = None,
    ) -> "Record | Self":
        """Balance what has been accumulated, and accumulate the result into ``.grad``.

        Args:
            fn: With a function, this is ``torch.nn.Module.apply`` and balances nothing, so that
                initialising a model that holds a Balancer still works.
            validation: As in :meth:`backward`.
            scaler: As in :meth:`backward`.

        Returns:
            What the step did.

        Raises:
            RuntimeError: If nothing has been accumulated.
        """
        if fn is not None:
            return super().apply(fn)
        self._check_call(validation)
        if self._ranks.several:
            pending, self._pending = self._pending, TaskGradients()
            self._pending = self._averaged(pending)
        if not self._pending:
            raise RuntimeError(
                "apply() must follow accumulate(), but nothing has been accumulated."
            )
        return self._finish(self._balance_pending(validation, scaler))

    # --- losses -> per-task gradients -------------------------------------------------------------

    def _checked(
        self, losses: Losses, features: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Tensor], Exception | None]:
        """Return the losses in order; with several processes, the error is for all to hear of."""
        try:
            named = check_losses_by_task(losses, self.tasks, may_be_empty=self._ranks.several)
            if features:
                check_between(features, named)
            if self._ranks.sharded:
                pass  # graphs hold other parameters then
            elif not self._ranks.several:
                self._reach.note_graphs(named)
            else:  # noted when all ranks have told what they reach
                self._reach.check({task: reach_of([loss]).leaves for task, loss in named.items()})
        except (TypeError, ValueError) as error:
            if not self._ranks.several:
                raise
            return {}, error
        return named, None

    def _passes(
        self, named: Losses, scaler: GradScaler | None
    ) -> Iterator[tuple[str, list[Tensor], list[Tensor | None]]]:
        """Yield, per task, its name, leaves, and its gradient for each."""
        losses = [loss if scaler is None else scaler.scale(loss) for loss in named.values()]
        reach = reach_of(list(named.values()))
        if self._ranks.sharded:
            inputs = [leaf for leaf in reach.leaves if not isinstance(leaf, nn.Parameter)]
            leaves = [*self._ranks.parameters(), *inputs]
            rows = sharded_task_gradients(losses, leaves, reach.shares_graph)
        else:
            leaves = reach.leaves
            if self._batched is None:
                rows = task_gradients(losses, leaves, reach.shares_graph)
            else:
                tell = functools.partial(count_fallback, self)
                rows = self._batched(losses, leaves, reach.shares_graph, tell)
        for name, row in zip(named, rows, strict=True):
            yield name, leaves, converted(row, self.dtype)

    def _averaged_while_computed(self, losses: Losses, scaler: GradScaler | None) -> TaskGradients:
        """Return the gradients averaged over ranks, each on its way while the next is computed."""
        named, error = self._checked(losses)
        reached = {name: reach_of([loss]).leaves for name, loss in named.items()}
        agreement = self._agreed(named, self._finite.bad_losses(named), reached, error)
        exchange = Exchange(self.process_group, agreement, self.dtype)
        named = {name: loss for name, loss in named.items() if name not in agreement.nonfinite}
        for name, leaves, row in self._passes(named, scaler) if named else ():
            exchange.add(name, leaves, row)
        return exchange.finish()

    def _averaged(self, pending: TaskGradients) -> TaskGradients:
        """Return the accumulated gradients averaged over ranks."""
        reached = {name: pending.leaves_of(name) for name in pending.losses}
        agreement = self._agreed(pending.losses, pending.nonfinite, reached)
        exchange = Exchange(self.process_group, agreement, self.dtype)
        for name in self._ordered(pending.losses):
            row = pending.take(name, reached[name])  # which goes once its bucket is filled
            if name not in agreement.nonfinite:
                exchange.add(name, reached[name], row)
            del row
        return exchange.finish()

    def _agreed(
        self,
        losses: Losses,
        nonfinite: Collection[str],
        reached: Mapping[str, Sequence[Tensor]],
        error: Exception | None = None,
    ) -> Agreement:
        """Tell all ranks what this one has; non-finite losses of any raise in all."""
        agreement = self._told(losses, nonfinite, reached, error)
        if agreement.nonfinite and self.nonfinite == "raise":
            raise FloatingPointError(nonfinite_message("loss", agreement.nonfinite))
        if not self._ranks.sharded:
            below = agreement.layouts.get(BELOW, [])
            self._reach.note(
                {task: [*leaves, *below] for task, leaves in agreement.layouts.items() if task}
            )
        return agreement

    def _told(
        self,
        losses: Losses,
        nonfinite: Collection[str],
        reached: Mapping[str, Sequence[Tensor]],
        error: Exception | None,
    ) -> Agreement:
        """Tell all ranks what this one has, or that it stops with an error."""
        if not self._draws_agree:
            # Whatever the seeds and generators were: orders and masks must be the same everywhere.
            self._ranks.same_draws([m for m in self.modules() if isinstance(m, RandomSource)])
            self._draws_agree = True
        return self._ranks.agree(losses, nonfinite, reached, error)

    # --- per-task gradients -> weights -> direction -> .grad --------------------------------------

    def _balance_pending(self, validation: Validation | None, scaler: GradScaler | None) -> Record:
        pending, self._pending = self._pending, TaskGradients()
        self._reach.note_gradients(pending, check=self._ranks.sharded)
        return self._balance(pending, validation, _scale_of(scaler), self._at_parameters)

    def _balance(
        self,
        pending: TaskGradients,
        validation: Validation | None,
        scale: float | None,
        place: Place,
    ) -> Record:
        if pending.nonfinite and self.nonfinite == "skip":
            return self._skipped(pending.losses, pending.nonfinite)
        names, dropped = self._ordered(pending.losses), self._ordered(pending.nonfinite)
        if not names:
            return Record((), {}, absent=self._absent(dropped), nonfinite=dropped, dropped=dropped)
        groups, rest = place.divide(pending)
        unscale = 1.0 if scale is None else 1.0 / scale
        rows_of_groups = {number: pending.rows(names, part) for number, part in groups.items()}
        rows_of_rest = pending.rows(names, rest)
        gramians = {
            number: place.gramian(groups[number], rows) * unscale**2
            for number, rows in rows_of_groups.items()
        }
        total = sum_of(list(gramians.values()), (len(names), len(names)))

        bad = self._finite.bad_gradients(names, total, rest, rows_of_rest)
        if bad and scale is not None:
            # Most likely the scale is too large: let scaler.step() see it and skip.
            ones = torch.ones(len(names), device="cpu")
            for number, rows in rows_of_groups.items():
                place.write(groups[number], combine(rows, ones))
            write(rest, combine(rows_of_rest, ones))
            absent = self._absent(names + dropped)
            return Record(
                names, pending.losses, absent=absent, nonfinite=self._ordered(bad), overflow=True
            )
        if bad and self.nonfinite == "raise":
            raise FloatingPointError(nonfinite_message("gradient", bad))
        if bad:
            pending.mark_nonfinite(bad)
            # Skips, or goes on without them.
            return self._balance(pending, validation, scale, place)

        losses = stacked([pending.losses[name] for name in names])
        active = self._numbers(names, losses.device)
        if self.weighting.needs_gradients:
            leaves = list(pending.leaves.values())
            rows = pending.rows(names, leaves)
            with self.weighting.only(active):
                step = Step(leaves, rows, scale or 1.0, validation)
                if self._ranks.several or self._ranks.sharded:
                    step = RankStep(leaves, rows, scale or 1.0, validation, self._ranks)
                self.weighting.before_step(step)
            del rows
        weights, learned = self._weigh(losses, active)

        pending.forget()  # from here on a row is freed as soon as its direction is known
        outcomes = {
            number: direction_of(
                self.gradient,
                groups[number],
                rows,
                gramians[number],
                weights,
                unscale,
                place.first,
            )
            for number, rows in rows_of_groups.items()
        }
        if place is self._at_parameters:
            self._kept.keep(names, {number: o.solution for number, o in outcomes.items()})
        # Nothing is written before everything is known: an error in a strategy leaves no trace.
        for number, outcome in outcomes.items():
            place.write(groups[number], outcome.direction)
        write(rest, combine(rows_of_rest, weights, rest, release=True))
        self._add_learned(learned, scale)
        progress = [
            place.over_all(o.progress) if o.combination is None else o.progress
            for o in outcomes.values()
        ]
        combinations = [outcome.combination for outcome in outcomes.values()]
        return Record(
            names,
            dict(zip(names, losses.unbind(), strict=True)),
            dict(zip(names, weights.unbind(), strict=True)),
            gramian=total,
            progress=sum_of(progress, (len(names),)),
            combination=combinations[0] if len(combinations) == 1 else None,
            absent=self._absent(names + dropped),
            nonfinite=dropped,
            dropped=dropped,
        )

    def _weigh(self, losses: Tensor, active: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return d objective / d losses, shape (m,), and the derivatives by learned weights."""
        learned = [p for p in self.weighting.parameters() if p.requires_grad]
        self._watch.look(learned, self._reach.parameters())
        raw = losses.detach().to(active.device).requires_grad_()
        with (
            torch.enable_grad(),
            _without_autocast(raw.device),
            self.weighting.only(active),
        ):
            weighted = self.weighting(raw)
            if weighted.shape != raw.shape:
                raise ValueError(
                    f"{type(self.weighting).__name__} must return one weighted loss per task, "
                    f"shape {tuple(raw.shape)}, but got shape {tuple(weighted.shape)}."
                )
            weights, *slopes = torch.autograd.grad(
                weighted.sum(), [raw, *learned], allow_unused=True, materialize_grads=True
            )
        if self._finite.looks and not is_finite(weights):
            raise FloatingPointError(
                f"{type(self.weighting).__name__} must give finite weights, but gives "
                f"{weights.tolist()} for the losses {raw.tolist()}."
            )
        return weights.to(losses.device), list(zip(learned, slopes, strict=True))

    @staticmethod
    def _add_learned(learned: list[tuple[Tensor, Tensor]], scale: float | None) -> None:
        add_to_grad([p for p, _ in learned], [s * (scale or 1.0) for _, s in learned])

    # --- passes whose coefficients are known beforehand -------------------------------------------

    @property
    def _one_pass_serves(self) -> bool:
        plain = self.gradient.is_sum and not self.weighting.needs_gradients
        return plain and self.nonfinite != "drop"  # to drop a task, its own gradient must be known

    def _in_one_pass(self, losses: Losses, scaler: GradScaler | None) -> Record:
        """Make one ordinary backward pass of the weighted sum."""
        facts = self._facts(losses)
        if facts.nonfinite:
            return self._skipped(facts.losses, facts.nonfinite)
        if not facts.losses:  # on any rank
            return Record((), {}, absent=self.tasks)
        scale = self._set_up(scaler, facts)
        weights, learned = self._weights_of(facts)
        with fresh_grad(facts.leaves) as fresh:
            self._pass(facts, weights, scale, facts.leaves)
            return self._record_if_finite(fresh, facts, weights, learned, scale)

    def _with_kept_weights(self, losses: Losses, scaler: GradScaler | None) -> Record | None:
        """Make one pass per group with the weights of an earlier step; None if they do not fit."""
        facts = self._facts(losses)
        if facts.nonfinite or not self._kept.fits(facts.losses):
            return None
        scale = self._set_up(scaler, facts)
        weights, learned = self._weights_of(facts)
        groups, rest = self._reach.divide(facts.leaves)
        combination = None
        with fresh_grad(facts.leaves) as fresh:
            self._pass(facts, weights, scale, rest, retain_graph=bool(groups))
            for number, leaves in groups.items():
                last = number == list(groups)[-1]
                combination = weights * self._kept.solutions[number].to(weights)
                self._pass(facts, combination, scale, leaves, retain_graph=not last)
            record = self._record_if_finite(fresh, facts, weights, learned, scale)
        self._kept.age += 1
        return replace(record, combination=combination if len(groups) == 1 else None, reused=True)

    def _facts(self, losses: Losses) -> "_Facts":
        """Return what is known before a pass, after telling the other ranks."""
        named, error = self._checked(losses)
        bad = self._finite.bad_losses(named)
        values = {name: loss.detach() for name, loss in named.items()}
        reach = reach_of(list(named.values()))
        inputs = [leaf for leaf in reach.leaves if not isinstance(leaf, nn.Parameter)]
        around = [*self._ranks.parameters(), *inputs] if self._ranks.sharded else reach.leaves
        if not self._ranks.several:
            if bad and self.nonfinite == "raise":
                raise FloatingPointError(nonfinite_message("loss", bad))
            return _Facts(named, values, tuple(bad), dict.fromkeys(named, 1.0), around)
        reached = {name: reach_of([loss]).leaves for name, loss in named.items()}
        if self._ranks.sharded:
            reached = {name: self._ranks.plain(leaves) for name, leaves in reached.items()}
        agreement = self._agreed(named, bad, reached, error)
        parameters = self._ranks.ordered(itertools.chain(*agreement.layouts.values()))
        if self._ranks.sharded:
            self._ranks.check_same_tasks(agreement)
        else:
            around = [*parameters, *inputs]
        shares = {name: self._ranks.size / count for name, count in agreement.counts.items()}
        return _Facts(
            named, agreement.losses, agreement.nonfinite, shares, around, plain=parameters
        )

    def _weights_of(self, facts: "_Facts") -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        stack = stacked(list(facts.losses.values()))
        return self._weigh(stack, self._numbers(tuple(facts.losses), stack.device))

    def _pass(
        self,
        facts: "_Facts",
        coefficients: Tensor,
        scale: float | None,
        leaves: Sequence[Tensor],
        *,
        retain_graph: bool = False,
    ) -> None:
        """Put the gradient of a combination of the losses, averaged over ranks, into ``.grad``."""
        if not leaves:
            return
        factor_of = dict(zip(facts.losses, coefficients.unbind(), strict=True))
        factors = [
            factor_of[name].to(loss) * (facts.shares[name] * (scale or 1.0))
            for name, loss in facts.here.items()
        ]
        here = list(facts.here.values())
        if self._ranks.several and not self._ranks.sharded:
            # Captured, not accumulated: no hook (of DistributedDataParallel) averages once more.
            gradients: list[Tensor | None] = [None] * len(leaves)
            if here:
                gradients = gradient_of(here, leaves, factors, retain_graph=retain_graph)
            add_to_grad(leaves, self._ranks.add_up(leaves, gradients, divisor=self._ranks.size))
        elif self._ranks.sharded:
            torch.autograd.backward(here, factors)
            # Shards are averaged where they arrive, other parameters are not.
            means = self._ranks.add_up(
                facts.plain, [leaf.grad for leaf in facts.plain], divisor=self._ranks.size
            )
            for leaf, mean in zip(facts.plain, means, strict=True):
                leaf.grad = mean
        elif len(leaves) == len(facts.leaves):
            torch.autograd.backward(here, factors, retain_graph=retain_graph)
        else:
            torch.autograd.backward(here, factors, retain_graph=retain_graph, inputs=list(leaves))

    def _record_if_finite(
        self,
        fresh: FreshGrad,
        facts: "_Facts",
        weights: Tensor,
        learned: list[tuple[Tensor, Tensor]],
        scale: float | None,
    ) -> Record:
        names = tuple(facts.losses)
        looks = scale is None and self._finite.looks
        if looks and not self._finite.everywhere(fresh.is_finite()):
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"the gradients of the tasks {', '.join(map(repr, names))} must be finite, "
                    "but their sum holds NaN or infinity though the losses do not. "
                    "nonfinite='drop' takes them one by one and tells which it is."
                )
            return self._skipped(facts.losses, ())
        fresh.keep()
        self._add_learned(learned, scale)
        return Record(
            names,
            facts.losses,
            dict(zip(names, weights.unbind(), strict=True)),
            absent=self._absent(names),
        )

    @staticmethod
    def _set_up(scaler: GradScaler | None, facts: "_Facts") -> float | None:
        if scaler is not None:
            scaler.scale(next(iter(facts.losses.values())))  # makes the scaler set its scale up
        return _scale_of(scaler)

    # --- balancing at features --------------------------------------------------------------------

    def _at_features(
        self,
        losses: Losses,
        features: Tensor | Sequence[Tensor],
        scaler: GradScaler | None,
    ) -> Record:
        """Balance by gradients of the features; one pass goes on from there."""
        parts = [features] if isinstance(features, Tensor) else list(features)
        if self._pending:
            raise RuntimeError(
                "`features` must be None after accumulate(), but got tensors. Features belong to "
                "one backward pass."
            )
        check_features(parts, self.weighting, sharded=self._ranks.sharded)
        if self._ranks.several and not (
            self.gradient.coordinatewise or isinstance(self.gradient, GramianStrategy)
        ):
            raise TypeError(
                "the gradient strategy must be coordinatewise or a GramianStrategy for `features` "
                f"of several processes, but {type(self.gradient).__name__} needs whole rows."
            )
        if self._one_pass_serves:
            return self._in_one_pass(losses, scaler)
        named, error = self._checked(losses, parts)
        bad = self._finite.bad_losses(named)
        shares = dict.fromkeys(named, 1.0)
        exchange: Exchange | None = None
        below = reach_of(parts).leaves
        if self._ranks.several:
            reached = {name: reach_of([loss], until=parts).leaves for name, loss in named.items()}
            reached[BELOW] = below
            agreement = self._agreed(named, bad, reached, error)
            below = agreement.layouts[BELOW]
            shares = {name: 1 / count for name, count in agreement.counts.items()}
            exchange, bad = Exchange(self.process_group, agreement), list(agreement.nonfinite)
        elif bad and self.nonfinite == "raise":
            raise FloatingPointError(nonfinite_message("loss", bad))
        pending = TaskGradients()
        pending.mark_nonfinite(bad)
        named = {name: loss for name, loss in named.items() if name not in bad}
        scaled = [loss if scaler is None else scaler.scale(loss) for loss in named.values()]
        above = reach_of(list(named.values()), until=parts)
        leaves = [*parts, *above.leaves]
        for name, row in zip(
            named, task_gradients(scaled, leaves, above.shares_graph), strict=True
        ):
            # Rows of the features are those of the whole batch, of which this rank has a part.
            row[: len(parts)] = [None if g is None else g * shares[name] for g in row[: len(parts)]]
            if exchange is None:
                pending.add(name, named[name].detach(), leaves, row)
            else:
                exchange.add(name, leaves, row)
        if exchange is not None:
            pending = exchange.finish()
        place = AtFeatures(parts, below, self._ranks)
        return self._balance(pending, None, _scale_of(scaler), place)

    # --- around the steps -------------------------------------------------------------------------

    def end_epoch(self) -> EpochSummary:
        """Close an epoch: strategies that look at epochs do so, and counts start again.

        Warns of tasks that were active in no step of the epoch.

        Returns:
            How often each task was active or dropped since the last call.
        """
        summary = self._epoch.summary()
        if summary.steps and summary.never_active:
            warnings.warn(
                f"no step of this epoch ({summary.steps} steps) had a usable loss for "
                f"{', '.join(map(repr, summary.never_active))}. Are the labels joined correctly?",
                UserWarning,
                stacklevel=2,
            )
        self.weighting.end_epoch()
        self._epoch = EpochCounts(self.tasks)
        return summary

    def reset(self) -> None:
        """Forget everything learned, remembered and accumulated."""
        self.weighting.reset()
        self.gradient.reset()
        self._pending = TaskGradients()
        self._epoch = EpochCounts(self.tasks)
        self._kept.reset()

    def explain(
        self, losses: Losses | None = None, *, model: nn.Module | None = None
    ) -> Explanation:
        """Say which parameters are shared, reached by some tasks, task-specific, frozen or unused.

        What losses reach is known from the steps so far, and from ``losses``.

        Args:
            losses: Losses whose graphs to look at; they are left intact.
            model: A model, for the names and for parameters that no loss reaches.

        Returns:
            A table (print it) with the memory that per-task gradients cost.
        """
        if losses is not None:
            self._reach.note_graphs(check_losses_by_task(losses, self.tasks))
        return self._reach.explain(model)

    def get_extra_state(self) -> Tensor:
        """Return the number of tasks, the running epoch's counts, and weights kept for later."""
        tasks = torch.tensor([float(len(self.tasks))], dtype=torch.float64, device="cpu")
        return torch.cat([tasks, self._epoch.as_tensor().double(), self._kept.as_tensor()])

    def set_extra_state(self, state: Tensor) -> None:
        """Continue with a saved state."""
        if int(state[0]) != len(self.tasks):
            raise ValueError(
                f"the saved state must belong to {len(self.tasks)} tasks, but has {int(state[0])}."
            )
        counts = len(self._epoch.as_tensor())
        self._epoch = EpochCounts.from_tensor(self.tasks, state[1 : 1 + counts].long())
        self._kept.load(state[1 + counts :])

    def extra_repr(self) -> str:
        options = {"nonfinite": "raise", "every": 1, "dtype": None, "chunk": None}
        changed = [
            f", {k}={getattr(self, k)!r}" for k, v in options.items() if getattr(self, k) != v
        ]
        return f"tasks={self.tasks}" + "".join(changed)

    def _check_call(self, validation: Validation | None) -> None:
        if not self.weighting.needs_validation:
            return
        try:
            check_validation(self.weighting, validation)
        except ValueError as error:
            if self._ranks.several:
                self._told({}, (), {}, error)
            raise

    def _numbers(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the tasks' numbers, on the device of the weighting's state if it has any."""
        for state in itertools.chain(self.weighting.parameters(), self.weighting.buffers()):
            device = state.device
        key = (tuple(names), device)
        if key not in self._index:  # made once: numbers that go to a device wait for it
            numbers = [self.tasks.index(name) for name in names]
            self._index[key] = torch.tensor(numbers, device=device)
        return self._index[key]

    def _absent(self, present: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name not in present)

    def _skipped(self, losses: Mapping[str, Tensor], nonfinite: Collection[str]) -> Record:
        names = self._ordered(losses)
        return Record(
            names,
            dict(losses),
            absent=self._absent([*names, *nonfinite]),
            nonfinite=self._ordered(nonfinite),
            skipped=True,
        )

    def _ordered(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name in names)

    def _finish(self, record: Record) -> Record:
        fallbacks = self.fallbacks + self.weighting.fallbacks + self.gradient.fallbacks
        record = replace(record, fallbacks=fallbacks - self._counted)
        self._counted = fallbacks
        self._epoch.add(record)
        self.history.append(record)
        return record


class _Facts(NamedTuple):
    """What is known before a pass whose coefficients do not depend on it."""

    here: dict[str, Tensor]
    """The losses of this process, with their graphs."""
    losses: dict[str, Tensor]
    """The losses of all processes: means over those that have the task."""
    nonfinite: tuple[str, ...]
    shares: dict[str, float]
    """Per task, the number of processes over the number of those that have it."""
    leaves: list[Tensor]
    plain: Sequence[Tensor] = ()
    """The parameters among them that are not sharded."""


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _scale_of(scaler: GradScaler | None) -> float | None:
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
