"""Any of timm's image models."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm import layers
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from examples.pathology.common.errors import UserError, listing, nearest, one_line
from examples.pathology.extractors.checkpoints import check_entries, file_sha256, read_checkpoint
from examples.pathology.extractors.extractor import Extractor, Normalise, warn_of_random_weights

logger = logging.getLogger(__name__)

TIMM_PREFIX = "timm:"
DEFAULT_PX = 224  # of a tile

_LAYERS = ("GELU", "LayerNorm", "ReLU", "SiLU", "GluMlp", "QuickGELU", "SwiGLU", "SwiGLUPacked")
LAYERS: dict[str, Any] = {
    name: getattr(nn, name, None) or getattr(layers, name) for name in _LAYERS
}
"""What an option whose name ends in ``_layer`` may be."""

OURS = {"pool": ("cls_mean",), "interpolation": ("bicubic", "bilinear"), "mean": (), "std": ()}
"""Options that are not for the model's class, and the words that they may be."""

LEAST = {"mean": -1.0, "std": 0.0}
"""What each of the three numbers of these must be above."""

RESERVED = ("checkpoint_path", "features_only", "in_chans", "num_classes", "pretrained")


class ClassAndMean(nn.Module):
    """The class token joined with the mean of the patch tokens, (B, 2 d), without registers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images (B, 3, h, w)."""
        tokens = self.model(images)
        return torch.cat([tokens[:, 0], tokens[:, self.model.num_prefix_tokens :].mean(1)], dim=1)


def timm_extractor(
    name: str, weights: Path | None, seed: int, options: Sequence[str], tile_px: int
) -> Extractor:
    """Build one of timm's models without its classification head; nothing is downloaded.

    Args:
        name: Its name in timm, such as ``vit_small_patch16_224``.
        weights: A checkpoint of exactly this model (``.pth``, ``.bin`` or ``.safetensors``), with
            or without a head; None for seeded random weights.
        seed: Seed of the random weights; the generators of the caller are left alone.
        options: ``KEY=VALUE`` in any order: arguments of the model's class, and `OURS`.
        tile_px: Edge of the tiles; 224 px are resampled to the model's own size, others are not.

    Raises:
        UserError: If timm does not know the model, options, tiles or weights do not fit, or the
            model gives something else than one vector per image.
    """
    if not timm.is_model(name):
        raise UserError(
            f"`extractor` must name one of timm's models, but timm {timm.__version__} has no "
            f"{name!r}.{nearest(name, timm.list_models())}"
        )
    given = _read(options)
    own: dict[str, Any] = {k: LAYERS.get(str(v), v) for k, v in given.items() if k not in OURS}
    pool: dict[str, Any] = {"global_pool": ""} if "pool" in given else {}  # gives all tokens
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = timm.create_model(name, pretrained=False, num_classes=0, **own, **pool).eval()
        transform = _transform(model, given, tile_px)
        with torch.inference_mode():
            shape = tuple(model(torch.zeros(1, 3, *transform.size_px)).shape)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"`extractor-option` and `tile-px` ({tile_px}) must be what timm {timm.__version__} "
            f"takes for {name}, but it says: {one_line(error)[:200]}."
        ) from error
    if len(shape) != 2 + len(pool) or (pool and getattr(model, "cls_token", None) is None):
        raise UserError(
            f"`extractor` must give one vector per tile, but {name} gives {shape[1:]} for each"
            f"{', and has no class token for pool=cls_mean' * len(pool)}."
        )
    identifier = " ".join([f"{TIMM_PREFIX}{name}", *(f"{k}={given[k]}" for k in sorted(given))])
    sha256 = None
    if weights is None:
        warn_of_random_weights(name, seed)
        identifier += f"-random-seed{seed}"
    else:
        model.load_state_dict(_checked_state(model, name, weights), strict=True)
        sha256 = file_sha256(weights)
    return Extractor(ClassAndMean(model) if pool else model, transform, identifier, sha256)


def _read(options: Sequence[str]) -> dict[str, Any]:
    """Return truth values, numbers, words and tuples of numbers by name; nothing is evaluated."""
    given: dict[str, Any] = {}
    for option in options:
        key, _, text = (part.strip() for part in option.partition("="))
        value, words = _value(text), LAYERS if key.endswith("_layer") else OURS.get(key, ())
        if not key or key in given or key in RESERVED:
            must = "KEY=VALUE, each key once and none that is set already"
        elif words and text not in words:
            must = f"{key}=VALUE, one of {listing(words)}"
        elif key in LEAST and not (np.shape(value) == (3,) and min(value) > LEAST[key]):
            must = f"{key}=VALUE, three numbers"
        elif value is None:
            must = f"{key}=VALUE, a number, true, false or a word"
        else:
            given[key] = value
            continue
        close = nearest(text, words)
        raise UserError(f"`extractor-option` must be {must}, but got {option!r}.{close}")
    return given


def _value(text: str) -> Any:
    """Return a truth value, a word, a number or a tuple of numbers; None for all else."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[A-Za-z]\w*", text):
        return text
    try:
        numbers = [float(part) for part in text.strip("()[]").split(",")]
    except ValueError:
        return None
    whole = tuple(int(number) if number.is_integer() else number for number in numbers)
    return whole[0] if len(whole) == 1 else whole


def _checked_state(model: nn.Module, name: str, weights: Path) -> dict[str, Tensor]:
    """Read the weights of a model and leave out those of a head."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = read_checkpoint(weights)
    entries = {key: state[key] for key in state if not key.startswith(prefixes)}
    return check_entries(entries, model.state_dict(), network=name, path=weights)


def _transform(model: nn.Module, given: dict[str, Any], tile_px: int) -> Normalise:
    """Return what tiles go through: what options do not say, timm says of the model."""
    resolve: Callable[[nn.Module], dict[str, Any]] = resolve_model_data_config
    config = {**resolve(model), **given}
    own = given.get("img_size", tuple(config["input_size"][1:]))
    size = own if isinstance(own, tuple) else (own, own)
    if tile_px != DEFAULT_PX:
        size = (tile_px, tile_px)
    elif size != (tile_px, tile_px):
        said = "Tiles of %d px are resampled to %d px; --tile-px %d cuts them so from the slide."
        logger.warning(said, tile_px, size[0], size[0])
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return Normalise(tuple(config["mean"]), tuple(config["std"]), size, mode)
