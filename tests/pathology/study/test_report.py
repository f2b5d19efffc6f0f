"""Benchmarks with a planted truth: what is there is found, and what is not there is not."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss, roc_auc_score

from examples.pathology import cli
from examples.pathology.common.errors import UserError
from examples.pathology.figures.sheet import Sheet
from examples.pathology.figures.study import (
    Column,
    Estimate,
    conflicts,
    dots,
    mean_over_folds,
    weights_over_time,
)
from examples.pathology.report import pages
from examples.pathology.results.metrics import Metric
from examples.pathology.results.summary import MetricSummary
from examples.pathology.settings.runs import PageConfig
from examples.pathology.study import report as study_report
from examples.pathology.study.criteria import CRITERIA
from examples.pathology.study.differences import Difference, all_differences
from examples.pathology.study.folder import read_study
from examples.pathology.study.report import conflict_rates, write_study_report
from examples.pathology.study.tables import costs, study_rows
from examples.pathology.study.verdicts import verdict, verdicts
from tests.pathology.drawing import words
from tests.pathology.parsing import sources_of
from tests.pathology.tiny_study import NOTE, NUMBER, write_jobs, write_study

AUROC = CRITERIA["classification"][0]


@pytest.fixture(scope="module")
def null(tmp_path_factory):
    """All methods are equally good."""
    return write_study(tmp_path_factory.mktemp("null"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """dwa is better than all others, pcgrad is worse; dwa also parts the classes more."""
    return write_study(
        tmp_path_factory.mktemp("planted"),
        methods=("baseline", "naive", "dwa", "pcgrad"),
        shifts={"dwa": 4.0, "pcgrad": -1.5},
        spreads={"dwa": 8.0},
    )


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Of a number, dwa has smaller errors than all others and pcgrad larger ones."""
    return write_study(
        tmp_path_factory.mktemp("numbers"),
        methods=("baseline", "naive", "dwa", "pcgrad"),
        auxiliary=("LF",),
        shifts={"dwa": 5.0, "pcgrad": 0.25},
        primary=NUMBER,
    )


