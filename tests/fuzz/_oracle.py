"""What every call of a Balancer must do, predicted from dense float64 rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.fuzz._cases import Call, Case
from tests.fuzz._network import DTYPES, Network
from tests.fuzz._strategies import KEPT, Answer, Array, Strategy, Weighting

LARGEST_KEPT = 10.0
"""Times the number of rows: kept weights above it are not used again."""


def numbers(tensor: Tensor) -> Array:
    """Return a tensor's real numbers, shape (n,), float64."""
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.reshape(-1).double().numpy()


def rounding(dtype: torch.dtype) -> float:
    """Return the spacing of the numbers of a dtype at 1."""
    return torch.finfo(dtype).eps


@dataclass
class Rows:
    """The raw gradients of a step, times the loss scale."""

    losses: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, dict[str, Array]] = field(default_factory=dict)
    """By task, then by the name of the parameter; in the precision that rows are kept in."""
    exact: dict[str, dict[str, Array]] = field(default_factory=dict)
    """The same, as backward passes give them."""
    sizes: dict[str, dict[str, Array]] = field(default_factory=dict)
    """The sizes of what was added up to the gradients."""
    nonfinite: set[str] = field(default_factory=set)
    batches: int = 0
    dense: dict[str, set[str]] = field(default_factory=dict)
    """By task, the parameters whose gradient is not sparse."""
    spoilt: bool = False
    """Whether some gradient is infinite or NaN by what it is of, and not for its size."""
    reach: dict[str, set[str]] = field(default_factory=dict)
    """What each loss reaches, beyond features too."""

    def reached(self, tasks: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(name for t in tasks for name in self.gradients[t]))


@dataclass
class Written:
    """What a step adds to ``.grad``: the right answers for some parameters together."""

    names: list[str]
    answer: Answer
    scale: Array
    """The sizes of what was added up, shape (p,)."""
    precision: Array
    """The rounding of each entry, relative to that."""
    before: Array = field(default_factory=lambda: np.zeros(0))
    """What was in ``.grad``."""
    largest: Array = field(default_factory=lambda: np.zeros(0))
    """What it can hold."""
    got: Array = field(default_factory=lambda: np.zeros(0))
    tolerance: Array = field(default_factory=lambda: np.zeros(0))


@dataclass
class Expected:
    """What a call must do."""

    error: type[Exception] | tuple[type[Exception], ...] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    raw: Array | None = None
    """The raw rows of all that is balanced, times the loss scale; None where there are none."""
    tremor: float = 0.0
    """How far, relative to their entries, the library's rows may be from these."""
    at_features: bool = False
    dense: set[str] = field(default_factory=set)
    """The parameters whose direction is not sparse."""
    falls_back: bool = False
    written: list[Written] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """The numbers of the groups that are balanced, first in ``written``."""
    slopes: dict[str, float] = field(default_factory=dict)
    broken: list[str] | None = None
    """Parameters whose ``.grad`` must not be finite; nothing is promised of others then."""
    keeps: tuple[str, ...] | None = None
    """The tasks whose Gramian weights are kept."""


