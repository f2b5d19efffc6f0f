import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold, train_test_split

from examples.pathology.cohort.cohort import Cohort
from examples.pathology.cohort.patients import Patient
from examples.pathology.cohort.splits import (
    PARTS,
    check_sizes,
    check_splits,
    fold_seed,
    load_or_make_splits,
    make_splits,
    splits_sha256,
    strata_of,
    stratified_share,
)
from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import UserError
from examples.pathology.features.kind import FeatureKind
from examples.pathology.settings.crossval import CrossvalConfig


def cohort_of(labels: str) -> Cohort:
    patients = [Patient(f"P{i:03d}", label, {}, (), 1) for i, label in enumerate(labels)]
    target = Target("t", "classification", tuple(sorted(set(labels))), min(labels))
    return Cohort((target,), tuple(patients), (), (), (), FeatureKind(768, "x"), "")


def measured(values) -> Cohort:
    patients = [Patient(f"P{i:03d}", str(value), {}, (), 1) for i, value in enumerate(values)]
    target = Target("t", "regression")
    return Cohort((target,), tuple(patients), (), (), (), FeatureKind(768, "x"), "")


def config_in(folder, **changes) -> CrossvalConfig:
    return CrossvalConfig(
        folder / "c.csv", folder / "s.csv", folder, "t", folder / "run", **changes
    )


COHORTS = st.tuples(st.integers(5, 40), st.integers(5, 40), st.integers(0, 1)).map(
    lambda n: "a" * n[0] + "b" * n[1] + "c" * 9 * n[2]
)


@settings(max_examples=60, deadline=None)
@given(COHORTS, st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_no_patient_is_in_two_parts_and_all_are_tested_once(labels, folds, seed):
    cohort = cohort_of(labels)
    made = make_splits(cohort, folds, seed)
    everyone = {p.name for p in cohort.patients}
    assert Counter(name for fold in made for name in fold.test) == dict.fromkeys(everyone, 1)
    for fold in made:
        train, validation, test = (set(getattr(fold, part)) for part in PARTS[:3])
        assert len(train) + len(validation) + len(test) == len(everyone)
        assert train | validation | test == everyone
        assert set(fold.lookahead) < train
        assert len(validation) == max(1, round(0.2 * (len(everyone) - len(test))))
    check_splits(made, cohort)


@settings(max_examples=60, deadline=None)
@given(COHORTS, st.integers(0, 1000))
def test_folds_have_the_classes_in_their_shares(labels, seed):
    cohort = cohort_of(labels)
    label_of = {p.name: p.label for p in cohort.patients}
    for fold in make_splits(cohort, 5, seed):
        for part, share in (("test", 0.2), ("train", 0.64), ("validation", 0.16)):
            counts = Counter(label_of[name] for name in getattr(fold, part))
            for label, total in Counter(labels).items():
                assert abs(counts[label] - share * total) <= 2


@given(
    st.lists(st.sampled_from("abc"), min_size=4, max_size=60).filter(
        lambda x: len(set(x)) < len(x)
    ),
    st.floats(0.05, 0.5),
    st.integers(0, 99),
)
def test_a_share_takes_as_much_of_every_class_and_never_all(labels, share, seed):
    labels = np.array(labels)
    drawn = stratified_share(labels, share, np.random.default_rng(seed))
    assert len(set(drawn.tolist())) == len(drawn) <= max(1, round(share * len(labels)))
    for label, total in Counter(labels.tolist()).items():
        taken = (labels[drawn] == label).sum()
        assert taken <= total - 1
        assert abs(taken - min(share * total, total - 1)) <= 1


def test_a_draw_depends_on_its_seed_alone():
    cohort = cohort_of("a" * 15 + "b" * 15)
    assert make_splits(cohort, 5, 1) == make_splits(cohort, 5, 1)
    assert make_splits(cohort, 5, 1) != make_splits(cohort, 5, 2)
    assert len({fold_seed(seed, fold) for seed in range(20) for fold in range(1, 6)}) == 100


def test_splits_are_saved_and_used_again(tmp_path):
    cohort = cohort_of("a" * 10 + "b" * 10)
    made = load_or_make_splits(config_in(tmp_path), cohort)
    stored = (tmp_path / "run/splits.json").read_bytes()
    # Another seed would draw others: those of the folder hold.
    assert load_or_make_splits(config_in(tmp_path, seed=9), cohort) == made
    assert (tmp_path / "run/splits.json").read_bytes() == stored


def test_splits_of_another_run_are_taken_over(tmp_path):
    cohort = cohort_of("a" * 10 + "b" * 10)
    made = load_or_make_splits(config_in(tmp_path), cohort)
    other = config_in(tmp_path, seed=9, splits=tmp_path / "run/splits.json")
    other = replace(other, out=tmp_path / "other")
    assert load_or_make_splits(other, cohort) == made
    assert splits_sha256(made) == splits_sha256(load_or_make_splits(other, cohort))


def test_splits_of_the_folder_and_of_another_run_must_agree(tmp_path):
    cohort = cohort_of("a" * 10 + "b" * 10)
    load_or_make_splits(config_in(tmp_path), cohort)
    other = replace(config_in(tmp_path, seed=9), out=tmp_path / "other")
    load_or_make_splits(other, cohort)
    with pytest.raises(
        UserError, match=r"splits.json must hold the splits of .*, but holds others"
    ):
        load_or_make_splits(config_in(tmp_path, splits=other.out / "splits.json"), cohort)


@pytest.mark.parametrize("labels", ["a" * 10 + "b" * 11, "b" * 10 + "a" * 10])
def test_splits_of_other_patients_or_labels_are_refused(tmp_path, labels):
    load_or_make_splits(config_in(tmp_path), cohort_of("a" * 10 + "b" * 10))
    with pytest.raises(UserError, match="of the same patients and labels, but its hash is"):
        load_or_make_splits(config_in(tmp_path), cohort_of(labels))


def test_another_number_of_folds_is_refused(tmp_path):
    cohort = cohort_of("a" * 10 + "b" * 10)
    load_or_make_splits(config_in(tmp_path), cohort)
    with pytest.raises(UserError, match=r"must have 4 folds, but has 5. Use --folds 5"):
        load_or_make_splits(config_in(tmp_path, folds=4), cohort)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"folds": [{}], "cohort_sha256": ""}'])
