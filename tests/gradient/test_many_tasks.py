"""Strategies on Gramians with many tasks: what a solve holds, and that it is still right."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtbalance.gradient import PCGrad, _pcgrad
from tests._catalogue import GRADIENT_CASES, GradientCase
from tests._oracles import array, pcgrad_row
from tests._samplers import random_gradients

MANY = 128
ON_GRAMIANS = [case for case in GRADIENT_CASES if case.make().by_gramian and case.max_tasks > 6]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation has made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # What is only another view of a tensor takes no memory.
        held = [tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in tensors]
        self.entries = max([self.entries, *held])
        return result


@pytest.mark.parametrize("case", ON_GRAMIANS, ids=lambda case: case.name)
def test_memory_grows_with_the_square_of_the_tasks(case: GradientCase, monkeypatch) -> None:
    """No tensor has an entry per triple of tasks (2 million, for 128)."""
    rows = random_gradients(MANY, MANY + 10, seed=1)
    gramian = (rows - 0.9 * rows.mean(0)) @ (rows - 0.9 * rows.mean(0)).T
    # UPGrad's problems are as many as fit, at least one.
    monkeypatch.setattr("mtbalance._projections._ENTRIES", MANY * MANY)
    strategy = case.make()
    across = (gramian,) if strategy.further_batches else ()
    with Largest() as largest:
        weights = strategy.coefficients(gramian, *across)
    assert weights is not None
    assert weights.isfinite().all()
    assert 0 < largest.entries <= 4 * MANY * MANY


@pytest.mark.parametrize("order", ["fixed", "random"])
def test_pcgrad_is_the_loop(order: str) -> None:
    """With more tasks than fit into one stretch: algorithm 1, vector by vector."""
    m = 60
    assert m * (m - 1) * m > _pcgrad._ENTRIES
    rows = random_gradients(m, 30, seed=2)  # dependent, so that all pairs of rows conflict or not
    others = np.array([[j for j in range(m) if j != i] for i in range(m)])
    if order == "random":  # drawn at once, a row of numbers per task
        draws = torch.rand(m, m - 1, generator=torch.Generator().manual_seed(5))
        others = np.take_along_axis(others, array(draws).argsort(1), 1)
    expected = sum(pcgrad_row(array(rows), i, others[i]) for i in range(m))
    direction = array(PCGrad(order, seed=5)(rows))
    assert np.linalg.norm(direction - expected) <= 1e-12 * float(rows.norm(dim=1).sum())
