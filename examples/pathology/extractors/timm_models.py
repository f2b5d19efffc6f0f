"""Any of timm's image models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.pathology.common.errors import UserError, nearest
from examples.pathology.extractors.checkpoints import check_entries, file_sha256, read_checkpoint
from examples.pathology.extractors.extractor import (
    Extractor,
    LoadedExtractor,
    Normalise,
    warn_of_random_weights,
)

TIMM_PREFIX = "timm:"


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
