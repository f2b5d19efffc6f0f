"""What extraction needs of a network that turns tiles into features."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extractor:
    """A network with what its tiles go through first, and the name of its features.

    Attributes:
        model: Takes what `transform` gives, gives features (B, d); in eval mode.
        transform: Takes RGB tiles (B, h, w, 3) uint8 on any device, gives what the model takes.
        identifier: Name that goes into feature files; random weights have another than trained
            ones.
        weights_sha256: Checksum of the weights file; None for random weights.
    """

    model: nn.Module
    transform: Callable[[Tensor], Tensor]
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
