"""The benchmarks run, and count what they say they count. What they measure is nobody's test."""

import json
import subprocess
import warnings
from collections.abc import Callable

import pytest
import torch

from mtbalance._factory import GRADIENTS, WEIGHTINGS
from mtbalance.gradient import PCGrad
from tests.benchmarks import (
    catalogue,
    many_tasks,
    memory,
    reporting,
    solvers,
    step_cost,
    tiny_step,
)
from tests.benchmarks.peers import (
    ACROSS,
    LIBMTL,
    LIBRARIES,
    SCALARIZERS,
    STRATEGIES,
    peers,
    peers_of_catalogue,
    strategy_of,
)
from tests.benchmarks.workloads import TINY, WORKLOADS

CPU = torch.device("cpu")


def report(script, capsys, *arguments: str) -> dict:
    script.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_step_cost_reports_every_variant_against_the_floors(capsys) -> None:
    out = report(
        step_cost,
        capsys,
        "--workload",
        "tiny-mlp",
        "tiny-transformer",
        "--rounds",
        "1",
        "--no-peers",
    )
    assert set(out) == {"environment", "workloads"}
    assert {"torch", "threads", "cpu", "load", "omp_wait_policy"} <= set(out["environment"])
    assert set(out["workloads"]) == {"tiny-mlp", "tiny-transformer"}
    for result in out["workloads"].values():
        rows = result["variants"]
        assert set(rows) == {*step_cost.FLOORS, *step_cost.VARIANTS}
        for row in rows.values():
            first, third = row["quartiles"]
            assert 0 < first <= row["median"] <= third
            assert set(row["ratios"]) == set(step_cost.FLOORS)
        assert rows["floor 2"]["ratios"]["floor 2"] == 1
        assert rows["equal+sum"]["limit"] == {"floor": "floor 1", "ratio": 1.03}


def test_step_cost_measures_what_was_chosen_and_prints_a_table(capsys) -> None:
    step_cost.main(
        ["--workload", "tiny-resnet", "--rounds", "1", "--no-peers", "--variants", "equal+cagrad"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-5:-1]] == [*step_cost.FLOORS, "equal+cagrad"]


def test_step_cost_may_be_measured_beside_other_programs(capsys) -> None:
    chosen = ["--workload", "tiny-mlp", "--variants", "equal+cagrad", "--no-peers"]
    step_cost.main([*chosen, "--rounds", "1", "--busy", "2"])
    assert ", 2 other programs busy\n" in capsys.readouterr().out


