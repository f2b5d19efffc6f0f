"""What the scripts have in common: options, the description of the machine, tables or JSON.

A measurement depends on more than the code. Whatever else is known to matter stands above every
table and in the JSON.
"""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import mtbalance
from tests.benchmarks.workloads import TINY, WORKLOADS

Measure = Callable[[str, torch.device], dict[str, Any]]


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every script takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def parser_of_sizes(description: str | None, sizes: Sequence[int]) -> argparse.ArgumentParser:
    """Return a parser for what is measured on Gramians of so many tasks."""
    parser = plain_parser(description)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="M")
    return parser


def parser_of(description: str | None, default: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser for what is measured on workloads.

    Args:
        description: What the script does.
        default: The workloads that it measures unless told otherwise.
    """
    parser = plain_parser(description)
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        choices=[*WORKLOADS, *TINY],
        default=list(default),
        help=f"of {', '.join([*WORKLOADS, *TINY])}; by default {', '.join(default)}",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="keep the CPU busy with N other programs"
    )
    return parser


@contextmanager
def others_at_work(count: int) -> Iterator[None]:
    """Keep so many other programs busy, one thread each, for a while."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def report(
    options: argparse.Namespace, measure: Measure, table: Callable[[str, dict[str, Any]], str]
) -> None:
    """Measure the workloads and print a table for each as soon as it is there, or JSON."""
    device = torch.device(options.device)
    environment = {**describe(device), "busy": options.busy}
    if not options.json:
        sys.stdout.write(header(environment))
    results = {}
    with others_at_work(options.busy):
        for name in options.workload:
            results[name] = measure(name, device)
            if not options.json:
                sys.stdout.write(table(name, results[name]))
                sys.stdout.flush()
    if options.json:
        json.dump({"environment": environment, "workloads": results}, sys.stdout, indent=2)
        sys.stdout.write("\n")


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, machine, threads and load as plain values."""
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "mtbalance": mtbalance.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load": load(),
    }


def header(environment: dict[str, Any]) -> str:
    """Return the description as two lines of text."""
    e = environment
    where = f"{e['gpu']}, CPU {e['cpu']}" if e["gpu"] else e["cpu"]
    return (
        f"mtbalance {e['mtbalance']}, torch {e['torch']}, Python {e['python']}, {e['date']}\n"
        f"{where}, {e['cores']} cores, {e['threads']} threads, "
        f"OMP_WAIT_POLICY={e['omp_wait_policy']}, load {e['load']}"
        + (f", {e['busy']} other programs busy" if e.get("busy") else "")
        + "\n\n"
    )


def load() -> float | None:
    """Return the load average of the last minute; above ``threads`` others are at work too."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_model() -> str:
    """Return the processor's name, for which Python has no portable function."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
