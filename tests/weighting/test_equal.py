"""What is true of equal weights alone; what holds for every weighting is in test_contract.py."""

import torch

from mtbalance.weighting import Equal


def test_hands_the_losses_on() -> None:
    """Not even a copy: the objective is the plain sum, to the last bit."""
    losses = torch.tensor([0.5, 2.0, -3.0], requires_grad=True)
    assert Equal()(losses) is losses
