"""Worker processes for jobs: started on this machine, or those of a Dask scheduler elsewhere."""

import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin
from tqdm import tqdm

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import UserError, one_line

logger = logging.getLogger(__name__)

THREADS = "mtbalance-threads"
"""Where a client's scheduler keeps the number of threads of its jobs, by client."""

LOCAL_CONFIG = {
    # A worker holds the job that it does and no other that would die with it.
    "distributed.scheduler.worker-saturation": 1.0,
    # Dask gives up a worker that is not back after 15 s, or dies again just then. Ours are always
    # started again: they are all there are.
    "distributed.deploy.lost-worker-timeout": "1000 days",
    # Dask makes the C library give every freed block back to the system at once. Getting it again
    # costs more than the work of a small step: GradDrop took 1.5 times as long.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}
"""How Dask is set up for processes of our own."""

CONNECT_S = 30.0
"""How long to wait for the answer of a scheduler, in s."""

PACKAGES = ("mtbalance", "torch", "distributed")
"""Packages that must be the same here and in the workers."""


@contextmanager
def cluster(
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    threads_per_worker: int = 1,
    devices: Sequence[str] = (),
    wait_s: float = 60.0,
) -> Iterator[Client]:
    """Start worker processes on this machine, or use those of a running scheduler.

    Processes started here end with the block, whatever happens in it. One that dies is replaced.
    They see one GPU each, which is ``cuda`` for their jobs: the devices are dealt out in turn.

    Args:
        workers: Number of processes to start; None: one per GPU, or as many as the cores allow.
        scheduler: Address of a Dask scheduler (``tcp://host:port``), or the path of its scheduler
            file, instead of processes of our own.
        threads_per_worker: Threads that PyTorch computes with in a job. Sums depend on it in their
            last digits, so it is fixed and does not follow from the number of workers or cores.
        devices: ``cuda:N`` or ``cpu`` of this machine for the processes to start; empty: all GPUs.
        wait_s: How long to wait for the first worker of `scheduler`, in s.

    Yields:
        A client of the scheduler, for `run_jobs`.

    Raises:
        UserError: If the arguments are wrong, the scheduler does not answer or has no worker, or
            its workers have other packages than this process.
    """
    for name, number in (("workers", workers), ("threads_per_worker", threads_per_worker)):
        if number is not None and number < 1:
            raise UserError(f"`{name}` must be at least 1, but got {number}.")
    if scheduler is not None and (workers is not None or devices):
        raise UserError("`workers` and `devices` must be left out where `scheduler` is given.")
    with ExitStack() as stack:
        if scheduler is None:
            client = stack.enter_context(_local(workers, threads_per_worker, devices))
        else:
            client = stack.enter_context(_existing(scheduler, wait_s))
        client.set_metadata([THREADS, client.id], threads_per_worker)
        yield client


def threads_of(client: Client) -> int:
    """Return the threads that each job of a client may compute with, as `cluster` was told."""
    return int(client.get_metadata([THREADS, client.id], 1))


@contextmanager
def _local(workers: int | None, threads: int, devices: Sequence[str]) -> Iterator[Client]:
    visible = _visible_devices(devices)
    if workers is None:
        workers = sum(map(bool, visible)) or max(1, CPU_COUNT // threads)
    quiet = {"silence_logs": logging.ERROR}
    here = {"host": "127.0.0.1", "protocol": "tcp://"}
    common = {
        **{f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")},
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait must not spin on cores that others need
        "TQDM_DISABLE": "1",  # the bar of the run is the only one
    }
    nannies = {}
    for number in range(workers):
        gpu = {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]} if visible else {}
        options = {"nthreads": 1, "env": {**common, **gpu}, "dashboard": False, **here, **quiet}
        # Jobs bound their own memory; Dask would kill the worker of one that needs its share.
        nannies[number] = {"cls": Nanny, "options": {**options, "memory_limit": 0}}
    with_dashboard = importlib.util.find_spec("bokeh") is not None
    leads = {**here, "port": 0, "dashboard": with_dashboard, "dashboard_address": "127.0.0.1:0"}
    leader = {"cls": Scheduler, "options": leads}
    with ExitStack() as stack:
        stack.enter_context(_environment_restored())
        stack.enter_context(dask.config.set(LOCAL_CONFIG))
        processes = stack.enter_context(SpecCluster(nannies, leader, **quiet))
        stack.callback(processes.sync, _kill_workers, processes)
        client = stack.enter_context(Client(processes, set_as_default=False))
        client.register_plugin(_EndedByUs())
        if with_dashboard:
            logger.info("The dashboard of the workers is at %s", processes.dashboard_link)
        yield client


async def _kill_workers(processes: SpecCluster) -> None:
    """End the workers at once: none has anything to lose, and one may be in the middle of a job.

    Closing the cluster alone would ask them, wait for some seconds, and on a busy machine give up.
    """
    for nanny in processes.workers.values():
        nanny.close_gracefully()  # it does not start another one
        if nanny.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _visible_devices(devices: Sequence[str]) -> list[str]:
    """Return what ``CUDA_VISIBLE_DEVICES`` must be for each of the devices."""
    if not devices:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    ours = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    found = []
    for name in devices:
        device = torch.device(resolve_device(name))
        found.append(ours[device.index or 0] if device.type == "cuda" else "")
    return found


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Undo what Dask's nannies set in this process's environment for the ones they start."""
    names = [*dask.config.get("distributed.nanny.pre-spawn-environ"), "PYTHONHASHSEED"]
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _EndedByUs(WorkerPlugin):
    """Prepares a worker for its end, which is sudden: the process that started it kills it."""

    name = "mtbalance-ended-by-us"

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - the signature of the base
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
        # Bars of several processes share a lock by default, which a process that is killed leaves
        # behind in the system. Here no bar is shown.
        tqdm.set_lock(threading.RLock())


@contextmanager
def _existing(scheduler: str, wait_s: float) -> Iterator[Client]:
    where: dict[str, Any] = {"address": scheduler}
    if Path(scheduler).is_file():
        where = {"scheduler_file": scheduler}
    try:
        client = Client(**where, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            "`scheduler` must be the address or the scheduler file of a running Dask scheduler, "
            f"but got {scheduler} ({one_line(error)})."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=wait_s)
        except TimeoutError as error:
            raise UserError(
                f"`scheduler` must have at least one worker, but {scheduler} has had none for "
                f"{wait_s:g} s. Start workers, or wait until they have started."
            ) from error
        _check_workers(client)
        yield client


def _packages() -> dict[str, str]:
    """Return what must be the same in all processes; the build (``+cu126``) may differ."""
    versions = {name: metadata.version(name).partition("+")[0] for name in PACKAGES}
    return {"Python": ".".join(map(str, sys.version_info[:2])), **versions}


def _check_workers(client: Client) -> None:
    ours = _packages()
    for address, theirs in client.run(_packages, on_error="return").items():
        if isinstance(theirs, Exception):
            raise UserError(
                "All workers must be able to import `examples.pathology`, but the one at "
                f"{address} says: {one_line(theirs)}. Start workers in the same environment "
                "as this process, with the root of the checkout in PYTHONPATH."
            ) from theirs
        for name, version in ours.items():
            if theirs[name] != version:
                raise UserError(
                    f"All workers must have {name} {version} as this process has, but the one at "
                    f"{address} has {theirs[name]}."
                )
