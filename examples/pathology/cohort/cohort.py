"""Tables and feature files joined to labelled bags of tiles, and a ledger of who was left out.

A patient with a readable feature file is used for every target that is known. A missing auxiliary
value makes that task absent: it is not in `Patient.known`, never NaN, never 0. Patients without the
primary label but with an auxiliary value are trained on and never tested: they stand apart, in
`Cohort.training_only`.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from examples.pathology.cohort.inspection import Inspection
from examples.pathology.cohort.joining import Joined, join
from examples.pathology.cohort.patients import Patient, values_of
from examples.pathology.cohort.targets import (
    MAX_AUXILIARY_CLASSES,
    MAX_CLASSES,
    Target,
    cut,
    describe,
    foreign_values,
    kind_of,
    make_target,
    one_spelling,
    refuse_foreign_values,
    refuse_look_alikes,
    refuse_too_large,
    refuse_words,
    spelled_as,
    warn_of_far_value,
    words_among_numbers,
)
from examples.pathology.common.errors import UserError, listing
from examples.pathology.features.kind import FeatureKind
from examples.pathology.settings.cohort import TCGA_SITE, CohortConfig, Kind, Sources
from examples.pathology.tables.reading import sites_of
from examples.pathology.tables.writing import write_table

logger = logging.getLogger(__name__)

TRAINING_ONLY = "training only"


@dataclass(frozen=True)
class CohortRow:
    """What became of one patient, slide or feature file.

    The status is ``used``, ``training only``, ``excluded`` or ``unclaimed``; the reason says why it
    is not used, or not for all.
    """

    item: str  # `patient`, `slide` or `feature file`
    name: str
    patient: str  # whose it is, as far as known
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Cohort:
    """Labelled bags, and how they came about.

    Args:
        targets: The primary target, then the auxiliary ones.
        patients: Whom to train and test on, sorted by name: all have the primary label.
        training_only: Those without it but with an auxiliary value: a part of every training part
            (with folds by site, of those that have none of their site held out), and of no other.
        ledger: One row per patient, slide and unclaimed feature file.
        funnel: ``(stage, number of patients)`` from the clinical table to the patients used.
        kind: What made the features.
        digest: sha256 over names, labels, values and the content of the features.
        unknown: By target, the words that were taken for "not known", counted.
    """

    targets: tuple[Target, ...]
    patients: tuple[Patient, ...]
    training_only: tuple[Patient, ...]
    ledger: tuple[CohortRow, ...]
    funnel: tuple[tuple[str, int], ...]
    kind: FeatureKind
    digest: str
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """The primary target."""
        return self.targets[0]

    @property
    def by_site(self) -> bool:
        """Whether sites are known, so that folds are divided by them."""
        return any(patient.site for patient in self.patients)

    def labels_sha256(self) -> str:
        """Return a hash of patients, labels and sites: what a split into folds depends on."""
        return _sha256(f"{p.name}\t{p.label}{_of_site(p)}" for p in self.patients)

    def write_ledger(self, path: Path) -> None:
        """Write the ledger as a CSV table."""
        write_table(path, pd.DataFrame(list(self.ledger)))


def load_cohort(config: CohortConfig) -> Cohort:
    """Join the clinical table, the slide table and the feature files.

    Raises:
        UserError: The tables contradict themselves or each other, features of several extractors
            are mixed, two patients have the same ones, or nobody is left.
    """
    target = config.target
    grouping = [name for name in (config.group_column,) if name not in (None, TCGA_SITE)]
    joined = join(config.sources, [target, *config.auxiliary, *grouping])
    joined = _cut(joined, target, config.cutoff, config.clini)
    kinds = _kinds(joined.clinical, config)
    labels = [name for name, kind in kinds.items() if kind == "classification"]
    joined = _one_spelling(joined, [*labels, *grouping], config.clini)
    people = _read_patients(joined.clinical, target, kinds)
    refused = {person.name: _refusal(person, config) for person in people}
    found, ledger, inspection = _gather(people, joined, refused)
    if config.group_column is not None:
        found = _with_sites(found, config.group_column, joined.clinical)
    labelled = [patient for patient in found if patient.label]
    training_only = [patient for patient in found if not patient.label]
    usable = {person.name for person in people if person.label and not refused[person.name]}
    stages = [
        ("in the clinical table", len(people)),
        (f"with a label ({target})" + " and all other values" * config.complete_cases, len(usable)),
        ("and a slide in the slide table", len(usable & set(joined.slides_of))),
        ("and usable features: used", len(labelled)),
    ]
    _refuse_nobody(labelled, "a label, a slide and features", stages, ledger)
    if training_only:
        stages.append(("without a label but with another value: trained on", len(training_only)))
    for name, kind in kinds.items():
        if kind == "regression":
            numbers = _numbers_of(name, found, target)
            refuse_too_large(name, numbers, config.clini)
            warn_of_far_value(name, numbers, config.clini)
    values: dict[str, list[str | float]] = {target: [p.label for p in labelled]}
    for name in config.auxiliary:
        values[name] = [p.known[name] for p in found if name in p.known]
    targets = [make_target(name, kinds[name], known, config) for name, known in values.items()]
    return _cohort(joined, targets, labelled, training_only, stages, ledger, inspection)


def load_external(
    sources: Sources, targets: Sequence[Target], *, skip_unknown_labels: bool = False
) -> Cohort:
    """Join the tables and files of a cohort to predict for: no label is needed, some may be there.

    Args:
        sources: Where they are; columns of targets that the clinical table lacks are not known for
            anybody.
        targets: What was trained, the primary target first.
        skip_unknown_labels: Leave out patients with a value that was not trained on.

    Returns:
        Everybody with usable features as ``patients``; a label that is not known is empty.

    Raises:
        UserError: The tables contradict themselves or the targets, two patients have the same
            features, or nobody is left.
    """
    joined = join(sources, [], {each.name: each.classes for each in targets})
    here = [target for target in targets if target.name in joined.clinical]
    spelled = {t.name: spelled_as(t.classes, joined.clinical[t.name]) for t in here}
    joined = replace(joined, clinical=joined.clinical.assign(**spelled))
    if skip_unknown_labels:
        joined, refused = _without_foreign(joined, here)
    else:
        refused = {}
        remedy = " `deploy --skip-unknown-labels` predicts for the others."
        for target in here:
            refuse_foreign_values(target, joined.clinical[target.name], sources.clini, remedy)
    joined = _cut(joined, targets[0].name, targets[0].cutoff, sources.clini)
    kinds = {target.name: target.kind for target in here}
    people = _read_patients(joined.clinical, targets[0].name, kinds)
    found, ledger, inspection = _gather(people, joined, refused)
    usable = {person.name for person in people} - refused.keys()
    for name, kind in kinds.items():
        if kind == "regression":
            refuse_too_large(name, _numbers_of(name, found, targets[0].name), sources.clini)
    stages = [
        ("in the clinical table", len(people)),
        *[("without unknown labels", len(usable))] * skip_unknown_labels,
        ("and a slide in the slide table", len(usable & joined.slides_of.keys())),
        ("and usable features: used", len(found)),
    ]
    _refuse_nobody(found, "a slide and features", stages, ledger)
    return _cohort(joined, targets, found, [], stages, ledger, inspection)


def _numbers_of(name: str, people: Sequence[Patient], primary: str) -> dict[str, float]:
    """Return what is known of a regression, by patient; people's labels are of the primary one."""
    labels = {p.name: float(p.label) for p in people if name == primary and p.label}
    return labels | {p.name: float(p.known[name]) for p in people if name in p.known}


