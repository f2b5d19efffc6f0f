"""Settings of a simulated cohort: what may be asked for, and what the defaults stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.pathology.common.errors import UserError, listing, nearest

TARGETS = ("isMSIH", "HRD")
"""What can be drawn where no clinical table is given."""

COMPOSITIONS = ("drawn", "measured")
STRENGTHS = {"tumour_shift": 6.0, "signature_effect": 0.8}
"""Defaults of what a measured composition leaves out unless it is asked for."""


@dataclass(frozen=True)
class SimulateConfig:
    """Everything that decides what a simulated cohort is.

    Args:
        out: Folder of the cohort; a stopped simulation is taken up again.
        clini: Clinical table with the patient, the target and signatures; ``None``: labels and
            signatures are drawn with the correlations of TCGA-CRC (of TCGA-LUAD for ``HRD``).
        target: Column of the biomarker, which has 2 or more labels.
        auxiliary: Signatures that ``clini.csv`` is to have; none: all that the table has.
        positive: The label whose patients have altered tumour tiles; ``None``: the rarer one.
        patients: How many to draw without a clinical table; ``None``: 450.
        slide_table: The patient and the file name, one row per slide; ``None``: one each.
        external_clini: Clinical table of a cohort of another site, which needs no signatures.
        composition: ``drawn`` from status and signatures, or ``measured``.
        tissue_fractions: Table of the patient and the nine fractions of Kather et al. (2019), for
            ``measured``; patients who are not in it are left out.
        null: Whether to shuffle the auxiliary values among patients, so that they say nothing of
            label or bag.
        tiles: Median number of tiles of a slide.
        max_tiles: Most tiles of a slide.
        tumour_shift: How far altered tumour tiles are moved, in standard deviations of tumour tiles
            along that direction; ``None``: 6, and 0 for a measured composition.
        tumour_share: Share of altered tumour tiles in the median positive patient (0.05 in the
            median negative one).
        tumour_noise: Standard deviation of its log-odds between patients of a class.
        lymphocyte_shift: What the biomarker adds to the log-share of lymphocytes.
        signature_effect: What one standard deviation of a signature adds to the log-share of its
            tissue; ``None``: 0.8, and 0 for a measured composition.
        signature_shift: How far growth moves tumour tiles; see `feature_space.Shifts`.
        composition_noise: Standard deviation of log-shares between patients alike.
        batch_effect: Between slides, in standard deviations of a feature.
        domain_shift: Of the external site, likewise.
        patient_column: Column of the patient in all tables.
        filename_column: Column of the file name in the slide table.
        seed: Of everything random, at least 0.
    """

    out: Path
    clini: Path | None = None
    target: str = TARGETS[0]
    auxiliary: tuple[str, ...] = ()
    positive: str | None = None
    patients: int | None = None
    slide_table: Path | None = None
    external_clini: Path | None = None
    composition: str = "drawn"
    tissue_fractions: Path | None = None
    null: bool = False
    tiles: int = 200
    max_tiles: int = 1000
    tumour_shift: float | None = None
    tumour_share: float = 0.4
    tumour_noise: float = 1.5
    lymphocyte_shift: float = 0.3
    signature_effect: float | None = None
    signature_shift: float = 0.4
    composition_noise: float = 0.4
    batch_effect: float = 0.2
    domain_shift: float = 0.3
    patient_column: str = "PATIENT"
    filename_column: str = "FILENAME"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("patients", 20), ("tiles", 1), ("max_tiles", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"`{_option(name)}` must be at least {low}, but got {value}.")
        for name in (
            *("tumour_shift", "tumour_noise", "lymphocyte_shift", "signature_effect"),
            *("signature_shift", "composition_noise", "batch_effect", "domain_shift"),
        ):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise UserError(f"`{_option(name)}` must be at least 0, but got {value}.")
        if not 0 < self.tumour_share < 1:
            raise UserError(f"`tumour-share` must be between 0 and 1, but got {self.tumour_share}.")
        if self.composition not in COMPOSITIONS:
            raise UserError(
                f"`composition` must be one of {listing(COMPOSITIONS)}, but got "
                f"{self.composition!r}.{nearest(self.composition, COMPOSITIONS)}"
            )
        self._check_combination()

    def _check_combination(self) -> None:
        """Raise if options do not go together, rather than ignore one of them."""
        measured = self.composition == "measured"
        if measured != (self.tissue_fractions is not None):
            raise UserError(
                "`tissue-fractions` must be given for `composition` measured, and only then, but "
                f"`composition` is {self.composition}."
            )
        if measured and (self.clini is None or self.external_clini is not None):
            raise UserError(
                "`composition` measured must go with --clini and without --external-clini: there "
                "are fractions of the patients of one table only."
            )
        if self.clini is None and (self.slide_table is not None or self.positive is not None):
            raise UserError("`slide-table` and `positive` must go with --clini, but it is missing.")
        if self.clini is not None and self.patients is not None:
            raise UserError(
                f"`patients` must be left out where --clini is given, but got {self.patients}."
            )
        if self.clini is None and self.target not in TARGETS:
            raise UserError(
                f"`target` must be one of {listing(TARGETS)} where no --clini is given, but "
                f"got {self.target!r}.{nearest(self.target, TARGETS)}"
            )

    def strength(self, name: str) -> float:
        """Return a strength, or its default: 0 for what a measured composition does not plant."""
        given = getattr(self, name)
        if given is not None:
            return float(given)
        return 0.0 if self.composition == "measured" else STRENGTHS[name]


def _option(name: str) -> str:
    return name.replace("_", "-")
