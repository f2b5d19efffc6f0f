"""What the comparisons of a benchmark say: in sentences, as marks in tables, and in full."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from examples.pathology.report import pages
from examples.pathology.settings.cohort import Kind
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.study.criteria import CRITERIA, Criterion, heading
from examples.pathology.study.differences import REFERENCES, Difference
from examples.pathology.study.folder import Study
from examples.pathology.study.tables import Marks, study_rows

RISE, FALL = "▲ ", "▼ "
MARKS = (
    "▲ and ▼: significantly better or worse than the baseline after correction. A figure without "
    "either is not known to differ from it, however good it is. Figures are {}; the ensemble is "
    "the mean of the models of all folds. {}"
)
CHANCE: Mapping[Kind, str] = {
    "classification": "The prevalence is the chance level of AUPRC; that of AUROC is 0.5.",
    "regression": "The chance level of Pearson's r and of Spearman's rho is 0. Of the mean "
    "absolute error, in the unit of the target, lower is better.",
}
PROBABILITIES = (
    "Of both, lower is better. Brier score: the mean squared distance between the probability of "
    "{} and what came true. Calibration in the large: the distance between the mean probability "
    "and the share of positive patients, which differs between resamples; always to say the "
    "prevalence reaches 0. Both are of the patients of each fold, and then means over folds. "
    "How far all probabilities of a model are off changes from one training to the next: what "
    "differs between trained models need not between methods. Where both distances are within the "
    "standard error of the share, other patients may turn them around, whatever the p-value. "
    "▲ and ▼ as in Table 1."
)
EXCHANGED: Mapping[Kind, str] = {
    "classification": "of ranks within the fold for AUROC and AUPRC, of squared errors for the "
    "Brier score; for calibration, and for the silhouette, in which patients depend on each other, "
    "of the jackknife's pseudo-values",
    "regression": "of predictions standardised within the fold for Pearson's r, of their ranks for "
    "Spearman's rho, and of absolute errors for the mean absolute error",
}

OVER_PATIENTS = "means over folds with a 95 % bootstrap interval over the patients tested"
OVER_SEEDS = "means over folds and seeds with a 95 % interval over patients and trained models"


def marks_in_words(study: Study) -> str:
    """Return what stands below tables: what their marks and figures mean."""
    over = OVER_SEEDS if study.seeds > 1 else OVER_PATIENTS
    return MARKS.format(over, CHANCE[study.kind])


def verdicts(study: Study, differences: Sequence[Difference]) -> list[str]:
    """Return what the comparisons say of each criterion and reference.

    Criteria by which nothing differs from a reference stand in one sentence.
    """
    sentences = []
    rows = study_rows(study)
    expected = len(rows) * study.seeds
    missing = expected - sum(len(row.repeats) for row in rows)
    if missing:
        sentences.append(
            f"{missing} of {expected} runs are missing and in no comparison; the "
            f"{'list of jobs says' if study.seeds > 1 else 'tables say'} why."
        )
    references = [name for name in REFERENCES if name in study.methods]
    if len(references) > 1 and len(references) == len(study.methods):
        references = references[:-1]  # nobody is left to compare with the last
    for reference in references:
        families = {
            criterion: [
                d for d in differences if (d.reference, d.criterion) == (reference, criterion)
            ]
            for criterion in CRITERIA[study.kind]
            if criterion.cohort == "internal" or study.deployed
        }
        alike = [criterion for criterion, family in families.items() if _all_alike(family)]
        for criterion, family in families.items():
            if criterion not in alike or len(alike) == 1:
                sentences.append(verdict(criterion, reference, family))
            elif criterion == alike[0]:
                sentences.append(_nothing({each: families[each] for each in alike}, reference))
    return sentences


def _all_alike(family: Sequence[Difference]) -> bool:
    known = [each for each in family if not math.isnan(each.corrected)]
    return bool(known) and not any(each.significant for each in known)


def _nothing(families: Mapping[Criterion, Sequence[Difference]], reference: str) -> str:
    """Return in one sentence by what no method differs from a reference."""
    least = [
        f"{criterion.title} {p_text(min(d.corrected for d in family if not math.isnan(d.p)))}"
        for criterion, family in families.items()
    ]
    sizes = sorted({each.family for family in families.values() for each in family})
    return (
        f"No method is significantly better or worse than {reference} in what follows, each after "
        f"correction for {' or '.join(map(str, sizes))} comparison{'s' * (sizes != [1])}; with the "
        f"smallest corrected p: {'; '.join(least)}."
    )


def verdict(criterion: Criterion, reference: str, family: Sequence[Difference]) -> str:
    """Return what all comparisons of one kind say; it names no winner."""
    known = [each for each in family if not math.isnan(each.corrected)]
    if not known:
        return f"Nothing could be compared with {reference} in {criterion.title}."
    sign = criterion.metric.sign
    better = [each for each in known if each.significant and each.difference * sign > 0]
    worse = [each for each in known if each.significant and each.difference * sign < 0]
    many, others = len(known), f"Significantly worse: {_named(worse)}."
    after = f"after correction for {many} comparison{'s' * (many > 1)}"
    aim, beyond = (", where lower is better,", "lower") if sign < 0 else ("", "higher")
    found = f"better than {reference} in {criterion.title}{aim} {after}"
    if better:
        others = others if worse else "None is significantly worse."
        return f"Significantly {found}: {_named(better)}. {others}"
    higher = [each.corrected for each in known if each.difference * sign > 0 or not worse]
    least = f"smallest corrected p = {p_text(min(higher))}" if higher else f"none is {beyond}"
    end = f". {others}" if worse else "; none is significantly worse."
    return f"No method is significantly {found} ({least}){end}"


def _named(differences: Sequence[Difference]) -> str:
    return ", ".join(
        f"{d.method} with {d.auxiliary} ({_interval(d)}, corrected p = {p_text(d.corrected)})"
        for d in differences
    )


def _interval(d: Difference) -> str:
    """Return a difference with its interval, and how far seeds are apart."""
    spread = f", sd {d.sd:.3f} over {d.seeds} seeds" if d.seeds > 1 else ""
    return f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{spread}"


def p_text(p: float) -> str:
    """Return a p-value with as many digits as it needs."""
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def marks(differences: Sequence[Difference]) -> Marks:
    """Return what to write before a figure that differs significantly from the baseline's."""
    return {
        (d.criterion.cohort, d.criterion.metric, d.auxiliary, d.method): (
            RISE if d.difference * d.criterion.metric.sign > 0 else FALL
        )
        for d in differences
        if d.reference == BASELINE and d.significant
    }


