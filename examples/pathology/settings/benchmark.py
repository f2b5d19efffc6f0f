"""Settings of a benchmark: what to compare, and where to compute it."""

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

from examples.pathology.common.errors import UserError, listing
from examples.pathology.settings.cohort import Sources, kind_option
from examples.pathology.settings.crossval import (
    BASELINE,
    FIXED,
    CrossvalConfig,
    refuse_unused_weights,
    with_reference_protocol,
)
from examples.pathology.settings.option import Settings, needed, nested, option
from examples.pathology.settings.runs import PageConfig

_ALL = ("naive", "uncert", "dwa", "autol", "graddrop", "pcgrad", "cagrad")
METHODS = (
    BASELINE,
    *_ALL,
    *(f"{weighting}+{gradient}" for weighting in _ALL[1:4] for gradient in _ALL[4:]),
)
"""The baseline and `mtbalance.PAPER_COMBINATIONS`, whose import would take seconds."""


def folder_name(auxiliary: str) -> str:
    """Return the name of an auxiliary target as a folder."""
    return re.sub(r"[^\w.+-]+", "-", auxiliary.casefold()).strip("-.") or "auxiliary"


def _refuse_clashes(auxiliary: Sequence[str]) -> None:
    """Raise if two auxiliary targets would have one folder."""
    names = [folder_name(name) for name in auxiliary]
    clashing = [name for name in auxiliary if names.count(folder_name(name)) > 1]
    if clashing or BASELINE in names:
        raise UserError(
            "Every auxiliary target must have a folder of its own, but "
            f"{listing(clashing or [BASELINE])} would not. Rename a column of the clinical table."
        )


@dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """What to compare, and where to compute it.

    Args:
        crossval: What all runs have in common. Its `out` is the folder of the benchmark, its
            `device` may name several for workers to share (``cuda:0,cuda:1``), its `cache_gb` is
            for each worker, and its `auxiliary`, `kind` and `balancer` are not used.
        command: What was typed, for the report.
    """

    auxiliary: tuple[str, ...] = needed(
        "Auxiliary target, joined with the primary one on its own; several."
    )
    _: KW_ONLY
    methods: tuple[str, ...] = option(
        METHODS,
        "baseline, fixed or a balancer; several; default: baseline and all 16.",
        flag="--method",
    )
    seeds: int = option(
        1, "How many initial weights to repeat every job from, on the same folds.", min=1
    )
    workers: int | None = option(
        None, "Processes to start; default: one per GPU, or one per core.", min=1
    )
    scheduler: str | None = option(
        None, "A running Dask scheduler to use instead.", metavar="tcp://HOST:PORT"
    )
    threads: int = option(1, "Of PyTorch in each job; the last digits depend on it.", min=1)
    external_clini: Path | None = option(None, "Clinical table of a cohort to deploy every run on.")
    external_slide_table: Path | None = option(None, "Its slide table.")
    external_features: Path | None = option(None, "Its feature files.")
    max_failures: int | None = option(None, "End when more jobs than this have failed.", min=0)
    kind: tuple[str, ...] = kind_option()
    page: PageConfig = nested(PageConfig)
    crossval: CrossvalConfig = nested(
        without=("balancer",),
        help={
            "out": "Its folder; a stopped benchmark is taken up again.",
            "device": "auto, cpu or cuda; several (cuda:0,cuda:1) share the jobs.",
        },
    )
    command: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.auxiliary:
            raise UserError("`auxiliary` must name at least one target, but names none.")
        if self.workers is not None and self.scheduler is not None:
            raise UserError(
                "`workers` and `scheduler` must not be given together: a scheduler has its own "
                "workers."
            )
        for name, values in (("auxiliary", self.auxiliary), ("methods", self.methods)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise UserError(f"`{name}` must name each once, but got {listing(twice)} twice.")
        if not self.methods:
            raise UserError("`methods` must name at least one method, but names none.")
        refuse_unused_weights(self.crossval, self.methods)
        _refuse_clashes(self.auxiliary)
        external = (self.external_clini, self.external_slide_table, self.external_features)
        if None in external and any(external):
            raise UserError(
                "`external-clini`, `external-slide-table` and `external-features` must be given "
                "together, but one of them is missing."
            )
        # What each run is told is told here: a wrong kind is refused before anything is read.
        replace(self.crossval, auxiliary=self.auxiliary, kind=self.kind)

    @property
    def external(self) -> Sources | None:
        """A cohort to deploy every run on, in tables with the columns of the first."""
        clini, slide_table = self.external_clini, self.external_slide_table
        if clini is None or slide_table is None or self.external_features is None:
            return None
        columns = self.crossval.patient_column, self.crossval.filename_column
        return Sources(clini, slide_table, self.external_features, *columns)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that local workers share; empty for all GPUs, or for those of a scheduler."""
        names = tuple(name.strip() for name in self.crossval.device.split(","))
        return () if names == ("auto",) or self.scheduler is not None else names

    @property
    def job_device(self) -> str:
        """The device as a job names it: a worker sees the one that is its own."""
        return "cuda" if self.crossval.device.startswith("cuda") else self.crossval.device

    @property
    def own_baseline(self) -> bool:
        """Whether each auxiliary target has patients, splits and a baseline of its own."""
        return with_reference_protocol(self.crossval).complete_cases

    def kind_of(self, *targets: str) -> tuple[str, ...]:
        """Return what `kind` says of some targets."""
        return tuple(text for text in self.kind if text.rpartition("=")[0] in targets)

    def resolved(self) -> dict[str, Any]:
        """Return the settings as plain values that TOML can hold."""
        how = self.crossval
        if FIXED in self.methods:  # alone has weights to search
            how = replace(how, balancer=FIXED)
        common = with_reference_protocol(how).resolved()
        # The schedule of the reference protocol differs between baseline and the others.
        for name in ("balancer", "schedule"):
            del common[name]
        values = {
            **common,
            "schedule": self.crossval.schedule,
            "auxiliary": list(self.auxiliary),
            "kind": list(self.kind),
            "methods": list(self.methods),
            "seeds": self.seeds,
            "threads": self.threads,
        }
        if self.external is not None:
            for name in ("clini", "slide_table", "features"):
                values[f"external_{name}"] = str(getattr(self.external, name).resolve())
        return values
