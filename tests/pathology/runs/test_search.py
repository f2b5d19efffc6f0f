"""A search in every fold, against plain runs of each candidate: trained apart, compared by hand."""

import itertools
import json
import math

import pandas as pd
import pytest
import torch

from examples.pathology.common.errors import DivergedError, UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.report.report import write_report
from examples.pathology.results.folds import read_fold
from examples.pathology.runs import crossval, search
from examples.pathology.runs.crossval import load_cohort_of, make_plan, run_crossval, run_fold
from examples.pathology.settings.benchmark import BenchmarkConfig
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.training import checkpoint as resume
from examples.pathology.training import model
from examples.pathology.training.bags import BagStore
from examples.pathology.training.learner import Learner
from tests.pathology.killing import small
from tests.pathology.tiny import make_tables

RATES, WEIGHTS = (1e-4, 3e-3, 1e-2), (0.1, 30.0)
KEPT = ("predictions.csv", "validation.csv", "embeddings.npy")
METHODS = ("baseline", "naive", "fixed")
REGRESSION = {
    "target": "LF",
    "auxiliary": ("isMSIH",),
    "kind": ("LF=regression",),
    "search_weight": (0.1, 1.0, 9.0),
}


@pytest.fixture(scope="module", autouse=True)
def small_models_that_are_not_drawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "JointTransformer", small)
        patch.setattr(crossval, "draw_figures", lambda *_, **__: [])
        yield


@pytest.fixture
def saved_every_epoch(monkeypatch):
    monkeypatch.setattr(resume, "COST_SHARE", math.inf)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("cohort"), patients=12, tiles=3)


def config_of(tables, out, balancer, **changes):
    places = tables.clini, tables.slides, tables.features, changes.pop("target", "isMSIH"), out
    options = {"search_rate": RATES, **({"search_weight": WEIGHTS} if balancer == "fixed" else {})}
    values = {"folds": 2, "epochs": 2, "auxiliary": ("LF",), "device": "cpu", **options, **changes}
    return CrossvalConfig(*places, balancer=balancer, **values)


BAGS = BagStore()
LOADED = {}  # the cohort, by its table: it is the same for all candidates


def fold_1(config):
    """Train the first fold alone, as a job of a benchmark does; return its folder."""
    if config.clini not in LOADED:
        LOADED[config.clini] = load_cohort_of(config)
    run_fold(make_plan(config, LOADED[config.clini]), 1, BAGS)
    return config.out / "fold-1"


@pytest.fixture(scope="module")
def plain(tables, tmp_path_factory):
    """Fold 1 of each candidate as a run of its own, by method, rate and weight."""
    folder, found = tmp_path_factory.mktemp("plain"), {}
    tried = [(method, rate) for method in METHODS[:2] for rate in RATES]
    for name in (*tried, *itertools.product(METHODS[2:], RATES, WEIGHTS)):
        method, rate, *weight = name
        how = {"search_rate": (), "learning_rate": rate}
        if weight:
            how["search_weight"] = tuple(weight)
        found[name] = fold_1(config_of(tables, folder / str(name), method, **how))
    return found


@pytest.fixture(scope="module")
def searched(tables, tmp_path_factory):
    """Fold 1 of a search, by method."""
    folder = tmp_path_factory.mktemp("searched")
    return {name: fold_1(config_of(tables, folder / name, name)) for name in METHODS}


def primary_loss(fold):
    """Return the cross-entropy of the predictions of the validation part, patient by patient."""
    rows = pd.read_csv(fold / "validation.csv").to_dict("records")
    return -sum(math.log(row[f"isMSIH_{row['isMSIH']}"]) for row in rows) / len(rows)


