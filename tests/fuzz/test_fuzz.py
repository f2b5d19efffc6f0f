"""A few hundred random cases, the same in every run, in blocks that are spread over processes."""

import pytest

from tests.fuzz._cases import case_of
from tests.fuzz._runner import run

BLOCKS, CASES = 16, 20


@pytest.mark.parametrize("block", range(BLOCKS))
def test_cases(block: int) -> None:
    for seed in range(block * CASES, (block + 1) * CASES):
        run(case_of(seed))
