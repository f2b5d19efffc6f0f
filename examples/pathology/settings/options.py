"""Options that several commands share, each said once, and what they do as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from examples.pathology.common.logs import set_up_logging


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a section of a TOML file supply the defaults of this command's options."""
    if path is None:
        return None
    from examples.pathology.common.toml import read_section

    section = str(context.info_name)
    parents = context.parent.command if context.parent else context.command
    sections = [*getattr(parents, "commands", {section: None}), "provenance"]
    own = {"config", "help"}
    known = [str(p.name) for p in context.command.params if p.name not in own]
    values = read_section(path, section, known, sections)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _quiet_or_not(verbose: bool) -> bool:
    set_up_logging(verbose=verbose)
    return verbose


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Defaults for these options, from the section named like the command; "
        "the command line wins.",
        is_eager=True,
        callback=_use_config,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
CompleteCases = Annotated[
    bool,
    typer.Option(
        "--complete-cases",
        help="Leave out patients who lack a value of any target, as the paper does.",
    ),
]
NoDevice = Annotated[str, typer.Option(help="Accepted as everywhere; none is needed here.")]
PatientColumn = Annotated[str, typer.Option(help="Column of the patient in both tables.")]
FilenameColumn = Annotated[str, typer.Option(help="Column of the file name in the slide table.")]
MppTable = Annotated[
    Path | None, typer.Option(help="Table whose MPP column gives um per pixel by file name.")
]
Clini = Annotated[
    Path, typer.Option(help="Clinical table (.csv, .xlsx) with the patient and targets.")
]
SlideTable = Annotated[Path, typer.Option(help="Table of patient and file name.")]
Features = Annotated[Path, typer.Option(help="Folder of feature files (.h5).")]
Target = Annotated[
    str,
    typer.Option(help="Column of the primary target; numbers of over 20 values are a regression."),
]
Auxiliary = Annotated[
    list[str] | None, typer.Option(help="Column of a further target; may be given several times.")
]
Kind = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=classification|regression",
        help="What a target is, where its values do not tell; may be given several times.",
    ),
]
Cutoff = Annotated[
    float | None,
    typer.Option(help="Makes two classes of a numeric --target: from here on it is positive."),
]
Positive = Annotated[
    str | None, typer.Option(help="Class whose AUROC is reported; default: the rarer one.")
]
Folds = Annotated[int, typer.Option(min=2, help="Number of folds.")]
Epochs = Annotated[int, typer.Option(min=1, help="Most epochs per fold.")]
Patience = Annotated[
    int, typer.Option(min=1, help="Epochs without a lower validation loss before a fold stops.")
]
LearningRate = Annotated[float, typer.Option(help="Of AdamW.")]
WeightDecay = Annotated[float, typer.Option(help="Of AdamW.")]
Schedule = Annotated[str, typer.Option(help="constant, cosine (per epoch) or cosine-per-step.")]
Standardize = Annotated[
    bool,
    typer.Option("--standardize", help="Scale tile features by mean and sd of the training part."),
]
LookaheadData = Annotated[
    str,
    typer.Option(help="Auto-Lambda's look-ahead: heldout (a tenth of the training part) or train."),
]
Splits = Annotated[
    Path | None, typer.Option(help="splits.json of another run, to compare on equal folds.")
]
Width = Annotated[
    int, typer.Option(min=1, help="Of the Transformer, a multiple of its 6 attention heads.")
]
Layers = Annotated[int, typer.Option(min=1, help="Of its encoder, and of its decoder.")]
MaxTiles = Annotated[
    int | None,
    typer.Option(min=1, help="Most tiles per patient and step, drawn anew in every epoch."),
]
Precision = Annotated[str, typer.Option(help="float32; on a GPU also tf32 or bfloat16 (autocast).")]
CacheGb = Annotated[float, typer.Option(min=0, help="Memory for tiles, in GB.")]
ReferenceProtocol = Annotated[
    bool,
    typer.Option(
        "--reference-protocol",
        help="Splits, complete cases, schedule and patience of the paper's published code.",
    ),
]
Note = Annotated[str, typer.Option(help="A sentence for figures and report.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Log more.", callback=_quiet_or_not)]