@pytest.fixture(scope="module")
def page_of_numbers(numbers, tmp_path_factory):
    out, config = tmp_path_factory.mktemp("page"), PageConfig(site_column="tcga-site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_report, "draw_study", lambda *_: [])
        return write_study_report(read_study(numbers), out, config=config)


@pytest.fixture(scope="module")
def differences(planted):
    """Those of ``planted``: drawing them thousands of times takes most of a report's time."""
    return all_differences(read_study(planted))


@pytest.fixture(scope="module")
def page(planted, differences, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_report, "all_differences", lambda _: differences)
        return write_study_report(read_study(planted), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def null_differences(null):
    return all_differences(read_study(null))


@pytest.fixture
def take(monkeypatch):
    """Let reports take the differences that a test has of the same study."""
    return lambda found: monkeypatch.setattr(study_report, "all_differences", lambda _: found)


@pytest.fixture
def copy(null, tmp_path):
    return shutil.copytree(null, tmp_path / "copy")


@pytest.fixture
def no_figures(monkeypatch):
    """Most tests look at words and numbers; figures take their time, and so does power."""
    monkeypatch.setattr(study_report, "draw_study", lambda *_: [])
    monkeypatch.setattr(study_report, "powers", lambda *_: [])


def text_of(page):
    return page.read_text(encoding="utf-8")


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cells(page, table, *names):
    """Return the cells of a row of a table in Markdown."""
    for line in (page.parent / table).read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip("| ").split("|")]
        if row[: len(names)] == list(names):
            return row[len(names) :]
    raise AssertionError(f"{table} has no row {names}.")


# --- verdicts -------------------------------------------------------------------------------------


def test_without_a_difference_there_is_no_winner(
    null, null_differences, tmp_path, no_figures, take
):
    take(null_differences)
    study = read_study(null)
    sentences = verdicts(study, null_differences)
    assert len(sentences) == 2  # nine criteria in each, two references
    for sentence, reference, many in zip(sentences, ("baseline", "naive"), (4, 2), strict=True):
        begin = f"No method is significantly better or worse than {reference} in what follows, each"
        after = f" after correction for {many} comparisons; with the smallest corrected p: "
        assert sentence.startswith(begin + after)
        found = sentence.removeprefix(begin + after).removesuffix(".").split("; ")
        rows = [d for d in null_differences if d.reference == reference]
        assert found == [
            f"{each.title} {min(d.corrected for d in rows if d.criterion == each):.3f}"
            for each in CRITERIA["classification"]
        ]
    page = write_study_report(study, tmp_path)
    assert not re.search(r"[▲▼] \d", (page.parent / "table1.md").read_text(encoding="utf-8"))


def test_lower_errors_are_better(numbers, page_of_numbers):
    page = page_of_numbers
    found = re.findall(r"<li>(.+ than (?:baseline|naive) in .+)</li>", text_of(page))
    errors = next(sentence for sentence in found if "mean absolute error," in sentence)
    better, worse = errors.split(" Significantly worse: ")
    assert better.startswith(
        "Significantly better than baseline in mean absolute error, where lower is better, after "
        "correction for 3 comparisons: dwa with LF (-"
    )
    assert worse.startswith("pcgrad with LF (+")
    headings = cells(page, "table1.md", "Auxiliary target", "Method")
    assert headings[:3] == ["Pearson's r", "Mean absolute error", "Spearman's rho"]
    assert headings[3] == "External Pearson's r, ensemble"
    for method, mark in (("dwa", "▲ "), ("pcgrad", "▼ ")):
        assert {cell[:2] for cell in cells(page, "table1.md", "LF", method)[:6]} == {mark}
    for row in rows_of(page.parent / "differences.csv"):
        ours, theirs = (value_of(numbers, row, row[name]) for name in ("method", "reference"))
        assert float(row["difference"]) == pytest.approx(ours - theirs)


def test_the_page_of_a_number_has_nothing_of_classes(numbers, page_of_numbers):
    text, out = text_of(page_of_numbers), page_of_numbers.parent
    for word in ("AUROC and", "ilhouette", "prevalence", "Decisions", "Table 3", "called wrongly"):
        assert word not in text
    assert re.search(r"72 patients, whose HRD runs from \d+\.\d+ to \d+\.\d+ with mean", text)
    assert "These are means over 4 runs.</p>" in text
    assert {path.name for path in out.iterdir()}.isdisjoint({"decisions.csv", "table3.csv"})
    row = next(r for r in rows_of(out / "patients.csv") if r["PATIENT"] == "P1-00")
    places = ["baseline", "lf/naive", "lf/dwa", "lf/pcgrad"]
    tables = [pd.read_csv(numbers / "runs" / p / "fold-1/predictions.csv") for p in places]
    predicted = np.mean([table["HRD_pred"][0] for table in tables])
    assert float(row["predicted"]) == pytest.approx(predicted, rel=1e-6)


def test_figures_of_a_number(numbers, tmp_path, monkeypatch):
    drawn, shown = {}, []
    monkeypatch.setattr(
        study_report,
        "dots",
        lambda _, columns, sheet, **_of: drawn.update({sheet.path.name: columns}),
    )
    monkeypatch.setattr(study_report, "tsne", lambda folds, *_, **__: shown.append(folds))
    monkeypatch.setattr(study_report, "weights_over_time", lambda *_: False)
    monkeypatch.setattr(study_report, "conflicts", lambda *_: None)
    study = read_study(numbers)
    study_report.draw_study(study, tmp_path)
    assert drawn.keys() == {"methods-1.png", "external-1.png"}
    names = ["Pearson's r", "Mean absolute error\n(lower is better)", "Spearman's rho"]
    for columns in drawn.values():
        assert [column.name for column in columns] == names
        assert [column.chance for column in columns] == [0.0, None, 0.0]
    summary = study.panels[0].deployed["dwa"].ensemble.summary
    outside = drawn["external-1.png"][1].estimates[2]
    assert outside.value == summary.metrics[Metric("mae")].mean
    run = study.panels[0].runs["baseline"]
    assert list(shown[0][0][1]) == list(run.results[0].predictions["HRD"].astype(float))


def test_figures_of_the_external_cohort_bear_its_own_warning(numbers, tmp_path, monkeypatch):
    captions = {}
    monkeypatch.setattr(
        study_report, "dots", lambda *of, **_: captions.update({of[2].path.name: of[2].caption})
    )
    for name in ("tsne", "weights_over_time", "conflicts"):
        monkeypatch.setattr(study_report, name, lambda *_, **__: False)
    copy = shutil.copytree(numbers, tmp_path / "study")
    for path in (copy / "external").rglob("metrics.json"):
        stored = json.loads(path.read_text()) | {"simulated": "Labels are DRAWN."}
        path.write_text(json.dumps(stored))
    study_report.draw_study(read_study(copy), tmp_path / "figures")
    assert captions["external-1.png"].endswith(" Labels are DRAWN.")
    assert "DRAWN" not in captions["methods-1.png"]


def test_probabilities_have_a_table_of_their_own(planted, page):
    headings = cells(page, "table3.md", "Auxiliary target", "Method")
    assert headings[:4] == [
        *("Brier score", "Calibration in the large"),
        *("External Brier score, ensemble", "External calibration in the large, ensemble"),
    ]
    assert cells(page, "table3.md", "LF", "pcgrad")[0].startswith("▼ ")  # higher, and so worse
    rows = rows_of(page.parent / "table3.csv")
    assert {row["metric"] for row in rows} == {"brier", "calibration"}
    for row in rows:
        if row["cohort"] == "external, ensemble":
            auxiliary = row["auxiliary"].replace("(every one)", "LF")
            place = {**row, "cohort": "external", "auxiliary": auxiliary}
            assert float(row["mean"]) == pytest.approx(value_of(planted, place, row["method"]))
    assert "<h2>Table 3: probabilities</h2>" in text_of(page)
    assert "<h2>Differences from naive, external cohort</h2>" in text_of(page)


def test_a_difference_that_is_there_is_named_with_its_direction(planted, differences, page):
    study = read_study(planted)
    found = verdicts(study, differences)[0]
    better, worse = found.split(" Significantly worse: ")
    assert better.startswith(
        "Significantly better than baseline in AUROC after correction for 6 comparisons: dwa with "
    )
    assert better.count("dwa with") == 2
    assert worse.count("pcgrad with") == 2
    assert "naive" not in found
    assert found in text_of(page)
    for auxiliary in ("LF", "Stroma/Fraction"):
        assert cells(page, "table1.md", auxiliary, "dwa")[0].startswith("▲ ")
        assert cells(page, "table1.md", auxiliary, "pcgrad")[0].startswith("▼ ")
        assert cells(page, "table1.md", auxiliary, "naive")[0][0].isdigit()
        assert cells(page, "table1.md", auxiliary, "dwa")[3].startswith("▲ ")  # external
        assert cells(page, "table2.md", auxiliary, "dwa")[0].startswith("▲ ")  # silhouette


def of(method, difference, corrected, **changes):
    values = {"low": difference - 0.1, "high": difference + 0.1, "p": corrected / 4}
    return Difference(
        AUROC, "naive", "LF", method, difference, corrected=corrected, **{**values, **changes}
    )


NONE_BETTER = "No method is significantly better than naive in AUROC after correction for"
BETTER = "Significantly better than naive in AUROC after correction for"


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ([], ["Nothing could be compared with naive in AUROC."]),
        (
            [of("dwa", 0.2, 0.05)],
            [
                f"{NONE_BETTER} 1 comparison (smallest corrected p = 0.050);",
                "none is significantly worse.",
            ],
        ),
        (
            [of("dwa", -0.2, 0.0004), of("autol", 0.1, 0.7)],
            [
                f"{NONE_BETTER} 2 comparisons (smallest corrected p = 0.700).",
                "Significantly worse:",
                "dwa with LF (-0.200 [-0.300, -0.100], corrected p = 0.0004).",
            ],
        ),
        (
            [of("dwa", -0.2, 0.01)],
            [
                f"{NONE_BETTER} 1 comparison (none is higher). Significantly worse:",
                "dwa with LF (-0.200 [-0.300, -0.100], corrected p = 0.010).",
            ],
        ),
        (
            [of("dwa", 0.2, 0.01), of("autol", 0.4, 0.3)],
            [
                f"{BETTER} 2 comparisons:",
                "dwa with LF (+0.200 [+0.100, +0.300], corrected p = 0.010). None is significantly",
                "worse.",
            ],
        ),
    ],
)
def test_verdicts_in_words(family, words):
    assert verdict(AUROC, "naive", family) == " ".join(words)