def _without_foreign(joined: Joined, targets: Sequence[Target]) -> tuple[Joined, dict[str, str]]:
    """Empty the cells that no target was trained on; return by patient why they are left out."""
    clinical, refused = joined.clinical.copy(), dict[str, str]()
    for target in targets:
        for patient, value in foreign_values(target, clinical[target.name]).items():
            clinical.loc[patient, target.name] = ""
            refused.setdefault(str(patient), f"its {target.name} {value!r} was not trained on")
    return replace(joined, clinical=clinical), refused


def _cut(joined: Joined, target: str, cutoff: float | None, table: Path) -> Joined:
    """Make classes of the primary target where it has a cut-off."""
    if cutoff is None or target not in joined.clinical:
        return joined
    column = cut(target, joined.clinical[target], cutoff, table)
    return replace(joined, clinical=joined.clinical.assign(**{target: column}))


def _kinds(clinical: pd.DataFrame, config: CohortConfig) -> dict[str, Kind]:
    """Return what each target is taken for, and raise if one that is to be a number is none."""
    most = {config.target: MAX_CLASSES} | dict.fromkeys(config.auxiliary, MAX_AUXILIARY_CLASSES)
    kinds = {name: kind_of(clinical[name], classes) for name, classes in most.items()}
    for name, classes in most.items():
        words = words_among_numbers(clinical[name], classes)
        if words and name not in config.kinds:
            logger.warning(
                "`%s` is taken for classes, as among its numbers stands %s. Leave such cells empty "
                "if it is a measurement, or give --kind %s=classification.",
                name,
                listing(f"{word!r} ({count})" for word, count in words.items()),
                name,
            )
    kinds |= config.kinds
    for name, kind in kinds.items():
        if kind == "regression":
            refuse_words(name, clinical[name], config.clini)
    return kinds


