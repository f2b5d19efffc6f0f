"""The page of a deployment: who was predicted for, how good each model and their mean are."""

import html
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from examples.pathology.cli import main
from examples.pathology.report.report import write_report
from examples.pathology.settings.runs import PageConfig
from tests.pathology.parsing import sources_of
from tests.pathology.tiny_study import write_study


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, methods=("baseline",), auxiliary=("LF",))
    place = folder / "external/baseline"
    path = place / "metrics.json"
    about = {**json.loads(path.read_text(encoding="utf-8")), "run": str(folder / "runs/baseline")}
    path.write_text(json.dumps(about), encoding="utf-8")
    return place


def test_the_page_has_a_row_for_the_ensemble_and_one_for_the_models(deployed, tmp_path):
    page = write_report([deployed], tmp_path)
    written = page.read_text(encoding="utf-8")
    text = html.unescape(written).replace("\N{NO-BREAK SPACE}", " ")
    assert page == tmp_path / "index.html"
    assert "36 patients, 36 of them with a known isMSIH" in text
    assert "<li>1 × patient: no <label></li>" in text
    assert "SIMULATED <features>." in text
    stored = json.loads((deployed / "metrics.json").read_text(encoding="utf-8"))
    for name, metrics in (
        ("ensemble", stored["metrics_of_ensemble"]),
        ("mean of folds", stored["metrics"]),
    ):
        low, high = metrics["auroc"]["ci95_over_patients"]
        row = text[text.index(f"<th>{name}</th>") :].partition("</tr>")[0]
        assert f"[{low:.3f}, {high:.3f}]" in row.partition("</td>")[0]
    assert all(source.startswith("data:image/png;base64") for source in sources_of(written))
    assert (tmp_path / "figures/roc.png").exists()


def test_the_worst_errors_are_the_ensembles(deployed, tmp_path):
    page = write_report([deployed], tmp_path, config=PageConfig(worst=5))
    written = pd.read_csv(tmp_path / "patients.csv", keep_default_na=False)
    table = pd.read_csv(deployed / "predictions.csv").set_index("PATIENT")
    assert set(written["run"]) == {"ensemble"}
    assert set(written["fold"]) == {""}
    assert sorted(written["PATIENT"]) == sorted(table.index)
    for row in written.itertuples():
        assert row.probability == table.loc[row.PATIENT, f"isMSIH_{row.truth}"]
    shown = re.findall(r"<b>\d+\. (.*?)</b></div>", page.read_text(encoding="utf-8"))
    assert shown == list(written.sort_values("probability")["PATIENT"][:5])
    assert "<p>No thumbnails: no/features has none" in page.read_text(encoding="utf-8")


def test_report_knows_the_folder_of_a_deployment(deployed, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "--run", str(deployed), "--worst", "3"])
    page = (deployed / "index.html").read_text(encoding="utf-8")
    assert page.count("loss 1.") + page.count("loss 2.") == 3
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{deployed / 'index.html'}\n")
    with pytest.raises(SystemExit) as ended:
        main(["report", "--run", str(deployed), "--run", str(deployed)])
    assert ended.value.code == 2
    assert "A deployment must be reported alone, but got 2" in capsys.readouterr().err


def test_the_ensemble_and_each_model_decide_at_thresholds_of_the_run(deployed, tmp_path):
    write_report([deployed], tmp_path)
    table = pd.read_csv(tmp_path / "decisions.csv")
    assert table["method"].unique().tolist() == ["ensemble", "model of fold 1", "model of fold 2"]
    chosen = []
    for k in (1, 2):
        part = pd.read_csv(deployed.parents[1] / f"runs/baseline/fold-{k}/validation.csv")
        positive = part[part["isMSIH"] == "MSIH"]["isMSIH_MSIH"].sort_values(ascending=False)
        chosen.append(positive.iloc[11])  # 12 of 12 are needed for 95 %
    at_sensitivity = table[table["rule"] == "sensitivity 95 %"].set_index(["method", "figure"])
    for name, threshold, place in (
        ("model of fold 2", chosen[1], "fold-2"),
        ("ensemble", np.mean(chosen), "."),
    ):
        tested = pd.read_csv(deployed / place / "predictions.csv")
        called = tested["isMSIH_MSIH"] >= threshold
        right = (called & (tested["isMSIH"] == "MSIH")).sum()
        row = at_sensitivity.loc[(name, "ppv")]
        assert float(row["thresholds"]) == pytest.approx(threshold, rel=1e-5)
        assert (row["patients"], row["of"]) == (right, called.sum())


def test_a_run_that_is_gone_leaves_the_threshold_of_f1(deployed, tmp_path):
    moved = shutil.copytree(deployed, tmp_path / "moved")
    path = moved / "metrics.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**about, "run": "/not/here"}), encoding="utf-8")
    write_report([moved])
    table = pd.read_csv(moved / "decisions.csv")
    assert table[table["rule"] == "best F1"]["undefined"].isna().all()
    shares = table[(table["rule"] == "sensitivity 95 %") & table["value"].isna()]
    assert len(shares) == 3 * 5
    assert (shares["undefined"] == "nobody is judged").all()
