"""What is true of ExcessMTL alone; what holds for every weighting is in test_contract.py."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import PCGrad, RowMean, Sum
from mtbalance.weighting import ExcessMTL, WarmUp
from tests._device import on_device
from tests._networks import TASKS, Network, batch, raw_rows
from tests.test_state import assert_equal_states, saved


def test_two_steps_by_hand() -> None:
    """e of task a: 1/1, then 9 / sqrt(10); of task b 5, then 25 / sqrt(50); w = exp(e / e0)."""
    w = nn.Parameter(on_device(torch.tensor(2.0, dtype=torch.float64)))
    balancer = Balancer(ExcessMTL(lr=1.0), Sum(), tasks=("a", "b"), shared=[w])
    assert [float(x) for x in balancer.backward({"a": w, "b": 5 * w}).weights.values()] == [1, 1]
    record = balancer.backward({"a": 3 * w, "b": 5 * w})
    one, other = math.exp(9 / math.sqrt(10)), math.exp(5 / math.sqrt(50))
    expected = [2 * one / (one + other), 2 * other / (one + other)]
    assert [float(x) for x in record.weights.values()] == pytest.approx(expected, rel=1e-14)


class Oracle:
    """The loop of the paper on whole vectors, in long double, with the skips of the docstring."""

    def __init__(self, m: int, lr: float) -> None:
        self.lr = np.longdouble(lr)
        self.squares: dict[int, np.ndarray] = {}
        self.first: dict[int, Any] = {}
        self.weights = np.ones(m, dtype=np.longdouble)

    def step(self, rows: dict[int, np.ndarray]) -> np.ndarray:
        moved = {}
        for task, row in rows.items():
            g = row.astype(np.longdouble)
            self.squares[task] = self.squares.get(task, 0 * g) + g**2
            some = self.squares[task] > 0
            excess = (g[some] ** 2 / np.sqrt(self.squares[task][some])).sum()
            if self.first.get(task, 0) > 0:
                moved[task] = self.weights[task] * np.exp(self.lr * excess / self.first[task])
            else:
                self.first[task] = excess
        if moved:
            own = list(moved)
            new = np.array([moved[task] for task in own])
            self.weights[own] = self.weights[own].sum() * new / new.sum()
        shown = self.weights[list(rows)]
        return np.asarray(len(shown) * shown / shown.sum(), dtype=float)


def present(step: int) -> list[int]:
    return [i for i in range(3) if step in (0, 1) or (step + i) % 4]


@pytest.mark.parametrize("lr", [0.01, 1.0])
@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize("options", [{}, {"scale": 512.0}, {"micro": True}, {"chunk": 3}], ids=str)
@pytest.mark.parametrize("shared", ["given", "groups", "inferred"])
def test_the_loop_of_the_paper(
    lr: float, absent: bool, options: dict[str, Any], shared: str
) -> None:
    torch.manual_seed(0)
    network = Network()
    trunk = list(network.trunk.parameters())
    layers = {"one": network.trunk[0], "other": network.trunk[3]}
    options = dict(options)
    scale, micro = options.pop("scale", None), options.pop("micro", False)
    device = trunk[0].device.type
    scaler = GradScaler(device, init_scale=scale) if scale else None
    balancer = Balancer(
        ExcessMTL(lr),
        PCGrad(),
        tasks=TASKS,
        shared={"given": network.trunk, "groups": layers, "inferred": None}[shared],
        **options,
    )
    oracle = Oracle(3, lr)
    for step in range(8):
        network.zero_grad()
        here = present(step) if absent else range(3)
        losses = network.losses(batch(seed=step))
        losses = {TASKS[i]: losses[TASKS[i]] for i in here}
        rows = raw_rows(losses, trunk).cpu().numpy()
        expected = oracle.step(dict(zip(here, rows, strict=True)))
        if micro:
            for half in batch(seed=step).chunk(2):
                some = network.losses(half)
                balancer.accumulate({TASKS[i]: some[TASKS[i]] / 2 for i in here})
            record = balancer.apply()
        else:
            record = balancer.backward(losses, scaler=scaler)
        weights = [float(weight) for weight in record.weights.values()]
        assert weights == pytest.approx(list(expected), rel=1e-12)


def test_weights_are_those_of_what_is_balanced_alone() -> None:
    """A head's gradient does not count."""
    found = []
    for factor in (1.0, 100.0):
        x, head = (nn.Parameter(on_device(torch.ones(1))) for _ in range(2))
        balancer = Balancer(ExcessMTL(1.0), Sum(), tasks=("a", "b"), shared=[x])
        for step in range(3):
            record = balancer.backward(
                {"a": x[0] * (step + 1) + factor**step * head[0], "b": 2 * x[0]}
            )
        found.append([float(weight) for weight in record.weights.values()])
        assert len([key for key in balancer.state_dict() if "roots.0" in key]) == 2
    assert found[0] == found[1]


