"""Who is trained, validated and tested on: drawn once by patient, saved, checked, reused.

Every method that is compared gets the same splits; a hash of patients, labels and sites tells when
they belong to another cohort. Where patients have sites, all of a site are in one part.
"""

import hashlib
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.cluster import contingency_matrix
from sklearn.model_selection import StratifiedKFold, train_test_split

from examples.pathology.cohort.cohort import Cohort
from examples.pathology.common.errors import UserError
from examples.pathology.common.files import DAMAGED, readable, write_json
from examples.pathology.settings.crossval import REFERENCE_SEED, CrossvalConfig

logger = logging.getLogger(__name__)

MIN_PER_CLASS = 5  # below, a class would be missing from a training, validation or test part
BINS = 5
VALIDATION_SHARE = 0.2  # of the training part: 64 / 16 / 20, as in the paper's code
LOOKAHEAD_SHARE = 0.1  # of what is left to train on
ORDERS = 300  # of sites that are tried for each part
PARTS = ("train", "validation", "test", "lookahead")
Strings = NDArray[np.str_]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Fold:
    """The patients of one fold, by name.

    Args:
        train: For gradient steps, and for scalers.
        validation: For early stopping.
        test: For the numbers, once.
        lookahead: The share of ``train`` that Auto-Lambda looks ahead on; empty where the sites of
            ``train`` leave none.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    lookahead: tuple[str, ...]


def make_splits(cohort: Cohort, folds: int, seed: int, *, reference: bool = False) -> list[Fold]:
    """Draw stratified folds of patients, each with a validation and a look-ahead share.

    What they are stratified by, see `strata_of`. Where patients have sites, whole sites are drawn.

    Args:
        cohort: Whose patients, in order of their names.
        folds: How many.
        seed: Of the draw.
        reference: Whether to draw as the paper's published code does, by scikit-learn alone and
            with its seed. A look-ahead share is not used there; one is drawn so that all splits
            look alike.
    """
    seed = REFERENCE_SEED if reference else seed
    names = np.array([p.name for p in cohort.patients])
    labels = strata_of(cohort, folds)
    sites = np.array([p.site for p in cohort.patients])

    def share_of(part: Indices, share: float, random: np.random.Generator) -> Indices:
        if cohort.by_site:
            return site_share(labels[part], sites[part], share, random)
        return stratified_share(labels[part], share, random)

    if cohort.by_site:
        tests = _test_sites(labels, sites, folds, np.random.default_rng(seed))
    else:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        tests = [test for _, test in splitter.split(names, labels)]
    drawn = []
    for k, test in enumerate(tests, start=1):
        rest = np.delete(np.arange(len(names)), test)
        random = np.random.default_rng(fold_seed(seed, k))
        if reference:
            train, held = train_test_split(
                rest, test_size=VALIDATION_SHARE, stratify=labels[rest], random_state=seed
            )
        else:
            share = share_of(rest, VALIDATION_SHARE, random)
            train, held = np.delete(rest, share), rest[share]
        ahead = share_of(train, LOOKAHEAD_SHARE, random)
        if set(labels[np.delete(train, ahead)]) != set(labels[train]):
            ahead = ahead[:0]  # its sites are all that a class has
        parts = (train, held, test, train[ahead])
        drawn.append(Fold(*(tuple(map(str, names[np.sort(part)])) for part in parts)))
    if cohort.by_site:
        _refuse_poor_parts(drawn, cohort)
    return drawn


def strata_of(cohort: Cohort, folds: int) -> Strings:
    """Return what to stratify patients by: the class, or of a regression the fifth of its values.

    The fifths are of equal size, by rank; equal values at a border fall by name. There are fewer
    and larger parts where a fifth could be missing from a test or validation part. They come in the
    order of ``cohort.patients``, ``(n,)``.
    """
    labels = np.array([p.label for p in cohort.patients])
    if cohort.target.kind == "classification":
        return labels
    ranks = np.argsort(np.argsort(labels.astype(float), kind="stable"))
    n = len(labels)
    validated = int(VALIDATION_SHARE * (n - math.ceil(n / folds)))
    bins = max(1, min(BINS, n // max(folds, MIN_PER_CLASS), validated))
    return np.asarray(ranks * bins // n).astype(np.str_)


def check_sizes(cohort: Cohort, folds: int) -> None:
    """Check that every class can be in every part of every fold, or that values are enough.

    Raises:
        UserError: A class is too small; a regression has too few patients.
    """
    needed = max(folds, MIN_PER_CLASS)
    least = max(2 * needed, 3 * folds)  # as for two classes; 3 patients at least have a correlation
    if cohort.target.kind == "regression" and len(cohort.patients) < least:
        raise UserError(
            f"`{cohort.target.name}` must be known for at least {least} patients for {folds} "
            f"folds, but is for {len(cohort.patients)}."
        )
    counts = Counter(patient.label for patient in cohort.patients)
    for label in cohort.target.classes:
        if counts[label] < needed:
            raise UserError(
                f"Every class of `{cohort.target.name}` must have at least {needed} patients for "
                f"{folds} folds, but {label} has {counts[label]}."
            )


def stratified_share(labels: Strings, share: float, random: np.random.Generator) -> Indices:
    """Draw about a share of every class, by largest remainders, at least one member in all.

    Args:
        labels: ``(n,)``, the class of each candidate.
        share: Between 0 and 1.
        random: Generator of the draw.

    Returns:
        Indices ``(round(share * n),)``, never the last member of a class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * share
    take = np.floor(exact).astype(int)
    missing = max(1, round(share * len(labels))) - take.sum()
    take[np.argsort(take - exact, kind="stable")[: max(0, missing)]] += 1
    take = np.minimum(take, counts - 1)
    drawn = [
        random.permutation(np.flatnonzero(labels == label))[:n]
        for label, n in zip(classes, take, strict=True)
    ]
    return np.concatenate(drawn)


