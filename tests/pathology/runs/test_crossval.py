import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from examples.pathology.cohort.splits import Fold
from examples.pathology.cohort.targets import prediction_columns
from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.results.folds import read_model
from examples.pathology.runs import crossval
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.settings import crossval as config_module
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.training import model
from examples.pathology.training.bags import BagStore
from examples.pathology.training.model import JointTransformer
from tests.pathology.killing import small
from tests.pathology.tiny import make_tables, write_bag, write_table

FIGURES = ("roc", "pr", "regression-1", "tsne", "training", "balance")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "JointTransformer", small)
        yield


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Only `run`, which is made before, draws: figures take most of the time."""
    monkeypatch.setattr(crossval, "draw_figures", lambda *_, **__: [])


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("cohort"), patients=20)


def config_of(tables, out, **changes) -> CrossvalConfig:
    values = {"balancer": "naive", "folds": 2, "epochs": 3, "auxiliary": ("LF",), "device": "cpu"}
    return CrossvalConfig(
        tables.clini,
        tables.slides,
        tables.features,
        changes.pop("target", "isMSIH"),
        out,
        **{**values, "learning_rate": 3e-3, **changes},
    )


@pytest.fixture(scope="module")
def run(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "naive"
    run_crossval(config_of(tables, out))
    return out


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_run_folder_is_complete(run):
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    fold = {
        "predictions.csv", "validation.csv", "history.csv", "embeddings.npy", "model.pt",
        "fold.json",
    }  # fmt: skip
    assert files == {
        ".lock",
        "config.toml",
        "splits.json",
        "ledger.csv",
        "predictions.csv",
        "metrics.json",
        *(f"figures/{name}.png" for name in FIGURES),
        *(f"fold-{k}/{name}" for k in (1, 2) for name in fold),
    }
    for figure in (run / "figures").iterdir():
        assert figure.read_bytes().startswith(PNG)


def test_predictions_have_the_documented_columns_and_every_patient_once(run):
    tables = [pd.read_csv(run / f"fold-{k}/predictions.csv") for k in (1, 2)]
    for table in tables:
        assert table.columns.tolist() == [
            "PATIENT", "isMSIH", "isMSIH_MSIH", "isMSIH_MSS", "LF", "LF_pred", "pred",
        ]  # fmt: skip
        np.testing.assert_allclose(table["isMSIH_MSIH"] + table["isMSIH_MSS"], 1.0, atol=1e-12)
    both = pd.concat(tables)
    assert sorted(both["PATIENT"]) == [f"P{i:02d}" for i in range(20)]
    assert both.loc[both["PATIENT"] == "P03", "LF"].isna().all()
    assert both["LF_pred"].notna().all()


def test_metrics_are_those_of_the_predictions(run):
    """Counted again from the CSV, pair by pair."""
    folds = []
    for k in (1, 2):
        with (run / f"fold-{k}/predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        score = {
            label: [float(r["isMSIH_MSS"]) for r in rows if r["isMSIH"] == label]
            for label in ("MSS", "MSIH")
        }
        pairs = [(a > b) + 0.5 * (a == b) for a in score["MSS"] for b in score["MSIH"]]
        folds.append(sum(pairs) / len(pairs))
    value = read(run / "metrics.json")
    assert value["positive"] == "MSS"  # as frequent as MSIH, and later in the alphabet
    assert value["metrics"]["auroc"]["folds"] == pytest.approx(folds)
    assert value["metrics"]["auroc"]["mean"] == pytest.approx(sum(folds) / 2)
    assert value["metrics"]["prevalence"]["mean"] == pytest.approx(0.5)
    assert set(value["metrics"]) == {
        "auroc", "auprc", "f1", "prevalence", "silhouette", "pearson/LF",
    }  # fmt: skip
    assert value["funnel"][-1] == ["and usable features: used", 20]


def test_the_planted_signal_is_found(run):
    assert read(run / "metrics.json")["metrics"]["auroc"]["mean"] > 0.8


def test_history_has_a_row_per_epoch(run):
    table = pd.read_csv(run / "fold-1/history.csv")
    assert table["epoch"].tolist() == [1, 2, 3]
    assert {"loss/isMSIH", "loss/LF", "weight/LF", "validation/isMSIH"} <= set(table.columns)


def test_the_saved_model_gives_the_saved_predictions(run, tables):
    saved = torch.load(run / "fold-1/model.pt", weights_only=True)
    model = small([2, 1], saved["in_features"])
    model.load_state_dict(saved["state_dict"])
    model.eval()
    low, high = saved["scalers"]["LF"]
    cohort = tables.load()
    patients = {p.name: p for p in cohort.patients}
    table = pd.read_csv(run / "fold-1/predictions.csv")
    embeddings = np.load(run / "fold-1/embeddings.npy")
    for i, row in table.iterrows():
        bag = BagStore().load(patients[row["PATIENT"]])
        with torch.inference_mode():
            outputs, embedding = model(torch.from_numpy(bag))
        assert outputs[0].softmax(1)[0, 1].item() == pytest.approx(row["isMSIH_MSS"], abs=1e-6)
        assert low + outputs[1].item() * (high - low) == pytest.approx(row["LF_pred"], abs=1e-5)
        np.testing.assert_allclose(embeddings[i], embedding[0].numpy(), atol=1e-6)


def test_the_settings_are_saved_resolved(run, tables):
    value = read_toml(run / "config.toml")
    assert value["crossval"]["clini"] == str(tables.clini.resolve())
    assert value["crossval"]["patience"] == 7
    assert value["provenance"]["extractor"] == "tiny"


def test_a_stopped_run_is_taken_up_where_it_was(run, tables, tmp_path, monkeypatch):
    """Stopped in fold 2: fold 1 is not touched, and fold 2 is as if nothing had happened."""
    out = tmp_path / "run"
    original = crossval.fit_fold

    def stop_in_fold_2(*arguments, **options):
        if options["name"] == "fold 2":
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(crossval, "fit_fold", stop_in_fold_2)
    with pytest.raises(KeyboardInterrupt):
        run_crossval(config_of(tables, out))
    assert not (out / "metrics.json").exists()
    before = {p: p.stat().st_mtime_ns for p in (out / "fold-1").iterdir()}
    monkeypatch.setattr(crossval, "fit_fold", original)
    run_crossval(config_of(tables, out))
    assert before == {p: p.stat().st_mtime_ns for p in (out / "fold-1").iterdir()}
    for name in ("fold-1/predictions.csv", "fold-2/predictions.csv", "splits.json"):
        assert (out / name).read_bytes() == (run / name).read_bytes()
    ours, theirs = read(out / "metrics.json"), read(run / "metrics.json")
    assert ours["metrics"] == theirs["metrics"]


def test_a_finished_run_trains_nothing(run, tables, monkeypatch):
    assert not list(run.rglob("checkpoint.pt"))  # of use only while a fold is trained
    monkeypatch.setattr(crossval, "fit_fold", None)
    before = read(run / "metrics.json")
    again = run_crossval(config_of(tables, run)).to_json()
    assert json.loads(json.dumps(again)) == before == read(run / "metrics.json")


def test_no_choice_sees_the_test_part(tables, tmp_path, monkeypatch):
    seen = {}
    original = crossval.fit_fold

    def spy(cohort, train, validation, config, *, lookahead, **options):
        seen[options["name"]] = {p.name for p in (*train, *validation, *lookahead)}
        seen[options["name"], "train"] = {p.name for p in train}
        seen[options["name"], "lookahead"] = {p.name for p in lookahead}
        return original(cohort, train, validation, config, lookahead=lookahead, **options)

    monkeypatch.setattr(crossval, "fit_fold", spy)
    run_crossval(config_of(tables, tmp_path / "run", balancer="autol+pcgrad", epochs=1))
    splits = read(tmp_path / "run/splits.json")
    for k, fold in enumerate(splits["folds"], start=1):
        name = f"fold {k}"
        assert seen[name] == {*fold["train"], *fold["validation"]}
        assert not seen[name] & set(fold["test"])
        assert seen[name, "lookahead"] == set(fold["lookahead"])
        assert not seen[name, "train"] & seen[name, "lookahead"]


def test_labels_of_the_test_part_do_not_change_its_predictions(run, tables, tmp_path):
    """Turn the labels of one test part round: its predictions must stay, bit for bit."""
    splits = read(run / "splits.json")
    turned = set(splits["folds"][0]["test"])
    with tables.clini.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    other = {"MSIH": "MSS", "MSS": "MSIH"}
    clini = write_table(
        tmp_path / "clini.csv",
        header,
        [[n, other[label] if n in turned else label, v] for n, label, v in rows],
    )
    out = tmp_path / "run"
    relabelled = replace(config_of(tables, out), clini=clini)
    cohort = replace(tables, clini=clini).load()
    splits["cohort_sha256"] = cohort.labels_sha256()
    out.mkdir()
    (out / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    run_crossval(relabelled)
    columns = ["PATIENT", "isMSIH_MSS", "LF_pred"]
    ours, theirs = (
        pd.read_csv(folder / "fold-1/predictions.csv", dtype=str)[columns] for folder in (out, run)
    )
    pd.testing.assert_frame_equal(ours, theirs)


def test_methods_share_splits(run, tables, tmp_path):
    config = config_of(tables, tmp_path / "baseline", balancer="baseline", seed=7)
    value = run_crossval(replace(config, splits=run / "splits.json")).to_json()
    assert value["splits_sha256"] == read(run / "metrics.json")["splits_sha256"]
    columns = pd.read_csv(tmp_path / "baseline/fold-1/predictions.csv").columns.tolist()
    assert columns == ["PATIENT", "isMSIH", "isMSIH_MSIH", "isMSIH_MSS", "pred"]
    assert set(value["metrics"]) == {"auroc", "auprc", "f1", "prevalence", "silhouette"}


def test_look_ahead_on_the_training_stream_is_offered(tables, tmp_path, monkeypatch):
    seen = []
    original = crossval.fit_fold

    def spy(*arguments, lookahead, **options):
        seen.append(({p.name for p in arguments[1]}, {p.name for p in lookahead}))
        return original(*arguments, lookahead=lookahead, **options)

    monkeypatch.setattr(crossval, "fit_fold", spy)
    config = config_of(tables, tmp_path / "run", balancer="autol", epochs=1)
    run_crossval(replace(config, lookahead_data="train"))
    assert all(train == ahead for train, ahead in seen)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"balancer": "pcgrad"}, "balancer: 'naive' -> 'pcgrad'"),
        ({"auxiliary": ()}, r"auxiliary: \['LF'\] -> \[\]"),
    ],
)
def test_a_folder_of_another_run_is_refused(run, tables, changes, words):
    with pytest.raises(UserError, match=f"`out` must be a new folder .* differs in {words}"):
        run_crossval(config_of(tables, run, **changes))


def test_a_folder_of_other_features_is_refused(tmp_path):
    tables = make_tables(tmp_path)
    config = config_of(tables, tmp_path / "run", epochs=1)
    run_crossval(config)
    write_bag(tables.features / "P00-1.h5", np.ones((3, 768)))
    with pytest.raises(UserError, match="differs in the content of tables or features"):
        run_crossval(config)


def test_splits_of_other_labels_are_refused(tables, run, tmp_path):
    other = make_tables(tmp_path / "other", patients=22)
    config = config_of(other, tmp_path / "run", splits=run / "splits.json")
    with pytest.raises(UserError, match="of the same patients and labels"):
        run_crossval(config)


def test_a_class_too_small_for_the_folds_is_told(tmp_path):
    tables = make_tables(tmp_path)
    with pytest.raises(UserError, match="at least 7 patients for 7 folds, but MSIH has 6"):
        run_crossval(config_of(tables, tmp_path / "run", folds=7))


def test_names_are_checked_before_anything_is_read(tables, tmp_path):
    config = replace(config_of(tables, tmp_path / "run"), clini=tmp_path / "none.csv")
    with pytest.raises(UserError, match="`balancer` must be baseline or"):
        run_crossval(replace(config, balancer="cagrat"))
    with pytest.raises(UserError, match="`device` must be"):
        run_crossval(replace(config, device="gpu"))


def test_columns_that_clash_are_told(tmp_path):
    tables = make_tables(tmp_path, extra={"isMSIH_MSS": [f"{i}.5" for i in range(12)]})
    config = config_of(tables, tmp_path / "run", auxiliary=("isMSIH_MSS",))
    with pytest.raises(UserError, match=r"different names, .* isMSIH_MSS"):
        run_crossval(config)


def test_several_auxiliary_targets_of_both_kinds(tmp_path):
    """Names that would break paths or module keys, three classes, and a primary one of three."""
    extra = {
        "a.b/c": [f"{i}.5" for i in range(15)],
        "kind": ["x", "y", ""] * 5,
        "grade": ["g1", "g2", "g3"] * 5,
    }
    tables = make_tables(tmp_path, patients=15, extra=extra)
    auxiliary = ("isMSIH", "a.b/c", "kind")
    out = tmp_path / "run"
    config = config_of(tables, out, target="grade", auxiliary=auxiliary, epochs=1)
    value = run_crossval(config).to_json()
    assert set(value["metrics"]) == {
        "auroc", "auprc", "f1", "prevalence", "silhouette",
        "auroc of g1", "auroc of g2", "auroc of g3", "auroc/isMSIH", "pearson/a.b/c", "auroc/kind",
    }  # fmt: skip
    table = pd.read_csv(tmp_path / "run/fold-1/predictions.csv", keep_default_na=False)
    assert table.columns.tolist() == prediction_columns(tables.load("grade", auxiliary).targets)
    assert set(table["kind_pred"]) <= {"x", "y"}
    assert (table["kind"] == "").any()


def test_the_log_tells_sizes_and_disjointness(caplog):
    with caplog.at_level("INFO"):
        crossval.log_fold(3, Fold(("a", "b"), ("c",), ("d",), ("a",)))
    assert "Fold 3: 2 patients to train, 1 to validate, 1 to test; no patient in two" in caplog.text


def test_the_ledger_of_the_run_has_every_patient_and_slide(run):
    with (run / "ledger.csv").open(encoding="utf-8", newline="") as file:
        items = [row["item"] for row in csv.DictReader(file)]
    assert (items.count("patient"), items.count("slide")) == (20, 20)


def test_intervals_hold_the_mean_and_the_threshold_is_the_validation_parts(run):
    value = read(run / "metrics.json")
    for name in ("auroc", "auprc", "f1", "silhouette", "pearson/LF"):
        low, high = value["metrics"][name]["ci95_over_patients"]
        assert low <= value["metrics"][name]["mean"] <= high, name
    for k, threshold in enumerate(value["thresholds"], start=1):
        table = pd.read_csv(run / f"fold-{k}/validation.csv")
        assert set(table["PATIENT"]) == set(read(run / "splits.json")["folds"][k - 1]["validation"])
        if threshold is not None:
            assert threshold in table["isMSIH_MSS"].tolist()


def test_training_only_patients_are_in_every_training_part_and_no_other(
    tables, tmp_path, monkeypatch
):
    with tables.clini.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    unlabelled = [["P90", "", "0.5"], ["P91", "", "0.1"]]
    clini = write_table(tmp_path / "clini.csv", header, [*rows, *unlabelled])
    with tables.slides.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    slides = write_table(tmp_path / "slides.csv", header, [*rows, ["P90", "P90"], ["P91", "P91"]])
    features = tmp_path / "features"
    shutil.copytree(tables.features, features)
    for tiles, name in enumerate(("P90", "P91"), start=2):
        write_bag(features / f"{name}.h5", np.ones((tiles, 768)))
    seen = []
    original = crossval.fit_fold

    def spy(cohort, train, validation, config, **options):
        names = {p.name for p in train}
        seen.append((config.balancer, names >= {"P90", "P91"}, names.isdisjoint({"P90", "P91"})))
        assert {p.name for p in (*validation, *options["lookahead"])}.isdisjoint({"P90", "P91"})
        return original(cohort, train, validation, config, **options)

    monkeypatch.setattr(crossval, "fit_fold", spy)
    changed = replace(tables, clini=clini, slides=slides, features=features)
    for balancer in ("autol", "baseline"):
        out = tmp_path / balancer
        value = run_crossval(config_of(changed, out, balancer=balancer, epochs=1))
        assert value.training_only == (0 if balancer == "baseline" else 2)
        tested = pd.concat([pd.read_csv(out / f"fold-{k}/predictions.csv") for k in (1, 2)])
        assert len(tested) == 20
        assert not {"P90", "P91"} & set(tested["PATIENT"])
    assert seen == [("autol", True, False)] * 2 + [("baseline", False, True)] * 2


@pytest.mark.parametrize(
    ("balancer", "ahead"), [("naive", "heldout"), ("autol", "heldout"), ("autol", "train")]
)
def test_nobody_of_a_site_that_is_held_out_trains(tmp_path, monkeypatch, balancer, ahead):
    """Neither with a label nor without one: P00 and P01 have none, and are of two sites."""
    sites = [f"S{i // 2 % 6}" for i in range(36)]
    made = make_tables(tmp_path / "c", patients=36, extra={"SITE": sites})
    with made.clini.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    for row in (rows[0], rows[3]):
        row[1:3] = "", "0.5"
    write_table(made.clini, header, rows)
    site = {row[0]: row[3] for row in rows}
    assert site["P00"] != site["P03"]
    trained = []

    class StoppedError(Exception):
        pass

    def spy(cohort, train, validation, config, *, lookahead, **_):
        inside, held = ({p.name for p in part} for part in (train, (*validation, *lookahead)))
        if ahead == "train":
            held = {p.name for p in validation}
        assert {site[name] for name in inside}.isdisjoint(site[name] for name in held)
        trained.append({p.name for p in (*train, *lookahead)})
        assert {p.site for p in cohort.training_only} == {site["P00"], site["P03"]}
        raise StoppedError

    monkeypatch.setattr(crossval, "fit_fold", spy)
    options = {"balancer": balancer, "lookahead_data": ahead, "group_column": "SITE", "folds": 3}
    config = config_of(made, tmp_path / "run", **options)
    plan = crossval.make_plan(config, crossval.load_cohort_of(config))
    for k, fold in enumerate(plan.folds, start=1):
        with pytest.raises(StoppedError):
            crossval.run_fold(plan, k, BagStore())
        assert {site[name] for name in trained[-1]}.isdisjoint(site[name] for name in fold.test)
    for name in ("P00", "P03"):
        where = [
            {site[other] for other in part}
            for fold in plan.folds
            for part in (set(fold.train) - set(fold.lookahead if plan.lookahead else ()),)
        ]
        if ahead == "heldout":
            assert [name in each for each in trained] == [site[name] in each for each in where]
    assert read_toml(tmp_path / "run/config.toml")["crossval"]["group_column"] == "SITE"


def test_a_run_is_not_taken_up_with_other_sites(tmp_path):
    made = make_tables(tmp_path / "c", patients=20, extra={"SITE": [*"aabbccddaabbccddabcd"]})
    config = config_of(made, tmp_path / "run", group_column="SITE", folds=2)
    crossval.make_plan(config, crossval.load_cohort_of(config))
    plain = replace(config, group_column=None)
    with pytest.raises(UserError, match="differs in group_column: 'SITE' -> None"):
        crossval.make_plan(plain, crossval.load_cohort_of(plain))
    with made.clini.open(encoding="utf-8", newline="") as file:
        header, first, *rows = csv.reader(file)
    write_table(made.clini, header, [[*first[:3], "e"], *rows])
    with pytest.raises(UserError, match="differs in the content of tables or features"):
        crossval.make_plan(config, crossval.load_cohort_of(config))


def test_looking_ahead_needs_two_sites_to_train_on(tmp_path):
    made = make_tables(tmp_path / "c", patients=30, extra={"SITE": [*"aabbcc"] * 5})
    config = config_of(made, tmp_path / "run", group_column="SITE", folds=3, balancer="autol")
    cohort = crossval.load_cohort_of(config)
    with pytest.raises(UserError, match=r"`autol` must look ahead on sites .* --lookahead-data"):
        crossval.make_plan(config, cohort)
    for change in ({"balancer": "naive"}, {"lookahead_data": "train"}):
        other = replace(config, out=tmp_path / "-".join(change.values()), **change)
        assert len(crossval.make_plan(other, cohort).folds) == 3


def test_the_reference_protocol_knows_no_sites(tables, tmp_path):
    config = config_of(tables, tmp_path / "run", reference_protocol=True, group_column="LF2")
    with pytest.raises(UserError, match="`group-column` must not be given with it"):
        run_crossval(config)


def test_the_reference_protocol_is_resolved_and_saved(tables, tmp_path):
    out = tmp_path / "run"
    config = config_of(tables, out, reference_protocol=True, epochs=1)
    run_crossval(config)
    stored = read_toml(out / "config.toml")["crossval"]
    assert stored["complete_cases"] is True
    assert (stored["patience"], stored["schedule"]) == (8, "cosine-per-step")
    assert (
        len(read(out / "splits.json")["folds"][0]["test"])
        + len(read(out / "splits.json")["folds"][1]["test"])
        == 19
    )  # P03 lacks LF
    run_crossval(config)  # taken up: the same settings
    baseline = config_module.with_reference_protocol(replace(config, balancer="baseline"))
    assert baseline.schedule == "constant"


def test_the_size_of_the_network_is_a_setting_and_read_back(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "JointTransformer", JointTransformer)
    config = config_of(tables, tmp_path / "run", epochs=1, width=12, layers=3)
    assert run_crossval(config).width == 12
    fitted, _ = read_model(tmp_path / "run/fold-1/model.pt", "cpu")
    assert fitted.model.projector[0].out_features == 12
    assert len(fitted.model.encoder.layers) == len(fitted.model.decoder.layers) == 3
    assert fitted.model.encoder.layers[0].linear1.out_features == 24
    with pytest.raises(UserError, match=r"width: 12 -> 18"):
        run_crossval(config_of(tables, tmp_path / "run", epochs=1, width=18, layers=3))
