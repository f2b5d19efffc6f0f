"""What the comparisons of a benchmark say: in sentences, as marks in tables, and in full."""

import math
from collections.abc import Sequence

import pandas as pd

from examples.pathology.report import pages
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.study.criteria import CRITERIA, Criterion
from examples.pathology.study.differences import REFERENCES, Difference
from examples.pathology.study.folder import Study
from examples.pathology.study.tables import Marks, study_rows

RISE, FALL = "▲ ", "▼ "
MARKS = (
    "▲ and ▼: significantly higher or lower than the baseline after correction. A figure without "
    "either is not known to differ from it, however high it is. Figures are means over folds with "
    "a 95 % bootstrap interval over the patients tested; the ensemble is the mean of the models of "
    "all folds. The prevalence is the chance level of AUPRC; that of AUROC is 0.5."
)


def verdicts(study: Study, differences: Sequence[Difference]) -> list[str]:
    """Return what the comparisons say, in a sentence or two for each criterion and reference."""
    sentences = []
    missing = sum(row.run is None for row in study_rows(study))
    if missing:
        sentences.append(
            f"{missing} of {len(study_rows(study))} runs are missing and in no comparison; the "
            "tables say why."
        )
    references = [name for name in REFERENCES if name in study.methods]
    if set(study.methods) == set(REFERENCES):
        references = references[:1]  # nobody is left to compare with the other
    for reference in references:
        for criterion in CRITERIA[study.kind]:
            family = [
                d for d in differences if (d.reference, d.criterion) == (reference, criterion)
            ]
            if criterion.cohort == "internal" or study.deployed:
                sentences.append(verdict(criterion, reference, family))
    return sentences


def verdict(criterion: Criterion, reference: str, family: Sequence[Difference]) -> str:
    """Return what all comparisons of one kind say; it names no winner."""
    known = [each for each in family if not math.isnan(each.corrected)]
    if not known:
        return f"Nothing could be compared with {reference} in {criterion.title}."
    better = [each for each in known if each.significant and each.difference > 0]
    worse = [each for each in known if each.significant and each.difference < 0]
    many, others = len(known), f"Significantly worse: {_named(worse)}."
    after = f"after correction for {many} comparison{'s' * (many > 1)}"
    found = f"better than {reference} in {criterion.title} {after}"
    if better:
        others = others if worse else "None is significantly worse."
        return f"Significantly {found}: {_named(better)}. {others}"
    higher = [each.corrected for each in known if each.difference > 0 or not worse]
    least = f"smallest corrected p = {p_text(min(higher))}" if higher else "none is higher"
    end = f". {others}" if worse else "; none is significantly worse."
    return f"No method is significantly {found} ({least}){end}"


def _named(differences: Sequence[Difference]) -> str:
    return ", ".join(
        f"{d.method} with {d.auxiliary} ({d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}], "
        f"corrected p = {p_text(d.corrected)})"
        for d in differences
    )


def p_text(p: float) -> str:
    """Return a p-value with as many digits as it needs."""
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def marks(differences: Sequence[Difference]) -> Marks:
    """Return what to write before a figure that differs significantly from the baseline's."""
    return {
        (d.criterion.cohort, d.criterion.metric, d.auxiliary, d.method): (
            RISE if d.difference > 0 else FALL
        )
        for d in differences
        if d.reference == BASELINE and d.significant
    }


def differences_table(differences: Sequence[Difference], reference: str) -> pd.DataFrame:
    """Return all comparisons with one reference: a row per method, a column per criterion."""
    chosen = [each for each in differences if each.reference == reference]
    compared = list(dict.fromkeys(d.criterion for d in chosen if d.folds))
    by_place = {(d.auxiliary, d.method, d.criterion): d for d in chosen}
    rows = []
    for auxiliary, method in dict.fromkeys((d.auxiliary, d.method) for d in chosen):
        found = [by_place.get((auxiliary, method, criterion)) for criterion in compared]
        rows.append((auxiliary, method, *map(_difference_cell, found)))
    titles = (criterion.title for criterion in compared)
    headings = ("Auxiliary target", "Method", *(title[:1].upper() + title[1:] for title in titles))
    return pages.table(headings, rows)


def _difference_cell(d: Difference | None) -> str:
    if d is None or not d.folds:
        return pages.DASH
    interval = f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return f"{interval}; p = {p_text(d.p)}, corrected {p_text(d.corrected)}"


def differences_in_full(differences: Sequence[Difference]) -> pd.DataFrame:
    """Return every comparison, nothing rounded."""
    names = "cohort metric reference auxiliary method"
    numbers = "difference ci95_low ci95_high p p_holm comparisons folds"
    rows = [
        (
            *(d.criterion.cohort, d.criterion.metric, d.reference, d.auxiliary, d.method),
            *(d.difference, d.low, d.high, d.p, d.corrected, d.family, d.folds),
        )
        for d in differences
    ]
    return pages.table([*names.split(), *numbers.split()], rows)
