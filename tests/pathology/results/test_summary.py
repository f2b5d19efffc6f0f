import json
import math

import pytest

from examples.pathology.cohort.targets import Target
from examples.pathology.results.metrics import TITLES, Metric, Score
from examples.pathology.results.summary import MetricSummary, RunSummary, warning_of

NAMES = [
    ("auroc", Metric("auroc"), "AUROC"),
    ("pearson/LF", Metric("pearson", "LF"), "Pearson r, LF"),
    ("auroc/part of a/b", Metric("auroc", "part of a/b"), "AUROC, part of a/b"),
    ("auroc of a/b", Metric("auroc", label="a/b"), "AUROC of a/b against the rest"),
    ("auroc of x of y", Metric("auroc", label="x of y"), "AUROC of x of y against the rest"),
]


@pytest.mark.parametrize(("name", "metric", "title"), NAMES)
def test_a_metric_has_a_name_and_a_title(name, metric, title):
    assert Metric.read(name) == metric
    assert str(metric) == name
    assert metric.title == title


def test_every_figure_is_a_metric_of_that_name():
    for figure in TITLES:
        for metric in (Metric(figure), Metric(figure, "a"), Metric(figure, label="b")):
            assert Metric.read(str(metric)) == metric


AUROC = MetricSummary(
    [0.5, None, 0.75], {"2": "one class only"}, 0.625, None, [0.25, 1.0], [None, None], 2
)
CLASSES = {"classes": ["a", "b"], "positive": "b"}
CUT = {"classes": ["<2", ">=2"], "positive": ">=2", "cutoff": 2.0}


def run(**changes):
    values = {
        "method": "naive",
        "target": "y",
        "auxiliary": [{"name": "LF", "kind": "regression"}],
        "patients": 9,
        "funnel": [("in the table", 9)],
        "extractor": "x",
        "random_weights": False,
        "note": "",
        "metrics": {Metric("auroc"): AUROC},
    }
    return RunSummary(**{**values, **changes})


@pytest.mark.parametrize(
    "summary",
    [
        run(**CLASSES, positives=0, thresholds=[0.5, None]),
        run(**CUT, max_tiles=7, seconds=[1.5]),
        run(kind="regression", values={"mean": 1.0}),
        run(kind="regression", note="n", simulated="s", metrics={}),
    ],
)
def test_a_summary_is_read_back_as_it_was_written(summary):
    text = json.dumps(summary.to_json(), allow_nan=False)
    again = RunSummary.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert (again.targets, again.patients, again.note) == (summary.targets, 9, summary.note)


def test_what_a_kind_of_target_does_not_have_is_not_written():
    labels = run(**CLASSES, positives=3).to_json()
    assert (labels["positives"], labels["positive"], labels["classes"]) == (3, "b", ["a", "b"])
    assert "values" not in labels
    assert "cutoff" not in labels
    numbers = run(kind="regression").to_json()
    assert not {"classes", "positive", "positives", "thresholds", "values"} & set(numbers)


def test_the_targets_are_those_that_were_predicted():
    auxiliary = Target("LF", "regression")
    assert run(**CUT).targets == [
        Target("y", "classification", ("<2", ">=2"), ">=2", 2.0),
        auxiliary,
    ]
    assert run(kind="regression").targets == [Target("y", "regression"), auxiliary]


def test_a_fold_without_a_value_says_why():
    first, second, third = AUROC.scores
    assert (first, third) == (Score(0.5), Score(0.75))
    assert math.isnan(second.value)
    assert second.reason == "one class only"


def test_runs_of_earlier_releases_are_read():
    stored = run(**CLASSES).to_json()
    for name in ("kind", "simulated", "max_tiles", "share_waiting_for_data", "width"):
        del stored[name]
    summary = RunSummary.from_json({**stored, "unknown": 1})
    assert summary.targets[0] == Target("y", "classification", ("a", "b"), "b")
    assert summary.simulated == ""


def test_a_warning_says_all_that_is_to_be_said():
    assert warning_of("", "", random_weights=False) == ""
    text = warning_of(" Drawn. ", "Features are simulated.", random_weights=True)
    assert text.startswith(
        "Drawn. Features are simulated. Features come from a network with RANDOM"
    )
