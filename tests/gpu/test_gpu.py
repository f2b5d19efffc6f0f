"""The run on a GPU works where there is none: every part in its smallest form, on the CPU."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.distributed import harness
from tests.gpu import (
    agreement,
    catalogue,
    cli,
    conduct,
    demo,
    extraction,
    rows,
    steps,
    suite,
    tiles,
    together,
    waits,
)
from tests.gpu.parts import PARTS, Part
from tests.gpu.rows import Row, Setting

CPU = torch.device("cpu")
QUICK = Setting(CPU, quick=True, seconds=60)


# --- the run --------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_what_it_would_do(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert cli.main(["--to", str(path)]) == 0
    told = capsys.readouterr().out
    assert "finds no GPU here, so nothing was measured" in told
    for part in PARTS:
        assert f"- {part.name} (at most {part.seconds:.0f} s): {part.plan}\n" in told
    assert not path.exists()
    cli.main(["--parts", "waits"])
    assert "- suite" not in capsys.readouterr().out


def test_all_parts_fit_into_the_time() -> None:
    assert sum(part.seconds for part in PARTS) <= 60 * cli.MINUTES
    assert min(part.seconds for part in PARTS) > conduct.LEAST_SECONDS


def script(text: str) -> conduct.Command:
    """Return what starts parts that run these lines; `rows` is the file, `part` the name."""

    def command(part: Part, path: Path, seconds: float) -> list[str]:
        return [
            sys.executable,
            "-u",
            "-I",
            "-S",
            "-c",
            f"rows, part = {str(path)!r}, {part.name!r}\n{text}",
        ]

    return command


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch) -> None:
    """Nor is what it has told lost, nor anything that it has started left behind."""
    monkeypatch.setattr(conduct, "LEAST_SECONDS", 0.5)
    pid = tmp_path / "pid"
    text = f"""
import json, subprocess, sys, time
def tell(**row): open(rows, "a").write(json.dumps(row) + "\\n")
if part == "fails":
    tell(what="a | b", found="first", figures={{}}, good=False)
    print("before"); sys.exit("no such kernel")
if part == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open({str(pid)!r}, "w").write(str(child.pid))
    tell(what="x", found="1 ms", figures={{"x": 1}}, good=True)
    open(rows, "a").write('{{"what": "half a li')
    time.sleep(60)
tell(what="y", found="2", figures={{}}, good=None)
"""
    parts = [Part("fails", 20, ""), Part("hangs", 1, ""), Part("works", 20, "")]
    told: list[str] = []
    fails, hangs, works = conduct.conduct(parts, script(text), 100, told.append)
    assert fails.status.startswith("failed after 0 s (exit status 1): no such kernel")
    assert fails.rows == [Row("a | b", "first", {}, good=False)]
    assert "before" in fails.printed
    assert hangs.status == "stopped after its 1 s"
    assert hangs.seconds < 3
    assert hangs.rows == [Row("x", "1 ms", {"x": 1}, good=True)]
    assert works.status.startswith("done in 0 s of 20")
    assert [each.finished for each in (fails, hangs, works)] == [False, False, True]
    assert [line.partition(":")[0] for line in told] == ["fails", "hangs", "works"]
    assert not is_running(int(pid.read_text()))
    assert conduct.table([fails, hangs, works]).splitlines()[2:] == [
        f"| **fails** |  | {fails.status} | **!** |",
        "|  | a \\| b | first | **!** |",
        "| **hangs** |  | stopped after its 1 s | **!** |",
        "|  | x | 1 ms | ok |",
        f"| **works** |  | {works.status} |  |",
        "|  | y | 2 |  |",
    ]


def is_running(pid: int) -> bool:
    """Tell whether a process is there, and no zombie that nobody has waited for yet."""
    for _ in range(20):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return False
        time.sleep(0.05)
    return True


def test_no_part_begins_when_the_time_is_over() -> None:
    (outcome,) = conduct.conduct([Part("late", 20, "")], script("1 / 0"), 4)
    assert outcome.status == "not begun: no time is left"
    (outcome,) = conduct.conduct([Part("short", 20, "")], script(""), 6)
    assert outcome.status.endswith(" s of 6")


def test_a_part_is_started_as_the_command_line_says(tmp_path, monkeypatch, capsys) -> None:
    """What `conduct` would start is given to `main`, which writes the rows."""
    monkeypatch.setattr(catalogue.catalogue, "variants", lambda m: ["equal+sum", "equal+pcgrad"])
    part = next(part for part in PARTS if part.name == "catalogue")
    line = conduct.command_of("cpu", quick=True)(part, tmp_path / "rows", 30.0)
    assert line[:4] == [sys.executable, "-u", "-m", "tests.gpu"]
    assert cli.main(line[4:]) == 0
    (row,) = rows.read_rows(tmp_path / "rows")
    assert row.what == "tiny-mlp"
    assert {"equal+sum", "equal+pcgrad"} < set(row.figures["variants"])


def test_everything_goes_into_a_table_and_into_json(tmp_path, monkeypatch, capsys) -> None:
    text = 'open(rows, "a").write(\'{"what": "y", "found": "2"}\\n\')'
    monkeypatch.setattr(cli, "command_of", lambda device, quick: script(text))
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--quick", "--parts", "agreement", "waits", "--to", str(path)]
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert "| **waits** |  | done in 0 s of 25 |  |\n|  | y | 2 |  |\n" in told.out
    assert told.err.startswith("waits: done in 0 s")
    everything = json.loads(path.read_text())
    assert everything["environment"]["device"] == "cpu"
    assert [part["part"] for part in everything["parts"]] == ["waits", "agreement"]
    assert everything["parts"][0]["rows"] == [
        {"what": "y", "found": "2", "figures": {}, "good": None}
    ]


def test_an_error_is_a_row() -> None:
    def broken() -> Iterable[Row]:
        yield Row("a", "1")
        raise ValueError("no such thing\nand more")

    first, second = rows.attempted("b", broken)
    assert first == Row("a", "1")
    assert (second.what, second.good) == ("b", False)
    assert second.found == "fails: ValueError: no such thing"
    assert "in broken" in second.figures["traceback"]


# --- the parts ------------------------------------------------------------------------------------


def test_the_suite_is_read_line_by_line() -> None:
    lines = """\
