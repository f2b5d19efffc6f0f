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
    site_share,
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


# --- folds by site --------------------------------------------------------------------------------


def of_sites(cohort: Cohort, sites) -> Cohort:
    pairs = zip(cohort.patients, sites, strict=True)
    return replace(cohort, patients=tuple(replace(p, site=str(site)) for p, site in pairs))


def sites_of(cohort, names):
    site = {p.name: p.site for p in cohort.patients}
    return {site[name] for name in names}


@st.composite
def hospitals(draw, kind=None):
    """Patients of a classification or regression in sites of any size, and a number of folds."""
    folds = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 30), min_size=2, max_size=12))
    sites = [f"S{i}" for i, size in enumerate(sizes) for _ in range(size)]
    values = st.integers(0, 60) if draw(st.booleans()) else st.sampled_from("ab")
    labels = draw(st.lists(values, min_size=len(sites), max_size=len(sites)))
    words = isinstance(labels[0], str)
    return of_sites(cohort_of("".join(labels)) if words else measured(labels), sites), folds


@settings(max_examples=60, deadline=None)
@given(hospitals(), st.integers(0, 2**32 - 1))
def test_no_site_is_on_both_sides_of_a_split(made, seed):
    cohort, folds = made
    try:
        drawn = make_splits(cohort, folds, seed)
    except UserError as error:
        assert "from sites of its own, but too few are left for the" in str(error)  # noqa: PT017
        return
    assert drawn == make_splits(cohort, folds, seed)
    check_splits(drawn, cohort)
    everyone = {p.name for p in cohort.patients}
    label = {p.name: p.label for p in cohort.patients}
    assert Counter(name for fold in drawn for name in fold.test) == dict.fromkeys(everyone, 1)
    for fold in drawn:
        steps = set(fold.train) - set(fold.lookahead)
        parts = [steps, set(fold.lookahead), set(fold.validation), set(fold.test)]
        assert sum(map(len, parts)) == len(everyone)
        sites = [sites_of(cohort, part) for part in parts]
        assert sum(map(len, sites)) == len(set.union(*sites)) == len(sites_of(cohort, everyone))
        assert all(len(part) > 0 for part in (steps, fold.validation, fold.test))
        for part in (steps, fold.validation, fold.test) if cohort.target.classes else ():
            assert {label[name] for name in part} == set(cohort.target.classes)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 8), st.integers(0, 5), st.integers(0, 99))
def test_as_many_sites_as_folds_are_tested_one_by_one(folds, extra, seed):
    """Leave one site out: whatever their sizes, where every site has both classes."""
    sizes = np.random.default_rng(seed).integers(1, 20, folds)
    sites = [f"S{i}" for i, size in enumerate(sizes) for _ in range(2 * size + extra)]
    labels = "".join("ab"[i % 2] for i in range(len(sites)))
    cohort = of_sites(cohort_of(labels), sites)
    drawn = make_splits(cohort, folds, seed)
    tested = [sites_of(cohort, fold.test) for fold in drawn]
    assert sorted(map(len, tested)) == [1] * folds
    assert (folds > 3) == all(fold.lookahead for fold in drawn)  # one site alone cannot be parted
    assert all(len(sites_of(cohort, fold.train)) >= 1 for fold in drawn)


def test_sites_that_fit_are_drawn_in_exact_shares():
    sites, labels = zip(*[(f"S{i}", label) for i in range(10) for label in "aab"], strict=True)
    cohort = of_sites(cohort_of("".join(labels)), sites)
    label = {p.name: p.label for p in cohort.patients}
    for fold in make_splits(cohort, 5, 0):
        assert len(sites_of(cohort, fold.test)) == 2
        assert Counter(label[name] for name in fold.test) == {"a": 4, "b": 2}
        assert len(sites_of(cohort, fold.validation)) == 2  # of 8 a fifth is 1.6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=7), st.integers(0, 99))
def test_few_sites_have_the_best_share_there_is(sizes, seed):
    """Against every set of sites: nothing else is nearer, of the class that is furthest off."""
    random = np.random.default_rng(seed)
    sites = np.repeat(np.arange(len(sizes)).astype(str), sizes)
    labels = random.choice(["a", "b"], len(sites))

    def cost(members):
        inside = np.isin(sites, members)
        counts = [(inside & (labels == each)).sum() for each in np.unique(labels)]
        totals = [(labels == each).sum() for each in np.unique(labels)]
        far = max(abs(n / of - 0.3) for n, of in zip(counts, totals, strict=True))
        emptied = sum(n == of for n, of in zip(counts, totals, strict=True))
        return far + counts.count(0) + len(sizes) * emptied

    names = np.unique(sites)
    every = [
        names[[bool(chosen >> i & 1) for i in range(len(names))]]
        for chosen in range(1, 2 ** len(names) - 1)
    ]
    drawn = site_share(labels, sites, 0.3, random)
    assert cost(np.unique(sites[drawn])) == pytest.approx(min(map(cost, every)))


