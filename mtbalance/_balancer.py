"""The one place where losses, weighting, task gradients, gradient strategy and ``.grad`` meet."""

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from typing_extensions import Self

from mtbalance._accumulation import (
    add_micro_batch,
    check_copied_with_model,
    discard_at_loading,
    seen_of,
)
from mtbalance._after_step import AfterSteps
from mtbalance._begin import checked, look
from mtbalance._checks import (
    check_choice,
    check_count,
    check_kind,
    check_losses_by_task,
    check_process_group,
    check_row_dtype,
    check_task_names,
    count_fallback,
    fallbacks_of,
)
from mtbalance._company import Losses, TaskPasses, Validation, company_of
from mtbalance._explanation import Explanation
from mtbalance._finite import NonFinite
from mtbalance._kept import KeptWeights, check_every
from mtbalance._passes import BatchedPasses, task_gradients
from mtbalance._places import AtParameters
from mtbalance._ranks import Ranks
from mtbalance._reach import ReachLog
from mtbalance._record import EpochCounts, EpochSummary, Record
from mtbalance._remembered import check_states
from mtbalance._row_state import name_rows
from mtbalance._shared import Shared, SharedParts
from mtbalance._state import Saved, saved_in, state_of
from mtbalance._step import Setting, Steps
from mtbalance._task_gradients import TaskGradients
from mtbalance._watch import EpochWatch, ScaledLossWatch, look_at_groups
from mtbalance.gradient._base import GradientStrategy
from mtbalance.weighting._base import Weighting


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
        shared: What is balanced: modules (what they hold when a step is made) or parameters, one or
            several, or a mapping from group name (not ``dict(named_parameters())``) to these, each
            balanced on its own and in ``record.groups``. None: whatever two or more losses reach.
        process_group: The processes that train together, each on its part of the batch; None for
            all of ``torch.distributed``. Losses and per-task gradients are averaged over them
            before they are balanced, inside ``DistributedDataParallel`` and without it; see "Many
            devices" in the documentation.
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
            made in float64 from the kept numbers; micro-batches add up in float32 or more.
        chunk: How many tasks share one vectorised backward pass (``is_grads_batched``); None for
            one pass per task. It saves time where launching kernels is what takes it, on a GPU with
            small batches; on a CPU, and where an operation has no vectorised form, it costs time.
            What cannot be vectorised runs one by one, with one warning, counted in the record.

    Attributes:
        history: The last records; keeps none by default. Assign a ``deque(maxlen=n)`` to keep n.

    Raises:
        ValueError: If names repeat, ``shared`` holds no parameters, one parameter in two groups or
            a group with '/' in its name, or an option does not go with the strategies.
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
        nonfinite: Literal["raise", "drop", "skip", "propagate"] = "raise",
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
        self.nonfinite = nonfinite
        self.process_group = process_group
        self.history: deque[Record] = deque(maxlen=0)
        self.every = check_count("every", every)
        self.dtype = dtype
        self.chunk = None if chunk is None else check_count("chunk", chunk)
        self.fallbacks = 0
        """How often batched backward passes (``chunk``) ran one by one instead."""
        look_at_groups(shared)
        parts = SharedParts(shared)
        self.gradient = gradient.bind(self.tasks, max(1, len(parts)))
        self._reach = ReachLog(self.tasks, parts, self.weighting, gradient)
        self._ranks = Ranks(process_group, self.tasks, parts)
        self._batched = BatchedPasses(chunk, looks=nonfinite != "propagate") if chunk else None
        self._kept = KeptWeights(self.tasks, max(1, len(parts)))
        self._steps = Steps(self.tasks, self._reach, self._kept)
        self._pending = TaskGradients()
        self._after = AfterSteps(self.tasks)
        self._epoch = EpochCounts(self.tasks)
        self._watch = EpochWatch(self.weighting)
        self._scaled = ScaledLossWatch()
        self._counted = 0
        check_every(self.every, self.weighting, gradient, sharded=self._ranks.sharded)
        name_rows(self, self._reach, len(self.tasks))

    # --- one step ---------------------------------------------------------------------------------

    def backward(
        self,
        losses: Losses,
        *,
        validation: Validation | None = None,
        batches: Sequence[Validation] = (),
        scaler: GradScaler | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> Record:
        """Balance the losses and accumulate into ``.grad``, where ``loss.backward()`` would.

        Args:
            losses: Scalar loss with a graph per task; tasks left out are absent. None of them: a
                step that writes nothing. Of several processes, those of its part of the batch.
            validation: For weightings that look ahead (``needs_validation``): a function that
                returns the losses of a validation batch at the parameters as they are then.
            batches: For strategies with ``further_batches`` (others call none): functions that
                return losses of further training batches, of every task in ``losses`` at least.
            scaler: The gradient scaler of mixed-precision training with float16. ``.grad`` is then
                scaled, as after ``scaler.scale(loss).backward()``.
            features: The output of the shared part of the network, through which all losses reach
                it (one tensor or several). Tasks are then balanced by their gradients of the
                *features*, and one backward pass goes through the shared part, whatever the number
                of tasks. This is an approximation: gradients that conflict at the features need not
                do so at the parameters, and vice versa. ``dtype`` and ``chunk`` do not apply.
            retain_graph: Keep the graphs of the losses, for another Balancer or backward pass.

        Returns:
            What the step did.

        Raises:
            ValueError: If a loss is not a scalar with a graph, a name is unknown, a loss reaches no
                shared parameter, or ``validation`` or ``batches`` are missing.
            FloatingPointError: If a loss or gradient is not finite and ``nonfinite="raise"``;
                nothing has been written then.
            RuntimeError: If another process has stopped with an error.
        """
        self._after.begin(self.weighting, losses)
        setting = checked(self._setting(scaler, validation), self._pending, batches, features)
        setting.place.retains = retain_graph
        if self._pending:
            self.accumulate(losses, scaler=scaler, retain_graph=retain_graph)
            return self.apply(validation=validation, batches=batches, scaler=scaler)
        return self._finish(self._steps.take(look(losses, self.tasks, setting), setting))

    def accumulate(
        self, losses: Losses, *, scaler: GradScaler | None = None, retain_graph: bool = False
    ) -> None:
        """Add the gradients of a micro-batch to the per-task gradients, and free its graph.

        Gradients add up, as with repeated ``loss.backward()``: divide mean losses by the number of
        micro-batches to get the gradients of the mean over the whole batch. Tasks may come one at a
        time, each from a dataloader of its own.

        Args:
            losses: As in :meth:`backward`.
            scaler: As in :meth:`backward`; the same for all calls of a step.
            retain_graph: As in :meth:`backward`.

        Raises:
            ValueError, RuntimeError: As :meth:`backward` does. All is added or nothing; what was
                accumulated before stays until :meth:`apply` or :meth:`discard`. Of several
                processes, whose step is over then, each discards it.
            FloatingPointError: If a loss is not finite and ``nonfinite="raise"``. The step is over:
                what was accumulated before is discarded. Several processes raise in :meth:`apply`.
        """
        add_micro_batch(self._pending, losses, self.tasks, self._setting(scaler), retain_graph)

    def discard(self) -> None:
        """Drop what has been accumulated since the last :meth:`apply`, and nothing else.

        As ``optimizer.zero_grad()`` does for gradients: call both where a step is given up.
        """
        self._pending.clear()

    @overload
    def apply(self, fn: Callable[[nn.Module], None]) -> Self: ...

    @overload
    def apply(
        self,
        *,
        validation: Validation | None = None,
        batches: Sequence[Validation] = (),
        scaler: GradScaler | None = None,
    ) -> Record: ...

    def apply(
        self,
        fn: Callable[[nn.Module], None] | None = None,
        *,
        validation: Validation | None = None,
        batches: Sequence[Validation] = (),
        scaler: GradScaler | None = None,
    ) -> "Record | Self":
        """Balance what has been accumulated, and accumulate the result into ``.grad``.

        Args:
            fn: With a function, this is ``torch.nn.Module.apply`` and balances nothing, so that
                initialising a model that holds a Balancer still works.
            validation: As in :meth:`backward`.
            batches: As in :meth:`backward`.
            scaler: As in :meth:`backward`.

        Returns:
            What the step did.

        Raises:
            RuntimeError: If nothing has been accumulated.
            FloatingPointError: As in :meth:`backward`; what was accumulated is discarded then.
        """
        if fn is not None:
            return super().apply(fn)
        self._after.begin(self.weighting)
        setting = checked(self._setting(scaler, validation), self._pending, batches)
        check_copied_with_model(self._pending)
        pending, self._pending = self._pending, TaskGradients()
        seen = seen_of(pending, setting.company)
        return self._finish(self._steps.take_accumulated(pending, seen, setting))

    def after_step(self, losses: Losses | Validation) -> None:
        """Show a weighting that looks back at steps (``needs_after_step``) what the last one did.

        Call it after ``optimizer.step()``, once per step. With other weightings, and after a step
        that wrote nothing, it does nothing and calls nobody.

        Args:
            losses: The losses of the same batch at the new parameters, or a function that returns
                them. It is called without graphs, and buffers of modules in training mode (batch
                norm) come back. Tasks that had no part in the step do not count.

        Raises:
            RuntimeError: If there is no step to look back at, or another process has an error.
            ValueError, TypeError: If a loss is missing, not a scalar, or the one that ``backward``
                was given. The call may be repeated.
        """
        self._after.look_back(losses, self._setting(None), self._reach.parameters)

    def _setting(self, scaler: GradScaler | None, validation: Validation | None = None) -> Setting:
        """Return who takes the step that begins now: processes may have joined."""
        passes: TaskPasses = task_gradients
        if self._batched is not None:
            tell = functools.partial(count_fallback, self)
            passes = functools.partial(self._batched, on_fallback=tell)
        return Setting(
            company_of(self._ranks, self._reach, self),
            AtParameters(self._reach, passes, self.dtype),
            self.weighting,
            self.gradient,
            NonFinite(self.nonfinite, self.tasks, self._reach.group_names),
            self.every,
            validation,
            scaler,
            self._scaled,
        )

    # --- around the steps -------------------------------------------------------------------------

    def end_epoch(self) -> EpochSummary:
        """Close an epoch: strategies that look at epochs do so, and counts start again.

        Warns of tasks that were active in no step of the epoch, and, once, of gradients that were
        accumulated but not applied.

        Returns:
            How often each task was active or dropped since the last call.
        """
        summary = self._epoch.summary()
        self._watch.end(summary, left_over=bool(self._pending))
        self.weighting.close_epoch()
        self._epoch = EpochCounts(self.tasks)
        return summary

    def reset(self) -> None:
        """Forget everything learned, remembered and accumulated."""
        self.weighting.reset()
        self.gradient.reset()
        self.discard()
        self._after.due = None
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_states(self, state_dict, prefix)  # all of them before any is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)
        discard_at_loading(self._pending)

    def get_extra_state(self) -> Tensor:
        """Return names of tasks, counts of the epoch, kept weights, and an inferred split."""
        counts, split = self._epoch.as_tensor().double(), self._reach.split()
        saved = Saved(counts, self._kept.as_tensor(), split, self._after.due or ())
        return state_of(self.tasks, saved, self.gradient)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue with a saved state, which must belong to the same tasks in the same order."""
        saved = saved_in(state, self.tasks, self.gradient)
        self._kept.load(saved.kept)
        self._epoch = EpochCounts.from_tensor(self.tasks, saved.counts.long())
        self._reach.load(saved.split)
        self._after.due = saved.due or None

    def extra_repr(self) -> str:
        options = {"nonfinite": "raise", "every": 1, "dtype": None, "chunk": None}
        given = {k: v for k, v in vars(self).items() if k in options and v != options[k]}
        return f"tasks={self.tasks}" + "".join(f", {k}={v!r}" for k, v in given.items())

    def _finish(self, record: Record) -> Record:
        fallbacks = self.fallbacks + fallbacks_of(self.weighting) + fallbacks_of(self.gradient)
        if fallbacks != self._counted:
            record = replace(record, fallbacks=fallbacks - self._counted)
            self._counted = fallbacks
        self._after.end(record)
        self._epoch.add(record)
        self._watch.step(record, self._epoch.steps)
        self.history.append(record)
        return record
