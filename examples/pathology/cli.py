"""The command line: reads the arguments, calls one stage, turns its outcome into an exit code.

0: all well; 1: some items failed, or the run did; 2: wrong use. Logs and progress go to stderr.
What a command may be asked for is in `settings`; every stage is imported when it is asked for, so
that ``--help`` answers at once.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import typer

from examples.pathology.common.errors import RunError, UserError
from examples.pathology.settings.benchmark import BenchmarkConfig
from examples.pathology.settings.cohort import CheckConfig
from examples.pathology.settings.command import command
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.extract import ExtractConfig, VerifyWeightsConfig
from examples.pathology.settings.grid import GridConfig
from examples.pathology.settings.runs import DemoConfig, DeployConfig, HeatmapConfig, ReportConfig
from examples.pathology.settings.simulate import SimulateConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take a third of the second
    help="Whole-slide images in, a cross-validated multi-task biomarker model out.",
)


@command(app, ExtractConfig)
def extract(config: ExtractConfig) -> None:
    """Cut slides into tiles and compute a network's features of each."""
    from examples.pathology.features.extract import run_extract

    raise typer.Exit(run_extract(config).exit_code)


@command(app, VerifyWeightsConfig, "verify-weights")
def verify_weights(config: VerifyWeightsConfig) -> None:
    """Say whether a file is the released CTransPath (0), another usable one (1) or unusable (2)."""
    from examples.pathology.extractors import ctranspath

    verdict = ctranspath.verify_weights(config.weights)
    typer.echo(verdict.sentence)
    raise typer.Exit(0 if verdict.released else 1)


@command(app, CheckConfig)
def check(config: CheckConfig) -> None:
    """Say what of tables and features fits together, what does not, and what is known.

    The exit code is 1 if a name has no partner or a file cannot be used.
    """
    from examples.pathology.cohort.check import run_check

    raise typer.Exit(run_check(config, typer.echo))


@command(app, CrossvalConfig)
def crossval(config: CrossvalConfig) -> None:
    """Cross-validate the joint Transformer by patient, with all results in one run folder."""
    from examples.pathology.runs.crossval import run_crossval

    run_crossval(config)


@command(app, BenchmarkConfig)
def benchmark(config: BenchmarkConfig) -> None:
    """Compare all balancers with the baseline on the same folds: tables, tests, a report.

    The exit code is 1 if a job failed; run again, only what is missing is done.
    """
    from examples.pathology.study.benchmark import run_benchmark

    typed = shlex.join(["python", "-m", "examples.pathology", *sys.argv[1:]])
    page, missing = run_benchmark(replace(config, command=typed))
    typer.echo(page)
    raise typer.Exit(1 if missing else 0)


@command(app, DeployConfig)
def deploy(config: DeployConfig) -> None:
    """Predict for another cohort with every fold of a run, and with their mean."""
    from examples.pathology.report.report import write_report
    from examples.pathology.runs.deploy import run_deploy

    run_deploy(config)
    write_report([config.out], config=config.page)


@command(app, DemoConfig)
def demo(config: DemoConfig) -> None:
    """Run everything on synthetic slides: extract, compare three methods, report; CPU, minutes."""
    from examples.pathology.demo import run_demo

    typer.echo(run_demo(config))


@command(app, HeatmapConfig)
def heatmap(config: HeatmapConfig) -> None:
    """Show what tiles of a slide, or of all slides of a run, say: attention, scores, top tiles.

    The exit code is 1 if one of several slides failed; run again, only what is missing is drawn.
    """
    from examples.pathology.runs.heatmap import run_heatmap
    from examples.pathology.runs.heatmaps import run_heatmaps

    if config.slides is not None:
        raise typer.Exit(run_heatmaps(config, config.slides))
    run_heatmap(config)


@command(app, ReportConfig)
def report(config: ReportConfig) -> None:
    """Write the figures and numbers of one or more finished runs on one page."""
    from examples.pathology.common.folders import DEPLOYED
    from examples.pathology.report.report import write_report
    from examples.pathology.study.folder import SETTINGS, read_study
    from examples.pathology.study.report import write_study_report

    for file, name in ((SETTINGS, "benchmark"), (DEPLOYED, "deployment")):
        if len(config.run) > 1 and any((folder / file).exists() for folder in config.run):
            raise UserError(
                f"A {name} must be reported alone, but got {len(config.run)} folders. Give its "
                "--run only."
            )
    if (config.run[0] / SETTINGS).exists():
        study = read_study(config.run[0])
        typer.echo(write_study_report(study, config.out, config=config.page))
    else:
        typer.echo(write_report(config.run, config.out, seed=config.seed, config=config.page))


@command(app, SimulateConfig)
def simulate(config: SimulateConfig) -> None:
    """Make feature bags with a known truth for the labels of a clinical table."""
    from examples.pathology.simulation.simulate import run_simulate

    typer.echo(run_simulate(config).sources.clini.parent)


@command(app, GridConfig)
def grid(config: GridConfig) -> None:
    """Show on simulated cohorts where joint training helps, hurts or does nothing.

    The exit code is 1 if a training failed; run again, only what is missing is done.
    """
    from examples.pathology.study.grid import run_grid

    page, missing = run_grid(config)
    typer.echo(page)
    raise typer.Exit(1 if missing else 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: What follows the program's name; ``None``: ``sys.argv``.
    """
    # Threads of PyTorch that wait spin by default. With anything else running on the same cores,
    # they take the time from those that work: a training step was 15 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    how: dict[str, Any] = {"prog_name": "python -m examples.pathology"}
    try:
        app(list(arguments) if arguments is not None else None, **how)
    except UserError as error:
        _complain(error)
        raise SystemExit(2) from None
    except RunError as error:
        _complain(error)
        raise SystemExit(1) from None


def _complain(error: Exception) -> None:
    print(f"Error: {error}", file=sys.stderr)  # noqa: T201
