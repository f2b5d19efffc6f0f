"""Every method of a benchmark against the baseline and against naive, on the same patients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.pathology.common.errors import UserError
from examples.pathology.results import resampling
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.study.criteria import CRITERIA, Criterion, Tested, tested
from examples.pathology.study.folder import Panel, Study
from examples.pathology.study.tables import NAIVE

LEVEL = 0.05
REFERENCES = (BASELINE, NAIVE)


@dataclass(frozen=True)
class Difference:
    """A method minus a reference, by one criterion.

    Args:
        reference: The method it is compared with.
        auxiliary: The auxiliary target of both (the baseline's is that of its panel).
        difference: Mean over folds; NaN if no fold has both figures.
        low: Lower end of its 95 % interval, which ends at `high`.
        p: Two-sided.
        corrected: p corrected for all comparisons by this criterion with this reference.
        family: How many these are.
        folds: How many folds have both figures.
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

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.corrected < LEVEL


def all_differences(study: Study) -> list[Difference]:
    """Compare every method with the baseline and with naive, panel by panel.

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
                method: [tested(result, run.summary.targets[0]) for result in run.results]
                for method, run in panel.first(cohort).items()
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
    panels: Mapping[str, Mapping[str, Sequence[Tested]]],
    seed: int,
) -> list[Difference]:
    """Compare all methods of all panels with one reference, and correct for their number."""
    left_out = REFERENCES[: REFERENCES.index(reference) + 1]  # naive is compared with the baseline
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
    runs = list(panel.runs.values())
    for run in runs[1:]:
        if run.summary.splits_sha256 != runs[0].summary.splits_sha256:
            raise UserError(
                f"Methods must be compared on equal splits, but {run.folder} has others than "
                f"{runs[0].folder}. Delete one of them and run `benchmark` again."
            )


def _measure(
    what: Difference, ours: Sequence[Tested], theirs: Sequence[Tested], seed: int
) -> Difference:
    pairs = []
    for a, b in zip(ours, theirs, strict=True):
        if not np.array_equal(a.patients, b.patients):
            raise UserError(
                f"Methods must be compared on the same patients, but {what.method} and "
                f"{what.reference} on {what.auxiliary} have others ({what.criterion.cohort}). Run "
                "`benchmark` again."
            )
        if (pair := what.criterion.compare(a, b)) is not None:
            pairs.append(pair)
    if not pairs:
        return what
    low, high = resampling.interval([(pair.strata, pair.resampled) for pair in pairs], seed=seed)
    p = resampling.permutation_p([pair.exchange() for pair in pairs], seed=seed)
    mean = float(np.mean([pair.value for pair in pairs]))
    return replace(what, difference=mean, low=low, high=high, p=p, folds=len(pairs))