def _one_spelling(joined: Joined, labels: Sequence[str], table: Path) -> Joined:
    """Make equal numbers in columns of classes one class, and refuse classes that look alike."""
    columns = {name: one_spelling(joined.clinical[name]) for name in labels}
    for name, column in columns.items():
        refuse_look_alikes(name, column, table)
    return replace(joined, clinical=joined.clinical.assign(**columns))


def _read_patients(clinical: pd.DataFrame, target: str, kinds: Mapping[str, Kind]) -> list[Patient]:
    """Return everybody in the clinical table with what is known of them, still without files."""
    people = []
    for name, row in clinical.iterrows():
        known = {
            other: float(row[other]) if kind == "regression" else row[other]
            for other, kind in kinds.items()
            if other != target and row[other]
        }
        label = row[target] if target in kinds else ""
        people.append(Patient(str(name), label, known, (), 0))
    return sorted(people, key=lambda person: person.name)


def _with_sites(patients: Sequence[Patient], column: str, table: pd.DataFrame) -> list[Patient]:
    """Return patients with their sites, all of which must be known: one that is not may be any."""
    sites = sites_of([patient.name for patient in patients], column, table)
    if missing := [name for name, site in sites.items() if not site]:
        raise UserError(
            f"`group-column` must tell the site of every patient who is used, but {column} tells "
            f"none of {listing(missing)}. Fill in a column: with one word for those who may share "
            "a site, with a word for each of the others."
        )
    return [replace(patient, site=sites[patient.name]) for patient in patients]


def _of_site(patient: Patient) -> str:
    return f"\tof {patient.site}" if patient.site else ""


def _refusal(patient: Patient, config: CohortConfig) -> str:
    """Return why what is known of a patient is not enough to train on, or an empty string."""
    known = [config.target] * bool(patient.label) + list(patient.known)
    missing = [name for name in (config.target, *config.auxiliary) if name not in known]
    if config.complete_cases and missing:
        return f"no {missing[0]} value, and only complete cases are used"
    return "" if known else f"no {config.target} label"


def _gather(
    people: Sequence[Patient], joined: Joined, refused: Mapping[str, str]
) -> tuple[list[Patient], list[CohortRow], Inspection]:
    """Return who has usable feature files, unless refused, the ledger of all, and the files."""
    inspection = Inspection()
    slides_of = joined.slides_of
    ledger = [
        CohortRow("slide", key, name, "excluded", "its patient is not in the clinical table")
        for name in sorted(slides_of.keys() - {person.name for person in people})
        for key in slides_of[name]
    ]
    patients = []
    for person in tqdm(people, desc="features", unit="patient", leave=False):
        reason = refused.get(person.name, "")
        keys = slides_of.get(person.name, [])
        used, rows = _usable_files(person.name, keys, joined, None if reason else inspection)
        if not reason and not keys:
            reason = "no slide in the slide table"
        elif not reason and not used:
            reason = "none of its slides has usable features"
        if not reason:
            tiles = sum(inspection.tiles[path] for path in used)
            patients.append(replace(person, files=used, tiles=tiles))
        status = "excluded" if reason else "used"
        ledger += [CohortRow("patient", person.name, person.name, status, reason), *rows]
    ledger += [
        CohortRow("feature file", f"{name}.h5", "", "unclaimed", "not in the slide table")
        for name in joined.unclaimed
    ]
    return patients, ledger, inspection


