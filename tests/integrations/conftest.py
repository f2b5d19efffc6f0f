"""Two processes for the frameworks, and none of their chatter."""

from collections.abc import Iterator

import pytest

from tests.distributed.harness import Pool


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()
