"""Runs a case, and compares the library with the oracle after every call."""

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # the first optimizer does, too late to be left out of searches (conftest.py)
from torch import Tensor

from mtbalance import _factors
from mtbalance._record import GroupFigures, Record
from tests.fuzz._cases import Call, Case
from tests.fuzz._network import DTYPES
from tests.fuzz._oracle import Expected, Oracle, Rows, Written, numbers, rounding
from tests.fuzz._strategies import Answer, Array
from tests.fuzz._world import RATE, World

ALLOWED = (
    r"no loss reaches \d+ of the parameters given as `shared`",
    r"There is a performance drop because we have not yet implemented the batching rule",
)
FELL_BACK = r"fell back: "
LEFT_OUT = r"several tasks reach parameters that were not given as `shared`"


class MismatchError(AssertionError):
    """The library does not do what the documents say."""


class Run:
    """One case, call by call."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.world = World(case)
        self.twin: World | None = None
        self.oracle = Oracle(case)
        self.frozen = False

    def run(self) -> None:
        number = 0
        try:
            for number, call in enumerate(self.case.calls):  # noqa: B007
                self.call(call)
        except Exception as error:
            what = "" if isinstance(error, MismatchError) else f"{type(error).__name__}: "
            raise MismatchError(f"{what}{error}\nin call {number} of\n{self.case}") from error

    def call(self, call: Call) -> None:
        if call.kind == "restart" and not self.oracle.can_restart():
            return
        if call.kind == "load" and not self.oracle.can_restart():
            call = Call("discard")
        if call.kind == "restart":
            self.world.balancer.discard()
            self.oracle.pending = None
        if call.kind in ("restart", "copy"):
            self.twin = self.world
            self.world = self.world.restarted() if call.kind == "restart" else self.world.copied()
            return
        grads = {name: p.grad for name, p in self.world.named().items()}
        before = {n: None if g is None else numbers(g).copy() for n, g in grads.items()}
        self.was_sparse = {n: g is None or g.is_sparse for n, g in grads.items()}
        self.world.fired.clear()
        if call.kind == "grow":
            self.oracle.grow(call.trunk)
        self.frozen = (call.kind == "freeze") or (self.frozen and call.kind != "thaw")
        expect = getattr(self, f"_expect_{call.kind}", None)
        plan = None if expect is None else expect(call)  # looks at the world as it is
        result, error, told = self._attempt(self.world, call)
        if plan is not None:
            self._compare(call, plan, before, result, error, told)
        elif error is not None:
            raise error
        if self.twin is not None:
            self._compare_twin(call, result, error)
        if not all(np.isfinite(numbers(p.grad)).all() for p in _with_grad(self.world)):
            for world in (self.world, self.twin):  # there is nothing to learn from more on top
                for parameter in world.named().values() if world is not None else ():
                    parameter.grad = None

    def _attempt(self, world: World, call: Call) -> tuple[Any, Exception | None, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result, error = world.do(call), None
            except Exception as found:  # noqa: BLE001
                result, error = None, found
        told = [str(w.message) for w in caught]
        return result, error, [m for m in told if not any(re.search(p, m) for p in ALLOWED)]

    # --- what is expected: a function of the record -----------------------------------------------

    def _expect_backward(self, call: Call) -> Any:
        if call.wrong:
            return lambda record: Expected((ValueError, TypeError))
        if self.frozen:
            return lambda record: Expected(ValueError)
        at = () if self.oracle.one_pass or self.oracle.pending else call.features
        if at and self._goes_past(call):
            return lambda record: Expected(ValueError)
        rows = self.oracle.rows(self.world.network, call, self.case.scale or 1.0, at)
        directed = self._down(call, at)
        if self.oracle.pending is not None:
            log_var, ahead = self._log_var(), self._ahead(call)

            def both(record: Record | None) -> Expected:
                expected = self.oracle.accumulate(rows)
                if expected.error is not None:
                    return expected
                return self._apply(record, log_var, ahead)

            return both
        log_var, ahead = self._log_var(), self._ahead(call)
        return lambda record: directed(
            self.oracle.step(
                rows, self.world.network, log_var, self.case.scale, look_ahead=ahead, record=record
            )
        )

    def _goes_past(self, call: Call) -> bool:
        """Return whether a loss reaches what the features depend on past them."""
        plan = self.case.plan
        table = plan.embedding()
        heads = [plan.heads[task] for task in call.tasks]
        read = any(table in head.trunks for head in heads)
        past = any(head.table for head in heads) and table is not None and read
        return past and not plan.trunks[table].frozen

    def _expect_accumulate(self, call: Call) -> Any:
        if call.wrong:
            return lambda record: Expected((ValueError, TypeError))
        rows = self.oracle.rows(self.world.network, call, self.case.scale or 1.0)
        return lambda record: self.oracle.accumulate(rows)

    def _expect_apply(self, call: Call) -> Any:
        log_var, ahead = self._log_var(), self._ahead(call)
        return lambda record: self._apply(record, log_var, ahead)

    def _apply(self, record: Record | None, log_var: dict[str, float], ahead: Any) -> Expected:
        pending, self.oracle.pending = self.oracle.pending, None
        if pending is None:
            return Expected(RuntimeError)
        return self.oracle.step(
            pending,
            self.world.network,
            log_var,
            self.case.scale,
            accumulated=True,
            look_ahead=ahead,
            record=record,
        )

    def _expect_discard(self, call: Call) -> Any:
        del call

        def discard(record: Any) -> Expected:
            del record
            self.oracle.pending = None
            return Expected()

        return discard

    _expect_load = _expect_discard

    def _expect_end_epoch(self, call: Call) -> Any:
        del call
        return lambda record: Expected()

    def _expect_reset(self, call: Call) -> Any:
        del call

        def reset(record: Any) -> Expected:
            self.oracle.reset()
            for task, value in self._log_var().items():
                _check(value == np.float32(self.case.weighting[1]["init"]), f"log_var of {task}")
            return Expected()

        return reset

    def _log_var(self) -> dict[str, float]:
        if self.case.weighting[0] != "Uncertainty":
            return {}
        values = self.world.balancer.weighting.log_var.tolist()
        return dict(zip(self.case.tasks, values, strict=True))

    def _ahead(self, call: Call) -> Any:
        """Return a function to the derivatives of the validation loss by the lambdas."""
        if self.case.weighting[0] != "AutoLambda":
            return None
        options = self.case.weighting[1]
        network, optimizer = copy.deepcopy((self.world.network, self.world.optimizer))
        scale = self.case.scale or 1.0

        def derivatives(rows: Rows, tasks: list[str]) -> dict[str, float]:
            named = dict(network.named_parameters())
            lambdas = self.oracle.weighting.lambdas
            for name, p in named.items():
                parts = [
                    lambdas[t] * rows.gradients[t][name] for t in tasks if name in rows.gradients[t]
                ]
                p.grad = _like(sum(parts) / scale, p) if parts else None
            optimizer.step()
            losses, _ = network(self.case.tasks, call.batch + 1)
            primary = self.case.tasks[:1] if options["primary"] else self.case.tasks
            total = sum(losses[task] for task in primary)
            held = {n: p for n, p in named.items() if p.requires_grad}
            slopes = torch.autograd.grad(total, list(held.values()), allow_unused=True)
            values = {n: numbers(s) for n, s in zip(held, slopes, strict=True) if s is not None}
            gain = 1 + options["momentum"] if options["nesterov"] else 1.0
            return {
                task: -RATE
                * gain
                / scale
                * sum(float(g @ values[n]) for n, g in rows.gradients[task].items() if n in values)
                for task in tasks
            }

        return derivatives

    def _down(self, call: Call, at: tuple[int, ...]) -> Any:
        """Return what leads directions at the features down to the parameters below them."""
        if not at:
            return lambda expected: expected
        network = self.world.network
        _, outputs = network(call.tasks, call.batch, call.faults)
        named = {n: p for n, p in network.named_parameters() if p.requires_grad}

        def down(expected: Expected) -> Expected:
            if not expected.groups:
                return expected
            first = expected.written[0]
            used = [n for n in at if f"feature {n}" in first.names]
            chosen = [outputs[n] for n in used]
            results = []
            for direction in [*first.answer.directions, first.scale + first.answer.slack]:
                pieces = np.split(direction, np.cumsum([f.numel() for f in chosen])[:-1])
                slopes = [_like(v, f) for v, f in zip(pieces, chosen, strict=True)]
                found = torch.autograd.grad(
                    chosen, list(named.values()), slopes, retain_graph=True, allow_unused=True
                )
                results.append(dict(zip(named, found, strict=True)))
            names = [n for n, g in results[0].items() if g is not None]
            lines = [np.concatenate([numbers(r[n]) for n in names]) for r in results]
            # Signs may cancel in what goes down: sizes are taken for each parameter as a whole.
            sizes = [len(numbers(results[0][n])) for n in names]
            top = [
                np.full(
                    s, max(np.abs(v).max(initial=0) for v in ([numbers(r[n]) for r in results]))
                )
                for s, n in zip(sizes, names, strict=True)
            ]
            scale = np.concatenate([np.zeros(0), *top]) + first.scale.max(initial=0)
            lowest = max(rounding(DTYPES[t.dtype]) for t in self.case.plan.trunks)
            precision = np.full(len(scale), 30 * max(lowest, first.precision.max(initial=0)))
            slack = np.full(len(scale), 30 * first.answer.slack.max(initial=0))
            answer = Answer(np.array(lines[:-1]), first.answer.coefficients, slack)
            expected.written[0] = Written(names, answer, scale, precision)
            expected.at_features = True
            return expected

        return down

    # --- comparing --------------------------------------------------------------------------------

    def _compare(
        self,
        call: Call,
        plan: Any,
        before: Mapping[str, Array | None],
        result: Any,
        error: Exception | None,
        told: list[str],
    ) -> None:
        record = result if isinstance(result, Record) else None
        discards = call.kind == "load" and self.oracle.pending is not None
        expected: Expected = plan(record)
        told = self._compare_told(told, discards=discards)
        self._compare_hooks(call, expected)
        if expected.error is not None:
            _check(
                isinstance(error, expected.error),
                f"{expected.error} was expected, but {error!r} came, {record}",
            )
            self._nothing_written(before)
            with_graph = all(self.case.plan.heads[task].own for task in call.tasks)
            if self.frozen and with_graph:
                _check("frozen" in str(error), f"the error does not say frozen: {error}")
        elif error is not None:
            raise error
        if call.kind == "end_epoch":
            self._compare_epoch(result, told)
            return
        told = [m for m in told if not (self.oracle.leaves_out() and re.search(LEFT_OUT, m))]
        fallbacks = [m for m in told if re.search(FELL_BACK, m)]
        _check(told == fallbacks, f"warnings {told}")
        if fallbacks:
            stubborn = any(t.kind == "stubborn" for t in self.case.plan.trunks)
            stubborn |= any(t.kind == "sparse" for t in self.case.plan.trunks)
            allowed = ("chunk" in self.case.options and stubborn) or expected.falls_back
            _check(allowed, f"fell back: {fallbacks}")
        if expected.error is not None or call.kind not in ("backward", "apply"):
            if expected.error is None:
                self._nothing_written(before)
            return
        assert record is not None
        for name, value in expected.fields.items():
            got = getattr(record, name)
            _check(got == value, f"record.{name} is {got}, and should be {value}")
        if expected.broken is not None:
            self._compare_broken(expected, before)
            return
        if expected.fields["skipped"] or not expected.fields["tasks"]:
            self._nothing_written(before)
            return
        self._compare_numbers(expected, record, before)

    def _compare_told(self, told: list[str], *, discards: bool) -> list[str]:
        """Check what is said of rows that are discarded, and return everything else."""
        other = [m for m in told if "is discarded, as a state is loaded" not in m]
        _check(len(told) - len(other) == discards, f"warnings {told}")
        return other

    def _compare_hooks(self, call: Call, expected: Expected) -> None:
        """Check which hooks on accumulated gradients were called, and when."""
        fired = self.world.fired
        _check(len(set(fired)) == len(fired), f"hooks were called more than once: {fired}")
        if expected.broken is None:
            want: set[str] = set()
            ended = expected.error is not None or call.kind not in ("backward", "apply")
            if not (ended or expected.fields["skipped"] or not expected.fields["tasks"]):
                want = {name for part in expected.written for name in part.names}
                want |= {name for name in self.world.named() if name.startswith("weighting")}
            _check(set(fired) == want, f"hooks of {fired} were called, and should be of {want}")
        if fired:
            now, seen = self.world.grads(), self.world.seen
            same = now.keys() == seen.keys() and all(
                np.array_equal(now[name], seen[name], equal_nan=True) for name in now
            )
            _check(same, "hooks were called before all gradients were final")

    def _nothing_written(self, before: Mapping[str, Array | None]) -> None:
        for name, parameter in self.world.named().items():
            now, old = parameter.grad, before[name]
            same = (now is None) == (old is None)
            if same and now is not None:
                same = np.array_equal(numbers(now), old, equal_nan=True)
            _check(same, f"{name}.grad was written: {old} became {now}")

    def _compare_epoch(self, summary: Any, told: list[str]) -> None:
        oracle = self.oracle
        got = (summary.steps, summary.skipped, summary.active, summary.dropped)
        want = (oracle.steps, oracle.skipped, oracle.active, oracle.dropped)
        _check(got == want, f"the epoch's counts are {got}, and should be {want}")
        told = [m for m in told if not (oracle.pending and "were accumulated, but not" in m)]
        idle = oracle.steps > 0 and not all(oracle.active.values())
        _check(len(told) == idle and all("no step of this epoch" in m for m in told), f"{told}")
        oracle.weighting.end_epoch()
        oracle.new_epoch()

    def _compare_broken(self, expected: Expected, before: Mapping[str, Array | None]) -> None:
        for name in expected.broken or ():
            grad = self.world.named()[name].grad
            _check(
                grad is not None and not np.isfinite(numbers(grad)).all(),
                f"{name}.grad should not be finite, but is {grad}",
            )
        if not expected.fields["overflow"]:
            return
        grads = [p.grad for p in self.world.named().values() if p.grad is not None]
        _check(not all(np.isfinite(numbers(g)).all() for g in grads), "a scaler sees no overflow")
        for name, p in self.world.named().items():
            if name.startswith("weighting"):
                want = np.zeros(p.numel()) if before[name] is None else before[name]
                same = p.grad is not None and np.array_equal(numbers(p.grad), want)
                _check(same, f"{name} should get the gradient 0, but got {p.grad}")

    def _compare_numbers(
        self, expected: Expected, record: Record, before: Mapping[str, Array | None]
    ) -> None:
        named = self.world.named()
        scale = self.case.scale or 1.0
        written: dict[str, Array] = {}
        kept: dict[int, Array] = {}
        for place, part in enumerate(expected.written):
            got = self._added(part, before)
            choice = _fitting(part, got, f"{part.names}")
            written |= dict.fromkeys(part.names, got)
            if place < len(expected.groups) and part.answer.coefficients is not None:
                kept[expected.groups[place]] = part.answer.coefficients[choice]
        if len(kept) == 1 and record.combination is not None:
            # Of dependent rows other coefficients give the same direction.
            weights = np.array([float(record.weights[task]) for task in record.tasks])
            kept = {number: record.combination.double().numpy() / weights for number in kept}
        for name, p in named.items():
            if name in written:
                if not expected.at_features:
                    sparse = self.was_sparse[name] and name not in expected.dense
                    _check(p.grad.is_sparse == sparse, f"{name}.grad is {p.grad}, {sparse = }")
                if before[name] is None and not p.grad.is_sparse:
                    _check(p.grad.stride() == p.stride(), f"{name}.grad has another layout")
                continue
            if name.startswith("weighting"):
                self._compare_slopes(expected, p, before[name])
                continue
            now, old = p.grad, before[name]
            same = (now is None and old is None) or np.array_equal(numbers(now), old)
            _check(same, f"{name} should get nothing, but got {now}")
        if expected.keeps is not None:
            self.oracle.keep(expected.keeps, kept)
        self._compare_record(expected, record, scale)

    def _compare_slopes(self, expected: Expected, p: Tensor, before: Array | None) -> None:
        want = np.array([expected.slopes[task] for task in self.case.tasks])
        old = np.zeros(len(want)) if before is None else before
        got = numbers(p.grad) - old
        size = np.abs(want) + np.abs(old) + (self.case.scale or 1.0)
        near = (np.abs(got - want) <= 2e-6 * size) | ~np.isfinite(want)
        _check(near.all(), f"slopes {got}, and should be {want}")

    def _added(self, part: Written, before: Mapping[str, Array | None]) -> Array:
        """Return what has been added to ``.grad``, and widen what rounding may do accordingly."""
        named = self.world.named()
        pieces = []
        start = 0
        part.before, part.largest = np.zeros_like(part.scale), np.full_like(part.scale, np.inf)
        for name in part.names:
            grad = named[name].grad
            _check(grad is not None, f"{name} should get a gradient, but got none")
            now = numbers(grad)
            old = before[name]
            stop = start + len(now)
            if grad.dtype == torch.float16:
                part.largest[start:stop] = torch.finfo(grad.dtype).max
            if old is not None:
                part.before[start:stop] = old
                part.scale[start:stop] += np.abs(old)
                own = DTYPES["float64"] if grad.is_complex() else grad.dtype
                part.precision[start:stop] = np.maximum(
                    part.precision[start:stop], 2 * rounding(own)
                )
            pieces.append(now - (0.0 if old is None else old))
            start = stop
        return np.concatenate([np.zeros(0), *pieces])

    def _compare_record(self, expected: Expected, record: Record, scale: float) -> None:
        for task, loss in expected.losses.items():
            got = float(record.losses[task])
            tolerance = 1e-6 * max(1.0, abs(loss))
            same = abs(got - loss) <= tolerance or not math.isfinite(loss)
            _check(same, f"loss of {task} is {got}, not {loss}")
        if expected.raw is None:
            every = [record, *record.groups.values()]
            _check(all(each.gramian is None for each in every), "there should be no Gramian")
            return
        parts = expected.written[: len(expected.groups)]
        combines = self.case.gradient[0] != "GradDrop"
        combined = combines and len(parts) == 1
        self._compare_figures(record, expected.raw, parts, expected, scale, combined=combined)
        named = self.case.shared[0] == "groups"
        names = [f"group {n}" for n in range(len(self.case.shared[1]))] if named else []
        _check(list(record.groups) == names, f"groups {list(record.groups)}")
        known = {} if expected.at_features else dict(zip(expected.groups, parts, strict=True))
        start = 0
        for number, figures in enumerate(record.groups.values()):
            if number not in known:
                _check(figures.gramian is None, f"nobody knows the Gramian of group {number}")
                continue
            stop = start + len(known[number].got)
            raw = expected.raw[:, start:stop]
            self._compare_figures(figures, raw, [known[number]], expected, scale, combined=combines)
            start = stop

    def _compare_figures(
        self,
        figures: Record | GroupFigures,
        rows: Array,
        parts: Sequence[Written],
        expected: Expected,
        scale: float,
        *,
        combined: bool,
    ) -> None:
        """Compare what is said of all that is balanced, or of one group, with its rows."""
        raw = rows / scale
        gramian = raw @ raw.T
        got = figures.gramian.numpy()
        sizes = np.sqrt(np.outer(gramian.diagonal(), gramian.diagonal()))
        loose = 1e-9 if expected.tremor < 1e-9 else 30 * expected.tremor
        _check(
            (np.abs(got - gramian) <= loose * sizes + 1e-300).all(),
            f"the Gramian is\n{got}\nand should be\n{gramian}",
        )
        _check((figures.combination is not None) == combined, f"combines {figures.combination}")
        if expected.at_features:
            return
        direction = np.concatenate([np.zeros(0), *[part.got for part in parts]])
        tolerance = np.concatenate(
            [np.zeros(0), *[part.tolerance + 1e-6 * part.scale for part in parts]]
        )
        if not np.isfinite(direction).all():  # more than its dtype holds, on top of what was there
            return
        progress = figures.progress.numpy() * scale
        _check(
            (np.abs(progress - raw @ direction) <= 2 * np.abs(raw) @ tolerance + 1e-300).all(),
            f"progress {progress}, and should be {raw @ direction}",
        )
        if combined:
            mixed = figures.combination.double().numpy() @ rows
            _check(
                (np.abs(mixed - direction) <= 2 * tolerance).all(),
                f"the combination {figures.combination} is not the direction",
            )

    def _compare_twin(self, call: Call, result: Any, error: Exception | None) -> None:
        """Compare with what has not been saved or copied: bit for bit."""
        assert self.twin is not None
        other, failed, _ = self._attempt(self.twin, call)
        _check(type(failed) is type(error), f"the uninterrupted run: {failed!r}, not {error!r}")
        if isinstance(result, Record):
            one, two = result.as_dict(), other.as_dict()
            same = one.keys() == two.keys() and all(
                np.array_equal(one[k], two[k], equal_nan=True) for k in one if k != "fallbacks"
            )
            _check(same, f"the uninterrupted run's record is {two}, not {one}")
        mine, others = self.world.named(), self.twin.named()
        for name in mine:
            a, b = mine[name].grad, others[name].grad
            same = (a is None) == (b is None)
            same = same and (a is None or np.array_equal(numbers(a), numbers(b), equal_nan=True))
            _check(same, f"the uninterrupted run's {name}.grad is {b}, not {a}")


def _with_grad(world: World) -> list[Tensor]:
    return [p for p in world.named().values() if p.grad is not None]


def _fitting(part: Written, got: Array, what: str) -> int:
    """Return which of the right answers it is, or raise."""
    part.got = got
    tolerance = part.scale * part.precision + part.answer.slack + 1e-300
    part.tolerance = tolerance
    far = np.abs(got - part.answer.directions) > tolerance
    # What a dtype cannot hold is infinite, for a scaler to see or because more was there before.
    over = np.abs(part.answer.directions + part.before) > 0.99 * part.largest
    far &= ~(np.isinf(got) & over)
    if part.answer.entrywise:
        far = far.all(0)[None]
    if got.size and not (~far).all(1).any():
        distance = np.abs(got - part.answer.directions)
        raise MismatchError(
            f"the direction of {what} is\n{got}\nand should be\n{part.answer.directions[:3]}\n"
            f"distance {distance.min(0)}\ntolerance {tolerance}"
        )
    return int((~far).all(1).argmax())


def _like(values: Array, tensor: Tensor) -> Tensor:
    values = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.is_complex():
        values = torch.view_as_complex(values.reshape(*tensor.shape, 2))
    return values.reshape(tensor.shape).to(tensor.dtype)


def _check(condition: object, message: str) -> None:
    if not condition:
        raise MismatchError(message)


def _of_float64(weight: Tensor, *_: int) -> bool:
    return weight.dtype == torch.float64


def run(case: Case) -> None:
    """Run a case; raise MismatchError, with the case in words, if a call is not as predicted."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # some of it is about what is not finite
        if case.factors:
            stack.enter_context(mock.patch.object(_factors, "pays", _of_float64))
        Run(case).run()
