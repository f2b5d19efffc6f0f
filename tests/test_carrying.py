"""A saved state for other tasks, against Balancers whose task was absent, or there, all along."""

import copy
import json
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer, with_tasks
from mtbalance._factory import GRADIENTS, WEIGHTINGS
from mtbalance.gradient import (
    CAGrad,
    GradientStrategy,
    GradVac,
    MoCo,
    RowMean,
    Smoothed,
    Sum,
)
from mtbalance.weighting import (
    DWA,
    STCH,
    Equal,
    ExcessMTL,
    GradNorm,
    Uncertainty,
    WarmUp,
    Weighting,
)
from tests._networks import Network, batch, gradients

FOUR = ("a", "b", "c", "d")
LEFT_OUT = {"Constant", "COSMOS", "PBI"}  # which want a number per task, and remember nothing
Make = Callable[[Sequence[str], Network], Balancer]


def named(name: str) -> Make:
    def make(tasks: Sequence[str], model: Network, **rest: Any) -> Balancer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options: dict[str, Any] = {"byzantine": 0, "trim": 1, "optimizer": optimizer}
        if name in ("gradientcosine", "pcd"):
            options["primary"] = "a"
        return make_balancer(name, tasks=tasks, **{"shared": model.trunk, **options, **rest})

    return make


def pair(weighting: Callable[[], Weighting], gradient: Callable[[], Any], **options: Any) -> Make:
    def make(tasks: Sequence[str], model: Network, **rest: Any) -> Balancer:
        given = {"shared": model.trunk, **options, **rest}
        return Balancer(weighting(), gradient(), tasks=tasks, **given)

    return make


def groups(tasks: Sequence[str], model: Network, **rest: Any) -> Balancer:
    shared = {"first": model.trunk[0], "second": model.trunk[3]}
    return Balancer(ExcessMTL(), RowMean(GradVac(0.3), 0.5), tasks=tasks, shared=shared, **rest)


MAKES: dict[str, Make] = {
    **{
        kind.__name__: named(name)
        for name, kind in {**WEIGHTINGS, **GRADIENTS}.items()
        if kind.__name__ not in LEFT_OUT
    },
    "both": named("imtl"),
    "wrapped": pair(lambda: WarmUp(STCH(), 1), lambda: RowMean(Smoothed(CAGrad(), 0.5), 0.5)),
    "warm": pair(lambda: WarmUp(GradNorm(), 1), lambda: GradVac(0.3)),
    "inferred": pair(ExcessMTL, lambda: MoCo(), shared=None),
    "groups": groups,
    "kept": pair(Uncertainty, CAGrad, every=4),
    "recall": pair(DWA, lambda: RowMean(CAGrad(), 0.5, recall=True)),
}
pytestmark = pytest.mark.filterwarnings("ignore:no step of this epoch", "ignore:.*fallback")
CASES = pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))


