"""What is compared: every strategy that there is, some pairs, and a network per task."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from examples.digits.setting import TASKS
from mtbalance import Balancer, GradientStrategy, Weighting, gradient, make_balancer, weighting
from mtbalance.gradient import CAGrad, PCGrad, Smoothed, Sum
from mtbalance.weighting import DWA, Equal, WarmUp

BASELINE = "sum"
"""Equal weights and the plain sum, with which all others are compared."""

SINGLE = "single-task"
"""A network per task: the reference."""

PAIRS = ("uncertainty+cagrad", "dwa+pcgrad", "autolambda+cagrad", "imtl")

WRAPPED: dict[str, Callable[[], tuple[Weighting, GradientStrategy]]] = {
    "warmup(dwa)": lambda: (WarmUp(DWA(), epochs=3), Sum()),
    "smoothed(cagrad)": lambda: (Equal(), Smoothed(CAGrad(), alpha=0.9)),
    "pcgrad(primary)": lambda: (Equal(), PCGrad(primary=TASKS[0])),
}
"""What needs more than a name for `make_balancer`."""

TOLD: dict[str, Any] = {
    "kind": ["classification", "classification", "regression"],  # of Uncertainty's likelihoods
    "weights": [1.0, 1.0, 2.0],  # Constant: ink counts twice
    "byzantine": 0,  # Krum can take none of three tasks for an outlier
    "trim": 1,  # TrimmedMean leaves one of three
}
"""What strategies must or should be told; all else are their defaults."""


def catalogue() -> list[str]:
    """Return the names of all methods: a strategy that is added to the library is in it."""
    gradients = [name for name in _strategies(gradient, GradientStrategy) if name != BASELINE]
    weightings = [name for name in _strategies(weighting, Weighting) if name != "equal"]
    return [BASELINE, *gradients, *weightings, *PAIRS, *_around_sums(), *WRAPPED]


def _strategies(family: ModuleType, base: type) -> list[str]:
    """Return the names of a family's strategies that are no wrappers of others."""
    return [name for name, kind in _classes(family, base).items() if not _wraps(kind)]


def _around_sums() -> dict[str, Callable[[], GradientStrategy]]:
    """Return the wrappers of gradient strategies that need no more than one, each around Sum."""
    return {
        f"{name}(sum)": functools.partial(kind, Sum())
        for name, kind in _classes(gradient, GradientStrategy).items()
        if _wraps(kind) and _required(kind) == {"strategy"}
    }


def _classes(family: ModuleType, base: type) -> dict[str, type]:
    public = {name.lower(): getattr(family, name) for name in sorted(family.__all__, key=str.lower)}
    return {
        name: kind
        for name, kind in public.items()
        if issubclass(kind, base) and not inspect.isabstract(kind)
    }


def _wraps(kind: type) -> bool:
    return bool({"strategy", "weighting"} & inspect.signature(kind).parameters.keys())


def _required(kind: type) -> set[str]:
    arguments = inspect.signature(kind).parameters.values()
    return {each.name for each in arguments if each.default is each.empty}


def balancer_of(
    method: str, *, shared: nn.Module | None, optimizer: Optimizer | None, seed: int
) -> Balancer:
    """Return the Balancer of a method.

    Args:
        method: A name of the catalogue, or another of `make_balancer`.
        shared: The trunk.
        optimizer: Of the model, for Auto-Lambda.
        seed: Of the random numbers that strategies draw.

    Raises:
        ValueError: If there is no such method.
    """
    if method in WRAPPED:
        return Balancer(*WRAPPED[method](), tasks=TASKS, shared=shared)
    if method in (around := _around_sums()):
        return Balancer(Equal(), around[method](), tasks=TASKS, shared=shared)
    options = {"tasks": TASKS, "shared": shared, "optimizer": optimizer, "seed": seed, **TOLD}
    try:
        return make_balancer(method, **options)
    except TypeError:
        # Who must favour a task is told one; PCGrad and Auto-Lambda could be, and are not.
        return make_balancer(method, primary=TASKS[0], **options)


def check(method: str) -> None:
    """Check that there is such a method.

    Args:
        method: As in `balancer_of`.

    Raises:
        ValueError: If there is not, with what is near.
    """
    if method not in catalogue():
        trunk = nn.Linear(1, 1)
        balancer_of(method, shared=trunk, optimizer=SGD(trunk.parameters()), seed=0)
