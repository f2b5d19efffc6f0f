# ruff: noqa: T201  (it prints what it measures)
"""How much of the network's own speed extraction reaches: ``python -m tests.pathology.throughput``.

Gives the time of a whole extraction (opening, reading, tissue filter, network, files) and of the
network alone on the same tiles already in memory, in the same batches. The rounds of the two
alternate, so that whatever else the machine does hits both. On a CPU they compete for the cores,
and the processor time of all threads tells more than the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command line does

import torch

from examples.pathology.features.extraction import default_workers, extract_slides, make_network
from examples.pathology.features.inference import Clock, Network, infer
from examples.pathology.features.ledger import Rows
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.slides.slide import SlideFile, find_slides, open_slide
from examples.pathology.slides.tiling import TileBlock, TileReader, plan_tiles
from examples.pathology.slides.units import SlideError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--extractor", default="ctranspath")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        settings = ExtractConfig(
            options.slides,
            Path(folder),
            extractor=options.extractor,
            weights=options.weights,
            seed=0,
            precision=options.precision,
            batch_size=options.batch_size,
            workers=options.workers or default_workers(device),
        )
        network = make_network(settings, device)
        found = find_slides(options.slides)
        blocks = {file: _tiles(file, settings) for file in found}
        files = [file for file in found if blocks[file]]
        tiles = sum(len(block.positions) for file in files for block in blocks[file])
        print(f"{len(files)} slides, {tiles} tiles, {device}, {settings.workers} threads")
        timings: dict[str, list[Timing]] = {"extraction": [], "network alone": []}
        for number in range(options.rounds):
            for path in Path(folder).rglob("*.h5"):
                path.unlink()
            rows: list[Rows] = []
            works = (
                partial(extract_slides, files, settings, network, rows.append),
                partial(_alone, blocks, files, network),
            )
            for (name, found), work in zip(timings.items(), works, strict=True):
                found.append(Timing.of(work))
                speed = tiles / found[-1].wall
                print(f"round {number + 1}, {name}: {found[-1]}, {speed:.2f} tiles/s")
            assert all(row[-1].status == "ok" for row in rows), rows
        whole, alone = timings.values()
        wall = min(t.wall for t in alone) / min(t.wall for t in whole)
        cpu = statistics.median(t.cpu for t in alone) / statistics.median(t.cpu for t in whole)
        print(f"share of the network's speed (best rounds) {wall:.1%}")
        print(f"share of the network's processor time (medians) {cpu:.1%}")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory {memory:.0f} MiB")


def _alone(
    blocks: dict[SlideFile, list[TileBlock]], files: list[SlideFile], network: Network
) -> None:
    for file in files:
        infer(blocks[file], network, Clock())


@dataclass(frozen=True)
class Timing:
    """Seconds on the clock, and seconds of processor time of all threads."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], object]) -> Timing:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)

    def __str__(self) -> str:
        return f"{self.wall:.2f} s, processor {self.cpu:.2f} s"


def _tiles(file: SlideFile, settings: ExtractConfig) -> list[TileBlock]:
    """Return a slide's tiles of tissue; none if it cannot be used."""
    try:
        slide = open_slide(file.path, file.name)
        with ThreadPoolExecutor(settings.workers) as pool, contextlib.closing(slide):
            plan = plan_tiles(slide, settings.rules)
            return list(TileReader(slide, plan, settings.rules, pool=pool, ahead=4))
    except SlideError:
        return []


if __name__ == "__main__":
    main()