# --- differences ----------------------------------------------------------------------------------


def test_a_difference_is_that_of_the_runs_and_is_corrected_within_its_family(planted, page):
    rows = rows_of(page.parent / "differences.csv")
    assert len(rows) == 9 * (3 * 2 + 2 * 2)  # criteria x (methods but baseline; and but naive) x 2
    for row in rows:
        keys = ("metric", "reference", "cohort")
        family = [other for other in rows if all(other[key] == row[key] for key in keys)]
        size = 6 if row["reference"] == "baseline" else 4
        assert int(row["comparisons"]) == len(family) == size
        p, corrected = float(row["p"]), float(row["p_holm"])
        not_smaller = sum(float(other["p"]) >= p for other in family)
        assert min(1.0, p * not_smaller) - 1e-12 <= corrected <= 1.0
        assert (corrected < 0.05) == holm_rejects(p, [float(other["p"]) for other in family])
        assert float(row["ci95_low"]) <= float(row["difference"]) <= float(row["ci95_high"])
        ours, theirs = (value_of(planted, row, row[name]) for name in ("method", "reference"))
        assert float(row["difference"]) == pytest.approx(ours - theirs)


def holm_rejects(p, family):
    """Step down from the smallest, as Holm (1979) says it."""
    for rank, value in enumerate(sorted(family)):
        if value * (len(family) - rank) >= 0.05:
            return False
        if value == p:
            return True
    raise AssertionError("p is not of this family.")