def model_of(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(FOUR)


def losses_of(model: Network, tasks: Collection[str], seed: int) -> dict[str, Tensor]:
    return {t: loss for t, loss in model.losses(batch(seed=seed)).items() if t in tasks}


def train(
    balancer: Balancer, model: Network, presents: Sequence[Sequence[str]], seed: int = 0
) -> Iterator[dict[str, Tensor | None]]:
    """Take a step with each of these sets of tasks, two in an epoch, and yield gradients."""
    for number, present in enumerate(presents, seed):
        losses = model.losses(batch(seed=number))
        model.zero_grad()
        balancer.zero_grad()
        chosen = {task: losses[task] for task in balancer.tasks if task in present}
        rest: dict[str, Any] = {}
        if balancer.weighting.needs_validation:
            rest["validation"] = partial(losses_of, model, present, 77)
        count = max(balancer.gradient.further_batches, default=0)
        if count:
            rest["batches"] = [partial(losses_of, model, chosen, 100 + n) for n in range(count)]
        balancer.backward(chosen, **rest)
        yield gradients(model)
        with torch.no_grad():
            for parameter in [*model.parameters(), *balancer.parameters()]:
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
        after = model.losses(batch(seed=number))
        balancer.after_step({task: after[task] for task in chosen})
        if number % 2:
            balancer.end_epoch()


def alike(one: Sequence[Any], two: Sequence[Any], tolerance: float = 1e-10) -> None:
    for first, second in zip(one, two, strict=True):
        assert_close(first, second, rtol=tolerance, atol=tolerance)


def same_state(one: Balancer, two: Balancer) -> None:
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name == "_extra_state":
            assert content(value) == content(theirs[name])
        else:
            assert_close(value, theirs[name], rtol=1e-10, atol=1e-12, msg=name, equal_nan=True)


def content(state: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(state.tolist()))
    if found["split"]:
        found["split"] = sorted(found["split"], key=str)
    return found


# A draw of RandomWeighting is of as many numbers as there are tasks.
STEPWISE = pytest.mark.parametrize(
    "make",
    [make for name, make in MAKES.items() if name != "RandomWeighting"],
    ids=[name for name in MAKES if name != "RandomWeighting"],
)
STEPS = [("a", "b", "c"), ("a", "b"), ("a", "b", "c"), ("c", "b", "a"), ("a", "b", "c")]


@STEPWISE
def test_a_new_task_is_as_one_absent_all_along(make: Make) -> None:
    model, other = model_of(), model_of()
    three, four = make(FOUR[:3], model), make(FOUR, other)
    alike(list(train(three, model, STEPS)), list(train(four, other, STEPS)))
    new = make(FOUR, model)
    new.load_state_dict(with_tasks(three.state_dict(), new))
    same_state(new, four)
    later = [FOUR, FOUR, ("a", "d"), FOUR]
    alike(list(train(new, model, later, 5)), list(train(four, other, later, 5)))
    same_state(new, four)


@pytest.mark.parametrize(
    "make",
    [make for name, make in MAKES.items() if name not in ("RandomWeighting", "recall")],
    ids=[name for name in MAKES if name not in ("RandomWeighting", "recall")],
)
def test_a_removed_task_is_as_one_absent_from_now_on(make: Make) -> None:
    model, other = model_of(), model_of()
    steps = [FOUR[:3], FOUR, FOUR, FOUR, FOUR]
    four, absent = make(FOUR, model), make(FOUR, other)
    alike(list(train(four, model, steps)), list(train(absent, other, steps)))
    new = make(("a", "b", "d"), model)
    new.load_state_dict(with_tasks(four.state_dict(), new))
    later = [("a", "b", "d")] * 4
    alike(list(train(new, model, later, 5)), list(train(absent, other, later, 5)))


def test_the_mean_of_a_removed_task_is_not_recalled() -> None:
    """Against a Balancer that never knew the task: means are each task's own."""
    model = model_of()
    make = pair(Equal, lambda: RowMean(CAGrad(), 0.5, recall=True))
    old, without = make(FOUR, model), make(("d", "a", "b"), model)
    for number, present in enumerate([FOUR, ("c", "a"), FOUR]):
        old.backward(losses_of(model, present, number))
        without.backward(losses_of(model, set(present) - {"c"}, number))
    new = make(("d", "a", "b"), model)
    new.load_state_dict(with_tasks(old.state_dict(), new))
    later = [("a",), ("b", "d"), ("a",)]
    twin = copy.deepcopy(model)
    other = make(("d", "a", "b"), twin)
    other.load_state_dict(without.state_dict())
    alike(list(train(new, model, later, 3)), list(train(other, twin, later, 3)))


@CASES
def test_there_and_back_in_another_order(make: Make) -> None:
    model = model_of()
    balancer = make(FOUR, model)
    list(train(balancer, model, [FOUR] * 3))
    saved = balancer.state_dict()
    kept = pickle.dumps(saved)
    turned, back = make(("d", "b", "a", "c"), model), make(FOUR, model)
    turned.load_state_dict(with_tasks(saved, turned))
    back.load_state_dict(with_tasks(turned.state_dict(), back))
    same_state(back, balancer)
    assert pickle.dumps(saved) == kept


def old_and_new(
    weighting: Callable[[], Weighting] = DWA, gradient: Callable[[], Any] = CAGrad, **options: Any
) -> tuple[Balancer, Balancer]:
    model = model_of()
    make = pair(weighting, gradient, **options)
    old = make(("a", "b", "c"), model)
    list(train(old, model, [("a", "b", "c")] * 3))
    return old, make(("c", "d", "a"), model)


def test_kept_weights_go_by_name_and_not_with_a_removed_task() -> None:
    model = model_of()
    make = pair(Equal, CAGrad, every=4)
    old, more, fewer = (make(tuple(t), model) for t in ("abc", "cdba", "ac"))
    list(train(old, model, ["abc"]))
    (solution,) = old._kept.solutions.values()
    more.load_state_dict(with_tasks(old.state_dict(), more))
    assert more._kept._of == ("c", "b", "a")
    assert more._kept.solutions[0].tolist() == solution.flip(0).tolist()
    assert more._kept.age == 1
    fewer.load_state_dict(with_tasks(old.state_dict(), fewer))
    assert not fewer._kept.solutions
    assert not fewer._kept.serve(("a", "c"), 4)


def test_counts_of_the_epoch_go_by_name() -> None:
    old, new = old_and_new()
    new.load_state_dict(with_tasks(old.state_dict(), new))
    summary = new.end_epoch()
    assert summary.steps == 1
    assert summary.active == {"c": 1, "d": 0, "a": 1}


def test_a_step_that_waits_to_be_looked_back_at() -> None:
    old = make_balancer("famo", tasks=("a", "b"))
    x = nn.Parameter(torch.ones(2))
    old.backward({"a": x[0].square(), "b": x.square().sum()})
    new = make_balancer("famo", tasks=("b", "c"))
    new.load_state_dict(with_tasks(old.state_dict(), new))
    assert new._after.due == ("b",)
    new.after_step({"b": torch.tensor(1.0)})


def test_what_a_removed_task_shared_with_one_other_is_that_ones_own() -> None:
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    old = Balancer(Equal(), MoCo(), tasks=("a", "b", "c"))
    old.backward({"a": (x * y).sum(), "b": y.square().sum(), "c": (2 * x).sum()})
    new = Balancer(Equal(), MoCo(), tasks=("b", "a"))
    new.load_state_dict(with_tasks(old.state_dict(), new))
    saved = content(new.state_dict()["_extra_state"])["split"]
    assert sorted(map(sorted, saved)) == [["a"], ["a", "b"]]
    new.backward({"a": (x * y).sum(), "b": y.square().sum()})
    assert [len(tasks) for _, tasks in new._reach._reached] in ([1, 2], [2, 1])


def test_within_a_model() -> None:
    old, new = old_and_new()
    before, after = (nn.ModuleDict({"n": nn.Linear(1, 1), "b": each}) for each in (old, new))
    state = with_tasks(before.state_dict(), new, prefix="b.")
    assert state._metadata == before.state_dict()._metadata  # type: ignore[attr-defined]
    after.load_state_dict(state)
    alone = old_and_new()[1]
    alone.load_state_dict(with_tasks(old.state_dict(), alone))
    same_state(new, alone)
    assert torch.equal(after["n"].weight, before["n"].weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefix": "b."}, "must hold a Balancer's state, but has no 'b._extra_state'"),
        ({"state": {}}, "must hold a Balancer's state"),
        ({"extra": torch.zeros(9)}, "has no names of tasks"),
        ({"extra": torch.zeros(9, dtype=torch.uint8)}, "bytes of something else"),
        ({"tasks": ("x", "y")}, "must have a task in common .* but is of a, b, c. A fresh"),
    ],
)
def test_what_is_no_state_for_it(change: dict[str, Any], words: str) -> None:
    old, new = old_and_new()
    if "tasks" in change:
        new = make_balancer("dwa+cagrad", tasks=change["tasks"])
    state = change.get("state", old.state_dict())
    if "extra" in change:
        state = {**state, "_extra_state": change["extra"]}
    with pytest.raises(ValueError, match=words):
        with_tasks(state, new, prefix=change.get("prefix", ""))
    with pytest.raises(TypeError, match="`balancer` must be"):
        with_tasks(old.state_dict(), new.weighting)  # type: ignore[arg-type]