def site_share(
    labels: Strings, sites: Strings, share: float, random: np.random.Generator, parts_left: int = 1
) -> Indices:
    """Draw whole sites that have about a share of every class.

    Of the beginnings of many random orders of the sites, the one is taken in which the class that
    is furthest from its share is nearest to it. scikit-learn's `StratifiedGroupKFold` places sites
    by their spread, whatever its seed: its parts were further from their shares.

    Args:
        labels: ``(n,)``, the class of each candidate.
        sites: ``(n,)``, the site of each candidate.
        share: Between 0 and 1.
        random: Generator of the draw.
        parts_left: How many parts the others are for: as many sites of a class stay, if possible.

    Returns:
        Indices, in order; none where there are no more sites than parts left.
    """
    if len(names := np.unique(sites)) <= parts_left:
        return np.empty(0, dtype=np.intp)
    counts = contingency_matrix(sites, labels)  # (sites, classes)
    orders = random.permuted(np.tile(np.arange(len(counts)), (ORDERS, 1)), axis=1)
    taken = counts[orders].cumsum(axis=1)  # (orders, sites, classes)
    without = (counts > 0).sum(axis=0) - (counts[orders] > 0).cumsum(axis=1)
    cost = np.abs(taken / counts.sum(axis=0) - share).max(axis=2)
    cost += (taken == 0).sum(axis=2) + len(counts) * (without < parts_left).sum(axis=2)
    cost[:, -parts_left:] = math.inf
    order, last = np.unravel_index(cost.argmin(), cost.shape)
    return np.flatnonzero(np.isin(sites, names[orders[order, : last + 1]]))


def _test_sites(
    labels: Strings, sites: Strings, folds: int, random: np.random.Generator
) -> list[Indices]:
    """Divide patients into test parts of whole sites, one part after the other."""
    left, parts = np.arange(len(sites)), []
    for others in range(folds - 1, 0, -1):
        share = site_share(labels[left], sites[left], 1 / (others + 1), random, others)
        parts.append(left[share])
        left = np.delete(left, share)
    return [*parts, left]


def _refuse_poor_parts(folds: Sequence[Fold], cohort: Cohort) -> None:
    """Raise if a class is missing from a part of a fold, or a regression has too few values."""
    for label in cohort.target.classes or ("",):  # of a regression: of all values
        members = {p.name: p.site for p in cohort.patients if label in ("", p.label)}
        for part, (k, fold) in itertools.product(PARTS[:3], enumerate(folds, start=1)):
            if len(members.keys() & set(getattr(fold, part))) < (1 if label else 3):
                raise UserError(
                    f"Every part of every fold must have patients{f' of {label}' if label else ''} "
                    f"from sites of its own, but too few are left for the {part} part of fold {k}: "
                    f"they are of {len(set(members.values()))} sites. Use another --folds, or a "
                    "--group-column of more sites."
                )


