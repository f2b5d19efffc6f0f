"""What a cross-validation would get: what fits together, what does not, and what is known.

Nothing is written and nothing trained. Everything that would leave a patient out is listed, with
the nearest name on the other side where one may have been meant.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from examples.pathology.cohort.cohort import Cohort, load_cohort
from examples.pathology.cohort.joining import Joined, join
from examples.pathology.cohort.patients import Patient, values_of
from examples.pathology.cohort.splits import Fold, check_sizes, make_splits
from examples.pathology.cohort.targets import Target, describe, prediction_columns
from examples.pathology.common.errors import listing
from examples.pathology.settings.cohort import CheckConfig
from examples.pathology.tables.matching import near_matches

COUNTED = "patients, and of each target the positive / the known ones"


def run_check(config: CheckConfig, say: Callable[[str], None]) -> int:
    """Say what fits together and what does not, line by line.

    Returns:
        0 if everything fits, 1 if something is listed as left out.

    Raises:
        UserError: A table cannot be read or contradicts itself, a file name leads out of the
            folder, or a cross-validation would refuse what is there.
    """
    names = [config.target, *config.auxiliary]
    joined = join(config.sources, names)
    problems = _say_joining(joined, config, say)
    _say_labels(joined, names, say)
    cohort = load_cohort(config)
    problems += _say_files(cohort, config.limit, say)
    _say_cohort(cohort, say)
    if cohort.by_site:
        _say_sites(cohort, config, say)
    prediction_columns(cohort.targets)
    check_sizes(cohort, config.folds)
    _say_folds(cohort, make_splits(cohort, config.folds, config.seed), say)
    listed = f"{problems} names do not fit together; see the lists above."
    say("")
    say(listed if problems else "Everything fits together.")
    return int(problems > 0)


def _say_joining(joined: Joined, config: CheckConfig, say: Callable[[str], None]) -> int:
    """List names without a partner in both directions; return how many there are."""
    clinical = [str(name) for name in joined.clinical.index]
    slides_of = joined.slides_of
    say(f"{len(clinical)} patients in {config.clini}")
    say(f"{len(joined.slides)} slides of {len(slides_of)} patients in {config.slide_table}")
    say(f"{len(joined.files)} feature files in {config.features}")
    no_slide = [name for name in clinical if name not in slides_of]
    no_row = [name for name in slides_of if name not in set(clinical)]
    no_file = sorted(key for key, found in joined.found.items() if not found)
    ambiguous = {key: found for key, found in joined.found.items() if len(found) > 1}
    open_ends = [
        ("Patients of the clinical table without a slide", no_slide, no_row),
        ("Patients of the slide table without a clinical row", no_row, no_slide),
        ("Slides of the slide table without a feature file", no_file, joined.unclaimed),
        ("Feature files without a row in the slide table", joined.unclaimed, no_file),
    ]
    for title, names, others in open_ends:
        near = near_matches(names, others)
        notes = {name: f" (near: {other})" for name, other in near.items()}
        _say_list(f"{title}: {len(names)}", names, notes, config.limit, say)
    notes = {key: ": " + ", ".join(found) for key, found in ambiguous.items()}
    heading = f"Slides that may mean several feature files: {len(notes)}"
    _say_list(heading, list(notes), notes, config.limit, say)
    several = {name: len(keys) for name, keys in slides_of.items() if len(keys) > 1}
    counts = sorted(Counter(several.values()).items())
    parts = ", ".join(f"{patients} with {slides}" for slides, patients in counts)
    notes = {name: f": {slides} slides" for name, slides in several.items()}
    heading = f"Patients with several slides, which are joined: {parts}"
    _say_list(heading, sorted(several), notes, config.limit, say)
    return sum(len(names) for _, names, _ in open_ends) + len(ambiguous)


def _say_list(
    heading: str,
    names: Sequence[str],
    notes: Mapping[str, str],
    limit: int,
    say: Callable[[str], None],
) -> None:
    """Show names, those with a note first: they are the ones that can be mended."""
    if not names:
        return
    say("")
    say(heading)
    for name in sorted(names, key=lambda name: name not in notes)[:limit]:
        say(f"  {name}{notes.get(name, '')}")
    if len(names) > limit:
        say(f"  ... and {len(names) - limit} more (--limit shows more)")


def _say_labels(joined: Joined, wanted: Sequence[str], say: Callable[[str], None]) -> None:
    """Say which values each column has, before anybody is left out."""
    say("")
    say("Values in the clinical table")
    for name in wanted:
        column = joined.clinical[name]
        known = [value for value in column if value]
        counts = Counter(known)
        shown = (
            ", ".join(f"{value} ({count})" for value, count in counts.most_common(8))
            if len(counts) <= 8
            else f"{len(counts)} different values, such as {', '.join(list(counts)[:3])}"
        )
        say(f"  {name}: {shown or 'none'}; missing for {len(column) - len(known)}")
        if words := joined.unknown_of(name):
            say(f"    taken for missing: {words}; rename what is a class")


def _say_files(cohort: Cohort, limit: int, say: Callable[[str], None]) -> int:
    """List slides whose feature file is there but cannot be used; return how many."""
    bad = {
        row.name: f": {row.reason}"
        for row in cohort.ledger
        if row.item == "slide"
        and row.status == "excluded"
        and row.reason.startswith(("unreadable", "no tiles", "listed more"))
    }
    _say_list(f"Feature files that cannot be used: {len(bad)}", list(bad), bad, limit, say)
    return len(bad)


def _say_cohort(cohort: Cohort, say: Callable[[str], None]) -> None:
    say("")
    say("Patients: " + " -> ".join(f"{count} {stage}" for stage, count in cohort.funnel))
    everybody = [*cohort.patients, *cohort.training_only]
    tiles = sorted(patient.tiles for patient in everybody)
    say(f"Tiles per patient: {tiles[0]} to {tiles[-1]}, median {median(tiles):g}")
    kind = cohort.kind
    how = " with RANDOM WEIGHTS" if kind.random_weights else ""
    sha = f", weights {kind.weights_sha256[:12]}" if kind.weights_sha256 else ""
    say(f"Features: {kind.in_features} numbers per tile by {kind.extractor}{how}{sha}{kind.tiles}")
    if kind.simulated:
        say(kind.simulated)
    known = values_of(everybody, cohort.targets)
    for target in cohort.targets:
        what, absent = (
            describe(target, known[target.name]),
            len(everybody) - len(known[target.name]),
        )
        say(f"  {target.name}: {what}; missing for {absent} of {len(everybody)}")
    if alone := len(cohort.training_only):
        say(f"  {alone} without {cohort.target.name} are trained on for the others only")


def _say_sites(cohort: Cohort, config: CheckConfig, say: Callable[[str], None]) -> None:
    """Say of every site how many patients it has, and how many know each target."""
    members: dict[str, list[Patient]] = defaultdict(list)
    for patient in [*cohort.patients, *cohort.training_only]:
        members[patient.site].append(patient)
    notes = {
        site: f"  {len(patients):5d}   {_cells(patients, cohort.targets)}"
        for site, patients in sorted(members.items(), key=lambda item: -len(item[1]))
    }
    heading = f"Sites ({config.group_column}), {len(notes)}: {COUNTED}"
    _say_list(heading, list(notes), notes, config.limit, say)


def _say_folds(cohort: Cohort, folds: Sequence[Fold], say: Callable[[str], None]) -> None:
    """Say how many know each target in every part of every fold, and how many are positive."""
    by_name = {patient.name: patient for patient in cohort.patients}
    say("")
    say(f"Folds: {COUNTED}")
    for k, fold in enumerate(folds, start=1):
        for part in ("train", "validation", "test"):
            members = [by_name[name] for name in getattr(fold, part)]
            sites = Counter(patient.site for patient in members if patient.site).most_common()
            from_ = [f"{len(sites)} sites: " + listing(f"{site} ({n})" for site, n in sites)]
            cells = [_cells(members, cohort.targets), *from_ * bool(sites)]
            say(f"  fold {k} {part:<10} {len(members):5d}   " + "   ".join(cells))


def _cells(patients: Sequence[Patient], targets: Sequence[Target]) -> str:
    cells = []
    for target, values in zip(targets, values_of(patients, targets).values(), strict=True):
        positives = "" if target.kind == "regression" else f"{values.count(target.positive)} / "
        cells.append(f"{target.name}: {positives}{len(values)}")
    return "   ".join(cells)
