"""What gradient strategies remember: per task and group, and only of steps that count."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mtbalance import Balancer
from mtbalance.gradient import (
    DBMTL,
    PCD,
    GradientStrategy,
    GradVac,
    GramianStrategy,
    MoCo,
    RowMean,
    Smoothed,
    UPGrad,
)
from mtbalance.weighting import Equal
from tests._catalogue import GradientCase, gradient_cases
from tests._device import on_device

TASKS = ("a", "b", "c")
Cast = Callable[[nn.Module], object]
IN_CATALOGUE = (
    GradVac,
    lambda: PCD(0, beta=0.5),
    lambda: Smoothed(UPGrad(), 0.5),
    lambda: Smoothed(GradVac(), 0.5),
    lambda: RowMean(GradVac(), beta=0.0),
    lambda: DBMTL(0.0),
    lambda: MoCo(1.0),
)


class Counting(GramianStrategy):
    """Weighs each task by how often it has had a row before, once more."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = self.per_task()
        self.met = self.per_task(pairs=True)
        self.fails = False

    def weights(self, gramian: Tensor) -> Tensor:
        counts, met = self.counts.read(gramian) + 1, self.met.read(gramian) + 1
        self.counts.write(counts)
        self.met.write(met)
        if self.fails and self.counts.group:
            raise RuntimeError("as asked for")
        return counts


