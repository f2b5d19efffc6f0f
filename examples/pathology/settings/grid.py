"""Settings of a grid of simulated cohorts: which cells, which methods, and how much of each."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError, listing
from examples.pathology.settings.cohort import seed_option
from examples.pathology.settings.crossval import BASELINE, NAIVE, whole_heads
from examples.pathology.settings.option import Rule, Settings, above, needed, option

BEST_NEW = "config"
"""Of the strategies that the paper lacks and that need no further choice, that of the best mean
rank in docs/digits.md. There, none of the best differs from equal weights beyond chance."""


def _each(rule: Callable[[Any], bool], must: str) -> Rule:
    """Return the rule that an axis has values, none of them twice, and each as it must be."""

    def broken(values: Sequence[Any]) -> str:
        right = values and len(set(values)) == len(values) and all(map(rule, values))
        return "" if right else f"different values, {must}"

    return broken


_share = _each(lambda value: 0 <= value <= 1, "each between 0 and 1")


@dataclass(frozen=True)
class GridConfig(Settings):
    """Which cells a grid has, what is trained in each, and how often.

    A cell is one value of each of the first four options.
    """

    out: Path = needed("Its folder; a stopped grid is taken up again.")
    _: KW_ONLY
    strength: tuple[float, ...] = option(
        (0.0, 0.9),
        "Correlation of the recorded auxiliary value with the signature that the tissue shows; "
        "several; default: 0 and 0.9.",
        rule=_share,
    )
    overlap: tuple[float, ...] = option(
        (0.0, 1.0),
        "Share of the biomarker that shows in the tissue of the signature, and not in tumour tiles "
        "of its own; several; default: 0 and 1.",
        rule=_share,
    )
    patients: tuple[int, ...] = option(
        (40, 160),
        "Patients with the biomarker's label; several; default: 40 and 160.",
        rule=_each(lambda value: value >= 40, "each at least 40"),
    )
    missing: tuple[float, ...] = option(
        (0.0, 0.7),
        "Share of these patients whose auxiliary value is missing; several; default: 0 and 0.7.",
        rule=_each(lambda value: 0 <= value <= 0.9, "each between 0 and 0.9"),
    )
    further: int = option(
        120,
        "Patients with the auxiliary value alone, in cells of their own where no other value is "
        "missing; 0: no such cells.",
        min=0,
    )
    methods: tuple[str, ...] = option(
        (BASELINE, NAIVE, "uncert", "pcgrad", "cagrad", "autol+cagrad", BEST_NEW),
        "baseline or a balancer; several, with baseline and naive among them.",
        flag="--method",
        source="the paper's, and the best new one in docs/digits.md",
    )
    cohorts: int = option(8, "Independent cohorts of every cell.", min=3)
    test_patients: int = option(400, "Patients of a cohort that are only tested on.", min=50)
    tiles: int = option(24, "Tiles of a patient.", min=8)
    epochs: int = option(10, "Most epochs of a training.", min=1)
    patience: int = option(4, "Epochs without a lower validation loss before it stops.", min=1)
    learning_rate: float = option(
        0.001, "Of AdamW.", rule=above(0), source="a few trials of the baseline"
    )
    width: int = option(48, "Of the Transformer, which has one layer.", min=1, rule=whole_heads)
    workers: int | None = option(None, "Processes to start; default: one per core.", min=1)
    scheduler: str | None = option(
        None, "A running Dask scheduler to use instead.", metavar="tcp://HOST:PORT"
    )
    seed: int = seed_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        lacking = [name for name in (BASELINE, NAIVE) if name not in self.methods]
        if lacking:
            raise UserError(
                f"`method` must be given for {listing(lacking)} as well, which others are compared "
                "with."
            )

    def resolved(self) -> dict[str, Any]:
        """Return what decides the results, as plain values that TOML can hold."""
        where = ("out", "workers", "scheduler")
        values = {name: value for name, value in asdict(self).items() if name not in where}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
