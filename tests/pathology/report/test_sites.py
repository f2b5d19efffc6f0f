"""Results by site: against scikit-learn and loops, and where the sites of patients are found."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import write_toml
from examples.pathology.report import sections
from examples.pathology.report.report import write_report
from examples.pathology.report.sections import SMALL_SITE, show_sites
from examples.pathology.results.decisions import by_site
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.runs import Run, sites_in
from examples.pathology.results.summary import RunSummary
from examples.pathology.settings.runs import PageConfig
from tests.pathology.tiny import write_table
from tests.pathology.tiny_study import write_study

MSI = Target("MSI", "classification", ("MSI-H", "MSS"), "MSI-H")
SITES = {"AA": 40, "B1": 30, "C2": 6, "D3": 3}
NAMES = [f"TCGA-{site}-{i:04d}" for site, size in SITES.items() for i in range(size)]


def summary(**changes):
    about = {
        "method": "naive", "target": "MSI", "classes": MSI.classes, "positive": "MSI-H",
        "patients": 79, "funnel": (), "extractor": "x", "random_weights": False, "note": "",
        "metrics": {},
    }  # fmt: skip
    return RunSummary(**{**about, **changes})


def drawn(seed=0):
    """Return three folds of patients from everywhere, each with a threshold of its own."""
    random = np.random.default_rng(seed)
    fold = random.integers(3, size=len(NAMES))
    truth = np.array([name[5] != "D" and random.random() < 0.4 for name in NAMES])
    score = np.round(random.random(len(NAMES)) / 2 + truth / 4, 2)
    table = pd.DataFrame(
        {"PATIENT": NAMES, "MSI": np.where(truth, "MSI-H", "MSS"), "MSI_MSI-H": score}
    ).astype(str)
    points = np.zeros((0, 2), dtype=np.float32)
    return tuple(
        FoldResult(table[fold == k], points, 1, 1, 0.0, threshold)
        for k, threshold in enumerate((0.3, 0.4, 0.5))
    )


def groups_of(names):
    return {site: [name for name in names if name[5:7] == site] for site in SITES}


def test_figures_of_a_site_are_those_of_its_patients_alone():
    run = Run("naive", Path(), summary(), drawn())
    found = by_site(run, groups_of(NAMES)).set_index(["site", "figure"])
    for site in SITES:
        rows = [
            (row["MSI"] == "MSI-H", float(row["MSI_MSI-H"]), result.threshold)
            for result in run.results
            for _, row in result.predictions.iterrows()
            if row["PATIENT"][5:7] == site
        ]
        truth, score, _ = map(np.array, zip(*rows, strict=True))
        auroc = found.loc[(site, "auroc")]
        assert (auroc["patients"], auroc["of"]) == (truth.sum(), SITES[site])
        if site == "D3":
            assert (auroc["value"], auroc["undefined"]) == (None, "one class only")
            assert found.loc[(site, "sensitivity"), "undefined"] == "no positive patient"
        else:
            assert auroc["value"] == pytest.approx(roc_auc_score(truth, score))
            few = min(truth.sum(), (~truth).sum()) < 5
            assert (auroc["ci95_low"] is None) == few == (site == "C2")
            assert few or auroc["ci95_low"] < auroc["value"] < auroc["ci95_high"]
        for figure, wanted in (("sensitivity", True), ("specificity", False)):
            right = [(s >= t) == wanted for true, s, t in rows if true == wanted]
            row = found.loc[(site, figure)]
            assert (row["patients"], row["of"]) == (sum(right), len(right))
            if right:
                interval = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
                assert row["value"] == pytest.approx(np.mean(right))
                assert (row["ci95_low"], row["ci95_high"]) == pytest.approx(tuple(interval))


def test_a_fold_without_a_threshold_judges_nobody():
    results = tuple(replace(result, threshold=math.nan) for result in drawn())
    run = Run("naive", Path(), summary(), results)
    found = by_site(run, groups_of(NAMES)).set_index(["site", "figure"])
    assert found.loc[("AA", "auroc"), "of"] == 40
    assert found.loc[("AA", "sensitivity"), "undefined"] == "nobody is judged"


def made(folder, *, groups=None, settings="", **changes):
    """Return a run of ours with its folder."""
    folder.mkdir(parents=True)
    value = {"folds": []} if groups is None else {"folds": [], "groups": groups}
    (folder / "splits.json").write_text(json.dumps(value), encoding="utf-8")
    (folder / "config.toml").write_text(f"[crossval]\n{settings}\n[provenance]\n", encoding="utf-8")
    return Run("naive", folder, summary(**changes), drawn())


def test_sites_are_those_of_the_folds_or_there_are_none(tmp_path):
    groups = {name: name[5:7] for name in [*NAMES, "never tested"]}
    run = made(tmp_path / "run", groups=groups)
    found = sites_in(run, PageConfig())
    assert {site: sorted(names) for site, names in found.items()} == groups_of(NAMES)
    assert list(found) == ["AA", "B1", "C2", "D3"]
    assert sites_in(made(tmp_path / "earlier"), PageConfig()) == {}


def test_a_column_is_read_from_the_table_of_the_run_wherever_it_is(tmp_path):
    rows = [[name, "north" if i % 2 else "south"] for i, name in enumerate(NAMES[:-1])]
    table = write_table(tmp_path / "clini.csv", ["CASE", "HOSPITAL"], rows)
    settings = f'clini = "{table}"\npatient_column = "CASE"'
    run = made(tmp_path / "run", settings=settings)
    asked = PageConfig(site_column="HOSPITAL")
    found = sites_in(run, asked)
    assert {site: len(names) for site, names in found.items()} == {
        "north": 39, "south": 39, "not known": 1,
    }  # fmt: skip
    moved = table.rename(tmp_path / "moved.csv")
    with pytest.raises(UserError, match=r"clini.csv must be a readable file"):
        sites_in(run, asked)
    assert sites_in(run, PageConfig(site_column="HOSPITAL", site_table=moved)) == found
    with pytest.raises(UserError, match="must have a column `WARD`"):
        sites_in(run, PageConfig(site_column="WARD", site_table=moved))


def test_equal_numbers_are_one_site_and_look_alikes_none(tmp_path):
    for sites, name in ((["1", "1.0", "2", "2.0"], "number"), (["A-1", "A\u20101"], "word")):
        rows = [[each, sites[i % len(sites)]] for i, each in enumerate(NAMES)]
        write_table(tmp_path / f"{name}.csv", ["PATIENT", "SITE"], rows)
    run = made(tmp_path / "run", settings='clini = "clini.csv"')
    asked = PageConfig(site_column="SITE", site_table=tmp_path / "number.csv")
    assert {site: len(names) for site, names in sites_in(run, asked).items()} == {"1": 40, "2": 39}
    with pytest.raises(UserError, match="`SITE` must spell each class in one way"):
        sites_in(run, replace(asked, site_table=tmp_path / "word.csv"))
    with pytest.raises(UserError, match="another column than the patient's, but got `PATIENT`"):
        sites_in(run, replace(asked, site_column="PATIENT"))


def test_barcodes_need_no_table(tmp_path):
    found = sites_in(made(tmp_path / "run"), PageConfig(site_column="tcga-site"))
    assert {site: sorted(names) for site, names in found.items()} == groups_of(NAMES)


@pytest.fixture
def shown(monkeypatch):
    """Return the rows of every figure, which is not drawn."""
    rows = []

    def spy(names, columns, sheet, words):
        estimates = {column.name: column.estimates for column in columns}
        rows.append((list(names), estimates, {column.name: column.reference for column in columns}))

    monkeypatch.setattr(sections, "dots", spy)
    return rows


def test_small_sites_are_one_row_of_the_figure_and_have_their_own_in_the_table(tmp_path, shown):
    run = made(tmp_path / "run")
    section = show_sites([run], tmp_path, PageConfig(site_column="tcga-site"))
    assert section is not None
    assert [title for title, _ in section.figures] == ["naive: by site"]
    table = pd.read_csv(tmp_path / "sites.csv")
    assert set(table["site"]) == set(SITES)
    assert set(table["method"]) == {"naive"}
    ((names, estimates, reference),) = shown
    patients = groups_of(NAMES)
    small = [name for site in SITES if SITES[site] < SMALL_SITE for name in patients[site]]
    positive = {n for r in run.results for n in r.predictions.query("MSI == 'MSI-H'")["PATIENT"]}
    together = {"AA": patients["AA"], "B1": patients["B1"], "2 smaller sites": small}
    assert names == [
        f"{site}: {len(positive & set(members))} / {len(members)}"
        for site, members in together.items()
    ]
    expected = by_site(run, {**together, "all": NAMES}).set_index("site")
    for figure, title in (("auroc", "AUROC"), ("sensitivity", "Sensitivity")):
        value = expected[expected["figure"] == figure]["value"]
        assert [each.value for each in estimates[title]] == list(value[:-1])
        assert reference[title].value == value["all"]


def test_a_small_site_alone_keeps_its_name(tmp_path, shown):
    run = made(tmp_path / "run", groups={name: name[5:7] for name in NAMES if name[5:7] != "C2"})
    assert show_sites([run], tmp_path, PageConfig()) is not None
    ((names, *_),) = shown
    assert names[-1] == "D3: 0 / 3"


def test_without_sites_or_classes_there_is_no_section(tmp_path, shown):
    asked = PageConfig(site_column="tcga-site")
    number = made(tmp_path / "b", kind="regression", classes=(), positive="")
    assert show_sites([made(tmp_path / "a")], tmp_path, PageConfig()) is None
    assert show_sites([number], tmp_path, asked) is None
    assert not (tmp_path / "sites.csv").exists()
    assert shown == []


def test_of_a_deployment_the_ensemble_alone_is_shown_by_site(tmp_path):
    write_study(tmp_path, methods=("baseline",), auxiliary=("LF",))
    place = tmp_path / "external/baseline"
    path = place / "metrics.json"
    about = {**json.loads(path.read_text(encoding="utf-8")), "run": str(tmp_path / "runs/baseline")}
    path.write_text(json.dumps(about), encoding="utf-8")
    names = pd.read_csv(place / "predictions.csv")["PATIENT"]
    table = write_table(tmp_path / "c.csv", ["PATIENT", "SITE"], [[name, "x"] for name in names])
    write_toml(place / "deploy.toml", {"deploy": {"clini": str(table), "features": "no/features"}})
    page = write_report([place], config=PageConfig(site_column="SITE"))
    assert "<h2>By site</h2>" in page.read_text(encoding="utf-8")
    written = pd.read_csv(place / "sites.csv").query("figure == 'auroc'")
    assert written[["method", "site", "of"]].to_numpy().tolist() == [["ensemble", "x", 36]]
    stored = about["metrics_of_ensemble"]["auroc"]["mean"]
    assert written["value"].item() == pytest.approx(stored)
    assert (place / "figures/sites-1.png").exists()


def test_settings_that_are_gone_are_one_sentence(tmp_path):
    write_study(tmp_path, methods=("baseline",), auxiliary=("LF",))
    place = tmp_path / "external/baseline"
    about = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    about["run"] = str(tmp_path / "runs/baseline")
    (place / "metrics.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(UserError, match=r"deploy\.toml must be .*clini.*Put it back"):
        write_report([place], config=PageConfig(site_column="SITE"))