def balancer_of(x: nn.Parameter, **options: Any) -> Balancer:
    return Balancer(ExcessMTL(1.0), Sum(), tasks=("a", "b"), shared=[x], **options)


def step_of(x: Tensor, a: Sequence[float], b: Sequence[float]) -> dict[str, Tensor]:
    return {t: (x * x.new_tensor(row)).sum() for t, row in (("a", a), ("b", b))}


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-8, 1e4, 1e19, 1e36])
def test_the_size_of_gradients_does_not_matter(size: float) -> None:
    """In float32, which does not hold their squares."""
    weights = []
    for factor in (1.0, size):
        x = nn.Parameter(on_device(torch.ones(2)))
        balancer = balancer_of(x)
        for a in ((1.0, 0.0), (2.0, 1.0), (0.5, 0.0)):
            losses = step_of(factor * x, a, (0.25, -2.0))
            record = balancer.backward(losses)
        weights.append(torch.stack(list(record.weights.values())).double())
    assert_close(weights[0], weights[1], rtol=1e-5, atol=0)


def test_a_task_without_a_first_gradient_waits_for_one() -> None:
    """Its weight, and its share in the sum, stay until then."""
    x = nn.Parameter(on_device(torch.ones(2, dtype=torch.float64)))
    balancer = Balancer(ExcessMTL(1.0), Sum(), tasks=TASKS, shared=[x])
    oracle = Oracle(3, 1.0)
    rows = [
        [(0.0, 0.0), (1.0, 1.0), (2.0, 1.0)],
        [(0.0, 0.0), (2.0, 1.0), (2.0, 3.0)],
        [(1.0, 0.0), (2.0, 0.0), (2.0, 3.0)],
        [(3.0, 0.0), (0.0, 0.0), (2.0, 3.0)],
    ]
    for step in rows:
        losses = {t: (x * x.new_tensor(r)).sum() for t, r in zip(TASKS, step, strict=True)}
        record = balancer.backward(losses)
        expected = oracle.step({i: np.array(row) for i, row in enumerate(step)})
        weights = [float(weight) for weight in record.weights.values()]
        assert weights == pytest.approx(list(expected), rel=1e-13)
    assert oracle.weights[0] != 1


def test_one_task() -> None:
    x = nn.Parameter(on_device(torch.ones(2)))
    balancer = Balancer(ExcessMTL(1.0), Sum(), tasks=["a"], shared=[x])
    for factor in (1.0, 3.0):
        assert float(balancer.backward({"a": factor * x.sum()}).weights["a"]) == 1


def test_after_a_warm_up() -> None:
    """It begins when its weights have an effect, as in its first step."""
    found = []
    for epochs in (None, 0, 1):
        x = nn.Parameter(on_device(torch.ones(2)))
        inner = ExcessMTL(1.0)
        weighting = inner if epochs is None else WarmUp(inner, epochs)
        balancer = Balancer(weighting, Sum(), tasks=("a", "b"), shared=[x])
        if epochs:
            balancer.backward(step_of(x, (5.0, 3.0), (1.0, 7.0)))
            balancer.end_epoch()
        for a in ((1.0, 0.0), (2.0, 1.0), (0.5, 0.0)):
            record = balancer.backward(step_of(x, a, (0.25, -2.0)))
        found.append([float(weight) for weight in record.weights.values()])
    assert found[0] == found[1] == found[2]


# --- what is remembered ---------------------------------------------------------------------------


def state_of(balancer: Balancer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in balancer.weighting.state_dict().items()}


def started(**options: Any) -> tuple[Balancer, nn.Parameter]:
    x = nn.Parameter(on_device(torch.ones(2)))
    balancer = balancer_of(x, **options)
    for a in ((1.0, 1.0), (2.0, -1.0)):
        balancer.backward(step_of(x, a, (1.0, 2.0)))
    x.grad = None
    return balancer, x


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("bad", ["gradient", "direction"])
def test_a_step_that_is_not_written_leaves_no_trace(policy: str, bad: str) -> None:
    balancer, x = started(nonfinite=policy)
    before = state_of(balancer)
    losses = {
        "gradient": {"a": (x[0] - 1).sqrt(), "b": x[1]},
        "direction": {"a": 3e38 * x[0], "b": 3e38 * x[0]},
    }[bad]
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            balancer.backward(losses)
    else:
        assert balancer.backward(losses).skipped
    assert_equal_states(state_of(balancer), before)
    assert not balancer.weighting.roots._changes


