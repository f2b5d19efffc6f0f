"""The same step as other libraries make it, where they are installed: TorchJD and LibMTL.

Each library is used as its documentation says, on the same network and batch; a step is the forward
pass and everything up to filled ``.grad``.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.workloads import Workload

Step = Callable[[], None]

LIBRARIES = ("torchjd", "LibMTL")
STRATEGIES = ("pcgrad", "cagrad", "graddrop")
C = 0.4
"""CAGrad's radius, for all libraries."""


def peers(
    workload: Workload, libraries: Collection[str] = LIBRARIES
) -> tuple[dict[str, Step], list[str]]:
    """Return steps by name (library, strategy, mode), and one line per library that is missing."""
    makers = {"torchjd": _torchjd_steps, "LibMTL": _libmtl_steps}
    steps: dict[str, Step] = {}
    missing = []
    for library in libraries:
        make = makers[library]
        if importlib.util.find_spec(library) is None:
            missing.append(f"{library} is not installed, and is left out.")
        else:
            steps |= make(workload)
    return steps, missing


def strategy_of(name: str) -> str:
    """Return the gradient strategy of a peer's step, by the name that it has here."""
    return name.split()[1]


def byzantine_of(m: int) -> int:
    """Return how many of m gradients Krum takes for outliers: as many as it can, here and there."""
    return max(m - 3, 0)


