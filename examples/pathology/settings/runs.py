"""Settings of what is done with finished runs: deployed, drawn over a slide, put on a page."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from examples.pathology.settings.cohort import (
    Device,
    Features,
    FilenameColumn,
    MppTable,
    PatientColumn,
    Seed,
    SlideTable,
    Sources,
)
from examples.pathology.settings.option import Option, Settings

FinishedRun = Annotated[Path, Option("A finished run of crossval.")]


@dataclass(frozen=True)
class DeployConfig(Settings):
    """Whom to predict for, and with which run."""

    run: FinishedRun
    clini: Annotated[Path, Option("Clinical table of the other cohort; labels may be missing.")]
    slide_table: SlideTable
    features: Features
    out: Annotated[Path, Option("Where the results go.")]
    _: KW_ONLY
    patient_column: PatientColumn = "PATIENT"
    filename_column: FilenameColumn = "FILENAME"
    seed: Seed = 0
    device: Device = "auto"

    @property
    def sources(self) -> Sources:
        """Where the external cohort comes from."""
        return Sources(
            self.clini, self.slide_table, self.features, self.patient_column, self.filename_column
        )


@dataclass(frozen=True)
class HeatmapConfig(Settings):
    """Of what to draw a heat map."""

    run: FinishedRun
    slide: Annotated[Path, Option("The slide; of a DICOM series, any file.")]
    features: Annotated[Path, Option("The slide's feature file (.h5).")]
    out: Annotated[Path, Option("Where the pictures go.")]
    _: KW_ONLY
    slide_table: MppTable = None
    filename_column: FilenameColumn = "FILENAME"
    default_mpp: Annotated[
        float | None, Option("um per pixel of a slide that does not tell its own.")
    ] = None
    top: Annotated[int, Option("How many top tiles to show.", min=1, max=32)] = 8
    device: Device = "auto"


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Which runs to put on a page."""

    run: Annotated[
        tuple[Path, ...],
        Option(
            "A run folder, or a folder of runs; may be given several times. Or a benchmark's "
            "folder: its page is written again."
        ),
    ]
    out: Annotated[
        Path | None, Option("Where the page goes; default: report/ in the first --run.")
    ] = None
    seed: Annotated[int, Option("Of the t-SNE; a benchmark has a seed of its own.", min=0)] = 0


@dataclass(frozen=True)
class DemoConfig(Settings):
    """How large a demonstration to run, and where."""

    out: Annotated[Path, Option("Where everything goes.")] = Path("demo")
    patients: Annotated[int, Option("Size of the synthetic cohort.", min=10)] = 40
    epochs: Annotated[int, Option("Most epochs per fold.", min=1)] = 6
    seed: Seed = 0
    device: Device = "auto"
