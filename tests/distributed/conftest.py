"""Pools of ranks that live as long as the tests do."""

from collections.abc import Iterator

import pytest

from tests.distributed.harness import Pool


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.stop()