class Oracle:
    """A Balancer by its documents.

    Args:
        case: What it is made with.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.tasks = case.tasks
        self.weighting = Weighting(*case.weighting, case.tasks)
        self.gradient = Strategy(*case.gradient)
        self.policy = case.options.get("nonfinite", "raise")
        self.every = case.options.get("every", 1)
        self.rounds_to = DTYPES.get(case.options.get("dtype", ""))
        self.reached_by: dict[str, set[str]] = {}
        self.pending: Rows | None = None
        self.forget()
        self.new_epoch()

    def forget(self) -> None:
        """Forget kept weights."""
        self.age = math.inf
        self.kept: dict[int, Array] = {}
        self.kept_tasks: tuple[str, ...] = ()

    def new_epoch(self) -> None:
        self.steps = self.skipped = 0
        self.active, self.dropped = dict.fromkeys(self.tasks, 0), dict.fromkeys(self.tasks, 0)

    def reset(self) -> None:
        self.weighting.reset()
        self.gradient.reset()
        self.pending = None
        self.forget()
        self.new_epoch()

    # --- what the losses are ----------------------------------------------------------------------

    def rows(self, network: Network, call: Call, scale: float, at: Sequence[int] = ()) -> Rows:
        """Return the rows of the losses of a call, one backward pass each.

        Args:
            network: The network.
            call: The call.
            scale: The loss scale.
            at: The features, by their number among the trunks' outputs; none for parameters.
        """
        losses, outputs = network(call.tasks, call.batch, call.faults)
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if at:
            named = {f"feature {n}": outputs[n] for n in at} | named
        rows = Rows(batches=1, spoilt=bool(call.faults))
        for task, loss in losses.items():
            slopes = torch.autograd.grad(
                loss * scale, list(named.values()), retain_graph=True, allow_unused=True
            )
            rows.losses[task] = float(loss.detach())
            rows.dense[task] = {
                n for n, s in zip(named, slopes, strict=True) if s is not None and not s.is_sparse
            }
            found = {n: s for n, s in zip(named, slopes, strict=True) if s is not None}
            rows.exact[task] = {name: numbers(slope) for name, slope in found.items()}
            keep = numbers if at else self.kept_as
            rows.gradients[task] = {name: keep(slope) for name, slope in found.items()}
            rows.sizes[task] = {name: np.abs(value) for name, value in rows.exact[task].items()}
            if not math.isfinite(rows.losses[task]) and self.policy != "propagate":
                rows.nonfinite.add(task)
        rows.reach = {task: set(found) for task, found in rows.gradients.items()}
        if at:
            below = below_features(network, outputs, at)
            for gradients in rows.gradients.values():
                for name in below & set(gradients):
                    del gradients[name]
        return rows

    def kept_as(self, slope: Tensor) -> Array:
        """Return a gradient in the precision that it is kept in."""
        if self.rounds_to is not None and not slope.is_complex():
            slope = slope.to(self.rounds_to)
        return numbers(slope)

    @property
    def one_pass(self) -> bool:
        """Whether one pass of the weighted sum serves every step."""
        plain = self.case.gradient[0] == "Sum" and self.case.weighting[0] != "AutoLambda"
        return plain and self.policy != "drop"

    @property
    def sparse(self) -> bool:
        return any(trunk.kind == "sparse" for trunk in self.case.plan.trunks)

    def note(self, rows: Rows) -> None:
        for task, names in rows.reach.items():
            for name in names:
                self.reached_by.setdefault(name, set()).add(task)

    def can_restart(self) -> bool:
        """Return whether a saved state says all of what is shared.

        Of an inferred split it holds what each task has reached, so nothing of those not yet seen.
        """
        seen = set().union(*self.reached_by.values())
        return self.case.shared[0] != "inferred" or seen == set(self.tasks)

    def leaves_out(self) -> bool:
        """Return whether several tasks may reach what is not among the shared parameters given."""
        kind, chosen = self.case.shared
        named = {f"trunks.{n}." for trunks in chosen for n in trunks}
        return kind != "inferred" and any(
            len(tasks) > 1
            and not (any(name.startswith(prefix) for prefix in named) and self.is_given(name))
            for name, tasks in self.reached_by.items()
        )

    def is_given(self, name: str) -> bool:
        """Return whether a trunk's parameter is shared with it: not what has come later."""
        return self.case.shared[0] != "parameters" or ".more." not in name

    def grow(self, trunk: int) -> None:
        """Let a trunk have other parameters."""
        for name in [n for n in self.reached_by if n.startswith(f"trunks.{trunk}.more.")]:
            del self.reached_by[name]

    def groups(self, names: Sequence[str], network: Network) -> dict[int, list[str]]:
        """Return which of the parameters are balanced, by the number of their group."""
        if any(name.startswith("feature") for name in names):
            return {0: sorted(name for name in names if name.startswith("feature"))}
        kind, chosen = self.case.shared
        if kind == "inferred":
            found = {0: [name for name in names if len(self.reached_by[name]) > 1]}
        else:
            by_id = {id(p): name for name, p in network.named_parameters()}
            found = {}
            for number, trunks in enumerate(chosen):
                own = [by_id[id(p)] for n in trunks for p in network.trunks[n].parameters()]
                own = [name for name in own if self.is_given(name)]
                found[number] = [name for name in dict.fromkeys(own) if name in names]
        return {number: group for number, group in found.items() if group}

    # --- calls ------------------------------------------------------------------------------------

    def accumulate(self, rows: Rows) -> Expected:
        """Add a micro-batch."""
        self.note(rows)
        if rows.nonfinite and self.policy == "raise":
            self.pending = None
            return Expected(FloatingPointError)
        pending = self.pending or Rows()
        pending.batches += 1
        pending.nonfinite |= rows.nonfinite
        for task, loss in rows.losses.items():
            earlier = pending.gradients.setdefault(task, {})
            pending.dense.setdefault(task, set()).update(rows.dense[task])
            pending.losses[task] = pending.losses.get(task, 0.0) + loss
            for name, gradient in rows.gradients[task].items():
                earlier[name] = earlier.get(name, 0.0) + gradient
                size = pending.sizes.setdefault(task, {})
                size[name] = size.get(name, 0.0) + rows.sizes[task][name]
        self.pending = pending
        return Expected()

    def step(
        self,
        rows: Rows,
        network: Network,
        log_var: Mapping[str, float],
        scale: float | None,
        *,
        accumulated: bool = False,
        look_ahead: Any = None,
        record: Any = None,
        solves: bool = False,
    ) -> Expected:
        """Take a step with these rows.

        Args:
            rows: The rows.
            network: The network.
            log_var: The learned log-variances as they are.
            scale: The loss scale, if any.
            accumulated: Whether the backward passes have been made.
            look_ahead: Returns the derivatives by the lambdas, for Auto-Lambda.
            record: What the library says; its weights, once compared, are used for the rows.
            solves: Whether kept weights have been tried and do not serve.
        """
        self.note(rows)
        order = [task for task in self.tasks if task in rows.losses]
        bad = tuple(task for task in order if task in rows.nonfinite)
        good = [task for task in order if task not in bad]
        absent = tuple(task for task in self.tasks if task not in order)
        base = {"absent": absent, "nonfinite": bad, "reused": False, "overflow": False}
        ended = self._ended(good, bad, absent)
        if ended is not None:
            return ended
        one_pass = self.one_pass and not accumulated
        reuses = not solves and self._reuses(rows, bad, order, network, accumulated=accumulated)
        as_kept = rows.gradients
        if one_pass or reuses:
            rows.gradients = rows.exact
        broken = [t for t in good if not _finite(rows.gradients[t].values())]
        if not (one_pass or reuses) and self._shares_nothing(rows, good, network):
            return Expected(ValueError)
        # Weighted ones may be small enough for their dtype, or cancel.
        unsure = broken and (one_pass or reuses) and not rows.spoilt and _is_fine(record)
        if self.policy != "propagate" and broken and not unsure:
            if reuses:
                base["reused"] = True
                # Counts as a day of the kept weights, unless an error ends it.
                self.age += self.policy != "raise" or scale is not None
            if scale is not None:
                # In a pass of the sum nobody knows whose it is.
                named = () if one_pass or reuses else tuple(broken)
                return self._overflow(_not_finite(rows, broken), good, bad, named, base)
            if one_pass or (reuses and self.policy != "drop"):
                if self.policy == "raise":
                    return Expected(FloatingPointError)
                return self._count(
                    Expected(fields={**base, "tasks": tuple(good), "skipped": True, "dropped": ()})
                )
            base["reused"] = reuses = False
            rows.gradients = as_kept
            bad = tuple(task for task in order if task in (*bad, *broken))
            good = [task for task in good if task not in broken]
            base["nonfinite"] = bad
            ended = self._ended(good, bad, absent)
            if ended is not None:
                return ended
        self.weighting.remember()
        falls_back = False
        if look_ahead is not None:
            slopes = look_ahead(rows, good)
            falls_back = not all(map(math.isfinite, slopes.values()))
            if not falls_back:
                self.weighting.adam(slopes)
        losses = {task: rows.losses[task] for task in good}
        weights, own = self.weighting.weights(losses, log_var)
        weights = self._compared(weights, record)
        expected = Expected(
            fields={**base, "tasks": tuple(good), "skipped": False, "dropped": bad},
            weights=weights,
            losses=losses,
            slopes={task: slope * (scale or 1.0) for task, slope in own.items()},
            falls_back=falls_back,
        )
        self._expect(expected, rows, good, network, one_pass=one_pass, reuses=reuses)
        if not unsure and self._cannot_be_held(
            expected, rows, network, record, exact=not (one_pass or reuses), reuses=reuses
        ):
            self.weighting.undo()
            self.age += reuses and (self.policy != "raise" or scale is not None)
            if reuses and self.policy == "drop" and scale is None:
                rows.gradients = as_kept
                return self.step(rows, network, log_var, scale, record=record, solves=True)
            if scale is not None:
                return self._overflow([], good, bad, (), {**base, "reused": reuses})
            if self.policy == "raise":
                return Expected(FloatingPointError)
            fields = {**base, "tasks": tuple(good), "skipped": True, "dropped": ()}
            return self._count(Expected(fields={**fields, "reused": reuses}))
        if reuses:
            expected.fields["reused"] = True
            self.age += 1
        elif self.case.gradient[0] in KEPT and not _at_features(rows):
            expected.keeps = tuple(good)
        if broken and (unsure or self.policy == "propagate"):
            expected.broken = [] if unsure else _not_finite(rows, broken)
            expected.keeps = None
            balanced = expected.written[: len(expected.groups)]
            if not (one_pass or reuses or _at_features(rows)):
                self.forget()
                if not {name for part in balanced for name in part.names} & set(expected.broken):
                    pairs = zip(expected.groups, balanced, strict=True)
                    solved = {n: part.answer.coefficients for n, part in pairs}
                    self.keep(tuple(good), {n: c[0] for n, c in solved.items() if c is not None})
                if self.gradient.name == "PCGrad" and len(good) == 1:  # whose weight is always 1
                    self.keep(tuple(good), {number: np.ones(1) for number in expected.groups})
        return self._count(expected)

    def _ended(
        self, good: Sequence[str], bad: tuple[str, ...], absent: tuple[str, ...]
    ) -> Expected | None:
        """Return what is expected of a step that ends for what is not finite."""
        if bad and self.policy == "raise":
            return Expected(FloatingPointError)
        base = {"absent": absent, "nonfinite": bad, "reused": False, "overflow": False}
        if bad and self.policy == "skip":
            fields = {**base, "tasks": tuple(good), "skipped": True, "dropped": ()}
            return self._count(Expected(fields=fields))
        if good:
            return None
        return self._count(Expected(fields={**base, "tasks": (), "skipped": False, "dropped": bad}))

    def _overflow(
        self,
        broken: list[str],
        good: Sequence[str],
        earlier: Sequence[str],
        named: Sequence[str],
        base: Mapping[str, Any],
    ) -> Expected:
        """Return what is expected where a scaler is to see what is not finite.

        Args:
            broken: The parameters whose gradients must not be finite.
            good: The tasks whose gradients are passed on.
            earlier: The tasks that were left out before.
            named: The tasks whose gradients are known not to be finite.
            base: Fields of the record.
        """
        nonfinite = tuple(task for task in self.tasks if task in {*earlier, *named})
        fields = {**base, "overflow": True, "nonfinite": nonfinite}
        fields |= {"tasks": tuple(good), "skipped": False, "dropped": tuple(earlier)}
        return self._count(Expected(fields=fields, broken=broken))

    def _compared(self, weights: dict[str, float], record: Any) -> dict[str, float]:
        """Return the library's weights, which must be these up to rounding."""
        if record is None or record.skipped or record.overflow:
            return weights
        got = {task: float(weight) for task, weight in record.weights.items()}
        assert got.keys() == weights.keys(), f"weights of {list(got)}, not of {list(weights)}"
        for task, weight in weights.items():
            near = abs(got[task] - weight) <= 2e-5 * max(1.0, abs(weight))
            assert near or not math.isfinite(weight), f"weights {got}, and should be {weights}"
        if self.weighting.name == "AutoLambda":
            self.weighting.lambdas |= got  # whose rounding would add up
        return got

    def _cannot_be_held(
        self,
        expected: Expected,
        rows: Rows,
        network: Network,
        record: Any,
        *,
        exact: bool,
        reuses: bool,
    ) -> bool:
        """Return whether a direction of finite rows is more than its parameters can hold.

        Where rounding, a draw or what is added up on the way decides, the library does.
        """
        if self.policy == "propagate" or _at_features(rows):
            return False
        parameters = dict(network.named_parameters())
        must = might = False
        for part in expected.written:
            sizes = [len(numbers(parameters[name])) for name in part.names]
            dtypes = [parameters[name].dtype for name in part.names]
            largest = np.repeat([torch.finfo(dtype).max / 2 for dtype in dtypes], sizes)
            far = np.abs(part.answer.directions) / 2
            must |= bool((far > 1.01 * largest).any(1).all()) and not part.answer.entrywise
            must |= bool((far > 1.01 * largest).all(0).any())
            might |= bool((far > 0.98 * largest).any())
            might |= not exact and bool((part.scale > 0.1 * largest).any())
        said = record is None or record.overflow or record.skipped or record.reused != reuses
        return must or (might and said)

    def _shares_nothing(self, rows: Rows, good: Sequence[str], network: Network) -> bool:
        """Return whether what is shared was inferred, and some task has no part in it."""
        if self.case.shared[0] != "inferred" or _at_features(rows):
            return False
        if len(self.tasks) == 1 or set(good) != set(self.tasks):
            return False
        shared = self.groups(rows.reached(good), network).get(0, [])
        return any(not set(shared) & set(rows.gradients[task]) for task in good)

    def _reuses(
        self,
        rows: Rows,
        bad: Sequence[str],
        order: Sequence[str],
        network: Network,
        *,
        accumulated: bool,
    ) -> bool:
        if self.every == 1 or accumulated or bad or _at_features(rows):
            return False
        if self.age >= self.every or tuple(order) != self.kept_tasks:
            return False
        if not set(self.groups(rows.reached(order), network)) <= set(self.kept):
            return False
        largest = max(float(np.abs(kept).max()) for kept in self.kept.values())
        return largest <= LARGEST_KEPT * len(order)

    def keep(self, tasks: tuple[str, ...], solutions: dict[int, Array]) -> None:
        """Keep the Gramian weights of a step."""
        self.kept, self.kept_tasks = solutions, tasks
        self.age = 1 if solutions else math.inf

    def _count(self, expected: Expected) -> Expected:
        fields = expected.fields
        self.steps += 1
        self.skipped += fields["skipped"]
        if not fields["skipped"]:
            for task in fields["tasks"]:
                self.active[task] += 1
        for task in fields["dropped"]:
            self.dropped[task] += 1
        return expected

    # --- numbers ----------------------------------------------------------------------------------

    def _expect(
        self,
        expected: Expected,
        rows: Rows,
        good: Sequence[str],
        network: Network,
        *,
        one_pass: bool,
        reuses: bool,
    ) -> None:
        """Add what is written, group by group and then the sums."""
        names = rows.reached(good)
        groups = self.groups(names, network)
        exact = not (one_pass or reuses)
        if exact:
            shared = [name for group in groups.values() for name in group]
            expected.raw = self._matrix(rows, good, shared)
        expected.tremor = self._tremor(rows)
        expected.dense = set().union(*(rows.dense[task] for task in good))
        if self.gradient.name == "GradDrop":
            expected.dense |= {name for group in groups.values() for name in group}
        weights = np.array([expected.weights[task] for task in good])
        ordered = self.case.shared[0] != "inferred" or any(n.startswith("feature") for n in names)
        for number, group in groups.items():
            weighted = self._matrix(rows, good, group) * weights[:, None]
            if not np.isfinite(weighted).all():
                answer = Answer(np.full((1, weighted.shape[1]), np.nan), None, weighted[0])
                if self.gradient.name == "GradDrop" and exact:
                    torch.randint(2**62, (), generator=self.gradient.generator)
            elif exact:
                answer = self.gradient.answer(weighted, ordered=ordered, tremor=expected.tremor)
            else:
                kept = self.kept[number] if reuses else np.ones(len(good))
                answer = _combined(weighted, kept)
            expected.written.append(
                self._written(group, answer, rows, weights, good, network, exact=exact)
            )
            expected.groups.append(number)
        rest = [name for name in names if not any(name in group for group in groups.values())]
        if rest:
            weighted = self._matrix(rows, good, rest) * weights[:, None]
            answer = _combined(weighted, np.ones(len(good)))
            expected.written.append(
                self._written(rest, answer, rows, weights, good, network, exact=exact)
            )

    def _written(
        self,
        names: list[str],
        answer: Answer,
        rows: Rows,
        weights: Array,
        good: Sequence[str],
        network: Network,
        *,
        exact: bool,
    ) -> Written:
        """Return what is added to some parameters, and how large that was on the way."""
        factors = np.abs(weights)
        if answer.coefficients is not None:
            factors = factors * np.maximum(1, np.abs(answer.coefficients).max(0))
        blurred = not exact or "chunk" in self.case.options or self.sparse
        largest = max(
            factor * rows.sizes[task][name].max(initial=0)
            for task, factor in zip(good, factors, strict=True)
            for name in names
            if name in rows.sizes[task]
        )
        size = np.zeros(0)
        for name in names:
            own = sum(
                factor * rows.sizes[task][name]
                for task, factor in zip(good, factors, strict=True)
                if name in rows.sizes[task]
            )
            # Sums are taken on the way down, where others of the parameter's entries have a part.
            if blurred:
                own = np.full_like(own, max(own.max(initial=0), 0.02 * largest))
            size = np.append(size, own)
        precision = self._precision(names, rows, network, blurred=blurred)
        # Where numbers are next to zero, their spacing does not shrink with them.
        spacing = torch.finfo(DTYPES[self.case.plan.dtype]).smallest_normal * 2.0**-8
        # Terms that cancel in a loss leave the rounding of what they are.
        loss_scale = self.case.scale or 1.0
        factors = [
            f * abs(self.case.plan.heads[t].factor) for t, f in zip(good, factors, strict=True)
        ]
        own = [f for t, f in zip(good, factors, strict=True) if set(names) & set(rows.sizes[t])]
        spacing += rounding(DTYPES[self.case.plan.dtype]) * loss_scale * max(own, default=0.0)
        answer = answer._replace(slack=answer.slack + spacing)
        return Written(names, answer, size, precision)

    def _matrix(self, rows: Rows, tasks: Sequence[str], names: Sequence[str]) -> Array:
        sizes = {n: len(g) for gradients in rows.gradients.values() for n, g in gradients.items()}
        lines = []
        for task in tasks:
            own = rows.gradients[task]
            parts = [own.get(name, np.zeros(sizes[name])) for name in names]
            lines.append(np.concatenate([np.zeros(0), *parts]))
        return np.stack(lines)

    def _tremor(self, rows: Rows) -> float:
        """Return how far, relative to their entries, the library's rows may be from these."""
        plan = self.case.plan
        dtypes = [DTYPES[plan.dtype], *(DTYPES[trunk.dtype] for trunk in plan.trunks)]
        lowest = max(map(rounding, dtypes))
        if (
            "chunk" in self.case.options or self.sparse
        ):  # entries of sparse ones add up later or now
            return 4 * max(lowest, rounding(self.rounds_to or torch.float64))
        if rows.batches > 1:
            sums = rounding(self.rounds_to) if self.rounds_to is not None else lowest
            return 4 * min(max(sums, rounding(torch.float64)), rounding(torch.float32))
        return 1e-13

    def _precision(
        self, names: Sequence[str], rows: Rows, network: Network, *, blurred: bool
    ) -> Array:
        """Return the relative rounding of each entry of some parameters."""
        parameters: dict[str, Tensor] = dict(network.named_parameters())
        entries = []
        for name in names:
            size = next(len(g[name]) for g in rows.gradients.values() if name in g)
            dtype = DTYPES[self.case.plan.dtype]
            if name in parameters:
                dtype = parameters[name].dtype
                dtype = torch.float64 if dtype.is_complex else dtype
            own = 4 * rounding(dtype)
            if self.rounds_to is not None:
                own = max(own, 4 * rounding(torch.float32))
            if rows.batches > 1:
                own = max(own, 4 * rounding(torch.promote_types(dtype, torch.float32)))
            own = max(own, self._tremor(rows))
            if blurred:  # by whatever precision is met on the way down
                lowest = max(rounding(DTYPES[t.dtype]) for t in self.case.plan.trunks)
                own = 30 * max(own, lowest, rounding(DTYPES[self.case.plan.dtype]))
            entries.append(np.full(size, own))
        return np.concatenate([np.zeros(0), *entries])


