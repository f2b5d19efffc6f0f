"""Means of rows through a Balancer: right in every mode, saved, and put back with a step."""

import copy
import gc
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import (
    MGDA,
    CAGrad,
    ConFIG,
    GradDrop,
    GradientStrategy,
    GradVac,
    Normalized,
    PCGrad,
    RandomGradient,
    RowMean,
    Smoothed,
    Sum,
    TrimmedMean,
    UPGrad,
)
from mtbalance.weighting import DWA, AutoLambda, Constant, Equal, GradNorm, Weighting
from tests._device import on_device
from tests._networks import TASKS, Network, batch, raw_rows
from tests.test_state import assert_equal_states, saved

Make = Callable[[], GradientStrategy]
INNER: list[Make] = [
    UPGrad,
    CAGrad,
    Sum,
    lambda: Normalized(TrimmedMean(1)),
    GradDrop,
    lambda: PCGrad(order="fixed"),
]
DEVICE = on_device(torch.ones(1)).device
WEIGHTS = (1.0, 2.0, 0.5)


class Oracle:
    """The means of whole rows, in NumPy's long double, and the strategy on plain matrices."""

    def __init__(self, inner: GradientStrategy, beta: float, *, correct: bool, recall: bool):
        self.inner = inner
        self.beta = np.longdouble(beta)
        self.correct, self.recall = correct, recall
        self.means: dict[str, np.ndarray] = {}
        self.times: dict[str, int] = {}

    def direction(self, rows: Mapping[str, Tensor]) -> Tensor:
        for task, row in rows.items():
            new = row.cpu().numpy().astype(np.longdouble)
            self.means[task] = self.beta * self.means.get(task, 0 * new) + (1 - self.beta) * new
            self.times[task] = self.times.get(task, 0) + 1
        matrix = []
        for task in TASKS:
            if task in (self.means if self.recall else rows):
                share = 1 - self.beta ** self.times[task] if self.correct else 1
                matrix.append((self.means[task] / share).astype(np.float64))
        return self.inner(on_device(torch.tensor(np.stack(matrix))))


def grads(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [
            torch.zeros_like(p.reshape(-1)) if p.grad is None else p.grad.reshape(-1)
            for p in parameters
        ]
    )


def descend(network: nn.Module, scale: float = 1.0) -> None:
    """Take a step of gradient descent."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.02 / scale)


def present(step: int) -> list[str]:
    """All three, then two, then one."""
    return [task for i, task in enumerate(TASKS) if (step + i) % 4 != 1 and (step + i) % 5 != 2]


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize("inferred", [True, False])
def test_directions_and_records(make: Make, correct: bool, recall: bool, inferred: bool) -> None:
    """Also that the record's Gramian and progress are those of the raw rows."""
    if inferred and make is GradDrop:
        pytest.skip("draws go by the number of the column, and these are in the graph's order")
    network = Network()
    trunk = list(network.trunk.parameters())
    strategy = RowMean(make(), 0.7, correct=correct, recall=recall)
    balancer = Balancer(
        Constant(WEIGHTS), strategy, tasks=TASKS, shared=None if inferred else network.trunk
    )
    oracle = Oracle(make(), 0.7, correct=correct, recall=recall)
    for step in range(9):
        network.zero_grad()
        losses = network.losses(batch(seed=step))
        losses = {task: losses[task] for task in (TASKS if step == 0 else present(step))}
        raw = raw_rows(losses, trunk)
        weighted = {t: WEIGHTS[TASKS.index(t)] * row for t, row in zip(losses, raw, strict=True)}
        heads = {
            task: torch.autograd.grad(losses[task], network.heads[task].weight, retain_graph=True)
            for task in losses
        }
        record = balancer.backward(losses)
        direction = oracle.direction(weighted)
        assert_close(grads(trunk), direction, rtol=1e-12, atol=1e-13)
        assert record.gramian is not None
        assert record.progress is not None
        assert_close(record.gramian, raw @ raw.T, rtol=1e-12, atol=1e-13)
        assert_close(record.progress, raw @ direction, rtol=1e-10, atol=1e-12)
        assert record.combination is None
        for task, (slope,) in heads.items():
            expected = WEIGHTS[TASKS.index(task)] * slope
            assert_close(network.heads[task].weight.grad, expected)
        descend(network)


