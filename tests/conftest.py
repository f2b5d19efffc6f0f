"""Everything random is seeded, and Hypothesis draws the same examples in every run."""

import gc
import os
from collections.abc import Iterator

# Before torch: its idle threads would otherwise spin, which starves tests that run beside this one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before NumPy, and for processes that tests start: a product of small matrices wakes every thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
import torch._dynamo  # the first step of an optimizer does: here, so that it is frozen
from hypothesis import settings

from tests._device import DEVICE, compute_there

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")

compute_there()
torch.set_num_threads(1)  # networks are small, and tests run beside this one


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage meanwhile: there is none, and it would take a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    if DEVICE.type == "cpu":
        torch.default_generator.manual_seed(0)  # a hundredth of the time that all devices take
    else:
        torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Leave what imports, collecting and earlier modules have made out of searches for garbage.

    Millions of objects: looking at them costs a tenth of the suite, and tenths of a second wherever
    the library looks for the modules that hold a parameter.
    """
    gc.collect()
    gc.freeze()
