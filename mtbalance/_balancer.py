"""The one place where losses, weighting, task gradients, gradient strategy and ``.grad`` meet."""

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from typing_extensions import Self

from mtbalance._checks import (
    check_choice,
    check_kind,
    check_losses_by_task,
    check_one_process,
    check_task_names,
    check_validation,
)
from mtbalance._jacobian import (
    TaskGradients,
    add_to_grad,
    direct_by_columns,
    fresh_grad,
    reach_of,
    task_gradients,
)
from mtbalance._record import EpochCounts, EpochSummary, Record
from mtbalance._rows import Rows, all_finite, combine, gramian_of, is_finite, stacked, sum_of
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
        process_group: Must be None in this release, which balances in one process only.
        nonfinite: What a non-finite loss or gradient does: ``"raise"`` an error that names the
            task, ``"drop"`` the task from this step, or ``"skip"`` the step (no gradient is
            written). Under a gradient scaler non-finite *gradients* are passed on, so that the
            scaler skips the step. With one ordinary backward pass the gradients of single tasks are
            not known: ``"drop"`` then makes per-task passes.

    Attributes:
        history: The last records; keeps none by default. Assign a ``deque(maxlen=n)`` to keep n.

    Raises:
        ValueError: If names repeat, or ``shared`` holds no parameters or one parameter in two
            groups.
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
        process_group: None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        check_kind("weighting", weighting, Weighting)
        check_kind("gradient", gradient, GradientStrategy)
        if process_group is not None:
            raise ValueError(
                f"`process_group` must be None in this release, but got {process_group!r}. "
                "Balancing over several processes is not supported yet."
            )
        check_choice("nonfinite", nonfinite, ["raise", "drop", "skip"])
        self.tasks = check_task_names(tasks)
        self.weighting = weighting.bind(self.tasks)
        self.gradient = gradient
        self.nonfinite = nonfinite
        self.history: deque[Record] = deque(maxlen=0)
        self._groups = None if shared is None else named_groups(shared)
        self._reach = ReachLog(self.tasks, self._groups)
        self._watch = OptimizerWatch()
        self._pending = TaskGradients()
        self._epoch = EpochCounts(self.tasks)
        self._fallbacks = 0

    # --- one step ---------------------------------------------------------------------------------

    def backward(
        self,
        losses: Losses,
        *,
        validation: Validation | None = None,
        scaler: GradScaler | None = None,
    ) -> Record:
        """Balance the losses and accumulate into ``.grad``, where ``loss.backward()`` would.

        Args:
            losses: Scalar loss with a graph per task; tasks left out are absent.
            validation: For weightings that look ahead (``needs_validation``): a function without
                arguments that returns the losses of a validation batch at the parameters as they
                are when called.
            scaler: The gradient scaler of mixed-precision training with float16. ``.grad`` is then
                scaled, as after ``scaler.scale(loss).backward()``.

        Returns:
            What the step did.

        Raises:
            ValueError: If a loss is not a scalar with a graph, a name is unknown, a loss reaches no
                shared parameter, or ``validation`` is missing.
            FloatingPointError: If a loss or gradient is not finite and ``nonfinite="raise"``;
                nothing has been written then.
        """
        self._check_call(validation)
        if self._one_pass_serves and not self._pending:
            return self._backward_in_one_pass(losses, scaler)
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
        check_one_process()
        named = check_losses_by_task(losses, self.tasks)
        bad = _nonfinite_losses(named)
        if bad and self.nonfinite == "raise":
            self._pending = TaskGradients()
            raise FloatingPointError(_nonfinite_message("loss", bad))
        self._pending.mark_nonfinite(bad)
        for name in bad:
            del named[name]
        if not named:
            return
        self._reach.note_graphs(named)
        reach = reach_of(list(named.values()))
        scaled = [loss if scaler is None else scaler.scale(loss) for loss in named.values()]
        rows = list(task_gradients(scaled, reach))  # all of them, or an error and none
        for (name, loss), row in zip(named.items(), rows, strict=True):
            self._pending.add(name, loss.detach(), reach.leaves, row)

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
        if not self._pending:
            raise RuntimeError(
                "apply() must follow accumulate(), but nothing has been accumulated."
            )
        pending, self._pending = self._pending, TaskGradients()
        self._reach.note_gradients(pending)
        return self._finish(self._balance(pending, validation, _scale_of(scaler)))

    def _balance(
        self, pending: TaskGradients, validation: Validation | None, scale: float | None
    ) -> Record:
        if pending.nonfinite and self.nonfinite == "skip":
            return self._skipped(pending.losses, pending.nonfinite)
        names, dropped = self._ordered(pending.losses), self._ordered(pending.nonfinite)
        if not names:
            return Record((), {}, absent=self._absent(dropped), nonfinite=dropped, dropped=dropped)
        groups, rest = self._reach.divide(pending)
        unscale = 1.0 if scale is None else 1.0 / scale
        rows_of_groups = [pending.rows(names, part) for part in groups]
        gramians = [gramian_of(rows) * unscale**2 for rows in rows_of_groups]
        total = sum_of(gramians, (len(names), len(names)))

        rows_of_rest = pending.rows(names, rest)
        bad = _nonfinite_gradients(names, total, rows_of_rest)
        if bad and scale is not None:
            # Most likely the scale is too large: let scaler.step() see it and skip.
            leaves = [leaf for part in (*groups, rest) for leaf in part]
            add_to_grad(leaves, combine(pending.rows(names, leaves), [1.0] * len(names)))
            absent = self._absent(names + dropped)
            return Record(
                names, pending.losses, absent=absent, nonfinite=self._ordered(bad), overflow=True
            )
        if bad and self.nonfinite == "raise":
            raise FloatingPointError(_nonfinite_message("gradient", bad))
        if bad:
            pending.mark_nonfinite(bad)
            return self._balance(pending, validation, scale)  # skips, or goes on without them

        losses = stacked([pending.losses[name] for name in names])
        active = self._numbers(names, losses.device)
        if self.weighting.needs_gradients:
            leaves = list(pending.leaves.values())
            rows = pending.rows(names, leaves)
            with self.weighting.only(active):
                self.weighting.before_step(Step(leaves, rows, scale or 1.0, validation))
        weights, learned = self._weigh(losses, active)

        outcomes = [
            self._direct(rows, gramian, weights, unscale)
            for rows, gramian in zip(rows_of_groups, gramians, strict=True)
        ]
        # Nothing is written before everything is known: an error in a strategy leaves no trace.
        for leaves, outcome in zip(groups, outcomes, strict=True):
            add_to_grad(leaves, outcome.direction)
        add_to_grad(rest, combine(rows_of_rest, weights.tolist()))
        self._add_learned(learned, scale)
        return Record(
            names,
            dict(zip(names, losses.unbind(), strict=True)),
            dict(zip(names, weights.unbind(), strict=True)),
            gramian=total,
            progress=sum_of([o.progress for o in outcomes], (len(names),)),
            combination=outcomes[0].combination if len(outcomes) == 1 else None,
            absent=self._absent(names + dropped),
            nonfinite=dropped,
            dropped=dropped,
        )

    def _direct(self, rows: Rows, gramian: Tensor, weights: Tensor, unscale: float) -> "_Outcome":
        """Ask the gradient strategy for the direction of one group of parameters."""
        weights = weights.to(gramian)
        if self.gradient.is_sum:
            combination = weights
        elif isinstance(self.gradient, GramianStrategy):
            combination = weights * self.gradient.solve(gramian * weights * weights[:, None])
        else:
            direction, progress = direct_by_columns(
                self.gradient, rows, weights, coordinatewise=self.gradient.coordinatewise
            )
            return _Outcome(direction, progress * unscale**2, None)
        return _Outcome(combine(rows, combination.tolist()), gramian @ combination, combination)

    def _weigh(self, losses: Tensor, active: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return d objective / d losses, shape (m,), and the derivatives by learned weights."""
        learned = [p for p in self.weighting.parameters() if p.requires_grad]
        self._watch.look(learned, self._reach.parameters())
        raw = losses.detach().to(active.device).requires_grad_()
        with (
            torch.enable_grad(),
            torch.autocast(raw.device.type, enabled=False),
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
        if not is_finite(weights):
            raise FloatingPointError(
                f"{type(self.weighting).__name__} must give finite weights, but gives "
                f"{weights.tolist()} for the losses {raw.tolist()}."
            )
        return weights.to(losses.device), list(zip(learned, slopes, strict=True))

    @staticmethod
    def _add_learned(learned: list[tuple[Tensor, Tensor]], scale: float | None) -> None:
        add_to_grad([p for p, _ in learned], [s * (scale or 1.0) for _, s in learned])

    # --- one ordinary backward pass ---------------------------------------------------------------

    @property
    def _one_pass_serves(self) -> bool:
        plain = self.gradient.is_sum and not self.weighting.needs_gradients
        return plain and self.nonfinite != "drop"  # to drop a task, its own gradient must be known

    def _backward_in_one_pass(self, losses: Losses, scaler: GradScaler | None) -> Record:
        named = check_losses_by_task(losses, self.tasks)
        names = tuple(named)
        values = {name: loss.detach() for name, loss in named.items()}
        bad = _nonfinite_losses(named)
        if bad and self.nonfinite == "raise":
            raise FloatingPointError(_nonfinite_message("loss", bad))
        if bad:
            return self._finish(self._skipped(values, bad))
        self._reach.note_graphs(named)
        if scaler is not None:
            scaler.scale(values[names[0]])  # makes the scaler set its scale up
        scale = _scale_of(scaler)

        stack = stacked(list(values.values()))
        weights, learned = self._weigh(stack, self._numbers(names, stack.device))
        factors = [
            weight.to(loss) * (scale or 1.0)
            for weight, loss in zip(weights, named.values(), strict=True)
        ]
        leaves = reach_of(list(named.values())).leaves
        with fresh_grad(leaves) as fresh:
            torch.autograd.backward(list(named.values()), factors)
            if scale is None and not fresh.is_finite():
                if self.nonfinite == "raise":
                    raise FloatingPointError(
                        f"the gradients of the tasks {', '.join(map(repr, names))} must be finite, "
                        "but their sum holds NaN or infinity though the losses do not. "
                        "nonfinite='drop' takes them one by one and tells which it is."
                    )
                return self._finish(self._skipped(values, ()))
            fresh.keep()
        self._add_learned(learned, scale)
        return self._finish(
            Record(
                names,
                values,
                dict(zip(names, weights.unbind(), strict=True)),
                absent=self._absent(names),
            )
        )

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
        """Return the counts of the running epoch."""
        return self._epoch.as_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue with saved counts."""
        self._epoch = EpochCounts.from_tensor(self.tasks, state)

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, nonfinite={self.nonfinite!r}"

    def _check_call(self, validation: Validation | None) -> None:
        check_one_process()
        if self.weighting.needs_validation:
            check_validation(self.weighting, validation)

    def _numbers(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the tasks' numbers, on the device of the weighting's state if it has any."""
        for state in itertools.chain(self.weighting.parameters(), self.weighting.buffers()):
            device = state.device
        return torch.tensor([self.tasks.index(name) for name in names], device=device)

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
        fallbacks = self.weighting.fallbacks + self.gradient.fallbacks
        record = replace(record, fallbacks=fallbacks - self._fallbacks)
        self._fallbacks = fallbacks
        self._epoch.add(record)
        self.history.append(record)
        return record


class _Outcome(NamedTuple):
    direction: list[Tensor | None]
    progress: Tensor
    combination: Tensor | None


def _scale_of(scaler: GradScaler | None) -> float | None:
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None


def _nonfinite_losses(losses: Losses) -> list[str]:
    finite = torch.isfinite(stacked([loss.detach() for loss in losses.values()])).tolist()
    return [name for name, good in zip(losses, finite, strict=True) if not good]


def _nonfinite_gradients(names: Sequence[str], gramian: Tensor, rest: Rows) -> list[str]:
    """Name the tasks whose gradient of a shared or of any other parameter is not finite."""
    finite = torch.isfinite(gramian.diagonal()).tolist()
    return [
        name
        for name, good, row in zip(names, finite, rest, strict=True)
        if not (good and all_finite(row))
    ]


def _nonfinite_message(what: str, names: Sequence[str]) -> str:
    return (
        f"the {what} of task {', '.join(map(repr, names))} must be finite, but holds NaN or "
        "infinity. nonfinite='drop' leaves the task out of such a step, 'skip' leaves the step out."
    )
