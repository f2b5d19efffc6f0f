"""The page of a deployment: who was predicted for, how good each model and their mean are."""

import html
import json

import pytest

from examples.pathology.cli import main
from examples.pathology.report.report import write_deployed_report
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
    (place / "deploy.toml").write_text("[deploy]\n", encoding="utf-8")
    return place


def test_the_page_has_a_row_for_the_ensemble_and_one_for_the_models(deployed, tmp_path):
    page = write_deployed_report(deployed, tmp_path)
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


def test_report_knows_the_folder_of_a_deployment(deployed, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "--run", str(deployed)])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{deployed / 'index.html'}\n")
    with pytest.raises(SystemExit) as ended:
        main(["report", "--run", str(deployed), "--run", str(deployed)])
    assert ended.value.code == 2
    assert "of deploy must be reported alone, but got 2" in capsys.readouterr().err
