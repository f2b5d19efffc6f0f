"""Everything random is seeded, and Hypothesis draws the same examples in every run."""

import gc
import os

# Before torch: its idle threads would otherwise spin, which starves tests that run beside this one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
import torch._dynamo  # the first step of an optimizer does: here, so that it is frozen
from hypothesis import settings

from tests._device import compute_there

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")

compute_there()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Leave what imports, collecting and earlier modules have made out of searches for garbage.

    Millions of objects: looking at them costs a tenth of the suite, and tenths of a second wherever
    the library looks for the modules that hold a parameter.
    """
    gc.collect()
    gc.freeze()
