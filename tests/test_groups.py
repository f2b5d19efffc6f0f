"""What a record says of each group of shared parameters is what its gradients, taken alone, say."""

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mtbalance import Balancer, GradientStrategy, Record, RecordWriter, Weighting, read_log
from mtbalance.gradient import CAGrad, GradDrop, MoCo, PCGrad, Sum
from mtbalance.weighting import Constant, Equal, GradNorm
from tests._device import DEVICE, randn
from tests._networks import TASKS, Network, batch, flat_grad, raw_rows

WEIGHTS = (1.0, 0.5, 2.0)
GROUP_FIGURES = [
    *(f"{kind}/{task}" for kind in ("gradient_norm", "share") for task in TASKS),
    *("cosine/a/b", "cosine/a/c", "cosine/b/c", "conflicts"),
]


class Forked(nn.Module):
    """A trunk for all tasks, and a neck for all but the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.neck = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.heads = nn.ModuleDict(
            {"a": nn.Linear(5, 1), "b": nn.Linear(5, 1), "c": nn.Linear(6, 1)}
        )
        self.double()

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        low = self.trunk(rows)
        high = self.neck(low)
        found = {"a": high, "b": high, "c": low}
        sums = rows.sum(1, keepdim=True)
        return {
            task: (self.heads[task](found[task]) - (-2.0) ** n * sums).square().mean()
            for n, task in enumerate(TASKS)
        }

    @property
    def groups(self) -> dict[str, list[Tensor]]:
        return {name: list(getattr(self, name).parameters()) for name in ("trunk", "neck")}


def balanced(
    strategy: GradientStrategy, weighting: Weighting | None = None, **options: object
) -> tuple[Forked, Balancer]:
    model = Forked()
    weighting = weighting or Constant(WEIGHTS)
    shared = {"trunk": model.trunk, "neck": model.neck}
    return model, Balancer(weighting, strategy, tasks=TASKS, shared=shared, **options)


def by_hand(
    rows: Tensor, direction: Tensor, parts: Tensor, tasks: tuple[str, ...]
) -> dict[str, float]:
    """Return the figures of a group by its gradients, shape (m, p), in the order of a record.

    Args:
        rows: The raw gradients.
        direction: Their direction, shape (p,).
        parts: The factor of each gradient whose part of the direction is asked for, shape (m,).
        tasks: Whose rows they are.
    """
    figures = {}
    products = [float(row @ direction) for row in rows]
    pieces = [float(part) * product for part, product in zip(parts, products, strict=True)]
    for task, row, piece in zip(tasks, rows, pieces, strict=True):
        figures[f"gradient_norm/{task}"] = float(row.norm())
        figures[f"share/{task}"] = piece / sum(pieces) if sum(pieces) else 0.0
    for (a, one), (b, other) in itertools.combinations(zip(tasks, rows, strict=True), 2):
        both = one.norm() * other.norm()
        figures[f"cosine/{a}/{b}"] = float(one @ other / both) if both > 0 else 0.0
    pairs = itertools.combinations(rows, 2)
    figures["conflicts"] = float(sum(bool(one @ other < 0) for one, other in pairs))
    return {name: figures.get(name, math.nan) for name in GROUP_FIGURES}


def of_group(record: Record, group: str) -> dict[str, float]:
    """Return the figures of a group without its name."""
    start = f"{group}/"
    found = record.as_dict().items()
    return {name.removeprefix(start): figure for name, figure in found if name.startswith(start)}


def assert_is_by_hand(
    record: Record, model: Forked, rows: Mapping[str, Tensor], weights: Mapping[str, float]
) -> None:
    """Compare all figures of each group with those of its rows and of what lies in ``.grad``."""
    for name, parameters in model.groups.items():
        figures = record.groups[name]
        direction = flat_grad(parameters)
        assert figures.tasks == record.tasks
        assert_close(figures.gramian, rows[name] @ rows[name].T, rtol=1e-12, atol=1e-13)
        assert_close(figures.progress, rows[name] @ direction, rtol=1e-9, atol=1e-12)
        parts = torch.tensor([weights[task] for task in record.tasks], dtype=torch.float64)
        if figures.combination is not None:
            parts = figures.combination
            assert_close(parts @ rows[name], direction, rtol=1e-9, atol=1e-12)
        expected = by_hand(rows[name], direction, parts, record.tasks)
        found = of_group(record, name)
        assert list(found) == GROUP_FIGURES
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def step_by_hand(
    model: Forked, balancer: Balancer, absent: tuple[str, ...] = (), seed: int = 0
) -> tuple[Record, dict[str, Tensor]]:
    """Take a step, and return its record and the rows of each group."""
    model.zero_grad()
    losses = {t: v for t, v in model.losses(batch(seed=seed)).items() if t not in absent}
    rows = {name: raw_rows(losses, parameters) for name, parameters in model.groups.items()}
    return balancer.backward(losses), rows


@pytest.mark.parametrize("absent", [(), ("b",)])
@pytest.mark.parametrize("strategy", [CAGrad(), PCGrad(order="fixed"), GradDrop(seed=3)], ids=type)
def test_figures_are_those_of_each_group_alone(
    strategy: GradientStrategy, absent: tuple[str, ...]
) -> None:
    model, balancer = balanced(strategy)
    record, rows = step_by_hand(model, balancer, absent)
    assert_is_by_hand(record, model, rows, dict(zip(TASKS, WEIGHTS, strict=True)))
    assert float(record.groups["neck"].gradient_norms["c"]) == 0
    both = [record.groups[name] for name in ("trunk", "neck")]
    assert_close(sum(each.gramian for each in both), record.gramian)
    assert_close(sum(each.progress for each in both), record.progress)
    assert both[0].conflicts != both[1].conflicts


def test_figures_where_a_weighting_looks_ahead_of_a_sum() -> None:
    model, balancer = balanced(Sum(), GradNorm(lr=0.1))
    record, rows = step_by_hand(model, balancer)
    assert_is_by_hand(record, model, rows, {t: float(w) for t, w in record.weights.items()})


def test_figures_of_micro_batches_are_those_of_their_sum() -> None:
    model, balancer = balanced(CAGrad())
    total = {name: torch.zeros(3, flat_grad(p).numel()) for name, p in model.groups.items()}
    for seed in (1, 2):
        losses = model.losses(batch(seed=seed))
        for name, parameters in model.groups.items():
            total[name] = total[name] + raw_rows(losses, parameters)
        balancer.accumulate(losses)
    assert_is_by_hand(balancer.apply(), model, total, dict(zip(TASKS, WEIGHTS, strict=True)))


def with_an_infinite_slope(model: Forked) -> dict[str, Tensor]:
    """Return losses of which that of b has a gradient that is not finite, of the neck alone."""
    losses = model.losses(batch())
    entries = next(model.neck.parameters()).sum()
    losses["b"] = losses["b"] + (entries - entries.detach()).sqrt()
    return losses


def test_figures_of_dropped_tasks_are_left_out() -> None:
    model, balancer = balanced(CAGrad(), nonfinite="drop")
    losses = with_an_infinite_slope(model)
    rows = {n: raw_rows({k: losses[k] for k in "ac"}, p) for n, p in model.groups.items()}
    record = balancer.backward(losses)
    assert record.dropped == ("b",)
    assert_is_by_hand(record, model, rows, dict(zip(TASKS, WEIGHTS, strict=True)))


def test_kept_weights_are_told_by_group() -> None:
    model, balancer = balanced(CAGrad(), every=2)
    first, _ = step_by_hand(model, balancer)
    second, rows = step_by_hand(model, balancer, seed=1)
    assert second.reused
    for name, parameters in model.groups.items():
        figures = second.groups[name]
        assert torch.equal(figures.combination, first.groups[name].combination)
        assert_close(figures.combination @ rows[name], flat_grad(parameters))
        assert figures.conflicts is None
    assert second.combination is None
    assert_unknown(second)


def test_under_a_loss_scale_figures_are_those_without_it() -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)):
        model, balancer = balanced(CAGrad())
        record = balancer.backward(model.losses(batch()), scaler=scaler)
        found.append([of_group(record, name) for name in model.groups])
    assert found[0] == found[1]


def assert_unknown(record: Record) -> None:
    for name in ("trunk", "neck"):
        figures = of_group(record, name)
        assert list(figures) == GROUP_FIGURES
        assert all(map(math.isnan, figures.values()))


def one_pass() -> Record:
    model, balancer = balanced(Sum())
    return balancer.backward(model.losses(batch()))


def all_are_nan(policy: str) -> Record:
    model, balancer = balanced(CAGrad(), nonfinite=policy)
    record = balancer.backward({t: loss * math.nan for t, loss in model.losses(batch()).items()})
    assert record.skipped == (policy == "skip")
    return record


def overflow() -> Record:
    model, balancer = balanced(CAGrad())
    losses = with_an_infinite_slope(model)
    record = balancer.backward(losses, scaler=torch.amp.GradScaler(DEVICE.type, init_scale=1.0))
    assert record.overflow
    return record


def at_features() -> Record:
    model, balancer = balanced(CAGrad())
    high = model.neck(model.trunk(batch()))
    losses = {task: (high * n).square().mean() for n, task in enumerate(TASKS, 1)}
    record = balancer.backward(losses, features=high)
    assert record.conflicts == 0
    return record


@pytest.mark.parametrize(
    "take",
    [
        one_pass,
        functools.partial(all_are_nan, "skip"),
        functools.partial(all_are_nan, "drop"),
        overflow,
        at_features,
    ],
)
def test_steps_without_gradients_of_groups_know_nothing(take: Callable[[], Record]) -> None:
    record, (known, _) = take(), step_by_hand(*balanced(CAGrad()))
    assert_unknown(record)
    assert list(record.as_dict()) == list(known.as_dict())


def test_a_group_that_no_task_reaches_is_not_known() -> None:
    model, balancer = balanced(CAGrad())
    record, _ = step_by_hand(model, balancer, absent=("a", "b"))
    assert record.groups["neck"].gradient_norms == {}
    assert set(record.groups["trunk"].gradient_norms) == {"c"}
    figures = of_group(record, "neck")
    assert list(figures) == GROUP_FIGURES
    assert all(map(math.isnan, figures.values()))


def test_means_over_steps_tell_of_the_gradients_of_the_step() -> None:
    model, balancer = balanced(MoCo())
    step_by_hand(model, balancer)
    record, rows = step_by_hand(model, balancer, seed=1)
    for name, parameters in model.groups.items():
        figures = record.groups[name]
        assert_close(figures.gramian, rows[name] @ rows[name].T)
        assert_close(figures.progress, rows[name] @ flat_grad(parameters))


def test_without_names_there_are_no_groups() -> None:
    model = Network()
    for shared in (model.trunk, [model.trunk[0], model.trunk[3]], None):
        record = Balancer(Equal(), CAGrad(), tasks=TASKS, shared=shared).backward(
            model.losses(batch())
        )
        assert record.groups == {}
        assert sum(name.count("gradient_norm") for name in record.as_dict()) == len(TASKS)


class Operations(TorchDispatchMode):
    """Lists what tensors are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", [CAGrad(), GradDrop(seed=3), Sum()], ids=type)
