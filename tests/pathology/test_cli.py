from pathlib import Path

import pytest

from examples.pathology import cli, demo
from examples.pathology.cohort import check
from examples.pathology.common import logs
from examples.pathology.common.errors import RunError, UserError
from examples.pathology.common.toml import write_toml
from examples.pathology.features import extract
from examples.pathology.report import report
from examples.pathology.runs import crossval, deploy, heatmap
from examples.pathology.settings.benchmark import METHODS
from examples.pathology.study import benchmark
from tests._commands import help_of

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "extract", "verify-weights", "check", "crossval", "benchmark", "report", "deploy", "heatmap",
    "simulate", "demo",
]  # fmt: skip
NEEDED = ["--clini", "c.csv", "--slide-table", "s.csv", "--features", "f", "--target", "isMSIH"]


def run(*arguments, capsys=None):
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def asked(monkeypatch):
    """Catch what `crossval` is asked for instead of doing it."""
    caught = []
    monkeypatch.setattr(crossval, "run_crossval", caught.append)
    return caught


def test_help_imports_no_heavy_package():
    heavy = {"torch", "pandas", "numpy", "matplotlib", "sklearn", "openslide", "rich"}
    printed = help_of("examples.pathology", {*heavy, "distributed"})
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_common_options(command, capsys):
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--config", "--seed", "--device", "--help"))


def test_crossval_takes_the_documented_options(asked):
    options = ["--auxiliary", "LF", "--auxiliary", "a.b/c", "--balancer", "autol+cagrad"]
    assert run("crossval", *NEEDED, *options, "--out", "run", "--seed", 3) == 0
    (config,) = asked
    assert config.auxiliary == ("LF", "a.b/c")
    assert (config.balancer, config.seed, config.epochs, config.patience) == (
        "autol+cagrad", 3, 32, 7,
    )  # fmt: skip


def test_the_config_file_gives_defaults_and_the_command_line_wins(asked, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        '[crossval]\nclini = "c.csv"\nslide-table = "s.csv"\nfeatures = "f"\ntarget = "isMSIH"\n'
        'auxiliary = ["LF", "ITH"]\nepochs = 3\nseed = 5\nlearning_rate = 0.01\n'
        "[demo]\npatients = 20\n",
        encoding="utf-8",
    )
    assert run("crossval", "--out", "run", "--seed", 6, "--config", path) == 0
    (config,) = asked
    assert (config.epochs, config.seed, config.learning_rate) == (3, 6, 0.01)
    assert config.auxiliary == ("LF", "ITH")
    assert config.clini == Path("c.csv")


