"""What tests of several weightings need."""

import torch
from torch import Tensor

from mtbalance.weighting import Weighting


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weighed(weighting: Weighting, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted losses and the weights of a step."""
    losses = losses.clone().requires_grad_()
    weighted = weighting(losses)
    return weighted.detach(), torch.autograd.grad(weighted.sum(), losses)[0]
