"""A cohort of feature bags for real labels, made by a program, so that the truth is known.

Labels and signatures come from a clinical table (or are drawn with the correlations of one). Who
has which tissue is the business of `composition`, what its tiles look like that of
`feature_space`; here tables are read and files written. A patient's bags depend on the seed, the
patient's row and the settings, and on no other patient.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from examples.pathology.cohort.targets import (
    MAX_CLASSES,
    kind_of,
    make_target,
    refuse_foreign_values,
    refuse_too_large,
)
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import write_text
from examples.pathology.common.folders import claim_folder, sole_writer
from examples.pathology.features.files import write_features
from examples.pathology.settings.cohort import CohortConfig, Sources
from examples.pathology.settings.simulate import STRENGTHS, SimulateConfig
from examples.pathology.simulation.composition import (
    TISSUES,
    Population,
    Tissue,
    complete,
    draw_tissue,
    population_of,
)
from examples.pathology.simulation.feature_space import FeatureSpace
from examples.pathology.simulation.tables import (
    CohortTables,
    auxiliary_of,
    generator_of,
    read_external,
    shuffled,
    tables_of,
)
from examples.pathology.tables.reading import FILENAME, PATIENT
from examples.pathology.tables.writing import write_table

logger = logging.getLogger(__name__)

FORMAT = 1  # of the simulation: bags of another one are other bags

TILES_LOG_SD = 0.8  # of the log-normal number of tiles of a slide
MIN_TILES = 8


@dataclass(frozen=True)
class SimulatedCohort:
    """Where a simulated cohort lies and what is in it.

    Args:
        sources: Its tables and feature files; the clinical table has the target and the auxiliary
            columns.
        truth: What made each patient's bags.
        positive: The label that alters tumour tiles; empty where a number does.
        simulated: The sentence that every file bears.
        external: The cohort of the other site.
    """

    sources: Sources
    truth: Path
    target: str
    positive: str
    auxiliary: tuple[str, ...]
    patients: int
    slides: int
    simulated: str
    external: "SimulatedCohort | None" = None


def run_simulate(config: SimulateConfig) -> SimulatedCohort:
    """Make feature bags for a clinical table.

    Writes ``features/*.h5``, ``clini.csv``, ``slides.csv``, ``truth.csv``, the same four in
    ``external/`` where asked for, ``simulation.toml`` and ``README.txt``. The same settings give
    the same content; bags that are there already are kept.

    Raises:
        UserError: Tables or settings are wrong, or the folder holds another simulation.
    """
    tables = tables_of(config)
    labels = {str(name): cell for name, cell in tables.clinical[config.target].items() if cell}
    table = Path("the drawn table") if config.clini is None else config.clini
    asked = CohortConfig(table, config.out, config.out, config.target, positive=config.positive)
    kind = kind_of(tables.clinical[config.target], MAX_CLASSES)
    if kind == "regression" and config.positive is not None:
        raise UserError(
            f"`positive` must be left out for `{config.target}`, whose numbers all count, but got "
            f"{config.positive!r}. Name a column of classes as `target` to have one."
        )
    target = make_target(config.target, kind, list(labels.values()), asked)
    if kind == "regression":
        refuse_too_large(config.target, {n: float(v) for n, v in labels.items()}, table)
        population = Population.of_number(config.target, tables.clinical)
    else:
        population = replace(population_of(config), positive=target.positive)
    auxiliary = auxiliary_of(config, tables.clinical)
    external = None
    if config.external_clini is not None:
        external = read_external(config.external_clini, tables, config)
        labels_there = external.clinical[config.target]
        refuse_foreign_values(target, labels_there, config.external_clini)
    with sole_writer(config.out):
        claim_folder(config.out, "simulation", settings_of(config, population))
        cohort = _write(config, tables, config.out, population, auxiliary)
        if external is not None:
            here = tuple(name for name in auxiliary if name in external.clinical)
            folder = config.out / "external"
            other = _write(config, external, folder, population, here, external=True)
            cohort = replace(cohort, external=other)
        write_text(config.out / "README.txt", _readme(config, cohort, tables.left_out))
    logger.warning("%s", cohort.simulated)
    return cohort


def _write(
    config: SimulateConfig,
    tables: CohortTables,
    out: Path,
    population: Population,
    auxiliary: tuple[str, ...],
    *,
    external: bool = False,
) -> SimulatedCohort:
    """Write the bags and tables of one cohort."""
    there = Sources(out / "clini.csv", out / "slides.csv", out / "features")
    simulated = _sentence(config, tables, external=external)
    tissues, truth = {}, []
    for name, cells in tables.clinical.iterrows():
        tissues[str(name)], said = _tissue(config, tables, str(name), cells, population)
        truth.append(said)
    _write_bags(config, tables, there.features, tissues, simulated, external=external)
    clinical = tables.clinical[[config.target, *auxiliary]]
    if config.null and not external:
        clinical = shuffled(clinical, config)
    write_table(there.clini, clinical.reset_index(names=PATIENT))
    write_table(there.slide_table, pd.DataFrame(tables.slides, columns=[PATIENT, FILENAME]))
    write_table(out / "truth.csv", pd.DataFrame(truth))
    return SimulatedCohort(
        sources=there,
        truth=out / "truth.csv",
        target=config.target,
        positive=population.positive,
        auxiliary=auxiliary,
        patients=len(clinical),
        slides=len(tables.slides),
        simulated=simulated,
    )


def _write_bags(
    config: SimulateConfig,
    tables: CohortTables,
    folder: Path,
    tissues: Mapping[str, Tissue],
    simulated: str,
    *,
    external: bool,
) -> None:
    """Write the feature files that are not there yet."""
    space = FeatureSpace(config.seed)
    site = "external" if external else "internal"
    for patient, key in tqdm(tables.slides, desc=f"{site} bags", unit="slide", leave=False):
        path = folder / f"{key}.h5"
        if path.exists():  # whole, as it has its name, and of these settings, as the folder is
            continue
        generator = generator_of(config.seed, "slide", site, patient, key)
        size = round(config.tiles * float(np.exp(TILES_LOG_SD * generator.standard_normal())))
        size = min(max(size, MIN_TILES), config.max_tiles)
        feats, coords = space.tiles(tissues[patient], size, config, generator, external=external)
        write_features(
            path,
            feats,
            coords,
            extractor=f"simulated-seed{config.seed}",
            weights_sha256=None,
            random_weights=False,
            simulated=simulated,
        )


def _tissue(
    config: SimulateConfig,
    tables: CohortTables,
    name: str,
    cells: "pd.Series[str]",
    population: Population,
) -> tuple[Tissue, dict[str, Any]]:
    """Return what a patient's slides are made of, and the row of ``truth.csv`` that says so."""
    known = {s: float(cells[s]) for s in population.signatures if cells.get(s)}
    label = cells[config.target]
    generator = generator_of(config.seed, "patient", name)
    status, z = complete(
        population,
        population.standardized(known),
        generator,
        positive=label == population.positive if label else None,
    )
    measured = None if tables.fractions is None else tables.fractions[name]
    tissue = draw_tissue(population, z, config, generator, positive=status, measured=measured)
    truth = {
        PATIENT: name,
        **({} if tables.donors is None else {"labels of": tables.donors[name]}),
        **({"positive": int(status)} if population.positive else {}),
        **{f"z {s}": round(float(v), 6) for s, v in zip(population.signatures, z, strict=True)},
        **{t: round(float(share), 6) for t, share in zip(TISSUES, tissue.shares, strict=True)},
        "altered share of tumour": round(tissue.altered, 6),
        "second clone's share of tumour": round(tissue.clone, 6),
        "growth": round(tissue.growth, 6),
    }
    return tissue, truth


def _sentence(config: SimulateConfig, tables: CohortTables, *, external: bool) -> str:
    """Return the sentence that every file, table and figure is to bear."""
    parts = ["Features are SIMULATED by a program"]
    if config.composition == "measured":
        parts.append("tissue fractions are measured")
    labels = "are DRAWN as well" if tables.drawn else "are those of a clinical table"
    if tables.donors is not None:
        labels = "and signatures are DRAWN, each patient's from a patient of the first cohort"
    parts.append(f"labels {labels}")
    if config.null and not external:
        parts.append("auxiliary values are SHUFFLED among patients (null setting)")
    return "; ".join(parts) + "."


def _readme(config: SimulateConfig, cohort: SimulatedCohort, left_out: int) -> str:
    """Return what a reader of the folder must know, in plain words."""
    labels = "drawn, of no patient" if config.clini is None else f"as in {config.clini.name}"
    tissue = "drawn given label and signatures"
    if config.tissue_fractions is not None:
        tissue = (
            f"the fractions of {config.tissue_fractions.name}, without background and\n"
            f"renormalised. {left_out} patients without fractions are left out"
        )
    lines = [
        cohort.simulated,
        "",
        "No slide was looked at: every tile feature in features/ is a random number that a program",
        "has drawn. Results on them say what a method does with a signal of known kind and size;",
        "they say nothing about how well it works on real slides.",
        "",
        f"{cohort.patients} patients, {cohort.slides} slides.",
        _planted(config, cohort),
        f"Labels and signatures: {labels}.",
        "A value that is missing stays missing in clini.csv; for the bags it is drawn given the",
        "others, so that the bags of such patients are like any other.",
        f"Tissue: {tissue}.",
    ]
    if config.null:
        lines += [
            "Null setting: clini.csv gives every patient the auxiliary values of another one, so",
            "that they say nothing of the patient's label or bags. The bags are those of the same",
            "settings without it.",
        ]
    if cohort.external is not None and config.external_clini is not None:
        lines += [
            f"external/: {cohort.external.patients} patients of {config.external_clini.name}, with",
            "features shifted as those of another site may be.",
        ]
    if config.draw_external_labels:
        lines += [
            "That table has no labels: target and signatures there are DRAWN. Each patient has",
            "those of a patient here, named in external/truth.csv: nothing is known of theirs.",
        ]
    lines += ["", "simulation.toml: all settings. truth.csv: what made each patient's bags.", ""]
    return "\n".join(lines)


def _planted(config: SimulateConfig, cohort: SimulatedCohort) -> str:
    """Return in words what of the label and the signatures is in the bags."""
    if config.strength("tumour_shift") or config.strength("signature_effect"):
        if not cohort.positive:
            return f"Planted: `{cohort.target}`, by degrees, and the signatures; see truth.csv."
        return f"Planted: `{cohort.target}` = {cohort.positive} and the signatures; see truth.csv."
    return "Nothing is planted: what the bags say of labels and signatures, the fractions say."


def settings_of(config: SimulateConfig, population: Population) -> dict[str, Any]:
    """Return all that decides the content of a simulation, for ``simulation.toml``.

    Strengths, the positive label and the scale of a number are resolved, tables hashed.
    """
    settings: dict[str, Any] = {"format": FORMAT}
    for name, value in vars(config).items():
        if isinstance(value, Path):
            if name != "out":  # a table counts by its content, wherever it lies
                settings[f"{name}_sha256"] = hashlib.sha256(value.read_bytes()).hexdigest()
        elif name in STRENGTHS:
            settings[name] = config.strength(name)
        elif value is not None:
            settings[name] = list(value) if isinstance(value, tuple) else value
    if not config.draw_external_labels:  # folders of earlier releases do not say
        del settings["draw_external_labels"]
    if population.positive:
        settings["positive"] = population.positive
    else:
        settings["target_mean"], settings["target_sd"] = population.mean[0], population.sd[0]
    return settings
