"""Tiles of patients: inspected once, kept in memory as stored, read ahead while the model works."""

from __future__ import annotations

import itertools
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.pathology.common.errors import UserError, one_line

if TYPE_CHECKING:
    from examples.pathology.cohort.cohort import Patient
    from examples.pathology.features.files import Bag

DEFAULT_CACHE_BYTES = 4 * 2**30
READ_AHEAD = 4  # steps; more only costs memory once reading is faster than training


@dataclass
class BagStore:
    """Reads the tiles of a patient, and keeps what fits in memory.

    Files hold half precision, and so does the memory: twice as many bags fit, and single precision
    is restored without loss. A bag that half precision cannot hold exactly is kept as it is.

    Args:
        cache_bytes: Memory to spend; what does not fit is read again each time.
        waited: Seconds spent waiting in `stream` for tiles that were not there yet.
    """

    cache_bytes: int = DEFAULT_CACHE_BYTES
    waited: float = 0.0
    _cache: dict[str, NDArray[np.float16 | np.float32]] = field(default_factory=dict, repr=False)
    _used: int = 0

    def load(self, patient: Patient) -> NDArray[np.float32]:
        """Return the features ``(n, f)`` of all slides of a patient, in the order of its files."""
        kept = self._cache.get(patient.name)
        if kept is not None:
            return kept.astype(np.float32)
        bag = np.concatenate([read_bag(path).feats for path in patient.files])
        if self._used + bag.nbytes // 2 <= self.cache_bytes:
            compact = _compact(bag)
            if self._used + compact.nbytes <= self.cache_bytes:
                self._cache[patient.name] = compact
                self._used += compact.nbytes
        return bag

    def stream(
        self, steps: Iterable[Sequence[Patient]]
    ) -> Iterator[tuple[NDArray[np.float32], ...]]:
        """Yield the tiles of the patients of one step after the other, read ahead by a thread.

        Args:
            steps: Whose tiles are needed together.
        """
        coming = iter(steps)
        ahead: deque[Future[tuple[NDArray[np.float32], ...]]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="tiles")
        try:
            while True:
                while len(ahead) < READ_AHEAD and (step := next(coming, None)) is not None:
                    ahead.append(pool.submit(self._load_all, step))
                if not ahead:
                    return
                started = time.perf_counter()
                tiles = ahead.popleft().result()
                self.waited += time.perf_counter() - started
                yield tiles
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load_all(self, step: Sequence[Patient]) -> tuple[NDArray[np.float32], ...]:
        return tuple(self.load(patient) for patient in step)


def read_bag(path: Path) -> Bag:
    """Read one feature file; the reader is imported when the first file is."""
    from examples.pathology.features.files import read_features

    return read_features(path)


class Maker(NamedTuple):
    """What made a feature file."""

    extractor: str
    weights_sha256: str | None
    tile_size_um: float | None
    random_weights: bool
    width: int
    simulated: str = ""

    def agrees(self, other: Maker) -> bool:
        """Return whether nothing that both files say differs."""
        return all(a == b or a is None or b is None for a, b in zip(self, other, strict=True))

    def __str__(self) -> str:
        weights = "random weights" if self.random_weights else "weights"
        sha = self.weights_sha256[:8] if self.weights_sha256 else "not named"
        size = "" if self.tile_size_um is None else f", tiles of {self.tile_size_um:g} um"
        drawn = f"; {self.simulated}" if self.simulated else ""
        return f"{self.extractor} ({self.width}-d, {weights} {sha}{size}{drawn})"


class Inspection:
    """Looks at every feature file once: is it usable, and does it fit the others?"""

    def __init__(self) -> None:
        self.tiles: dict[Path, int] = {}
        self.crc: dict[Path, int] = {}
        self._makers: dict[Maker, Path] = {}

    def problem(self, path: Path) -> str:
        """Return why a file cannot be used, or an empty string."""
        try:
            bag = read_bag(path)
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # h5py's words for a broken or foreign file
            return f"unreadable: {one_line(error)}"
        if len(bag.feats) == 0:
            return "no tiles"
        if not np.isfinite(bag.feats).all():
            return "unreadable: features that are not finite"
        self.tiles[path] = len(bag.feats)
        self.crc[path] = zlib.crc32(bag.feats.tobytes())
        maker = Maker(
            bag.extractor,
            bag.weights_sha256,
            bag.tile_size_um,
            bag.random_weights,
            bag.feats.shape[1],
            bag.simulated,
        )
        self._makers.setdefault(maker, path)
        return ""

    def refuse_mixture(self) -> None:
        """Raise if the usable files do not come from one extractor with one set of weights.

        A file of another tool may not know its weights or tile size: that alone is no difference.
        """
        makers = sorted(self._makers, key=lambda maker: str(self._makers[maker]))
        for first, second in itertools.combinations(makers, 2):
            if not first.agrees(second):
                raise UserError(
                    "All feature files must come from one extractor with the same weights and tile "
                    f"size, but {self._makers[first].name} is of {first} and "
                    f"{self._makers[second].name} of {second}."
                )

    def maker(self) -> Maker:
        """Return what the usable files say together."""
        makers = list(self._makers)
        return makers[0]._replace(
            weights_sha256=next((m.weights_sha256 for m in makers if m.weights_sha256), None),
            tile_size_um=next((m.tile_size_um for m in makers if m.tile_size_um), None),
        )


def _compact(bag: NDArray[np.float32]) -> NDArray[np.float16 | np.float32]:
    with np.errstate(over="ignore"):
        half = bag.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), bag) else bag
