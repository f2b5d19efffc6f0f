# ruff: noqa: ARG001  (--config and --verbose act, and annotations count, as arguments are read)
"""The command line: reads the arguments, calls one stage, turns its outcome into an exit code.

0: all well; 1: some items failed, or the run did; 2: wrong use. Logs and progress go to stderr.
Every stage is imported when it is asked for, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from examples.pathology.common.errors import RunError, UserError
from examples.pathology.settings import options

if TYPE_CHECKING:
    from examples.pathology.settings.cohort import CohortConfig
    from examples.pathology.settings.simulate import SimulateConfig

Settings = TypeVar("Settings", bound="CohortConfig | SimulateConfig")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take a third of the second
    help="Whole-slide images in, a cross-validated multi-task biomarker model out.",
)


@app.command()
def extract(
    slides: Annotated[Path, typer.Option(help="Folder of slides, searched with its sub-folders.")],
    out: Annotated[Path, typer.Option(help="Where the feature files go.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="ctranspath.pth; without it, seeded RANDOM weights that carry no biology."
        ),
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="ctranspath, or timm:NAME for one of timm's models.")
    ] = "ctranspath",
    slide_table: options.MppTable = None,
    filename_column: options.FilenameColumn = "FILENAME",
    default_mpp: Annotated[
        float | None, typer.Option(help="um per pixel of slides that do not tell theirs.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads that read tiles, in each process; default: 2 on a CPU, with a GPU one "
            "per core.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That share the slides; default: one per device.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT", help="Of Dask, whose workers share the slides instead."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Tiles per forward pass.")] = 64,
    brightness_cutoff: Annotated[
        float, typer.Option(help="Tiles at least this bright on average (0 to 255) are glass.")
    ] = 240.0,
    min_edge_share: Annotated[
        float, typer.Option(help="Tiles with a smaller share of edge pixels are background.")
    ] = 0.02,
    canny_low: Annotated[float, typer.Option(help="Lower threshold of the edges.")] = 40.0,
    canny_high: Annotated[float, typer.Option(help="Upper threshold of the edges.")] = 100.0,
    max_dark_share: Annotated[
        float, typer.Option(help="Slides with a larger share of dark pixels are fluorescence.")
    ] = 0.5,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16: faster on a GPU, features differ by 0.03.")
    ] = "float32",
    layout: Annotated[
        str, typer.Option(help="Of the feature files: stamp-v2, or stamp-v1 for its old readers.")
    ] = "stamp-v2",
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="End the run when more slides than this have failed.")
    ] = None,
    seed: options.Seed = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; several with commas share the slides.")
    ] = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Cut slides into tiles of 256 um and compute their CTransPath features."""
    from examples.pathology.features.extract import extract as run_extract
    from examples.pathology.settings.extract import TileRules

    summary = run_extract(
        slides,
        out,
        weights=weights,
        slide_table=slide_table,
        filename_column=filename_column,
        default_mpp=default_mpp,
        workers=workers,
        processes=processes,
        scheduler=scheduler,
        device=device,
        seed=seed,
        batch_size=batch_size,
        tile_rules=TileRules(
            brightness_cutoff=brightness_cutoff,
            min_edge_share=min_edge_share,
            canny_low=canny_low,
            canny_high=canny_high,
            max_dark_share=max_dark_share,
        ),
        extractor=extractor,
        precision=precision,
        layout=layout,
        max_failures=max_failures,
    )
    raise typer.Exit(summary.exit_code)