def _usable_files(
    patient: str, keys: Sequence[str], joined: Joined, inspection: Inspection | None
) -> tuple[tuple[Path, ...], list[CohortRow]]:
    """Return the usable feature files of one patient by name, and a ledger row for every slide.

    Without an inspection the patient is not used anyway, and no file is opened.
    """
    rows = []
    used: dict[str, Path] = {}
    for key in keys:
        candidates = joined.found[key]
        reason = ""
        if inspection is None:
            reason = "its patient is left out"
        elif not candidates:
            reason = "no feature file"
        elif len(candidates) > 1:
            reason = f"ambiguous: {listing(name + '.h5' for name in candidates)}"
        elif candidates[0] in used:
            reason = f"listed more than once ({candidates[0]}.h5)"
        else:
            reason = inspection.problem(joined.files[candidates[0]])
        if not reason:
            used[candidates[0]] = joined.files[candidates[0]]
        rows.append(CohortRow("slide", key, patient, "excluded" if reason else "used", reason))
    return tuple(used[name] for name in sorted(used)), rows


def _refuse_nobody(
    used: Sequence[Patient],
    needed: str,
    stages: Sequence[tuple[str, int]],
    ledger: Sequence[CohortRow],
) -> None:
    if not used:
        raise UserError(
            f"At least one patient must have {needed}, but nobody has: "
            + "; ".join(f"{count} {stage}" for stage, count in stages)
            + f". Reasons: {listing(dict.fromkeys(left_out(ledger)), 3)}."
        )


def _cohort(
    joined: Joined,
    targets: Sequence[Target],
    patients: Sequence[Patient],
    training_only: Sequence[Patient],
    stages: Sequence[tuple[str, int]],
    ledger: Sequence[CohortRow],
    inspection: Inspection,
) -> Cohort:
    """Return the cohort, whose features must be of one kind, and no slide under two patients."""
    kind, crc = inspection.kind(), inspection.crc
    inspection.refuse_copies([*patients, *training_only])
    unknown = {target.name: joined.unknown_of(target.name) for target in targets}
    reasons = {
        p.name: f"no {targets[0].name} label: trained on for {listing(p.known)}, never tested"
        for p in training_only
    }
    rows = [
        replace(row, status=TRAINING_ONLY, reason=reasons[row.name])
        if row.item == "patient" and row.name in reasons
        else row
        for row in ledger
    ]
    return Cohort(
        targets=tuple(targets),
        patients=tuple(patients),
        training_only=tuple(training_only),
        ledger=tuple(sorted(rows, key=lambda row: (row.item, row.patient, row.name))),
        funnel=tuple(stages),
        unknown={name: words for name, words in unknown.items() if words},
        kind=kind,
        digest=_sha256(
            f"{p.name}\t{p.label}\t{sorted(p.known.items())}\t{[crc[file] for file in p.files]}"
            + _of_site(p)
            for p in sorted([*patients, *training_only], key=lambda p: p.name)
        ),
    )


def log_unknown(cohort: Cohort) -> None:
    """Log which words of the targets were taken for "not known", and how often."""
    for name, words in cohort.unknown.items():
        logger.warning("%s: taken for not known: %s. Rename what is a class.", name, words)


def log_exclusions(cohort: Cohort) -> None:
    """Log the funnel, and the reasons for which anybody or any value is left out."""
    stages = [f"{count} {stage}" for stage, count in cohort.funnel]
    logger.info("Patients: %s", " -> ".join(stages))
    for reason, count in Counter(left_out(cohort.ledger)).most_common():
        logger.warning("Left out: %d x %s", count, reason)
    log_unknown(cohort)


def log_cohort(cohort: Cohort) -> None:
    """Log the funnel, the reasons for exclusion and what the targets look like."""
    log_exclusions(cohort)
    everybody = [*cohort.patients, *cohort.training_only]
    known = values_of(everybody, cohort.targets)
    for target in cohort.targets:
        what, count = describe(target, known[target.name]), len(known[target.name])
        text = "%s: %s; known for %d of %d patients"
        logger.info(text, target.name, what, count, len(everybody))
    kind = cohort.kind
    logger.info("Features: %s%s", kind.extractor, " (RANDOM WEIGHTS)" * kind.random_weights)
    if kind.simulated:
        logger.warning("%s", kind.simulated)


def left_out(ledger: Iterable[CohortRow]) -> list[str]:
    """Return the item and the reason of every row that is not used at all."""
    kept = ("used", TRAINING_ONLY)
    return [f"{row.item}: {row.reason}" for row in ledger if row.status not in kept]


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