def train(
    strategy: GradientStrategy,
    weighting: Callable[[Network], Weighting] | None = None,
    *,
    mode: str = "backward",
    precision: torch.dtype = torch.float64,
    scale: float | None = None,
    **options: Any,
) -> tuple[list[Tensor], Balancer]:
    """Return the gradients of the trunk in six steps, some without some tasks, and progress."""
    torch.manual_seed(0)
    network = Network().to(precision)
    balancer = Balancer(
        weighting(network) if weighting else Equal(),
        strategy,
        tasks=TASKS,
        **{"shared": network.trunk, **options},
    )
    scaler = GradScaler(DEVICE.type, init_scale=scale) if scale else None
    found = []
    for step in range(6):
        network.zero_grad()
        rows = batch(8, seed=step).to(precision)
        tasks = TASKS if step == 0 else present(step)

        def losses(rows: Tensor = rows, tasks: Sequence[str] = tasks) -> dict[str, Tensor]:
            return {t: loss for t, loss in network.losses(rows).items() if t in tasks}

        if mode == "accumulate":
            for half in rows.chunk(2):
                balancer.accumulate({t: loss / 2 for t, loss in losses(half).items()})
            record = balancer.apply()
        else:
            record = balancer.backward(losses(), scaler=scaler, validation=losses)
        assert record.progress is not None
        found.append(record.progress)
        found.append(grads(list(network.trunk.parameters())) / (scale or 1.0))
        descend(network, scale or 1.0)
    return found, balancer


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "accumulate"},
        {"chunk": 2},
        {"scale": 1024.0},
        {"nonfinite": "propagate"},
        {"nonfinite": "drop"},
    ],
    ids=str,
)
def test_every_mode_gives_the_same(make: Make, recall: bool, options: dict[str, Any]) -> None:
    expected, _ = train(RowMean(make(), 0.8, recall=recall))
    found, _ = train(RowMean(make(), 0.8, recall=recall), **options)
    assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(make: Make, dtype: torch.dtype) -> None:
    """Rows of low precision, in a model of more; means are in float32."""
    if make is GradDrop:
        pytest.skip("a draw next to a threshold may fall on either side")
    expected, _ = train(RowMean(make(), 0.8))
    found, balancer = train(RowMean(make(), 0.8), dtype=dtype)
    tolerance = 30 * torch.finfo(dtype).eps
    for direction, exact in zip(found[1:2], expected[1:2], strict=True):
        assert float((direction - exact).norm()) <= tolerance * float(exact.norm())
    means = [t for key, t in balancer.state_dict().items() if "means.rows.0" in key]
    assert {mean.dtype for mean in means} == {torch.float32}


def auto_lambda(network: Network) -> AutoLambda:
    return AutoLambda(torch.optim.SGD(network.parameters(), lr=0.02), lr=0.1)


