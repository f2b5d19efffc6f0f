"""What is true of the plain sum alone; what holds for every strategy is in test_contract.py."""

import torch
from hypothesis import given

from mtbalance.gradient import Sum
from tests._samplers import DTYPES, gradients


def test_value_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    assert torch.equal(Sum()(rows), torch.tensor([1.5, 2.0]))


@given(rows=gradients(["conflicting", "stationary", "opposite_rows"], dtypes=DTYPES))
def test_is_a_loop_over_the_rows(rows: torch.Tensor) -> None:
    """Exactly, since these rows are small integers times a power of two."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total = total + row
    assert torch.equal(Sum()(rows), total)


def test_is_known_to_be_the_sum() -> None:
    """The Balancer takes the short way of one backward pass where this is set."""
    assert Sum.is_sum
