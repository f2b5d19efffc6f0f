"""float64 gradients whose squares float64 does not hold, in a Balancer."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtbalance import Balancer, GradientStrategy, Record
from mtbalance._record import GroupFigures
from mtbalance.gradient import CAGrad, GradDrop, PCGrad, Sum
from mtbalance.weighting import Equal
from tests._device import randn

STRATEGIES = [CAGrad(), PCGrad(order="fixed"), GradDrop(seed=3), Sum()]
ROWS = randn(4, 9, seed=5, dtype=torch.float64)


def step(
    strategy: GradientStrategy, *groups: Tensor, at_features: bool = False, **options: object
) -> tuple[list[Tensor | None], Record]:
    """Return the directions and the record of a step whose tasks have these rows in each group."""
    strategy.reset()
    count = len(groups[0])
    parameters = [torch.nn.Parameter(torch.zeros_like(rows[0])) for rows in groups]
    tasks = tuple("abcdef"[:count])
    balancer = Balancer(
        Equal(),
        strategy,
        tasks=tasks,
        shared={f"group {n}": p for n, p in enumerate(parameters)},
        **options,  # type: ignore[arg-type]
    )
    features = [1 * parameter for parameter in parameters] if at_features else None
    losses = {}
    for number, task in enumerate(tasks):
        parts = zip(features or parameters, groups, strict=True)
        losses[task] = torch.stack([(x * rows[number]).sum() for x, rows in parts]).sum()
    record = balancer.backward(losses, features=features)
    return [parameter.grad for parameter in parameters], record


def figures(record: Record | GroupFigures, scale: float = 1.0) -> list[float]:
    """Return what a record says of rows that are all times a scale."""
    norms = [float(norm) / scale for norm in record.gradient_norms.values()]
    cosines = [float(cosine) for cosine in record.cosines.values()]
    shares = [float(share) for share in record.shares.values()]
    return [*norms, *cosines, float(record.conflicts or 0), *shares]


@pytest.mark.parametrize("nonfinite", ["raise", "drop", "skip"])
@pytest.mark.parametrize("at_features", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=type)
@pytest.mark.parametrize("power", [-1000, -600, 510, 600, 1000])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_powers_of_two_change_nothing_but_the_scale(
    count: int, power: int, strategy: GradientStrategy, at_features: bool, nonfinite: str
) -> None:
    rows, scale = ROWS[:count], 2.0**power
    (expected,), before = step(strategy, rows, at_features=at_features, nonfinite=nonfinite)
    (found,), record = step(strategy, rows * scale, at_features=at_features, nonfinite=nonfinite)
    assert torch.equal(found / scale, expected)
    assert figures(record, scale) == figures(before)
    assert record.tasks == before.tasks
    if before.gramian is not None:
        assert record.gramian is not None
        assert torch.equal(record.gramian, before.gramian * scale * scale)
        assert torch.equal(record.progress, before.progress * scale * scale)
    if before.combination is not None:
        assert torch.equal(record.combination, before.combination)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if not s.is_sum], ids=type)
@pytest.mark.parametrize("scales", [(1.0, 2.0**-600), (2.0**600, 1.0), (2.0**600, 2.0**-600)])
def test_each_group_has_a_range_of_its_own(
    strategy: GradientStrategy, scales: tuple[float, float]
) -> None:
    groups = ROWS[:3, :5], ROWS[:3, 5:]
    expected, before = step(strategy, *groups)
    found, record = step(strategy, *(g * s for g, s in zip(groups, scales, strict=True)))
    for direction, scale, wanted in zip(found, scales, expected, strict=True):
        assert torch.equal(direction / scale, wanted)
    # The larger of these is all that counts over both.
    largest = scales.index(max(scales))
    norms = groups[largest].norm(dim=1) * scales[largest]
    assert_close(torch.stack(list(record.gradient_norms.values())), norms)
    _, alone = step(strategy, groups[largest])
    assert_close(
        torch.stack(list(record.cosines.values())), torch.stack(list(alone.cosines.values()))
    )
    assert record.conflicts == alone.conflicts
    for scale, group, wanted in zip(
        scales, record.groups.values(), before.groups.values(), strict=True
    ):
        assert figures(group, scale) == figures(wanted)
        assert torch.equal(group.gramian, wanted.gramian * scale * scale)
        assert torch.equal(group.progress, wanted.progress * scale * scale)
        if wanted.combination is not None:
            assert torch.equal(group.combination, wanted.combination)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=type)
def test_under_a_loss_scale(strategy: GradientStrategy) -> None:
    """The scale alone takes squares out of the range, or the rows do."""
    for power in (0, -600, 500, 600):
        found = []
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
            strategy.reset()
            parameter = torch.nn.Parameter(torch.zeros_like(ROWS[0]))
            balancer = Balancer(Equal(), strategy, tasks=("a", "b", "c"), shared=parameter)
            rows = ROWS[:3] * 2.0**power
            losses = {task: parameter @ row for task, row in zip("abc", rows, strict=True)}
            record = balancer.backward(losses, scaler=scaler)
            found.append((parameter.grad, figures(record)))
        (direction, numbers), (scaled, same) = found
        assert torch.equal(scaled, direction * 2.0**12)
        assert same == numbers


def test_kept_weights_serve_rows_of_any_scale() -> None:
    parameter = torch.nn.Parameter(torch.zeros_like(ROWS[0]))
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b", "c"), shared=parameter, every=2)
    for step_number, scale in enumerate([2.0**600, 1.0]):
        parameter.grad = None
        rows = ROWS[:3] * scale
        losses = {task: parameter @ row for task, row in zip("abc", rows, strict=True)}
        assert balancer.backward(losses).reused == (step_number == 1)
        expected = CAGrad()(ROWS[:3])
        assert_close(parameter.grad / scale, expected, rtol=1e-12, atol=1e-12)


def exact_products(rows: Tensor) -> list[list[Fraction]]:
    exact = [[Fraction(x) for x in row] for row in rows.tolist()]
    return [[sum(map(Fraction.__mul__, a, b), Fraction()) for b in exact] for a in exact]


def root(square: Fraction) -> float:
    """Return the square root of what no float may hold."""
    return math.isqrt(int(square * 4**1200)) / 2**1200 if square else 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1e200, 1.0),
        (1e200, 1e180),
        (1e155, 1e150),
        (1e-200, 1e-180),
        (1e-157, 1.0),
        (1e-200, 1e-157),
        (1e-134, 1e-159),
        (1e300, 1e-300),
    ],
)
def test_rows_of_both_kinds(one: float, other: float) -> None:
    rows = torch.tensor([[one, 2 * one, 0.0], [-other, 0.25 * other, other]], dtype=torch.float64)
    (direction,), record = step(PCGrad(), rows)
    (a, h), (_, b) = exact_products(rows)
    assert h < 0
    norms = torch.stack(list(record.gradient_norms.values()))
    assert_close(norms, torch.tensor([root(a), root(b)], dtype=torch.float64), rtol=1e-14, atol=0)
    cosine = -root(h * h / (a * b))
    assert_close(float(record.cosines["a", "b"]), cosine, rtol=1e-14, atol=0)
    assert record.conflicts == 1
    # Shorter than 1e-30 of the longest, a row counts as zero.
    counts = root(min(a, b) / max(a, b)) > 1e-30
    weights = [1 - h / a, 1 - h / b] if counts else [Fraction(1), Fraction(1)]
    columns = zip(*([Fraction(x) for x in row] for row in rows.tolist()), strict=True)
    expected = [float(weights[0] * x + weights[1] * y) for x, y in columns]
    largest = max(map(abs, expected))
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert_close(direction / largest, wanted / largest, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if not s.is_sum], ids=type)
@pytest.mark.parametrize("scale", [2.0**-600, 1.0, 2.0**600])
def test_what_is_not_finite_is_found_among_large_numbers(
    scale: float, strategy: GradientStrategy, bad: float
) -> None:
    rows = ROWS[:3] * scale
    spoilt = rows.clone()
    spoilt[1, 4] = bad
    # A gradient that is not finite, of a loss that is.
    with pytest.raises(FloatingPointError, match=r"gradient of task 'b' must be finite"):
        _step_with_gradients(strategy, spoilt, "raise")
    found, record = _step_with_gradients(strategy, spoilt, "drop")
    assert record.dropped == ("b",)
    expected, alone = _step_with_gradients(strategy, rows[[0, 2]], "drop")
    assert torch.equal(found, expected)
    # Products of three rows and of two: some processors add them up in other orders.
    assert figures(record) == pytest.approx(figures(alone), rel=1e-13, nan_ok=True)


class _Slope(torch.autograd.Function):
    """A loss of 0 with a given gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def _step_with_gradients(
    strategy: GradientStrategy, rows: Tensor, nonfinite: str
) -> tuple[Tensor | None, Record]:
    strategy.reset()
    parameter = torch.nn.Parameter(torch.zeros_like(rows[0]))
    tasks = tuple("abc"[: len(rows)])
    balancer = Balancer(Equal(), strategy, tasks=tasks, shared=parameter, nonfinite=nonfinite)
    losses = {task: _Slope.apply(parameter, row) for task, row in zip(tasks, rows, strict=True)}
    record = balancer.backward(losses)
    return parameter.grad, record