class Pairs(Weighting):
    """A number per pair of tasks."""

    def setup(self) -> None:
        self.register_buffer("pairs", torch.zeros(self.num_tasks, self.num_tasks))

    def forward(self, losses: Tensor) -> Tensor:
        return losses


class Odd(GradientStrategy):
    """A number per task that is not made with per_task."""

    def bind(self, tasks: Sequence[str], groups: int = 1) -> "Odd":
        self.register_buffer("seen", torch.zeros(len(tasks)))
        return super().bind(tasks, groups)

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0)


@pytest.mark.parametrize(("weighting", "gradient"), [(Pairs, Sum), (Equal, Odd)])
def test_what_cannot_be_carried_is_one_error(weighting: Any, gradient: Any) -> None:
    model = model_of()
    make = pair(weighting, gradient)
    old, new = make(("a", "b", "c"), model), make(("a", "b"), model)
    words = "must know what becomes of '(pairs|seen)' .* from a, b, c to a, b, but does not"
    with pytest.raises(ValueError, match=words):
        with_tasks(old.state_dict(), new)


def test_entries_go_by_name_in_another_order() -> None:
    old, new = old_and_new(DWA, lambda: GradVac(0.5))
    new.load_state_dict(with_tasks(old.state_dict(), new))
    before, after = old.weighting.state_dict()["last"], new.weighting.state_dict()["last"]
    assert after.tolist() == [before[2], 0, before[0]]
    cosines, now = old.gradient.cosines.values[0], new.gradient.cosines.values[0]
    assert cosines[0, 2] != cosines[2, 0]
    assert (now[0, 2], now[2, 0]) == (cosines[2, 0], cosines[0, 2])
    assert not now[1].any()
    assert not now[:, 1].any()


def test_rows_follow_their_parameter_when_the_split_gets_shorter() -> None:
    """First means are the rows: 2 of b, 3 of a. The removed task alone reached one parameter."""
    z, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    old = Balancer(Equal(), MoCo(), tasks=("c", "a", "b"))
    losses = {"a": (3 * y).sum(), "b": y.square().sum()}
    old.backward({"c": 0 * y.sum() + (z * z).sum(), **losses})
    assert [*map(len, json.loads(bytes(old.get_extra_state().tolist()))["split"])] == [1, 3]
    new = Balancer(Equal(), MoCo(), tasks=("b", "a"))
    state = with_tasks(old.state_dict(), new)
    rows = {k.rpartition(".")[2]: v.tolist() for k, v in state.items() if ".rows." in k}
    assert {key.split("/")[1]: v for key, v in rows.items()} == {"0": [2.0, 2.0], "1": [3.0, 3.0]}
    split = json.loads(bytes(state["_extra_state"].tolist()))["split"]
    assert [*map(len, split)].index(2) == int(next(iter(rows)).split("/")[2])
    assert len(split) == 1
