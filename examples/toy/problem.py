r"""Two losses of two parameters, on which the ways of multi-task learning part.

Liu et al. (2021), *Conflict-averse gradient descent for multi-task learning* (arXiv:2110.14048),
drew them first. With the signs as in the authors' code, for the tasks i = 1, 2:

.. math::
    L_i(\theta) = \max(\tanh(\theta_2 / 2), 0) \, f_i + \max(\tanh(-\theta_2 / 2), 0) \, g_i

    f_i = \log \max(|(c_i - \theta_1) / 2 \pm \tanh \theta_2|, 5 \cdot 10^{-6}) + 6, \quad
    c = (-7, 7)

    g_i = \bigl((\theta_1 + c_i)^2 + (\theta_2 + 8)^2 / 10\bigr) / 10 - 20

In the upper half of the plane, each loss has a steep and narrow valley, along which it hardly
falls; in the lower half each is a bowl, with its lowest point under the other task's valley. The
second loss is the first, mirrored at :math:`\theta_1 = 0`.
"""

import torch
from torch import Tensor, nn

TASKS = ("first", "second")
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
"""Those of Navon et al. (2022), *Multi-task learning as a bargaining game* (arXiv:2202.01017)."""

_CENTRE = 7.0
_FLOOR = 5e-6
"""What the logarithm is taken of, at least: the bottom of a valley is flat, and very narrow."""


def losses_at(point: Tensor, scale: float = 1.0) -> Tensor:
    """Return both losses ``(..., 2)`` at points ``(..., 2)``.

    Args:
        point: The two parameters.
        scale: What the first loss is multiplied with. Navon et al. take 0.1, so that the gradients
            differ in length, too.
    """
    across, along = point[..., :1], point[..., 1:]
    centres, signs = point.new_tensor([[-_CENTRE, _CENTRE], [1.0, -1.0]])
    distance = ((centres - across) / 2 + signs * along.tanh()).abs()
    valley = distance.clamp(min=_FLOOR).log() + 6
    bowl = ((across + centres).square() + (along + 8).square() / 10) / 10 - 20
    side = (along / 2).tanh()
    # The border belongs to the lower half, whose slope leads a start there away.
    losses = side * torch.where(side > 0, valley, -bowl)
    return losses * point.new_tensor([scale, 1.0])


class Model(nn.Module):
    """Two parameters, shared by both tasks.

    Args:
        start: Where they begin.
        scale: Of the first loss.
    """

    def __init__(self, start: tuple[float, float], scale: float = 1.0) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.scale = scale

    def forward(self) -> dict[str, Tensor]:
        """Return the loss of each task."""
        return dict(zip(TASKS, losses_at(self.point, self.scale), strict=True))


def pareto_set(count: int = 201) -> Tensor:
    r"""Return points ``(count, 2)`` of the Pareto set, from the best for the second task on.

    Where it lies does not depend on the scale of a loss. It is in the lower half, where both losses
    are the same positive function of :math:`\theta_2` times a bowl: the weighted mean
    :math:`w g_1 + (1 - w) g_2` is lowest at :math:`\theta_1 = 7 (2 w - 1)`, which leaves one
    equation in :math:`\theta_2` for each w.
    """
    return _lowest(torch.linspace(-_CENTRE, _CENTRE, count, dtype=torch.float64))


def minimum_of_mean(scale: float = 1.0) -> Tensor:
    """Return the point ``(2,)`` of the Pareto set where the mean of both losses is lowest.

    Args:
        scale: Of the first loss.
    """
    weight = torch.tensor(scale / (scale + 1), dtype=torch.float64)
    return _lowest(_CENTRE * (2 * weight - 1))


def _lowest(across: Tensor) -> Tensor:
    """Return the point of the Pareto set for each value of its first parameter, by bisection."""
    low, high = torch.full_like(across, -20.0), torch.full_like(across, -4.0)
    for _ in range(60):
        middle = (low + high) / 2
        rises = _slope(across, middle) > 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return torch.stack([across, (low + high) / 2], dim=-1)


def _slope(across: Tensor, along: Tensor) -> Tensor:
    """Return how the weighted mean that is lowest at ``across`` changes with ``along``."""
    height = (_CENTRE**2 - across.square() + (along + 8).square() / 10) / 10 - 20
    side = (-along / 2).tanh()
    return side * (along + 8) / 50 - (1 - side.square()) / 2 * height