class Columns(GradientStrategy):
    """The same of whole rows."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = self.per_task()

    def forward(self, gradients: Tensor) -> Tensor:
        counts = self.counts.read(gradients) + 1
        self.counts.write(counts)
        return counts.to(gradients) @ gradients


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    one, other = (nn.Parameter(on_device(torch.ones(3, dtype=torch.float64))) for _ in range(2))
    return one, other


def in_two_groups(
    strategy: GradientStrategy, **options: Any
) -> tuple[Balancer, nn.Parameter, nn.Parameter]:
    one, other = parameters()
    shared = {"one": [one], "other": [other]}
    return Balancer(Equal(), strategy, tasks=TASKS, shared=shared, **options), one, other


def losses_of(x: Tensor, tasks: str) -> dict[str, Tensor]:
    """Task i has the gradient of one in coordinate i."""
    return {task: x[TASKS.index(task)] for task in tasks}


def everything(strategy: nn.Module) -> dict[str, list[Any]]:
    return {name: buffer.tolist() for name, buffer in strategy.named_buffers()}


@pytest.mark.parametrize("kind", [Counting, Columns])
def test_groups_and_absent_tasks(kind: type[Any]) -> None:
    """Each group counts for itself, and only the tasks that are there and reach it."""
    strategy = kind()
    balancer, one, other = in_two_groups(strategy)
    balancer.backward({t: loss + other[0] for t, loss in losses_of(one, "abc").items()})
    balancer.backward(losses_of(one, "ca"))
    one.grad = other.grad = None
    balancer.backward({**losses_of(one, "c"), "b": one[1] + 5 * other[2]})
    assert strategy.counts.values.tolist() == [[2, 2, 3], [1, 2, 2]]
    assert one.grad is not None
    assert one.grad.tolist() == [0, 2, 3]
    assert other.grad is not None
    assert other.grad.tolist() == [0, 0, 10]


def test_pairs_of_tasks() -> None:
    strategy = Counting()
    balancer, one, other = in_two_groups(strategy)
    for tasks in ("abc", "ca", "b"):
        balancer.backward({t: x + other[0] for t, x in losses_of(one, tasks).items()})
    assert strategy.met.values.tolist() == [[[2, 1, 2], [1, 2, 1], [2, 1, 2]]] * 2


def test_tasks_in_another_order_and_one_by_one() -> None:
    strategy = Counting()
    with strategy.bind(TASKS).only(torch.tensor([2, 0])):
        assert strategy(on_device(torch.eye(2))).tolist() == [1, 1]
    with strategy.only(torch.tensor([2])):
        assert strategy(on_device(torch.eye(1))).tolist() == [2]
    assert strategy.counts.values.tolist() == [[1, 0, 2]]
    assert strategy(on_device(torch.eye(3))).tolist() == [2, 1, 3]


def test_features_are_the_first_group() -> None:
    strategy = Counting()
    balancer, one, other = in_two_groups(strategy)
    h = one * other
    balancer.backward(losses_of(h, "ab"), features=h)
    assert strategy.counts.values.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_micro_batches_count_once() -> None:
    strategy = Counting()
    balancer, one, _ = in_two_groups(strategy)
    balancer.accumulate(losses_of(one, "ab"))
    balancer.accumulate(losses_of(one, "a"))
    balancer.apply()
    assert strategy.counts.values.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_only_steps_that_solve_count() -> None:
    strategy = Counting()
    balancer, one, _ = in_two_groups(strategy, every=3)
    reused = [balancer.backward(losses_of(one, "ab")).reused for _ in range(7)]
    assert reused == [False, True, True, False, True, True, False]
    assert strategy.counts.values.tolist() == [[3, 3, 0], [0, 0, 0]]


# --- steps that write nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [Counting, *IN_CATALOGUE])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_direction_that_is_not_written_leaves_no_trace(make: Any, policy: str) -> None:
    """Two rows of 3e38 are finite, and their sum is not."""
    x = nn.Parameter(on_device(torch.ones(2)))
    strategy = make()
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x], nonfinite=policy)
    balancer.backward({"a": x[0] + x[1], "b": x[0] + 3 * x[1]})
    before = everything(strategy)
    assert before != everything(make().bind(("a", "b")))
    x.grad = None
    losses = {"a": 3e38 * x[0], "b": 3e38 * x[0] + x[1]}
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            balancer.backward(losses)
    else:
        assert balancer.backward(losses).skipped
    assert x.grad is None
    assert everything(strategy) == before


def test_a_step_that_a_scaler_skips_leaves_no_trace() -> None:
    x = nn.Parameter(on_device(torch.ones(2)))
    strategy = Counting()
    balancer = Balancer(Equal(), strategy, tasks=("a", "b"), shared=[x])
    scaler = GradScaler(x.device.type, init_scale=4.0)
    losses = {"a": 8e37 * x[0], "b": 8e37 * x[0] + x[1]}
    assert balancer.backward(losses, scaler=scaler).overflow
    assert strategy.counts.values.tolist() == [[0, 0]]
    assert not balancer.backward({"a": x[0], "b": x[1]}, scaler=scaler).overflow
    assert strategy.counts.values.tolist() == [[1, 1]]


def test_an_error_leaves_no_trace() -> None:
    """Also of the group that came before the one with the error."""
    strategy = Counting()
    balancer, one, other = in_two_groups(strategy)
    strategy.fails = True
    with pytest.raises(RuntimeError, match="as asked for"):
        balancer.backward({t: loss + other[0] for t, loss in losses_of(one, "abc").items()})
    assert strategy.counts.values.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert strategy.counts.group == 0


@pytest.mark.parametrize("make", IN_CATALOGUE)
@pytest.mark.parametrize("m", [2, 3])
def test_what_is_not_finite_is_not_remembered(make: Any, m: int) -> None:
    """Nor where nobody looks, and it comes out as NaN."""
    x = nn.Parameter(on_device(torch.ones(3, dtype=torch.float64)))
    strategy = make()
    balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=[x], nonfinite="propagate")

    def losses() -> dict[str, Tensor]:
        return {task: x[i] + 2 * x[0] for i, task in enumerate(TASKS[:m])}

    balancer.backward(losses())
    before = {name: buffer.clone() for name, buffer in strategy.named_buffers()}
    for bad in (torch.nan, torch.inf):
        x.grad = None
        balancer.backward({**losses(), "a": x[0] * bad})
        assert x.grad is not None
        assert not torch.isfinite(x.grad[0])
        for name, buffer in strategy.named_buffers():
            assert torch.equal(buffer.nan_to_num(-7), before[name].nan_to_num(-7))


@gradient_cases()
def test_who_remembers_nothing_is_asked_nothing(case: GradientCase) -> None:
    """Buffers are copied in each step where there are any."""
    strategy = case.make()
    assert strategy.remembers == bool(list(strategy.buffers()))
    remembers = (
        "DBMTL",
        "GradVac",
        "MoCo",
        "MoDo",
        "PCD",
        "RowMean",
        "SDMGrad",
        "Smoothed",
    )
    assert strategy.remembers == case.name.startswith(remembers)


# --- state ----------------------------------------------------------------------------------------


def trained(strategy: GradientStrategy) -> tuple[Balancer, nn.Parameter, nn.Parameter]:
    balancer, one, other = in_two_groups(strategy)
    for tasks in ("abc", "ac"):
        balancer.backward({t: 3 * x + other[0] for t, x in losses_of(one * one, tasks).items()})
    return balancer, one, other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda all_: pickle.loads(pickle.dumps(all_))])
def test_copies_are_independent(copied: Callable[[Any], Any]) -> None:
    balancer, one, other = trained(Counting())
    twin, _, _ = copied((balancer, one, other))
    before = everything(twin)
    assert before == everything(balancer)
    balancer.backward(losses_of(one, "ab"))
    assert everything(twin) == before
    twin.gradient.bind(TASKS, 2)
    with twin.gradient.only(torch.tensor([1]), 1):
        twin.gradient(on_device(torch.eye(1)))
    assert twin.gradient.counts.values.tolist() == [[2, 1, 2], [2, 2, 2]]


@pytest.mark.parametrize("make", [Counting, *IN_CATALOGUE])
@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), nn.Module.float]
)
def test_casts_leave_it_as_it_is(make: Any, cast: Cast) -> None:
    balancer, *_ = trained(make())
    before = everything(balancer.gradient)
    cast(nn.ModuleDict({"balancer": balancer}))
    for buffer in balancer.gradient.buffers():
        assert buffer.dtype == torch.float64
    assert str(everything(balancer.gradient)) == str(before)


def test_a_reset_forgets_it() -> None:
    balancer, *_ = trained(Counting())
    balancer.reset()
    assert everything(balancer.gradient) == everything(in_two_groups(Counting())[0].gradient)


def test_what_is_loaded_replaces_it() -> None:
    balancer, one, _ = trained(Counting())
    state = copy.deepcopy(balancer.state_dict())
    balancer.backward(losses_of(one, "b"))
    other, *_ = in_two_groups(Counting())
    for each in (balancer, other):
        each.load_state_dict(state)
        assert each.gradient.counts.values.tolist() == [[2, 1, 2], [2, 1, 2]]
    fresh = in_two_groups(Counting())[0].state_dict()
    balancer.load_state_dict(fresh)
    assert balancer.gradient.counts.values.tolist() == [[0, 0, 0], [0, 0, 0]]


def _first_wrong(state: dict[str, Any]) -> None:
    state["gradient.counts.values"][1, 2] = torch.nan


def _of_one_group(state: dict[str, Any]) -> None:
    state["gradient.met.values"] = state["gradient.met.values"][:1]


def _whole_numbers(state: dict[str, Any]) -> None:
    state["gradient.met.values"] = state["gradient.met.values"].long()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_first_wrong, r"must hold finite numbers in 1 \+ 1 dimensions, but got \[\[2"),
        (_of_one_group, r"must belong to 3 tasks in 2 groups .* but has shape \(1, 3, 3\)"),
        (_whole_numbers, "must be a tensor of floating-point numbers"),
    ],
)
def test_damaged_states_are_refused_as_a_whole(
    spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    state = copy.deepcopy(dict(trained(Counting())[0].state_dict()))
    spoil(state)
    balancer, *_ = in_two_groups(Counting())
    before = everything(balancer)
    with pytest.raises(ValueError, match=words):
        balancer.load_state_dict(state)
    assert everything(balancer) == before


def test_states_of_who_remembers_nothing() -> None:
    """What is missing is an error, as everywhere in PyTorch, but with ``strict=False``."""
    state = in_two_groups(UPGrad())[0].state_dict()
    balancer, *_ = in_two_groups(Counting())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "gradient.counts.'):
        balancer.load_state_dict(state)
    balancer.load_state_dict(state, strict=False)
    assert balancer.gradient.counts.values.tolist() == [[0, 0, 0], [0, 0, 0]]


# --- alone ----------------------------------------------------------------------------------------


def test_alone_the_first_rows_bind() -> None:
    strategy = Counting()
    eye = on_device(torch.eye(2))
    assert [strategy(eye).tolist() for _ in range(2)] == [[1, 1], [2, 2]]
    with pytest.raises(ValueError, match="one row for each of the 2 tasks that the strategy rem"):
        strategy(on_device(torch.eye(3)))
    strategy.reset()
    assert strategy(on_device(torch.eye(3))).tolist() == [1, 1, 1]


def test_alone_a_state_binds() -> None:
    first, second, empty = Counting(), Counting(), Counting()
    eye = on_device(torch.eye(3))
    first(eye)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(eye), first(eye))
    first.load_state_dict(empty.state_dict())  # saved before it had been used
    assert first(eye).tolist() == [1, 1, 1]


def test_it_belongs_to_one_set_of_tasks_and_groups() -> None:
    strategy = Counting().bind(TASKS, 2)
    strategy.bind(TASKS, 2)
    for tasks, groups in ((("a", "b"), 2), (TASKS, 1)):
        with pytest.raises(RuntimeError, match="must belong to one set of tasks and groups"):
            strategy.bind(tasks, groups)
