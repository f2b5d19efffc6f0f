"""A grid of simulated cohorts: where joint training helps, hurts or does nothing.

A cell says how much the auxiliary value carries, whether the biomarker shows where the signature
does, how many patients have the label and how many the auxiliary value. Each method is trained on
several independent cohorts of a cell, and tested on further patients of the same cohort. What is
recorded of the signature does not change the bags: cells of one overlap share patients, and
those with as many labels share the baseline. A job is one training; its figures are rows of
``results.csv``, from which a grid that was stopped goes on.
"""

import functools
import itertools
import logging
import shutil
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from examples.pathology.cohort.cohort import Cohort, load_cohort
from examples.pathology.cohort.patients import Patient
from examples.pathology.cohort.splits import (
    LOOKAHEAD_SHARE,
    VALIDATION_SHARE,
    fold_seed,
    stratified_share,
)
from examples.pathology.common.errors import RunError
from examples.pathology.common.folders import claim_folder, sole_writer
from examples.pathology.jobs.cluster import cluster
from examples.pathology.jobs.engine import Job, Outcome, run_jobs
from examples.pathology.results.metrics import auroc, pearson
from examples.pathology.settings.crossval import BASELINE, CrossvalConfig
from examples.pathology.settings.grid import GridConfig
from examples.pathology.simulation.composition import LEUKOCYTES, MSI
from examples.pathology.simulation.planned import planned, recorded
from examples.pathology.simulation.simulate import run_simulate
from examples.pathology.simulation.tables import generator_of
from examples.pathology.study.grid_report import RESULTS, write_grid_report
from examples.pathology.tables.writing import read_table_of_ours, write_table
from examples.pathology.training.bags import BagStore
from examples.pathology.training.fold import fit_fold
from examples.pathology.training.learner import needs_lookahead
from examples.pathology.training.prediction import predict

logger = logging.getLogger(__name__)

BAGS = "bags"
LABELLED, FURTHER, TESTED = "labelled", "further", "tested"


@dataclass(frozen=True)
class Cell:
    """What the cohorts of a cell have in common; more of it as in `GridConfig`."""

    strength: float
    overlap: float
    patients: int
    missing: float
    further: int


CELL = tuple(field.name for field in fields(Cell))


class Fit(NamedTuple):
    """One training, and all cells that it stands for: the baseline knows no auxiliary value."""

    cells: tuple[Cell, ...]
    method: str
    cohort: int

    @property
    def key(self) -> str:
        """Its name among jobs."""
        shared = CELL[1:3] if self.method == BASELINE else CELL
        names = [f"{name}={getattr(self.cells[0], name):g}" for name in shared]
        return "/".join([*names, self.method, f"cohort-{self.cohort}"])


def cells_of(config: GridConfig) -> list[Cell]:
    """Return all cells: every combination of what the settings list."""
    values = [(missing, 0) for missing in config.missing]
    values += [(0.0, config.further)] * bool(config.further)
    axes = itertools.product(config.overlap, config.patients, config.strength, values)
    return [Cell(strength, overlap, count, *known) for overlap, count, strength, known in axes]


def fits_of(config: GridConfig) -> list[Fit]:
    """Return all trainings: cohort after cohort, and those that share bags side by side."""
    cells, fits = cells_of(config), []
    for overlap, cohort in itertools.product(config.overlap, range(1, config.cohorts + 1)):
        here = [cell for cell in cells if cell.overlap == overlap]
        for method in config.methods:
            if method == BASELINE:
                alike = [tuple(c for c in here if c.patients == n) for n in config.patients]
            else:
                alike = [(cell,) for cell in here]
            fits += [Fit(group, method, cohort) for group in alike]
    return fits


def run_grid(config: GridConfig) -> tuple[Path, int]:
    """Train what is not trained yet, and write tables, figure and page.

    Returns:
        The page, and the number of trainings that failed or were not begun.

    Raises:
        UserError: A method's name is wrong, or the folder is another grid's.
        RunError: No training succeeded.
    """
    config = replace(config, out=config.out.resolve())  # workers may work in another folder
    for method in config.methods:  # a wrong name is told before anything is made
        needs_lookahead(method, ("biomarker", "signature"))
    with sole_writer(config.out):
        claim_folder(config.out, "grid", config.resolved())
        rows = _carry_out(config)
        if rows["auroc"].isna().all():
            raise RunError(f"At least one training must succeed, but none did: {rows['error'][0]}")
        page = write_grid_report(config, rows)
        missing = int(rows["auroc"].isna().sum())
        if not missing:
            shutil.rmtree(config.out / BAGS, ignore_errors=True)  # they can be made again
    return page, missing


def _carry_out(config: GridConfig) -> pd.DataFrame:
    """Train what has no row yet or one with an error; return and write all rows, fit by fit."""
    path, fits = config.out / RESULTS, {fit.key: fit for fit in fits_of(config)}
    found = dict[str, list[dict[str, Any]]]()
    if path.exists():
        known = read_table_of_ours(path, "Delete it, and all is trained again.", text=False)
        for key, of_fit in known[known["error"].isna()].groupby("fit"):
            found[str(key)] = of_fit.to_dict("records")
    left = [fit for key, fit in fits.items() if key not in found]
    worlds = {f"{BAGS}/{overlap:g}": overlap for overlap in {fit.cells[0].overlap for fit in left}}
    jobs = [Job(key, bags_job, (config, overlap)) for key, overlap in sorted(worlds.items())]
    for fit in left:
        needs = (f"{BAGS}/{fit.cells[0].overlap:g}",)
        jobs.append(Job(fit.key, fit_job, (config, fit.cells[0], fit.method, fit.cohort), needs))
    text = "%d cells, %d trainings, %d of them to do"
    logger.info(text, len(cells_of(config)), len(fits), len(left))

    def note(outcome: Outcome) -> None:
        if (fit := fits.get(outcome.key)) is None:
            return
        figures = outcome.value or {"auroc": None, "r": None, "seconds": outcome.seconds}
        of_all = {"fit": fit.key, "method": fit.method, "cohort": fit.cohort, **figures}
        found[fit.key] = [{**vars(cell), **of_all, "error": outcome.error} for cell in fit.cells]
        write_table(path, _table(found, fits))

    if left:
        devices = ("cpu",) if config.scheduler is None else ()  # a GPU would wait for such networks
        with cluster(workers=config.workers, scheduler=config.scheduler, devices=devices) as client:
            run_jobs(jobs, client, on_outcome=note, title="grid")
    return _table(found, fits)