def value_of(folder, row, method):
    auxiliary = {"LF": "lf", "Stroma/Fraction": "stroma-fraction"}[row["auxiliary"]]
    place = method if method == "baseline" else f"{auxiliary}/{method}"
    inside = row["cohort"] == "internal"
    path = folder / ("runs" if inside else "external") / place / "metrics.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found = found["metrics" if inside else "metrics_of_ensemble"]
    if row["metric"] in found:
        return found[row["metric"]]["mean"]
    folds = [path.parent / f"fold-{k}" for k in (1, 2)] if inside else [path.parent]
    return np.mean([BY_HAND[row["metric"]](*truth_of(fold, found)) for fold in folds])


def truth_of(fold, found):
    """Return what is true of the patients of a fold, and what was predicted."""
    table = pd.read_csv(fold / "predictions.csv")
    if "pearson" in found:
        return table["HRD"], table["HRD_pred"]
    return table["isMSIH"] == "MSIH", table["isMSIH_MSIH"]


BY_HAND = {
    "brier": brier_score_loss,
    "calibration": lambda truth, score: abs(score.mean() - truth.mean()),
    "spearman": lambda truth, predicted: spearmanr(truth, predicted).statistic,
}


def test_patients_are_paired_by_name(copy, null_differences):
    fold = copy / "runs/lf/dwa/fold-1"
    table = pd.read_csv(fold / "predictions.csv", dtype=str)
    table[::-1].to_csv(fold / "predictions.csv", index=False)
    np.save(fold / "embeddings.npy", np.load(fold / "embeddings.npy")[::-1])
    for ours, theirs in zip(all_differences(read_study(copy)), null_differences, strict=True):
        assert ours.p == pytest.approx(theirs.p)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_other_splits_and_other_patients_are_refused(copy, no_figures):
    path = copy / "runs/lf/dwa/metrics.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**summary, "splits_sha256": "other"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"equal splits, but .*dwa has others than .*baseline"):
        write_study_report(read_study(copy))
    path.write_text(json.dumps(summary), encoding="utf-8")
    table = copy / "runs/lf/dwa/fold-2/predictions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("P2-07", "P2-99"), encoding="utf-8")
    with pytest.raises(UserError, match="the same patients, but dwa and baseline on LF have"):
        write_study_report(read_study(copy))


def test_a_fold_of_one_class_is_left_out_of_a_comparison(copy, take):
    for path in copy.glob("runs/**/fold-1/predictions.csv"):
        table = pd.read_csv(path, dtype=str)
        table["isMSIH"] = "MSS"
        table.to_csv(path, index=False)
    found = [d for d in all_differences(read_study(copy)) if d.criterion.cohort == "internal"]
    one_class = {"brier", "calibration"}  # what these need not be without
    assert {d.folds for d in found if d.criterion.metric.figure not in one_class} == {1}
    for path in copy.glob("runs/**/fold-2/predictions.csv"):
        table = pd.read_csv(path, dtype=str)
        table["isMSIH"] = "MSS"
        table.to_csv(path, index=False)
    study = read_study(copy)
    found = all_differences(study)
    assert verdicts(study, found)[0] == "Nothing could be compared with baseline in AUROC."
    take(found)
    write_study_report(study)