def same_model(one, other):
    ours, theirs = (
        torch.load(f / "model.pt", weights_only=True)["state_dict"] for f in (one, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_the_candidate_with_the_lowest_loss_bit_for_bit(searched, plain, method):
    losses = {name: primary_loss(fold) for name, fold in plain.items() if name[0] == method}
    best, ours = min(losses, key=losses.get), searched[method]
    for name in KEPT:
        assert (ours / name).read_bytes() == (plain[best] / name).read_bytes()
    assert same_model(ours, plain[best])
    assert sum(same_model(ours, plain[name]) for name in losses) == 1
    tried = pd.read_csv(ours / "search.csv")
    names = [(method, *row) for row in tried.filter(["learning_rate", "weight"]).to_numpy()]
    assert names == list(losses)
    assert tried["validation_loss"].tolist() == pytest.approx(list(losses.values()), abs=1e-6)
    assert read_fold(ours).seconds == pytest.approx(tried["seconds"].sum(), abs=2e-3)


def test_the_search_has_something_to_choose(searched):
    """Else what is kept could be the first or the last of all."""
    places = set()
    for fold in searched.values():
        losses = pd.read_csv(fold / "search.csv")["validation_loss"]
        places.add(int(losses.idxmin()) / (len(losses) - 1))
    assert places - {0.0, 1.0}
    assert len(places) > 1


def test_only_the_model_that_was_kept_stays(searched):
    for fold in searched.values():
        files = {path.name for path in fold.iterdir()}
        assert files == {*KEPT, "model.pt", "history.csv", "fold.json", "search.csv"}


def test_a_weight_of_1_is_naive(tables, plain, tmp_path):
    """That is what `mtbalance` says of `Constant` and `Equal`; so `fixed` can choose naive."""
    how = {"search_rate": (), "learning_rate": RATES[1], "search_weight": (1.0,)}
    fold = fold_1(config_of(tables, tmp_path / "run", "fixed", **how))
    assert same_model(fold, plain["naive", RATES[1]])


def test_all_candidates_of_a_fold_start_from_the_same_weights(tables, tmp_path, monkeypatch):
    started = []
    original = Learner.train_epoch

    def train_epoch(learner, patients, epoch):
        started.append([(name, value) for name, value in learner.parameters().items()])
        return original(learner, patients, epoch)

    monkeypatch.setattr(Learner, "train_epoch", train_epoch)
    fold_1(config_of(tables, tmp_path / "run", "fixed", epochs=1))
    assert len(started) == len(RATES) * len(WEIGHTS)
    for other in started[1:]:
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(started[0], other, strict=True))


@pytest.mark.parametrize("epoch", [2, 3, 6, 7])
def test_a_search_stopped_at_any_epoch_goes_on_there(
    searched, tables, tmp_path, monkeypatch, saved_every_epoch, epoch
):
    """Three candidates of two epochs are six: within one, between two, in the last, after it."""
    trained = []
    original, write_fold = Learner.train_epoch, crossval.write_fold

    def train_epoch(learner, patients, number):
        if len(trained) + 1 == epoch and not stopped:
            stopped.append(epoch)
            raise KeyboardInterrupt
        trained.append((learner.config.learning_rate, number))
        return original(learner, patients, number)

    def writing(*arguments):
        if epoch > 6 and not stopped:
            stopped.append(epoch)
            raise KeyboardInterrupt
        return write_fold(*arguments)

    stopped, config = [], config_of(tables, tmp_path / "run", "naive")
    monkeypatch.setattr(Learner, "train_epoch", train_epoch)
    monkeypatch.setattr(crossval, "write_fold", writing)
    with pytest.raises(KeyboardInterrupt):
        fold_1(config)
    ours = fold_1(config)
    assert trained == list(itertools.product(RATES, (1, 2)))  # each epoch once, none again
    assert same_model(ours, searched["naive"])
    for name in KEPT:
        assert (ours / name).read_bytes() == (searched["naive"] / name).read_bytes()
    drop = ["seconds"]
    found, before = (pd.read_csv(f / "search.csv", dtype=str) for f in (ours, searched["naive"]))
    pd.testing.assert_frame_equal(found.drop(columns=drop), before.drop(columns=drop))
    assert {path.name for path in ours.iterdir()} == {p.name for p in searched["naive"].iterdir()}


def test_at_most_two_checkpoints_lie_on_the_disk(tables, tmp_path, monkeypatch, saved_every_epoch):
    seen = []
    original = Learner.validate

    def validate(learner, *arguments):
        seen.append(len(list((tmp_path / "run/fold-1").glob("checkpoint*"))))
        return original(learner, *arguments)

    monkeypatch.setattr(Learner, "validate", validate)
    fold_1(config_of(tables, tmp_path / "run", "fixed"))
    assert max(seen) == 2
    assert min(seen) == 0


def test_the_test_part_is_looked_at_once_after_the_choice(tables, tmp_path, monkeypatch):
    told = []
    fit, predict = crossval.fit_fold, crossval.predict

    def fitting(cohort, train, validation, config, **options):
        told.append({patient.name for patient in (*train, *validation, *options["lookahead"])})
        return fit(cohort, train, validation, config, **options)

    def predicting(fitted, patients, **options):
        told.append([patient.name for patient in patients])
        return predict(fitted, patients, **options)

    monkeypatch.setattr(crossval, "fit_fold", fitting)
    monkeypatch.setattr(crossval, "predict", predicting)
    config = config_of(tables, tmp_path / "run", "naive", epochs=1)
    fold_1(config)
    split = json.loads((config.out / "splits.json").read_text(encoding="utf-8"))["folds"][0]
    assert told[-2:] == [split["validation"], split["test"]]
    assert len(told) == len(RATES) + 1 + 2
    assert not any(seen & set(split["test"]) for seen in told[:-2])


def test_a_candidate_that_diverges_is_not_kept(tables, tmp_path, monkeypatch, caplog):
    original = Learner.validate

    def validate(learner, patients, epoch):
        found = original(learner, patients, epoch)
        if learner.config.learning_rate in lost and epoch == 2:
            raise DivergedError(f"{learner.name}: no number.")
        return {**found, "isMSIH": found["isMSIH"] - 9 * (learner.config.learning_rate in lost)}

    monkeypatch.setattr(Learner, "validate", validate)
    lost = RATES[:1]  # the best of all after its first epoch
    fold = fold_1(config_of(tables, tmp_path / "run", "naive"))
    tried = pd.read_csv(fold / "search.csv")
    assert tried["validation_loss"][0] == math.inf
    assert "learning rate 0.0001: no number. It is not kept." in caplog.text
    assert pd.read_csv(fold / "history.csv")["learning_rate"][0] in RATES[1:]
    lost = RATES
    config = config_of(tables, tmp_path / "none", "naive")
    for _ in range(2):  # and again, without training
        with pytest.raises(DivergedError, match="fold 1: a candidate must have finite losses"):
            fold_1(config)


def test_a_damaged_list_of_candidates_is_told(tables, searched, tmp_path):
    config = config_of(tables, tmp_path / "run", "naive")
    (config.out / "fold-1").mkdir(parents=True)
    whole = (searched["naive"] / "search.csv").read_text(encoding="utf-8")
    (config.out / "fold-1/search.csv").write_text(whole.replace("0.003", "x"), encoding="utf-8")
    with pytest.raises(UserError, match=r"search\.csv must be there as it was written.*Delete "):
        fold_1(config)


@pytest.fixture(scope="module")
def run(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    changes = {**REGRESSION, "epochs": 1}
    run_crossval(config_of(tables, out, "fixed", **changes))
    return out


def test_a_run_says_what_each_fold_kept(run):
    """Of a regression, too; read back from the folds, where the lowest is sought by hand."""
    told = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["search"]
    assert len(told) == 2
    for k, kept in enumerate(told, start=1):
        rows = pd.read_csv(run / f"fold-{k}/search.csv").sort_values("validation_loss")
        names = ["learning_rate", "weight", "validation_loss"]
        assert kept == {**rows.iloc[0][names].to_dict(), "candidates": 9}
        history = pd.read_csv(run / f"fold-{k}/history.csv")
        assert history["validation/LF"].min() == kept["validation_loss"]
        assert history["learning_rate"][0] == kept["learning_rate"]
        assert history["weight/isMSIH"][0] == pytest.approx(kept["weight"])
        assert history["weight/LF"][0] == pytest.approx(1.0)


def test_the_page_says_what_each_fold_kept(run, tmp_path):
    page = write_report([run], tmp_path / "report").read_text(encoding="utf-8")
    told = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["search"]
    assert "What the search kept" in page
    for kept in told:
        assert f"learning rate {kept['learning_rate']:g}, weight {kept['weight']:g}" in page
    for name, ends in (("learning_rate", {RATES[0], RATES[-1]}), ("weight", {0.1, 9.0})):
        many = sum(kept[name] in ends for kept in told)
        said = (
            f"In {many} of 2 folds the {name.replace('_', ' ')} kept is the lowest or the highest"
        )
        assert (said in page) == (many > 0)
    assert len(pd.read_csv(tmp_path / "report/search.csv")) == 2 * 9


def test_a_run_without_a_search_says_nothing_of_one(tables, tmp_path):
    config = config_of(tables, tmp_path / "run", "naive", search_rate=(), epochs=1)
    run_crossval(config)
    assert "search" not in json.loads((config.out / "metrics.json").read_text(encoding="utf-8"))
    stored = read_toml(config.out / "config.toml")["crossval"]
    assert {"search_rate", "search_weight"}.isdisjoint(stored)
    assert stored["learning_rate"] == config.learning_rate
    page = write_report([config.out], tmp_path / "report").read_text(encoding="utf-8")
    assert "What the search kept" not in page
    assert not list(tmp_path.rglob("search.csv"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search_rate": RATES[:2]}, r"search_rate: \[.*\] -> \[.*\]"),
        ({"search_rate": ()}, "learning_rate: None -> 0.0001, search_rate"),
        ({"search_weight": (0.1, 1.0)}, "search_weight"),
    ],
)
def test_another_search_in_the_folder_is_refused(tables, run, changes, says):
    options = {**REGRESSION, "epochs": 1}
    with pytest.raises(UserError, match=f"differs in.*{says}"):
        run_crossval(config_of(tables, run, "fixed", **{**options, **changes}))


@pytest.mark.parametrize(
    ("balancer", "changes", "says"),
    [
        ("naive", {"search_rate": (1e-3, 0.0)}, "`search-rate` must be above 0 each, but got"),
        ("naive", {"search_rate": (1e-3, 1e-3)}, "`search-rate` must be different numbers"),
        ("fixed", {"search_weight": (-1.0,)}, "`search-weight` must be at least 0 each"),
        ("fixed", {"search_weight": (math.nan,)}, "`search-weight` must be at least 0 each"),
        ("naive", {"search_weight": (1.0,)}, "`search-weight` is of the method fixed, which"),
        ("fixed", {"auxiliary": ()}, "there is no auxiliary target. Give --auxiliary"),
    ],
)
def test_what_cannot_be_searched_is_told_before_tables_are_read(
    tables, tmp_path, monkeypatch, balancer, changes, says
):
    monkeypatch.setattr(crossval, "load_cohort", None)
    with pytest.raises(UserError, match=says):
        run_crossval(config_of(tables, tmp_path / "run", balancer, **changes))


def test_a_benchmark_refuses_weights_that_no_method_takes(tables, tmp_path):
    common = config_of(tables, tmp_path, "fixed")
    stored = BenchmarkConfig(("LF",), methods=("naive", "fixed"), crossval=common).resolved()
    assert stored["search_weight"] == list(WEIGHTS)
    assert stored["search_rate"] == list(RATES)
    with pytest.raises(UserError, match="but asked for is naive, uncert"):
        BenchmarkConfig(("LF",), methods=("naive", "uncert"), crossval=common)


def test_every_rate_is_tried_with_every_weight(tables, tmp_path):
    tried = search.candidates(config_of(tables, tmp_path, "fixed"))
    pairs = [(how.learning_rate, *how.search_weight) for how in tried]
    assert pairs == list(itertools.product(RATES, WEIGHTS))
