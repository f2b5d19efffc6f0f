"""The pool itself: what goes wrong in a rank fails the test, and the next test finds a pool."""

import os
import time

import pytest
import torch.distributed as dist

from tests.distributed.harness import Here, Pool, RankError


def number(here: Here) -> tuple[int, int]:
    return here.rank, dist.get_world_size()


def hang(here: Here) -> None:
    if here.rank == 0:
        dist.barrier()


def fail(here: Here) -> None:
    if here.rank == 1:
        raise ValueError("on purpose")
    dist.barrier()


def die(here: Here) -> None:
    if here.rank == 1:
        os._exit(1)


def test_a_pool_outlives_ranks_that_hang_raise_or_die(two: Pool) -> None:
    two.run(number)  # what starts with the first pool takes a while
    for function, message in (
        (hang, r"rank 0:\nno answer(.|\n)*in barrier"),
        (fail, r"rank 0:\nno answer(.|\n)*rank 1:\n(.|\n)*ValueError: on purpose"),
        (die, r"rank 1:\ndied"),
    ):
        start = time.monotonic()
        with pytest.raises(RankError, match=message):
            two.run(function, seconds=1.0)
        assert time.monotonic() - start < 10
        assert two.run(number) == [(0, 2), (1, 2)]
