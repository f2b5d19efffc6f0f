"""Tables and feature files joined to labelled bags of tiles, and a ledger of who was left out.

A patient with a readable feature file is used for every target that is known. A missing auxiliary
value makes that task absent: it is not in `Patient.known`, never NaN, never 0. Patients without the
primary label but with an auxiliary value are trained on and never tested: they stand apart, in
`Cohort.training_only`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
from tqdm import tqdm

from examples.pathology.bags import Inspection
from examples.pathology.errors import UserError, listing, nearest
from examples.pathology.files import write_text
from examples.pathology.joining import Joined, join
from examples.pathology.tables import FILENAME, PATIENT

logger = logging.getLogger(__name__)

# A numeric primary target with more values than this is a measurement, not a set of classes.
MAX_CLASSES = 20
TRAINING_ONLY = "training only"


@dataclass(frozen=True)
class Target:
    """One column to predict.

    Args:
        name: The column.
        kind: ``classification`` or ``regression``.
        classes: The class labels in order of the logits; empty for a regression.
        positive: The class whose AUROC is reported; empty for a regression.
    """

    name: str
    kind: Literal["classification", "regression"]
    classes: tuple[str, ...] = ()
    positive: str = ""

    @property
    def width(self) -> int:
        """Width of the head: the number of classes, or 1."""
        return len(self.classes) if self.kind == "classification" else 1


@dataclass(frozen=True)
class Patient:
    """One patient that is used.

    Args:
        name: The identifier in the clinical table.
        label: Value of the primary target; empty if it is not known.
        known: Auxiliary values that are known, by target: a class label, or a number in its own
            unit.
        files: Feature files, in a stable order.
        tiles: Number of tiles over all files.
    """

    name: str
    label: str
    known: Mapping[str, str | float]
    files: tuple[Path, ...]
    tiles: int


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
        extractor: What made the features.
        weights_sha256: Checksum of its weights; ``None`` if the files do not say.
        tile_size_um: Edge of a tile; ``None`` if the files do not say.
        random_weights: Whether the extractor had random weights: its features carry no biology.
        in_features: Length of a tile's feature vector.
        digest: sha256 over names, labels, values and the content of the features.
    """

    target: Target
    auxiliary: tuple[Target, ...]
    patients: tuple[Patient, ...]
    training_only: tuple[Patient, ...]
    ledger: tuple[LedgerRow, ...]
    funnel: tuple[tuple[str, int], ...]
    extractor: str
    weights_sha256: str | None
    tile_size_um: float | None
    random_weights: bool
    in_features: int
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
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["item", "name", "patient", "status", "reason"])
        writer.writerows((r.item, r.name, r.patient, r.status, r.reason) for r in self.ledger)
        write_text(path, text.getvalue())


def load_cohort(
    clini: Path,
    slide_table: Path,
    features: Path,
    target: str,
    auxiliary: Sequence[str] = (),
    *,
    positive: str | None = None,
    complete_cases: bool = False,
    patient_column: str = PATIENT,
    filename_column: str = FILENAME,
) -> Cohort:
    """Join the clinical table, the slide table and the feature files.

    Args:
        clini: Clinical table: the patient and the targets.
        slide_table: The patient and the file name, one row per slide.
        features: Folder of ``.h5`` files, searched with its sub-folders.
        target: The primary, categorical target.
        auxiliary: Further targets: numbers with more than two values make a regression, anything
            else a classification.
        positive: The class of ``target`` whose AUROC is reported; ``None``: the rarer one.
        complete_cases: Whether to leave out whoever lacks a value of any target (the paper's rule),
            instead of using every value that is known.
        patient_column: Column of the patient in both tables.
        filename_column: Column of the file name in the slide table.

    Returns:
        The patients to use, and the ledger of the others.

    Raises:
        UserError: The tables contradict themselves or each other, features of several extractors
            are mixed, or nobody is left.
    """
    joined = join(
        clini,
        slide_table,
        features,
        [target, *auxiliary],
        patient_column=patient_column,
        filename_column=filename_column,
    )
    kinds = {name: _column_kind(joined.clinical[name]) for name in auxiliary}
    labels = {}
    for name, row in joined.clinical.iterrows():
        known = {
            other: float(row[other]) if kinds[other] == "regression" else row[other]
            for other in auxiliary
            if row[other]
        }
        missing = [column for column in (target, *auxiliary) if not row[column]]
        refused = ""
        if complete_cases and missing:
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
        (f"with a label ({target})" + " and all other values" * complete_cases, len(usable)),
        ("and a slide in the slide table", len(usable & reached)),
        ("and usable features: used", len(labelled)),
    ]
    if not labelled:
        raise UserError(
            "At least one patient must have a label, a slide and features, but nobody has: "
            + "; ".join(f"{count} {stage}" for stage, count in stages)
            + f". Reasons: {listing(dict.fromkeys(left_out(ledger)), 3)}."
        )
    if training_only:
        stages.append(("without a label but with another value: trained on", len(training_only)))
    return _cohort(
        _classification(target, [p.label for p in labelled], clini, positive),
        [
            _auxiliary_target(
                other, kinds[other], [p.known[other] for p in patients if other in p.known], clini
            )
            for other in auxiliary
        ],
        patients,
        ledger,
        stages,
        bags,
    )


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
    here = [target for target in targets if target.name in joined.clinical]
    for target in here:
        _refuse_foreign_values(target, joined.clinical[target.name], clini)
    labels = {}
    for name, row in joined.clinical.iterrows():
        known = {
            t.name: float(row[t.name]) if t.kind == "regression" else row[t.name]
            for t in here
            if t is not targets[0] and row[t.name]
        }
        labels[str(name)] = _Labels(row[targets[0].name] if targets[0] in here else "", known, "")
    patients, ledger, bags, reached = _gather(joined, labels, targets[0].name)
    stages = [
        ("in the clinical table", len(labels)),
        ("and a slide in the slide table", len(reached)),
        ("and usable features: used", len(patients)),
    ]
    if not patients:
        raise UserError(
            "At least one patient must have a slide and features, but nobody has: "
            + "; ".join(f"{count} {stage}" for stage, count in stages)
            + f". Reasons: {listing(dict.fromkeys(left_out(ledger)), 3)}."
        )
    ledger = [
        replace(r, status="used", reason="") if r.status == TRAINING_ONLY else r for r in ledger
    ]
    cohort = _cohort(targets[0], targets[1:], patients, ledger, stages, bags)
    return replace(cohort, patients=tuple(patients), training_only=())


