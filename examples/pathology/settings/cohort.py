"""What to join, and what of it to predict."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.settings.option import Settings, finite, needed, option

Kind = Literal["classification", "regression"]

# What several commands take alike.
seed_option = partial(option, 0, "Of everything random.", min=0)
device_option = partial(option, "auto", "auto, cpu, cuda or cuda:N.")
slide_table_option = partial(needed, "Table of patient and file name.")
features_option = partial(needed, "Folder of feature files (.h5).")
patient_column_option = partial(option, "PATIENT", "Column of the patient in both tables.")
filename_column_option = partial(option, "FILENAME", "Column of the file name in the slide table.")
mpp_table_option = partial(option, None, "Table whose MPP column gives um per pixel by file name.")
TCGA_SITE = "tcga-site"  # in place of a column: the tissue source site in a patient's barcode
folds_option = partial(option, 5, "Number of folds.", min=2, source="the paper")
kind_option = partial(
    option,
    (),
    "What a target is, where its values do not tell; may be given several times.",
    metavar="NAME=classification|regression",
)


@dataclass(frozen=True)
class Sources:
    """Where a cohort comes from, in the words of the options of these names."""

    clini: Path
    slide_table: Path
    features: Path
    patient_column: str = "PATIENT"
    filename_column: str = "FILENAME"


@dataclass(frozen=True)
class CohortConfig(Settings):
    """What to join, and what of it to predict."""

    clini: Path = needed("Clinical table (.csv, .xlsx) with the patient and targets.")
    slide_table: Path = slide_table_option()
    features: Path = features_option()
    target: str = needed(
        "Column of the primary target; numbers of over 20 values are a regression."
    )
    _: KW_ONLY
    auxiliary: tuple[str, ...] = option(
        (),
        "Column of a further target; may be given several times.",
        source="Numbers of more than two different values make a regression.",
    )
    kind: tuple[str, ...] = kind_option()
    cutoff: float | None = option(
        None, "Makes two classes of a numeric --target: from here on it is positive.", rule=finite
    )
    positive: str | None = option(None, "Class whose AUROC is reported; default: the rarer one.")
    complete_cases: bool = option(
        False, "Leave out patients who lack a value of any target, as the paper does."
    )
    group_column: str | None = option(
        None,
        "Folds by site: column of the patient's site, or tcga-site (XX of TCGA-XX-....).",
        metavar=f"COLUMN|{TCGA_SITE}",
    )
    patient_column: str = patient_column_option()
    filename_column: str = filename_column_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target:
            raise UserError("`target` must name a column of the clinical table, but got ''.")
        names = [self.target, *self.auxiliary]
        if self.patient_column in names:
            option = "target" if self.target == self.patient_column else "auxiliary"
            raise UserError(
                f"`{option}` must be another column than the patient's, but got "
                f"{self.patient_column!r}."
            )
        if self.group_column in [*names, self.patient_column, ""]:
            got = f"but got {self.group_column!r}"
            raise UserError(f"`group-column` must be neither a target's nor the patient's, {got}.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"`auxiliary` must name each target once, but got {listing(twice)} twice."
            )
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
            UserError: It does not read ``NAME=kind_option``, or names no target.
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


@dataclass(frozen=True)
class CheckConfig(CohortConfig):
    """What to check, for how many folds, and how much to say of it."""

    folds: int = folds_option()
    limit: int = option(20, "Most names that a list shows.", min=1)
    seed: int = seed_option()
