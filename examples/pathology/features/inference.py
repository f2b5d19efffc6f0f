"""Running the network over the tiles of a slide while threads read the next ones."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.pathology.extractors.extractor import Extractor
from examples.pathology.features.ledger import FEATURES, TILING
from examples.pathology.slides.tiling import TileBlock

CPU_BATCH = 8
"""On a CPU larger batches fall out of the cache: 64 tiles at once are a third slower than 8."""

IN_FLIGHT = 2
"""Batches that a GPU may still be busy with: it never waits for Python, and memory is bounded."""


@dataclass
class Clock:
    """Which stage a slide is in, and how long it has spent in each.

    Attributes:
        stage: The stage that runs.
        seconds: Time spent in the stages so far, by name.
    """

    stage: str = TILING
    seconds: dict[str, float] = field(default_factory=lambda: {TILING: 0.0, FEATURES: 0.0})
    _since: float = field(default_factory=time.perf_counter)

    def enter(self, stage: str) -> None:
        """End the running stage and begin another."""
        now = time.perf_counter()
        self.seconds[self.stage] += now - self._since
        self.stage, self._since = stage, now

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let time go by that counts for no stage."""
        self.enter(self.stage)
        try:
            yield
        finally:
            self._since = time.perf_counter()


@dataclass(frozen=True)
class Network:
    """An extractor on its device.

    Attributes:
        extractor: The network with its transform and name; already on `device`.
        device: Where it runs.
        precision: ``float32``, or ``bfloat16`` for autocast: faster on a GPU, features differ by
            up to 0.03 where their mean size is 0.8.
        batch_size: Tiles per call.
    """

    extractor: Extractor
    device: torch.device
    precision: str
    batch_size: int


def place(extractor: Extractor, device: torch.device, precision: str, batch_size: int) -> Network:
    """Move an extractor to its device, in the memory layout that is fastest there.

    Args:
        extractor: The network.
        device: Where it will run.
        precision: As in `Network`.
        batch_size: Tiles per call; at most 8 are used on a CPU.
    """
    extractor.model.to(device)
    if device.type == "cuda":
        extractor.model.to(memory_format=torch.channels_last)
    else:
        batch_size = min(batch_size, CPU_BATCH)
    return Network(extractor, device, precision, batch_size)


def infer(
    blocks: Iterable[TileBlock],
    network: Network,
    clock: Clock,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
    """Run the network over blocks of tiles.

    Args:
        blocks: The tiles, in any order.
        network: The network on its device.
        clock: Told when the network waits for tiles and when it works.
        advance: Called with the number of tiles after each batch.

    Returns:
        Features (n, d) as float16, and row and column of each tile (n, 2), in reading order of the
        slide: row by row.
    """
    store = _Store()
    running: deque[tuple[Tensor, npt.NDArray[np.int64]]] = deque()
    autocast = torch.autocast(
        network.device.type, dtype=torch.bfloat16, enabled=network.precision == "bfloat16"
    )
    # TensorFloat-32 would change the features in the third digit without being asked.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.inference_mode(), exact, autocast:
        for pixels, places in batches(blocks, network.batch_size):
            clock.enter(FEATURES)
            output = network.extractor.model(
                network.extractor.transform(_on_device(pixels, network.device))
            )
            running.append((output.half(), places))
            if len(running) > IN_FLIGHT:
                store.add(*running.popleft())
            advance(len(places))
            clock.enter(TILING)
        clock.enter(FEATURES)
        while running:
            store.add(*running.popleft())
    return store.sorted()


class _Store:
    """Features and positions of the tiles so far, in two arrays that double when they are full.

    Many small arrays, one per batch, would lie between the large ones that hold pixels and keep
    the memory of these from being given back: 0.7 GB on a slide of 2304 tiles.
    """

    def __init__(self) -> None:
        self._count = 0
        self._feats: npt.NDArray[np.float16] = np.empty((0, 0), dtype=np.float16)
        self._positions: npt.NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)

    def add(self, feats: Tensor, positions: npt.NDArray[np.int64]) -> None:
        stop = self._count + len(positions)
        if stop > len(self._positions):
            size = max(1024, 2 * stop)
            grown = np.empty((size, feats.shape[1]), dtype=np.float16)
            if self._count:
                grown[: self._count] = self._feats[: self._count]
            self._feats = grown
            self._positions = np.resize(self._positions, (size, 2))
        self._feats[self._count : stop] = feats.cpu().numpy()
        self._positions[self._count : stop] = positions
        self._count = stop

    def sorted(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64]]:
        """Return both row by row."""
        feats, positions = self._feats[: self._count], self._positions[: self._count]
        order = np.lexsort((positions[:, 1], positions[:, 0]))
        return feats[order], positions[order]


def _on_device(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    tiles = torch.from_numpy(pixels)
    if device.type == "cuda":  # page-locked memory is copied while the GPU works
        return tiles.pin_memory().to(device, non_blocking=True)
    return tiles.to(device)


def batches(
    blocks: Iterable[TileBlock], size: int
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Regroup blocks into batches of `size` tiles, the last one smaller.

    Yields:
        Pixels (b, h, w, 3) and positions (b, 2).
    """
    pixels: list[npt.NDArray[np.uint8]] = []
    places: list[npt.NDArray[np.int64]] = []
    for block in blocks:
        pixels.extend(block.pixels)
        places.extend(block.positions)
        while len(pixels) >= size:
            yield np.stack(pixels[:size]), np.stack(places[:size])
            del pixels[:size], places[:size]
    if pixels:
        yield np.stack(pixels), np.stack(places)
