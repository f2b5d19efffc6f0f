"""Tables and feature files joined to labelled bags of tiles, and a ledger of who was left out.

A patient with a readable feature file is used for every target that is known. A missing auxiliary
value makes that task absent: it is not in `Patient.known`, never NaN, never 0. Patients without the
primary label but with an auxiliary value are trained on and never tested: they stand apart, in
`Cohort.training_only`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from examples.pathology.cohort.inspection import Inspection
from examples.pathology.cohort.joining import Joined, join, join_for
from examples.pathology.cohort.patients import Patient, known_values
from examples.pathology.cohort.targets import (
    MAX_AUXILIARY_CLASSES,
    MAX_CLASSES,
    Target,
    cut,
    describe,
    kind_of,
    make_target,
    refuse_foreign_values,
    refuse_words,
)
from examples.pathology.common.errors import UserError, listing
from examples.pathology.common.files import table_csv, write_text
from examples.pathology.features.kind import FeatureKind
from examples.pathology.settings.cohort import CohortConfig
from examples.pathology.tables.reading import FILENAME, PATIENT

logger = logging.getLogger(__name__)

TRAINING_ONLY = "training only"


@dataclass(frozen=True)
class LedgerRow:
    """What became of one patient, slide or feature file.

    Args:
        item: ``patient``, ``slide`` or ``feature file``.
        name: Which one.
        patient: Whose it is, as far as known.
        status: ``used``, ``training only``, ``excluded`` or ``unclaimed``.
        reason: Why it is not used, or not for all.
    """

    item: str
    name: str
    patient: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Cohort:
    """Labelled bags, and how they came about.

    Args:
        target: The primary target.
        auxiliary: Further targets.
        patients: Whom to train and test on, sorted by name: all have the primary label.
        training_only: Those without it but with an auxiliary value: a part of every training part,
            and of no other.
        ledger: One row per patient, slide and unclaimed feature file.
        funnel: ``(stage, number of patients)`` from the clinical table to the patients used.
        kind: What made the features.
        digest: sha256 over names, labels, values and the content of the features.
    """

    target: Target
    auxiliary: tuple[Target, ...]
    patients: tuple[Patient, ...]
    training_only: tuple[Patient, ...]
    ledger: tuple[LedgerRow, ...]
    funnel: tuple[tuple[str, int], ...]
    kind: FeatureKind
    digest: str

    @property
    def targets(self) -> tuple[Target, ...]:
        """The primary target, then the auxiliary ones."""
        return (self.target, *self.auxiliary)

    def labels_sha256(self) -> str:
        """Return a hash of patients and primary labels: what a split into folds depends on."""
        return _sha256(f"{p.name}\t{p.label}" for p in self.patients)

    def write_ledger(self, path: Path) -> None:
        """Write the ledger as a CSV table."""
        headings = ["item", "name", "patient", "status", "reason"]
        cells = ((r.item, r.name, r.patient, r.status, r.reason) for r in self.ledger)
        write_text(path, table_csv(headings, cells))


def load_cohort(config: CohortConfig) -> Cohort:
    """Join the clinical table, the slide table and the feature files.

    Args:
        config: What to join, and what of it to predict.

    Returns:
        The patients to use, and the ledger of the others.

    Raises:
        UserError: The tables contradict themselves or each other, features of several extractors
            are mixed, or nobody is left.
    """
    clini, target, auxiliary = config.clini, config.target, config.auxiliary
    joined = join_for(config)
    if config.cutoff is not None:
        joined = _cut(joined, target, config.cutoff, clini)
    kinds = {target: kind_of(joined.clinical[target], MAX_CLASSES)}
    kinds |= {name: kind_of(joined.clinical[name], MAX_AUXILIARY_CLASSES) for name in auxiliary}
    kinds |= config.kinds
    for column in (target, *auxiliary):
        if kinds[column] == "regression":
            refuse_words(column, joined.clinical[column], clini)
    labels = {}
    for name, row in joined.clinical.iterrows():
        known = {
            other: float(row[other]) if kinds[other] == "regression" else row[other]
            for other in auxiliary
            if row[other]
        }
        missing = [column for column in (target, *auxiliary) if not row[column]]
        refused = ""
        if config.complete_cases and missing:
            refused = f"no {missing[0]} value, and only complete cases are used"
        elif not row[target] and not known:
            refused = f"no {target} label"
        labels[str(name)] = _Labels(row[target], known, refused)
    patients, ledger, bags, reached = _gather(joined, labels, target)
    labelled = [p for p in patients if p.label]
    training_only = [p for p in patients if not p.label]
    usable = {name for name, label in labels.items() if label.label and not label.refused}
    stages = [
        ("in the clinical table", len(labels)),
        (f"with a label ({target})" + " and all other values" * config.complete_cases, len(usable)),
        ("and a slide in the slide table", len(usable & reached)),
        ("and usable features: used", len(labelled)),
    ]
    _refuse_nobody(labelled, "a label, a slide and features", stages, ledger)
    if training_only:
        stages.append(("without a label but with another value: trained on", len(training_only)))
    values: dict[str, list[str | float]] = {target: [p.label for p in labelled]}
    values |= {name: [p.known[name] for p in patients if name in p.known] for name in auxiliary}
    targets = [make_target(name, kinds[name], values[name], config) for name in values]
    return _cohort(targets[0], targets[1:], patients, ledger, stages, bags)


def load_external(
    clini: Path,
    slide_table: Path,
    features: Path,
    targets: Sequence[Target],
    *,
    patient_column: str = PATIENT,
    filename_column: str = FILENAME,
) -> Cohort:
    """Join the tables and files of a cohort to predict for: no label is needed, some may be there.

    Args:
        clini: Clinical table; columns of targets that it lacks are not known for anybody.
        slide_table: The patient and the file name, one row per slide.
        features: Folder of ``.h5`` files.
        targets: What was trained, the primary target first.
        patient_column: Column of the patient in both tables.
        filename_column: Column of the file name in the slide table.

    Returns:
        Everybody with usable features as ``patients``; a label that is not known is empty.

    Raises:
        UserError: The tables contradict themselves or the targets, or nobody is left.
    """
    options = {"patient_column": patient_column, "filename_column": filename_column}
    joined = join(clini, slide_table, features, [], **options)
    primary = targets[0]
    if primary.cutoff is not None and primary.name in joined.clinical:
        joined = _cut(joined, primary.name, primary.cutoff, clini)
    here = [target for target in targets if target.name in joined.clinical]
    for target in here:
        refuse_foreign_values(target, joined.clinical[target.name], clini)
    labels = {}
    for name, row in joined.clinical.iterrows():
        known = {
            t.name: float(row[t.name]) if t.kind == "regression" else row[t.name]
            for t in here
            if t is not primary and row[t.name]
        }
        labels[str(name)] = _Labels(row[primary.name] if primary in here else "", known, "")
    patients, ledger, bags, reached = _gather(joined, labels, primary.name)
    stages = [
        ("in the clinical table", len(labels)),
        ("and a slide in the slide table", len(reached)),
        ("and usable features: used", len(patients)),
    ]
    _refuse_nobody(patients, "a slide and features", stages, ledger)
    ledger = [
        replace(r, status="used", reason="") if r.status == TRAINING_ONLY else r for r in ledger
    ]
    cohort = _cohort(primary, targets[1:], patients, ledger, stages, bags)
    return replace(cohort, patients=tuple(patients), training_only=())


@dataclass(frozen=True)
class _Labels:
    """What the clinical table says of a patient, and why that is not enough."""

    label: str
    known: Mapping[str, str | float]
    refused: str


def _refuse_nobody(
    found: Sequence[Patient],
    needed: str,
    stages: Sequence[tuple[str, int]],
    ledger: Sequence[LedgerRow],
) -> None:
    if not found:
        raise UserError(
            f"At least one patient must have {needed}, but nobody has: "
            + "; ".join(f"{count} {stage}" for stage, count in stages)
            + f". Reasons: {listing(dict.fromkeys(left_out(ledger)), 3)}."
        )


def _gather(
    joined: Joined, labels: Mapping[str, _Labels], target: str
) -> tuple[list[Patient], list[LedgerRow], Inspection, set[str]]:
    """Return patients with features, the ledger, what their files are, and who has slides."""
    bags = Inspection()
    slides_of = joined.slides_of
    ledger = [
        LedgerRow("slide", key, name, "excluded", "its patient is not in the clinical table")
        for name in sorted(set(slides_of) - set(labels))
        for key in slides_of[name]
    ]
    patients = []
    for name in tqdm(sorted(labels), desc="features", unit="patient", leave=False):
        label = labels[name]
        keys = slides_of.get(name, [])
        used, rows = _usable_files(name, keys, joined, None if label.refused else bags)
        reason = label.refused
        if not reason and not keys:
            reason = "no slide in the slide table"
        elif not reason and not used:
            reason = "none of its slides has usable features"
        status = "excluded" if reason else "used"
        if not reason:
            tiles = sum(bags.tiles[path] for path in used)
            patients.append(Patient(name, label.label, label.known, used, tiles))
            if not label.label:
                status = TRAINING_ONLY
                reason = f"no {target} label: trained on for {listing(label.known)}, never tested"
        ledger += [LedgerRow("patient", name, name, status, reason), *rows]
    ledger += [
        LedgerRow("feature file", f"{name}.h5", "", "unclaimed", "not in the slide table")
        for name in joined.unclaimed
    ]
    return patients, ledger, bags, set(slides_of) & set(labels)


def _cohort(
    target: Target,
    auxiliary: Sequence[Target],
    patients: Sequence[Patient],
    ledger: Sequence[LedgerRow],
    stages: Sequence[tuple[str, int]],
    bags: Inspection,
) -> Cohort:
    bags.refuse_mixture()
    return Cohort(
        target=target,
        auxiliary=tuple(auxiliary),
        patients=tuple(p for p in patients if p.label),
        training_only=tuple(p for p in patients if not p.label),
        ledger=tuple(sorted(ledger, key=lambda row: (row.item, row.patient, row.name))),
        funnel=tuple(stages),
        kind=bags.kind(),
        digest=_sha256(
            f"{p.name}\t{p.label}\t{sorted(p.known.items())}\t{[bags.crc[f] for f in p.files]}"
            for p in patients
        ),
    )


def _usable_files(
    patient: str,
    keys: Sequence[str],
    joined: Joined,
    bags: Inspection | None,
) -> tuple[tuple[Path, ...], list[LedgerRow]]:
    """Return the usable feature files of one patient by name, and a ledger row for every slide.

    Without ``bags`` the patient is not used anyway, and no file is opened.
    """
    rows = []
    used: dict[str, Path] = {}
    for key in keys:
        candidates = joined.found[key]
        reason = ""
        if bags is None:
            reason = "its patient is left out"
        elif not candidates:
            reason = "no feature file"
        elif len(candidates) > 1:
            reason = f"ambiguous: {listing(name + '.h5' for name in candidates)}"
        elif candidates[0] in used:
            reason = f"listed more than once ({candidates[0]}.h5)"
        else:
            reason = bags.problem(joined.files[candidates[0]])
        if not reason:
            used[candidates[0]] = joined.files[candidates[0]]
        rows.append(LedgerRow("slide", key, patient, "excluded" if reason else "used", reason))
    return tuple(used[name] for name in sorted(used)), rows


def log_cohort(cohort: Cohort) -> None:
    """Log the funnel, the reasons for exclusion and what the targets look like."""
    stages = [f"{count} {stage}" for stage, count in cohort.funnel]
    logger.info("Patients: %s", " -> ".join(stages))
    for reason, count in Counter(left_out(cohort.ledger)).most_common():
        logger.warning("Left out: %d x %s", count, reason)
    everybody = [known_values(p, cohort.targets) for p in (*cohort.patients, *cohort.training_only)]
    for target in cohort.targets:
        known = [values[target.name] for values in everybody if target.name in values]
        logger.info(
            "%s: %s; known for %d of %d patients",
            target.name,
            describe(target, known),
            len(known),
            len(everybody),
        )
    kind = cohort.kind
    logger.info("Features: %s%s", kind.extractor, " (RANDOM WEIGHTS)" * kind.random_weights)
    if kind.simulated:
        logger.warning("%s", kind.simulated)


def _cut(joined: Joined, name: str, cutoff: float, table: Path) -> Joined:
    column = cut(name, joined.clinical[name], cutoff, table)
    return replace(joined, clinical=joined.clinical.assign(**{name: column}))


def left_out(ledger: Iterable[LedgerRow]) -> list[str]:
    """Return the item and the reason of every row that is not used at all."""
    kept = ("used", TRAINING_ONLY)
    return [f"{row.item}: {row.reason}" for row in ledger if row.status not in kept]


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