@pytest.mark.parametrize("make", [lambda _: DWA(), lambda _: GradNorm(lr=0.1), auto_lambda])
def test_every_weighting(make: Callable[[Network], Weighting]) -> None:
    """A beta of 0 is the strategy itself, under weightings that look at rows, too."""
    expected, _ = train(UPGrad(), make)
    found, _ = train(RowMean(UPGrad(), 0.0), make)
    assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: UPGrad(preference={"a": 1.0, "b": 2.0, "c": 6.0}),
        lambda: PCGrad(primary="c", order="fixed"),
        lambda: GradVac(0.3, order="fixed"),
        lambda: Smoothed(UPGrad(), 0.5),
    ],
)
def test_whose_rows_they_are(make: Make, recall: bool) -> None:
    """Strategies know which tasks are at hand, remembered ones too; by RowMean on matrices."""
    torch.manual_seed(0)
    network = Network()
    trunk = list(network.trunk.parameters())
    balancer = Balancer(
        Equal(), RowMean(make(), 0.7, recall=recall), tasks=TASKS, shared=network.trunk
    )
    alone = RowMean(make(), 0.7, recall=recall).bind(TASKS)
    for step in range(8):
        network.zero_grad()
        losses = network.losses(batch(seed=step))
        losses = {task: losses[task] for task in (present(step) if step else "c")}
        with alone.only(torch.tensor([TASKS.index(task) for task in losses])):
            expected = alone(raw_rows(losses, trunk))
        balancer.backward(losses)
        assert_close(grads(trunk), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("make", INNER)
def test_groups_have_means_of_their_own(make: Make) -> None:
    network = Network()
    layers = [network.trunk[0], network.trunk[3]]
    balancer = Balancer(
        Equal(),
        RowMean(make(), 0.6),
        tasks=TASKS,
        shared={"one": layers[0], "other": layers[1]},
    )
    inner = make()  # which draws for the first group, then for the second
    oracles = [Oracle(inner, 0.6, correct=True, recall=False) for _ in layers]
    for step in range(4):
        network.zero_grad()
        losses = network.losses(batch(seed=step))
        if step == 2:
            del losses["b"]
        raws = [raw_rows(losses, list(layer.parameters())) for layer in layers]
        balancer.backward(losses)
        for layer, raw, oracle in zip(layers, raws, oracles, strict=True):
            direction = oracle.direction(dict(zip(losses, raw, strict=True)))
            assert_close(grads(list(layer.parameters())), direction, rtol=1e-11, atol=1e-12)


# --- parameters that not every step reaches -------------------------------------------------------


def two_parameters(recall: bool, **shared: Any) -> tuple[Balancer, nn.Parameter, nn.Parameter]:
    x, y = (nn.Parameter(on_device(torch.ones(2, dtype=torch.float64))) for _ in range(2))
    strategy = RowMean(Sum(), 0.5, recall=recall)
    groups = {"x": [x], "y": [y]} if shared.get("groups") else [x, y]
    return Balancer(Equal(), strategy, tasks=("a", "b"), shared=groups), x, y


@pytest.mark.parametrize("groups", [True, False])
def test_a_mean_lasts_where_a_task_does_not_reach(groups: bool) -> None:
    """A gradient that is not there is zero: the mean shrinks, and still moves the parameter."""
    balancer, x, y = two_parameters(recall=False, groups=groups)
    balancer.backward({"a": x[0] + 4 * y[0], "b": x[1]})
    x.grad = y.grad = None
    record = balancer.backward({"a": x[0], "b": x[1]})
    assert x.grad is not None
    assert y.grad is not None
    assert_close(x.grad, torch.ones_like(x))
    assert_close(y.grad, y.new_tensor([4 / 3, 0]))  # (4/4) / (3/4)
    assert record.progress is not None
    assert_close(record.progress.cpu(), torch.ones(2, dtype=torch.float64))
    assert record.gramian is not None
    assert_close(record.gramian.cpu(), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("groups", [True, False])
def test_recalled_tasks_move_what_only_they_reach(groups: bool) -> None:
    balancer, x, y = two_parameters(recall=True, groups=groups)
    balancer.backward({"b": x[1] + 4 * y[0]})
    x.grad = y.grad = None
    balancer.backward({"a": 3 * x[0]})
    assert x.grad is not None
    assert y.grad is not None
    assert_close(x.grad, x.new_tensor([3, 1]))
    assert_close(y.grad, y.new_tensor([4, 0]))


def test_frozen_and_replaced_parameters() -> None:
    """A frozen one gets nothing; one that takes another's place begins anew."""
    trunk = nn.Linear(2, 2, bias=False).to(DEVICE)
    other = nn.Parameter(on_device(torch.ones(2)))
    balancer = Balancer(Equal(), RowMean(Sum(), 0.5), tasks=("a", "b"), shared=[trunk, other])

    def losses() -> dict[str, Tensor]:
        h = trunk(other)
        return {"a": h.sum(), "b": h.square().sum()}

    balancer.backward(losses())
    other.requires_grad_(False)
    trunk.weight.grad = other.grad = None
    balancer.backward(losses())
    assert other.grad is None
    weight = trunk.weight = nn.Parameter(trunk.weight.detach().clone())
    balancer.backward(losses())
    assert weight.grad is not None
    keys = [key for key in balancer.state_dict() if "means.rows.0" in key]
    assert keys == [
        f"gradient.means.rows.0/{task}/{name}"
        for name in ("0/weight", "1/parameter")
        for task in (0, 1)
    ]
    assert len(balancer.gradient.means.rows._held) == 2


def test_embeddings_with_sparse_gradients() -> None:
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=sparse).to(DEVICE)
        balancer = Balancer(Equal(), RowMean(UPGrad(), 0.5), tasks=("a", "b"), shared=table)
        found = []
        for step in range(3):
            table.zero_grad()
            h = table(on_device(torch.tensor([step, 2])))
            balancer.backward({"a": h.sum(), "b": (h - 1).square().sum()})
            grad = table.weight.grad
            assert grad is not None
            found.append(grad.to_dense())
        if sparse:
            expected = found
    assert_close(found, expected)


def test_complex_parameters() -> None:
    z = nn.Parameter(on_device(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)))
    balancer = Balancer(Equal(), RowMean(Sum(), 0.5), tasks=("a", "b"), shared=[z])
    for factor in (1.0, 4.0):
        z.grad = None
        balancer.backward({"a": factor * z.real.sum(), "b": z.imag.sum()})
    assert z.grad is not None
    assert_close(z.grad, z.new_tensor([3 + 1j, 3 + 1j]))


