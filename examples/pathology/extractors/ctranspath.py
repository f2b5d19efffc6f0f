"""CTransPath: a Swin-T whose patch embedding is a small convolutional stem; 768 features per tile.

The released checkpoint was made with a modified timm 0.5.4. Here timm's current SwinTransformer
gets a stem of our own, and the names of the checkpoint are translated one by one, so that no
particular timm release is needed. A checkpoint is checked completely before any of it is used.

Reference: X. Wang et al., "Transformer-based unsupervised contrastive learning for
histopathological image classification", Medical Image Analysis 81, 2022.
"""

import logging
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from examples.pathology.extractors.checkpoints import (
    CheckpointError,
    check_entries,
    file_sha256,
    read_checkpoint,
)
from examples.pathology.extractors.extractor import Extractor, Normalise, warn_of_random_weights

logger = logging.getLogger(__name__)

CTRANSPATH = "ctranspath"
"""Its name, on the command line and in feature files."""

RELEASED_SHA256 = "7c998680060c8743551a412583fac689db43cec07053b72dfec6dcd810113539"
"""Checksum of the ``ctranspath.pth`` that the authors published."""

CHIEF_SHA256 = "1646f23001214f74cf432ef0e80b808ee6605143802ae6ed53a87564ddc4924a"
"""Checksum of the copy of this network that comes with CHIEF: another training, the same layout."""

TILE_PX = 224

IMAGENET = Normalise(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size_px=(TILE_PX, TILE_PX)
)
"""What goes into the network: tiles scaled with the statistics of ImageNet."""


class ConvStem(nn.Module):
    """The patch embedding: three convolutions, (B, 3, 224, 224) -> (B, 56, 56, 96).

    Args:
        img_size: Edge of the image in pixels.
        patch_size: Ignored but for the grid; the strides below make it 4.
        in_chans: Colour channels.
        embed_dim: Width of a token.
        norm_layer: Ignored; the published stem ends in a LayerNorm of eps 1e-5.
        **_: What else timm hands to its own patch embedding.
    """

    def __init__(
        self,
        img_size: int = TILE_PX,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[..., nn.Module] | None = None,  # noqa: ARG002
        **_: Any,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        first, second = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, first, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, embed_dim, 1),
        )
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5; timm's own LayerNorm has 1e-6

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as tokens (B, H/4, W/4, embed_dim)."""
        tokens: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return tokens


def ctranspath_extractor(weights: Path | None, seed: int = 0) -> Extractor:
    """Build CTransPath with everything that extraction needs.

    Args:
        weights: The released checkpoint, or another one of its layout; None for random weights.
        seed: Seed of the random weights.

    Returns:
        The extractor, named ``ctranspath``, or ``ctranspath-random-seed0`` and so on.
    """
    model = ctranspath(weights, seed)
    if weights is None:
        return Extractor(model, IMAGENET, f"{CTRANSPATH}-random-seed{seed}", None)
    sha256 = file_sha256(weights)
    if sha256 != RELEASED_SHA256:
        logger.warning(
            "%s has CTransPath's layout but is not the released checkpoint (sha256 %s).",
            weights,
            sha256,
        )
    return Extractor(model, IMAGENET, CTRANSPATH, sha256)


@dataclass(frozen=True)
class Verdict:
    """What a usable weights file is.

    Attributes:
        released: Whether it is the file that the authors published, byte by byte.
        sentence: What to tell the user.
    """

    released: bool
    sentence: str


def verify_weights(path: Path) -> Verdict:
    """Say whether a file is the released CTransPath checkpoint or another one of its layout.

    Args:
        path: The file; it is loaded completely, as `ctranspath` would.

    Raises:
        CheckpointError: If it cannot be used; the message says why.
    """
    ctranspath(path)
    sha256 = file_sha256(path)
    if sha256 == RELEASED_SHA256:
        return Verdict(True, f"{path} is the released CTransPath checkpoint (sha256 {sha256}).")
    known = "; it is the copy that comes with CHIEF" if sha256 == CHIEF_SHA256 else ""
    return Verdict(
        False,
        f"{path} has CTransPath's layout and can be used, but is not the released checkpoint: its "
        f"sha256 is {sha256}{known}, that of the released one {RELEASED_SHA256}.",
    )


def ctranspath(weights: Path | None, seed: int = 0) -> nn.Module:
    """Build CTransPath in eval mode; the global random generator is left alone.

    Args:
        weights: The released checkpoint, or another one of its layout; None for seeded random
            weights, whose features carry no biology.
        seed: Seed of the random weights; not used with `weights`.

    Returns:
        A network that maps normalised tiles (B, 3, 224, 224) to features (B, 768).

    Raises:
        CheckpointError: If the file is missing, damaged or not of CTransPath's layout.
    """
    with torch.random.fork_rng(devices=[]):  # timm draws initial weights that are replaced below
        model = SwinTransformer(
            img_size=TILE_PX,
            embed_layer=ConvStem,
            norm_layer=nn.LayerNorm,  # eps 1e-5
            depths=(2, 2, 6, 2),
            num_heads=(3, 6, 12, 24),
            window_size=7,
            num_classes=0,
        )
    if weights is None:
        warn_of_random_weights("CTransPath", seed)
        state = _random_state(model, seed)
    else:
        state = _translated(read_checkpoint(weights), model, weights)
    model.load_state_dict(state, strict=True)
    model.eval()
    return model


def _random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw every parameter from a generator of its own, so that torch's release does not matter."""
    state = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        rng = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**32)
        if value.ndim >= 2:
            drawn = rng.standard_normal(shape)
            if not name.endswith("relative_position_bias_table"):
                drawn *= np.sqrt(1.0 / np.prod(shape[1:]))
            state[name] = torch.from_numpy(np.asarray(drawn, dtype=np.float32))
        else:  # norms and biases start as usual: ones and zeros
            one = name.endswith(("weight", "running_var"))
            state[name] = torch.ones_like(value) if one else torch.zeros_like(value)
    return state


def _translated(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Check a checkpoint against the model and rename its entries to the model's.

    timm 0.5.4 merged patches at the end of a stage, today's timm does at the start of the next
    one; it also stored index and mask buffers, which follow from the geometry.
    """
    entries, indices = {}, {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            indices[name] = value
        elif not name.endswith("attn_mask") and not name.startswith("head."):
            entries[_merged_at(1, name)] = value
    checked = check_entries(
        entries,
        model.state_dict(),
        network="CTransPath",
        path=path,
        file_name=partial(_merged_at, -1),
    )
    buffers = dict(model.named_buffers())
    for name, value in indices.items():
        own = buffers.get(name)
        if own is None or not torch.equal(value.reshape(-1), own.reshape(-1)):
            raise CheckpointError(
                f"`{name}` must be that of a 7 x 7 window, but in {path} it is not: it is another "
                "Swin Transformer. Nothing was loaded."
            )
    return checked


def _merged_at(step: int, name: str) -> str:
    """Return the name of an entry if patches are merged so many stages later."""
    return re.sub(
        r"^layers\.(\d)\.downsample",
        lambda match: f"layers.{int(match.group(1)) + step}.downsample",
        name,
    )
