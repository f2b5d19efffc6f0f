"""The same step as other libraries make it, where they are installed: TorchJD and LibMTL.

Each library is used as its documentation says, on the same network and batch; a step is the forward
pass and everything up to filled ``.grad``.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.benchmarks.workloads import Workload

Step = Callable[[], None]

STRATEGIES = ("pcgrad", "cagrad", "graddrop")
C = 0.4
"""CAGrad's radius, for all libraries."""


def peers(workload: Workload) -> tuple[dict[str, Step], list[str]]:
    """Return steps by name (library, strategy, mode), and one line per library that is missing."""
    steps: dict[str, Step] = {}
    missing = []
    for library, make in (("torchjd", _torchjd_steps), ("LibMTL", _libmtl_steps)):
        if importlib.util.find_spec(library) is None:
            missing.append(f"{library} is not installed, and is left out.")
        else:
            steps |= make(workload)
    return steps, missing


def strategy_of(name: str) -> str:
    """Return the gradient strategy of a peer's step, by the name that it has here."""
    return name.split()[1]


# --- TorchJD --------------------------------------------------------------------------------------


def _torchjd_steps(workload: Workload) -> dict[str, Step]:
    """Return ``mtl_backward`` followed by ``jac_to_grad``.

    All tasks pass back at once (vmap) or one after the other (seq). Its option
    ``optimize_gramian_computation`` (gram), off by default, exists for strategies on Gramians.
    """
    steps = {}
    for strategy in STRATEGIES:
        steps[f"torchjd {strategy} vmap"] = _torchjd_step(workload, strategy, None)
        steps[f"torchjd {strategy} seq"] = _torchjd_step(workload, strategy, 1)
        if strategy != "graddrop":
            steps[f"torchjd {strategy} seq gram"] = _torchjd_step(
                workload, strategy, 1, optimize_gramian_computation=True
            )
    return steps


def _torchjd_step(workload: Workload, strategy: str, chunk: int | None, **options: bool) -> Step:
    from torchjd import aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    makers = {
        "pcgrad": aggregation.PCGrad,
        "cagrad": lambda: aggregation.CAGrad(c=C),
        "graddrop": aggregation.GradDrop,
    }
    of_heads = {id(p) for p in workload.heads.parameters()}
    below = [p for p in workload.model.parameters() if id(p) not in of_heads]

    def step() -> None:
        # First, and in the step: where a solver is not installed, this raises, and leaves nothing.
        aggregator = makers[strategy]()
        features = workload.features(workload.training.inputs)
        losses = workload.losses_of(features, workload.training)
        mtl_backward(list(losses.values()), features=features, parallel_chunk_size=chunk)
        jac_to_grad(below, aggregator, **options)

    return step


# --- LibMTL ---------------------------------------------------------------------------------------


def _libmtl_steps(workload: Workload) -> dict[str, Step]:
    makers = {
        "pcgrad": lambda: _libmtl_step(workload, "PCGrad"),
        "cagrad": lambda: _libmtl_step(workload, "CAGrad", calpha=C, rescale=1),
        # The rule of the paper, not the one on parameters that the others have: cheaper, and as
        # many backward passes.
        "graddrop-of-features": lambda: _libmtl_graddrop_step(workload, leak=0.0),
    }
    return {f"LibMTL {strategy}": make() for strategy, make in makers.items()}


def _libmtl_weighting(name: str) -> type:
    """Import a weighting of LibMTL without the package around it.

    ``import LibMTL`` imports its trainer and its models too, and these a module that torchvision no
    longer has (``torchvision.models.utils``). The weightings need torch, NumPy and SciPy.
    """
    if "LibMTL" not in sys.modules:
        spec = importlib.util.find_spec("LibMTL")
        sys.modules["LibMTL"] = importlib.util.module_from_spec(spec)  # found, but not run
    return getattr(importlib.import_module("LibMTL.weighting"), name)


class _LibMTLModel:
    """What LibMTL's weightings expect of the model that they are mixed into."""

    def prepare(self, workload: Workload, *, rep_grad: bool) -> None:
        self.task_name = list(workload.tasks)
        self.task_num = len(workload.tasks)
        self.device = workload.training.inputs.device
        self.rep_grad = rep_grad
        self.share_params = workload.parameters
        self.rep: dict[str, Tensor] = {}
        self.rep_tasks: dict[str, Tensor] = {}

    def get_share_params(self) -> list[Tensor]:
        return self.share_params

    def zero_grad_share_params(self) -> None:
        # As `zero_grad()` did when LibMTL was published. What it does today, None, breaks LibMTL,
        # which writes into `param.grad.data` afterwards.
        for parameter in self.share_params:
            if parameter.grad is not None:
                parameter.grad.zero_()


def _libmtl_model(workload: Workload, name: str, *, rep_grad: bool) -> Any:
    model = type(name, (_LibMTLModel, _libmtl_weighting(name)), {})()
    model.prepare(workload, rep_grad=rep_grad)
    return model


def _libmtl_step(workload: Workload, name: str, **options: float) -> Step:
    """Return a step of a strategy on the gradients of the shared parameters."""
    make = functools.cache(lambda: _libmtl_model(workload, name, rep_grad=False))

    def step() -> None:
        weighting = make()  # in the first step, so that an error of the import belongs to it
        weighting.backward(list(workload.losses().values()), **options)

    return step


def _libmtl_graddrop_step(workload: Workload, **options: float) -> Step:
    """Return a step of GradDrop, which LibMTL has on the gradients of the features only."""
    make = functools.cache(lambda: _libmtl_model(workload, "GradDrop", rep_grad=True))

    def step() -> None:
        weighting = make()
        features = workload.features(workload.training.inputs)
        losses = []
        for task, target in workload.training.targets.items():  # as LibMTL's `_prepare_rep` does
            weighting.rep[task] = features
            weighting.rep_tasks[task] = features.detach().clone().requires_grad_()
            losses.append(workload.loss(task, weighting.rep_tasks[task], target))
        weighting.backward(losses, **options)
        weighting.rep.clear()  # with it goes the graph, which LibMTL retains

    return step
