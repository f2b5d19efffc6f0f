"""Real processes for tests: a pool of ranks that runs functions, and never gets stuck.

A test function takes a :class:`Here` first, so that the same code runs in every rank of a pool and,
with ``ALONE``, in the test's own process, where there is no process group.
"""

import faulthandler
import gc
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp

from tests._device import compute_there
from tests._forks import forking

START_SECONDS = 120.0
SECONDS = 60.0
"""How long a function may take in all ranks, on a loaded machine."""

has_fsdp2 = hasattr(fsdp, "fully_shard")


@dataclass(frozen=True)
class Here:
    """Which of how many processes this is."""

    rank: int
    size: int

    def part(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return batch.chunk(self.size)[self.rank]


ALONE = Here(0, 1)


class RankError(AssertionError):
    """What ranks raised, or where they hang."""


class Pool:
    """Processes in one gloo group, each waiting for functions to run.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS
    ) -> list[Any]:
        """Return what ``function(here, *arguments)`` returns in each rank.

        A rank that raises, dies or does not answer in time makes this raise, and the next call
        starts new processes: the old ones may still wait for each other.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        return self._answers(seconds)

    def _start(self) -> None:
        context = forking()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(Here(rank, self.size), self._folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers(START_SECONDS)

    def _answers(self, seconds: float) -> list[Any]:
        end = time.monotonic() + seconds
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.size and time.monotonic() < end:
            waiting = [rank for rank in range(self.size) if rank not in answers]
            ready = multiprocessing.connection.wait(
                [self._pipes[rank] for rank in waiting], max(0.0, end - time.monotonic())
            )
            for rank in waiting:
                if self._pipes[rank] in ready:
                    answers[rank] = self._answer_of(rank)
            if any(not good for good, _ in answers.values()):
                end = min(end, time.monotonic() + 2)  # the others may wait for it for ever
        wrong = {rank: what for rank, (good, what) in answers.items() if not good}
        if wrong or len(answers) < self.size:
            wrong |= {r: self._stack_of(r) for r in range(self.size) if r not in answers}
            self.stop()
            raise RankError("\n".join(f"--- rank {r}:\n{wrong[r]}" for r in sorted(wrong)))
        return [answers[rank][1] for rank in range(self.size)]

    def _answer_of(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            return False, "died"
        return answer

    def _stack_of(self, rank: int) -> str:
        """Ask a rank that does not answer where it is."""
        assert self._folder is not None
        file = Path(self._folder.name, f"stack-{rank}")
        if file.exists() and hasattr(signal, "SIGUSR1"):
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
            return f"no answer. {file.read_text()}"
        return "no answer."

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


def _serve(here: Here, folder: str, pipe: Connection) -> None:
    """Run functions until the pipe is closed."""
    with Path(folder, f"stack-{here.rank}").open("w") as stack:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, stack)
        torch.set_num_threads(1)
        compute_there()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=here.rank,
            world_size=here.size,
            timeout=timedelta(seconds=SECONDS + 30),
        )
        pipe.send_bytes(pickle.dumps((True, None)))
        while True:
            try:
                function, arguments = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            gc.collect()
            gc.freeze()  # what was there before leaves no models: searches may pass over it
            pipe.send_bytes(_answer(here, function, arguments))


def _answer(here: Here, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.manual_seed(0)
            return pickle.dumps((True, function(here, *arguments)))
    except BaseException:  # noqa: BLE001  # whatever it is, the test hears of it
        return pickle.dumps((False, traceback.format_exc()))
