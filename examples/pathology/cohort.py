"""Tables and feature files joined to labelled bags of tiles, and a ledger of who was left out.

A patient with the primary label and at least one readable feature file is used. A missing auxiliary
value makes that task absent for that patient: it is not in `Patient.known`, never NaN, never 0.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import logging
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from examples.pathology.errors import UserError, listing, nearest, one_line
from examples.pathology.files import write_text
from examples.pathology.tables import FILENAME, PATIENT, read_table

if TYPE_CHECKING:
    from examples.pathology.features import Bag

logger = logging.getLogger(__name__)

SLIDE_SUFFIXES = frozenset(
    "bif czi dcm mrxs ndpi qptiff scn svs svslide tif tiff vms vmu".split()  # noqa: SIM905
)
# A numeric primary target with more values than this is a measurement, not a set of classes.
MAX_CLASSES = 20
DEFAULT_CACHE_BYTES = 4 * 2**30


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
        label: Value of the primary target.
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
        status: ``used``, ``excluded`` or ``unclaimed``.
        reason: Why it is not used.
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
        patients: Whom to train and test on, sorted by name.
        ledger: One row per patient, slide and unclaimed feature file.
        funnel: ``(stage, number of patients)`` from the clinical table to the patients used.
        extractor: What made the features.
        random_weights: Whether the extractor had random weights: its features carry no biology.
        in_features: Length of a tile's feature vector.
        digest: sha256 over names, labels, values and the content of the features.
    """

    target: Target
    auxiliary: tuple[Target, ...]
    patients: tuple[Patient, ...]
    ledger: tuple[LedgerRow, ...]
    funnel: tuple[tuple[str, int], ...]
    extractor: str
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


def read_clinical_table(path: Path, targets: Sequence[str]) -> pd.DataFrame:
    """Read the clinical table: one row per patient, indexed by patient.

    Raises:
        UserError: A patient is unnamed or stands in more than one row.
    """
    table = read_table(path, [PATIENT, *targets])
    _refuse_unnamed(table, path, PATIENT)
    twice = [name for name, count in Counter(table[PATIENT]).items() if count > 1]
    if twice:
        raise UserError(
            f"{path} must have one row per patient, but has several for {listing(sorted(twice))}."
        )
    indexed: pd.DataFrame = table.set_index(PATIENT)
    return indexed


def read_slide_table(path: Path) -> list[tuple[str, str]]:
    """Read the slide table as ``(patient, key)``: a key is a relative path without suffix.

    Raises:
        UserError: A cell is empty, or a file name would lead out of the feature folder.
    """
    table = read_table(path, [PATIENT, FILENAME])
    _refuse_unnamed(table, path, PATIENT)
    _refuse_unnamed(table, path, FILENAME)
    rows = zip(table[PATIENT], table[FILENAME], strict=True)
    return [(patient, slide_key(name, path)) for patient, name in rows]


