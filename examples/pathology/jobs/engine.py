"""Jobs on a Dask cluster: run where there is room, again when a worker dies, and reported.

A job keeps its results on disk and can be run again at any time: a worker that dies loses nothing
but the time since the job's last checkpoint. Nothing that a job computes depends on the number of
workers: they do one job at a time, each with the same number of threads.
"""

import logging
import pickle
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from logging.handlers import BufferingHandler
from typing import Any, Literal, NamedTuple

import torch
from distributed import Client, Future, KilledWorker, as_completed, get_client

from examples.pathology.common.errors import (
    OutputError,
    RunError,
    UserError,
    listing,
    nearest,
    one_line,
)
from examples.pathology.common.logs import OURS
from examples.pathology.jobs.cluster import threads_of
from examples.pathology.jobs.progress import JobProgress

logger = logging.getLogger(__name__)

TICK_S = 0.1
"""How often finished jobs are looked for."""

COUNT_PERIOD_S = 2.0
"""How often the workers are counted."""


@dataclass(frozen=True)
class Job:
    """One piece of work, done in some worker, from its start or from where it last stopped.

    Attributes:
        key: Its name, unique among the jobs of a run: ``leukocyte/pcgrad/fold-3``.
        run: A function of a module; called as ``run(*arguments)``. It must be able to run again
            after it was killed, so it keeps its results on disk and writes them whole.
        arguments: Its arguments; they and what it returns travel by pickle and should be small.
        needs: Keys of jobs that must be done first.
    """

    key: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        key: The job's.
        status: ``done``, ``failed`` (it raised an error, or its workers died) or ``skipped`` (a
            job that it needs was not done, or the run ended before).
        error: Why it is not done, in one line.
        value: What it returned; None if it is not done.
        seconds: Time that the last attempt took, without waiting for a worker.
        attempts: 1, and one more for every worker that died while it was at it.
        ends_run: Whether no other job would fare better: nothing can be written any more.
    """

    key: str
    status: Literal["done", "failed", "skipped"]
    error: str = ""
    value: Any = None
    seconds: float = 0.0
    attempts: int = 1
    ends_run: bool = False


_TURN = threading.Lock()
"""One job at a time in a process: random numbers and the number of threads belong to it as a
whole. A worker with several threads has its jobs wait here."""


class _Reply(NamedTuple):
    """What a worker sends of a job."""

    outcome: Outcome
    lines: tuple[tuple[int, str], ...] = ()  # of its log, warnings and worse: level and text
    trace: str = ""  # of an error that nobody foresaw


def _work(job: Job, run: str, threads: int, deaths: int) -> bytes:
    """Run a job in a worker and return its pickled reply; errors are part of it."""
    with _TURN:
        client = get_client()
        died = client.get_metadata([run, job.key], 0)
        if died >= deaths:
            return pickle.dumps(_Reply(_killed(job.key, deaths)))
        client.set_metadata([run, job.key], died + 1)
        torch.set_num_threads(threads)
        started = time.perf_counter()

        def reply(status: Literal["done", "failed"], trace: str = "", **more: Any) -> bytes:
            seconds = time.perf_counter() - started
            outcome = Outcome(job.key, status, seconds=seconds, attempts=died + 1, **more)
            lines = tuple((record.levelno, record.getMessage()) for record in records)
            return pickle.dumps(_Reply(outcome, lines, trace))

        with _records_kept() as records:
            try:
                return reply("done", value=job.run(*job.arguments))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it must not end the run
                foreseen = isinstance(error, (UserError, RunError))
                trace = "" if foreseen else "".join(traceback.format_exception(error))
                ends_run = isinstance(error, OutputError)
                return reply("failed", trace, error=_words(error), ends_run=ends_run)
            finally:
                # A worker that dies later may take this reply with it: the job is then begun
                # again, though no worker has died of it.
                client.set_metadata([run, job.key], died)


def _words(error: Exception | SystemExit) -> str:
    if isinstance(error, (UserError, RunError)):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {one_line(error)}"


def _killed(key: str, attempts: int) -> Outcome:
    times = "once" if attempts == 1 else f"{attempts} times"
    return Outcome(key, "failed", error=f"its worker died {times} while at it", attempts=attempts)


@contextmanager
def _records_kept() -> Iterator[list[logging.LogRecord]]:
    """Keep the warnings of a job, and worse, for the process that has asked for it."""
    handler = BufferingHandler(capacity=sys.maxsize)
    handler.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in OURS]
    for each in loggers:
        each.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        for each in loggers:
            each.removeHandler(handler)


def run_jobs(
    jobs: Sequence[Job],
    client: Client,
    *,
    on_outcome: Callable[[Outcome], object] = lambda _: None,
    title: str = "jobs",
    max_failures: int | None = None,
    deaths: int = 3,
) -> dict[str, Outcome]:
    """Run jobs in the workers of a cluster, each as soon as those it needs are done.

    Args:
        jobs: The jobs, in the order in which they are begun where needs allow.
        client: What `cluster` yields, or any client of a Dask scheduler.
        on_outcome: Called once for every job, in this process, as they end. An error that it
            raises ends the run.
        title: What the progress bar calls them; empty: no bar.
        max_failures: End the run when more jobs than this have failed; None: never. What is left
            is skipped.
        deaths: A job fails when this many workers have died while they were at it.

    Returns:
        What became of every job, by key, in the order of `jobs`.

    Raises:
        UserError: If keys are not unique, or needs are unknown or go in a circle.
        RunError: If the scheduler is lost.
    """
    run = _Run(jobs, client, on_outcome, max_failures, deaths)
    with closing(JobProgress(title, len(jobs), shown=bool(title))) as progress:
        try:
            while run.active:
                if not run.advance():
                    time.sleep(TICK_S)
                run.show(progress)
        finally:  # after Ctrl-C as well
            run.close()
    return {job.key: run.outcomes[job.key] for job in jobs}


def _sorted(jobs: Sequence[Job]) -> TopologicalSorter[str]:
    """Check keys and needs of jobs, and return what deals them out in order."""
    keys = Counter(job.key for job in jobs)
    twice = [key for key, number in keys.items() if number > 1]
    if twice:
        raise UserError(f"`key` must be unique among jobs, but several have {listing(twice)}.")
    for job in jobs:
        for need in job.needs:
            if need not in keys:
                raise UserError(
                    f"`needs` must name jobs, but {job.key} needs {need}.{nearest(need, keys)}"
                )
    sorter = TopologicalSorter({job.key: job.needs for job in jobs})
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(
            f"`needs` must not go in a circle, but they do: {' <- '.join(error.args[1])}."
        ) from error
    return sorter


class _Run:
    """The jobs of one call of `run_jobs`: which are done, which are at the scheduler.

    Needs are kept here and not given to the scheduler: results come here as soon as a job is done,
    so that no worker that dies takes the result of a finished job with it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        client: Client,
        on_outcome: Callable[[Outcome], object],
        max_failures: int | None,
        deaths: int,
    ) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._jobs = {job.key: job for job in jobs}
        # What waited for others goes before what was there all the time but stands behind it.
        self._priorities = {job.key: -number for number, job in enumerate(jobs)}
        self._sorter = _sorted(jobs)
        self._client = client
        self._on_outcome = on_outcome
        self._max_failures = max_failures
        self._deaths = deaths
        self._id = f"jobs-{uuid.uuid4().hex}"
        self._threads = threads_of(client)
        self._sent: dict[Future[Any], str] = {}
        self._given_up: Counter[str] = Counter()
        self._completed = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._counted, self._workers = -COUNT_PERIOD_S, 0
        self._stopped = ""

    @property
    def active(self) -> bool:
        """Whether some job has no outcome yet."""
        return self._sorter.is_active()

    def show(self, progress: JobProgress) -> None:
        """Say how far the jobs are; the workers are counted now and then."""
        if time.monotonic() - self._counted >= COUNT_PERIOD_S:
            self._workers = len(self._client.nthreads())
            self._counted = time.monotonic()
        progress.show(
            [o.seconds for o in self.outcomes.values() if o.status == "done"],
            len(self.outcomes),
            self._failed,
            len(self._sent),
            self._workers,
        )

    @property
    def _failed(self) -> int:
        return sum(outcome.status == "failed" for outcome in self.outcomes.values())

    def advance(self) -> bool:
        """Send jobs that are ready, take up replies; return whether there was anything to do."""
        ready = self._sorter.get_ready()
        for key in ready:
            lacking = [n for n in self._jobs[key].needs if self.outcomes[n].status != "done"]
            if self._stopped or lacking:
                reason = self._stopped or f"it needs {lacking[0]}, which is not done"
                self._end(Outcome(key, "skipped", error=reason, attempts=0))
            else:
                self._submit(key)
        replies = self._completed.next_batch(block=False)
        for future, result in replies:
            self._take(future, result)
        return bool(ready or replies)

    def _submit(self, key: str) -> None:
        # A pair as the key: jobs of one group that is larger than the cluster wait at the
        # scheduler, where a worker that comes later finds them, and not with a worker.
        future = self._client.submit(
            _work,
            self._jobs[key],
            self._id,
            self._threads,
            self._deaths,
            key=(self._id, f"{key}#{self._given_up[key]}"),
            priority=self._priorities[key],
            pure=False,
        )
        self._sent[future] = key
        self._completed.add(future)

    def _take(self, future: Future[Any], result: Any) -> None:
        """Take up what came of a job that was sent."""
        key = self._sent.pop(future, None)
        if key is None:  # taken back, since the run has ended
            return
        # Not its status: the worker may have died since, and the job may be begun once more.
        if isinstance(result, bytes):
            reply: _Reply = pickle.loads(result)
            for level, line in reply.lines:
                logger.log(level, "%s: %s", key, line)
            self._end(reply.outcome, reply.trace)
        elif not isinstance(result, tuple):  # cancelled, and not by us
            raise RunError(
                f"The scheduler must stay reachable until all jobs are done, but it was lost at "
                f"{key}. Run the command again: what is finished stays."
            )
        elif isinstance(result[1], KilledWorker):
            self._given_up[key] += 1
            if self._given_up[key] < self._deaths:  # the scheduler has less patience than we
                self._submit(key)
            else:
                self._end(_killed(key, self._deaths))
        else:
            self._end(Outcome(key, "failed", error=_words(result[1])))

    def _end(self, outcome: Outcome, trace: str = "") -> None:
        """Write an outcome down, and end the run if it was one failure too many."""
        self.outcomes[outcome.key] = outcome
        self._sorter.done(outcome.key)
        if outcome.status == "failed":
            logger.error("%s failed: %s", outcome.key, trace or outcome.error)
        elif outcome.attempts > 1:
            text = "%s was begun %d times, since its worker died"
            logger.warning(text, outcome.key, outcome.attempts)
        self._on_outcome(outcome)
        limit, reason = self._max_failures, ""
        if outcome.ends_run:
            reason = f"nothing can be written any more, as {outcome.key} has found"
        elif limit is not None and self._failed > limit:
            reason = f"more than {limit} jobs failed"
        if reason and not self._stopped:
            self._stopped = reason
            for key in self.close():
                self._end(Outcome(key, "skipped", error=self._stopped, attempts=0))

    def close(self) -> list[str]:
        """Take back all jobs at the scheduler and return their keys."""
        sent, self._sent = self._sent, {}
        if self._client.status == "running":
            self._client.cancel(list(sent), force=True)
            self._client.set_metadata(self._id, {})
        return list(sent.values())