@dataclass(frozen=True)
class _Labels:
    """What the clinical table says of a patient, and why that is not enough."""

    label: str
    known: Mapping[str, str | float]
    refused: str


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
    maker = bags.maker()
    return Cohort(
        target=target,
        auxiliary=tuple(auxiliary),
        patients=tuple(p for p in patients if p.label),
        training_only=tuple(p for p in patients if not p.label),
        ledger=tuple(sorted(ledger, key=lambda row: (row.item, row.patient, row.name))),
        funnel=tuple(stages),
        extractor=maker.extractor,
        weights_sha256=maker.weights_sha256,
        tile_size_um=maker.tile_size_um,
        random_weights=maker.random_weights,
        in_features=maker.width,
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
    everybody = [*cohort.patients, *cohort.training_only]
    for target in cohort.targets:
        known = [
            p for p in everybody if (p.label if target is cohort.target else target.name in p.known)
        ]
        if target.kind == "classification":
            labels = Counter(
                p.label if target is cohort.target else str(p.known[target.name]) for p in known
            )
            logger.info(
                "%s: classification of %s; positive is %s; known for %d of %d patients",
                target.name,
                ", ".join(f"{label} ({labels[label]})" for label in target.classes),
                target.positive,
                len(known),
                len(everybody),
            )
        else:
            logger.info(
                "%s: regression; known for %d of %d patients, absent for the others",
                target.name,
                len(known),
                len(everybody),
            )
    logger.info(
        "Features: %s%s", cohort.extractor, " (RANDOM WEIGHTS)" if cohort.random_weights else ""
    )


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _column_kind(column: pd.Series[str]) -> Literal["classification", "regression"]:
    values = {value for value in column if value}
    return "regression" if len(values) > 2 and all(map(_is_number, values)) else "classification"


def _classification(name: str, labels: Sequence[str], table: Path, positive: str | None) -> Target:
    counts = Counter(labels)
    classes = tuple(sorted(counts))
    if len(classes) < 2:
        raise UserError(
            f"{table}: `{name}` must have at least 2 values among the patients used, but has "
            f"{listing(classes) or 'none'}."
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{table}: `{name}` must have at most {MAX_CLASSES} classes, but has {len(classes)} "
            "values. "
            "A measurement can be an auxiliary target."
        )
    if positive is not None and positive not in classes:
        raise UserError(
            f"`positive` must be a value of `{name}` ({listing(classes)}), but got {positive!r}."
            f"{nearest(positive, classes)}"
        )
    # The rarer class is what a biomarker looks for; of two equally rare ones the later name.
    rarer = min(reversed(classes), key=lambda label: counts[label])
    return Target(name, "classification", classes, positive or rarer)


def _refuse_foreign_values(target: Target, column: pd.Series[str], table: Path) -> None:
    """Raise if an external table has values of a target that was not trained on them."""
    values = sorted({value for value in column if value})
    if target.kind == "regression":
        if strange := [value for value in values if not _is_number(value)]:
            raise UserError(
                f"{table}: `{target.name}` must hold numbers, but has "
                f"{listing(map(repr, strange))}."
            )
        return
    if strange := [value for value in values if value not in target.classes]:
        raise UserError(
            f"{table}: `{target.name}` must be one of {listing(target.classes)}, as in training, "
            f"but has {listing(map(repr, strange))}.{nearest(strange[0], target.classes)}"
        )


def _auxiliary_target(
    name: str,
    kind: Literal["classification", "regression"],
    values: Sequence[str | float],
    table: Path,
) -> Target:
    if kind == "classification":
        return _classification(name, [str(value) for value in values], table, None)
    if len(set(values)) < 2:
        raise UserError(
            f"{table}: `{name}` must have at least 2 values among the patients used, but has "
            f"{len(set(values))}."
        )
    return Target(name, "regression")


def left_out(ledger: Iterable[LedgerRow]) -> list[str]:
    """Return the item and the reason of every row that is not used at all."""
    kept = ("used", TRAINING_ONLY)
    return [f"{row.item}: {row.reason}" for row in ledger if row.status not in kept]


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