# --- the range of numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [0.0, 1e-200])
def test_means_outlive_steps_without_gradients(
    make: Make, dtype: torch.dtype, small: float
) -> None:
    """As of a network whose units are all dead: rows of the step are zero, means are not."""
    x = nn.Parameter(on_device(torch.ones(5, dtype=dtype)))
    balancer = Balancer(Equal(), RowMean(make(), 0.5), tasks=TASKS, shared=[x])
    oracle = Oracle(make(), 0.5, correct=True, recall=False)
    rows = on_device(torch.randn(3, 5).to(dtype))
    for factor in (1.0, small, small, 1.0):
        x.grad = None
        now = dict(zip(TASKS, factor * rows, strict=True))
        balancer.backward({task: row @ x for task, row in now.items()})
        assert_close(x.grad, oracle.direction(now).to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [UPGrad, ConFIG, MGDA, lambda: TrimmedMean(0)])
@pytest.mark.parametrize("size", [1e-200, 1e-170, 1e170, 1e200])
def test_rows_whose_squares_float64_does_not_hold(make: Make, size: float) -> None:
    rows = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 1.0, 1.0]], dtype=torch.float64)
    directions = []
    for factor in (1.0, size):
        x = nn.Parameter(on_device(torch.zeros(3, dtype=torch.float64)))
        balancer = Balancer(Equal(), RowMean(make(), 0.5), tasks=("a", "b"), shared=[x])
        for step in range(2):
            x.grad = None
            record = balancer.backward(
                {
                    t: factor * (on_device(row) * x).sum() * (step + 1)
                    for t, row in zip("ab", rows, strict=True)
                }
            )
        assert x.grad is not None
        directions.append(x.grad / factor)
        shares = torch.stack(list(record.shares.values()))
        assert_close(shares.sum(), torch.ones_like(shares.sum()))
    assert_close(directions[1], directions[0], rtol=1e-12, atol=1e-14)


# --- steps that write nothing ---------------------------------------------------------------------


def state_of(balancer: Balancer) -> dict[str, Tensor]:
    state = balancer.gradient.state_dict()
    return {key: value.clone() for key, value in state.items() if "random" not in key}


def started(make: Make = UPGrad, **options: Any) -> tuple[Balancer, nn.Parameter]:
    x = nn.Parameter(on_device(torch.ones(2)))
    balancer = Balancer(
        Equal(),
        RowMean(make(), **options.pop("means", {})),
        tasks=("a", "b"),
        shared=[x],
        **options,
    )
    balancer.backward({"a": x[0] + x[1], "b": x[0] - x[1]})
    x.grad = None
    return balancer, x


@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize("bad", ["loss", "gradient", "direction"])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_what_is_not_written_leaves_no_trace(policy: str, bad: str, recall: bool) -> None:
    balancer, x = started(nonfinite=policy, means={"recall": recall, "beta": 0.0})
    before = state_of(balancer)
    losses = {
        "loss": {"a": x[0] * torch.inf, "b": x[1]},
        "gradient": {"a": (x[0] - 1).sqrt(), "b": x[1]},
        "direction": {"a": 3e38 * x[0], "b": 3e38 * x[0] + x[1]},
    }[bad]
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            balancer.backward(losses)
    else:
        assert balancer.backward(losses).skipped
    assert x.grad is None
    assert_equal_states(state_of(balancer), before)


