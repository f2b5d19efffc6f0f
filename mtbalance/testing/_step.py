"""A step of a whole Balancer, whatever its strategies ask for."""

from collections.abc import Callable, Mapping

from torch import Tensor

from mtbalance import Balancer


def take_step(balancer: Balancer, losses: Callable[[], Mapping[str, Tensor]]) -> None:
    """Balance losses, which serve as those of a validation batch, of further ones and later, too.

    Args:
        balancer: The Balancer.
        losses: Returns one loss with a graph for each task that is there.
    """
    ahead = losses if balancer.weighting.needs_validation else None
    further = (losses,) * min(balancer.gradient.further_batches, default=0)
    balancer.backward(losses(), validation=ahead, batches=further)
    balancer.after_step(losses)
