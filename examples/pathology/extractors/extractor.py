"""Networks that turn tiles into features, behind one small protocol.

Anything with a `model`, a `transform` and an `identifier` will do. Two kinds are built here by
name: ``ctranspath``, and ``timm:NAME`` for any image model of timm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pathology.common.errors import UserError, nearest
from examples.pathology.extractors.checkpoints import check_entries, file_sha256, read_checkpoint

logger = logging.getLogger(__name__)

CTRANSPATH = "ctranspath"
TIMM_PREFIX = "timm:"

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


def make_extractor(name: str, weights: Path | None, seed: int = 0) -> Extractor:
    """Build an extractor by name.

    Args:
        name: ``ctranspath``, or ``timm:`` and the name of one of timm's models.
        weights: Its checkpoint; None for seeded random weights, whose features carry no biology.
        seed: Seed of the random weights; not used with `weights`.

    Raises:
        UserError: If the name is unknown or the weights do not fit.
    """
    if name == CTRANSPATH:
        from examples.pathology.extractors.ctranspath import ctranspath_extractor

        return ctranspath_extractor(weights, seed)
    if name.startswith(TIMM_PREFIX):
        return timm_extractor(name.removeprefix(TIMM_PREFIX), weights, seed)
    raise UserError(
        f"`extractor` must be {CTRANSPATH} or {TIMM_PREFIX}NAME, but got {name!r}."
        f"{nearest(name, [CTRANSPATH])}"
    )


def timm_extractor(name: str, weights: Path | None, seed: int = 0) -> Extractor:
    """Build one of timm's models without its classification head; nothing is downloaded.

    Args:
        name: Its name in timm, such as ``vit_small_patch16_224``.
        weights: A checkpoint of exactly this model (``.pth``, ``.bin`` or ``.safetensors``), with
            or without a head; None for seeded random weights.
        seed: Seed of the random weights; the generators of the caller are left alone.

    Raises:
        UserError: If timm does not know the model, the weights do not fit, or the model gives
            something else than one vector per image.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name):
        known = timm.list_models()
        raise UserError(
            f"`extractor` must name one of timm's models, but timm {timm.__version__} has no "
            f"{name!r}.{nearest(name, known)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=0)
    identifier = f"{TIMM_PREFIX}{name}"
    if weights is None:
        warn_of_random_weights(name, seed)
        identifier += f"-random-seed{seed}"
    else:
        heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
        prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        state = {
            key: (key, value)
            for key, value in read_checkpoint(Path(weights)).items()
            if not (prefixes and key.startswith(prefixes))
        }
        checked = check_entries(state, model.state_dict(), network=name, path=Path(weights))
        model.load_state_dict(checked, strict=True)
    model.eval()
    resolve: Callable[[nn.Module], dict[str, Any]] = resolve_model_data_config
    config = resolve(model)
    size = (int(config["input_size"][1]), int(config["input_size"][2]))
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    transform = Normalise(tuple(config["mean"]), tuple(config["std"]), size, mode)
    with torch.inference_mode():
        shape = tuple(model(torch.zeros(1, 3, *size)).shape)
    if len(shape) != 2:
        raise UserError(
            f"`extractor` must give one vector per tile, but {name} gives {shape[1:]} for each."
        )
    return LoadedExtractor(
        model, transform, identifier, None if weights is None else file_sha256(Path(weights))
    )


def warn_of_random_weights(network: str, seed: int) -> None:
    """Say that features will carry no biology."""
    logger.warning(
        "%s has RANDOM weights (seed %d): its features carry no learned biology. "
        "Pass trained weights with --weights for real work.",
        network,
        seed,
    )
