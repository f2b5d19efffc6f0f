"""What the model says of every tile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from examples.pathology.training.prediction import Fitted, forward, in_units

TILES_PER_PASS = 4096  # each a bag of its own


@dataclass(frozen=True)
class TileValues:
    """What the models say about the tiles of one slide.

    Scores are by column of ``predictions.csv``, target by target: the probability of each class, or
    the predicted value in the target's unit.

    Args:
        attention: Of the [cls] token, ``(n,)``; the average tile has 1.
        scores: Of each tile alone, ``(n,)``.
        of_slide: Of the whole slide.
    """

    attention: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]]
    of_slide: Mapping[str, float]


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
    columns = [column for target in models[0].targets for column in target.columns]
    return TileValues(
        np.mean(attention, axis=0),
        dict(zip(columns, np.mean(scores, axis=0).T, strict=True)),
        dict(zip(columns, np.mean(of_slide, axis=0).tolist(), strict=True)),
    )


def _scores(fitted: Fitted, bags: NDArray[np.float32], device: torch.device) -> NDArray[np.float64]:
    """Return the probability of every class, or the value in its unit, of every bag ``(b, k)``."""
    outputs = forward(fitted.model, bags, device, fitted.precision).outputs
    return np.concatenate([*in_units(fitted, outputs).values()], axis=1)
