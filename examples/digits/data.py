"""Pictures of two overlaid digits, from scikit-learn's 1,797 handwritten ones."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from examples.digits.setting import Setting

SIDE = 8
WHITE = 16.0
"""Grey values of the digits go from 0 to this."""

SHARES = (0.6, 0.2)
"""Of the handwritten digits, for training and validation; the rest is for the test."""

Purpose = Literal["split", "pairs", "weights", "batches", "further"]
_PURPOSES: tuple[Purpose, ...] = ("split", "pairs", "weights", "batches", "further")


def stream(seed: int, purpose: Purpose) -> torch.Generator:
    """Return the random stream of one seed for one purpose, the same for every method.

    Args:
        seed: Of the repetition.
        purpose: What is drawn.
    """
    return torch.Generator().manual_seed(1_000 * seed + _PURPOSES.index(purpose))


@dataclass(frozen=True)
class Pictures:
    """Some pictures and what is to be told of them.

    Args:
        pixels: Grey values from 0 to 1, ``(n, side, side)``.
        upper_left: Class of the upper-left digit ``(n,)``.
        lower_right: Class of the lower-right digit ``(n,)``.
        ink: Mean grey value of both digits, from 0 to 16, what is hidden included ``(n,)``.
        sources: Which handwritten digits they are made of ``(n, 2)``.
    """

    pixels: Tensor
    upper_left: Tensor
    lower_right: Tensor
    ink: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, picked: Tensor) -> "Pictures":
        return Pictures(
            self.pixels[picked],
            self.upper_left[picked],
            self.lower_right[picked],
            self.ink[picked],
            self.sources[picked],
        )


@dataclass(frozen=True)
class Data:
    """What one repetition trains on, chooses on, and is tested on.

    No handwritten digit is in the pictures of two parts.
    """

    train: Pictures
    validation: Pictures
    test: Pictures

    @property
    def ink_scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the ink of the training pictures."""
        return float(self.train.ink.mean()), float(self.train.ink.std())


def overlay(first: Tensor, second: Tensor, shift: int) -> Tensor:
    """Return pictures with both digits; where they overlap, the one with more ink shows.

    Args:
        first: Upper-left digits ``(n, 8, 8)``.
        second: Lower-right digits ``(n, 8, 8)``.
        shift: Pixels between them, in both directions.

    Returns:
        ``(n, 8 + shift, 8 + shift)``.
    """
    picture = first.new_zeros(len(first), SIDE + shift, SIDE + shift)
    picture[:, :SIDE, :SIDE] = first
    corner = picture[:, shift:, shift:]
    corner.copy_(torch.maximum(corner, second))
    return picture


@lru_cache(maxsize=1)
def data_of(seed: int, setting: Setting) -> Data:
    """Draw the data of one repetition.

    Args:
        seed: Of the repetition: which digits are held out, and which are overlaid.
        setting: How many pictures, and how far apart the digits are.
    """
    digits, classes = _handwritten()
    order = torch.randperm(len(digits), generator=stream(seed, "split"))
    ends = [round(len(digits) * share) for share in (SHARES[0], sum(SHARES))]
    parts = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
    counts = setting.pictures, setting.held_out, setting.held_out
    pairs = stream(seed, "pairs")

    def draw(part: Tensor, count: int) -> Pictures:
        sources = part[torch.randint(len(part), (count, 2), generator=pairs)]
        first, second = digits[sources].unbind(1)
        return Pictures(
            pixels=overlay(first, second, setting.shift) / WHITE,
            upper_left=classes[sources[:, 0]],
            lower_right=classes[sources[:, 1]],
            ink=digits[sources].mean((1, 2, 3)),
            sources=sources,
        )

    train, validation, test = map(draw, parts, counts)
    return Data(train, validation, test)


@lru_cache(maxsize=1)
def _handwritten() -> tuple[Tensor, Tensor]:
    loaded = load_digits()
    return torch.from_numpy(loaded.images).float(), torch.from_numpy(loaded.target).long()
