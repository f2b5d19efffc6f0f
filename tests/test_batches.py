"""Further, independent batches: what a strategy is told of them, and what goes wrong with them."""

import copy
import gc
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance import _step as steps
from mtbalance.gradient import (
    CAGrad,
    GradientStrategy,
    GramianStrategy,
    MoDo,
    Normalized,
    PCGrad,
    SDMGrad,
    Smoothed,
    Sum,
)
from mtbalance.weighting import FAMO, AutoLambda, Constant, Equal, GradNorm
from tests._device import DEVICE, on_device
from tests._networks import (
    TASKS,
    Network,
    batch,
    flat_grad,
    gradients,
    raw_rows,
)

Function = Callable[[], dict[str, Tensor]]


class Spy(GramianStrategy):
    """Combines rows by the sums of the rows of A, and keeps all that it is told."""

    further_batches = (1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Tensor]] = []
        self.steps = self.per_task()

    def weights(self, gramian: Tensor) -> Tensor:
        raise AssertionError("asked without further batches")

    def weights_across(self, gramian: Tensor, across: Tensor) -> Tensor:
        self.told.append((gramian.clone(), across.clone()))
        self.steps.write(self.steps.read(across) + 1)
        return across.sum(1)


def of(model: Network, seed: int, tasks: Sequence[str] = TASKS) -> Function:
    """Return a function that returns the losses of a batch."""

    def losses() -> dict[str, Tensor]:
        return {
            task: loss for task, loss in model.losses(batch(seed=seed)).items() if task in tasks
        }

    return losses


def exact_products(ones: Tensor, others: Tensor) -> np.ndarray:
    """Return the inner products of rows, number by number, in long double."""
    found = np.zeros((len(ones), len(others)))
    for i, one in enumerate(ones.tolist()):
        for j, other in enumerate(others.tolist()):
            total = np.longdouble(0)
            for x, y in zip(one, other, strict=True):
                total += np.longdouble(x) * np.longdouble(y)
            found[i, j] = total
    return found


def rows_of(model: Network, seed: int, shared: Sequence[Tensor], tasks: str = "abc") -> Tensor:
    return raw_rows(of(model, seed, list(tasks))(), shared)


# --- what the strategy is told --------------------------------------------------------------------