def test_a_dropped_task_keeps_its_mean() -> None:
    balancer, x = started(nonfinite="drop")
    before = state_of(balancer)
    assert balancer.backward({"a": (x[0] - 1).sqrt(), "b": x[1]}).dropped == ("a",)
    after = state_of(balancer)
    assert_equal_states(
        {k: v for k, v in after.items() if "rows.0/0/" in k},
        {k: v for k, v in before.items() if "rows.0/0/" in k},
    )
    assert after["means.steps.values"].tolist() == [[1, 2]]


def test_a_step_that_a_scaler_skips_leaves_no_trace() -> None:
    balancer, x = started(means={"beta": 0.0})
    before = state_of(balancer)
    scaler = GradScaler(x.device.type, init_scale=4.0)
    for losses in ({"a": 1e38 * x[0], "b": x[1]}, {"a": 8e37 * x[0], "b": 8e37 * x[0] + x[1]}):
        assert balancer.backward(losses, scaler=scaler).overflow
        assert_equal_states(state_of(balancer), before)
    assert not balancer.backward({"a": x[0], "b": x[1]}, scaler=scaler).overflow
    assert state_of(balancer)["means.steps.values"].tolist() == [[2, 2]]


class Failing(UPGrad):
    fails = False

    def weights(self, gramian: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("as asked for")
        return super().weights(gramian)


@pytest.mark.parametrize("error", ["in the strategy", "in the pass", "interrupt"])
def test_an_error_leaves_no_trace(error: str) -> None:
    class Interrupted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            raise KeyboardInterrupt if error == "interrupt" else RuntimeError("as asked for")

    balancer, x = started(Failing)
    before = state_of(balancer)
    balancer.gradient.strategy.fails = error == "in the strategy"
    h = x if error == "in the strategy" else Interrupted.apply(x)
    with pytest.raises(KeyboardInterrupt if error == "interrupt" else RuntimeError):
        balancer.backward({"a": x[0], "b": h[1]})
    assert_equal_states(state_of(balancer), before)
    assert not balancer.gradient.means.rows._changes
    balancer.gradient.strategy.fails = False
    balancer.backward({"a": x[0], "b": x[1]})
    assert state_of(balancer)["means.steps.values"].tolist() == [[2, 2]]


@pytest.mark.parametrize("make", [UPGrad, GradDrop])
def test_where_nobody_looks_nan_is_not_remembered(make: Make) -> None:
    balancer, x = started(make, nonfinite="propagate")
    before = state_of(balancer)
    for bad in (torch.nan, torch.inf):
        x.grad = None
        balancer.backward({"a": x[0] * bad, "b": x[1]})
        assert x.grad is not None
        assert not torch.isfinite(x.grad[0])
        assert_equal_states(state_of(balancer), before)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [UPGrad, lambda: Normalized(TrimmedMean(1)), GradDrop, Sum, RandomGradient]
)
@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize("shared", ["given", "groups", "inferred"])
def test_a_resumed_run_is_the_same_to_the_last_bit(make: Make, recall: bool, shared: str) -> None:
    """Into a Balancer that has made no step, and into one that has."""
    runs = []
    for turn in ("straight", "fresh", "used"):
        torch.manual_seed(0)
        network = Network()

        def balancer_of(network: Network = network) -> Balancer:
            layers = {"one": network.trunk[0], "other": network.trunk[3]}
            given = {"given": network.trunk, "groups": layers, "inferred": None}[shared]
            return Balancer(Equal(), RowMean(make(), 0.8, recall=recall), tasks=TASKS, shared=given)

        balancer = balancer_of()
        for step in range(8):
            if step == 4 and turn != "straight":
                state = saved(dict(balancer.state_dict()))
                balancer = balancer_of()
                if turn == "used":
                    balancer.backward(network.losses(batch(seed=99)))
                balancer.load_state_dict(state)
                assert_equal_states(dict(balancer.state_dict()), state)
            network.zero_grad()
            losses = network.losses(batch(seed=step))
            tasks = TASKS if step == 0 else present(step)
            balancer.backward({task: losses[task] for task in tasks})
        descend(network)
        runs.append({"gradient": balancer.gradient.state_dict(), "model": network.state_dict()})
        if shared == "inferred":  # in another order since it was loaded
            runs[-1] = {"model": network.state_dict()}
    assert_equal_states(runs[1], runs[0])
    assert_equal_states(runs[2], runs[0])


