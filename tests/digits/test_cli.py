"""The command: what it writes, and what it refuses."""

from pathlib import Path

import pytest

from examples.digits import cli, study
from examples.digits.page import BLOCKS
from tests._commands import help_of
from tests.digits._small import TINY

ROOT = Path(__file__).parents[2]
MARKED = "".join(f"<!-- digits: {name} -->\n<!-- digits end -->\n" for name in BLOCKS)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(cli, "QUICK", TINY)


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--quick", "--processes", "1", *map(str, arguments)])
    return caught.value.code


def test_the_command_writes_everything(tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text(f"# Page\n\n{MARKED}")
    command = ("--methods", " PCGrad,nash ,sum", "--seeds", 2, "--out", out, "--page", page)
    assert run(*command) == 0
    names = ["table.csv", "table.md", "digits.png"]
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        str(out / names[0]),
        str(out / names[1]),
        str(page),
        str(out / names[2]),
    ]
    assert "24/24" in told.err
    table = (out / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:3]] == [
        "a network per task"
    ]
    assert {line.split("|")[1].strip() for line in table.splitlines()[3:]} == {
        "`sum`",
        "`pcgrad`",
        "`nash`",
    }
    assert table in page.read_text()
    assert "without `alignedmtl`" in page.read_text()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(*command) == 0  # nothing to do, and the same again
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sum,cagard"], "Did you mean 'cagrad'"),
        (["--methods", "pcgrad+mgda"], "at most one weighting and one gradient strategy"),
        (["--out", "nowhere/out"], "`out` must be in a folder that exists"),
        (["--page", "nowhere.md"], "`page` must be a page with marks"),
        (["--page", "README.md"], "must have the parts set-up, outcome, table"),
        (["--seeds", "0"], "seeds"),
    ],
)
def test_wrong_use_is_told(arguments, message, tmp_path, capsys):
    code = run(
        "--out", tmp_path / "out", *(str(ROOT / a) if a == "README.md" else a for a in arguments)
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_setting_in_the_folder_is_wrong_use(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run("--methods", "sum", "--seeds", 1, "--out", out) == 0
    monkeypatch.setattr(cli, "QUICK", cli.Setting())
    assert run("--methods", "sum", "--seeds", 1, "--out", out) == 2
    assert "without trainings of another setting" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "attempt", stop)
    assert run("--methods", "sum", "--out", tmp_path / "out") == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_help_imports_no_heavy_package():
    assert help_of("examples.digits", {"torch", "numpy", "matplotlib", "sklearn", "scipy"})
