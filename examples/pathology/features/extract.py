"""The command extract: a folder of slides to feature files."""

from __future__ import annotations

from pathlib import Path

from examples.pathology.features import dispatch
from examples.pathology.features.ledger import ExtractSummary
from examples.pathology.settings.extract import Settings, TileRules
from examples.pathology.slides.pixelsizes import mpp_of_slides
from examples.pathology.slides.slide import find_slides


def extract(
    slides: Path,
    out: Path,
    *,
    weights: Path | None,
    slide_table: Path | None = None,
    filename_column: str = "FILENAME",
    default_mpp: float | None = None,
    workers: int | None = None,
    processes: int | None = None,
    scheduler: str | None = None,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    tile_rules: TileRules | None = None,
    extractor: str = "ctranspath",
    precision: str = "float32",
    layout: str = "stamp-v2",
    max_failures: int | None = None,
) -> ExtractSummary:
    """Turn a folder of slides into feature files, tile pictures and a ledger.

    Writes ``<out>/<stem>.h5`` (sub-folders kept), ``<out>/thumbnails/<stem>.jpg`` and
    ``<out>/ledger.csv``. Slides that an earlier run finished with the same parameters are left
    alone; with other parameters they are redone, and the log says which changed. A slide that
    cannot be used gets a row in the ledger and never stops the run.

    Args:
        slides: Folder of slides.
        out: Output folder; made if missing.
        weights: The extractor's checkpoint; None for random weights, which is said in every file.
        slide_table: Table (.csv, .xlsx) whose column MPP gives pixel sizes in um by file name.
        filename_column: Its column of the file name.
        default_mpp: Microns per pixel of slides that do not say.
        workers: Threads that read while the network runs, in each process; None: 2 on a CPU; with
            a GPU as many as there are cores, 16 at most, shared out among the processes.
        processes: Processes that share the slides; None: one per device.
        scheduler: Address or scheduler file of a running Dask scheduler whose workers share the
            slides instead. They read and write the same folders under the same paths.
        device: ``auto``, ``cpu`` or ``cuda``, or several with commas: ``cuda:0,cuda:1``. With
            `scheduler`, the one that each worker uses.
        seed: Seed of the random weights.
        batch_size: Tiles per call of the network; at most 8 are used on a CPU.
        tile_rules: Tile size and tissue thresholds; None for the protocol's.
        extractor: ``ctranspath``, or ``timm:`` and the name of one of timm's models.
        precision: ``float32``, or ``bfloat16`` for autocast.
        layout: ``stamp-v2`` or ``stamp-v1``; see `write_features`.
        max_failures: End the run when more slides than this have failed; None: never.

    Returns:
        What became of every slide; its `exit_code` is 1 if some failed.

    Raises:
        UserError: If the call is wrong: no slides, unusable weights, a broken table.
    """
    files = find_slides(slides, skip=out)
    stems = [file.stem for file in files]
    settings = Settings(
        out=out,
        rules=tile_rules if tile_rules is not None else TileRules(),
        extractor=extractor,
        weights=weights,
        seed=seed,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        layout=layout,
        table_mpp=(
            {} if slide_table is None else mpp_of_slides(slide_table, stems, filename_column)
        ),
        default_mpp=default_mpp,
    )
    return dispatch.run(
        files,
        settings,
        device,
        processes=processes,
        scheduler=scheduler,
        max_failures=max_failures,
    )