def test_a_step_that_a_scaler_skips_leaves_no_trace() -> None:
    balancer, x = started()
    before = state_of(balancer)
    scaler = GradScaler(x.device.type, init_scale=4.0)
    assert balancer.backward(step_of(x, (1e38, 0), (1, 1)), scaler=scaler).overflow
    assert_equal_states(state_of(balancer), before)


def test_an_error_leaves_no_trace() -> None:
    class Failing(Sum):
        is_sum = False

        def coefficients(self, gramian: Tensor) -> Tensor | None:
            raise RuntimeError("as asked for")

    balancer, x = started()
    before = state_of(balancer)
    balancer.gradient = Failing()
    with pytest.raises(RuntimeError, match="as asked for"):
        balancer.backward(step_of(x, (3, 0), (1, 1)))
    assert_equal_states(state_of(balancer), before)


@pytest.mark.filterwarnings("ignore:ExcessMTL fell back:RuntimeWarning")
def test_where_nobody_looks_nan_is_not_remembered() -> None:
    balancer, x = started(nonfinite="propagate")
    before = state_of(balancer)
    record = balancer.backward({"a": torch.nan * x[0], "b": x[1]})
    assert record.fallbacks == 1
    assert_equal_states(state_of(balancer), before)


def test_in_evaluation_mode_nothing_moves() -> None:
    balancer, x = started()
    before = state_of(balancer)
    balancer.eval()
    balancer.backward(step_of(x, (3, 0), (1, 1)))
    assert_equal_states(state_of(balancer), before)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("shared", ["given", "groups", "inferred"])
def test_a_resumed_run_is_the_same_to_the_last_bit(wrapped: bool, shared: str) -> None:
    def make() -> Any:
        return WarmUp(ExcessMTL(0.5), epochs=1) if wrapped else ExcessMTL(0.5)

    ends = []
    for turn in ("straight", "fresh", "used"):
        torch.manual_seed(0)
        network = Network()
        layers = {"one": network.trunk[0], "other": network.trunk[3]}
        given = {"given": network.trunk, "groups": layers, "inferred": None}[shared]
        # Together with means of rows, which are saved beside it.
        balancer = Balancer(make(), RowMean(PCGrad()), tasks=TASKS, shared=given)
        for step in range(8):
            if step == 5 and turn != "straight":
                state = saved(dict(balancer.state_dict()))
                balancer = Balancer(make(), RowMean(PCGrad()), tasks=TASKS, shared=given)
                if turn == "used":
                    balancer.backward(network.losses(batch(seed=77)))
                balancer.load_state_dict(state)
                assert_equal_states(dict(balancer.state_dict()), state)
            network.zero_grad()
            losses = network.losses(batch(seed=step))
            here = present(step)
            record = balancer.backward({TASKS[i]: losses[TASKS[i]] for i in here})
            if step == 1:
                balancer.end_epoch()
        ends.append({**record.weights, "grad": network.trunk[0].weight.grad})
    assert_equal_states(ends[1], ends[0])
    assert_equal_states(ends[2], ends[0])
    assert len({float(weight) for weight in record.weights.values()}) > 1


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_casts_leave_it_as_it_is(cast: Callable[[nn.Module], object]) -> None:
    balancer, _ = started()
    before = state_of(balancer)
    cast(nn.ModuleList([balancer]))
    assert_equal_states(state_of(balancer), before)
    assert {t.dtype for key, t in before.items() if "roots.0" in key} == {torch.float32}


def test_copies_and_resets() -> None:
    balancer, x = started()
    twin, y = copy.deepcopy((balancer, x))
    for each, parameter in ((balancer, x), (twin, y)):
        each.backward(step_of(parameter, (3, 0), (1, 1)))
    assert_equal_states(state_of(balancer), state_of(twin))
    balancer.reset()
    assert_equal_states(state_of(balancer), state_of(balancer_of(x)))


def test_complex_parameters() -> None:
    """Real and imaginary parts are coordinates of their own."""
    weights = []
    for complex_ in (True, False):
        z = on_device(torch.ones(2, dtype=torch.float64))
        z = nn.Parameter(torch.view_as_complex(z.reshape(1, 2)) if complex_ else z)
        balancer = Balancer(ExcessMTL(1.0), Sum(), tasks=("a", "b"), shared=[z])
        for a in ((1.0, 1.0), (2.0, -1.0), (0.5, 3.0)):
            parts = torch.view_as_real(z).reshape(-1) if complex_ else z
            record = balancer.backward(step_of(parts, a, (1.0, 2.0)))
        weights.append([float(weight) for weight in record.weights.values()])
    assert weights[0] == pytest.approx(weights[1], rel=1e-14)


def test_options() -> None:
    assert repr(ExcessMTL()).startswith("ExcessMTL(\n  lr=0.01\n")
    with pytest.raises(ValueError, match="`lr` must be at least 0"):
        ExcessMTL(-1.0)