def test_decisions_of_every_method_inside_and_outside(page, planted):
    table = pd.read_csv(page.parent / "decisions.csv").set_index("figure")
    rows = table.loc["sensitivity"].groupby(["auxiliary", "method", "cohort"])["rule"].apply(list)
    assert len(rows) == 2 * (1 + 2 * 3)  # inside and outside: the baseline, three methods twice
    assert {tuple(rules) for rules in rows} == {("best F1", "sensitivity 95 %")}
    for cohort, places in (
        ("internal", ["runs/lf/dwa/fold-1", "runs/lf/dwa/fold-2"]),
        ("external, ensemble", ["external/lf/dwa"]),
    ):
        tested = pd.concat([pd.read_csv(planted / p / "predictions.csv") for p in places])
        called = tested["isMSIH_MSIH"] >= 0.5  # as fold.json and metrics.json say
        right = (called & (tested["isMSIH"] == "MSIH")).sum()
        names = ("auxiliary", "method", "cohort", "rule")
        given = zip(names, ("LF", "dwa", cohort, "best F1"), strict=True)
        row = table.loc["ppv"].query(" and ".join(f"{name} == '{it}'" for name, it in given))
        assert (row["patients"].item(), row["of"].item()) == (right, called.sum())
    assert "sensitivity of at least 95 %" in text_of(page)


# --- tables ---------------------------------------------------------------------------------------


def test_tables_hold_the_numbers_of_the_runs(planted, page):
    found, outside = (
        json.loads((planted / place / "lf/naive/metrics.json").read_text(encoding="utf-8"))
        for place in ("runs", "external")
    )

    def cell(value):
        return pages.metric_cell(MetricSummary(**value), sd=False)

    expected = [
        *(cell(found["metrics"][key]) for key in ("auroc", "auprc")),
        "0.333",
        *(
            cell(outside[part][key])
            for part in ("metrics_of_ensemble", "metrics")
            for key in ("auroc", "auprc")
        ),
        "0.333",
    ]
    assert cells(page, "table1.md", "LF", "naive") == expected
    silhouette, pearson = cells(page, "table2.md", "LF", "naive")
    assert silhouette == cell(found["metrics"]["silhouette"])
    assert pearson == cell(found["metrics"]["pearson/LF"])
    assert cells(page, "table2.md", "(every one)", "baseline")[1] == "–"
    rows = {
        (row["auxiliary"], row["method"], row["cohort"], row["metric"]): row
        for name in ("table1.csv", "table2.csv")
        for row in rows_of(page.parent / name)
    }
    for key, value in found["metrics"].items():
        assert float(rows["LF", "naive", "internal", key]["mean"]) == value["mean"]
    ensemble = rows["LF", "naive", "external, ensemble", "auroc"]
    assert float(ensemble["mean"]) == outside["metrics_of_ensemble"]["auroc"]["mean"]


def test_a_shared_baseline_comes_once_and_an_own_one_with_each_target(null, tmp_path):
    def targets(folder):
        return [row.auxiliary for row in study_rows(read_study(folder)) if row.method == "baseline"]

    assert targets(null) == ["(every one)"]
    own = write_study(tmp_path, own_baseline=True, deployed=False)
    assert targets(own) == ["LF", "Stroma/Fraction"]


def test_cost_is_the_median_epoch_relative_to_naive(null):
    rows = {
        (row.auxiliary, row.method): row for row in costs(read_study(null)).itertuples(index=False)
    }
    assert rows["LF", "dwa"][2:] == (4.0, 2.0, "3 3", 18.0)
    assert rows["LF", "naive"].relative == 1.0
    assert len(rows) == 6