def test_the_config_of_a_run_repeats_it(asked, tmp_path):
    options = ["--auxiliary", "LF", "--kind", "LF=classification", "--cutoff", 30]
    assert run("crossval", *NEEDED, "--out", tmp_path / "a", *options) == 0
    path = tmp_path / "config.toml"
    write_toml(path, {"crossval": asked[0].resolved(), "provenance": {"torch": "2"}})
    assert run("crossval", "--config", path) == 0
    assert asked[1].resolved() == asked[0].resolved()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[crossval]\nepoch = 3",
            "the key `epoch` of [crossval] is unknown. Did you mean `epochs`?",
        ),
        ("[crosval]\nepochs = 3", "the section [crosval] is unknown"),
        ("[crossval]\nepochs = true", "`epochs` of [crossval] is no switch, but got true."),
        (
            "[crossval]\nauxiliary = 'Größe'",
            '`auxiliary` of [crossval] must be a list of values, but got one. Write ["Größe"].',
        ),
        ("[crossval]\nsearch-rate = 0.1", "but got one. Write [0.1]."),
        ("[crossval]\nconfig = 'b.toml'", "the key `config` of [crossval] is unknown."),
    ],
)
def test_a_wrong_config_file_is_wrong_use(tmp_path, capsys, text, words):
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    assert run("crossval", *NEEDED, "--out", "run", "--config", path) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["crossval"],
        ["crossval", *NEEDED],
        ["crossval", *NEEDED, "--out", "run", "--folds", "1"],
        ["crossval", *NEEDED, "--out", "run", "--epochs", "many"],
        ["crossval", *NEEDED, "--out", "run", "--schedule", "linear"],
        ["crossval", *NEEDED, "--out", "run"],  # no such files
        ["no-such-command"],
        ["extract", "--slides", "no such folder", "--out", "x"],
        ["report", "--run", "no such folder"],
    ],
)
def test_wrong_use_is_2_without_a_traceback(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert "Error" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(("error", "code"), [(UserError("No."), 2), (RunError("No."), 1)])
def test_errors_become_exit_codes(monkeypatch, capsys, error, code):
    def fail(_):
        raise error

    monkeypatch.setattr(crossval, "run_crossval", fail)
    assert run("crossval", *NEEDED, "--out", "run") == code
    assert capsys.readouterr().err == "Error: No.\n"


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr(crossval, "run_crossval", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["crossval", *NEEDED, "--out", "run"])


@pytest.mark.parametrize("code", [0, 1])
def test_extract_passes_its_options_on_and_returns_its_code(monkeypatch, tmp_path, code):
    asked = []

    class Summary:
        exit_code = code

    def run_extract(config):
        asked.append(config)
        return Summary()

    monkeypatch.setattr(extract, "run_extract", run_extract)
    options = ["--default-mpp", "0.5", "--workers", "3", "--min-edge-share", "0.01"]
    assert run("extract", "--slides", "s", "--out", "o", *options) == code
    assert (asked[-1].default_mpp, asked[-1].workers, asked[-1].weights) == (0.5, 3, None)
    assert asked[-1].rules.min_edge_share == 0.01
    assert asked[-1].rules.brightness_cutoff == 240.0
    assert (asked[-1].extractor, asked[-1].precision, asked[-1].layout, asked[-1].max_failures) == (
        "ctranspath", "float32", "stamp-v2", None,
    )  # fmt: skip
    options = ["--extractor", "timm:x", "--precision", "bfloat16", "--max-failures", 0]
    assert run("extract", "--slides", "s", "--out", "o", *options, "--canny-low", 30) == code
    assert (asked[-1].extractor, asked[-1].precision, asked[-1].layout, asked[-1].max_failures) == (
        "timm:x", "bfloat16", "stamp-v2", 0,
    )  # fmt: skip
    assert (asked[-1].rules.canny_low, asked[-1].workers) == (30, None)
    assert (asked[-1].processes, asked[-1].scheduler) == (None, None)
    options = ["--tile-um", 112, "--tile-px", 448]
    more = ["--extractor-option", "depth=2", "--extractor-option", "pool=cls_mean"]
    assert run("extract", "--slides", "s", "--out", "o", *options, *more) == code
    assert (asked[-1].rules.tile_size_um, asked[-1].rules.tile_size_px) == (112.0, 448)
    assert asked[-1].extractor_option == ("depth=2", "pool=cls_mean")
    options = ["--processes", 2, "--scheduler", "tcp://a:1"]
    assert run("extract", "--slides", "s", "--out", "o", *options) == code
    assert (asked[-1].processes, asked[-1].scheduler) == (2, "tcp://a:1")


@pytest.mark.parametrize(("released", "code"), [(True, 0), (False, 1)])
def test_the_verdict_on_weights_is_printed_and_is_the_exit_code(
    monkeypatch, capsys, released, code
):
    from examples.pathology.extractors import ctranspath

    verdict = ctranspath.Verdict(released, "w.pth is so and so.")
    monkeypatch.setattr(ctranspath, "verify_weights", lambda path: verdict)
    assert run("verify-weights", "--weights", "w.pth") == code
    assert capsys.readouterr().out == "w.pth is so and so.\n"


def test_unusable_weights_are_wrong_use(tmp_path, capsys):
    (tmp_path / "w.pth").write_text("<html>")
    assert run("verify-weights", "--weights", tmp_path / "w.pth") == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "w.pth is not a checkpoint" in shown.err


def test_demo_and_report_print_where_the_page_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda config: config.out / "page")
    assert run("demo", "--out", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page'}\n"
    monkeypatch.setattr(report, "write_report", lambda runs, out, **_: runs[1])
    assert run("report", "--run", "a", "--run", "b") == 0
    assert capsys.readouterr().out == "b\n"


def test_logs_go_to_stderr(capsys, monkeypatch):
    logs.set_up_logging()
    logs.set_up_logging()  # twice must not double the lines
    import logging

    logging.getLogger("examples.pathology.x").info("a line")
    monkeypatch.setattr(logging.getLogger("another.package"), "level", logging.DEBUG)
    logging.getLogger("another.package").info("noise")
    logging.getLogger("another.package").warning("trouble")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("a line") == 1
    assert "noise" not in shown.err
    assert "trouble" in shown.err


@pytest.mark.parametrize("code", [0, 1])
def test_check_passes_its_options_on_prints_and_returns_its_code(monkeypatch, capsys, code):
    asked = []

    def run_check(config, say):
        asked.append(config)
        say("a line")
        return code

    monkeypatch.setattr(check, "run_check", run_check)
    options = ["--auxiliary", "LF", "--folds", "3", "--patient-column", "case"]
    options += ["--cutoff", "42", "--kind", "LF=classification"]
    assert run("check", *NEEDED, *options, "--complete-cases") == code
    (config,) = asked
    assert (config.auxiliary, config.folds, config.patient_column) == (("LF",), 3, "case")
    assert config.complete_cases
    assert (config.cutoff, config.kind) == (42.0, ("LF=classification",))
    assert capsys.readouterr().out == "a line\n"


def test_deploy_and_heatmap_pass_their_options_on(monkeypatch):
    asked = []
    pages = []
    monkeypatch.setattr(deploy, "run_deploy", asked.append)
    monkeypatch.setattr(report, "write_report", lambda runs, **_: pages.append(runs))
    monkeypatch.setattr(heatmap, "run_heatmap", asked.append)
    tables = NEEDED[: NEEDED.index("--target")]
    assert run("deploy", "--run", "r", *tables, "--out", "o", "--filename-column", "slide") == 0
    assert run("deploy", "--run", "r", *tables, "--out", "o", "--skip-unknown-labels") == 0
    assert run(
        "heatmap", "--run", "r", "--slide", "a.svs", "--features", "a.h5", "--out", "o", "--top", 3,
        "--slide-table", "t.csv", "--filename-column", "slide", "--default-mpp", 0.25,
    ) == 0  # fmt: skip
    deployed, skipping, drawn = asked
    assert pages == [[Path("o")]] * 2
    assert (deployed.skip_unknown_labels, skipping.skip_unknown_labels) == (False, True)
    assert (deployed.run, deployed.filename_column) == (Path("r"), "slide")
    assert (drawn.slide, drawn.features, drawn.top) == (Path("a.svs"), Path("a.h5"), 3)
    assert (drawn.slide_table, drawn.filename_column) == (Path("t.csv"), "slide")
    assert drawn.default_mpp == 0.25


@pytest.mark.parametrize("mpp", [-1, 0, 0.05, 10, "nan"])
@pytest.mark.parametrize(
    "command", ["extract --slides s", "heatmap --run r --slide a --features b"]
)
def test_a_default_that_no_scanner_has_is_refused_before_any_slide(monkeypatch, command, mpp):
    def fail(_):
        raise AssertionError

    monkeypatch.setattr(extract, "run_extract", fail)
    monkeypatch.setattr(heatmap, "run_heatmap", fail)
    assert run(*command.split(), "--out", "o", "--default-mpp", mpp) == 2


def test_crossval_passes_every_setting_on(asked):
    """Every field of the configuration is an option, and arrives."""
    given = {
        "complete_cases": True, "max_tiles": 7, "precision": "bfloat16", "cache_gb": 0.5,
        "reference_protocol": True, "patient_column": "case", "filename_column": "slide",
        "schedule": "cosine-per-step", "cutoff": 42.0, "kind": ("isMSIH=classification",),
    }  # fmt: skip
    options = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    options[-1] = "isMSIH=classification"
    assert run("crossval", *NEEDED, "--out", "run", *options) == 0
    assert {name: getattr(asked[0], name) for name in given} == given


def test_benchmark_passes_every_setting_on_and_its_settings_repeat_it(
    monkeypatch, tmp_path, capsys
):
    asked = []

    def run_benchmark(config):
        asked.append(config)
        return Path("page"), len(asked) - 1

    monkeypatch.setattr(benchmark, "run_benchmark", run_benchmark)
    options = [
        *NEEDED, "--auxiliary", "LF", "--auxiliary", "ITH", "--out", tmp_path / "out",
        "--method", "naive", "--method", "autol+cagrad", "--workers", 3, "--threads", 2,
        "--external-clini", "ec.csv", "--external-slide-table", "es.csv",
        "--external-features", "ef", "--max-failures", 4, "--epochs", 5, "--width", 96,
        "--device", "cpu", "--note", "n", "--cutoff", 30,
    ]  # fmt: skip
    assert run("benchmark", *options) == 0
    config = asked[0]
    assert (config.auxiliary, config.methods) == (("LF", "ITH"), ("naive", "autol+cagrad"))
    assert (config.workers, config.threads, config.max_failures) == (3, 2, 4)
    assert config.crossval.cutoff == 30.0
    assert config.external.slide_table == Path("es.csv")
    assert (config.crossval.epochs, config.crossval.width, config.crossval.note) == (5, 96, "n")
    assert config.command.startswith("python -m examples.pathology")
    path = tmp_path / "study.toml"
    write_toml(path, {"benchmark": config.resolved(), "provenance": {"torch": "2"}})
    assert run("benchmark", "--config", path) == 1  # of the second, one job failed
    assert asked[1].resolved() == asked[0].resolved()
    assert capsys.readouterr().out.split() == ["page", "page"]
    assert run("benchmark", *NEEDED, "--auxiliary", "LF", "--out", "o") == 1
    assert asked[2].methods == METHODS
    assert asked[2].external is None