def slide_key(name: str, table: Path) -> str:
    """Return the relative path of a slide without the suffix of a slide or feature file.

    Raises:
        UserError: The name is absolute or climbs out of its folder.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or PureWindowsPath(name).drive or ".." in relative.parts:
        raise UserError(
            f"{table}: `{FILENAME}` must be a path inside the feature folder, but got {name!r}."
        )
    if relative.suffix.lower().lstrip(".") in {*SLIDE_SUFFIXES, "h5"}:
        relative = relative.with_suffix("")
    return str(relative)


def match_files(keys: Iterable[str], files: Iterable[str]) -> dict[str, list[str]]:
    """Find the feature files that each key of the slide table may mean.

    Tried in turn: the same relative path; the same stem in any folder; and the same stem but for
    what follows a dot, on either side, which is how TCGA names differ with and without their UUID.
    The first that finds anything decides; more than one file is ambiguous, and for the caller to
    refuse.

    Args:
        keys: Relative paths without suffix.
        files: Relative paths of feature files without suffix.

    Returns:
        The sorted candidates of every key.
    """
    paths = set(files)
    by_stem: dict[str, list[str]] = defaultdict(list)
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths):
        stem = PurePosixPath(path).name
        by_stem[stem].append(path)
        for prefix in _prefixes(stem):
            by_prefix[prefix].append(path)
    found: dict[str, list[str]] = {}
    for key in keys:
        stem = PurePosixPath(key).name
        shorter = (by_stem[prefix] for prefix in _prefixes(stem) if prefix in by_stem)
        found[key] = (
            [key] if key in paths else by_stem.get(stem) or by_prefix.get(stem) or next(shorter, [])
        )
    return found


def load_cohort(
    clini: Path,
    slide_table: Path,
    features: Path,
    target: str,
    auxiliary: Sequence[str] = (),
    *,
    positive: str | None = None,
) -> Cohort:
    """Join the clinical table, the slide table and the feature files.

    Args:
        clini: Clinical table: ``PATIENT`` and the targets.
        slide_table: ``PATIENT`` and ``FILENAME``, one row per slide.
        features: Folder of ``.h5`` files, searched with its sub-folders.
        target: The primary, categorical target.
        auxiliary: Further targets: numbers with more than two values make a regression, anything
            else a classification.
        positive: The class of ``target`` whose AUROC is reported; ``None``: the rarer one.

    Returns:
        The patients to use, and the ledger of the others.

    Raises:
        UserError: The tables contradict themselves or each other, features of several extractors
            are mixed, or nobody is left.
    """
    clinical = read_clinical_table(clini, [target, *auxiliary])
    slides = read_slide_table(slide_table)
    files = find_feature_files(features)
    found = match_files((key for _, key in slides), files)
    _refuse_shared_files(slides, found, slide_table)
    kinds = {name: _column_kind(clinical[name]) for name in auxiliary}
    bags = _Bags()
    ledger: list[LedgerRow] = []
    patients: list[Patient] = []
    funnel = {
        "in the clinical table": 0,
        f"with a label ({target})": 0,
        "and a slide in the slide table": 0,
        "and usable features: used": 0,
    }
    slides_of: dict[str, list[str]] = defaultdict(list)
    for name, key in slides:
        slides_of[name].append(key)
    for name in sorted(set(slides_of) - set(clinical.index)):
        ledger += [
            LedgerRow("slide", key, name, "excluded", "its patient is not in the clinical table")
            for key in slides_of[name]
        ]
    for name in tqdm(sorted(clinical.index), desc="features", unit="patient", leave=False):
        label = str(clinical.loc[name, target])
        used, rows = _usable_files(name, slides_of[name], found, files, bags if label else None)
        steps = [
            (True, ""),
            (bool(label), f"no {target} label"),
            (bool(slides_of[name]), "no slide in the slide table"),
            (bool(used), "none of its slides has usable features"),
        ]
        passed = list(itertools.takewhile(lambda step: step[0], steps))
        for stage in list(funnel)[: len(passed)]:
            funnel[stage] += 1
        reason = steps[len(passed)][1] if len(passed) < len(steps) else ""
        status = "excluded" if reason else "used"
        ledger += [LedgerRow("patient", name, name, status, reason), *rows]
        if not reason:
            known = {
                other: float(value) if kinds[other] == "regression" else value
                for other in auxiliary
                if (value := str(clinical.loc[name, other]))
            }
            tiles = sum(bags.tiles[path] for path in used)
            patients.append(Patient(name, label, known, used, tiles))
    claimed = {name for candidates in found.values() for name in candidates}
    ledger += [
        LedgerRow("feature file", f"{name}.h5", "", "unclaimed", "not in the slide table")
        for name in files
        if name not in claimed
    ]
    if not patients:
        raise UserError(
            "At least one patient must have a label, a slide and features, but nobody has: "
            + "; ".join(f"{count} {stage}" for stage, count in funnel.items())
            + f". Reasons: {listing(dict.fromkeys(_reasons(ledger)), 3)}."
        )
    bags.refuse_mixture()
    return Cohort(
        target=_classification(target, [p.label for p in patients], clini, positive),
        auxiliary=tuple(
            _auxiliary_target(
                other, kinds[other], [p.known[other] for p in patients if other in p.known], clini
            )
            for other in auxiliary
        ),
        patients=tuple(patients),
        ledger=tuple(sorted(ledger, key=lambda row: (row.item, row.patient, row.name))),
        funnel=tuple(funnel.items()),
        extractor=bags.extractor,
        random_weights=bags.random_weights,
        in_features=bags.in_features,
        digest=_sha256(
            f"{p.name}\t{p.label}\t{sorted(p.known.items())}\t{[bags.crc[f] for f in p.files]}"
            for p in patients
        ),
    )


def find_feature_files(folder: Path) -> dict[str, Path]:
    """Return the ``.h5`` files of a folder and its sub-folders by relative path without suffix.

    Raises:
        UserError: There are none.
    """
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.h5"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        what = "holds none" if folder.is_dir() else "is no folder"
        raise UserError(f"`features` must be a folder of .h5 files, but {folder} {what}.")
    return files


def _refuse_shared_files(
    slides: Sequence[tuple[str, str]], found: Mapping[str, list[str]], table: Path
) -> None:
    """Raise if a feature file belongs to two patients, which would leak between folds."""
    owners: dict[str, str] = {}
    for patient, key in slides:
        if len(found[key]) == 1 and (owner := owners.setdefault(found[key][0], patient)) != patient:
            raise UserError(
                f"{table}: each feature file must belong to one patient, but {found[key][0]}.h5 "
                f"is claimed by {owner} and {patient}."
            )


def _usable_files(
    patient: str,
    keys: Sequence[str],
    found: Mapping[str, list[str]],
    files: Mapping[str, Path],
    bags: _Bags | None,
) -> tuple[tuple[Path, ...], list[LedgerRow]]:
    """Return the usable feature files of one patient by name, and a ledger row for every slide.

    Without ``bags`` the patient is not used anyway, and no file is opened.
    """
    rows = []
    used: dict[str, Path] = {}
    for key in keys:
        candidates = found[key]
        reason = ""
        if bags is None:
            reason = "its patient has no label"
        elif not candidates:
            reason = "no feature file"
        elif len(candidates) > 1:
            reason = f"ambiguous: {listing(name + '.h5' for name in candidates)}"
        elif candidates[0] in used:
            reason = f"listed more than once ({candidates[0]}.h5)"
        else:
            reason = bags.problem(files[candidates[0]])
        if not reason:
            used[candidates[0]] = files[candidates[0]]
        rows.append(LedgerRow("slide", key, patient, "excluded" if reason else "used", reason))
    return tuple(used[name] for name in sorted(used)), rows


def log_cohort(cohort: Cohort) -> None:
    """Log the funnel, the reasons for exclusion and what the targets look like."""
    stages = [f"{count} {stage}" for stage, count in cohort.funnel]
    logger.info("Patients: %s", " -> ".join(stages))
    for reason, count in Counter(_reasons(cohort.ledger)).most_common():
        logger.warning("Left out: %d x %s", count, reason)
    for target in cohort.targets:
        known = [p for p in cohort.patients if target is cohort.target or target.name in p.known]
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
                len(cohort.patients),
            )
        else:
            logger.info(
                "%s: regression; known for %d of %d patients, absent for the others",
                target.name,
                len(known),
                len(cohort.patients),
            )
    logger.info(
        "Features: %s%s", cohort.extractor, " (RANDOM WEIGHTS)" if cohort.random_weights else ""
    )


@dataclass
class BagStore:
    """Reads the tiles of a patient, and keeps what fits in memory.

    Args:
        cache_bytes: Memory to spend; what does not fit is read again each time.
    """

    cache_bytes: int = DEFAULT_CACHE_BYTES
    _cache: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    _used: int = 0

    def load(self, patient: Patient) -> NDArray[np.float32]:
        """Return the features ``(n, f)`` of all slides of a patient, in the order of its files."""
        if patient.name in self._cache:
            return self._cache[patient.name]
        bag = np.concatenate([_read(path).feats for path in patient.files])
        if self._used + bag.nbytes <= self.cache_bytes:
            self._cache[patient.name] = bag
            self._used += bag.nbytes
        return bag


class _Bags:
    """Looks at every feature file once: is it usable, and does it fit the others?"""

    def __init__(self) -> None:
        self.tiles: dict[Path, int] = {}
        self.crc: dict[Path, int] = {}
        self._makers: dict[tuple[str, str | None, bool, int], Path] = {}

    def problem(self, path: Path) -> str:
        """Return why a file cannot be used, or an empty string."""
        try:
            bag = _read(path)
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # h5py's words for a broken or foreign file
            return f"unreadable: {one_line(error)}"
        if len(bag.feats) == 0:
            return "no tiles"
        if not np.isfinite(bag.feats).all():
            return "unreadable: features that are not finite"
        self.tiles[path] = len(bag.feats)
        self.crc[path] = zlib.crc32(bag.feats.tobytes())
        maker = (bag.extractor, bag.weights_sha256, bag.random_weights, bag.feats.shape[1])
        self._makers.setdefault(maker, path)
        return ""

    def refuse_mixture(self) -> None:
        """Raise if the usable files do not come from one extractor with one set of weights."""
        # A file of another tool may not know the hash of its weights: that alone is no difference.
        unknown = {maker for maker in self._makers if maker[1] is None}
        known = {maker for maker in self._makers if maker[1] is not None}
        distinct = known | {
            m for m in unknown if not any((m[0], *m[2:]) == (k[0], *k[2:]) for k in known)
        }
        if len(distinct) > 1:
            first, second = sorted(distinct, key=lambda maker: str(self._makers[maker]))[:2]
            raise UserError(
                "All feature files must come from one extractor with the same weights, but "
                f"{self._makers[first].name} is of {_describe(first)} and "
                f"{self._makers[second].name} of {_describe(second)}."
            )

    @property
    def extractor(self) -> str:
        return next(iter(self._makers))[0]

    @property
    def random_weights(self) -> bool:
        return any(maker[2] for maker in self._makers)

    @property
    def in_features(self) -> int:
        return next(iter(self._makers))[3]


def _read(path: Path) -> Bag:
    from examples.pathology.features import read_features

    return read_features(path)


def _describe(maker: tuple[str, str | None, bool, int]) -> str:
    extractor, sha256, random, width = maker
    weights = "random weights" if random else "weights"
    return f"{extractor} ({width}-d, {weights} {sha256[:8] if sha256 else 'not named'})"


def _prefixes(stem: str) -> list[str]:
    """Return the parts of a stem before each of its dots, longest first."""
    return [stem[:i] for i in range(len(stem) - 1, 0, -1) if stem[i] == "."]


def _refuse_unnamed(table: pd.DataFrame, path: Path, column: str) -> None:
    rows = [str(row + 2) for row in np.flatnonzero(table[column] == "")]
    if rows:
        raise UserError(
            f"{path}: `{column}` must be filled in, but is empty in row {listing(rows)}."
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


def _reasons(ledger: Iterable[LedgerRow]) -> list[str]:
    return [f"{row.item}: {row.reason}" for row in ledger if row.status != "used"]


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