def test_figures_cost_no_operation_until_they_are_read(strategy: GradientStrategy) -> None:
    found = []
    for named in (False, True):
        model = Network()
        shared = {"trunk": model.trunk} if named else model.trunk
        balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=shared)
        losses = model.losses(batch())
        with Operations() as operations:
            record = balancer.backward(losses)
        found.append(operations.found)
        assert bool(record.groups) == named
    assert found[0] == found[1]


def test_names_of_groups_outlive_copies() -> None:
    model, balancer = balanced(CAGrad())
    for copied in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        both, other = copied((model, balancer))
        record, rows = step_by_hand(both, other)
        assert_is_by_hand(record, both, rows, dict(zip(TASKS, WEIGHTS, strict=True)))
        again = copied(record)
        assert list(again.as_dict()) == list(record.as_dict())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("", TypeError, "have non-empty strings as names of groups, but got ''"),
        (0, TypeError, "have non-empty strings as names of groups, but got 0"),
        ("trunk/low", ValueError, r"name groups without '/'.*but got 'trunk/low'"),
        *(
            (kind, ValueError, rf"name groups .*not as the figures of a record .*but got '{kind}'")
            for kind in ("loss", "weight", "gradient_norm", "share", "cosine")
        ),
    ],
)
def test_names_that_would_not_tell_figures_apart_are_refused(
    name: object, kind: type[Exception], message: str
) -> None:
    model = Network()
    with pytest.raises(kind, match=f"`shared` must {message}"):
        Balancer(Equal(), CAGrad(), tasks=TASKS, shared={name: model.trunk})


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_logs_carry_groups_through(ending: str, tmp_path) -> None:
    """Names of groups are found, and no task is taken for one, whatever it is called."""
    tasks = ("a", "share/b", "conflicts")
    x, y = (nn.Parameter(torch.ones(3)) for _ in range(2))
    balancer = Balancer(Equal(), CAGrad(), tasks=tasks, shared={"x 1": x, "conflicts": y})
    rows = randn(3, 2, 3)
    records = []
    with RecordWriter(tmp_path / f"log{ending}") as writer:
        for count in (3, 2, 3):
            pairs = zip(tasks[:count], rows, strict=False)
            records.append(balancer.backward({t: row[0] @ x + row[1] @ y for t, row in pairs}))
            writer.write(records[-1], lr=0.1)
    log = read_log(tmp_path / f"log{ending}")
    assert log.groups == ("x 1", "conflicts")
    assert log.tasks == tasks
    for step, record in enumerate(records):
        for name, figure in record.as_dict().items():
            found = log.columns[name][step]
            assert found == figure or (math.isnan(found) and math.isnan(figure)), name
