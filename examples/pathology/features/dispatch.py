"""One run over a folder of slides: deals them out to one process or several.

One process works on them here; several, and the workers of a Dask scheduler, get them in batches
as they have room. A process that dies takes no slide with it but one that kills every process.
"""

import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import OutputError, RunError, UserError
from examples.pathology.common.folders import clean_below, sole_writer
from examples.pathology.features.extraction import (
    Report,
    default_workers,
    extract_slides,
    make_network,
    retire,
)
from examples.pathology.features.inference import Network
from examples.pathology.features.ledger import TILING, ExtractSummary, LedgerKeeper, Rows, SlideRow
from examples.pathology.jobs.cluster import cluster
from examples.pathology.jobs.engine import Job, Outcome, run_jobs
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.slides.slide import SlideFile

logger = logging.getLogger(__name__)

MOST_IN_BATCH = 8
"""Slides that a process gets at once: while it works on one, it opens the next."""

BATCHES_PER_PROCESS = 4
"""With few slides batches are smaller, so that processes end at about the same time."""

DEATHS = 3
"""A slide fails when this many processes have died while they had nothing but it to do."""


def resolve_devices(names: str) -> list[torch.device]:
    """Turn ``auto``, ``cuda:1`` or a list such as ``cuda:0,cuda:1`` into devices.

    Raises:
        UserError: One of them is no device, or not there.
    """
    return [torch.device(resolve_device(name.strip())) for name in names.split(",")]


def run(files: Sequence[SlideFile], config: ExtractConfig) -> ExtractSummary:
    """Extract slides in one or more processes; the ledger is written whatever happens.

    Where nothing can be written any more, the run ends, and says so.

    Raises:
        UserError: If the network cannot be built as asked for, no workers can be had, or another
            process extracts into the same folder.
        OutputError: If nothing can be written there from the start.
    """
    if config.scheduler is None:
        resolve_devices(config.device)  # a wrong one is told before the folder is made
    with sole_writer(config.out) as locked:
        if locked:
            clean_below(config.out)
        return _run_alone(files, config)


def _run_alone(files: Sequence[SlideFile], config: ExtractConfig) -> ExtractSummary:
    work: Callable[[Report], None]
    if config.scheduler is None:
        work = _here(files, config)
    elif config.processes is None:
        files = [replace(file, path=file.path.absolute()) for file in files]
        work = functools.partial(_spread, files, config, {"scheduler": config.scheduler})
    else:
        raise UserError("`processes` must be left out where `scheduler` is given.")
    ledger, stopped = config.out / "ledger.csv", ""
    started = time.monotonic()
    keeper = LedgerKeeper(ledger, [file.name for file in files], config.max_failures)
    try:
        with closing(keeper):
            try:
                work(keeper.take_down)
            except RunError as error:
                stopped = str(error)
    except OutputError as error:  # not even the ledger
        stopped = stopped or str(error)
    summary = ExtractSummary(keeper.rows, ledger, len(files), time.monotonic() - started, stopped)
    logger.log(logging.ERROR if stopped else logging.INFO, "%s", summary)
    return summary


def _here(files: Sequence[SlideFile], config: ExtractConfig) -> Callable[[Report], None]:
    """Return what does the work on this machine: in this process if one is enough."""
    devices = resolve_devices(config.device)
    count = len(devices) if config.processes is None else config.processes
    if count < len(devices):
        raise UserError(
            f"`processes` must be at least 1 and at least the {len(devices)} devices of `device`, "
            f"but got {count}."
        )
    if count == 1:
        return functools.partial(extract_slides, files, config, make_network(config, devices[0]))
    place = {
        "workers": count,
        "threads_per_worker": max(1, torch.get_num_threads() // count),
        "devices": () if config.device == "auto" else [str(device) for device in devices],
    }
    workers = config.workers or max(1, default_workers(devices[0]) // count)
    # "auto", since a process sees the device that is its own, and no other.
    return functools.partial(_spread, files, replace(config, device="auto", workers=workers), place)


def _spread(
    files: Sequence[SlideFile], config: ExtractConfig, place: Mapping[str, Any], report: Report
) -> None:
    """Extract slides in batches, in the processes of a `cluster`; each slide is reported once."""
    config = replace(
        config,
        out=config.out.absolute(),  # processes elsewhere are in other folders
        weights=config.weights and config.weights.absolute(),
        show_tiles=False,
    )
    run_id = uuid.uuid4().hex
    left = {file.name: file for file in files}

    def jobs_of(batches: Iterable[Sequence[SlideFile]]) -> list[Job]:
        return [
            Job(_title(batch), extract_batch, (tuple(batch), config, run_id)) for batch in batches
        ]

    def take(outcome: Outcome) -> None:
        found, error = outcome.value or ((), None)
        for rows in found:
            del left[rows[0].slide]
            report(rows)
        if error is not None:
            raise error

    def take_or_give_up(outcome: Outcome) -> None:
        take(outcome)
        if outcome.status == "failed":
            file = left.pop(outcome.key)
            retire(config.out / f"{file.stem}.h5")
            report((SlideRow(file.name, TILING, "failed", outcome.error),))

    with cluster(**place) as client:
        batches = deal(files, len(client.nthreads()))
        run_jobs(jobs_of(batches), client, on_outcome=take, title="", deaths=1)
        if left:
            logger.warning("The %d slides of batches that failed are taken one by one.", len(left))
            singly = jobs_of([file] for file in list(left.values()))
            run_jobs(singly, client, on_outcome=take_or_give_up, title="", deaths=DEATHS)


def _title(batch: Sequence[SlideFile]) -> str:
    more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
    return f"{batch[0].name}{more}"


def deal(files: Sequence[SlideFile], processes: int) -> list[list[SlideFile]]:
    """Deal slides out in batches, the largest slides first, so that none is left to wait for."""
    size = min(MOST_IN_BATCH, max(1, len(files) // (BATCHES_PER_PROCESS * processes)))
    ordered = sorted(files, key=lambda file: _bytes(file.path), reverse=True)
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it gets its row when it is opened
        return 0


def extract_batch(
    files: Sequence[SlideFile], config: ExtractConfig, run_id: str
) -> tuple[list[Rows], UserError | OutputError | None]:
    """Extract slides in a process of a cluster; slides that are finished are found so.

    Args:
        files: The slides.
        config: How.
        run_id: The run they belong to; a process keeps its network for one run.

    Returns:
        The rows of each slide that was taken to its end, and the error that ends the run: the
        network could not be built, or nothing can be written any more.
    """
    found: list[Rows] = []
    try:
        extract_slides(files, config, _network(config, run_id), found.append)
    except (UserError, OutputError) as error:
        return found, error
    return found, None


@functools.lru_cache(maxsize=1)
def _network(config: ExtractConfig, run_id: str) -> Network:  # noqa: ARG001
    """Build the network of a run once; the next run may have other weights of the same name."""
    return make_network(config, torch.device(resolve_device(config.device)))
