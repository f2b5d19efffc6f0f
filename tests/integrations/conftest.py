"""Two processes for the frameworks, and a fresh start for each test."""

import os
from collections.abc import Iterator

import pytest

from tests.distributed.harness import Pool
from tests.integrations.parts import forget_accelerators


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What frameworks share for the life of a process, and tell by the environment."""
    environment = dict(os.environ)
    forget_accelerators()
    yield
    forget_accelerators()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()
