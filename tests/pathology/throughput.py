# ruff: noqa: T201  (it prints what it measures)
"""How much of the network's own speed extraction reaches: ``python -m tests.pathology.throughput``.

Takes slides, gives for each round the tiles per second of a whole extraction (opening, reading,
tissue filter, network, files) and of the network alone on the same tiles already in memory, in the
same batches. The rounds of the two alternate, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from examples.pathology.extraction import (
    Rows,
    Settings,
    default_workers,
    extract_slides,
    make_network,
)
from examples.pathology.inference import Clock, infer
from examples.pathology.slides import SlideFile, find_slides, open_slide
from examples.pathology.tiling import TileBlock, TileReader, TileRules, plan_tiles
from examples.pathology.units import SlideError


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
        settings = Settings(
            out=Path(folder),
            rules=TileRules(),
            extractor=options.extractor,
            weights=options.weights,
            seed=0,
            precision=options.precision,
            batch_size=options.batch_size,
            workers=options.workers or default_workers(device),
            layout="stamp-v2",
            table_mpp={},
            default_mpp=None,
        )
        network = make_network(settings, device)
        found = find_slides(options.slides)
        blocks = {file: _tiles(file, settings) for file in found}
        files = [file for file in found if blocks[file]]
        tiles = sum(len(block.positions) for file in files for block in blocks[file])
        print(f"{len(files)} slides, {tiles} tiles, {device}, {settings.workers} threads")
        shares = []
        for number in range(options.rounds):
            for path in Path(folder).rglob("*.h5"):
                path.unlink()
            started = time.perf_counter()
            rows: list[Rows] = []
            extract_slides(files, settings, network, lambda row, rows=rows: not rows.append(row))
            whole = time.perf_counter() - started
            assert all(row[-1].status == "ok" for row in rows), rows
            started = time.perf_counter()
            for file in files:
                infer(blocks[file], network, Clock())
            alone = time.perf_counter() - started
            shares.append(alone / whole)
            print(
                f"round {number + 1}: extraction {tiles / whole:.2f} tiles/s, network alone "
                f"{tiles / alone:.2f} tiles/s, share {alone / whole:.1%}"
            )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"median share {statistics.median(shares):.1%}; peak memory {memory:.0f} MiB")


def _tiles(file: SlideFile, settings: Settings) -> list[TileBlock]:
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