def test_a_failed_job_is_a_row_and_not_the_end(copy, tmp_path, no_figures):
    (copy / "runs/lf/dwa/metrics.json").unlink()
    (copy / "external/stroma-fraction/naive/metrics.json").unlink()
    write_jobs(
        copy,
        [
            ("lf/dwa/fold-1", "done", "", 3.0, 2),
            ("lf/dwa/fold-2", "failed", "the loss is <NaN>", 1.0, 1),
            ("lf/dwa/results", "skipped", "needs lf/dwa/fold-2", 0.0, 0),
            ("stroma-fraction/naive/deploy", "failed", "no room", 1.0, 1),
        ],
    )
    page = write_study_report(read_study(copy), tmp_path / "out")
    failed = "failed: fold-2: the loss is <NaN>"
    assert cells(page, "table1.md", "LF", "dwa")[0] == failed
    assert cells(page, "table2.md", "LF", "dwa")[0] == failed
    assert cells(page, "table1.md", "Stroma/Fraction", "naive")[3] == "failed: deploy: no room"
    text = text_of(page)
    for expected in (
        "1 of 5 runs are missing and in no comparison",
        "<th>lf/dwa/fold-2</th><td>failed</td><td>the loss is &lt;NaN&gt;</td>",
        "1 of 4 jobs are done. 1 were begun more than once",
        "after correction for 2 or 3 comparisons",  # 4 with the one that is missing
    ):
        assert expected in text
    status = {(row["method"], row["status"]) for row in rows_of(page.parent / "table1.csv")}
    assert ("dwa", failed) in status


def test_what_was_not_run_is_not_finished(copy, tmp_path, no_figures):
    (copy / "jobs.csv").unlink()
    (copy / "runs/lf/naive/metrics.json").unlink()
    page = write_study_report(read_study(copy), tmp_path / "out")
    assert cells(page, "table1.md", "LF", "naive")[0] == "not finished"
    assert "stopped early" in text_of(page)


@pytest.mark.parametrize("method", ["baseline", "naive"])
def test_a_single_method_is_a_study(tmp_path, method):
    folder = write_study(tmp_path, methods=(method,), auxiliary=("LF",), deployed=False)
    page = write_study_report(read_study(folder))
    assert page == folder / "report/index.html"
    assert f"Nothing could be compared with {method} in AUROC." in text_of(page)
    assert "External" not in (page.parent / "table1.md").read_text(encoding="utf-8")
    assert "Differences from" not in text_of(page)


def test_of_two_references_only_the_first_is_one(tmp_path, take):
    folder = write_study(tmp_path, methods=("baseline", "naive"), auxiliary=("LF",), deployed=False)
    study = read_study(folder)
    found = all_differences(study)
    said = verdicts(study, found)
    assert not any("than naive" in each for each in said)
    for figure in ("AUROC", "AUPRC", "silhouette", "Brier score", "calibration in the large"):
        assert sum(figure in each for each in said) == 1
    take(found)
    text = write_study_report(study).read_text(encoding="utf-8")
    drawn = re.findall(r"<img class='wide' style='max-width: min\(100%, (\d+)px\)'", text)
    assert len(set(drawn)) > 1  # of two methods, figures are of several widths


# --- page and figures -----------------------------------------------------------------------------


def test_the_page_stands_alone_and_says_all(page):
    text = text_of(page)
    sources = sources_of(text)
    assert len(sources) == 1 + 2 * 4 + 1  # power; methods in two cohorts, weights, t-SNE; conflicts
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for expected in (
        "<p class='warning'>SIMULATED &lt;features&gt;.</p>",
        "the trained models as they are: one seed",
        "side by side on shared cores",
        "<th>version</th><td>9.9</td>",
        "benchmark --out &lt;here&gt;",
        "<li>1 × patient: no &lt;label&gt;</li>",
        "<h3>With LF, Stroma/Fraction</h3>",
        "<h3>External cohort</h3>",
    ):
        assert expected in text
    for name in ("table1.md", "table2.md"):
        assert NOTE in (page.parent / name).read_text(encoding="utf-8")


def test_results_by_site_are_those_of_the_runs_with_figures_of_their_own(
    planted, differences, tmp_path, no_figures, take
):
    take(differences)
    study = read_study(planted)
    page = write_study_report(study, tmp_path, config=PageConfig(site_column="tcga-site"))
    assert "<h2>By site</h2>" in text_of(page)
    found = rows_of(tmp_path / "sites.csv")
    assert {row["site"] for row in found} == {"not known"}  # no barcodes
    runs = {m: run for m, run in study.panels[0].runs.items() if m in ("baseline", "naive")}
    assert {row["method"] for row in found} >= set(runs)
    for row in found:
        if row["figure"] == "auroc" and row["method"] in runs:
            tables = [result.predictions for result in runs[row["method"]].results]
            table = pd.concat(tables)
            truth, score = table["isMSIH"] == "MSIH", table["isMSIH_MSIH"].astype(float)
            assert float(row["value"]) == pytest.approx(roc_auc_score(truth, score))


