"""Inner products of long rows, which float32 serves for where nothing depends on the difference."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtbalance import _products
from mtbalance._products import gramian_of
from mtbalance.gradient import MGDA, CAGrad, PCGrad, UPGrad
from tests._device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="products in float32 are for CPUs")

LONG = 3000
"""Columns that count as long here, and do not fill a whole number of blocks or runs."""
KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda m, g: torch.randn(m, LONG, generator=g),
    "heavy": lambda m, g: torch.randn(m, LONG, generator=g) ** 5,
    "positive": lambda m, g: torch.rand(m, LONG, generator=g) + torch.eye(m, LONG) * 40,
    "equal": lambda m, _: torch.full((m, LONG), 1 / 3) + torch.eye(m, LONG) * 20,
    "sparse": lambda m, g: (
        torch.randn(m, LONG, generator=g) * (torch.rand(m, LONG, generator=g) < 0.02)
    ),
}


@pytest.fixture(autouse=True)
def made() -> Iterator[list[Tensor]]:
    """Let rows be long early, and collect what is made in float32."""
    found: list[Tensor] = []
    make = _products._in_float32

    def collecting(rows: _products.Rows) -> Tensor:
        found.append(make(rows))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_products, "_SHORT", 1000)
        patch.setattr(_products, "_BLOCK_COLUMNS", 600)
        patch.setattr(_products, "_BLOCK_ENTRIES", 4000)
        patch.setattr(_products, "_in_float32", collecting)
        yield found


def by_hand(matrix: Tensor) -> Tensor:
    """Return the inner products, each as the float64 sum of exact products."""
    rows = matrix.double().tolist()
    return torch.tensor(
        [[math.fsum(map(math.prod, zip(a, b, strict=True))) for b in rows] for a in rows],
        dtype=torch.float64,
    )


def worst(gramian: Tensor, exact: Tensor) -> float:
    """Return the largest error, in lengths of the rows."""
    lengths = exact.diagonal().sqrt()
    return float(((gramian - exact).abs() / (lengths * lengths[:, None])).max())


def cut(matrix: Tensor) -> list[list[Tensor | None]]:
    """Return the rows as parameters of several shapes, which no task or one does not reach."""
    rows: list[list[Tensor | None]] = []
    for row in matrix:
        a, b, c = row.split([1200, 50, LONG - 1250])
        rows.append([a.view(30, 40), None, b, c.view(2, -1)])
    rows[0][2] = None
    return rows


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 7), st.integers(0, 99))
def test_long_rows_are_precise(kind: str, m: int, seed: int) -> None:
    matrix = KINDS[kind](m, torch.Generator().manual_seed(seed))
    matrix *= 10.0 ** torch.arange(m)[:, None]
    whole = matrix.clone()
    whole[0, 1200:1250] = 0
    # Equal numbers round the same way each time: by how much is up to the processor.
    bound = 5e-6 if kind == "equal" else 1e-6
    assert worst(gramian_of(cut(matrix)), by_hand(whole)) < bound


def test_float32_serves_where_rows_are_independent(made) -> None:
    matrix = KINDS["normal"](4, torch.Generator().manual_seed(0))
    gramian = gramian_of(cut(matrix))
    assert len(made) == 1
    assert torch.equal(gramian, made[0])
    assert torch.equal(gramian, gramian.T)


def _dependent(matrix: Tensor) -> Tensor:
    matrix[1] = matrix[0] + 0.05 * matrix[1]
    return matrix


def _opposite(matrix: Tensor) -> Tensor:
    matrix[1] = 0.01 * matrix[1] - matrix[0]
    return matrix


UNFIT: dict[str, Callable[[Tensor], Tensor]] = {
    "nearly the same": _dependent,
    "nearly opposite": _opposite,
    "three in a plane": lambda x: torch.stack([x[0], x[1], x[0] + x[1] + 0.1 * x[2]]),
    "zero": lambda x: x * torch.tensor([[1.0], [0.0], [1.0]]),
    "short": lambda x: x * torch.tensor([[1.0], [1e-25], [1.0]]),
    "too long for a square": lambda x: x * torch.tensor([[1.0], [1e25], [1.0]]),
    "float64": lambda x: x.double() / 3,
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_float64_serves_where_the_difference_may_matter(unfit: str) -> None:
    matrix = UNFIT[unfit](KINDS["normal"](3, torch.Generator().manual_seed(0)))
    exact = by_hand(matrix)
    gramian = gramian_of([[row] for row in matrix])
    lengths = exact.diagonal().sqrt()
    assert ((gramian - exact).abs() <= 1e-14 * lengths * lengths[:, None]).all()


def test_small_combinations_of_long_rows_keep_their_length() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(LONG, generator=generator)
    h = g + 1e-4 * torch.randn(LONG, generator=generator)
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    expected = math.fsum((g.double() - h.double()).square().tolist())
    squared = float(difference @ gramian_of([[g], [h]]) @ difference)
    assert squared == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays(bad: float) -> None:
    matrix = torch.ones(2, LONG)
    matrix[1, 1777] = bad
    gramian = gramian_of([[row] for row in matrix])
    assert gramian.isfinite().tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_lower_precision_of_matrix_products_is_not_taken(made, precision: str) -> None:
    """It is asked for the network's own products."""
    matrix = KINDS["normal"](3, torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        gramian = gramian_of([[row] for row in matrix])
    finally:
        torch.set_float32_matmul_precision(before)
    assert not made
    assert worst(gramian, by_hand(matrix)) < 1e-14
    gramian_of([[row] for row in matrix])
    assert len(made) == 1


def test_autocast_is_not_followed(made) -> None:
    matrix = KINDS["normal"](3, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        gramian = gramian_of([[row] for row in matrix])
    assert len(made) == 1
    assert worst(gramian, by_hand(matrix)) < 1e-7


@pytest.mark.parametrize("strategy", [PCGrad(order="fixed"), CAGrad(), MGDA(), UPGrad()], ids=repr)
def test_directions_are_those_of_the_exact_products(made, strategy) -> None:
    """At the least independence that float32 serves for, and lengths far apart."""
    *own, common = KINDS["normal"](6, torch.Generator().manual_seed(1))
    signs = torch.tensor([[-1.0], [1.0], [1.0], [-1.0], [1.0]])
    mixed = 0.15 * torch.stack(own) + signs * common  # cosines of 0.98 and -0.98
    mixed *= 10.0 ** torch.arange(-2, 3)[:, None]
    gramian, exact = gramian_of([[row] for row in mixed]), by_hand(mixed)
    assert torch.equal(gramian, made[0])
    found, expected = strategy.coefficients(gramian), strategy.coefficients(exact)
    lengths = exact.diagonal().sqrt()
    assert ((found - expected).abs() * lengths).max() < 1e-5 * (expected.abs() * lengths).max()
