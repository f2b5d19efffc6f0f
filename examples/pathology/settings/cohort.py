"""What to join, and what of it to predict."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal, get_args

from examples.pathology.common.errors import UserError, listing, nearest

Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Sources:
    """Where a cohort comes from.

    Args:
        clini: Clinical table, one row per patient.
        slide_table: The patient and the file name, one row per slide.
        features: Folder of feature files (``.h5``), searched with its sub-folders.
        patient_column: Column of the patient in both tables.
        filename_column: Column of the file name in the slide table.
    """

    clini: Path
    slide_table: Path
    features: Path
    patient_column: str = "PATIENT"
    filename_column: str = "FILENAME"


@dataclass(frozen=True)
class CohortConfig:
    """What to join, and what of it to predict.

    Args:
        clini: Clinical table, ``.csv`` or ``.xlsx``, one row per patient.
        slide_table: The patient and the file name, one row per slide.
        features: Folder of feature files (``.h5``), searched with its sub-folders.
        target: Column of the primary target. Numbers of more than 20 different values make a
            regression, anything else a classification.
        auxiliary: Columns of further targets; numbers of more than two different values make a
            regression, anything else a classification.
        kind: ``NAME=classification`` or ``NAME=regression`` for every target that is meant
            otherwise.
        cutoff: Makes two classes of a numeric primary target: at or above it, which is the
            positive one, and below. ``None``: none.
        positive: The class of ``target`` whose AUROC is reported; ``None``: the rarer one.
        complete_cases: Whether to leave out patients who lack a value of any target (the paper's
            rule) instead of using every value that is known.
        patient_column: Column of the patient in both tables.
        filename_column: Column of the file name in the slide table.
    """

    clini: Path
    slide_table: Path
    features: Path
    target: str
    _: KW_ONLY
    auxiliary: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    cutoff: float | None = None
    positive: str | None = None
    complete_cases: bool = False
    patient_column: str = "PATIENT"
    filename_column: str = "FILENAME"

    def __post_init__(self) -> None:
        if not self.target:
            raise UserError("`target` must name a column of the clinical table, but got ''.")
        names = [self.target, *self.auxiliary]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"`auxiliary` must name each target once, but got {listing(twice)} twice."
            )
        if self.cutoff is not None and not math.isfinite(self.cutoff):
            raise UserError(f"`cutoff` must be a finite number, but got {self.cutoff}.")
        kinds = self.kinds
        if self.cutoff is not None and kinds.get(self.target) == "regression":
            raise UserError(
                f"`cutoff` makes classes of `{self.target}`, so `kind` must not make it a "
                "regression. Give one of them."
            )

    @property
    def sources(self) -> Sources:
        """Where the cohort comes from."""
        return Sources(
            self.clini, self.slide_table, self.features, self.patient_column, self.filename_column
        )

    @property
    def kinds(self) -> dict[str, Kind]:
        """What `kind` says of the targets that it names.

        Raises:
            UserError: It does not read ``NAME=KIND``, or names no target.
        """
        names = [self.target, *self.auxiliary]
        kinds: dict[str, Kind] = {}
        for text in self.kind:
            name, _, given = text.rpartition("=")
            known = {kind: kind for kind in get_args(Kind)}
            if given not in known or name not in names or name in kinds:
                raise UserError(
                    f"`kind` must be NAME={' or NAME='.join(known)}, once for each of the targets "
                    f"({listing(names)}) that it is for, but got {text!r}."
                    + (nearest(given, known) if given not in known else nearest(name, names))
                )
            kinds[name] = known[given]
        return kinds
