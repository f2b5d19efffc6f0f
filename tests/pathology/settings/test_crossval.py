import math
from pathlib import Path

import pytest

from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_section, write_toml
from examples.pathology.settings import crossval as config
from examples.pathology.settings.crossval import CrossvalConfig

PATHS = {"clini": Path("c.csv"), "slide_table": Path("s.csv"), "features": Path("f")}


def make(**changes):
    values = {**PATHS, "target": "isMSIH", "out": Path("run"), **changes}
    return CrossvalConfig(**values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folds": 1}, "`folds` must be at least 2, but got 1."),
        ({"epochs": 0}, "`epochs` must be at least 1, but got 0."),
        ({"patience": 0}, "`patience` must be at least 1, but got 0."),
        ({"layers": 0}, "`layers` must be at least 1, but got 0."),
        ({"width": 100}, "`width` must be a multiple of 6, the attention heads, but got 100."),
        ({"width": 0}, "`width` must be a multiple of 6, the attention heads, but got 0."),
        ({"seed": -1}, "`seed` must be at least 0, but got -1."),
        ({"learning_rate": 0.0}, "`learning-rate` must be above 0, but got 0.0."),
        ({"learning_rate": math.nan}, "`learning-rate` must be above 0, but got nan."),
        ({"learning_rate": math.inf}, "`learning-rate` must be above 0 and finite, but got inf."),
        ({"weight_decay": -0.1}, "`weight-decay` must be at least 0, but got -0.1."),
        ({"schedule": "cosin"}, "Did you mean `cosine`?"),
        ({"lookahead_data": "test"}, "`lookahead-data` must be one of heldout, train, but"),
        ({"target": ""}, "`target` must name a column"),
        ({"auxiliary": ("isMSIH",)}, "each target once, but got isMSIH twice"),
        ({"target": "PATIENT"}, "`target` must be another column than the patient's, but got 'PA"),
        ({"auxiliary": ("PATIENT",)}, "`auxiliary` must be another column than the patient's, but"),
        ({"cutoff": math.inf}, "`cutoff` must be a finite number, but got inf."),
        ({"cutoff": 1.0, "kind": ("isMSIH=regression",)}, "`cutoff` makes classes of `isMSIH`, so"),
        ({"kind": ("isMSIH=regresion",)}, "but got 'isMSIH=regresion'. Did you mean `regression`?"),
        ({"kind": ("isMSI=regression",)}, "but got 'isMSI=regression'. Did you mean `isMSIH`?"),
        ({"kind": ("regression",)}, "`kind` must be NAME=classification or NAME=regression, once"),
        ({"kind": ("isMSIH=regression",) * 2}, "once for each of the targets (isMSIH)"),
    ],
)
def test_wrong_settings_are_told(changes, words):
    with pytest.raises(UserError) as caught:
        make(**changes)
    assert words in str(caught.value)


def test_resolved_settings_can_be_read_back_as_a_section(tmp_path):
    made = make(auxiliary=("a", "b.c/d"), splits=Path("x/splits.json"), positive="MSIH")
    write_toml(tmp_path / "a.toml", {"crossval": made.resolved()})
    known = made.__dataclass_fields__
    values = read_section(tmp_path / "a.toml", "crossval", known, ["crossval"])
    paths = {name: Path(values[name]) for name in (*PATHS, "out", "splits")}
    again = CrossvalConfig(**{**values, **paths, "auxiliary": tuple(values["auxiliary"])})
    assert again.resolved() == made.resolved()
    assert all(path.is_absolute() for path in paths.values())


def test_only_what_changes_the_result_counts_as_different():
    stored = make().resolved()
    same = make(out=Path("elsewhere"), device="cuda", note="other")
    assert config.settings_that_differ(same, stored) == []
    assert config.settings_that_differ(make(seed=1), stored) == ["seed: 0 -> 1"]
    assert config.settings_that_differ(make(positive="a"), stored) == ["positive: None -> 'a'"]


def test_the_name_of_a_target_may_hold_an_equals_sign():
    made = make(auxiliary=("a=b",), kind=("a=b=regression", "isMSIH=classification"))
    assert made.kinds == {"a=b": "regression", "isMSIH": "classification"}


def test_runs_without_kind_and_cut_off_are_those_of_before():
    assert not {"kind", "cutoff"} & set(make().resolved())
    other = make(kind=("isMSIH=regression",))
    assert config.settings_that_differ(other, make().resolved()) == [
        "kind: None -> ['isMSIH=regression']"
    ]
