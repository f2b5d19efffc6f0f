"""The probability simplex: weights that are not negative and add up to 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def project_onto_simplex(vector: Tensor) -> Tensor:
    r"""Return the weights, not negative and of sum 1, that are nearest to a vector.

    The nearest point is :math:`\max(v - \tau, 0)`. The threshold :math:`\tau` is found by sorting
    (Held, Wolfe and Crowder, "Validation of subgradient optimization", 1974): it is the largest of
    :math:`(\sum_{j \le k} u_j - 1)/k`, with the entries u in falling order. Exact but for rounding,
    whatever the size of the entries; waits for no device.

    Args:
        vector: Shape (m,), m at least 1, floating point. What is not finite gives NaN.

    Returns:
        Shape (m,), like the vector.
    """
    # Distances from the largest entry: none of them rounds the small differences of large entries.
    falling = torch.sort(vector - vector.max(), descending=True).values
    counts = torch.arange(1, len(vector) + 1, device=vector.device, dtype=vector.dtype)
    threshold = ((falling.cumsum(0) - 1) / counts).max()
    weights = (vector - vector.max() - threshold).clamp_min(0)
    return weights / weights.sum()


def shares_of(held: Tensor) -> Tensor:
    """Return numbers over their sum, shape (m,), or equal ones where they are all 0."""
    total = held.sum()
    return torch.where(total > 0, held / total, torch.full_like(held, 1 / len(held)))


def moved_against(weights: Tensor, slope: Tensor, rate: Tensor | float) -> Tensor:
    """Return weights after a step against a slope, shape (m,), that are yet to be projected."""
    # What all have in common changes nothing, and might drown the weights if it is large.
    return weights - rate * (slope - slope.min())


def nearest_weights(numbers: Sequence[float]) -> list[float]:
    """Return the same for Python's numbers: of few, in a twentieth of the time.

    No digit depends on their order. They must not be NaN, and the largest must be finite.
    """
    largest = max(numbers)
    distances = [number - largest for number in numbers]
    total, threshold = -1.0, -math.inf
    for count, distance in enumerate(sorted(distances, reverse=True), 1):
        total += distance
        if total / count < threshold:
            break
        threshold = total / count
    weights = [max(distance - threshold, 0.0) for distance in distances]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]
