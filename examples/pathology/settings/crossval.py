"""Settings of a cross-validation, and how those of two runs are compared."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError, listing
from examples.pathology.settings.cohort import (
    CohortConfig,
    device_option,
    folds_option,
    seed_option,
)
from examples.pathology.settings.option import above, at_least, each_once, needed, option

HEADS = 6  # of the Transformer: the paper
BASELINE = "baseline"
"""What trains the primary target alone, in place of a balancer."""
NAIVE = "naive"
"""The balancer that only adds the losses up."""
FIXED = "fixed"
"""What weighs the primary target with 1 and the others with a number found by a search."""
SEARCH_WEIGHT = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Steps of about 3, ten times down and up from equal weights: a cross-entropy is that much larger
than the squared error of a value scaled to [0, 1]."""


def whole_heads(width: int) -> str:
    """Be the rule that each attention head has a whole share of a width."""
    right = width > 0 and width % HEADS == 0
    return "" if right else f"a multiple of {HEADS}, the attention heads"


@dataclass(frozen=True)
class CrossvalConfig(CohortConfig):
    """Everything that decides what a cross-validation computes, and where."""

    out: Path = needed("The run folder; a stopped run is taken up again.")
    balancer: str = option(
        "naive", "baseline (the target alone), fixed, naive, uncert, dwa+pcgrad, autol+cagrad, ..."
    )
    folds: int = folds_option()
    epochs: int = option(32, "Most epochs per fold.", min=1, source="the paper")
    patience: int = option(
        7, "Epochs without a lower validation loss before a fold stops.", min=1, source="the paper"
    )
    learning_rate: float = option(0.0001, "Of AdamW.", rule=above(0), source="the paper")
    search_rate: tuple[float, ...] = option(
        (),
        "Learning rate to try in every fold, in place of --learning-rate; several. The validation "
        "loss of the target decides.",
        rule=each_once(above(0)),
    )
    search_weight: tuple[float, ...] = option(
        SEARCH_WEIGHT,
        "Weight of the auxiliary targets to try likewise, of the method fixed; several; default: "
        f"{' '.join(format(weight, 'g') for weight in SEARCH_WEIGHT)}.",
        rule=each_once(at_least(0)),
    )
    weight_decay: float = option(
        0.01, "Of AdamW.", rule=at_least(0), source="PyTorch, and the paper's code"
    )
    schedule: str = option(
        "constant",
        "constant, cosine (per epoch) or cosine-per-step.",
        choices=("constant", "cosine", "cosine-per-step"),
        source="the paper says nothing; its code has `cosine-per-step` for several targets",
    )
    standardize: bool = option(
        False,
        "Scale tile features by mean and sd of the training part.",
        source="the paper; features of random weights need it",
    )
    lookahead_data: str = option(
        "heldout",
        "Auto-Lambda's look-ahead: heldout (a tenth of the training part) or train.",
        choices=("heldout", "train"),
        source="the authors' code has `train`",
    )
    splits: Path | None = option(None, "splits.json of another run, to compare on equal folds.")
    width: int = option(
        384,
        f"Of the Transformer, a multiple of its {HEADS} attention heads.",
        min=1,
        rule=whole_heads,
        source="the paper",
    )
    layers: int = option(2, "Of its encoder, and of its decoder.", min=1, source="the paper")
    max_tiles: int | None = option(
        None,
        "Most tiles per patient and step, drawn anew in every epoch.",
        min=1,
        source="all: the paper",
    )
    precision: str = option(
        "float32",
        "float32; on a GPU also tf32 or bfloat16 (autocast).",
        choices=("float32", "tf32", "bfloat16"),
    )
    cache_gb: float = option(4.0, "Memory for tiles, in GB.", min=0)
    reference_protocol: bool = option(
        False, "Splits, complete cases, schedule and patience of the paper's published code."
    )
    note: str = option("", "A sentence for figures and report.")
    seed: int = seed_option()
    device: str = device_option()

    @property
    def searches(self) -> bool:
        """Whether every fold tries candidates."""
        return bool(self.search_rate) or self.balancer == FIXED

    def resolved(self) -> dict[str, Any]:
        """Return the settings as plain values that TOML can hold, with absolute paths."""
        values: dict[str, Any] = {}
        unused = "learning_rate" if self.search_rate else "search_rate"
        for name, value in asdict(self).items():
            if value is None or name == unused or (name in ("kind", "note") and not value):
                continue
            if name == "search_weight" and self.balancer != FIXED:
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

    Raises:
        UserError: Folds by site are asked for as well.
    """
    if not config.reference_protocol:
        return config
    if config.group_column is not None:
        raise UserError(
            "`reference-protocol` draws folds as the paper's code, which knows no sites, so "
            "`group-column` must not be given with it. Give one of them."
        )
    return replace(
        config,
        complete_cases=True,
        patience=8,
        schedule="constant" if config.balancer == BASELINE else "cosine-per-step",
        lookahead_data="train",
    )


def refuse_unused_weights(config: CrossvalConfig, methods: Iterable[str]) -> None:
    """Raise a `UserError` if weights are to be searched that no method takes."""
    if config.search_weight != SEARCH_WEIGHT and FIXED not in methods:
        raise UserError(
            f"`search-weight` is of the method {FIXED}, which must be asked for with it, but asked "
            f"for is {listing(methods)}. Leave it out, or name {FIXED} as well."
        )


# What may differ when a run folder is taken up again: it changes where, not what, is computed.
_FREE_ON_RESUME = frozenset({"out", "device", "note", "splits", "cache_gb"})


def settings_that_differ(config: CrossvalConfig, stored: Mapping[str, Any]) -> list[str]:
    """Return ``name: old -> new`` for every setting that would change a stored run's result."""
    now = config.resolved()
    names = [f.name for f in fields(CrossvalConfig) if f.name not in _FREE_ON_RESUME]
    pairs = ((name, stored.get(name), now.get(name)) for name in names)
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in pairs if old != new]
