"""Losses of two parameters on which every strategy is shown, and the paths that training takes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtbalance import Balancer
from mtbalance import gradient as gradients
from mtbalance import weighting as weightings
from mtbalance.gradient import Sum
from mtbalance.weighting import Equal, Weighting

CENTRES = ((-1.2, -0.5), (1.2, -0.5), (0.2, 1.3))
"""Where the losses of the tasks are lowest."""

SHAPES = (((0.5, 0.25), (0.25, 1.0)), ((2.4, -1.4), (-1.4, 3.2)), ((1.0, 0.0), (0.0, 1.0)))
"""Their second derivatives: the second task's loss is the steepest."""

SLOPES = ((-2.2, -0.2), (0.9, -0.9), (-0.5, -1.3))
"""Gradients: the first two conflict, and their sum conflicts with the second."""

LOWEST = 0.2
"""Of every loss: some weightings take logarithms."""

STARTS = ((-0.6, 1.5), (1.9, 1.3), (-1.9, -1.5), (1.5, -1.7))
EXTENT = (-2.4, 2.4, -2.0, 2.0)
STEPS, LR, EPOCH = 240, 0.03, 20
"""Of plain gradient descent, and how many of its steps are an epoch."""

MADE: dict[str, str] = {
    "AutoLambda": "AutoLambda(optimizer, primary=['task 1'], lr=0.02, minimum=0.0)",
    "Constant": "Constant([3.0, 1.0])",
    "ExcessMTL": "ExcessMTL(lr=0.1)",
    "FAMO": "FAMO(lr=0.1)",
    "GradNorm": "GradNorm(lr=0.1)",
    "PBI": "PBI(theta=1.0)",
    "WarmUp": "WarmUp(GeometricMean(), epochs=3)",
    "GradVac": "GradVac(beta=0.1)",
    "GradientCosine": "GradientCosine(primary=0)",
    "Krum": "Krum(byzantine=0)",
    "MoCo": "MoCo(gamma=0.5)",
    "Normalized": "Normalized(UPGrad())",
    "PCD": "PCD(primary=0, beta=0.9)",
    "RowMean": "RowMean(UPGrad())",
    "Smoothed": "Smoothed(MGDA(), alpha=0.9)",
    "TrimmedMean": "TrimmedMean(trim=1)",
}
"""How a strategy is made where not by its defaults: with what it requires, or learning faster."""

OF_THREE = ("Krum", "TrimmedMean")
"""What leaves tasks out needs a third."""


class Walk(NamedTuple):
    """What a strategy did from one start.

    Args:
        points: Of the path, shape (steps + 1, 2).
        weights: Of the tasks in each step, shape (steps, m).
        direction: What the strategy made of the first step's gradients, shape (2,).
    """

    points: Tensor
    weights: Tensor
    direction: Tensor


def call_of(name: str) -> str:
    """Return how the strategy of a picture is made.

    Args:
        name: Of its class.
    """
    return MADE.get(name, f"{name}()")


def tasks_of(name: str) -> int:
    """Return how many tasks the picture of a strategy has.

    Args:
        name: Of its class.
    """
    return 3 if name in OF_THREE else 2


def losses_at(points: Tensor, tasks: int = 2) -> Tensor:
    """Return the losses, shape (..., m), at points of shape (..., 2).

    Args:
        points: The two parameters.
        tasks: How many, m.
    """
    apart = points[..., None, :] - points.new_tensor(CENTRES[:tasks])
    bent = torch.einsum("...mi,mij->...mj", apart, points.new_tensor(SHAPES[:tasks]))
    return LOWEST + (apart * bent).sum(-1) / 2


def pareto_set(tasks: int = 2, count: int = 101) -> Tensor:
    """Return the points, shape (n, 2), where a weighted sum of two tasks' losses is lowest.

    Of three tasks, these are the edges of the set.

    Args:
        tasks: How many.
        count: How many points of each edge.
    """
    centres, shapes = (torch.tensor(each, dtype=torch.float64) for each in (CENTRES, SHAPES))
    share = torch.linspace(0, 1, count, dtype=torch.float64)[:, None, None]
    edges = [(0, 1), (1, 2), (2, 0)][: 1 if tasks == 2 else 3]
    points = []
    for a, b in edges:
        bent = (1 - share) * shapes[a] + share * shapes[b]
        pull = (1 - share) * (shapes[a] @ centres[a])[:, None]
        pull = pull + share * (shapes[b] @ centres[b])[:, None]
        points.append(torch.linalg.solve(bent, pull)[..., 0])
    return torch.cat(points)


def slopes_at(points: Tensor, tasks: int = 2) -> Tensor:
    """Return losses, shape (m,), whose gradients are the slopes everywhere.

    Args:
        points: The two parameters.
        tasks: How many, m.
    """
    return 5 + points.new_tensor(SLOPES[:tasks]) @ points


def walks(name: str, steps: int = STEPS) -> list[Walk]:
    """Train from every start with a strategy, the other half of the Balancer being the plain one.

    Args:
        name: Of its class.
        steps: To take from each start.
    """
    return [walk(name, start, steps) for start in STARTS]


def walk(
    name: str,
    start: tuple[float, float],
    steps: int,
    losses_at: Callable[[Tensor, int], Tensor] = losses_at,
) -> Walk:
    """Train from one start.

    Args:
        name: Of the strategy's class.
        start: The two parameters.
        steps: To take.
        losses_at: The losses, shape (m,), of the parameters and the number of tasks.
    """
    tasks = tuple(f"task {i + 1}" for i in range(tasks_of(name)))
    point = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.SGD([point], lr=LR)
    balancer = _balancer(name, tasks, point, optimizer)

    def losses() -> dict[str, Tensor]:
        return dict(zip(tasks, losses_at(point, len(tasks)).unbind(), strict=True))

    points, weights, directions = [point.detach().clone()], [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        record = balancer.backward(losses(), **_further(balancer, losses))
        directions.append(torch.zeros(2) if point.grad is None else point.grad.clone())
        optimizer.step()
        balancer.after_step(losses)
        if step % EPOCH == 0:
            balancer.end_epoch()
        points.append(point.detach().clone())
        weights.append(torch.tensor([record.weights[task] for task in tasks]))
    return Walk(torch.stack(points), torch.stack(weights), directions[0])


def _balancer(
    name: str, tasks: Sequence[str], point: nn.Parameter, optimizer: torch.optim.Optimizer
) -> Balancer:
    """Return what the words on a strategy's page make, beside the plain other half."""
    names: dict[str, Any] = {**vars(weightings), **vars(gradients), "optimizer": optimizer}
    made = eval(call_of(name), names)  # noqa: S307
    pair = (made, Sum()) if isinstance(made, Weighting) else (Equal(), made)
    balancer = Balancer(*pair, tasks=tasks, shared=[point])
    if learned := list(balancer.parameters()):
        optimizer.add_param_group({"params": learned})
    return balancer


def _further(balancer: Balancer, losses: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """Return what some strategies look at besides the batch: here, the same losses again."""
    return {
        "validation": losses if balancer.weighting.needs_validation else None,
        "batches": (losses,) * min(balancer.gradient.further_batches, default=0),
    }
