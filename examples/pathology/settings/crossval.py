"""Settings: read from TOML with every key checked, written back resolved, compared between runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.settings.cohort import CohortConfig

if sys.version_info >= (3, 11):
    pass
else:  # the same parser under its older name
    pass

LOOKAHEAD_SOURCES = ("heldout", "train")
SCHEDULES = ("constant", "cosine", "cosine-per-step")
HEADS = 6  # of the Transformer: the paper
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class CrossvalConfig(CohortConfig):
    """Everything that decides what a cross-validation computes; what it is of, see `CohortConfig`.

    Args:
        out: The run folder.
        balancer: ``baseline`` (the primary target alone) or a name that ``mtbalance`` knows.
        folds: Number of folds, at least 2 (5: the paper).
        epochs: Most epochs per fold, at least 1 (32: the paper).
        patience: Epochs without a lower validation loss of the primary target before a fold stops
            (7: the paper).
        learning_rate: Of AdamW (1e-4: the paper).
        weight_decay: Of AdamW (0.01: PyTorch's default, which the paper's code uses).
        schedule: ``constant``, as the paper says nothing; ``cosine``, one step per epoch; or
            ``cosine-per-step``, which swings between the learning rate and 0 every `epochs` steps,
            as the paper's code does for several targets.
        standardize: Whether tile features are brought to mean 0 and standard deviation 1 over the
            training part. The paper does not; features of random weights, which hardly vary
            around a large mean, need it.
        lookahead_data: Where Auto-Lambda's look-ahead batches come from: ``heldout``, a tenth of
            the training part that is then not trained on, or ``train``, as in the authors' code.
        splits: A ``splits.json`` of another run to use, so that both are compared on equal folds.
        width: Width of the Transformer, a multiple of its 6 attention heads (384: the paper).
        layers: Layers of its encoder, and of its decoder (2: the paper).
        max_tiles: Most tiles per patient in a training step, drawn anew in every epoch from the
            seed; ``None``: all (the paper). Validation and test always see all.
        precision: ``float32``; ``tf32``, faster on recent NVIDIA GPUs at 10 bits of mantissa in
            matrix products; or ``bfloat16``, autocast at 7 bits.
        cache_gb: Memory for tiles; what does not fit is read again, ahead of its use.
        reference_protocol: Whether to use the choices of the paper's published code; see
            `with_reference_protocol`.
        note: A sentence for the figures and the report, such as "synthetic slides".
        seed: Of splits, initial weights, order and dropout; at least 0.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    out: Path
    balancer: str = "naive"
    folds: int = 5
    epochs: int = 32
    patience: int = 7
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "constant"
    standardize: bool = False
    lookahead_data: str = "heldout"
    splits: Path | None = None
    width: int = 384
    layers: int = 2
    max_tiles: int | None = None
    precision: str = "float32"
    cache_gb: float = 4.0
    reference_protocol: bool = False
    note: str = ""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"folds": 2, "epochs": 1, "patience": 1, "layers": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"`{name}` must be at least {low}, but got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise UserError(f"`learning-rate` must be above 0, but got {self.learning_rate}.")
        if not self.weight_decay >= 0:
            raise UserError(f"`weight-decay` must be at least 0, but got {self.weight_decay}.")
        if self.width < 1 or self.width % HEADS:
            raise UserError(
                f"`width` must be a multiple of {HEADS}, the attention heads, but got {self.width}."
            )
        if self.max_tiles is not None and self.max_tiles < 1:
            raise UserError(f"`max-tiles` must be at least 1, but got {self.max_tiles}.")
        if not self.cache_gb >= 0:
            raise UserError(f"`cache-gb` must be at least 0, but got {self.cache_gb}.")
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("lookahead-data", self.lookahead_data, LOOKAHEAD_SOURCES)
        _one_of("schedule", self.schedule, SCHEDULES)

    def resolved(self) -> dict[str, Any]:
        """Return the settings as plain values that TOML can hold, with absolute paths."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if value is None or (name in ("kind", "note") and not value):
                continue
            plain = str(value.resolve()) if isinstance(value, Path) else value
            values[name] = list(plain) if isinstance(plain, tuple) else plain
        return values


REFERENCE_SEED = 1337  # of the splits in the paper's published code


def with_reference_protocol(config: CrossvalConfig) -> CrossvalConfig:
    """Return the settings with the choices of the paper's published code, where asked for.

    They are: complete cases alone; folds and validation parts of scikit-learn's `StratifiedKFold`
    and `train_test_split` with seed 1337 (for a regression, which that code never splits, by
    `splits.strata_of`); for several targets a cosine schedule that is stepped per patient, and none
    for the baseline; 8 epochs of patience, which an off-by-one makes of the 7 in the paper;
    Auto-Lambda looking ahead on the training stream. What the code gets wrong beyond such choices
    (frozen uncertainty weights, DWA fed the wrong loss, ...) is not repeated.
    """
    if not config.reference_protocol:
        return config
    return replace(
        config,
        complete_cases=True,
        patience=8,
        schedule="constant" if config.balancer == "baseline" else "cosine-per-step",
        lookahead_data="train",
    )


# What may differ when a run folder is taken up again: it changes where, not what, is computed.
_FREE_ON_RESUME = frozenset({"out", "device", "note", "splits", "cache_gb"})


def settings_that_differ(config: CrossvalConfig, stored: Mapping[str, Any]) -> list[str]:
    """Return ``name: old -> new`` for every setting that would change a stored run's result."""
    now = config.resolved()
    names = [f.name for f in fields(CrossvalConfig) if f.name not in _FREE_ON_RESUME]
    pairs = ((name, stored.get(name), now.get(name)) for name in names)
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in pairs if old != new]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"`{name}` must be one of {listing(known)}, but got {value!r}.{nearest(value, known)}"
        )
