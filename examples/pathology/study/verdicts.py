"""What the comparisons of a benchmark say: in sentences, as marks in tables, and in full."""

from __future__ import annotations

import math
from collections.abc import Sequence

from examples.pathology.common.files import json_or_none, table_csv
from examples.pathology.report import pages
from examples.pathology.results.resampling import PERMUTATIONS
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.study.differences import METRICS, REFERENCES, Difference, Metric
from examples.pathology.study.folder import Study
from examples.pathology.study.tables import Mark, Table, study_rows

RISE, FALL = "▲ ", "▼ "
MARKS = (
    "▲ and ▼: significantly higher or lower than the baseline after correction. A figure without "
    "either is not known to differ from it, however high it is. Figures are means over folds with "
    "a 95 % bootstrap interval over the patients tested; the ensemble is the mean of the models of "
    "all folds. The prevalence is the chance level of AUPRC; that of AUROC is 0.5."
)
METHOD = (
    "A difference is a method's figure minus that of the reference on the same patients, its mean "
    "over folds, with a 95 % bootstrap interval over the patients tested. p is two-sided: the "
    "share of random exchanges of the two methods' results, patient by patient within each fold, "
    f"that give a difference at least as large ({PERMUTATIONS} exchanges; of ranks within the fold "
    "for AUROC and AUPRC; for the silhouette, in which patients depend on each other, of the "
    "jackknife's pseudo-values). It is corrected by Holm's method for all comparisons of one "
    "metric with one reference in this benchmark; where it and the interval disagree, it decides."
)
GIVEN = (
    "All of this takes the trained models as they are: one seed and one set of splits. How far a "
    "figure moves when the same method is trained again, with another seed or on other patients, "
    "is not part of it, nor that the models of all folds share training patients. A significant "
    "difference is therefore one between these trained models and not yet one between methods; no "
    "significant difference does not show that methods are equally good."
)


def verdicts(study: Study, differences: Sequence[Difference]) -> list[str]:
    """Return what the comparisons say, in a sentence or two for each metric and reference."""
    sentences = []
    missing = sum(row.run is None for row in study_rows(study))
    if missing:
        sentences.append(
            f"{missing} of {len(study_rows(study))} runs are missing and in no comparison; the "
            "tables say why."
        )
    for reference in (name for name in REFERENCES if name in study.methods):
        for metric in METRICS:
            family = [d for d in differences if (d.reference, d.metric) == (reference, metric)]
            if metric.cohort == "internal" or study.deployed:
                sentences.append(verdict(metric, reference, family))
    return sentences


def verdict(metric: Metric, reference: str, family: Sequence[Difference]) -> str:
    """Return what the comparisons of one metric with one reference say; it names no winner.

    Args:
        metric: The metric.
        reference: The reference.
        family: All comparisons of them.
    """
    known = [each for each in family if not math.isnan(each.corrected)]
    if not known:
        return f"Nothing could be compared with {reference} in {metric.title}."
    better = [each for each in known if each.significant and each.difference > 0]
    worse = [each for each in known if each.significant and each.difference < 0]
    many = len(known)
    after = f"after correction for {many} comparison{'s' * (many > 1)}"
    found = f"{reference} in {metric.title} {after}"
    if better:
        others = (
            f" Significantly worse: {_named(worse)}." if worse else " None is significantly worse."
        )
        return f"Significantly better than {found}: {_named(better)}.{others}"
    if worse:
        higher = [each.corrected for each in known if each.difference > 0]
        least = f"smallest corrected p = {p_text(min(higher))}" if higher else "none is higher"
        return (
            f"No method is significantly better than {found} ({least}). Significantly worse: "
            f"{_named(worse)}."
        )
    smallest = p_text(min(each.corrected for each in known))
    return (
        f"No method is significantly better than {found} (smallest corrected p = {smallest}); none "
        "is significantly worse."
    )


def _named(differences: Sequence[Difference]) -> str:
    return ", ".join(
        f"{d.method} with {d.auxiliary} ({d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}], "
        f"corrected p = {p_text(d.corrected)})"
        for d in differences
    )


def p_text(p: float) -> str:
    """Return a p-value with as many digits as it needs."""
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def marks(differences: Sequence[Difference]) -> Mark:
    """Return what to write before a figure: whether it differs significantly from the baseline."""
    signs = {
        (d.metric.cohort, d.metric.key, d.auxiliary, d.method): RISE if d.difference > 0 else FALL
        for d in differences
        if d.reference == BASELINE and d.significant
    }
    return lambda row, cohort, key: signs.get((cohort, key, row.panel.auxiliary, row.method), "")


def differences_table(differences: Sequence[Difference], reference: str) -> Table:
    """Return all comparisons with one reference: a row per method, a column per metric."""
    chosen = [each for each in differences if each.reference == reference]
    compared = [m for m in METRICS if any(d.metric == m and d.folds for d in chosen)]
    by_place = {(d.auxiliary, d.method, d.metric): d for d in chosen}
    rows = []
    for auxiliary, method in dict.fromkeys((d.auxiliary, d.method) for d in chosen):
        found = [by_place.get((auxiliary, method, metric)) for metric in compared]
        rows.append((auxiliary, method, *map(_difference_cell, found)))
    headings = ("Auxiliary target", "Method", *(_capital(metric.title) for metric in compared))
    return Table(headings, tuple(rows))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _difference_cell(d: Difference | None) -> str:
    if d is None or not d.folds:
        return pages.MISSING
    interval = f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return f"{interval}; p = {p_text(d.p)}, corrected {p_text(d.corrected)}"


def differences_csv(differences: Sequence[Difference]) -> str:
    """Return every comparison, nothing rounded."""
    headings = (
        "cohort",
        "metric",
        "reference",
        "auxiliary",
        "method",
        "difference",
        "ci95_low",
        "ci95_high",
        "p",
        "p_holm",
        "comparisons",
        "folds",
    )
    return table_csv(
        headings,
        [
            (
                d.metric.cohort,
                d.metric.key,
                d.reference,
                d.auxiliary,
                d.method,
                *map(json_or_none, (d.difference, d.low, d.high, d.p, d.corrected)),
                d.family,
                d.folds,
            )
            for d in differences
        ],
    )