def test_the_same_study_gives_the_same_tables(planted, page, tmp_path, no_figures):
    again = write_study_report(read_study(planted), tmp_path)
    for name in ("table1.csv", "table2.csv", "differences.csv", "cost.csv", "table1.md"):
        assert (again.parent / name).read_bytes() == (page.parent / name).read_bytes()


def test_who_is_hard_for_all_methods_stands_first(planted, page):
    study = read_study(planted)
    written = {row["PATIENT"]: row for row in rows_of(page.parent / "patients.csv")}
    rows = study_rows(study)
    cohorts = {
        "P": [row.run.results for row in rows],
        "E": [row.deployed.ensemble.results for row in rows],
    }
    assert {name[0] for name in written} == cohorts.keys()
    assert len(rows) == 7  # the baseline stands once
    for cohort, runs in cohorts.items():
        losses, wrong = {}, {}
        for table in (result.predictions for results in runs for result in results):
            for name, truth, score in zip(
                table["PATIENT"], table["isMSIH"], table["isMSIH_MSIH"].astype(float), strict=True
            ):
                p = score if truth == "MSIH" else 1 - score
                losses.setdefault(name, []).append(-np.log(p))
                called = "MSIH" if score >= 0.5 else "MSS"  # the threshold of all runs
                wrong[name] = wrong.get(name, 0) + (called != truth)
        means = {name: np.mean(values) for name, values in losses.items()}
        mine = [name for name in written if name[0] == cohort]
        assert mine == sorted(means, key=means.get, reverse=True)
        for name in mine:
            assert float(written[name]["loss"]) == pytest.approx(means[name], rel=1e-6)
            assert (written[name]["wrong"], written[name]["runs"]) == (str(wrong[name]), "7")
        by_all, by_none = (sum(count == n for count in wrong.values()) for n in (7, 0))
        sentence = f"every run calls {by_all} patients wrongly, and none calls {by_none} wrongly."
        assert sentence in text_of(page)
        hardest = f"<b>1. {mine[0]}</b>"
        assert hardest in text_of(page)
        card = text_of(page).partition(hardest)[2].partition("loss")[0]
        assert f"called wrongly by {wrong[mine[0]]} of 7</div>" in card
    assert written["P1-00"]["slides"] == "A/<P1-00>; B"


def test_an_auxiliary_target_without_runs_has_no_figures(planted, tmp_path):
    study = read_study(planted)
    first, second = study.panels
    study = replace(study, panels=[replace(first, repeats=()), second])
    names = [path.name for _, path in study_report.draw_study(study, tmp_path)]
    assert names == [
        *("methods-2.png", "external-2.png", "weights-2.png", "tsne-2.png", "conflicts.png")
    ]
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_dots_stand_at_the_figures_against_the_baseline(tmp_path, drawn):
    estimates = [Estimate(0.7, 0.6, 0.8), Estimate()]
    column = Column("AUROC", estimates, estimates[0], 0.5)
    names = ["naive", "dwa (missing)"]
    dots(names, [column, column], Sheet(tmp_path / "a.png", "t", NOTE))
    text = words(drawn[0])
    for expected in ("AUROC", "dwa (missing)", "chance", "its 95 % interval", NOTE):
        assert expected in text
    lines = drawn[0].axes[0].lines
    places = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in lines]
    assert ((0.6, 0.8), (0, 0)) in places
    assert ((0.7,), (0,)) in places
    assert ((0.5, 0.5), (0, 1)) in places  # chance, over the whole height


def test_weights_are_drawn_for_methods_that_move_them(null, tmp_path, drawn):
    panel = read_study(null).panels[0]
    histories = {m: [r.history for r in run.results] for m, run in panel.runs.items()}
    tasks = ["isMSIH", "LF"]
    assert weights_over_time(histories, tasks, Sheet(tmp_path / "a.png", "t", NOTE))
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert titles == ["dwa"]
    moved = drawn[0].axes[0].lines[1]
    assert list(moved.get_ydata()) == pytest.approx([1.0, 1.1, 0.9])
    del histories["dwa"]
    assert not weights_over_time(histories, tasks, Sheet(tmp_path / "a.png", "t"))


