"""Random numbers that belong to one strategy, and whose state is saved with it."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtbalance._checks import check_generator

# Knuth's multiplicative constant (2^32 over the golden ratio), the two multipliers of MurmurHash3's
# 32-bit finalizer (A. Appleby), and the step of SplitMix64 (Steele, Lea and Flood 2014).
_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_STEP = 0x9E3779B97F4A7C15
_TABLE_SIZE = 2**15
_UNIT = 2.0**-31 * (1 - 2.0**-24)
"""Brings 32-bit integers into (-1, 1); rounding to float32 cannot reach the ends."""


class RandomSource(nn.Module):
    """A generator on the CPU that travels in ``state_dict``.

    Draws on other devices depend on a seed from this one, so that the state to save is always the
    same few bytes and no device has to be waited for.

    Args:
        seed: Where the stream starts. The same on all ranks gives the same draws on all ranks.
        generator: A CPU generator to use instead; the caller's own draws then advance it too.
    """

    def __init__(self, seed: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_generator(generator)
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator
        self._start = self.generator.get_state()

    def draw_seed(self) -> int:
        """Draw a seed for another generator."""
        return int(torch.randint(2**62, (), generator=self.generator, device="cpu"))

    @contextmanager
    def as_global_stream(self, devices: list[torch.device]) -> Iterator[None]:
        """Let PyTorch's global generators draw from this stream, and put them back afterwards."""
        seed = self.draw_seed()
        cuda = [device for device in devices if device.type == "cuda"]
        with torch.random.fork_rng(devices=cuda):
            # torch.manual_seed would reach devices that nobody puts back.
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def reset(self) -> None:
        """Go back to the start of the stream."""
        self.generator.set_state(self._start)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return the states of the stream where it is now, and at its start."""
        return self.get_extra_state(), self._start

    def follow(self, places: tuple[Tensor, Tensor]) -> None:
        """Go on as another source whose places these are, also after a reset."""
        state, self._start = places
        self.set_extra_state(state)

    def get_extra_state(self) -> Tensor:
        """Return the generator's state, a byte tensor of fixed shape."""
        return self.generator.get_state()

    def check_state(self, state: Mapping[str, object]) -> None:
        """Raise ValueError if what was saved, by name, is no state of a generator."""
        saved = state.get("_extra_state", self._start)
        try:
            torch.Generator().set_state(saved.cpu())  # type: ignore[attr-defined]
        except (RuntimeError, TypeError, AttributeError):
            got = f"{saved.dtype}, {tuple(saved.shape)}" if isinstance(saved, Tensor) else saved
            raise ValueError(
                "the saved state of a random generator must be a byte tensor of shape "
                f"{tuple(self._start.shape)}, but got {got}. Load what `state_dict()` returned."
            ) from None

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a saved state."""
        self.check_state({"_extra_state": state})
        self.generator.set_state(state.cpu())

    # torch.Generator can be neither copied nor pickled in the oldest supported release.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["generator"] = self.generator.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})  # type: ignore[no-untyped-call]


def visiting_orders(m: int, generator: torch.Generator | None) -> Tensor:
    """Return whom each of m tasks visits, all others in a row, shape (m, m - 1), on the CPU.

    Args:
        m: The number of tasks.
        generator: What to draw an order for each from; None for the order of their numbers.
    """
    if generator is None:
        positions = torch.arange(m - 1, device="cpu").repeat(m, 1)
    else:
        positions = torch.rand(m, m - 1, generator=generator, device="cpu").argsort(1)
    return positions + (positions >= torch.arange(m, device="cpu")[:, None])


def numbered_draws(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return uniform draws in (-1, 1) for the columns ``first`` to ``first + count - 1``.

    A draw is a function of the seed and the number of its column alone (a hash of both), so that
    columns may be drawn in any order, in pieces, on any device and in any process. The hash is a
    short one, multiply, xor with the upper half, multiply, since every operation counts here: it
    passes the tests of distribution and correlation of this project, and is no cipher.

    Args:
        seed: A number from ``RandomSource.draw_seed``.
        first: Number of the first column.
        count: How many.
        device: Where.

    Returns:
        Shape (count,), float32.
    """
    high, low = divmod(_mixed(seed + _STEP * (first >> 32)), 2**32)
    x = _multiples(count, device) + _wrapped(first * _GOLDEN + low)
    # With the first half of the seed alone, streams of two seeds would be one, shifted.
    x.bitwise_xor_(_wrapped(high)).mul_(_wrapped(_FIRST))
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15)).mul_(_wrapped(_SECOND))
    return x.to(torch.float32).mul_(_UNIT)


def _mixed(seed: int) -> int:
    """Return a 64-bit number all of whose bits depend on all of the seed's (SplitMix64)."""
    z = (seed + _STEP) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _multiples(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, 2, ... times the first constant, modulo 2^32 as signed integers."""
    if count <= _TABLE_SIZE and device.type == "cpu":
        return _table()[:count]
    return torch.arange(count, dtype=torch.int32, device=device).mul_(_wrapped(_GOLDEN))


@functools.cache
def _table() -> Tensor:
    return torch.arange(_TABLE_SIZE, dtype=torch.int32, device="cpu").mul_(_wrapped(_GOLDEN))


def _wrapped(number: int) -> int:
    """Return the signed 32-bit integer that equals ``number`` modulo 2^32."""
    return (number + 2**31) % 2**32 - 2**31
