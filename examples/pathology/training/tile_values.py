"""What the model says of every tile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from examples.pathology.training.prediction import Fitted, forward

TILES_PER_PASS = 4096  # each a bag of its own


@dataclass(frozen=True)
class TileValues:
    """What the models say about the tiles of one slide.

    Args:
        attention: Of the [cls] token, ``(n,)``; the average tile has 1.
        score: Of each tile alone, ``(n,)``: the probability of the positive class, or the predicted
            value in the target's unit.
        slide_score: Of the whole slide.
    """

    attention: NDArray[np.float64]
    score: NDArray[np.float64]
    slide_score: float


def tile_values(models: Sequence[Fitted], feats: NDArray[np.float32], device: str) -> TileValues:
    """Return what the models of a run say of each tile, as means over the models.

    Args:
        models: One per fold.
        feats: ``(n, in_features)``.
        device: Where the models are.
    """
    where = torch.device(device)
    attention, scores, of_slide = [], [], []
    for fitted in models:
        with torch.inference_mode():
            looks = fitted.model.attention(torch.from_numpy(feats).to(where))
            attention.append(looks.double().cpu().numpy() * len(feats))
            parts = np.split(feats[:, None], range(TILES_PER_PASS, len(feats), TILES_PER_PASS))
            scores.append(np.concatenate([_scores(fitted, part, where) for part in parts]))
            of_slide.append(_scores(fitted, feats, where)[0])
    return TileValues(np.mean(attention, axis=0), np.mean(scores, axis=0), float(np.mean(of_slide)))


def _scores(fitted: Fitted, bags: NDArray[np.float32], device: torch.device) -> NDArray[np.float64]:
    """Return the positive class's probability, or the value in its unit, of every bag ``(b,)``."""
    target = fitted.targets[0]
    output = forward(fitted.model, bags, device, fitted.precision).outputs[0].double()
    if target.kind == "regression":
        return fitted.scalers[target.name].unscale(output[:, 0].cpu().numpy())
    positive = output.softmax(dim=1)[:, target.classes.index(target.positive)]
    return np.asarray(positive.cpu().numpy())