def test_other_programs_end_with_the_measurement(monkeypatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def noted(command: list[str]) -> "subprocess.Popen[bytes]":
        started.append(start(command))
        return started[-1]

    monkeypatch.setattr(reporting.subprocess, "Popen", noted)

    def measure() -> None:
        with reporting.others_at_work(2):
            assert [other.poll() for other in started] == [None, None]
            raise KeyError

    with pytest.raises(KeyError):
        measure()
    assert all(other.poll() is not None for other in started)


def test_step_cost_measures_options_when_asked() -> None:
    result = step_cost.measure("tiny-mlp", CPU, 1, with_peers=False, with_options=True)
    assert set(step_cost.OPTIONAL) < set(result["variants"])


def test_a_peer_that_fails_is_a_line_of_the_table(monkeypatch, capsys) -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel\nand more")

    steps = {"somebody cagrad": lambda: None, "somebody pcgrad": fails}
    monkeypatch.setattr(step_cost, "peers", lambda workload: (steps, ["nobody is not installed."]))
    chosen = ("equal+cagrad", *steps)
    result = step_cost.measure("tiny-mlp", CPU, 1, chosen)
    assert result["failures"] == {"somebody pcgrad": "RuntimeError: no such kernel"}
    assert result["variants"]["somebody cagrad"]["to_ours"] < 1
    text = step_cost.table("tiny-mlp", result)
    assert "fails: RuntimeError: no such kernel\n" in text
    assert "nobody is not installed.\n" in text


@pytest.mark.parametrize("library", ["torchjd", "LibMTL"])
def test_peers_fill_every_grad(library: str) -> None:
    workload = TINY["tiny-mlp"](CPU)
    steps, missing = peers(workload)
    mine = {name: step for name, step in steps.items() if name.startswith(library)}
    if not mine:
        assert any(line.startswith(library) for line in missing)
        pytest.skip(f"{library} is not installed")
    for step in mine.values():
        workload.model.zero_grad()
        with warnings.catch_warnings():  # theirs
            warnings.simplefilter("ignore")
            step()
        for parameter in workload.model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_catalogue_measures_every_strategy(capsys, tmp_path) -> None:
    path = tmp_path / "today.json"
    arguments = ("--workload", "tiny-mlp", "--rounds", "1", "--no-peers", "--to", str(path))
    out = report(catalogue, capsys, *arguments)
    assert json.loads(path.read_text()) == out
    rows = out["workloads"]["tiny-mlp"]["variants"]
    for kind in GRADIENTS.values():
        assert f"equal+{kind.__name__.lower()}" in rows
    for kind in WEIGHTINGS.values():
        assert {f"{kind.__name__.lower()}+sum", f"{kind.__name__.lower()}+cagrad"} <= set(rows)
    assert len(rows) == 3 + len(catalogue.variants(3))
    for row in rows.values():
        first, third = row["quartiles"]
        assert 0 < first <= row["median"] <= third
        assert row["ratios"]["floor 2"] == row["median"] / rows["floor 2"]["median"]
        assert row["peers"] == {}


def test_catalogue_prints_one_table(capsys) -> None:
    catalogue.main(["--workload", "tiny-mlp", "--rounds", "1", "--no-peers"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {6}
    assert len(lines) == 2 + 3 + len(catalogue.variants(3))


def test_catalogue_tables_say_who_is_missing_or_fails() -> None:
    def row(seconds: float, **peers: dict) -> dict:
        return {"median": seconds, "ratios": {"floor 2": seconds / 2}, "peers": peers}

    results = {
        "small": {"tasks": 2, "missing": ["nobody is not installed."]}
        | {"variants": {"equal+sum": row(1.0, LibMTL={"fails": "no kernel"})}},
        "large": {"tasks": 3, "missing": []}
        | {"variants": {"equal+sum": row(2.0, torchjd={"to_ours": 1.5}), "equal+krum": row(3.0)}},
    }
    lines = catalogue.table(results).splitlines()
    assert lines[2] == "| equal+sum | 1000.0 | 0.50 | - | fails | 2000.0 | 1.00 | 1.50 | - |"
    assert lines[3] == "| equal+krum | - | - | - | - | 3000.0 | 1.50 | - | - |"
    assert lines[5:] == ["LibMTL equal+sum, small: no kernel", "nobody is not installed."]


@pytest.mark.parametrize("variant", ["autolambda+cagrad", "famo+sum", "equal+modo"])
def test_catalogue_gives_strategies_what_they_need(variant: str) -> None:
    """A validation batch, a look back (or it would be told once), further batches."""
    workload = TINY["tiny-mlp"](CPU)
    step = catalogue.step_of(workload, catalogue.balancer_of(workload, variant))
    for _ in range(3):
        workload.model.zero_grad()
        step()
        for parameter in workload.model.parameters():
            assert parameter.grad is not None


@pytest.mark.parametrize("library", LIBRARIES)
def test_namesakes_fill_every_grad(library: str) -> None:
    workload = TINY["tiny-mlp"](CPU)
    known = catalogue.variants(3)
    assert set(LIBMTL) <= set(known)
    assert {f"{name}+sum" for name in (*SCALARIZERS, "excessmtl")} <= set(known)
    assert {f"equal+{name}" for name in ACROSS} <= set(known)
    steps, missing = peers_of_catalogue(workload, known)
    if library not in steps:
        assert any(line.startswith(library) for line in missing)
        pytest.skip(f"{library} is not installed")
    if library == "torchjd":
        assert {"excessmtl+sum", "equal+modo", "equal+sdmgrad"} <= set(steps[library])
    done = 0
    for variant, step in steps[library].items():
        workload.model.zero_grad()
        with warnings.catch_warnings():  # theirs
            warnings.simplefilter("ignore")
            try:
                step()
            except ImportError:  # of a solver
                continue
        done += 1
        for parameter in workload.model.parameters():
            assert parameter.grad is not None, variant
            assert parameter.grad.isfinite().all(), variant
    assert done >= 10


@pytest.mark.parametrize("name", TINY)
def test_losses_reach_shared_parameters_and_heads(name: str) -> None:
    workload = TINY[name](CPU)
    losses = workload.losses()
    assert tuple(losses) == workload.tasks
    for task, loss in losses.items():
        reached = [*workload.parameters, *workload.heads[task].parameters()]
        torch.autograd.grad(loss, reached, retain_graph=True)  # an error if one is not reached
    assert set(workload.validation_losses()) == set(losses)


def test_the_transformer_makes_the_forward_pass_of_the_example() -> None:
    workload = TINY["tiny-transformer"](CPU)
    workload.model.eval()
    bag = workload.training.inputs
    features = workload.features(bag)
    outputs = [head(features[:, i]) for i, head in enumerate(workload.heads.values())]
    torch.testing.assert_close(tuple(outputs), workload.model(bag).outputs)


def test_limits_are_those_of_measured_workloads() -> None:
    families = {name.partition("-")[0] for name in WORKLOADS}
    assert families == {"transformer", "mlp", "resnet"}
    assert step_cost.limit_of("dwa+cagrad", "mlp", 8) == ("floor 2", 1.20)
    assert step_cost.limit_of("dwa+cagrad", "mlp", 16) is None
    assert step_cost.limit_of("autol+cagrad", "transformer", 2) == ("floor 3", 1.12)


def test_memory_counts_the_peak_and_what_is_left() -> None:
    before = torch.zeros(1000)

    def run() -> None:
        nonlocal before
        first = torch.zeros(1000)  # 4000 bytes live
        second = torch.zeros(2000)  # 12000
        del first  # 8000
        kept.append(torch.zeros(500))  # 10000
        del second
        before = None  # was there before: neither gain nor loss

    kept: list[torch.Tensor] = []
    use = memory.memory_of(run, CPU)
    assert use == (12000, 2000)


def test_memory_counts_what_a_backward_pass_holds() -> None:
    weight = torch.zeros(256, 256, requires_grad=True)
    use = memory.memory_of(lambda: (weight * 2).sum().backward(), CPU)
    size = weight.numel() * 4
    # The product is gone when its gradient is there; .grad stays.
    assert size <= use.kept < 1.1 * size
    assert use.kept <= use.peak < 2.2 * size


def used(run: Callable[[], None], device: torch.device) -> memory.Use:
    """Stand for ``memory_of``, whose profiler takes half a second to start."""
    run()
    return memory.Use(5, 0)


def test_memory_reports_every_strategy(capsys, monkeypatch) -> None:
    out = report(memory, capsys, "--workload", "tiny-mlp")
    result = out["workloads"]["tiny-mlp"]
    assert set(result["variants"]) == {"floor 2", "floor 3", *memory.MEASURED}
    assert result["plain"]["kept"] == pytest.approx(1, abs=0.1)
    for row in result["variants"].values():
        assert {"extra", "left"} <= set(row)
    # A row for each task, instead of one gradient.
    assert result["variants"]["equal+cagrad"]["extra"] > 0.5
    monkeypatch.setattr(memory, "memory_of", used)
    memory.main(["--workload", "tiny-mlp"])
    assert "equal+cagrad" in capsys.readouterr().out


def test_solvers_reports_times_and_gaps(capsys) -> None:
    out = report(solvers, capsys, "--sizes", "2", "--rounds", "1")
    ours = [cell for cell in out["cells"] if cell["solver"] == "ours"]
    assert {cell["m"] for cell in ours} == {2}
    for cell in ours:
        assert cell["seconds"] > 0
        assert cell["gap"] < 1e-10


def test_many_tasks_reports_every_strategy_on_gramians(capsys, monkeypatch) -> None:
    monkeypatch.setattr(many_tasks, "memory_of", used)
    out = report(many_tasks, capsys, "--sizes", "2", "12", "--rounds", "1")
    kinds = {kind.__name__ for kind in GRADIENTS.values() if kind.by_gramian}
    assert set(out["tasks"]["2"]) == kinds - {"Krum"}
    assert set(out["tasks"]["12"]) == kinds
    for costs in out["tasks"]["12"].values():
        assert set(costs) == {"conflicting", "nearly_dependent"}
        for cost in costs.values():
            assert cost["seconds"] > 0
            assert cost["bytes"] == 5


def test_many_tasks_measures_memory_beside_the_gramian() -> None:
    gramian = torch.eye(40, dtype=torch.float64) - 0.01
    cost = many_tasks.cost_of(PCGrad(), gramian, 1)
    assert gramian.nbytes < cost["bytes"] < 100 * gramian.nbytes  # a stretch: 38 at a time


def test_many_tasks_marks_what_is_slow() -> None:
    slow = {"seconds": 2.5, "bytes": 3 * 2**20, "fallbacks": 0}
    fast = {"seconds": 1e-3, "bytes": 0, "fallbacks": 0}
    results = {2: {"A": {"x": fast}}, 9: {"A": {"x": fast, "y": slow}, "B": {"x": fast}}}
    lines = many_tasks.table(results).splitlines()
    assert lines[2:] == ["| `A` | 1 | 0 | 2.5e+03 ! | 3 |", "| `B` | – | – | 1 | 0 |"]


def test_tiny_step_reports_every_variant(capsys) -> None:
    out = report(tiny_step, capsys, "--rounds", "1", "--steps", "1")
    assert set(out["seconds"]) == {"floor 1", "floor 2", *tiny_step.VARIANTS}
    assert all(seconds > 0 for seconds in out["seconds"].values())
    tiny_step.main(["--rounds", "1", "--steps", "1", "--parameters", "3"])
    assert "autol+cagrad" in capsys.readouterr().out


def test_tiny_step_stands_beside_torchjd(capsys) -> None:
    pytest.importorskip("torchjd")
    out = report(tiny_step, capsys, "--rounds", "1", "--steps", "1", "--peers")
    others = set(out["seconds"]) - {"floor 1", "floor 2", *tiny_step.VARIANTS}
    assert {strategy_of(name) for name in others} == set(STRATEGIES)
    assert all(name.startswith("torchjd ") for name in others)


def test_tiny_step_has_so_many_tasks(capsys) -> None:
    assert len(tiny_step.Network(5).losses(torch.randn(32, 16))) == 5
    out = report(tiny_step, capsys, "--rounds", "1", "--steps", "1", "--tasks", "3")
    assert set(out["seconds"]) == {"floor 1", "floor 2", *tiny_step.VARIANTS}


def test_tiny_step_has_a_network_of_so_many_parameters() -> None:
    many = tiny_step.ManyParameters(3)
    assert [parameter.shape for parameter in many.trunk] == [(10,)] * 3
    for loss in many.losses(torch.randn(32, 16)).values():
        reached = torch.autograd.grad(loss, list(many.trunk), retain_graph=True)
        assert all(bool(gradient.any()) for gradient in reached)