def test_an_inferred_split_that_is_saved_again_before_all_is_found() -> None:
    """Tasks a and b share x, and b and c share y: c comes late, after two loadings."""
    x, y = (nn.Parameter(on_device(torch.ones(2))) for _ in range(2))
    model = nn.ParameterList([x, y])
    assert len(model) == 2

    def losses() -> dict[str, Tensor]:
        return {"a": x[0], "b": x[1] + y[0], "c": 3 * y[1]}

    def balancer() -> Balancer:
        return Balancer(Equal(), RowMean(Sum(), 0.5), tasks=TASKS)

    def only(tasks: str) -> dict[str, Tensor]:
        return {task: loss for task, loss in losses().items() if task in tasks}

    first = balancer()
    first.backward(losses())
    state = saved(dict(first.state_dict()))
    second = balancer()
    second.load_state_dict(state)
    assert_equal_states(dict(second.state_dict()), state)
    second.backward(only("a"))
    third = balancer()
    third.load_state_dict(saved(dict(second.state_dict())))
    x.grad = y.grad = None
    third.backward(only("c"))
    assert y.grad is not None
    assert_close(y.grad, y.new_tensor([0.0, 3.0]))  # of a new mean it would be 1.5 / 0.75
    assert len([key for key in third.state_dict() if "means.rows" in key]) == 4


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), nn.Module.float]
)
def test_casts_leave_means_as_they_are(cast: Callable[[nn.Module], object]) -> None:
    _, balancer = train(RowMean(UPGrad()))
    before = {k: v.clone() for k, v in balancer.state_dict().items()}
    cast(nn.ModuleDict({"balancer": balancer}))
    assert_equal_states(dict(balancer.state_dict()), before)
    alone = RowMean(UPGrad())
    alone.load_state_dict(balancer.gradient.state_dict())
    cast(alone)
    assert_equal_states(alone.state_dict(), balancer.gradient.state_dict())


def test_means_move_with_their_balancer_and_with_rows() -> None:
    balancer, _ = started()
    balancer.to("meta")
    assert {t.device.type for k, t in balancer.state_dict().items() if "rows.0" in k} == {"meta"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda all_: pickle.loads(pickle.dumps(all_))])
def test_copies_are_independent(copied: Callable[[Any], Any]) -> None:
    balancer, x = started()
    twin, y = copied((balancer, x))
    before = state_of(balancer)
    assert_equal_states(state_of(twin), before)
    twin.backward({"a": 5 * y[0], "b": y[1]})
    assert_equal_states(state_of(balancer), before)
    balancer.backward({"a": 5 * x[0], "b": x[1]})
    assert_equal_states(state_of(balancer), state_of(twin))
    assert torch.equal(x.grad, y.grad)


def test_what_is_loaded_is_a_copy() -> None:
    balancer, x = started()
    state = dict(balancer.state_dict())
    other, y = started()
    assert x is not y
    other.load_state_dict(state)
    before = {key: value.clone() for key, value in state.items()}
    other.backward({"a": y[0], "b": 7 * y[1]})
    assert_equal_states(dict(balancer.state_dict()), before)


@pytest.mark.filterwarnings("ignore:no loss reaches:UserWarning")
def test_what_has_not_been_made_is_saved_as_nothing() -> None:
    """A fresh state has the shape of a trained one; unreached parameters get no gradient of it."""
    x, y = (nn.Parameter(on_device(torch.ones(2))) for _ in range(2))

    def balancer() -> Balancer:
        return Balancer(Equal(), RowMean(UPGrad()), tasks=("a", "b"), shared=[x, y])

    first = balancer()
    fresh = dict(first.state_dict())
    first.backward({"a": x[0]})
    state = saved(dict(first.state_dict()))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in fresh.items()}
    assert state["gradient.means.rows.made"].tolist() == [[1, 0], [0, 0]]
    second = balancer()
    second.load_state_dict(state)
    assert_equal_states(dict(second.state_dict()), state)
    for each in (first, second):
        x.grad = None
        each.backward({"a": x[0], "b": x[1]})
        assert y.grad is None
    alone = RowMean(UPGrad())  # which does not know the parameters
    alone.load_state_dict(first.gradient.state_dict())
    assert_equal_states(alone.state_dict(), first.gradient.state_dict())


