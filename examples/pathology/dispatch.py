"""One run over a folder of slides: deals them out to the devices and keeps the ledger.

One device works in this process; several get a process each, with slides dealt out by size so that
each has about as much to do. A process that dies takes none of the others with it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from tqdm import tqdm

from examples.pathology.devices import resolve_device
from examples.pathology.errors import RunError, UserError
from examples.pathology.extraction import Report, Rows, Settings, extract_slides, make_network
from examples.pathology.ledger import ExtractSummary, LedgerRow, write_ledger

if TYPE_CHECKING:
    from examples.pathology.slides import SlideFile

logger = logging.getLogger(__name__)

LEDGER_PERIOD_S = 10.0
"""The ledger on disk is at most this old, so that a killed run leaves one too."""

START_METHOD: Final = "spawn"
"""CUDA does not survive a fork."""


def resolve_devices(names: str) -> list[torch.device]:
    """Turn ``auto``, ``cuda:1`` or a list such as ``cuda:0,cuda:1`` into devices.

    Raises:
        UserError: One of them is no device, or not there.
    """
    return [torch.device(resolve_device(name.strip())) for name in names.split(",")]


def run(
    files: Sequence[SlideFile],
    settings: Settings,
    devices: Sequence[torch.device],
    *,
    max_failures: int | None = None,
) -> ExtractSummary:
    """Extract slides on one or more devices; the ledger is written whatever happens.

    Args:
        files: The slides.
        settings: What to do.
        devices: Where; at least one.
        max_failures: End the run when more slides than this have failed; None: never.

    Raises:
        UserError: If the network cannot be built as asked for.
    """
    if len(devices) == 1:
        network = make_network(settings, devices[0])
        work: Callable[[Report], None] = partial(extract_slides, files, settings, network)
    else:
        work = _Workers(files, settings, devices).collect
    rows: dict[str, Rows] = {}
    ledger = settings.out / "ledger.csv"
    stopped, failed = "", 0
    started = written = time.monotonic()

    def ordered() -> list[LedgerRow]:
        return [row for file in files for row in rows.get(file.name, ())]

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: write_ledger(ledger, ordered()))  # after Ctrl-C as well
        bar = stack.enter_context(tqdm(total=len(files), desc="extracting", unit="slide"))

        def report(found: Rows) -> bool:
            nonlocal failed, stopped, written
            rows[found[0].slide] = found
            failed += found[-1].status == "failed"
            bar.update()
            bar.set_postfix_str(found[0].slide, refresh=False)
            if time.monotonic() - written > LEDGER_PERIOD_S:
                write_ledger(ledger, ordered())
                written = time.monotonic()
            if max_failures is not None and failed > max_failures:
                stopped = f"more than {max_failures} slides failed."
            return not stopped

        try:
            work(report)
        except RunError as error:
            stopped = str(error)
    summary = ExtractSummary(
        rows=tuple(ordered()),
        ledger=ledger,
        found=len(files),
        seconds=time.monotonic() - started,
        stopped=stopped,
    )
    logger.log(logging.ERROR if stopped else logging.INFO, "%s", summary)
    return summary


class _Workers:
    """A process per device, each with its share of the slides.

    Args:
        files: The slides.
        settings: What to do; the threads that read are shared out.
        devices: The devices.

    Raises:
        UserError: If the network cannot be built as asked for.
    """

    def __init__(
        self, files: Sequence[SlideFile], settings: Settings, devices: Sequence[torch.device]
    ) -> None:
        workers = max(1, settings.workers // len(devices))
        settings = replace(settings, workers=workers, show_tiles=False)
        context = multiprocessing.get_context(START_METHOD)
        self._running: dict[Connection, tuple[BaseProcess, torch.device]] = {}
        for device, shard in zip(devices, deal(files, len(devices)), strict=True):
            receiver, sender = context.Pipe(duplex=False)
            threads = max(1, torch.get_num_threads() // len(devices))
            process = context.Process(
                target=_work, args=(sender, shard, settings, str(device), threads), daemon=True
            )
            process.start()
            sender.close()  # ours; once the process has closed its own, the pipe is at its end
            self._running[receiver] = process, device

    def collect(self, report: Report) -> None:
        """Report the rows of each slide as they come; end the processes when told to.

        Raises:
            RunError: If a process died; only after the others have finished.
        """
        lost: list[str] = []
        try:
            while self._running:
                for connection in wait(list(self._running)):
                    assert isinstance(connection, Connection)  # noqa: S101 - no sockets here
                    process, device = self._running[connection]
                    try:
                        message = connection.recv()
                    except EOFError:
                        process.join()
                        lost.append(f"the process on {device} ended with code {process.exitcode}")
                        message = None
                    if message is None:
                        del self._running[connection]
                    elif isinstance(message, Exception):
                        raise message
                    elif not report(message):
                        return
        finally:
            for process, _ in self._running.values():
                process.terminate()
                process.join()
        if lost:
            raise RunError(
                f"All processes must finish, but {' and '.join(lost)}. Run the command again: "
                "what is finished stays."
            )


def deal(files: Sequence[SlideFile], count: int) -> list[list[SlideFile]]:
    """Deal slides out in `count` shares of about the same number of bytes, the largest first."""
    shares: list[list[SlideFile]] = [[] for _ in range(count)]
    weights = [0] * count
    for size, _, file in sorted(
        ((_bytes(file.path), -number, file) for number, file in enumerate(files)), reverse=True
    ):
        lightest = weights.index(min(weights))
        shares[lightest].append(file)
        weights[lightest] += size + 1  # so that empty files are shared out too
    return shares


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it gets its row when it is opened
        return 0


def _work(
    connection: Connection,
    files: list[SlideFile],
    settings: Settings,
    device: str,
    threads: int,
) -> None:
    """Extract a share of the slides in a process of its own; sends rows, then None or an error."""
    try:
        torch.set_num_threads(threads)
        network = make_network(settings, torch.device(device))

        def report(rows: Rows) -> bool:
            connection.send(rows)
            return True

        extract_slides(files, settings, network, report)
        connection.send(None)
    except UserError as error:
        connection.send(error)
    except KeyboardInterrupt:  # the parent got it as well and ends the run
        pass
    finally:
        connection.close()