def differences_table(
    differences: Sequence[Difference], reference: str, cohort: str
) -> pd.DataFrame:
    """Return all comparisons with one reference: a row per method, a column per criterion."""
    place = reference, cohort
    chosen = [each for each in differences if (each.reference, each.criterion.cohort) == place]
    compared = list(dict.fromkeys(d.criterion for d in chosen if d.folds))
    by_place = {(d.auxiliary, d.method, d.criterion): d for d in chosen}
    rows = []
    for auxiliary, method in dict.fromkeys((d.auxiliary, d.method) for d in chosen):
        found = [by_place.get((auxiliary, method, criterion)) for criterion in compared]
        rows.append((auxiliary, method, *map(_difference_cell, found)))
    return pages.table(("Auxiliary target", "Method", *(heading(c.metric) for c in compared)), rows)


def _difference_cell(d: Difference | None) -> str:
    if d is None or not d.folds:
        return pages.DASH
    return f"{_interval(d)}; p = {p_text(d.p)}, corrected {p_text(d.corrected)}"


def differences_in_full(differences: Sequence[Difference]) -> pd.DataFrame:
    """Return every comparison, nothing rounded."""
    names = "cohort metric reference auxiliary method"
    numbers = "difference ci95_low ci95_high p p_holm comparisons folds seeds"
    of_seeds = "sd_over_seeds standard_error df"
    rows = [
        (
            *(d.criterion.cohort, d.criterion.metric, d.reference, d.auxiliary, d.method),
            *(d.difference, d.low, d.high, d.p, d.corrected, d.family, d.folds, d.seeds),
            *(None if math.isnan(number) else number for number in (d.sd, d.error, d.df)),
        )
        for d in differences
    ]
    return pages.table([*names.split(), *numbers.split(), *of_seeds.split()], rows)