def test_no_class_is_left_to_looking_ahead_alone():
    """One site of each class is left to train on."""
    sites = [f"S{i // 6}" for i in range(36)]
    cohort = of_sites(cohort_of("a" * 18 + "b" * 18), sites)
    for fold in make_splits(cohort, 3, 0):
        assert len(sites_of(cohort, fold.train)) == 2
        assert fold.lookahead == ()


def test_sites_of_a_regression_may_have_values_of_their_own():
    cohort = of_sites(measured(range(50)), [f"S{i // 10}" for i in range(50)])
    drawn = make_splits(cohort, 5, 0)
    assert [len(sites_of(cohort, fold.test)) for fold in drawn] == [1] * 5


@pytest.mark.parametrize(
    ("labels", "sites", "folds", "words"),
    [
        ("aaaaabbbbb", "1111122222", 2, "patients of a .* they are of 1 sites"),
        ("aabb" * 5, "1" * 20, 2, "they are of 1 sites"),
        ("aabb" * 5, "1111111111" + "2" * 10, 3, "they are of 2 sites"),
        ("ab" * 5 + "b" * 10, "1" * 10 + "2345678912", 5, "part of fold 1: they are of 1 sites"),
    ],
)
def test_sites_that_cannot_be_divided_are_refused(labels, sites, folds, words):
    with pytest.raises(UserError, match=words):
        make_splits(of_sites(cohort_of(labels), sites), folds, 0)


def hundred():
    return of_sites(cohort_of("ab" * 50), [f"S{i // 5}" for i in range(100)])


def test_sites_are_stored_with_the_splits_and_their_hash(tmp_path):
    cohort = hundred()
    made = load_or_make_splits(config_in(tmp_path), cohort)
    path = tmp_path / "run/splits.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    assert value["groups"] == {p.name: p.site for p in cohort.patients}
    assert load_or_make_splits(config_in(tmp_path), cohort) == made
    value["groups"]["P000"] = "S7"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UserError, match="but its hash is"):
        load_or_make_splits(config_in(tmp_path), cohort)


def test_without_sites_the_file_is_as_it_was(tmp_path):
    load_or_make_splits(config_in(tmp_path), cohort_of("ab" * 10))
    value = json.loads((tmp_path / "run/splits.json").read_text(encoding="utf-8"))
    assert list(value) == ["format", "target", "cohort_sha256", "folds"]


def test_splits_of_another_run_are_held_against_the_sites(tmp_path):
    cohort = hundred()
    plain = of_sites(cohort, [""] * 100)
    by_site = load_or_make_splits(config_in(tmp_path), cohort)
    theirs = replace(config_in(tmp_path, splits=tmp_path / "run/splits.json"), out=tmp_path / "b")
    assert load_or_make_splits(theirs, plain) == by_site  # folds by site are folds by patient
    stored = json.loads((tmp_path / "b/splits.json").read_text(encoding="utf-8"))
    assert "groups" not in stored
    fits = replace(theirs, splits=tmp_path / "b/splits.json", out=tmp_path / "c")
    assert load_or_make_splits(fits, cohort) == by_site  # they were drawn by site, as they show
    ours = replace(config_in(tmp_path), out=tmp_path / "d")
    load_or_make_splits(ours, plain)
    leak = replace(theirs, splits=tmp_path / "d/splits.json", out=tmp_path / "e")
    with pytest.raises(UserError, match=r"A site must be in one part of fold 1, but S\d+ is in"):
        load_or_make_splits(leak, cohort)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("part", ["validation", "lookahead"])
def test_a_site_may_not_be_trained_and_validated_or_looked_ahead_on(part):
    cohort = hundred()
    first, *others = make_splits(cohort, 5, 0)
    stays = next(name for name in first.train if name not in first.lookahead)
    moved = next(
        name
        for name in first.train
        if name != stays and sites_of(cohort, [name]) == sites_of(cohort, [stays])
    )
    changed = replace(first, **{part: (*getattr(first, part), moved)})
    if part == "validation":
        changed = replace(changed, train=tuple(name for name in first.train if name != moved))
    with pytest.raises(UserError, match=f"is in (train and {part}|{part} and train)"):
        check_splits([changed, *others], cohort)
