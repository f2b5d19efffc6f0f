"""Settings of a simulated cohort: what may be asked for, and what the defaults stand for."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.settings.cohort import (
    filename_column_option,
    patient_column_option,
    seed_option,
)
from examples.pathology.settings.option import Settings, at_least, inside, needed, option

TARGETS = ("isMSIH", "HRD")
"""What can be drawn where no clinical table is given."""

STRENGTHS = {"tumour_shift": 6.0, "signature_effect": 0.8}
"""Defaults of what a measured composition leaves out unless it is asked for."""

_positive = at_least(0)


@dataclass(frozen=True)
class SimulateConfig(Settings):
    """Everything that decides what a simulated cohort is."""

    out: Path = needed("Where the cohort goes.")
    _: KW_ONLY
    clini: Path | None = option(
        None,
        "Clinical table with real labels; default: labels are drawn as well.",
        source="correlations of TCGA-CRC, for HRD of TCGA-LUAD",
    )
    target: str = option(TARGETS[0], "Column of the biomarker: classes, or a number.")
    auxiliary: tuple[str, ...] = option(
        (), "Signature to keep as auxiliary target; may be given several times; default: all."
    )
    positive: str | None = option(None, "Label that alters tumour tiles; default: the rarer one.")
    patients: int | None = option(
        None, "How many to draw without --clini; default: 450.", rule=at_least(20)
    )
    slide_table: Path | None = option(None, "Table of PATIENT and FILENAME; default: a slide each.")
    external_clini: Path | None = option(None, "Clinical table of another site, for OUT/external.")
    draw_external_labels: bool = option(
        False, "Draw target and signatures there from patients of the first table."
    )
    composition: str = option(
        "drawn", "drawn from label and signatures, or measured.", choices=("drawn", "measured")
    )
    tissue_fractions: Path | None = option(
        None,
        "Table of measured fractions: PATIENT, ADI, BACK, ..., TUM.",
        source="Kather et al. (2019)",
    )
    null: bool = option(False, "Shuffle the auxiliary values: they carry nothing.")
    tiles: int = option(200, "Median number of tiles of a slide.", rule=at_least(1))
    max_tiles: int = option(1000, "Most tiles of a slide.", rule=at_least(1))
    tumour_shift: float | None = option(
        None, "Of altered tumour tiles, in sd; default: 6, or 0 if measured.", rule=_positive
    )
    tumour_share: float = option(
        0.4,
        "Share of altered tumour tiles in the median positive patient, or with a number 1 sd above "
        "its mean.",
        rule=inside(0, 1),
        source="0.05 in the median negative one, or 1 sd below",
    )
    tumour_noise: float = option(
        1.5, "Sd of the log-odds of that share between patients.", rule=_positive
    )
    lymphocyte_shift: float = option(
        0.3, "What the biomarker adds to the log-share of lymphocytes.", rule=_positive
    )
    signature_effect: float | None = option(
        None, "Of a signature on its tissue; default: 0.8, or 0 if measured.", rule=_positive
    )
    signature_shift: float = option(
        0.4, "Of tumour tiles with proliferation and heterogeneity.", rule=_positive
    )
    composition_noise: float = option(
        0.4, "Sd of log-shares of tissue between patients alike.", rule=_positive
    )
    batch_effect: float = option(0.2, "Between slides, in sd of a feature.", rule=_positive)
    domain_shift: float = option(0.3, "Of the other site, likewise.", rule=_positive)
    patient_column: str = patient_column_option()
    filename_column: str = filename_column_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.draw_external_labels and self.external_clini is None:
            raise UserError(
                "`draw-external-labels` must go with --external-clini, but none is given."
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
