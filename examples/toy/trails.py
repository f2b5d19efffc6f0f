"""Training the two parameters from each start, and where that leads."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Literal

import torch
from torch import Tensor

from examples.toy.problem import STARTS, TASKS, Model, minimum_of_mean, pareto_set
from mtbalance import Balancer, make_balancer

RADIUS = 0.5
"""CAGrad's c, as in the toy of its authors."""

POINTS = 1000
"""Of a trail that are kept, at most: more than can be seen."""

NEAR = 0.5
"""How far from a point a trail may end that has reached it; the plane is some 20 wide."""

SETTLED = 1e-3
"""A trail that stays this near for its last RECENT points has settled, and is not walked on."""

RECENT = 10

Ending = Literal["minimum", "pareto", "elsewhere"]


@dataclass(frozen=True)
class Trail:
    """What a strategy made of one start.

    Args:
        points: Parameters ``(k, 2)`` from the start to the end.
        steps: After how many steps each was reached ``(k,)``.
        scale: Of the first loss.
    """

    points: Tensor
    steps: Tensor
    scale: float

    @property
    def end(self) -> Tensor:
        """Where it ends, ``(2,)``."""
        return self.points[-1]

    @property
    def ending(self) -> Ending:
        """What it has reached: the minimum of the mean, another Pareto point, or neither."""
        if (self.end - minimum_of_mean(self.scale)).norm() < NEAR:
            return "minimum"
        return "pareto" if (self.end - pareto_set()).norm(dim=1).min() < NEAR else "elsewhere"


@dataclass(frozen=True)
class Setting:
    """How a trail is walked.

    Args:
        steps: To take at most; a trail that has settled ends there.
        lr: Learning rate of Adam.
        scale: Of the first loss.
    """

    steps: int
    lr: float
    scale: float = 1.0


def title(strategy: str) -> str:
    """Return the classes that a name stands for; the plain halves go unsaid.

    Args:
        strategy: A name for `make_balancer`.
    """
    balancer = _balancer(strategy)
    classes = [type(part).__name__ for part in (balancer.weighting, balancer.gradient)]
    return " + ".join(name for name in classes if name not in ("Equal", "Sum")) or "Sum"


def follow(strategy: str, start: tuple[float, float], setting: Setting) -> Trail:
    """Train from one start, with Adam as in the paper.

    Args:
        strategy: A name for `make_balancer`.
        start: The parameters at first.
        setting: How many steps of which length.
    """
    model, steps = Model(start, setting.scale), setting.steps
    balancer = _balancer(strategy, model)
    optimizer = torch.optim.Adam([*model.parameters(), *balancer.parameters()], lr=setting.lr)
    stride = -(-steps // POINTS)
    points, walked = [model.point.detach().clone()], [0]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        balancer.backward(model())
        optimizer.step()
        balancer.after_step(model)
        if step % stride == 0 or step == steps:
            points.append(model.point.detach().clone())
            walked.append(step)
            balancer.end_epoch()
            if _settled(points):
                break
    return Trail(torch.stack(points), torch.tensor(walked), setting.scale)


def _settled(points: list[Tensor]) -> bool:
    if len(points) <= RECENT:
        return False
    recent = torch.stack(points[-RECENT - 1 :])
    return bool((recent - recent[-1]).norm(dim=1).max() < SETTLED)


def follow_all(
    strategies: Sequence[str], setting: Setting, processes: int = 1
) -> list[list[Trail]]:
    """Return the trails of every strategy from all starts.

    Args:
        strategies: Names for `make_balancer`.
        setting: How many steps of which length.
        processes: That work side by side; what they do does not depend on their number.
    """
    jobs = [(strategy, start, setting) for strategy in strategies for start in STARTS]
    if processes == 1:
        trails = [follow(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(
            processes, get_context("spawn"), torch.set_num_threads, (1,)
        ) as pool:
            trails = list(pool.map(follow, *zip(*jobs, strict=True)))
    return [trails[i : i + len(STARTS)] for i in range(0, len(trails), len(STARTS))]


def _balancer(strategy: str, model: Model | None = None) -> Balancer:
    return make_balancer(strategy, tasks=TASKS, shared=model, c=RADIUS, seed=0)
