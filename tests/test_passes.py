"""Backward passes, against what autograd gives for each parameter alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import _passes
from mtbalance._passes import gradient_of, products_with_gradient


@pytest.mark.parametrize("many", [3, 4])
@pytest.mark.parametrize("together", [1, 2, 256])
def test_products_with_a_gradient_are_the_sum_over_leaves(
    together: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large, small, complex and sparse ones, some not reached by a task, by the loss, or at all."""
    monkeypatch.setattr(_passes, "_TOGETHER", together)
    monkeypatch.setattr(_passes, "_MANY_ROWS", many)
    torch.manual_seed(0)
    kinds = [torch.float32, torch.float64, torch.float32, torch.complex64, torch.float32]
    shapes = [(40, 50), (3,), (2, 4), (3,), (5,), (1,), (1,), (6,)]
    leaves = [
        torch.randn(shape, dtype=kind).requires_grad_()
        for shape, kind in zip(shapes, [*kinds, *kinds[:1] * 3], strict=True)
    ]
    table = nn.Embedding(4, 3, sparse=True)
    *reached, _unreached, _without_factor = leaves
    hit = torch.tensor([1, 3, 1])
    loss = sum((leaf.abs() ** 3).sum() for leaf in [*reached, _without_factor]).float()
    loss = loss + (table(hit) ** 2).sum()
    leaves.append(table.weight)

    rows: list[list[Tensor | None]] = [
        [torch.randn(leaf.shape, dtype=leaf.dtype) for leaf in leaves] for _ in range(3)
    ]
    rows[0][2] = rows[1][0] = rows[1][5] = rows[0][3] = None
    rows[0][4] = rows[1][4] = rows[2][4] = None
    rows[0][-1] = torch.zeros(4, 3).index_fill_(0, hit, 2.0).to_sparse()
    factors = [0.5, 0.5, 0.5, -2.0, 3.0, 0.5, 0.5, 0.0, 0.5]
    expected = torch.zeros(3, dtype=torch.float64)
    slopes = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    for m, row in enumerate(rows):
        for factor, slope, entry in zip(factors, slopes, row, strict=True):
            if slope is not None and entry is not None:
                one, other = slope.to_dense().cfloat(), entry.to_dense().cfloat()
                expected[m] += factor * (one * other.conj()).real.double().sum()
    found = products_with_gradient(loss, leaves, rows, factors)
    assert found.dtype == torch.float64
    assert_close(found.to(expected), expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_large_leaves_are_let_go_as_they_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a pass hands out at its end holds one number for each of them."""
    handed_out: list[int] = []

    def noting(*args: object, **options: object) -> list[Tensor | None]:
        gradients = gradient_of(*args, **options)  # type: ignore[arg-type]
        handed_out.extend(g.untyped_storage().nbytes() for g in gradients if g is not None)
        return gradients

    monkeypatch.setattr(_passes, "gradient_of", noting)
    leaves = [torch.ones(2000, requires_grad=True) for _ in range(3)]
    loss = sum((2 * leaf).sum() for leaf in leaves)
    total = products_with_gradient(loss, leaves, [[torch.ones(2000)] * 3], [1.0] * 3)
    assert total.tolist() == [12000]
    assert handed_out == [4] * 3
    assert not any(leaf._backward_hooks for leaf in leaves)