@app.command("verify-weights")
def verify_weights(
    weights: Annotated[Path, typer.Option(help="A CTransPath checkpoint.")],
    seed: Annotated[int, typer.Option(min=0, help="Accepted as everywhere; not used.")] = 0,
    device: Annotated[str, typer.Option(help="Accepted as everywhere; not used.")] = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Say whether a file is the released CTransPath (0), another usable one (1) or unusable (2)."""
    from examples.pathology.extractors import ctranspath

    verdict = ctranspath.verify_weights(weights)
    typer.echo(verdict.sentence)
    raise typer.Exit(0 if verdict.released else 1)


@app.command()
def check(
    clini: options.Clini,
    slide_table: options.SlideTable,
    features: options.Features,
    target: options.Target,
    auxiliary: options.Auxiliary = None,
    kind: options.Kind = None,
    cutoff: options.Cutoff = None,
    positive: options.Positive = None,
    folds: options.Folds = 5,
    complete_cases: options.CompleteCases = False,
    patient_column: options.PatientColumn = "PATIENT",
    filename_column: options.FilenameColumn = "FILENAME",
    limit: Annotated[int, typer.Option(min=1, help="Most names that a list shows.")] = 20,
    seed: options.Seed = 0,
    device: options.NoDevice = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Say what of tables and features fits together, what does not, and what is known.

    The exit code is 1 if a name has no partner or a file cannot be used.
    """
    from examples.pathology.cohort.check import CheckConfig, run_check

    raise typer.Exit(run_check(_settings(CheckConfig, locals()), typer.echo))


@app.command()
def crossval(
    clini: options.Clini,
    slide_table: options.SlideTable,
    features: options.Features,
    target: options.Target,
    out: Annotated[Path, typer.Option(help="The run folder; a stopped run is taken up again.")],
    auxiliary: options.Auxiliary = None,
    balancer: Annotated[
        str,
        typer.Option(
            help="baseline (the target alone), naive, uncert, dwa+pcgrad, autol+cagrad, ..."
        ),
    ] = "naive",
    kind: options.Kind = None,
    cutoff: options.Cutoff = None,
    positive: options.Positive = None,
    folds: options.Folds = 5,
    epochs: options.Epochs = 32,
    patience: options.Patience = 7,
    learning_rate: options.LearningRate = 1e-4,
    weight_decay: options.WeightDecay = 0.01,
    schedule: options.Schedule = "constant",
    standardize: options.Standardize = False,
    lookahead_data: options.LookaheadData = "heldout",
    splits: options.Splits = None,
    complete_cases: options.CompleteCases = False,
    width: options.Width = 384,
    layers: options.Layers = 2,
    max_tiles: options.MaxTiles = None,
    precision: options.Precision = "float32",
    cache_gb: options.CacheGb = 4.0,
    reference_protocol: options.ReferenceProtocol = False,
    patient_column: options.PatientColumn = "PATIENT",
    filename_column: options.FilenameColumn = "FILENAME",
    note: options.Note = "",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Cross-validate the joint Transformer by patient, with all results in one run folder."""
    from examples.pathology.runs.crossval import run_crossval
    from examples.pathology.settings.crossval import CrossvalConfig

    run_crossval(_settings(CrossvalConfig, locals()))


def _settings(kind: type[Settings], arguments: Mapping[str, Any]) -> Settings:
    """Return the settings that a command was given: its arguments bear their names."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name in arguments:
            value = arguments[field.name]
            values[field.name] = tuple(value or ()) if isinstance(field.default, tuple) else value
    return kind(**values)


@app.command()
def benchmark(
    clini: options.Clini,
    slide_table: options.SlideTable,
    features: options.Features,
    target: options.Target,
    auxiliary: Annotated[
        list[str],
        typer.Option(help="Auxiliary target, joined with the primary one on its own; several."),
    ],
    out: Annotated[Path, typer.Option(help="Its folder; a stopped benchmark is taken up again.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="baseline or a balancer; several; default: baseline and all 16."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start; default: one per GPU, or one per core."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="tcp://HOST:PORT", help="A running Dask scheduler to use instead."),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Of PyTorch in each job; the last digits depend on it.")
    ] = 1,
    external_clini: Annotated[
        Path | None, typer.Option(help="Clinical table of a cohort to deploy every run on.")
    ] = None,
    external_slide_table: Annotated[Path | None, typer.Option(help="Its slide table.")] = None,
    external_features: Annotated[Path | None, typer.Option(help="Its feature files.")] = None,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="End when more jobs than this have failed.")
    ] = None,
    kind: options.Kind = None,
    cutoff: options.Cutoff = None,
    positive: options.Positive = None,
    folds: options.Folds = 5,
    epochs: options.Epochs = 32,
    patience: options.Patience = 7,
    learning_rate: options.LearningRate = 1e-4,
    weight_decay: options.WeightDecay = 0.01,
    schedule: options.Schedule = "constant",
    standardize: options.Standardize = False,
    lookahead_data: options.LookaheadData = "heldout",
    splits: options.Splits = None,
    complete_cases: options.CompleteCases = False,
    width: options.Width = 384,
    layers: options.Layers = 2,
    max_tiles: options.MaxTiles = None,
    precision: options.Precision = "float32",
    cache_gb: options.CacheGb = 4.0,
    reference_protocol: options.ReferenceProtocol = False,
    patient_column: options.PatientColumn = "PATIENT",
    filename_column: options.FilenameColumn = "FILENAME",
    note: options.Note = "",
    seed: options.Seed = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; several (cuda:0,cuda:1) share the jobs.")
    ] = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Compare all balancers with the baseline on the same folds: tables, tests, a report.

    The exit code is 1 if a job failed; run again, only what is missing is done.
    """
    arguments = {**locals(), "auxiliary": (), "kind": ()}
    from examples.pathology.settings.crossval import CrossvalConfig
    from examples.pathology.study import benchmark as stage

    page, missing = stage.run_benchmark(
        stage.BenchmarkConfig(
            _settings(CrossvalConfig, arguments),
            auxiliary=tuple(auxiliary),
            kind=tuple(kind or ()),
            methods=tuple(methods or stage.METHODS),
            external=stage.external_cohort(external_clini, external_slide_table, external_features),
            workers=workers,
            scheduler=scheduler,
            threads=threads,
            max_failures=max_failures,
            command=shlex.join(["python", "-m", "examples.pathology", *sys.argv[1:]]),
        )
    )
    typer.echo(page)
    raise typer.Exit(1 if missing else 0)


@app.command()
def deploy(
    run: Annotated[Path, typer.Option(help="A finished run of crossval.")],
    clini: Annotated[
        Path, typer.Option(help="Clinical table of the other cohort; labels may be missing.")
    ],
    slide_table: Annotated[Path, typer.Option(help="Table of patient and file name.")],
    features: Annotated[Path, typer.Option(help="Folder of feature files (.h5).")],
    out: Annotated[Path, typer.Option(help="Where the results go.")],
    patient_column: options.PatientColumn = "PATIENT",
    filename_column: options.FilenameColumn = "FILENAME",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Predict for another cohort with every fold of a run, and with their mean."""
    from examples.pathology.runs.deploy import DeployConfig, run_deploy

    run_deploy(
        DeployConfig(
            run=run,
            clini=clini,
            slide_table=slide_table,
            features=features,
            out=out,
            patient_column=patient_column,
            filename_column=filename_column,
            seed=seed,
            device=device,
        )
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    patients: Annotated[int, typer.Option(min=10, help="Size of the synthetic cohort.")] = 40,
    epochs: Annotated[int, typer.Option(min=1, help="Most epochs per fold.")] = 6,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Run everything on synthetic slides: extract, compare three methods, report; CPU, minutes."""
    from examples.pathology.demo import run_demo

    page = run_demo(out, patients=patients, epochs=epochs, seed=seed, device=device)
    typer.echo(page)


@app.command()
def heatmap(
    run: Annotated[Path, typer.Option(help="A finished run of crossval.")],
    slide: Annotated[Path, typer.Option(help="The slide; of a DICOM series, any file.")],
    features: Annotated[Path, typer.Option(help="The slide's feature file (.h5).")],
    out: Annotated[Path, typer.Option(help="Where the pictures go.")],
    slide_table: options.MppTable = None,
    filename_column: options.FilenameColumn = "FILENAME",
    default_mpp: Annotated[
        float | None, typer.Option(help="um per pixel of a slide that does not tell its own.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=32, help="How many top tiles to show.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Accepted as everywhere; not used.")] = 0,
    device: options.Device = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Show what each tile of a slide says: attention and class score over the slide, top tiles."""
    from examples.pathology.runs.heatmap import HeatmapConfig, run_heatmap

    run_heatmap(
        HeatmapConfig(
            run=run,
            slide=slide,
            features=features,
            out=out,
            slide_table=slide_table,
            filename_column=filename_column,
            default_mpp=default_mpp,
            top=top,
            device=device,
        )
    )


@app.command()
def report(
    run: Annotated[
        list[Path],
        typer.Option(
            help="A run folder, or a folder of runs; may be given several times. Or a benchmark's "
            "folder: its page is written again."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; default: report/ in the first --run.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the t-SNE; a benchmark has a seed of its own.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="Accepted as everywhere; a report needs none.")
    ] = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Write the figures and numbers of one or more finished runs on one page."""
    from examples.pathology.report.report import write_report
    from examples.pathology.study.folder import SETTINGS, read_study
    from examples.pathology.study.report import write_study_report

    if not any((folder / SETTINGS).exists() for folder in run):
        typer.echo(write_report(run, out, seed=seed))
    elif len(run) == 1:
        typer.echo(write_study_report(read_study(run[0]), out))
    else:
        raise UserError(
            f"A benchmark must be reported alone, but got {len(run)} folders. Give its --run only."
        )


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Where the cohort goes.")],
    clini: Annotated[
        Path | None,
        typer.Option(help="Clinical table with real labels; default: labels are drawn as well."),
    ] = None,
    target: Annotated[str, typer.Option(help="Column of the biomarker.")] = "isMSIH",
    auxiliary: Annotated[
        list[str] | None,
        typer.Option(
            help="Signature to keep as auxiliary target; may be given several times; default: all."
        ),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="Label that alters tumour tiles; default: the rarer one.")
    ] = None,
    patients: Annotated[
        int | None, typer.Option(help="How many to draw without --clini; default: 450.")
    ] = None,
    slide_table: Annotated[
        Path | None, typer.Option(help="Table of PATIENT and FILENAME; default: a slide each.")
    ] = None,
    external_clini: Annotated[
        Path | None, typer.Option(help="Clinical table of another site, for OUT/external.")
    ] = None,
    composition: Annotated[
        str, typer.Option(help="drawn from label and signatures, or measured.")
    ] = "drawn",
    tissue_fractions: Annotated[
        Path | None, typer.Option(help="Table of measured fractions: PATIENT, ADI, BACK, ..., TUM.")
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", help="Shuffle the auxiliary values: they carry nothing.")
    ] = False,
    tiles: Annotated[int, typer.Option(help="Median number of tiles of a slide.")] = 200,
    max_tiles: Annotated[int, typer.Option(help="Most tiles of a slide.")] = 1000,
    tumour_shift: Annotated[
        float | None,
        typer.Option(help="Of altered tumour tiles, in sd; default: 6, or 0 if measured."),
    ] = None,
    tumour_share: Annotated[
        float, typer.Option(help="Share of altered tumour tiles in the median positive patient.")
    ] = 0.4,
    tumour_noise: Annotated[
        float, typer.Option(help="Sd of the log-odds of that share between patients.")
    ] = 1.5,
    lymphocyte_shift: Annotated[
        float, typer.Option(help="What the biomarker adds to the log-share of lymphocytes.")
    ] = 0.3,
    signature_effect: Annotated[
        float | None,
        typer.Option(help="Of a signature on its tissue; default: 0.8, or 0 if measured."),
    ] = None,
    signature_shift: Annotated[
        float, typer.Option(help="Of tumour tiles with proliferation and heterogeneity.")
    ] = 0.4,
    composition_noise: Annotated[
        float, typer.Option(help="Sd of log-shares of tissue between patients alike.")
    ] = 0.4,
    batch_effect: Annotated[float, typer.Option(help="Between slides, in sd of a feature.")] = 0.2,
    domain_shift: Annotated[float, typer.Option(help="Of the other site, likewise.")] = 0.3,
    patient_column: options.PatientColumn = "PATIENT",
    filename_column: options.FilenameColumn = "FILENAME",
    seed: options.Seed = 0,
    device: options.NoDevice = "auto",
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Make feature bags with a known truth for the labels of a clinical table."""
    from examples.pathology.settings.simulate import SimulateConfig
    from examples.pathology.simulation.simulate import run_simulate

    cohort = run_simulate(_settings(SimulateConfig, locals()))
    typer.echo(cohort.clini.parent)


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