bringing up nodes...
[gw0] [  3%] PASSED tests/test_a.py::test_x[1 b]
[gw1] [  6%] FAILED tests/test_a.py::test_y
[gw1] [  9%] ERROR tests/test_b.py::test_z
tests/test_a.py::test_x PASSED                                           [ 33%]
tests/test_b.py::test_s[PASSED] SKIPPED (no FAILED here)                 [ 66%]
FAILED tests/test_a.py::test_y - AssertionError: assert 1 == 2
=========================== short test summary info ============================
""".splitlines(keepends=True)
    told = suite.told_by(lines)
    assert told.counts == {"PASSED": 2, "FAILED": 1, "ERROR": 1, "SKIPPED": 1}
    assert told.failed == ["tests/test_a.py::test_y", "tests/test_b.py::test_z"]
    assert told.reasons == {"tests/test_a.py::test_y": "AssertionError: assert 1 == 2"}
    whole, first, second = suite.rows_of(told, 61.0, 8, stopped=True)
    assert whole.good is False
    assert whole.found.endswith("2 passed, 1 skipped in 61 s by 8 processes, then stopped")
    assert first.found == "1 fail, first test_y: AssertionError: assert 1 == 2"
    assert second.what == "tests/test_b.py"
    (good,) = suite.rows_of(suite.told_by(lines[1:2]), 1.0, 8, stopped=False)
    assert good.good is True


def test_the_suite_runs_where_it_is_told(monkeypatch) -> None:
    line = "import os; print('tests/a.py::' + os.environ['MTBALANCE_TEST_DEVICE'], 'PASSED [ 9%]')"
    monkeypatch.setattr(suite, "command", lambda *_, **__: [sys.executable, "-c", line])
    (row,) = suite.measure(QUICK)
    assert row.figures["counts"] == {"PASSED": 1}
    monkeypatch.setattr(suite, "command", lambda *_, **__: [sys.executable, "-c", "print('gone')"])
    with pytest.raises(RuntimeError, match="pytest has run no test: gone"):
        list(suite.measure(QUICK))
    told = f"{line}; import sys, time; sys.stdout.flush(); time.sleep(60)"
    monkeypatch.setattr(suite, "command", lambda *_, **__: [sys.executable, "-c", told])
    (row,) = suite.measure(QUICK._replace(seconds=suite.MARGIN + 0.5))
    assert row.good is False
    assert row.found.endswith("then stopped")


def test_the_suite_leaves_out_what_other_parts_do() -> None:
    command = suite.command(8, quick=False)
    assert command[command.index("-n") :][:2] == ["-n", "8"]
    for name in suite.ELSEWHERE:
        assert (conduct.ROOT / "tests" / name).exists()
    assert "--ignore=tests/gpu" in command  # or it would start itself


def test_steps(monkeypatch) -> None:
    monkeypatch.setattr(steps, "TINY", {"tiny-mlp": steps.TINY["tiny-mlp"]})
    found = [row for row in steps.measure(QUICK) if "variants" in row.figures]
    assert [row.what for row in found] == ["tiny-mlp, float32", "tiny-mlp, bfloat16 autocast"]
    for row in found:
        assert {"equal+sum", "equal+cagrad, chunk 16"} < set(row.figures["variants"])
        assert " x floor 1, equal+cagrad" in row.found
        assert row.found.endswith("(1 rounds)")


def test_a_workload_that_fails_is_a_row(monkeypatch) -> None:
    monkeypatch.setattr(steps, "TINY", {"unknown": None})
    first, second = steps.measure(QUICK)
    assert first.found == "fails: KeyError: 'unknown'"
    assert second.good is False


def test_large_bags(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "QUICK", (8,))
    monkeypatch.setattr(tiles, "PRECISIONS", ("float32",))
    monkeypatch.setattr(tiles, "MEASURED", ("equal+graddrop",))
    measured = list(tiles.measure(QUICK))
    assert [row.what for row in measured] == ["8 tiles, float32", "8 tiles, float32: attention"]
    rows_of_one = 6_215_040 * 4
    peaks = measured[0].figures["peaks"]
    assert peaks["equal+graddrop"] > 2 * rows_of_one > peaks["floor 1"] >= rows_of_one
    assert measured[1].good is None  # on a CPU, nothing is promised


def test_attention_with_a_matrix_is_seen() -> None:
    q = torch.randn(1, 1, 8, 4)

    def attend(dropout: float):
        def step() -> None:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropout)

        return lambda device: tiles.attention("x", step, torch.nn.Linear(1, 1), 8, 1.0, device)

    assert attend(0.0)(CPU).good is True
    row = attend(0.5)(torch.device("cuda"))  # what needs a matrix on a CPU
    assert row.good is False
    assert row.found.startswith("makes a matrix (")


def test_waits(monkeypatch) -> None:
    monkeypatch.setattr(waits, "POLICIES", ("propagate", "raise"))
    two = next(waits.measure(QUICK))
    assert two.what == "equal+cagrad, 2 tasks"
    assert two.found.startswith("propagate 0, raise ")
    monkeypatch.setattr(waits, "waits_of", lambda *_: ["here:1", "here:1"])
    (first, *_, last) = waits.measure(QUICK)
    assert first.found == "propagate 2 (at most 0), raise 2 (at most 1)"
    assert last.found == "propagate 2 (at most 1), raise 2 (at most 1)"
    assert first.good is last.good is False
    assert first.figures["raise"] == {"here:1": 2}
    assert waits.limit_of("equal+sum", 2, "raise") is None


def test_demo(monkeypatch) -> None:
    line = demo.command(Path("there"), "cuda", patients=20, epochs=3)
    assert line[1:4] == ["-m", "examples.pathology", "demo"]
    assert line[line.index("--device") + 1] == "cuda"
    text = (
        "import pathlib, sys; out = pathlib.Path(sys.argv[1], 'report'); out.mkdir(parents=True);"
        "out.joinpath('index.html').write_text('x'); print('12:00 INFO extract: 3.5 s')"
    )
    monkeypatch.setattr(
        demo, "command", lambda out, *_, **__: [sys.executable, "-c", text, str(out)]
    )
    (row,) = demo.measure(QUICK)
    assert row.good is True
    assert row.figures["stages"] == {"extract": 3.5}
    failing = [sys.executable, "-c", "import sys; sys.exit('no such device')"]
    monkeypatch.setattr(demo, "command", lambda out, *_, **__: failing)
    with pytest.raises(RuntimeError, match="exit status is 1: no such device"):
        list(demo.measure(QUICK))


def test_extraction(monkeypatch) -> None:
    ways = [way for way in extraction.WAYS if way.name in ("TF32", "bfloat16, channels-last")]
    monkeypatch.setattr(extraction, "WAYS", ways)
    exact, rounded = extraction.measure(QUICK)
    assert exact.figures["error"] < 1e-4 < rounded.figures["error"] < 0.1
    assert min(row.figures["tiles_per_second"] for row in (exact, rounded)) > 0
    assert torch.get_float32_matmul_precision() == "highest"


class TakesTurns:
    """A pool whose ranks are this process: with real ones, tests/distributed runs the same."""

    def run(self, function, *arguments):
        return [function(harness.ALONE, *arguments)] * 2

    def stop(self) -> None:
        pass


def test_two_processes(monkeypatch) -> None:
    monkeypatch.setattr(harness, "Pool", lambda size: TakesTurns())
    monkeypatch.setattr(together, "WRAPPERS", ("DDP",))
    monkeypatch.setenv("MTBALANCE_TEST_DEVICE", "cpu")
    found = list(together.measure(QUICK))
    assert [(row.what, row.good) for row in found] == [
        ("DDP, float64", True),
        ("DDP, float32", True),
    ]
    # Where the ranks do not compute where they should:
    row = next(together.measure(QUICK._replace(device=torch.device("meta"))))
    assert row.good is False
    assert "the ranks must compute on meta, but do on {'cpu'}" in row.found


def test_agreement(monkeypatch) -> None:
    found = list(agreement.measure(QUICK))
    assert [(row.what, row.good) for row in found] == [("float64", True), ("float32", True)]
    whole, off = agreement.rows_of("x", {"a": 1e-3, "b": float("nan"), "c": 0.0}, 1e-2)
    assert whole.good is off.good is False
    assert "worst b nan" in whole.found
    assert off.what == "x: b"


def test_agreement_sees_another_gradient(monkeypatch) -> None:
    true = agreement.written("equal+cagrad", CPU, torch.float64)
    assert true.dtype == torch.float64
    assert len(true) > 4 * 32 * 32
    assert agreement.relative_error(2 * true, true) == pytest.approx(1)
    single = agreement.written("equal+cagrad", CPU, torch.float32)
    assert len(single) == len(true)
    with pytest.raises(ValueError, match="must write as many numbers, but wrote 2 and 3"):
        agreement.relative_error(torch.ones(2), torch.ones(3))
