"""The options of all that ``make_balancer`` makes, for type checkers."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch.optim import Optimizer
from typing_extensions import Required, TypedDict

from mtbalance._shared import Shared

_Kind = Literal["regression", "classification"]
_PerTask = Mapping[str, float] | Sequence[float]


class Options(TypedDict, total=False):
    """Arguments of the Balancer, the weightings and the gradient strategies, by name."""

    tasks: Required[Sequence[str]]
    shared: Shared | Mapping[str, Shared] | None
    process_group: "torch.distributed.ProcessGroup | None"
    nonfinite: Literal["raise", "drop", "skip", "propagate"]
    every: int
    dtype: torch.dtype | None
    chunk: int | None

    alpha: float
    beta: float
    beta_sigma: float
    byzantine: int
    c: float
    correct: bool
    eta: float
    expectation: bool
    gamma: float
    gamma_sigma: float
    generator: torch.Generator | None
    groups: int
    ideal: _PerTask | None
    ignore_zero_rows: bool
    init: float
    kind: _Kind | Sequence[_Kind] | Mapping[str, _Kind]
    lam: float
    leak: float | Sequence[float]
    lr: float
    max_log_weight: float
    min_log_var: float
    minimum: float | None
    momentum: float
    mu: float
    n_iter: int
    nadir: _PerTask | None
    normalize: Literal["absolute", "official"]
    optimizer: Optimizer | Sequence[Optimizer] | None
    order: Literal["random", "fixed"]
    penalty: float
    preference: _PerTask | None
    primary: str | int | Sequence[str] | None
    projection: Literal["simplex", "softmax"]
    regularizer: Literal["log", "log1p"]
    rescale: Literal[0, 1, 2]
    rho: float
    rtol: float | None
    scale: Literal["min", "median", "rmse", "sum", "official"]
    seed: int
    selected: int
    sigma: float
    tau: float | _PerTask
    temperature: float
    theta: float
    trim: int
    warmup_epochs: int
    weighted: bool
    weights: _PerTask