def test_a_reset_forgets() -> None:
    balancer, x = started()
    balancer.reset()
    fresh = Balancer(Equal(), RowMean(UPGrad()), tasks=("a", "b"), shared=[x])
    assert_equal_states(dict(balancer.state_dict()), dict(fresh.state_dict()))
    balancer.backward({"a": 2 * x[0], "b": x[1]})
    assert x.grad is not None
    assert_close(x.grad, x.new_tensor([2, 1]))


def _damaged(state: dict[str, Any]) -> None:
    state["gradient.means.rows.0/1/0/parameter"][0] = torch.nan


def _of_another_shape(state: dict[str, Any]) -> None:
    state["gradient.means.rows.0/1/0/parameter"] = torch.zeros(3)


def _of_another_parameter(state: dict[str, Any]) -> None:
    state["gradient.means.rows.0/1/weight"] = torch.zeros(2)


def _of_another_task(state: dict[str, Any]) -> None:
    state["gradient.means.rows.0/2/0/parameter"] = torch.zeros(2)


def _whole_numbers(state: dict[str, Any]) -> None:
    state["gradient.means.rows.0/1/0/parameter"] = torch.zeros(2, dtype=torch.long)


def _of_more_parameters(state: dict[str, Any]) -> None:
    state["gradient.means.rows.made"] = torch.ones(2, 2, dtype=torch.uint8)


def _without_a_place(state: dict[str, Any]) -> None:
    state["gradient.means.rows.means"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_damaged, "must hold finite numbers, but '0.parameter' of group number 0 does not"),
        (_of_another_shape, r"has shape \(3,\), and the parameter \(2,\)"),
        (_of_another_parameter, "has 'weight' of group number 0, which is none of them"),
        (_of_another_task, "must belong to 2 tasks, but has one of task number 2"),
        (_whole_numbers, "must be tensors of floating-point numbers"),
        (_without_a_place, "as 'means'"),
        (_of_more_parameters, "must belong to 1 parameters and 2 tasks, but got tensor"),
    ],
)
def test_damaged_states_are_refused_as_a_whole(
    spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    balancer, _ = started()
    state = copy.deepcopy(dict(balancer.state_dict()))
    spoil(state)
    other, _ = started()
    other.reset()
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state)
    assert_equal_states(dict(other.state_dict()), before)


# --- what does not go together --------------------------------------------------------------------


def test_features_and_every_are_refused() -> None:
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"`every` must be 1 with RowMean, but got 3\. It av"):
        Balancer(Equal(), RowMean(UPGrad()), tasks=("a", "b"), shared=[x], every=3)
    balancer = Balancer(Equal(), RowMean(UPGrad()), tasks=("a", "b"), shared=[x])
    h = 2 * x
    with pytest.raises(ValueError, match=r"`features` must be None with RowMean, but got tensors"):
        balancer.backward({"a": h[0], "b": h[1]}, features=h)


def test_a_strategy_belongs_to_one_balancer() -> None:
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    strategy = RowMean(UPGrad())
    Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x])
    with pytest.raises(RuntimeError, match="must belong to one Balancer, but is in two"):
        Balancer(Equal(), strategy, tasks=("a", "b"), shared=[y])


def test_the_peak_is_rows_and_means() -> None:
    """While directions are made, there is no second copy of what is remembered."""
    alive: list[int] = []

    class Looking(UPGrad):
        def weights(self, gramian: Tensor) -> Tensor:
            big = {
                t.untyped_storage().data_ptr(): t.numel()
                for t in gc.get_objects()
                if type(t) in (Tensor, nn.Parameter) and t.numel() >= 1000
            }
            alive.append(len(big))
            return super().weights(gramian)

    x = nn.Parameter(torch.ones(1000))
    balancer = Balancer(Equal(), RowMean(Looking()), tasks=("a", "b"), shared=[x])
    for _ in range(3):
        x.grad = None
        balancer.backward({"a": x.sum(), "b": x.square().sum()})
    assert alive[2] - alive[0] == 2
