"""How fast CTransPath's architecture, with random weights, turns tiles into features."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from examples.pathology.extractors.ctranspath import TILE_PX, ctranspath_extractor
from examples.pathology.extractors.extractor import Extractor
from tests.gpu.rows import Row, Setting, attempted

BATCH = 256
QUICK_BATCH = 1
LEAST_ROUNDS = 3
SECONDS = 3.0
"""How long each way is measured."""


class Way(NamedTuple):
    """How the network is run."""

    name: str
    tf32: bool = False
    bfloat16: bool = False
    channels_last: bool = False
    compiled: bool = False


WAYS = (
    Way("float32"),
    Way("float32, channels-last", channels_last=True),
    Way("TF32", tf32=True),
    Way("TF32, channels-last", tf32=True, channels_last=True),
    Way("bfloat16", bfloat16=True),
    Way("bfloat16, channels-last", bfloat16=True, channels_last=True),
    Way("bfloat16, compiled", bfloat16=True, channels_last=True, compiled=True),
    Way("float32, compiled", compiled=True),
)
"""Compiling takes longest: it comes last."""


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each way."""
    size = QUICK_BATCH if setting.quick else BATCH
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(
        256, (size, TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator
    ).to(setting.device)
    extractor = ctranspath_extractor(None)
    with _running(Way("reference"), setting.device):
        extractor.model.to(setting.device)
        reference = extractor.model(extractor.transform(tiles)).float()
    for way in WAYS:
        yield from attempted(way.name, _rows, way, extractor, tiles, reference, setting)


def _rows(
    way: Way, extractor: Extractor, tiles: Tensor, reference: Tensor, setting: Setting
) -> Iterator[Row]:
    # Without a code generator for the device, the smallest form stops at the captured graph.
    backend = "eager" if setting.quick else "inductor"
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    model: Callable[[Tensor], Tensor] = extractor.model.to(memory_format=layout)
    if way.compiled:
        torch.compiler.reset()
        model = torch.compile(extractor.model, backend=backend)
    with _running(way, setting.device):
        start = time.perf_counter()
        features = model(extractor.transform(tiles)).float()
        first = _seconds_since(start, setting.device)
        error = float((features - reference).norm() / reference.norm())
        most = 0.0 if setting.quick else SECONDS
        times = _times(lambda: model(extractor.transform(tiles)), most, setting.device)
    speed = len(tiles) / statistics.median(times)
    found = f"{speed:,.0f} tiles/s ({len(tiles)} at once), features differ by {error:.1e}"
    found += f", first batch {first:.1f} s" if way.compiled else ""
    figures = {"tiles_per_second": speed, "batch": len(tiles), "error": error, "first_s": first}
    yield Row(way.name, found, {**figures, "rounds": len(times)})


def _times(run: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    """Return the seconds of each of several runs, for so many seconds in all."""
    times: list[float] = []
    while len(times) < LEAST_ROUNDS or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(_seconds_since(start, device))
    return times[1:]


def _seconds_since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def _running(way: Way, device: torch.device) -> Iterator[None]:
    """Set what the way says, and nothing else."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode() if not way.compiled else torch.no_grad())
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=way.tf32))
        stack.enter_context(_matrix_products(tf32=way.tf32))
        stack.enter_context(
            torch.autocast(device.type, dtype=torch.bfloat16) if way.bfloat16 else nullcontext()
        )
        yield


@contextmanager
def _matrix_products(*, tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
