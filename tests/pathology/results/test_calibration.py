"""Null studies, a few of them: `tests.pathology.null_calibration` has many."""

from dataclasses import replace

import pytest
from scipy import stats

from tests.pathology.null_calibration import DESIGNS, FIGURES, false_findings, null_study

AUROC, BRIER = FIGURES[0], FIGURES[2]
VARYING, LITTLE, OUTSIDE, UNSEEN = DESIGNS[1], DESIGNS[2], DESIGNS[5], DESIGNS[6]
STUDIES = 100


def of_five_percent(count, side):
    """Return how likely a count so far to one side is if 5 % are false."""
    return stats.binomtest(count, STUDIES, 0.05, alternative=side).pvalue


@pytest.mark.parametrize("design", [VARYING, LITTLE, OUTSIDE], ids=lambda design: design.title)
def test_several_seeds_find_no_more_than_they_may(design):
    for seeds, count in false_findings(design, BRIER, STUDIES, seeds=(2, 3)).items():
        assert of_five_percent(count, "greater") > 0.01, seeds


def test_one_seed_finds_too_much_where_models_vary_and_three_do_not():
    found = false_findings(VARYING, AUROC, STUDIES, seeds=(1, 3))
    assert of_five_percent(found[1], "greater") < 1e-4
    assert of_five_percent(found[3], "greater") > 0.01


def test_what_a_training_set_does_to_all_seeds_is_not_covered():
    """A method that has luck with the training sets wins from every seed."""
    lucky = replace(UNSEEN, quality=0.03, training=0.3)
    found = false_findings(lucky, AUROC, STUDIES, seeds=(3,))
    assert of_five_percent(found[3], "greater") < 1e-4


def test_null_studies_are_what_they_say():
    """Cohort, folds and separation are those of the design; both methods are equally good."""
    values, studies = [], 60
    for number in range(studies):
        study = null_study(DESIGNS[0], AUROC, number, seeds=2)
        assert [len(truth) for truth in study.truth] == [89] * 5
        assert sorted(truth.sum() for truth in study.truth) == [12, 13, 13, 13, 13]
        values.append([study.of(method, 2).value for method in (0, 1)])
    ours, theirs = zip(*values, strict=True)
    assert sum(ours) / studies == pytest.approx(0.83, abs=0.01)
    assert stats.ttest_rel(ours, theirs).pvalue > 0.01
