"""The benchmark with real worker processes: same numbers wherever and however often jobs run."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from examples.pathology.common.errors import RunError, UserError
from examples.pathology.common.toml import read_toml
from examples.pathology.jobs.cluster import cluster
from examples.pathology.results.metrics import Metric
from examples.pathology.runs.crossval import run_crossval, run_fold
from examples.pathology.settings.benchmark import METHODS as ALL_METHODS
from examples.pathology.settings.benchmark import BenchmarkConfig
from examples.pathology.settings.crossval import BASELINE, CrossvalConfig
from examples.pathology.study import benchmark
from examples.pathology.study.benchmark import run_benchmark
from examples.pathology.study.folder import read_jobs, read_study
from examples.pathology.training.bags import BagStore
from examples.pathology.training.learner import Learner
from mtbalance import PAPER_COMBINATIONS
from tests.pathology.tiny import make_tables

METHODS = ("baseline", "naive", "uncert+graddrop")
# What a run computes, and not when or where.
RESULTS = ("splits.json", "predictions.csv", "validation.csv", "embeddings.npy", "table1.csv")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    values = [round(0.1 * (7 * i % 11), 2) for i in range(16)]
    return make_tables(folder, patients=16, tiles=3, extra={"Prolif/A": values})


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("other"), patients=8, tiles=3, seed=1)


def config_of(tables, out, **changes) -> BenchmarkConfig:
    names = set(CrossvalConfig.__dataclass_fields__)
    common = CrossvalConfig(
        tables.clini,
        tables.slides,
        tables.features,
        changes.pop("target", "isMSIH"),
        out=out,
        **{
            "folds": 2,
            "epochs": 2,
            "learning_rate": 3e-3,
            "width": 6,
            "layers": 1,
            "device": "cpu",
            **{k: changes.pop(k) for k in list(changes) if k in names - {"auxiliary", "kind"}},
        },
    )
    values = {"auxiliary": ("LF", "Prolif/A"), "methods": METHODS, "workers": 2, **changes}
    return BenchmarkConfig(crossval=common, **values)


def external_of(clini, slide_table, features):
    return {
        "external_clini": clini,
        "external_slide_table": slide_table,
        "external_features": features,
    }


@pytest.fixture(scope="module", autouse=True)
def workers(forked_workers):
    """Two workers for all tests of this module: starting them takes most of the time."""
    with cluster(workers=2, devices=("cpu",)) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "cluster", lambda **_: nullcontext(client))
        yield client


@pytest.fixture(scope="module")
def study(tables, other, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "all"
    external = external_of(other.clini, other.slides, other.features)
    config = config_of(tables, out, **external)
    page, missing = run_benchmark(config)
    assert missing == 0
    assert page == out / "report/index.html"
    return config


@pytest.mark.parametrize("cutoff", [None, 0.5])
def test_a_number_is_a_target_with_and_without_a_cutoff(tables, tmp_path, cutoff):
    values = [round(0.1 * (5 * i % 11), 2) for i in range(8)]  # the external table's are numbers
    other = make_tables(tmp_path / "other", patients=8, tiles=3, seed=1, extra={"Prolif/A": values})
    kind = () if cutoff else ("Prolif/A=regression",)
    about = {"target": "Prolif/A", "cutoff": cutoff, "kind": kind, "epochs": 1}
    few = {"auxiliary": ("LF",), "methods": ("baseline", "naive")}
    external = external_of(other.clini, other.slides, other.features)
    page, missing = run_benchmark(config_of(tables, tmp_path / "study", **about, **few, **external))
    assert missing == 0
    differences = pd.read_csv(page.parent / "differences.csv")
    compared = set(differences["metric"])
    predicted = pd.read_csv(tmp_path / "study/external/lf/naive/predictions.csv")
    ensemble = read_study(tmp_path / "study").panels[0].deployed["naive"].ensemble.metrics
    if cutoff is None:
        assert compared == {"pearson", "mae", "spearman"}
        assert list(predicted["Prolif/A"]) == values
        expected, found = predicted["Prolif/A_pred"] - values, ensemble[Metric("mae")]
        assert found.mean == pytest.approx(expected.abs().mean())
    else:
        assert compared == {"auroc", "auprc", "silhouette", "brier", "calibration"}
        positive = np.array(values) >= cutoff
        assert list(predicted["Prolif/A"]) == [">=0.5" if p else "<0.5" for p in positive]
        expected = roc_auc_score(positive, predicted["Prolif/A_>=0.5"])
        assert ensemble[Metric("auroc")].mean == pytest.approx(expected)
    outside = differences[differences["cohort"] == "external"]
    assert set(outside["metric"]) == compared - {"silhouette"}
    assert (outside["folds"] == 1).all()


def test_auxiliary_figures_of_all_seeds_are_in_the_tables(tables, tmp_path):
    values = {"Prolif/A": [round(0.1 * (5 * i % 11), 2) for i in range(8)]}
    other = make_tables(tmp_path / "other", patients=8, tiles=3, seed=1, extra=values)
    out, about = tmp_path / "study", {"target": "LF", "cutoff": 0.5, "epochs": 1, "seeds": 2}
    external = external_of(other.clini, other.slides, other.features)
    few = {"auxiliary": ("isMSIH", "Prolif/A"), "methods": ("naive",)}
    page, missing = run_benchmark(config_of(tables, out, **about, **few, **external))
    assert missing == 0
    rows = pd.read_csv(page.parent / "table2.csv").set_index(["auxiliary", "cohort", "metric"])
    for auxiliary, place, figure in (
        ("isMSIH", "ismsih", "auroc"),
        ("Prolif/A", "prolif-a", "pearson"),
    ):
        for cohort, folder, part in (
            ("internal", "runs", "metrics"),
            ("external, ensemble", "external", "metrics_of_ensemble"),
            ("external, mean of folds", "external", "metrics"),
        ):
            stored = [
                json.loads((out / each / place / "naive/metrics.json").read_text())[part]
                for each in (folder, f"{folder}-2")
            ]
            name = f"{figure}/{auxiliary}"
            row, means = rows.loc[auxiliary, cohort, name], [each[name]["mean"] for each in stored]
            assert row["seeds"] == 2
            assert row["mean"] == pytest.approx(np.mean(means))


@contextmanager
def torch_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def results(out, folder="runs"):
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted((out / folder).rglob("*"))
        if path.name in RESULTS
    }


def test_every_method_runs_on_every_target_and_the_baseline_once(study):
    out = study.crossval.out
    runs = {
        p.parent.relative_to(out / "runs").as_posix() for p in out.rglob("runs/**/metrics.json")
    }
    assert runs == {
        "baseline",
        *(f"{target}/{m}" for target in ("lf", "prolif-a") for m in METHODS[1:]),
    }
    read = read_study(out)
    assert [panel.auxiliary for panel in read.panels] == ["LF", "Prolif/A"]
    for panel in read.panels:
        assert tuple(panel.runs) == tuple(panel.deployed) == METHODS
        assert panel.runs["naive"].summary.targets[1].name == panel.auxiliary
    assert {job.status for job in read.jobs} == {"done"}
    assert len(read.jobs) == 5 * (2 + 1 + 1)  # folds, results, deployment
    assert read.settings["methods"] == list(METHODS)
    assert read.provenance["processors"] == os.cpu_count()


def test_all_runs_have_the_same_splits(study):
    files = results(study.crossval.out)
    splits = {content for name, content in files.items() if name.endswith("splits.json")}
    assert len(splits) == 1


def test_a_run_of_it_is_the_run_that_crossval_makes(study, tmp_path):
    alone = replace(
        study.crossval, out=tmp_path / "runs", auxiliary=("Prolif/A",), balancer=METHODS[2]
    )
    with torch_threads(1):  # as in a job
        run_crossval(alone)
    ours = results(study.crossval.out, f"runs/prolif-a/{METHODS[2]}").values()
    assert list(results(tmp_path).values()) == list(ours)


def test_one_worker_gives_what_two_give(study, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "cluster", cluster)
    config = replace(
        study,
        crossval=replace(study.crossval, out=tmp_path / "study"),
        workers=1,
    )
    assert run_benchmark(config)[1] == 0
    assert results(tmp_path / "study") == results(study.crossval.out)
    assert results(tmp_path / "study", "external") == results(study.crossval.out, "external")


def test_a_finished_one_is_not_run_again(study, monkeypatch):
    monkeypatch.setattr(benchmark, "cluster", None)  # no worker is started for nothing
    out = study.crossval.out
    times = {p: p.stat().st_mtime_ns for p in out.rglob("predictions.csv")}
    assert len(times) == 5 * (3 + 3)  # test folds and all of them; external ones and their mean
    assert run_benchmark(study)[1] == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("predictions.csv")} == times


def test_other_external_tables_are_deployed_on_anew(study, tables):
    out = study.crossval.out
    kept = results(out)
    before = results(out, "external")
    here = external_of(tables.clini, tables.slides, tables.features)
    assert run_benchmark(replace(study, **here))[1] == 0
    assert results(out) == kept
    assert not set(before.values()) & set(results(out, "external").values())


def test_kill_9_of_a_worker_loses_nothing(tables, tmp_path, workers):
    quiet = config_of(tables, tmp_path / "quiet", epochs=20, patience=20, auxiliary=("LF",))
    assert run_benchmark(quiet)[1] == 0
    disturbed = replace(quiet, crossval=replace(quiet.crossval, out=tmp_path / "disturbed"))
    killed, pids = [], list(workers.run(os.getpid).values())

    def kill_a_worker_that_trains():
        while not killed:
            for _ in disturbed.crossval.out.rglob("checkpoint.pt"):
                if not killed:
                    os.kill(pids[0], signal.SIGKILL)
                    killed.append(pids[0])
            time.sleep(0.01)

    hunter = threading.Thread(target=kill_a_worker_that_trains, daemon=True)
    hunter.start()
    assert run_benchmark(disturbed)[1] == 0
    hunter.join(5)
    assert killed
    assert max(job.attempts for job in read_jobs(tmp_path / "disturbed/jobs.csv")) > 1
    assert results(tmp_path / "disturbed") == results(tmp_path / "quiet")
    assert results(tmp_path / "disturbed", "report") == results(tmp_path / "quiet", "report")


def test_a_job_that_fails_is_a_row_and_the_others_go_on(tables, tmp_path, caplog):
    config = config_of(tables, tmp_path / "study", auxiliary=("LF",), epochs=1)
    in_the_way = tmp_path / "study/runs/lf/naive/fold-2/predictions.csv/x"
    in_the_way.mkdir(parents=True)
    page, missing = run_benchmark(config)
    assert missing == 2
    rows = {row.key: row for row in read_jobs(tmp_path / "study/jobs.csv")}
    assert rows["lf/naive/fold-2"].status == "failed"
    assert "predictions.csv" in rows["lf/naive/fold-2"].error
    assert rows["lf/naive/results"].status == "skipped"
    assert rows["lf/uncert+graddrop/results"].status == "done"
    assert "lf/naive/fold-2 failed" in caplog.text
    assert "lf/naive/fold-2" in page.read_text(encoding="utf-8")
    log = (tmp_path / "study/logs/lf.naive.fold-2.log").read_text(encoding="utf-8")
    assert "Traceback" in log
    in_the_way.rmdir()
    in_the_way.parent.rmdir()
    assert run_benchmark(config)[1] == 0


def test_nothing_finished_is_an_error(tables, tmp_path):
    config = config_of(tables, tmp_path / "study", auxiliary=("LF",), learning_rate=1e30)
    with pytest.raises(RunError, match=r"none is: baseline/fold-1: fold 1, epoch"):
        run_benchmark(config)


def test_complete_cases_have_a_baseline_of_their_own(tables, tmp_path):
    config = config_of(tables, tmp_path / "study", complete_cases=True)
    plans = benchmark.make_plans(config)
    assert [place.key for place in plans] == [
        f"{target}/{method}" for target in ("lf", "prolif-a") for method in METHODS
    ]
    sizes = [len(plan.cohort.patients) for plan in plans.values()]
    assert sizes == [15] * 3 + [16] * 3  # one patient has no LF


def test_a_kind_is_told_to_the_runs_that_have_the_target(tables, tmp_path):
    kind = ("isMSIH=classification", "Prolif/A=regression")
    config = config_of(tables, tmp_path / "study", kind=kind)
    told = {place.key: p.config.kind for place, p in benchmark.make_plans(config).items()}
    assert told["baseline"] == told["lf/naive"] == kind[:1]
    assert told["prolif-a/naive"] == kind


def test_every_seed_has_the_same_folds_and_weights_of_its_own(tables, tmp_path):
    config = config_of(tables, tmp_path / "study", seed=5)
    alone, of_three = benchmark.make_plans(config), benchmark.make_plans(replace(config, seeds=3))
    assert [*of_three][: len(alone)] == [*alone]  # more seeds repeat nothing
    assert len(of_three) == 3 * len(alone)
    for place, plan in of_three.items():
        first = alone[replace(place, repeat=0)]
        assert plan.folds == first.folds
        assert plan.config.seed == 5 + place.repeat
        assert plan.config.out == tmp_path / "study" / place.under("runs")
        assert replace(plan.config, seed=5, out=first.config.out, splits=None) == replace(
            first.config, splits=None
        )
    keys = [job.key for job in benchmark.make_jobs(replace(config, seeds=3), of_three)]
    assert len(set(keys)) == len(keys)
    assert "runs-3/lf/naive/fold-1" in keys


def test_the_reference_protocol_steps_the_schedule_for_several_targets_alone(tables, tmp_path):
    config = config_of(tables, tmp_path / "study", reference_protocol=True)
    schedules = {
        p.config.balancer: p.config.schedule for p in benchmark.make_plans(config).values()
    }
    assert schedules == {
        "baseline": "constant",
        "naive": "cosine-per-step",
        "uncert+graddrop": "cosine-per-step",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auxiliary": ()}, "`auxiliary` must name at least one target"),
        ({"auxiliary": ("LF", "LF")}, "`auxiliary` must name each once, but got LF twice."),
        ({"auxiliary": ("A b", "a-b")}, "must have a folder of its own, but A b, a-b would not"),
        ({"auxiliary": ("Baseline",)}, "must have a folder of its own"),
        ({"methods": ()}, "`methods` must name at least one method"),
        ({"methods": ("naive", "naive")}, "`methods` must name each once"),
        (
            {"scheduler": "tcp://127.0.0.1:1"},
            "`workers` and `scheduler` must not be given together",
        ),
        ({"workers": 0}, "`workers` must be at least 1, but got 0."),
        ({"kind": ("LFF=regression",)}, "`kind` must be NAME="),
    ],
)
def test_wrong_settings_are_told(tables, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        config_of(tables, tmp_path / "study", **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("naive", "pcgrd")}, "pcgrad"),
        ({"device": "cuda:77"}, "cuda"),
        ({"auxiliary": ("LFF",)}, "LFF"),
    ],
)
def test_wrong_names_are_told_before_a_worker_starts(tables, tmp_path, changes, words, monkeypatch):
    monkeypatch.setattr(benchmark, "cluster", None)
    config = config_of(tables, tmp_path / "study")
    if "device" in changes:
        config = replace(config, crossval=replace(config.crossval, **changes))
    else:
        config = replace(config, **changes)
    with pytest.raises(UserError) as caught:
        run_benchmark(config)
    assert words in str(caught.value)


def test_an_external_cohort_is_named_in_full(tables, tmp_path):
    assert config_of(tables, tmp_path / "study").external is None
    with pytest.raises(UserError, match="must be given together"):
        config_of(tables, tmp_path / "study", **external_of(tmp_path, None, tmp_path))


def test_all_methods_are_those_of_the_paper():
    assert (BASELINE, *PAPER_COMBINATIONS) == ALL_METHODS


def test_devices_are_shared_out_and_jobs_see_their_own(tables, tmp_path):
    config = config_of(tables, tmp_path / "study")
    for device, shared, own in (
        ("auto", (), "auto"),
        ("cpu", ("cpu",), "cpu"),
        ("cuda:0, cuda:1", ("cuda:0", "cuda:1"), "cuda"),
    ):
        on = replace(config, crossval=replace(config.crossval, device=device))
        assert (on.devices, on.job_device) == (shared, own)


def test_paths_reach_the_workers_whole(study, monkeypatch):
    out = study.crossval.out
    monkeypatch.chdir(out.parent)
    names = ("clini", "slide_table", "features")
    config = replace(
        study,
        crossval=replace(
            study.crossval,
            out=Path(out.name),
            **{name: Path(os.path.relpath(getattr(study.crossval, name))) for name in names},
        ),
        **external_of(*(Path(os.path.relpath(getattr(study.external, name))) for name in names)),
    )
    plans = benchmark.make_plans(config)
    for job in benchmark.make_jobs(config, plans):
        about, *_, log = job.arguments
        assert log.is_absolute()
        settings = getattr(about, "config", about)
        for value in vars(settings).values():
            assert not isinstance(value, Path) or value.is_absolute()
        if settings is not about:
            assert all(path.is_absolute() for p in about.cohort.patients for path in p.files)


def test_settings_can_be_read_back(study):
    stored = read_toml(study.crossval.out / "study.toml")["benchmark"]
    assert stored["auxiliary"] == ["LF", "Prolif/A"]
    assert stored["width"] == 6
    assert stored["seed"] == 0
    assert "balancer" not in stored


def test_a_worker_that_stays_reads_new_features_of_the_same_name(tmp_path):
    tables = make_tables(tmp_path / "cohort", tiles=3)

    def predictions(name, job):
        config = config_of(tables, tmp_path / name, auxiliary=("LF",), methods=("naive",))
        (plan,) = benchmark.make_plans(config).values()
        job(plan)
        return (plan.folder(1) / "predictions.csv").read_bytes()

    def as_job(plan):
        benchmark.fold_job(plan, 1, tmp_path / "log")

    first = predictions("first", as_job)
    make_tables(tmp_path / "cohort", tiles=3, seed=1)  # other features in the same files
    second = predictions("second", as_job)
    assert second != first
    assert second == predictions("anew", lambda plan: run_fold(plan, 1, BagStore()))


class StopError(Exception):
    """Ends a run on purpose."""


def test_all_methods_start_from_the_same_weights(tables, tmp_path, monkeypatch):
    trunks = {}

    def note(learner, *_):
        shared = [p for module in learner.model.shared_modules() for p in module.parameters()]
        trunks[learner.config.balancer] = [p.detach().clone() for p in shared]
        raise StopError

    monkeypatch.setattr(Learner, "train_epoch", note)
    config = config_of(tables, tmp_path / "study", auxiliary=("LF",))
    for plan in benchmark.make_plans(config).values():
        with pytest.raises(StopError):
            run_fold(plan, 1, BagStore())
    first, *rest = trunks.values()
    assert set(trunks) == set(METHODS)
    assert all((a == b).all() for other in rest for a, b in zip(first, other, strict=True))
