"""Networks that turn tiles into features, behind one small protocol.

Anything with a `model`, a `transform` and an `identifier` will do. Two kinds are built here by
name: ``ctranspath``, and ``timm:NAME`` for any image model of timm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

CTRANSPATH = "ctranspath"

Transform = Callable[[Tensor], Tensor]


class Extractor(Protocol):
    """What extraction needs of a network; the attributes may be plain ones."""

    @property
    def model(self) -> nn.Module:
        """Takes what `transform` gives, gives features (B, d); in eval mode."""

    @property
    def transform(self) -> Transform:
        """Takes RGB tiles (B, h, w, 3) uint8 on any device, gives the model's input."""

    @property
    def identifier(self) -> str:
        """Name that goes into feature files; random weights have another than trained ones."""

    @property
    def weights_sha256(self) -> str | None:
        """Checksum of the weights file; None for random weights."""


@dataclass(frozen=True)
class LoadedExtractor:
    """An `Extractor` that was built from a name and a weights file.

    Attributes:
        model: Takes what `transform` gives, gives (B, d); in eval mode.
        transform: Takes RGB tiles (B, h, w, 3) uint8, gives what the model takes.
        identifier: Name that goes into feature files.
        weights_sha256: Checksum of the weights file; None for random weights.
    """

    model: nn.Module
    transform: Transform
    identifier: str
    weights_sha256: str | None


@dataclass(frozen=True)
class Normalise:
    """Scale RGB tiles (B, h, w, 3) uint8 to a network's normalised (B, 3, h', w') float32.

    Attributes:
        mean: Mean of each channel, on the scale of 0 to 1.
        std: Standard deviation of each channel.
        size_px: Height and width that the network takes; tiles of another size are resampled
            whole, nothing is cropped.
        mode: How they are resampled.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size_px: tuple[int, int]
    mode: str = "bicubic"

    def __call__(self, tiles: Tensor) -> Tensor:
        """Return what the network takes."""
        images = tiles.permute(0, 3, 1, 2).float() / 255
        if tuple(images.shape[2:]) != self.size_px:
            images = F.interpolate(
                images, self.size_px, mode=self.mode, align_corners=False, antialias=True
            ).clamp(0, 1)
        mean = torch.tensor(self.mean, device=tiles.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=tiles.device).view(3, 1, 1)
        return (images - mean) / std


def warn_of_random_weights(network: str, seed: int) -> None:
    """Say that features will carry no biology."""
    logger.warning(
        "%s has RANDOM weights (seed %d): its features carry no learned biology. "
        "Pass trained weights with --weights for real work.",
        network,
        seed,
    )