def test_constants_of_each_fold_do_not_look_like_a_change(tmp_path):
    """Of two folds with weights 1 and 3 the second ends first: the mean is 2, 2 and then 1."""
    folds = [
        pd.DataFrame({"epoch": [1, 2, 3], "weight/isMSIH": 1.0, "weight/LF": 1.0}),
        pd.DataFrame({"epoch": [1, 2], "weight/isMSIH": 1.0, "weight/LF": 3.0}),
    ]
    assert mean_over_folds(folds, "weight/LF").tolist() == [2.0, 2.0, 1.0]
    tasks = ["isMSIH", "LF"]
    assert not weights_over_time({"fixed": folds}, tasks, Sheet(tmp_path / "a.png", "t"))


def test_fixed_weights_are_a_reference_and_every_search_is_shown(tmp_path, no_figures, take):
    methods = ("baseline", "naive", "fixed", "dwa")
    folder = write_study(tmp_path, methods=methods, auxiliary=("LF",), deployed=False)
    for method, values in (("baseline", (0.3, 0.1, 0.2)), ("lf/fixed", (0.6, 0.5, 0.4))):
        rows = pd.DataFrame({"learning_rate": [1e-4, 1e-3, 1e-2]})
        if method != "baseline":
            rows["weight"] = [0.1, 1.0, 10.0]
        rows = rows.assign(validation_loss=values, best_epoch=1, epochs=2, seconds=1.0)
        for k in (1, 2):
            rows.to_csv(folder / f"runs/{method}/fold-{k}/search.csv", index=False)
    study = read_study(folder)
    found = all_differences(study)
    compared = {name: {d.method for d in found if d.reference == name} for name in methods[:3]}
    assert compared == {"baseline": {*methods[1:]}, "naive": {"fixed", "dwa"}, "fixed": {"dwa"}}
    assert {d.family for d in found if d.reference == "fixed"} == {1}
    take(found)
    page = write_study_report(study)
    text = text_of(page)
    inside = [c for c in CRITERIA["classification"] if c.cohort == "internal"]
    (said,) = re.findall(r"better or worse than fixed in what follows, [^<]+", text)
    assert all(criterion.title in said for criterion in inside)
    assert "<h2>Differences from fixed</h2>" in text
    for row in (
        ["baseline", *["learning rate 0.001"] * 2],
        ["fixed with LF", *["learning rate 0.01, weight 10"] * 2],
    ):
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        assert f"<th>{row[0]}</th>{cells}".replace(" ", "") in re.sub(
            r"[ \N{NO-BREAK SPACE}]|&nbsp;", "", text
        )
    assert "In 2 of 4 folds the learning rate kept is the lowest or the highest" in text
    assert "In 2 of 2 folds the weight kept is the lowest or the highest" in text
    assert "naive with" not in text.partition("What the search kept")[2].partition("<h2>")[0]
    assert len(pd.read_csv(page.parent / "search.csv")) == 2 * 2 * 3


def test_a_mean_over_folds_is_of_those_that_ran_so_long():
    folds = [pd.DataFrame({"epoch": [1, 2], "x": [1.0, 3.0]}), pd.DataFrame({"epoch": [1], "x": 2})]
    assert mean_over_folds(folds, "x").to_dict() == {1: 1.5, 2: 3.0}
    assert mean_over_folds(folds, "y").empty


def test_conflict_is_counted_among_steps_with_both_tasks(planted, tmp_path, drawn):
    runs = read_study(planted).panels[0].runs
    # 0.1, 0.2 and 0.3 conflicts per step, but only every second step has both tasks
    assert conflict_rates(runs["pcgrad"]) == pytest.approx([0.4, 0.4])
    assert conflict_rates(runs["naive"]) == []
    rates = {"LF": {"pcgrad": [0.2, 0.6]}, "SF": {}}
    conflicts(["pcgrad"], rates, Sheet(tmp_path / "a.png", "t", NOTE))
    means = [line for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in means] == [0.4]
    assert NOTE in words(drawn[0])


# --- command line ---------------------------------------------------------------------------------


def test_report_on_a_benchmark_writes_its_page(copy, tmp_path, capsys, no_figures):
    def report(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *map(str, arguments)])
        return end.value.code

    assert report("--run", copy, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out/index.html'}\n"
    assert "Benchmark of isMSIH" in text_of(tmp_path / "out/index.html")
    assert report("--run", copy, "--run", copy / "runs") == 2
    assert "must be reported alone, but got 2 folders" in capsys.readouterr().err