def check_splits(folds: Sequence[Fold], cohort: Cohort) -> None:
    """Check that no patient or site is in two parts of a fold, and nobody is tested twice.

    Raises:
        UserError: The splits do not fit the cohort, or leak.
    """
    everyone = {patient.name for patient in cohort.patients}
    tested = Counter(name for fold in folds for name in fold.test)
    if set(tested) != everyone or max(tested.values()) > 1:
        raise UserError(
            "Every patient must be in the test part of exactly one fold, but some are not."
        )
    for k, fold in enumerate(folds, start=1):
        parts = [*fold.train, *fold.validation, *fold.test]
        if len(parts) != len(set(parts)) or set(parts) != everyone:
            raise UserError(f"Every patient must be in one part of fold {k}, but some are not.")
        missing = not fold.lookahead and not cohort.by_site
        if not set(fold.lookahead) < set(fold.train) or missing:
            raise UserError(f"The look-ahead share of fold {k} must be part of its training part.")
        where = {name: part for part in PARTS for name in getattr(fold, part)}
        part_of: dict[str, str] = {}
        for patient in cohort.patients if cohort.by_site else ():
            here = where[patient.name]
            if (other := part_of.setdefault(patient.site, here)) != here:
                raise UserError(
                    f"A site must be in one part of fold {k}, but {patient.site} is in {other} and "
                    f"{here}. Leave out --splits, and folds by site are drawn."
                )


def load_or_make_splits(config: CrossvalConfig, cohort: Cohort) -> list[Fold]:
    """Return the splits of the run folder, of ``config.splits``, or new ones, and save them.

    Raises:
        UserError: Stored splits belong to other patients or labels, or to another number of folds.
    """
    own = config.out / "splits.json"
    sources = [
        path for path in (config.splits, own) if path is not None and (path.exists() or path != own)
    ]
    stored = [_read_splits(path, cohort, config.folds) for path in sources]
    if len(stored) == 2 and stored[0] != stored[1]:
        raise UserError(f"{own} must hold the splits of {config.splits}, but holds others.")
    if stored:
        folds = stored[0]
        logger.debug("Splits taken from %s", sources[0])
    else:
        folds = make_splits(cohort, config.folds, config.seed, reference=config.reference_protocol)
    check_splits(folds, cohort)
    if not own.exists():
        value = {
            "format": 1,
            "target": cohort.target.name,
            "cohort_sha256": cohort.labels_sha256(),
            **({"groups": {p.name: p.site for p in cohort.patients}} if cohort.by_site else {}),
            "folds": [{part: list(getattr(f, part)) for part in PARTS} for f in folds],
        }
        write_json(own, value)
    return folds


def _read_splits(path: Path, cohort: Cohort, folds: int) -> list[Fold]:
    with readable(path):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            parts = [[tuple(map(str, fold[part])) for part in PARTS] for fold in value["folds"]]
            digest, groups = value["cohort_sha256"], dict(value.get("groups", {}))
        except DAMAGED as error:
            message = f"{path} must hold splits of ours, but does not ({error!r})."
            raise UserError(message) from error
    read = [Fold(*each) for each in parts]
    # With the sites of the file: `check_splits` compares its folds with those of the tables.
    patients = [replace(p, site=groups.get(p.name, "")) for p in cohort.patients]
    expected = replace(cohort, patients=tuple(patients)).labels_sha256()
    if digest != expected:
        raise UserError(
            f"{path} must be of the same patients and labels, but its hash is {str(digest)[:12]} "
            f"and that of these tables {expected[:12]}. Use another --out, or the "
            "tables it was made for."
        )
    if len(read) != folds:
        raise UserError(
            f"{path} must have {folds} folds, but has {len(read)}. Use --folds {len(read)}."
        )
    return read


def fold_seed(seed: int, fold: int) -> int:
    """Return the seed of one fold, which depends on nothing that happened in another."""
    return int(np.random.SeedSequence([seed, fold]).generate_state(1)[0])


def splits_sha256(folds: Sequence[Fold]) -> str:
    """Return a hash by which runs tell whether they were made on the same folds."""
    parts = repr([(fold.train, fold.validation, fold.test) for fold in folds])
    return hashlib.sha256(parts.encode()).hexdigest()
