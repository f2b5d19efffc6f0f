import base64
import csv
import html
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from examples.pathology.cli import main
from examples.pathology.common.errors import UserError
from examples.pathology.report.report import CAUTION, REMARKS, write_report
from examples.pathology.results.decisions import decisions
from examples.pathology.results.resampling import compare_auroc
from examples.pathology.results.runs import read_run
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.training import model
from examples.pathology.training.model import JointTransformer
from tests.pathology.parsing import sources_of
from tests.pathology.tiny import make_tables, write_bag

NOTE = "SYNTHETIC <features> & labels"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs on the same splits; one patient has no features, one file nobody claims."""
    folder = tmp_path_factory.mktemp("report")
    tables = make_tables(folder, patients=16)
    (tables.features / "P05-1.h5").unlink()
    write_bag(tables.features / "nobody.h5", np.ones((1, 768)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model,
            "JointTransformer",
            lambda outputs, in_features, **_: JointTransformer(
                outputs, in_features=in_features, layers=1, d_model=8, heads=2, feedforward=8
            ),
        )
        for method in ("naive", "baseline"):
            run_crossval(
                CrossvalConfig(
                    tables.clini,
                    tables.slides,
                    tables.features,
                    "isMSIH",
                    folder / "runs" / method,
                    auxiliary=("LF",),
                    balancer=method,
                    folds=2,
                    epochs=1,
                    note=NOTE,
                    device="cpu",
                )
            )
    return folder / "runs"


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_report([runs], tmp_path_factory.mktemp("out"), preface="A <preface>.")


def text_of(page):
    return page.read_text(encoding="utf-8")


def copy_of(runs, tmp_path, change, name="naive"):
    """Copy the runs with another metrics.json in one of them."""
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / name / "metrics.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return tmp_path / "runs"


def test_the_page_stands_alone(page):
    sources = sources_of(text_of(page))
    # Comparisons; calibration; naive; the baseline, which has no LF.
    assert len(sources) == 2 + 1 + 6 + 4
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_the_table_has_a_row_per_method_with_mean_and_spread(page, runs):
    table = (page.parent / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[0].startswith(
        "| Method | AUROC | AUPRC | F1 | Silhouette of [cls] | Pearson r, LF |"
    )
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| baseline", "| naive"]
    assert table[2].endswith("| – |")  # the baseline predicts no LF
    value = json.loads((runs / "naive/metrics.json").read_text(encoding="utf-8"))
    auroc = value["metrics"]["auroc"]
    low, high = auroc["ci95_over_patients"]
    cell = f"{auroc['mean']:.3f} ± {auroc['sd']:.3f} [{low:.3f}, {high:.3f}]"
    assert f"| {cell} |" in table[3]
    assert f"<td>{cell}</td>" in text_of(page).replace("\N{NO-BREAK SPACE}", " ")


def test_the_csv_holds_every_number(page, runs):
    with (page.parent / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    value = json.loads((runs / "baseline/metrics.json").read_text(encoding="utf-8"))
    row = rows["baseline", "auroc"]
    assert float(row["mean"]) == value["metrics"]["auroc"]["mean"]
    low, high = value["metrics"]["auroc"]["ci95_over_folds"]
    assert (float(row["ci95_low_over_folds"]), float(row["ci95_high_over_folds"])) == (low, high)
    low, high = value["metrics"]["auroc"]["ci95_over_patients"]
    assert float(row["ci95_low_over_patients"]) == low
    assert float(row["ci95_high_over_patients"]) == high
    assert len(row["folds"].split()) == 2
    assert ("baseline", "pearson/LF") not in rows
    assert ("naive", "prevalence") in rows


def test_it_says_what_it_is_made_of_and_what_it_cannot_say(page):
    text = text_of(page)
    assert "<p class='warning'>SYNTHETIC &lt;features&gt; &amp; labels.</p>" in text
    assert "A &lt;preface&gt;." in text
    assert CAUTION.format(remark=REMARKS["classification"]) in text
    assert "naive minus baseline, AUROC fold by fold" in text


def test_it_shows_the_worst_errors_of_every_run(page, runs):
    written = pd.read_csv(page.parent / "patients.csv").groupby("run", sort=False)
    assert list(written.groups) == ["baseline", "naive"]
    for name, table in written:
        tested = [pd.read_csv(path) for path in sorted(runs.glob(f"{name}/fold-*/predictions.csv"))]
        folds = {patient: k for k, fold in enumerate(tested, 1) for patient in fold["PATIENT"]}
        assert dict(zip(table["PATIENT"], table["fold"], strict=True)) == folds
        assert (table["slides"] == table["PATIENT"] + "-1").all()
        part = text_of(page).partition(f"<summary><b>{name}</b>")[2].partition("</details>")[0]
        assert part.count("<figcaption>") == 12  # of 15
        patient = table["PATIENT"].iloc[0]
        assert f"<b>1. {patient}</b>, fold {folds[patient]}</div>" in part
        assert f"<figcaption>{patient}-1</figcaption>" in part


def test_it_lists_who_was_left_out(page):
    text = text_of(page)
    for expected in (
        "<li>16 in the clinical table</li>",
        "<li>15 and usable features: used</li>",
        "<li>1 × slide: no feature file</li>",
        "<li>1 × feature file: not in the slide table</li>",
    ):
        assert expected in text


def test_decisions_are_those_of_the_runs_and_stand_on_the_page(page, runs):
    table = pd.read_csv(page.parent / "decisions.csv")
    for name in ("baseline", "naive"):
        run = read_run(runs / name)
        expected = decisions(run, 0.95)
        ours = table[table["method"] == name]
        assert ours["figure"].tolist() == expected["figure"].tolist()
        assert ours["value"].tolist() == pytest.approx(
            list(expected["value"].astype(float)), nan_ok=True
        )
        known = ["none" if t is None else f"{t:.6g}" for t in run.summary.thresholds]
        assert ours["thresholds"].iloc[0].split() == known
        row = ours[(ours["rule"] == "best F1") & (ours["figure"] == "specificity")].iloc[0]
        cell = f"{row['value']:.2f} [{row['ci95_low']:.2f}, {row['ci95_high']:.2f}]"
        assert f"<td>{cell}</td>" in text_of(page).replace("\N{NO-BREAK SPACE}", " ")
    bins = pd.read_csv(page.parent / "calibration.csv")
    assert bins.groupby("method")["patients"].sum().tolist() == [15, 15]


def test_the_sensitivity_is_asked_for_and_needs_the_validation_part(runs, tmp_path):
    run, tables = shutil.copytree(runs / "naive", tmp_path / "naive"), []
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["report", "--run", str(run), "--sensitivity", "0.6"])
        table = pd.read_csv(run / "report/decisions.csv", dtype=str, keep_default_na=False)
        tables.append(table.set_index(["rule", "figure"])[["thresholds", "undefined"]])
        for part in run.glob("fold-*/validation.csv"):
            part.unlink()
    with_it, without = tables
    assert (with_it.loc["best F1"] == without.loc["best F1"]).all().all()  # it is in fold.json
    rows = [each.loc[("sensitivity 60 %", "sensitivity")] for each in tables]
    assert rows[0]["thresholds"] != "none none"
    assert rows[1].tolist() == ["none none", "nobody is judged"]
    assert "undefined: nobody is judged" in text_of(run / "report/index.html")


def test_one_run_goes_into_its_own_folder(runs, tmp_path):
    shutil.copytree(runs / "naive", tmp_path / "naive")
    page = write_report([tmp_path / "naive"])
    assert page == tmp_path / "naive/report/index.html"
    assert text_of(page).count("<img") == 7


def test_random_weights_are_said(runs, tmp_path):
    folder = copy_of(runs, tmp_path, lambda value: value.update(random_weights=True))
    assert "RANDOM weights and carry no biology" in text_of(write_report([folder]))


def test_runs_on_other_splits_are_marked_and_not_paired(runs, tmp_path):
    folder = copy_of(runs, tmp_path, lambda value: value.update(splits_sha256="other"))
    text = text_of(write_report([folder]))
    assert "made on different splits" in text
    assert "naive minus baseline" not in text


def test_what_is_not_defined_is_shown_with_its_reason(runs, tmp_path):
    def lose(value):
        value["metrics"]["auroc"].update(
            folds=[None, None], mean=None, sd=None, undefined={"1": "one class only"}
        )

    folder = copy_of(runs, tmp_path, lose)
    assert "undefined: one class only" in text_of(write_report([folder]))


def test_two_runs_of_a_method_keep_apart(runs, tmp_path):
    folder = copy_of(runs, tmp_path, lambda value: value.update(method="baseline"))
    text = text_of(write_report([folder]))
    assert re.findall(r"<tr><th>(baseline \(\w+\))</th><td>\d", text) == [
        "baseline (baseline)",
        "baseline (naive)",
    ]


def test_methods_are_tested_against_the_baseline_patient_by_patient(runs, page, tmp_path):
    """Whatever the order of rows: the test pairs patients by name."""
    folds = []
    for k in (1, 2):
        ours, theirs = (
            pd.read_csv(runs / name / f"fold-{k}/predictions.csv").set_index("PATIENT")
            for name in ("naive", "baseline")
        )
        truth = (ours["isMSIH"] == "MSS").to_numpy()
        score = theirs["isMSIH_MSS"].reindex(ours.index)
        folds.append((truth, ours["isMSIH_MSS"].to_numpy(), score.to_numpy()))
    test = compare_auroc(folds)
    words = "DeLong's test over the same test patients, the trained models taken as they are"
    expected = f"{words}: {test.low:+.3f} to {test.high:+.3f}, p = {test.p:.3f}."
    assert expected in html.unescape(text_of(page))
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs/naive/fold-1/predictions.csv"
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([head, *reversed(rows)]) + "\n", encoding="utf-8")
    assert expected in html.unescape(text_of(write_report([tmp_path / "runs"])))


def test_runs_of_different_targets_are_refused(runs, tmp_path):
    folder = copy_of(runs, tmp_path, lambda value: value.update(target="other"))
    with pytest.raises(UserError, match=r"same target, but .* has 'isMSIH' and .* has 'other'"):
        write_report([folder])


def test_an_unfinished_run_is_named_and_left_out(runs, tmp_path, caplog):
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs/naive/metrics.json").unlink()
    text = text_of(write_report([tmp_path / "runs"]))
    assert "naive is not finished and is left out." in text
    assert "naive is not finished" in caplog.text
    (tmp_path / "runs/baseline/metrics.json").unlink()
    with pytest.raises(UserError, match=r"must hold a finished run, but .* is not finished"):
        write_report([tmp_path / "runs"])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be a run folder or a folder of them"):
        write_report([tmp_path])
