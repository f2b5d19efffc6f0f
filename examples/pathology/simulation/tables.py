"""The tables behind a simulated cohort: read, drawn, or shuffled."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from examples.pathology.cohort.targets import refuse_words
from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.settings.simulate import SimulateConfig
from examples.pathology.simulation.composition import (
    BACKGROUND,
    SIGNATURES,
    TISSUES,
    Vector,
    complete,
    population_of,
    shares_from,
)
from examples.pathology.tables.matching import shared_paths, slide_key, without_suffix
from examples.pathology.tables.reading import (
    read_clinical_table,
    read_slide_table,
    refuse_two_owners,
)

logger = logging.getLogger(__name__)

DEFAULT_PATIENTS = 450  # about as many as TCGA-CRC has with label and slide


@dataclass(frozen=True)
class CohortTables:
    """What the tables say of one cohort.

    Args:
        clinical: The target and signatures by patient, as text; empty where missing.
        slides: Patient and key of every slide.
        drawn: Whether the labels are drawn.
        fractions: Measured shares of tissue by patient; ``None``: shares are to be drawn.
        left_out: How many patients were left out as nothing was measured of them.
        donors: Whose target and signatures each patient has; ``None``: their own.
    """

    clinical: pd.DataFrame
    slides: Sequence[tuple[str, str]]
    drawn: bool = False
    fractions: Mapping[str, Vector] | None = None
    left_out: int = 0
    donors: Mapping[str, str] | None = None


def tables_of(config: SimulateConfig) -> CohortTables:
    """Return the cohort to make bags for.

    Raises:
        UserError: A table is wrong, or the tables have no patient in common.
    """
    if config.clini is None:
        return _draw(config)
    tables = read_tables(config.clini, config.slide_table, config)
    if config.tissue_fractions is None:
        return tables
    path = config.tissue_fractions
    table = read_clinical_table(path, [BACKGROUND, *TISSUES], config.patient_column)
    fractions = {
        str(name): shares_from({tissue: str(row[tissue]) for tissue in TISSUES}, str(name))
        for name, row in table.iterrows()
    }
    clinical = tables.clinical[tables.clinical.index.isin(list(fractions))]
    if clinical.empty:
        raise UserError(f"{path} must have patients of {config.clini}, but has none.")
    left_out = len(tables.clinical) - len(clinical)
    logger.warning("Left out: %d patients without measured tissue fractions", left_out)
    slides = [(patient, key) for patient, key in tables.slides if patient in clinical.index]
    return CohortTables(clinical, slides, fractions=fractions, left_out=left_out)


def read_tables(clini: Path, slide_table: Path | None, config: SimulateConfig) -> CohortTables:
    """Read the target and all signatures of a clinical table, and its slides.

    Without a slide table, each patient has one slide, of the patient's name.

    Raises:
        UserError: A table is wrong, or the two have no patient in common.
    """
    if config.target in SIGNATURES:
        raise UserError(
            f"`target` must be no signature, since each brings its own tissue, but is "
            f"{config.target!r}."
        )
    table = read_clinical_table(clini, [config.target], config.patient_column)
    names = [name for name in population_of(config).signatures if name in table]
    for name in names:
        refuse_words(name, table[name], clini)
    clinical = table[[config.target, *names]]
    if slide_table is None:
        return CohortTables(clinical, _slide_each(clinical, clini, config))
    everyone = read_slide_table(slide_table, config.patient_column, config.filename_column)
    known = [(patient, key) for patient, key in everyone if patient in clinical.index]
    # As `extract` names its files: in full where slides differ in their suffix alone.
    shared = shared_paths(key for _, key in known)
    slides = [
        (patient, key if without_suffix(key) in shared else without_suffix(key))
        for patient, key in known
    ]
    if unknown := len(everyone) - len(slides):
        logger.warning("Left out: %d slides of patients who are not in %s", unknown, clini)
    if not slides:
        raise UserError(f"{slide_table} must have slides of patients of {clini}, but has none.")
    refuse_two_owners(slides, "slide", slide_table)
    return CohortTables(clinical, slides)


def _slide_each(
    clinical: pd.DataFrame, clini: Path, config: SimulateConfig
) -> list[tuple[str, str]]:
    return [(name, slide_key(name, clini, config.patient_column)) for name in clinical.index]


def read_external(clini: Path, first: CohortTables, config: SimulateConfig) -> CohortTables:
    """Read the clinical table of another site, or draw what it says where that is asked for.

    Drawn is for each patient one of the first cohort who has a target, with replacement. Target and
    signatures are this donor's, so that they go together as in the first cohort; nothing but the
    patients is taken from the other site's table.

    Raises:
        UserError: The table is wrong; or it has the target though that is to be drawn, or lacks it.
    """
    table = read_clinical_table(clini, [], config.patient_column)
    if config.draw_external_labels and config.target in table:
        raise UserError(
            f"`draw-external-labels` must go with a table without `{config.target}`, but {clini} "
            "has that column. Leave the option out."
        )
    if not config.draw_external_labels:
        if config.target not in table:
            names = [str(name) for name in table]
            raise UserError(
                f"{clini} must have a column `{config.target}`, but has "
                f"{listing(map(repr, names))}.{nearest(config.target, names)} Give "
                "--draw-external-labels to draw it and the signatures from the first table."
            )
        return read_tables(clini, None, config)
    labelled = first.clinical[first.clinical[config.target] != ""]
    rows = [
        int(generator_of(config.seed, "external", str(name)).integers(len(labelled)))
        for name in table.index
    ]
    clinical = labelled.iloc[rows].set_axis(table.index)
    donors = dict(zip(map(str, table.index), map(str, labelled.index[rows]), strict=True))
    return CohortTables(clinical, _slide_each(clinical, clini, config), donors=donors)


def _draw(config: SimulateConfig) -> CohortTables:
    """Draw labels, signatures and which of them are missing."""
    population = population_of(config)
    rows = {}
    for number in range(1, (config.patients or DEFAULT_PATIENTS) + 1):
        name = f"DRAWN-{number:04d}"
        generator = generator_of(config.seed, "row", name)
        unknown = np.full(len(population.signatures), np.nan)
        positive, z = complete(population, unknown, generator, positive=None)
        missing = generator.random(1 + len(z)) < [population.unlabelled, *population.missing]
        cells = [population.positive if positive else population.negative]
        cells += [str(value) for value in population.in_units(z).values()]
        rows[name] = ["" if gone else cell for gone, cell in zip(missing, cells, strict=True)]
    columns = [config.target, *population.signatures]
    clinical = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return CohortTables(clinical, [(name, name) for name in rows], drawn=True)


def shuffled(clinical: pd.DataFrame, config: SimulateConfig) -> pd.DataFrame:
    """Give every patient the auxiliary values of another one, whole rows at a time.

    Those with and without a label are shuffled apart, so that as many stay usable as before. The
    target is the first column.
    """
    table: pd.DataFrame = clinical.copy()
    for labelled in (True, False):
        rows = np.flatnonzero((clinical[config.target] != "") == labelled)
        donors = generator_of(config.seed, "null", str(labelled)).permutation(rows)
        table.iloc[rows, 1:] = clinical.iloc[donors, 1:].to_numpy()
    return table


def auxiliary_of(config: SimulateConfig, clinical: pd.DataFrame) -> tuple[str, ...]:
    """Return the signatures that the cohort's clinical table is to have.

    Raises:
        UserError: One that is asked for is none, or is not in the table.
    """
    here = tuple(name for name in SIGNATURES if name in clinical)
    for name in config.auxiliary:
        if name not in SIGNATURES:
            raise UserError(
                f"`auxiliary` must be one of {listing(SIGNATURES)}, but got {name!r}."
                f"{nearest(name, SIGNATURES)}"
            )
        if name not in here:
            raise UserError(
                f"`auxiliary` must be a column of the clinical table ({listing(here) or 'none'}), "
                f"but got {name!r}."
            )
    return config.auxiliary or here


def generator_of(seed: int, *names: str) -> np.random.Generator:
    """Return random numbers of their own for whatever has a name."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
