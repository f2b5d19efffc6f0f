"""Type checkers understand a user's script; ``mypy`` reads it as CI reads the library."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mtbalance
from tests.typing.user_script import look_ahead, train

HERE = Path(__file__).parent
SCRIPT = HERE / "user_script.py"
ROOT = HERE.parents[1]


def test_the_script_uses_every_public_name() -> None:
    nodes = ast.walk(ast.parse(SCRIPT.read_text()))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(mtbalance.__all__) <= used


def test_the_script_runs(tmp_path: Path) -> None:
    heads: dict[str, torch.nn.Module] = {task: torch.nn.Linear(4, 1) for task in "ab"}
    log = train(str(tmp_path / "log.csv"), torch.nn.Linear(4, 4), heads)
    assert log.tasks == ("a", "b")


def test_an_optimizer_that_comes_later_is_looked_ahead_with() -> None:
    heads: dict[str, torch.nn.Module] = {task: torch.nn.Linear(4, 1) for task in "ab"}
    for record in look_ahead(torch.nn.Linear(4, 4), heads):
        assert [round(float(abs(w - 0.1)), 6) for w in record.weights.values()] == [1e-4, 1e-4]


def test_mypy_reads_both() -> None:
    """Strictly, where an error that is ignored but not there is an error."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"tests/typing"]' in settings
    assert "\nstrict = true\n" in settings


def test_pyright_reads_both(tmp_path: Path) -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed (npm install --global pyright)")
    for script in (SCRIPT, HERE / "mistakes.py"):
        shutil.copy(script, tmp_path)
    settings = {
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [pyright, "--project", str(tmp_path), "--pythonpath", shutil.which("python") or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No source files" not in done.stdout
