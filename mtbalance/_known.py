"""Steps whose coefficients are known before any gradient is: one backward pass, or few."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mtbalance._company import Company
from mtbalance._seen import Seen
from mtbalance._weighed import Weighed
from mtbalance._writing import fresh_grad


class Pass(NamedTuple):
    """What one backward pass is for."""

    leaves: Sequence[Tensor]
    coefficients: Tensor
    """Of the losses, shape (m,)."""


def in_passes(
    passes: Sequence[Pass],
    seen: Seen,
    weighed: Weighed,
    scale: float | None,
    company: Company,
    *,
    looks: bool,
    again: bool = False,
) -> bool:
    """Make backward passes into ``.grad``; return False, and write nothing, if it is not finite.

    Under a loss scale what is not finite is written: the scaler skips the step when it finds that.

    Args:
        passes: One for all leaves, or several for some each.
        seen: The losses.
        weighed: Their weights.
        scale: The loss scale, if any.
        company: The processes.
        looks: Whether what is not finite is to be found.
        again: Whether the graphs are to last, as other passes may follow.
    """
    wanted = [each for each in passes if each.leaves]
    with fresh_grad(company.leaves(seen)) as fresh:
        for number, (leaves, coefficients) in enumerate(wanted, 1):
            more = again or number < len(wanted)
            company.backward(seen, leaves, coefficients, scale or 1.0, retain_graph=more)
        finite = not looks or company.everywhere(fresh.is_finite())
        if finite or scale is not None:
            fresh.keep()
        if finite:
            weighed.write(scale)
    return finite