def test_a_file_that_holds_no_splits_is_refused(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/splits.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="must hold splits of ours"):
        load_or_make_splits(config_in(tmp_path), cohort_of("a" * 10 + "b" * 10))


def test_a_missing_file_of_splits_is_refused(tmp_path):
    config = config_in(tmp_path, splits=tmp_path / "none.json")
    with pytest.raises(UserError, match="must be a readable file, but No such file"):
        load_or_make_splits(config, cohort_of("a" * 10 + "b" * 10))


def leak_into_training(fold):
    fold["train"].append(fold["test"][0])


def lose_a_patient(fold):
    fold["validation"].pop()


def two_test_parts(fold):
    fold["test"].append(fold["train"].pop())


def look_ahead_on_the_test_part(fold):
    fold["lookahead"] = fold["test"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (leak_into_training, "in one part of fold 1"),
        (lose_a_patient, "in one part of fold 1"),
        (two_test_parts, "in the test part of exactly one fold"),
        (look_ahead_on_the_test_part, "look-ahead share of fold 1 must be part of its training"),
    ],
)
def test_splits_that_leak_are_refused(tmp_path, spoil, words):
    cohort = cohort_of("a" * 10 + "b" * 10)
    load_or_make_splits(config_in(tmp_path), cohort)
    path = tmp_path / "run/splits.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    spoil(value["folds"][0])
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load_or_make_splits(config_in(tmp_path), cohort)


def test_reference_splits_are_scikit_learns():
    """The published code's two calls, on the same patients."""
    cohort = cohort_of("a" * 40 + "b" * 13)
    labels = np.array([p.label for p in cohort.patients])
    made = make_splits(cohort, 5, 0, reference=True)
    check_splits(made, cohort)
    splitter = StratifiedKFold(5, shuffle=True, random_state=1337)
    for fold, (rest, test) in zip(made, splitter.split(labels, labels), strict=True):
        train, held = train_test_split(
            rest, test_size=0.2, stratify=labels[rest], random_state=1337
        )
        for part, chosen in ((fold.train, train), (fold.validation, held), (fold.test, test)):
            assert set(part) == {cohort.patients[i].name for i in chosen}


# --- a regression ---------------------------------------------------------------------------------

VALUES = st.lists(st.integers(-3, 60) | st.floats(-5, 5), min_size=25, max_size=70)


@pytest.mark.parametrize("reference", [True, False])
@settings(deadline=None, max_examples=25)
@given(values=VALUES, folds=st.integers(2, 5))
def test_folds_of_a_regression_are_even_over_its_range(reference, values, folds):
    """However many values are equal: every part of every fold has low, middle and high ones."""
    cohort = measured(values)
    drawn = make_splits(cohort, folds, 0, reference=reference)
    check_splits(drawn, cohort)
    stratum = dict(zip((p.name for p in cohort.patients), strata_of(cohort, folds), strict=True))
    sizes = Counter(stratum.values())
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for fold in drawn:
        tested = Counter(stratum[name] for name in fold.test)
        for part, size in sizes.items():
            assert abs(tested[part] - size / folds) < 1
        assert {stratum[name] for name in fold.validation} == set(sizes)


def test_strata_of_a_regression_are_fifths_in_order():
    values = np.random.default_rng(0).permutation(100) / 7
    strata = strata_of(measured(values), 5)
    assert [int(stratum) for stratum in strata] == [int(value * 7) // 20 for value in values + 1e-9]
    assert len(set(strata_of(measured(range(20)), 5))) == 3  # 16 / 5 patients to validate
    assert len(set(strata_of(measured(range(16)), 2))) == 1


def test_classes_are_strata_as_they_are():
    assert list(strata_of(cohort_of("abba"), 2)) == list("abba")


@pytest.mark.parametrize(
    ("cohort", "folds", "words"),
    [
        (measured(range(9)), 2, "`t` must be known for at least 10 patients for 2 folds, but is"),
        (measured(range(14)), 5, "at least 15 patients for 5 folds, but is for 14"),
        (cohort_of("a" * 9 + "b" * 4), 3, "Every class of `t` must have at least 5 .* but b has 4"),
        (cohort_of("a" * 9 + "b" * 6), 7, "at least 7 patients for 7 folds, but b has 6"),
    ],
)
def test_too_few_patients_are_told(cohort, folds, words):
    with pytest.raises(UserError, match=words):
        check_sizes(cohort, folds)
    check_sizes(replace(cohort, patients=cohort.patients * 2), folds)
