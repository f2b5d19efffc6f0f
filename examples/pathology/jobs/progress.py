"""How far jobs are: a live bar on a terminal, now and then a line of the log elsewhere."""

import logging
import time
from collections.abc import Sequence

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_PERIOD_S = 60.0
"""Where no bar can be drawn, a line at most this often says how far the jobs are."""

IDLE_SHARE = 0.01
"""Jobs that took less than this share of the longest only found their results on disk, and tell
nothing about those that are left."""


class JobProgress:
    """Jobs done, running and failed of a total, and the time left; on stderr, if `shown`."""

    def __init__(self, title: str, total: int, *, shown: bool = True) -> None:
        self._title, self._total = title, total
        self._bar = tqdm(
            total=total,
            desc=title,
            disable=None if shown else True,  # None: only where stderr is no terminal
            bar_format="{desc}: {n_fmt} of {total_fmt} |{bar}|{postfix}",
        )
        self._logs = shown and self._bar.disable
        self._logged = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def show(
        self, seconds: Sequence[float], ended: int, failed: int, waiting: int, workers: int
    ) -> None:
        """Say how far the jobs are.

        Args:
            seconds: Time that each job took that is done, in s.
            ended: Jobs that have an outcome.
            failed: Those of them that failed.
            waiting: Jobs that run, or could if there were more workers.
            workers: How many there are.
        """
        running = min(waiting, workers)
        parts = [f"{running} running", f"{failed} failed"]
        left = time_left(seconds, self._total - ended, workers)
        if left is not None:
            parts.append(f"about {tqdm.format_interval(left)} left")
        elif ended < self._total and not workers:
            parts.append("waiting for a worker")
        if not self._bar.disable:
            self._bar.n = ended
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(0)
        elif self._logs and time.monotonic() - self._logged >= LOG_PERIOD_S:
            self._logged = time.monotonic()
            logger.info("%s: %d of %d, %s", self._title, ended, self._total, ", ".join(parts))


def time_left(seconds: Sequence[float], left: int, workers: int) -> float | None:
    """Return how long the jobs that are left may take, in s; None where nothing tells.

    Args:
        seconds: Time that each job took that is done, in s.
        left: Jobs without an outcome, those that run included.
        workers: How many run at a time.
    """
    worked = [value for value in seconds if value >= IDLE_SHARE * max(seconds)]
    if not left or not workers or not worked:
        return None
    rounds = max(1.0, left / workers)
    return rounds * sum(worked) / len(worked)
