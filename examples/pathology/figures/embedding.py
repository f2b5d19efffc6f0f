"""Embeddings of patients to maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from examples.pathology.figures.sheet import MEDIUM, PICTURES, SMALL, TEXT, Sheet, coloured_marker
from examples.pathology.results import metrics

OF_EACH_FOLD = "t-SNE of each fold's test patients by that fold's own model; panels share no axes."


def tsne(
    folds: Sequence[tuple[NDArray[np.float32], NDArray[np.str_] | NDArray[np.float64]]],
    classes: Sequence[str],
    sheet: Sheet,
    *,
    seed: int = 0,
    names: Sequence[str] = (),
    about: str = OF_EACH_FOLD,
) -> None:
    """Draw the t-SNE of each fold's test patients, one panel per fold.

    Every fold has a model, and so an embedding, of its own: one map of all folds would show the
    folds apart. A fold is embeddings ``(n, d)`` and true classes or values ``(n,)``. Giving all
    classes fixes their colours; without any, values have one scale of colours in all panels.
    """
    names = names or [f"fold {k + 1}" for k in range(len(folds))]
    scale = None
    if not classes:
        values: NDArray[Any] = np.concatenate([truth for _, truth in folds])
        scale = ScalarMappable(Normalize(values.min(), values.max()), "viridis")
    style = {**PICTURES, "legend.fontsize": TEXT}
    with sheet.open(
        (2.5, 2.6), (1.8, 1.3), len(folds), columns=5, remark=about, letters=30, style=style
    ) as (figure, panels):
        for axes, name, (embedding, truth) in zip(panels, names, folds, strict=True):
            points, heading = tsne_map(embedding, seed), f"{name}: n = {len(truth)}"
            if scale is None:
                for i, label in enumerate(classes):
                    _points(axes, points[truth == label], **coloured_marker(i))
                score = metrics.silhouette(embedding, truth)
                heading += "\n" + (score.reason or f"silhouette {score.value:.2f}")
            else:
                _points(axes, points, c=truth, cmap=scale.cmap, norm=scale.norm)
            axes.set(xticks=[], yticks=[])
            axes.margins(0.15)
            axes.set_title(heading, fontsize=SMALL)
        if scale is None:
            for i, label in enumerate(classes):
                _points(panels[0], np.empty((0, 2)), label=label, **coloured_marker(i))
        else:
            bar = figure.colorbar(scale, ax=panels, shrink=0.8)
            bar.set_label("Measured", fontsize=MEDIUM)


def _points(axes: Axes, points: NDArray[np.float64], **options: Any) -> PathCollection:
    x, y = points.T
    return axes.scatter(x, y, s=46, edgecolor="white", linewidth=0.6, **options)


def tsne_map(embedding: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """Return a t-SNE map ``(n, 2)`` of ``(n, d)``; fewer than 4 points are shown as they are."""
    points = np.asarray(embedding, dtype=np.float64)
    if len(points) < 4:
        centred = points - points.mean(axis=0)
        return np.pad(centred, ((0, 0), (0, max(0, 2 - centred.shape[1]))))[:, :2]
    perplexity = min(30.0, (len(points) - 1) / 3)
    mapped = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    return np.asarray(mapped, dtype=np.float64)