def _combined(weighted: Array, coefficients: Array) -> Answer:
    direction = coefficients @ np.where(coefficients[:, None] == 0, 0, weighted)
    return Answer(direction[None], coefficients[None], np.zeros(weighted.shape[1]))


def _at_features(rows: Rows) -> bool:
    return any(name.startswith("feature") for found in rows.gradients.values() for name in found)


def _not_finite(rows: Rows, tasks: Sequence[str]) -> list[str]:
    """Return the parameters for which some of the tasks' gradients are not finite."""
    return sorted(
        name
        for name in rows.reached(tasks)
        if not name.startswith("feature")
        and not _finite(rows.gradients[t][name] for t in tasks if name in rows.gradients[t])
    )


def _is_fine(record: Any) -> bool:
    """Return whether the library says that it has written a step."""
    return record is not None and not (record.skipped or record.overflow)


def _finite(arrays: Any) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


def below_features(network: nn.Module, outputs: Sequence[Tensor], at: Sequence[int]) -> set[str]:
    """Return the names of the parameters that the features depend on."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = set()
    for number in at:
        slopes = torch.autograd.grad(
            outputs[number].sum(), list(named.values()), retain_graph=True, allow_unused=True
        )
        found |= {name for name, slope in zip(named, slopes, strict=True) if slope is not None}
    return found
