"""Random numbers that belong to one strategy, and whose state is saved with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtbalance._checks import check_generator


class RandomSource(nn.Module):
    """A generator on the CPU that travels in ``state_dict``.

    Draws for another device come from a generator there that is seeded from this one, so that the
    state to save is always the same few bytes and no device has to be waited for.

    Args:
        seed: Where the stream starts. The same on all ranks gives the same draws on all ranks.
        generator: A CPU generator to use instead; the caller's own draws then advance it too.
    """

    def __init__(self, seed: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_generator(generator)
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator
        self._start = self.generator.get_state()

    def on(self, device: torch.device) -> torch.Generator:
        """Return a generator for draws on ``device``."""
        if device.type == "cpu":
            return self.generator
        return torch.Generator(device).manual_seed(self.draw_seed())

    def draw_seed(self) -> int:
        """Draw a seed for another generator."""
        return int(torch.randint(2**62, (), generator=self.generator))

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

    def get_extra_state(self) -> Tensor:
        """Return the generator's state, a byte tensor of fixed shape."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a saved state."""
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
