"""Any of timm's image models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from examples.pathology.common.errors import UserError, nearest
from examples.pathology.extractors.checkpoints import check_entries, file_sha256, read_checkpoint
from examples.pathology.extractors.extractor import Extractor, Normalise, warn_of_random_weights

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
    if not timm.is_model(name):
        raise UserError(
            f"`extractor` must name one of timm's models, but timm {timm.__version__} has no "
            f"{name!r}.{nearest(name, timm.list_models())}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=0)
    identifier, sha256 = f"{TIMM_PREFIX}{name}", None
    if weights is None:
        warn_of_random_weights(name, seed)
        identifier += f"-random-seed{seed}"
    else:
        model.load_state_dict(_checked_state(model, name, weights), strict=True)
        sha256 = file_sha256(weights)
    model.eval()
    transform = _transform(model)
    with torch.inference_mode():
        shape = tuple(model(torch.zeros(1, 3, *transform.size_px)).shape)
    if len(shape) != 2:
        raise UserError(
            f"`extractor` must give one vector per tile, but {name} gives {shape[1:]} for each."
        )
    return Extractor(model, transform, identifier, sha256)


def _checked_state(model: nn.Module, name: str, weights: Path) -> dict[str, Tensor]:
    """Read the weights of a model and leave out those of a head."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = read_checkpoint(weights)
    entries = {key: state[key] for key in state if not key.startswith(prefixes)}
    return check_entries(entries, model.state_dict(), network=name, path=weights)


def _transform(model: nn.Module) -> Normalise:
    resolve: Callable[[nn.Module], dict[str, Any]] = resolve_model_data_config
    config = resolve(model)
    _, height, width = config["input_size"]
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return Normalise(tuple(config["mean"]), tuple(config["std"]), (height, width), mode)
