"""Where the tests compute: on the CPU, or on what MTBALANCE_TEST_DEVICE says (``cuda``)."""

import os

import numpy as np
import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("MTBALANCE_TEST_DEVICE", "cpu"))


def compute_there() -> None:
    """Make ``DEVICE`` the default one of this process, for tensors made without a word."""
    if DEVICE.type != "cpu":
        torch.set_default_device(DEVICE)


def on_device(numbers: "Tensor | np.ndarray") -> Tensor:
    """Return a tensor on the default device, where tensors made without a word are."""
    return torch.as_tensor(numbers).to(torch.get_default_device())


def randn(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return normal numbers that are the same on every device, of a seed or of a generator."""
    generator = generator or torch.Generator().manual_seed(seed)
    return on_device(torch.randn(*shape, generator=generator, dtype=dtype, device="cpu"))


def random_state() -> list[Tensor]:
    """Return the state of the random numbers that are drawn on the CPU, and on the device."""
    states = [torch.get_rng_state()]
    return states if DEVICE.type == "cpu" else [*states, torch.cuda.get_rng_state()]


def set_random_state(states: list[Tensor]) -> None:
    """Go back to a state of `random_state`."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
