"""Settings of what is done with finished runs: deployed, drawn over a slide, put on a page."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

from examples.pathology.common.errors import UserError
from examples.pathology.settings.cohort import (
    TCGA_SITE,
    Sources,
    device_option,
    features_option,
    filename_column_option,
    mpp_table_option,
    patient_column_option,
    seed_option,
    slide_table_option,
)
from examples.pathology.settings.extract import default_mpp_option
from examples.pathology.settings.option import Settings, inside, needed, nested, option

run_option = partial(needed, "A finished run of crossval.")


@dataclass(frozen=True)
class PageConfig(Settings):
    """What a page of results is to show."""

    sensitivity: float = option(
        0.95, "Of the second threshold, in the validation part.", min=0.01, max=1.0
    )
    site_column: str | None = option(
        None,
        "Results by site, of a column of the clinical table or tcga-site; default: of folds.",
        metavar=f"COLUMN|{TCGA_SITE}",
    )
    site_table: Path | None = option(None, "Where --site-column is, if the table has moved.")
    worst: int = option(12, "How many of the patients with the largest losses to show.", min=1)


@dataclass(frozen=True)
class DeployConfig(Settings):
    """Whom to predict for, and with which run."""

    run: Path = run_option()
    clini: Path = needed("Clinical table of the other cohort; labels may be missing.")
    slide_table: Path = slide_table_option()
    features: Path = features_option()
    out: Path = needed("Where the results go.")
    _: KW_ONLY
    skip_unknown_labels: bool = option(
        False, "Leave out patients with a label that was not trained on, instead of refusing all."
    )
    patient_column: str = patient_column_option()
    filename_column: str = filename_column_option()
    page: PageConfig = nested(PageConfig)
    seed: int = seed_option()
    device: str = device_option()

    @property
    def sources(self) -> Sources:
        """Where the external cohort comes from."""
        return Sources(
            self.clini, self.slide_table, self.features, self.patient_column, self.filename_column
        )


@dataclass(frozen=True)
class HeatmapConfig(Settings):
    """Of what to draw heat maps."""

    run: Path = run_option()
    features: Path = needed("The slide's feature file (.h5); with --slides a folder of them.")
    out: Path = needed("Where the pictures go.")
    _: KW_ONLY
    slide: Path | None = option(None, "The slide; of a DICOM series, any file.")
    slides: Path | None = option(None, "Folder of slides: all of the run are drawn.")
    slide_table: Path | None = mpp_table_option()
    filename_column: str = filename_column_option()
    default_mpp: float | None = default_mpp_option(
        help="um per pixel of a slide that does not tell its own."
    )
    top: int = option(8, "How many top tiles to show.", min=1, max=32)
    areas: float | None = option(
        None,
        "In tiles.geojson, merge the tiles above this quantile of their score (0.9: the highest "
        "tenth) into areas, instead of the top tiles.",
        rule=inside(0, 1),
    )
    device: str = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.slide is None) == (self.slides is None):
            raise UserError(
                "`slide` must be one slide, or `slides` a folder of them, but got "
                f"{'neither' if self.slide is None else 'both'}."
            )


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Which runs to put on a page."""

    run: tuple[Path, ...] = needed(
        "A run folder, or a folder of runs; may be given several times. Or a folder of benchmark "
        "or deploy: its page is written again."
    )
    out: Path | None = option(
        None, "Where the page goes; default: report/ in the first --run, or deploy's folder."
    )
    page: PageConfig = nested(PageConfig)
    seed: int = option(0, "Of the t-SNE; a benchmark has a seed of its own.", min=0)


@dataclass(frozen=True)
class DemoConfig(Settings):
    """How large a demonstration to run, and where."""

    out: Path = option(Path("demo"), "Where everything goes.")
    patients: int = option(40, "Size of the synthetic cohort.", min=10)
    epochs: int = option(6, "Most epochs per fold.", min=1)
    seed: int = seed_option()
    device: str = device_option()