def _table(found: dict[str, list[dict[str, Any]]], fits: dict[str, Fit]) -> pd.DataFrame:
    """Return the rows of all fits that have any, in the order of the fits."""
    columns = [*CELL, "method", "cohort", "auroc", "r", "seconds", "error", "fit"]
    rows = [row for key in fits for row in found.get(key, [])]
    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


def bags_job(config: GridConfig, overlap: float) -> None:
    """Make the bags of all cohorts of one overlap; those that are there are kept."""
    names = [
        name
        for cohort in range(1, config.cohorts + 1)
        for group, count in (
            (LABELLED, max(config.patients)),
            (FURTHER, config.further),
            (TESTED, config.test_patients),
        )
        for name in names_of(cohort, group, count)
    ]
    folder = _folder(config, overlap)
    run_simulate(planned(folder, names, overlap=overlap, tiles=config.tiles, seed=config.seed))


def names_of(cohort: int, group: str, count: int) -> list[str]:
    """Return the names of the first patients of a group of a cohort."""
    return [f"cohort-{cohort}-{group}-{number:05d}" for number in range(count)]


def fit_job(config: GridConfig, cell: Cell, method: str, number: int) -> dict[str, Any]:
    """Train a method on a cohort of a cell; return its figures on the patients who are tested."""
    cohort, bags = _world(config, cell.overlap)
    started = time.perf_counter()
    target, auxiliary = cohort.targets
    train, validation, ahead, test = parts_of(config, cell, cohort, number)
    how = replace(_crossval(config, cell.overlap), balancer=method)
    how = replace(how, seed=fold_seed(config.seed, number))
    if method == BASELINE:  # it knows the biomarker alone
        train = [patient for patient in train if patient.label]
    if needs_lookahead(method, (target.name, auxiliary.name)):
        train = [patient for patient in train if patient not in ahead]
    else:
        ahead = []
    fitted = fit_fold(cohort, train, validation, how, lookahead=ahead, bags=bags, name=method)
    said = predict(fitted, test, bags=bags)
    truth = [each.patient.label == target.positive for each in said]
    positive = target.classes.index(target.positive)
    figures = {"auroc": auroc(truth, [p.probabilities[target.name][positive] for p in said]).value}
    if method != BASELINE:
        known = [float(each.patient.known[auxiliary.name]) for each in said]
        figures["r"] = pearson(known, [each.numbers[auxiliary.name] for each in said]).value
    return {"r": None, **figures, "seconds": round(time.perf_counter() - started, 2)}


def parts_of(
    config: GridConfig, cell: Cell, cohort: Cohort, number: int
) -> tuple[list[Patient], list[Patient], list[Patient], list[Patient]]:
    """Return whom to train on, to validate on, to look ahead on (a part of the first), to test.

    All methods and cells of a cohort with as many labels have the same parts.
    """
    people = {patient.name: patient for patient in cohort.patients}
    auxiliary = cohort.targets[1].name
    draw = generator_of(config.seed, "parts", str(number), str(cell.patients))

    def group(name: str, count: int) -> list[Patient]:
        found = [people[name] for name in names_of(number, name, count)]
        values = [(p, float(p.known[auxiliary])) for p in found]
        return [
            replace(p, known={auxiliary: recorded(value, cell.strength, p.name, config.seed)})
            for p, value in values
        ]

    labelled = group(LABELLED, cell.patients)
    labels = np.array([patient.label for patient in labelled])
    held = stratified_share(labels, VALIDATION_SHARE, draw)
    rest = np.delete(np.arange(len(labels)), held)
    looked_at = rest[stratified_share(labels[rest], LOOKAHEAD_SHARE, draw)]
    for index in draw.permutation(len(labels))[: round(cell.missing * len(labels))]:
        labelled[index] = replace(labelled[index], known={})
    further = [replace(patient, label="") for patient in group(FURTHER, cell.further)]
    train, validation, ahead = ([labelled[i] for i in part] for part in (rest, held, looked_at))
    return [*train, *further], validation, ahead, group(TESTED, config.test_patients)


def _folder(config: GridConfig, overlap: float) -> Path:
    return config.out / BAGS / f"overlap-{overlap:g}"


def _crossval(config: GridConfig, overlap: float) -> CrossvalConfig:
    folder = _folder(config, overlap)
    return CrossvalConfig(
        folder / "clini.csv",
        folder / "slides.csv",
        folder / "features",
        MSI.target,
        auxiliary=(LEUKOCYTES,),
        out=folder,
        epochs=config.epochs,
        patience=config.patience,
        learning_rate=config.learning_rate,
        width=config.width,
        layers=1,
        device="cpu",
    )


@functools.lru_cache(maxsize=1)
def _world(config: GridConfig, overlap: float) -> tuple[Cohort, BagStore]:
    """Keep the cohorts of one overlap in a worker from job to job, with their tiles."""
    return load_cohort(_crossval(config, overlap)), BagStore()
