"""What is true of Normalized alone; what holds for every strategy is in test_contract.py."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import (
    CAGrad,
    FairGrad,
    GradDrop,
    GradientStrategy,
    Normalized,
    PCGrad,
    Sum,
    UPGrad,
)
from mtbalance.weighting import Constant, Equal
from tests._device import randn
from tests._oracles import array
from tests._samplers import gradients, matrix

LENGTHS: dict[str, Callable[[np.ndarray], float]] = {"mean": np.mean, "max": np.max, "min": np.min}
MAKERS: list[Callable[[], GradientStrategy]] = [
    Sum,
    lambda: CAGrad(c=0.7),
    lambda: PCGrad(order="fixed"),
    UPGrad,
    lambda: GradDrop(seed=5),
    lambda: GradDrop(leak=0.4),
]


def normalized_by_hand(rows: Tensor, scale: str) -> Tensor:
    """Return the rows of one length, by NumPy, vectors and not inner products."""
    numbers = array(rows)
    lengths = np.linalg.norm(numbers / np.abs(numbers).max(), axis=1) * np.abs(numbers).max()
    alive = lengths > 0
    numbers[alive] *= (LENGTHS[scale](lengths[alive]) / lengths[alive])[:, None]
    return torch.from_numpy(numbers)


@pytest.mark.parametrize("scale", LENGTHS)
@pytest.mark.parametrize("make", MAKERS)
@given(data=st.data())
def test_it_is_the_strategy_on_rows_of_one_length(make, scale: str, data) -> None:
    rows = data.draw(gradients(["generic", "conflicting", "zero_rows", "unequal_norms"]))
    if not rows.any():
        return
    expected = make()(normalized_by_hand(rows, scale))
    found = Normalized(make(), scale)(rows)
    size = float(normalized_by_hand(rows, scale).norm(dim=1).sum())
    assert_close(found, expected, rtol=0, atol=1e-12 * size)


def test_two_tasks_by_hand() -> None:
    """Lengths 5 and 1: of mean 3, so that the rows become (1.8, 2.4) and (3, 0)."""
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    for scale, length in {"mean": 3.0, "max": 5.0, "min": 1.0}.items():
        expected = torch.tensor([1.6, 0.8], dtype=torch.float64) * length
        assert_close(Normalized(Sum(), scale)(rows), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("make", [Sum, UPGrad, lambda: GradDrop(seed=5)])
@given(exponents=st.lists(st.integers(-9, 9), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_the_factors_of_losses_change_the_length_alone(make, exponents, seed) -> None:
    rows = matrix("generic", 3, 8, seed)
    factors = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    one, other = Normalized(make())(rows), Normalized(make())(rows * factors[:, None])
    assert_close(other / other.norm(), one / one.norm(), rtol=0, atol=1e-12)


def test_rows_without_a_direction_are_zero() -> None:
    rows = torch.tensor([[3.0, 4.0], [1e-40, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for scale in LENGTHS:
        assert_close(Normalized(Sum(), scale)(rows), rows[0], rtol=1e-15, atol=0)


def train(gradient: GradientStrategy, steps: int = 3, **options) -> list[Tensor]:
    """Return the gradients of some steps of a network in two groups, and of a head."""
    torch.manual_seed(1)
    first, second, head = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 1)
    balancer = Balancer(
        Constant({"a": 3.0, "b": 0.01}),
        gradient,
        tasks=("a", "b"),
        shared={"first": first, "second": second},
        **options,
    )
    found = []
    for step in range(steps):
        x = randn(6, 4, seed=step)
        h = second(first(x).tanh())
        balancer.backward({"a": head(h).mean() ** 2, "b": h.square().mean()})
        modules = nn.ModuleList([first, second, head])
        found += [p.grad.clone() for p in modules.parameters()]
        modules.zero_grad()
    return found


@pytest.mark.parametrize("make", MAKERS[:4])
def test_in_a_balancer_each_group_has_lengths_of_its_own(make) -> None:
    """Compared with rows that are made one by one, normalised by hand and given to the strategy.

    GradDrop, which draws by the number of the column, has a test of its own below.
    """
    torch.manual_seed(1)
    first, second, head = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 1)
    plain = [make(), make()]
    groups = [list(first.parameters()), list(second.parameters())]
    expected = []
    for step in range(3):
        x = randn(6, 4, seed=step)
        h = second(first(x).tanh())
        losses = [3.0 * head(h).mean() ** 2, 0.01 * h.square().mean()]
        for strategy, group in zip(plain, groups, strict=True):
            rows = torch.stack(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(l, group, retain_graph=True)]
                    )
                    for l in losses
                ]
            )
            expected.append(strategy(normalized_by_hand(rows, "mean").float()))
        expected.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(losses[0], list(head.parameters()))]
            )
        )
    found = torch.cat([g.flatten() for g in train(Normalized(make()))])
    assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-7)


def test_leaks_of_graddrop_in_a_balancer() -> None:
    """With a leak of 1, GradDrop is the sum, whatever it draws."""
    dropped, added = train(Normalized(GradDrop(leak=1.0))), train(Normalized(Sum()))
    for one, other in zip(dropped, added, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-7)


def linear(strategy: GradientStrategy, rows: Tensor, active: str, steps: int) -> list[Tensor]:
    """Return the gradients of steps on losses whose gradients are these rows."""
    balancer = Balancer(Equal(), strategy, tasks=("a", "b", "c"))
    parameter = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    found = []
    for _ in range(steps):
        balancer.backward(
            {t: row @ parameter for t, row in zip("abc", rows, strict=True) if t in active}
        )
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def test_graddrop_draws_anew_in_each_step() -> None:
    """Rows of one length are left as they are, so that both drop the same entries."""
    row = matrix("generic", 1, 40)[0]
    rows = torch.stack([row, row.flip(0), -row.roll(1)])
    plain = linear(GradDrop(seed=3), rows, "abc", 3)
    found = linear(Normalized(GradDrop(seed=3)), rows, "abc", 3)
    for one, other in zip(found, plain, strict=True):
        assert_close(one, other, rtol=1e-12, atol=0)
    assert not torch.equal(plain[0], plain[1])


def test_preferences_stay_with_their_tasks() -> None:
    rows = matrix("conflicting", 3, 6)
    (found,) = linear(Normalized(UPGrad(preference={"a": 9, "b": 1, "c": 2})), rows, "bc", 1)
    # A mean of 1 over all three tasks: 1 / 4 and 1 / 2.
    lengths = rows[1:].norm(dim=1)
    factors = lengths.mean() / lengths * torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert_close(found, UPGrad()(rows[1:] * factors[:, None]), rtol=1e-12, atol=1e-14)


def test_kept_weights_hold_the_lengths() -> None:
    """In the step that solves; later ones use what it gave."""
    every = train(Normalized(CAGrad()), steps=1, every=3)
    for one, other in zip(every, train(Normalized(CAGrad()), steps=1), strict=True):
        assert torch.equal(one, other)
    train(Normalized(Sum()), steps=4, every=2)
    with pytest.raises(ValueError, match="`every` must be 1"):
        train(Normalized(GradDrop()), every=2)


def test_it_passes_on_what_the_strategy_needs() -> None:
    preferring = Normalized(UPGrad(preference={"a": 3.0, "b": 1.0}))
    train(preferring)
    with pytest.raises(ValueError, match="preference"):
        train(Normalized(UPGrad(preference={"a": 3.0, "c": 1.0})))
    rows = matrix("conflicting", 3, 6)
    strategy = Normalized(PCGrad(seed=3))
    first = [strategy(rows) for _ in range(4)]
    strategy.reset()
    assert all(torch.equal(strategy(rows), one) for one in first)


def test_fallbacks_of_the_strategy_are_counted() -> None:
    balancer = Balancer(Equal(), Normalized(FairGrad()), tasks=("a", "b"))
    parameter = nn.Parameter(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="FairGrad fell back"):
        record = balancer.backward({"a": parameter.sum(), "b": -parameter.sum()})
    assert record.fallbacks == 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="`strategy` must be"):
        Normalized("sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`scale` must be"):
        Normalized(Sum(), "unit")
