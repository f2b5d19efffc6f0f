"""What methods are compared by: a difference, its resamples and its exchange are of one figure."""

import numpy as np
import pytest

from examples.pathology.study.criteria import CRITERIA, SILHOUETTE
from examples.pathology.study.criteria import tested as figures_of  # no test
from examples.pathology.study.folder import read_study
from tests.pathology.tiny_study import NUMBER, PRIMARY, write_study


@pytest.fixture(scope="module", params=[PRIMARY, NUMBER], ids=lambda target: target.kind)
def study(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return read_study(
        write_study(folder, methods=("baseline", "naive"), auxiliary=("LF",), primary=request.param)
    )


def test_without_an_exchange_and_with_all_patients_the_difference_is_there(study):
    for criterion in CRITERIA[study.kind]:
        runs = study.panels[0].first(criterion.cohort)
        target = runs["naive"].summary.targets[0]
        ours, theirs = (figures_of(runs[m].results[0], target) for m in ("naive", "baseline"))
        pair = criterion.compare(ours, theirs)
        metric, name = criterion.metric, criterion.title
        values = [runs[m].metrics[metric].folds[0] for m in ("naive", "baseline")]
        assert pair.value == pytest.approx(values[0] - values[1]), name
        everybody = np.ones((1, len(ours.patients)))
        assert pair.resampled(everybody)[0] == pytest.approx(pair.value), name
        nobody, all_of_them = pair.exchange().difference(np.stack([0 * everybody[0], everybody[0]]))
        if metric != SILHOUETTE:  # whose pseudo-values have nearly its mean
            assert nobody == pytest.approx(pair.value), name
        assert all_of_them == pytest.approx(-nobody), name
        assert criterion.compare(ours, ours).value == 0, name


def test_every_criterion_has_a_title_of_its_own():
    for criteria in CRITERIA.values():
        assert len({criterion.title for criterion in criteria}) == len(criteria)
        inside = {criterion.metric for criterion in criteria if criterion.cohort == "internal"}
        outside = {criterion.metric for criterion in criteria if criterion.cohort == "external"}
        assert inside - outside <= {SILHOUETTE}
        assert outside <= inside