@pytest.mark.parametrize("present", ["abc", "ca", "b"])
@pytest.mark.parametrize("count", [1, 2])
def test_products_of_two_batches_by_a_slow_loop(count: int, present: str) -> None:
    """Weighted on both sides, in each group, of the tasks of the step in their order."""
    model, spy = Network(), Spy()
    weights = {"a": 1.0, "b": 2.0, "c": 0.25}
    parts = {"first": model.trunk[0], "last": model.trunk[3]}
    balancer = Balancer(Constant(weights), spy, tasks=TASKS, shared=parts)
    functions = [of(model, 1), of(model, 2)][:count]
    record = balancer.backward(of(model, 0, present)(), batches=functions)
    assert record.tasks == tuple(task for task in TASKS if task in present)
    w = np.array([weights[task] for task in record.tasks])
    pairs = {1: (0, 1), 2: (1, 2)}[count]
    for (gramian, across), part in zip(spy.told, parts.values(), strict=True):
        shared = list(part.parameters())
        ones, others = (rows_of(model, seed, shared, present) for seed in pairs)
        expected = exact_products(ones, others) * w * w[:, None]
        size = float(np.abs(expected).max())
        assert across.dtype == torch.float64
        assert np.abs(across.numpy() - expected).max() <= 1e-14 * size
        rows = rows_of(model, 0, shared, present)
        assert_close(
            gramian.numpy(), exact_products(rows, rows) * w * w[:, None], rtol=1e-12, atol=0
        )
        # The direction is made of the rows of the losses, by what the products gave.
        coefficients = torch.as_tensor(expected.sum(1) * w)
        assert_close(flat_grad(shared), coefficients @ rows, rtol=1e-11, atol=1e-12)
    if count == 2:
        assert not torch.allclose(spy.told[0][1], spy.told[0][1].T) or present == "b"
    for task in present:  # and what is not shared gets the weighted gradient of the losses alone
        (loss,) = of(model, 0, [task])().values()
        head = list(model.heads[task].parameters())
        expected_head = raw_rows({task: weights[task] * loss}, head)[0]
        assert_close(flat_grad(head), expected_head, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_accumulated_rows(count: int) -> None:
    """A is that of the sums of the micro-batches with one batch, or of two batches."""
    model, spy = Network(), Spy()
    shared = list(model.trunk.parameters())
    balancer = Balancer(Equal(), spy, tasks=TASKS, shared=model.trunk)
    functions = [of(model, 1), of(model, 2)][:count]
    balancer.accumulate(of(model, 3)())
    balancer.accumulate(of(model, 4, ["a", "c"])())
    balancer.apply(batches=functions)
    rows = rows_of(model, 3, shared)
    rows[[0, 2]] += rows_of(model, 4, shared, "ac")
    first, second = rows_of(model, 1, shared), rows_of(model, 2, shared)
    expected = rows @ first.T if count == 1 else first @ second.T
    assert_close(spy.told[0][1], expected, rtol=1e-12, atol=1e-13)
    assert_close(flat_grad(shared), expected.sum(1) @ rows, rtol=1e-11, atol=1e-12)
    model.zero_grad()
    balancer.accumulate(of(model, 3)())
    balancer.backward(of(model, 4, ["a", "c"])(), batches=functions)
    assert_close(spy.told[1][1], expected, rtol=1e-12, atol=1e-13)


def test_sums_of_micro_batches_are_wider_than_the_rows_of_a_further_batch() -> None:
    model, spy = Network(), Spy()
    shared = list(model.trunk.parameters())
    options = {"shared": model.trunk, "dtype": torch.bfloat16}
    balancer = Balancer(Equal(), spy, tasks=TASKS, **options)
    for seed in (0, 1):
        balancer.accumulate(of(model, seed)())
    balancer.apply(batches=[of(model, 2)])
    kept = [rows_of(model, seed, shared).bfloat16().float() for seed in range(3)]
    expected = (kept[0] + kept[1]).double() @ kept[2].double().T
    assert_close(spy.told[0][1], expected, rtol=1e-13, atol=1e-13)


def test_the_wider_options_reach_further_batches() -> None:
    """Rows are kept in bfloat16, or come in vectorised passes; what is shared may be inferred."""
    model = Network()
    shared = list(model.trunk.parameters())
    rows = [rows_of(model, seed, shared) for seed in (0, 1, 2)]
    for options, tolerance in (
        ({"dtype": torch.bfloat16}, 0.0),
        ({"chunk": 2}, 1e-12),
        ({"shared": None}, 1e-12),
    ):
        spy = Spy()
        balancer = Balancer(Equal(), spy, tasks=TASKS, **{"shared": model.trunk, **options})
        balancer.backward(of(model, 0)(), batches=[of(model, 1), of(model, 2)])
        kept = [r.to(options.get("dtype", torch.float64)).double() for r in rows]
        assert_close(spy.told[0][1], kept[1] @ kept[2].T, rtol=tolerance or 1e-12, atol=1e-12)
        assert balancer.fallbacks == 0


def test_tasks_that_do_not_meet_have_no_products() -> None:
    """Where a parameter is reached by other tasks in another batch, there is nothing to add up."""
    x, y = (nn.Parameter(on_device(torch.tensor([1.0, 2.0]))) for _ in range(2))
    spy = Spy()
    balancer = Balancer(Equal(), spy, tasks=("a", "b"), shared={"x": [x], "y": [y]})
    balancer.backward(
        {"a": 3 * x[0] + y[1], "b": 5 * x[0]},
        batches=[lambda: {"a": 7 * x[0], "b": 2 * x[0] + x[1]}],
    )
    assert [across.tolist() for _, across in spy.told] == [[[21, 6], [35, 10]], [[0, 0], [0, 0]]]


def test_embeddings_with_sparse_gradients() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    spy = Spy()
    balancer = Balancer(Equal(), spy, tasks=("a", "b"), shared=table)

    def losses(factor: float) -> dict[str, Tensor]:
        h = table(torch.tensor([0, 2]))
        return {"a": factor * h[0].sum(), "b": h[0, 0] + factor * h[1].sum()}

    balancer.backward(losses(1.0), batches=[lambda: losses(3.0)])
    assert spy.told[0][1].tolist() == [[6, 1], [3, 7]]


def test_passes_are_made_where_gradients_are_off() -> None:
    model, spy = Network(), Spy()
    balancer = Balancer(Equal(), spy, tasks=TASKS, shared=model.trunk)
    losses = of(model, 0)()
    with torch.no_grad():
        balancer.backward(losses, batches=[of(model, 1)])
    assert spy.told


# --- when functions are called, and what is kept --------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_functions_are_called_in_turn_and_graphs_go(count: int) -> None:
    """Two batches are done with before the rows of the step are made; one comes after these."""
    model = Network()
    balancer = Balancer(Equal(), Spy(), tasks=TASKS, shared=model.trunk)
    events: list[str] = []
    graphs: list[weakref.ref[Any]] = []

    def function(seed: int) -> Function:
        def losses() -> dict[str, Tensor]:
            gc.collect()
            alive = sum(ref() is not None for ref in graphs)
            events.append(f"batch {seed}, {alive} graphs before it")
            found = of(model, seed)()
            graphs.append(weakref.ref(found["a"]))
            return found

        return losses

    losses = of(model, 0)()
    losses["a"].register_hook(lambda _: events.append("rows of the losses"))
    balancer.backward(losses, batches=[function(seed) for seed in range(1, count + 1)])
    expected = {
        1: ["rows of the losses", "batch 1, 0 graphs before it"],
        2: ["batch 1, 0 graphs before it", "batch 2, 0 graphs before it", "rows of the losses"],
    }
    assert events == expected[count]


@pytest.mark.parametrize("count", [1, 2])
def test_at_most_two_batches_of_rows_exist(count: int) -> None:
    """In the steps with three batches, too. PyTorch keeps what Python has seen of a tensor."""
    model = Network()
    weight = model.trunk[0].weight
    balancer = Balancer(Equal(), Spy(), tasks=TASKS, shared=model.trunk)
    rows: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    def count_rows(gradient: Tensor) -> None:
        rows.append(weakref.ref(gradient))
        most.append(sum(ref() is not None for ref in rows))

    weight.register_hook(count_rows)
    balancer.backward(of(model, 0)(), batches=[of(model, 1), of(model, 2)][:count])
    assert len(rows) == 3 * (count + 1)
    assert max(most) == 6
    assert most[-1] == (6 if count == 1 else 3)


def test_batch_norm_counts_each_batch_as_training_does() -> None:
    """Further batches are training data: what modules remember of it moves."""
    trunk = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    twin = copy.deepcopy(trunk)

    def losses(model: nn.Module, seed: int) -> dict[str, Tensor]:
        h = model(batch(seed=seed))
        return {"a": h.square().mean(), "b": (h[:, 0] - 1).square().mean()}

    balancer = Balancer(Equal(), Spy(), tasks=("a", "b"), shared=trunk)
    balancer.backward(
        losses(trunk, 0), batches=[lambda: losses(trunk, 1), lambda: losses(trunk, 2)]
    )
    for seed in range(3):
        losses(twin, seed)
    for one, other in zip(trunk.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


def test_other_strategies_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(steps, "FurtherBatches", fail)
    monkeypatch.setattr(steps, "_with_across", fail)
    model = Network()
    for strategy in (Sum(), PCGrad(), CAGrad()):
        Balancer(Equal(), strategy, tasks=TASKS, shared=model.trunk).backward(of(model, 0)())


# --- together with all else -----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Sum, PCGrad])
def test_one_loop_serves_every_strategy(strategy: type[GradientStrategy]) -> None:
    """Where nobody needs them, functions are not called."""
    with_them = Network()
    without = copy.deepcopy(with_them)
    for model, batches in ((with_them, (failing,) * 3), (without, ())):
        balancer = Balancer(Equal(), strategy(), tasks=TASKS, shared=model.trunk)
        balancer.backward(of(model, 0)(), batches=batches)
        balancer.accumulate(of(model, 1)())
        balancer.apply(batches=batches)
    for one, other in zip(with_them.parameters(), without.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_weightings_that_look_at_gradients_or_back() -> None:
    """They see the losses of the step alone, and the products have their weights on both sides."""
    model = Network()
    shared = list(model.trunk.parameters())
    first, second = rows_of(model, 1, shared), rows_of(model, 2, shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for make in (lambda: AutoLambda(optimizer, lr=0.1), lambda: GradNorm(lr=0.1), FAMO):
        plain = Balancer(make(), PCGrad(), tasks=TASKS, shared=model.trunk)
        spy = Spy()
        balancer = Balancer(make(), spy, tasks=TASKS, shared=model.trunk)
        record = plain.backward(of(model, 0)(), validation=of(model, 9))
        functions = [of(model, 1), of(model, 2)]
        other = balancer.backward(of(model, 0)(), validation=of(model, 9), batches=functions)
        assert {t: float(w) for t, w in record.weights.items()} == {
            t: float(w) for t, w in other.weights.items()
        }
        w = torch.stack(list(other.weights.values())).double()
        assert_close(spy.told[0][1], first @ second.T * w * w[:, None], rtol=1e-12, atol=1e-13)
        balancer.after_step(of(model, 0))
        model.zero_grad()


def test_smoothed_and_normalized_pass_them_on() -> None:
    model = Network()
    shared = list(model.trunk.parameters())
    rows = [rows_of(model, seed, shared) for seed in range(6)]
    smoothed = Smoothed(MoDo(gamma=0.01), alpha=0.75)
    balancer = Balancer(Equal(), smoothed, tasks=TASKS, shared=model.trunk)
    inner, average = MoDo(gamma=0.01), None
    for first in (0, 3):
        model.zero_grad()
        functions = [of(model, first + 1), of(model, first + 2)]
        balancer.backward(of(model, first)(), batches=functions)
        gramian = rows[first] @ rows[first].T
        weights = inner.coefficients(gramian, rows[first + 1] @ rows[first + 2].T)
        average = weights if average is None else 0.75 * average + 0.25 * weights
        assert_close(flat_grad(shared), average @ rows[first], rtol=1e-11, atol=1e-12)

    model.zero_grad()
    balancer = Balancer(Equal(), Normalized(MoDo(gamma=0.01)), tasks=TASKS, shared=model.trunk)
    balancer.backward(of(model, 0)(), batches=[of(model, 1), of(model, 2)])
    lengths = rows[0].norm(dim=1)
    factors = lengths.mean() / lengths  # those that bring the rows of the direction to one length
    unit = [factors[:, None] * rows[seed] for seed in range(3)]
    weights = MoDo(gamma=0.01).coefficients(unit[0] @ unit[0].T, unit[1] @ unit[2].T)
    assert_close(flat_grad(shared), weights @ unit[0], rtol=1e-11, atol=1e-12)


def test_float64_rows_whose_squares_float64_does_not_hold() -> None:
    """Products are those of the rows over a power of two, of the batches of the same order."""
    for size in (2.0**-700, 2.0**700):
        x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        spy = Spy()
        balancer = Balancer(Equal(), spy, tasks=("a", "b"), shared=[x])

        def losses(factor: float, x: Tensor = x, size: float = size) -> dict[str, Tensor]:
            return {"a": size * factor * x[0], "b": size * (x[0] + factor * x[1])}

        balancer.backward(losses(1.0), batches=[lambda: losses(3.0), lambda: losses(5.0)])
        ((_, across),) = spy.told
        factor = float(across[0, 0]) / 15
        assert torch.frexp(torch.tensor(factor, dtype=torch.float64))[0] == 0.5  # a power of two
        assert (across / factor).tolist() == [[15, 3], [5, 16]]


# --- mixed precision ------------------------------------------------------------------------------


def test_products_have_no_loss_scale() -> None:
    model, spy = Network(), Spy()
    shared = list(model.trunk.parameters())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    balancer = Balancer(Equal(), spy, tasks=TASKS, shared=model.trunk)
    rows = [rows_of(model, seed, shared) for seed in range(3)]
    balancer.backward(of(model, 0)(), batches=[of(model, 1), of(model, 2)], scaler=scaler)
    across = rows[1] @ rows[2].T
    assert_close(spy.told[0][1], across, rtol=1e-12, atol=1e-13)
    assert_close(flat_grad(shared), 2.0**10 * (across.sum(1) @ rows[0]), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(("count", "which"), [(1, 0), (2, 0), (2, 1)])
def test_an_overflow_in_a_further_batch_is_one_of_the_step(count: int, which: int) -> None:
    """The scaler finds it in .grad, skips the step and lowers the scale."""
    x = nn.Parameter(on_device(torch.ones(2)))
    spy = Spy()
    balancer = Balancer(Equal(), spy, tasks=("a", "b"), shared=[x])
    optimizer = torch.optim.SGD([x], lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
    functions: list[Function] = [lambda: {"a": x[0], "b": x[1]}] * count
    functions[which] = lambda: {"a": 1e35 * x[0], "b": x[1]}
    record = balancer.backward({"a": x[0], "b": x[0] + x[1]}, batches=functions, scaler=scaler)
    assert record.overflow
    assert record.nonfinite == ("a",)
    assert record.dropped == ()
    assert x.grad is not None
    assert not x.grad.isfinite().any()
    scaler.step(optimizer)
    scaler.update()
    assert x.tolist() == [1, 1]
    assert scaler.get_scale() == 2.0**39
    assert spy.steps.values.tolist() == [[0, 0]]


# --- what is not finite ---------------------------------------------------------------------------


def spoiled(function: Function, what: str) -> Function:
    """Return one whose loss or gradient of task b is not finite."""

    def losses() -> dict[str, Tensor]:
        found = function()
        loss = found["b"]
        slope = (loss - loss.detach()).abs().sqrt()  # 0, with an infinite slope
        found["b"] = loss * torch.inf if what == "loss" else loss + slope
        return found

    return losses


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("count", "which"), [(1, 0), (2, 0), (2, 1)])
class TestNonFinite:
    def run(
        self, policy: str, what: str, count: int, which: int
    ) -> tuple[Network, Spy, Callable[[], Any]]:
        model, spy = Network(), Spy()
        balancer = Balancer(Equal(), spy, tasks=TASKS, shared=model.trunk, nonfinite=policy)
        functions = [of(model, 1), of(model, 2)][:count]
        functions[which] = spoiled(functions[which], what)
        return model, spy, lambda: balancer.backward(of(model, 0)(), batches=functions)

    def test_raise(self, what: str, count: int, which: int) -> None:
        model, spy, step = self.run("raise", what, count, which)
        message = f"the {what} in `batches` of task 'b' must be finite"
        with pytest.raises(FloatingPointError, match=message):
            step()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not spy.told

    def test_skip(self, what: str, count: int, which: int) -> None:
        model, spy, step = self.run("skip", what, count, which)
        record = step()
        assert record.skipped
        assert record.nonfinite == ("b",)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not spy.told

    def test_drop_is_absent(self, what: str, count: int, which: int) -> None:
        model, spy, step = self.run("drop", what, count, which)
        record = step()
        assert record.dropped == record.nonfinite == ("b",)
        assert record.tasks == ("a", "c")
        found = gradients(model)
        model.zero_grad()
        other = Spy()
        balancer = Balancer(Equal(), other, tasks=TASKS, shared=model.trunk)
        balancer.backward(of(model, 0, "ac")(), batches=[of(model, 1), of(model, 2)][:count])
        assert_close(spy.told[0][1], other.told[0][1], rtol=1e-13, atol=1e-14)
        assert spy.steps.values.tolist() == [[1, 0, 1]]
        for name, gradient in gradients(model).items():
            assert_close(found[name], gradient)

    def test_propagate(self, what: str, count: int, which: int) -> None:
        """As a gradient of the step would be: all that the strategy combines is NaN."""
        model, _, step = self.run("propagate", what, count, which)
        step()
        assert flat_grad(list(model.trunk.parameters())).isnan().all()


@pytest.mark.parametrize(("count", "which"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_all_tasks_dropped(what: str, count: int, which: int) -> None:
    model, spy = Network(), Spy()
    balancer = Balancer(Equal(), spy, tasks=("b",), shared=model.trunk, nonfinite="drop")

    def losses(seed: int) -> Function:
        return lambda: {"b": of(model, seed)()["b"]}

    functions = [losses(1), losses(2)][:count]
    functions[which] = spoiled(functions[which], what)
    record = balancer.backward(losses(0)(), batches=functions)
    assert record.tasks == ()
    assert record.dropped == ("b",)
    assert not spy.told
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_nobody_is_called_for_a_step_that_has_ended(policy: str) -> None:
    """After the losses, or the first batch, the rest is not asked for."""
    model = Network()
    balancer = Balancer(Equal(), Spy(), tasks=TASKS, shared=model.trunk, nonfinite=policy)
    calls: list[int] = []

    def counted(number: int, function: Function) -> Function:
        def losses() -> dict[str, Tensor]:
            calls.append(number)
            return function()

        return losses

    for losses, first, expected in (
        (spoiled(of(model, 0), "loss"), of(model, 1), []),
        (of(model, 0), spoiled(of(model, 1), "loss"), [1]),
    ):
        calls.clear()
        functions = [counted(1, first), counted(2, of(model, 2))]
        if policy == "raise":
            with pytest.raises(FloatingPointError):
                balancer.backward(losses(), batches=functions)
        else:
            assert balancer.backward(losses(), batches=functions).skipped
        assert calls == expected


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.float])
@pytest.mark.parametrize("make", [lambda: MoDo(gamma=0.001), lambda: SDMGrad(lr=0.1)])
def test_state_round_trip(
    make: Callable[[], GradientStrategy], cast: Callable[[nn.Module], nn.Module]
) -> None:
    """Bit for bit, per group, and no cast takes digits away."""
    model = Network()
    parts = {"first": model.trunk[0], "last": model.trunk[3]}

    def made() -> Balancer:
        return Balancer(Equal(), make(), tasks=TASKS, shared=parts)

    def step(balancer: Balancer, seed: int) -> Tensor:
        model.zero_grad()
        functions = [lambda: model.losses(batch(seed=seed + 1))]
        balancer.backward(model.losses(batch(seed=seed)), batches=functions)
        return flat_grad(list(model.trunk.parameters()))

    one, other = made(), made()
    for seed in range(3):
        step(one, seed)
    cast(nn.ModuleDict({"balancer": one}))
    state = copy.deepcopy(one.state_dict())
    assert state["gradient.shares.values"].dtype == torch.float64
    assert not torch.equal(*state["gradient.shares.values"])
    other.load_state_dict(state)
    assert torch.equal(step(one, 7), step(other, 7))
    one.reset()
    assert one.gradient.shares.values.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert torch.equal(step(one, 7), step(made(), 7))


# --- errors ---------------------------------------------------------------------------------------


ONE_OR_TWO = (
    "`batches` must be 1 or 2 functions with MoDo, each of which returns the losses of a further, "
    "independent batch, but got {}. Call backward(losses, batches=(function,))."
)


def identity() -> dict[str, Tensor]:
    return {}


@pytest.mark.parametrize(
    ("strategy", "batches", "kind", "message"),
    [
        (MoDo, [], ValueError, ONE_OR_TWO.format(0)),
        (MoDo, [identity] * 3, ValueError, ONE_OR_TWO.format(3)),
        (lambda: Smoothed(MoDo(), 0.5), (), ValueError, ONE_OR_TWO.format(0)),
        (
            PCGrad,
            [identity, 3],
            TypeError,
            (
                "`batches[1]` must be a function without arguments that returns the losses of a "
                "further batch, but got int."
            ),
        ),
        (
            MoDo,
            identity,
            TypeError,
            (
                "`batches` must be a sequence of functions without arguments that return the "
                "losses of further batches, but got function. For one, give (function,)."
            ),
        ),
        (
            MoDo,
            [identity, {"a": 1}],
            TypeError,
            (
                "`batches[1]` must be a function without arguments that returns the losses of a "
                "further batch, but got dict."
            ),
        ),
    ],
)
def test_the_wrong_functions(
    strategy: Callable[[], GradientStrategy], batches: Any, kind: type[Exception], message: str
) -> None:
    model = Network()
    made = strategy()
    message = message.replace("MoDo", type(made).__name__)
    balancer = Balancer(Equal(), made, tasks=TASKS, shared=model.trunk)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        balancer.backward(of(model, 0)(), batches=batches)
    balancer.accumulate(of(model, 0)())
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        balancer.apply(batches=batches)
    assert all(parameter.grad is None for parameter in model.parameters())


def failing() -> dict[str, Tensor]:
    raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (
            lambda model: [1.0],
            TypeError,
            "`batches[1]` must return a mapping from task name to loss, but got list.",
        ),
        (
            lambda model: {**of(model, 2)(), "bb": torch.ones(())},
            ValueError,
            "`batches[1]` must name tasks among 'a', 'b', 'c', but got 'bb'. Did you mean 'b'?",
        ),
        (
            lambda model: of(model, 2, "ac")(),
            ValueError,
            (
                "`batches[1]` must return the loss of every task of the step ('a', 'b'), but 'b' "
                "is missing."
            ),
        ),
        (
            lambda model: {**of(model, 2)(), "b": torch.ones(3)},
            ValueError,
            (
                "the loss of task 'b' must be a scalar, but got shape (3,). Reduce it first, for "
                "instance with .mean(). This is of `batches[1]`."
            ),
        ),
        (
            lambda model: {t: loss.detach() for t, loss in of(model, 2)().items()},
            ValueError,
            (
                "the loss of task 'a' must have a graph, but it does not require a gradient. Was "
                "it detached, computed under torch.no_grad() or torch.inference_mode(), or are all "
                "its parameters frozen? If it stands for missing labels, leave the task out. "
                "This is of `batches[1]`."
            ),
        ),
        (lambda model: failing(), OSError, "the disk is full"),
    ],
)
def test_what_a_function_returns(
    function: Callable[[Network], Any], kind: type[Exception], message: str
) -> None:
    """An error leaves no trace; the third task is absent, and what is said of it does not count."""
    model, spy = Network(), Spy()
    balancer = Balancer(Equal(), spy, tasks=TASKS, shared=model.trunk)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        balancer.backward(of(model, 0, "ab")(), batches=[of(model, 1), lambda: function(model)])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert spy.steps.values.tolist() == [[0, 0, 0]]
    batches = [of(model, 1), lambda: {**of(model, 2)(), "c": "not looked at"}]
    assert balancer.backward(of(model, 0, "ab")(), batches=batches).tasks == ("a", "b")


def test_a_loss_that_reaches_nothing_shared() -> None:
    """Also where these tasks have been seen together before."""
    model = Network()
    balancer = Balancer(Equal(), Spy(), tasks=TASKS, shared=model.trunk)
    for _ in range(2):
        with pytest.raises(ValueError, match="the loss of task 'b' must reach a shared parameter"):
            balancer.backward(
                of(model, 0)(),
                batches=[lambda: {**of(model, 1)(), "b": model.heads["b"].weight.sum()}],
            )
        balancer.backward(of(model, 0)(), batches=[of(model, 1)])


def test_an_error_in_the_second_batch_leaves_no_trace() -> None:
    model, spy = Network(), Spy()
    balancer = Balancer(Equal(), spy, tasks=TASKS, shared=model.trunk)
    balancer.backward(of(model, 0)(), batches=[of(model, 1)])
    before = gradients(model)
    state = copy.deepcopy(balancer.state_dict())
    with pytest.raises(OSError, match="disk"):
        balancer.backward(of(model, 0)(), batches=[of(model, 1), failing])
    for name, gradient in gradients(model).items():
        assert_close(gradient, before[name])
    assert torch.equal(spy.steps.values, state["gradient.steps.values"])
    assert spy.steps.values.tolist() == [[1, 1, 1]]


def test_what_does_not_go_with_further_batches() -> None:
    model = Network()
    message = re.escape(
        "`every` must be 1 with MoDo, which learns from the further batches of every step, but got "
        "2."
    )
    with pytest.raises(ValueError, match=message):
        Balancer(Equal(), MoDo(), tasks=TASKS, shared=model.trunk, every=2)
    balancer = Balancer(Equal(), MoDo(), tasks=TASKS, shared=model.trunk)
    h = model.trunk(batch())
    losses = {task: head(h).square().mean() for task, head in model.heads.items()}
    message = re.escape(
        "`features` must be None with MoDo, but got tensors. It multiplies gradients of several "
        "batches, whose features have nothing in common."
    )
    with pytest.raises(ValueError, match=message):
        balancer.backward(losses, features=h, batches=[of(model, 1)])
