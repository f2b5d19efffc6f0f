"""Every method of a benchmark against baseline, naive and, if it is there, fixed weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.pathology.common.errors import UserError
from examples.pathology.results import resampling
from examples.pathology.results.measuring import Measured
from examples.pathology.results.metrics import Score
from examples.pathology.results.repeats import estimate, repeated
from examples.pathology.results.runs import Run
from examples.pathology.settings.crossval import BASELINE, FIXED, NAIVE
from examples.pathology.study.criteria import CRITERIA, Criterion, Paired, Tested, tested
from examples.pathology.study.folder import Panel, Study

LEVEL = 0.05
REFERENCES = (BASELINE, NAIVE, FIXED)  # each is itself compared with those before it
Repeats = Mapping[int, Sequence[Tested]]
"""A method's figures in every fold, by seed."""


@dataclass(frozen=True)
class Difference:
    """A method minus a reference, by one criterion.

    Args:
        reference: The method it is compared with.
        auxiliary: The auxiliary target of both (the baseline's is that of its panel).
        difference: Mean over folds and seeds; NaN if no fold has both figures.
        low: Lower end of its 95 % interval, which ends at `high`.
        p: Two-sided.
        corrected: p corrected for all comparisons by this criterion with this reference.
        family: How many these are.
        folds: How many folds have both figures.
        seeds: How many seeds both have.
        sd: Over several of them, of the mean over folds.
        error: With several, the standard error.
        df: Of what seeds add to it.
    """

    criterion: Criterion
    reference: str
    auxiliary: str
    method: str
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    corrected: float = math.nan
    family: int = 0
    folds: int = 0
    seeds: int = 0
    sd: float = math.nan
    error: float = math.nan
    df: float = math.nan

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.corrected < LEVEL


def all_differences(study: Study) -> list[Difference]:
    """Compare every method with each reference that is among them, panel by panel.

    Returns:
        The differences, by criterion, then reference, panel and method.

    Raises:
        UserError: Two runs that are to be compared tested other patients.
    """
    for panel in study.panels:
        _refuse_other_splits(panel)
    folds = {
        cohort: {
            panel.auxiliary: {
                method: {seed: _tested(run) for seed, run in runs.items()}
                for method, runs in panel.of(cohort).items()
            }
            for panel in study.panels
        }
        for cohort in ("internal", "external")
    }
    seed = int(study.settings["seed"])
    return [
        difference
        for criterion in CRITERIA[study.kind]
        for reference in REFERENCES
        for difference in _family(criterion, reference, folds[criterion.cohort], seed)
    ]


def _family(
    criterion: Criterion,
    reference: str,
    panels: Mapping[str, Mapping[str, Repeats]],
    seed: int,
) -> list[Difference]:
    """Compare all methods of all panels with one reference, and correct for their number."""
    left_out = REFERENCES[: REFERENCES.index(reference) + 1]
    family = []
    for auxiliary, methods in panels.items():
        for method in methods:
            if reference in methods and method not in left_out:
                difference = Difference(criterion, reference, auxiliary, method)
                family.append(_measure(difference, methods[method], methods[reference], seed))
    size = sum(not math.isnan(each.p) for each in family)
    corrected = resampling.holm([each.p for each in family])
    return [
        replace(each, corrected=p, family=size) for each, p in zip(family, corrected, strict=True)
    ]


def _refuse_other_splits(panel: Panel) -> None:
    """Raise if methods of a panel were not tested on the same folds."""
    runs = [run for repeat in panel.repeats for run in repeat.runs.values()]
    for run in runs[1:]:
        if run.summary.splits_sha256 != runs[0].summary.splits_sha256:
            raise UserError(
                f"Methods must be compared on equal splits, but {run.folder} has others than "
                f"{runs[0].folder}. Delete one of them and run `benchmark` again."
            )


def _tested(run: Run) -> list[Tested]:
    return [tested(result, run.summary.targets[0]) for result in run.results]


def _measure(what: Difference, ours: Repeats, theirs: Repeats, seed: int) -> Difference:
    """Compare two methods by the seeds that both have."""
    seeds = [each for each in ours if each in theirs]
    folds = [_pair(what, [*zip(ours[s], theirs[s], strict=True)]) for s in seeds]
    if len(seeds) > 1:
        return _over_seeds(what, folds)
    pairs = [pair for fold in folds for pair in fold if pair is not None]
    if not pairs:
        return what
    low, high = resampling.interval([(pair.strata, pair.resampled) for pair in pairs], seed=seed)
    p = resampling.permutation_p([pair.exchange() for pair in pairs], seed=seed)
    mean = float(np.mean([pair.value for pair in pairs]))
    return replace(what, difference=mean, low=low, high=high, p=p, folds=len(pairs), seeds=1)


def _over_seeds(what: Difference, seeds: Sequence[Sequence[Paired | None]]) -> Difference:
    """Compare two methods by the folds in which both have the figure from every seed."""
    folds = []
    for pairs in zip(*seeds, strict=True):
        known = [Measured(Score(p.value), p.strata, p.resampled) for p in pairs if p is not None]
        folds.append(repeated(known) if len(known) == len(pairs) else None)
    found = estimate(folds)
    of_both = {"seeds": len(seeds), "difference": found.value, **found._asdict()}
    return replace(what, **{name: of_both[name] for name in vars(what) if name in of_both})


def _pair(what: Difference, folds: Sequence[tuple[Tested, Tested]]) -> list[Paired | None]:
    """Compare two methods in every fold, on the same patients."""
    for a, b in folds:
        if not np.array_equal(a.patients, b.patients):
            raise UserError(
                f"Methods must be compared on the same patients, but {what.method} and "
                f"{what.reference} on {what.auxiliary} have others ({what.criterion.cohort}). Run "
                "`benchmark` again."
            )
    return [what.criterion.compare(a, b) for a, b in folds]
