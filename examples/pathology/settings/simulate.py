"""Settings of a simulated cohort: what may be asked for, and what the defaults stand for."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.settings.cohort import FilenameColumn, PatientColumn, Seed
from examples.pathology.settings.option import Option, Settings, at_least, inside

TARGETS = ("isMSIH", "HRD")
"""What can be drawn where no clinical table is given."""

STRENGTHS = {"tumour_shift": 6.0, "signature_effect": 0.8}
"""Defaults of what a measured composition leaves out unless it is asked for."""


_positive = at_least(0)


@dataclass(frozen=True)
class SimulateConfig(Settings):
    """Everything that decides what a simulated cohort is."""

    out: Annotated[Path, Option("Where the cohort goes.")]
    _: KW_ONLY
    clini: Annotated[
        Path | None,
        Option(
            "Clinical table with real labels; default: labels are drawn as well.",
            source="Drawn with the correlations of TCGA-CRC, of TCGA-LUAD for HRD",
        ),
    ] = None
    target: Annotated[str, Option("Column of the biomarker.")] = TARGETS[0]
    auxiliary: Annotated[
        tuple[str, ...],
        Option("Signature to keep as auxiliary target; may be given several times; default: all."),
    ] = ()
    positive: Annotated[
        str | None, Option("Label that alters tumour tiles; default: the rarer one.")
    ] = None
    patients: Annotated[
        int | None,
        Option("How many to draw without --clini; default: 450.", rule=at_least(20)),
    ] = None
    slide_table: Annotated[
        Path | None, Option("Table of PATIENT and FILENAME; default: a slide each.")
    ] = None
    external_clini: Annotated[
        Path | None,
        Option(
            "Clinical table of another site, for OUT/external.", source="It needs no signatures."
        ),
    ] = None
    composition: Annotated[
        str,
        Option("drawn from label and signatures, or measured.", choices=("drawn", "measured")),
    ] = "drawn"
    tissue_fractions: Annotated[
        Path | None,
        Option(
            "Table of measured fractions: PATIENT, ADI, BACK, ..., TUM.",
            source="The nine of Kather et al. (2019); who is not in it is left out",
        ),
    ] = None
    null: Annotated[bool, Option("Shuffle the auxiliary values: they carry nothing.")] = False
    tiles: Annotated[int, Option("Median number of tiles of a slide.", rule=at_least(1))] = 200
    max_tiles: Annotated[int, Option("Most tiles of a slide.", rule=at_least(1))] = 1000
    tumour_shift: Annotated[
        float | None,
        Option(
            "Of altered tumour tiles, in sd; default: 6, or 0 if measured.",
            rule=_positive,
            source="In standard deviations of tumour tiles along that direction",
        ),
    ] = None
    tumour_share: Annotated[
        float,
        Option(
            "Share of altered tumour tiles in the median positive patient.",
            rule=inside(0, 1),
            source="0.05 in the median negative one",
        ),
    ] = 0.4
    tumour_noise: Annotated[
        float, Option("Sd of the log-odds of that share between patients.", rule=_positive)
    ] = 1.5
    lymphocyte_shift: Annotated[
        float,
        Option("What the biomarker adds to the log-share of lymphocytes.", rule=_positive),
    ] = 0.3
    signature_effect: Annotated[
        float | None,
        Option(
            "Of a signature on its tissue; default: 0.8, or 0 if measured.",
            rule=_positive,
            source="What one standard deviation adds to the log-share",
        ),
    ] = None
    signature_shift: Annotated[
        float,
        Option(
            "Of tumour tiles with proliferation and heterogeneity.",
            rule=_positive,
            source="See `feature_space.Shifts`.",
        ),
    ] = 0.4
    composition_noise: Annotated[
        float, Option("Sd of log-shares of tissue between patients alike.", rule=_positive)
    ] = 0.4
    batch_effect: Annotated[
        float, Option("Between slides, in sd of a feature.", rule=_positive)
    ] = 0.2
    domain_shift: Annotated[float, Option("Of the other site, likewise.", rule=_positive)] = 0.3
    patient_column: PatientColumn = "PATIENT"
    filename_column: FilenameColumn = "FILENAME"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
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
