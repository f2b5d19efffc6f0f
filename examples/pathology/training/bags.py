"""Tiles of patients: inspected once, kept in memory as stored, read ahead while the model works."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from examples.pathology.cohort.patients import Patient
from examples.pathology.features.files import read_features

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
        bag = np.concatenate([read_features(path).feats for path in patient.files])
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
                    ahead.append(pool.submit(lambda step: tuple(map(self.load, step)), step))
                if not ahead:
                    return
                started = time.perf_counter()
                tiles = ahead.popleft().result()
                self.waited += time.perf_counter() - started
                yield tiles
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _compact(bag: NDArray[np.float32]) -> NDArray[np.float16 | np.float32]:
    with np.errstate(over="ignore"):
        half = bag.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), bag) else bag
