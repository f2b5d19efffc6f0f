"""Optimizers that are given as one, several or none."""

from collections.abc import Sequence

from torch.optim import Optimizer


def each_optimizer(given: Optimizer | Sequence[Optimizer] | None) -> Sequence[Optimizer]:
    """Return the optimizers of which one, several or none are given."""
    several = given if isinstance(given, Sequence) else (given,)
    return [each for each in several if each is not None]
