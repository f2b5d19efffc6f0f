"""What is true of equal weights alone; what holds for every weighting is in test_contract.py."""

import pytest
import torch
from torch import Tensor, nn

from mtbalance import Balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import Equal, Weighting


def test_hands_the_losses_on() -> None:
    """Not even a copy: the objective is the plain sum, to the last bit."""
    losses = torch.tensor([0.5, 2.0, -3.0], requires_grad=True)
    assert Equal()(losses) is losses


class Unchanged(Weighting):
    """Learns a number that does nothing, and hands the losses on, with a hook or without."""

    def __init__(self, *, hooked: bool) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.ones(()))
        self.hooked = hooked

    def forward(self, losses: Tensor) -> Tensor:
        if self.hooked:
            losses.register_hook(lambda slope: 3 * slope)
        return losses


@pytest.mark.parametrize("hooked", [False, True])
def test_losses_handed_on_have_the_weights_that_a_backward_pass_gives(hooked: bool) -> None:
    leaf, weighting = torch.ones(2, requires_grad=True), Unchanged(hooked=hooked)
    balancer = Balancer(weighting, Sum(), tasks=("a", "b"), shared=[leaf])
    record = balancer.backward({"a": leaf.sum(), "b": 2 * leaf.sum()})
    weight = 3.0 if hooked else 1.0
    assert [float(w) for w in record.weights.values()] == [weight, weight]
    assert leaf.grad.tolist() == [3 * weight, 3 * weight]
    assert weighting.number.grad == 0
