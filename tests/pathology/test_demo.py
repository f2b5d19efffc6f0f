"""The demo's own part: slides and features have tests of their own, and are tiny ones here."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.pathology import demo
from examples.pathology.common.errors import RunError, UserError
from examples.pathology.runs import crossval
from examples.pathology.settings.runs import DemoConfig
from examples.pathology.simulation.slides import SlideCohort
from examples.pathology.training import model
from examples.pathology.training.model import JointTransformer
from tests.pathology.tiny import make_tables


@dataclass
class Summary:
    exit_code: int = 0


@pytest.fixture
def quick(monkeypatch):
    def make_slide_cohort(out, *, patients, seed):
        tables = make_tables(out, patients=patients, seed=seed)
        return SlideCohort(
            out, out, tables.clini, tables.slides, "isMSIH", "LF", patients, patients
        )

    def extract(config):
        shutil.copytree(config.slides / "features", config.out, dirs_exist_ok=True)
        return Summary()

    def small(outputs, in_features, **_):
        return JointTransformer(
            outputs, in_features=in_features, layers=1, d_model=8, heads=2, feedforward=8
        )

    monkeypatch.setattr(demo, "make_slide_cohort", make_slide_cohort)
    monkeypatch.setattr(demo, "run_extract", extract)
    monkeypatch.setattr(model, "JointTransformer", small)
    monkeypatch.setattr(crossval, "draw_figures", lambda *_, **__: [])  # the report draws them


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("model.pt")}


def test_it_runs_from_slides_to_a_page_and_takes_up_what_is_there(
    quick, tmp_path, caplog, monkeypatch
):
    out = tmp_path / "demo"
    with caplog.at_level("INFO"):
        page = demo.run_demo(DemoConfig(out, patients=12, epochs=1, device="cpu"))
    assert page == out / "report/index.html"
    text = page.read_text(encoding="utf-8")
    assert "SYNTHETIC slides and labels" in text
    assert "no patient, no tissue, no biology" in text
    table = (out / "report/table.md").read_text(encoding="utf-8")
    assert [line.split(" |")[0] for line in table.splitlines()[2:5]] == [
        "| baseline",
        "| naive",
        "| autol+cagrad",
    ]
    assert "SYNTHETIC" in table
    splits = {(out / f"runs/{m}/splits.json").read_bytes() for m in demo.COMPARED}
    assert len(splits) == 1
    notes = {
        json.loads((out / f"runs/{m}/metrics.json").read_text())["note"] for m in demo.COMPARED
    }
    assert notes == {demo.NOTE}
    for stage in ("draw slides", "extract", "crossval naive", "report", "all"):
        assert any(r.getMessage().startswith(stage) for r in caplog.records)

    before = files(out)
    monkeypatch.setattr(demo, "make_slide_cohort", None)  # redrawn slides would be new ones
    assert demo.run_demo(DemoConfig(out, patients=12, epochs=1, device="cpu")) == page
    assert files(out) == before
    with pytest.raises(UserError, match=r"`out` must be a new folder .* differs in seed: 0 -> 1"):
        demo.run_demo(DemoConfig(out, patients=12, epochs=1, seed=1, device="cpu"))


def test_a_folder_with_other_files_is_left_alone(quick, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="`out` must be a new or empty folder"):
        demo.run_demo(DemoConfig(tmp_path))
    assert [p.name for p in Path(tmp_path).iterdir()] == ["precious.txt"]


def test_a_slide_without_features_fails_the_demo(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_extract", lambda _: Summary(exit_code=1))
    with pytest.raises(RunError, match="All slides must give features"):
        demo.run_demo(DemoConfig(tmp_path / "demo", patients=12))