def trim_of(m: int) -> int:
    """Return how many entries TrimmedMean leaves out at each end."""
    return min(1, (m - 1) // 2)


# --- TorchJD --------------------------------------------------------------------------------------


def _torchjd_steps(workload: Workload) -> dict[str, Step]:
    """Return ``mtl_backward`` followed by ``jac_to_grad``.

    All tasks pass back at once (vmap) or one after the other (seq). Its option
    ``optimize_gramian_computation`` (gram), off by default, exists for strategies on Gramians.
    """
    steps = {}
    for strategy in STRATEGIES:
        make = functools.partial(_aggregator, strategy, workload)
        steps[f"torchjd {strategy} vmap"] = _torchjd_step(workload, make, None)
        steps[f"torchjd {strategy} seq"] = _torchjd_step(workload, make, 1)
        if strategy != "graddrop":
            steps[f"torchjd {strategy} seq gram"] = _torchjd_step(
                workload, make, 1, optimize_gramian_computation=True
            )
    return steps


def _aggregators() -> dict[str, type]:
    """Return TorchJD's aggregators by the names that strategies have here."""
    from torchjd import aggregation

    kinds = {name.lower(): getattr(aggregation, name) for name in aggregation.__all__}
    return {**kinds, "randomgradient": kinds["random"]}


def _aggregator(strategy: str, workload: Workload) -> Any:
    m = len(workload.tasks)
    options = {
        "cagrad": {"c": C},
        "fairgrad": {"alpha": 1.0},
        "krum": {"n_byzantine": byzantine_of(m)},
        "nashmtl": {"n_tasks": m},
        "trimmedmean": {"trim_number": trim_of(m)},
    }
    return _aggregators()[strategy](**options.get(strategy, {}))


def _torchjd_step(
    workload: Workload, make: Callable[[], Any], chunk: int | None, **options: bool
) -> Step:
    from torchjd.autojac import jac_to_grad, mtl_backward

    make = functools.cache(make)  # one, as some remember
    of_heads = {id(p) for p in workload.heads.parameters()}
    below = [p for p in workload.model.parameters() if id(p) not in of_heads]

    def step() -> None:
        # First, and in the step: where a solver is not installed, this raises, and leaves nothing.
        aggregator = make()
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
        self.epoch = 2  # some methods begin when they have seen two
        self.train_loss_buffer = np.ones((self.task_num, 3))

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
    model.init_param()
    return model


def _libmtl_step(workload: Workload, name: str, **options: Any) -> Step:
    """Return a step of a strategy on the gradients of the shared parameters, if it needs these."""
    make = functools.cache(lambda: _libmtl_model(workload, name, rep_grad=False))

    def step() -> None:
        weighting = make()  # in the first step, so that an error of the import belongs to it
        weighting.backward(torch.stack(list(workload.losses().values())), **options)

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


# --- the whole catalogue --------------------------------------------------------------------------

LIBMTL: dict[str, tuple[str, dict[str, Any]]] = {
    "equal+sum": ("EW", {}),
    "equal+cagrad": ("CAGrad", {"calpha": C, "rescale": 1}),
    "equal+gradvac": ("GradVac", {"beta": 0.01}),
    "equal+mgda": ("MGDA", {"mgda_gn": "none"}),
    "equal+pcgrad": ("PCGrad", {}),
    "dwa+sum": ("DWA", {"T": 2.0}),
    "geometricmean+sum": ("GLS", {}),
    "gradnorm+sum": ("GradNorm", {"alpha": 1.5}),
    "randomweighting+sum": ("RLW", {"dist": "Normal"}),
    "uncertainty+sum": ("UW", {}),
}
"""What LibMTL calls a weighting and a gradient strategy that are one class there."""

SCALARIZERS: dict[str, Callable[[Any, int], Any]] = {
    "constant": lambda jd, m: jd.Constant(torch.ones(m)),
    "cosmos": lambda jd, m: jd.COSMOS(1.0, torch.ones(m)),
    "dwa": lambda jd, m: jd.DWA(),
    "equal": lambda jd, m: jd.Sum(),
    "famo": lambda jd, m: jd.FAMO(m),
    "geometricmean": lambda jd, m: jd.GeometricMean(),
    "imtll": lambda jd, m: jd.IMTLL(m),
    "pbi": lambda jd, m: jd.PBI(5.0, torch.ones(m)),
    "randomweighting": lambda jd, m: jd.Random(),
    "stch": lambda jd, m: jd.STCH(1.0),
    "uncertainty": lambda jd, m: jd.UW(m),
}
"""TorchJD's weightings, by the names that they have here."""

ACROSS = {"modo": "MoDoWeighting", "sdmgrad": "SDMGradWeighting"}
"""What TorchJD calls strategies that learn from two batches: there, weights of their gradients."""


def peers_of_catalogue(
    workload: Workload, variants: Iterable[str]
) -> tuple[dict[str, dict[str, Step]], list[str]]:
    """Return steps by library and by variant, where a library has it, and lines as ``peers``.

    Variants are names for ``make_balancer``. Of TorchJD's modes it is the one that takes the least
    memory, task by task, and where it exists, the faster way to the Gramian.
    """
    steps: dict[str, dict[str, Step]] = {}
    missing = []
    for library, make in (("torchjd", _torchjd_of), ("LibMTL", _libmtl_of)):
        if importlib.util.find_spec(library) is None:
            missing.append(f"{library} is not installed, and is left out.")
            continue
        made = {variant: make(workload, variant) for variant in variants}
        steps[library] = {variant: step for variant, step in made.items() if step is not None}
    return steps, missing


def _torchjd_of(workload: Workload, variant: str) -> Step | None:
    weighting, gradient = variant.split("+")
    if weighting == "excessmtl" and gradient == "sum":  # an aggregator there
        make = functools.partial(_aggregator, weighting, workload)
        return _torchjd_step(workload, make, 1)
    if gradient == "sum":
        return _scalarized_step(workload, weighting) if weighting in SCALARIZERS else None
    if weighting == "equal" and gradient in ACROSS:
        return _torchjd_step_across(workload, ACROSS[gradient])
    kind = _aggregators().get(gradient)
    if weighting != "equal" or kind is None:
        return None
    from torchjd.aggregation import GramianWeightedAggregator

    make = functools.partial(_aggregator, gradient, workload)
    return _torchjd_step(
        workload,
        make,
        1,
        optimize_gramian_computation=issubclass(kind, GramianWeightedAggregator),
    )


def _torchjd_step_across(workload: Workload, name: str) -> Step:
    """Return a step of TorchJD's example with two batches per step, task by task."""
    from torchjd import aggregation
    from torchjd.autojac import jac

    weighting = getattr(aggregation, name)().to(workload.training.inputs.device)

    def step() -> None:
        losses, rows = [], []
        for batch in (workload.losses(), workload.validation_losses()):
            losses.append(torch.stack(list(batch.values())))
            parts = jac(losses[-1], workload.parameters, retain_graph=True, parallel_chunk_size=1)
            rows.append(torch.cat([part.flatten(1) for part in parts], 1))
        weights = weighting(rows[0] @ rows[1].T)
        ((losses[0] + losses[1]) / 2).backward(weights)

    return step


def _scalarized_step(workload: Workload, weighting: str) -> Step:
    from torchjd import scalarization

    scalarizer = SCALARIZERS[weighting](scalarization, len(workload.tasks))
    scalarizer.to(workload.training.inputs.device)

    def step() -> None:
        scalarizer(torch.stack(list(workload.losses().values()))).backward()
        if weighting == "famo":
            scalarizer.update(torch.stack(list(workload.losses().values())))

    return step


def _libmtl_of(workload: Workload, variant: str) -> Step | None:
    if variant not in LIBMTL:
        return None
    name, options = LIBMTL[variant]
    return _libmtl_step(workload, name, **options)
