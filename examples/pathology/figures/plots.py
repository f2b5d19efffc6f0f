"""Numbers to figures: the only module that draws.

Figures are written as png, with colours that colour-blind readers can tell apart (Okabe and Ito)
and a marker or line style besides the colour. A caption under each says what is synthetic or random
about its data.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.metrics import precision_recall_curve, roc_curve

from examples.pathology.common.files import write_bytes
from examples.pathology.results import metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GREY = "#666666"
DPI = 150
STYLE = {"font": 11, "small": 9.5}
OF_EACH_FOLD = "t-SNE of each fold's test patients by that fold's own model; panels share no axes."

Scored = Sequence[tuple[NDArray[np.bool_], NDArray[np.float64]]]


def roc(folds: Scored, path: Path, *, title: str, caption: str = "") -> None:
    """Draw the ROC curve of every fold, their mean, and one standard deviation around it.

    Args:
        folds: For each fold ``(n,)`` truth and ``(n,)`` score; a fold with one class only is named,
            not drawn.
        path: The ``.png`` to write.
        title: Above the axes.
        caption: Below them.
    """
    figure, axes = new_figure(title, caption)
    curves = []
    for k, (truth, score) in enumerate(folds):
        area = metrics.auroc(truth, score)
        if area.reason:
            axes.plot([], [], " ", label=f"fold {k + 1}: {area.reason}")
            continue
        x, y, _ = roc_curve(truth, score)
        curves.append((x, y))
        thin_line(axes, x, y, k, f"fold {k + 1}: {area.value:.2f}")
    summary = metrics.over_folds([metrics.auroc(*fold) for fold in folds])
    if curves:
        grid = np.linspace(0.0, 1.0, 201)
        mean, spread = metrics.mean_curve(curves, grid)
        label = f"mean AUROC {summary.mean:.2f}" + (
            f" ± {summary.sd:.2f} (sd)" if len(curves) > 1 else ""
        )
        axes.fill_between(
            grid,
            np.clip(mean - spread, 0, 1),
            np.clip(mean + spread, 0, 1),
            color="#000000",
            alpha=0.12,
            lw=0,
        )
        axes.plot(grid, mean, color="#000000", lw=2.4, label=label)
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="chance")
    _unit_square(axes, "False positive rate", "True positive rate")
    legend_beside(figure)
    save(figure, path)


def precision_recall(folds: Scored, path: Path, *, title: str, caption: str = "") -> None:
    """Draw the precision-recall curve of every fold, and the prevalence that chance would reach.

    Args:
        folds: As for `roc`.
        path: The ``.png`` to write.
        title: Above the axes.
        caption: Below them.
    """
    figure, axes = new_figure(title, caption)
    for k, (truth, score) in enumerate(folds):
        area = metrics.auprc(truth, score)
        if area.reason:
            axes.plot([], [], " ", label=f"fold {k + 1}: {area.reason}")
            continue
        precision, recall, _ = precision_recall_curve(truth, score)
        # Precision between two thresholds is not on the line between them: draw steps.
        thin_line(axes, recall, precision, k, f"fold {k + 1}: {area.value:.2f}", steps=True)
    truth = np.concatenate([truth for truth, _ in folds])
    summary = metrics.over_folds([metrics.auprc(*fold) for fold in folds])
    if summary.folds:
        spread = f" ± {summary.sd:.2f} (sd)" if summary.folds > 1 else ""
        axes.plot([], [], " ", label=f"mean AUPRC {summary.mean:.2f}{spread}")
    share = float(truth.mean())
    axes.axhline(share, color=GREY, lw=1.4, ls=":", label=f"prevalence {share:.2f} = chance")
    _unit_square(axes, "Recall", "Precision")
    legend_beside(figure)
    save(figure, path)


def regression(
    folds: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Draw predicted over measured values, a colour and a marker per fold.

    Args:
        folds: For each fold measured ``(n,)`` and predicted ``(n,)`` values, in the target's unit.
        path: The ``.png`` to write.
        title: Above the axes.
        caption: Below them.
    """
    figure, axes = new_figure(title, caption)
    scores = [metrics.pearson(*fold) for fold in folds]
    for k, ((measured, predicted), score) in enumerate(zip(folds, scores, strict=True)):
        axes.scatter(
            measured,
            predicted,
            s=30,
            alpha=0.75,
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            edgecolor="white",
            linewidth=0.5,
            label=f"fold {k + 1}: " + (score.reason or f"r = {score.value:.2f}"),
        )
    summary = metrics.over_folds(scores)
    if summary.folds:
        spread = f" ± {summary.sd:.2f} (sd)" if summary.folds > 1 else ""
        axes.plot([], [], " ", label=f"mean r = {summary.mean:.2f}{spread}")
    measured = np.concatenate([fold[0] for fold in folds])
    if len(measured):
        ends = [measured.min(), measured.max()]
        axes.plot(ends, ends, color=GREY, lw=1, ls=":", label="equal")
    axes.set_xlabel("Measured", fontsize=STYLE["font"])
    axes.set_ylabel("Predicted", fontsize=STYLE["font"])
    legend_beside(figure)
    save(figure, path)


def tsne(
    folds: Sequence[tuple[NDArray[np.float32], NDArray[np.str_] | NDArray[np.float64]]],
    classes: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
    seed: int = 0,
    names: Sequence[str] = (),
    about: str = OF_EACH_FOLD,
) -> None:
    """Draw the t-SNE of each fold's test patients, one panel per fold.

    Every fold has a model, and so an embedding, of its own: one map of all folds would show the
    folds apart.

    Args:
        folds: For each fold embeddings ``(n, d)`` and true classes or values ``(n,)``.
        classes: All classes, which fixes their colours; none: values have a scale of colours, the
            same in all panels.
        path: The ``.png`` to write.
        title: Above the panels.
        caption: Below them.
        seed: Of the t-SNE.
        names: What the panels show; none: fold after fold.
        about: What stands before the caption.
    """
    names = names or [f"fold {k + 1}" for k in range(len(folds))]
    columns = min(len(folds), 5)
    rows = -(-len(folds) // columns)
    figure = Figure(figsize=(2.5 * columns + 1.8, 2.6 * rows + 1.3), layout="constrained")
    figure.suptitle(title, fontsize=STYLE["font"] + 2)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    scale = None if classes else _scale([truth for _, truth in folds])
    for k, axes in enumerate(panels):
        axes.set_xticks([])
        axes.set_yticks([])
        if k >= len(folds):
            axes.set_visible(False)
            continue
        embedding, truth = folds[k]
        points, heading = tsne_map(embedding, seed), f"{names[k]}: n = {len(truth)}"
        if scale is None:
            for i, label in enumerate(classes):
                _points(axes, points[truth == label], **_mark(i))
            score = metrics.silhouette(embedding, truth)
            heading += "\n" + (score.reason or f"silhouette {score.value:.2f}")
        else:
            _points(axes, points, c=truth, cmap=scale.cmap, norm=scale.norm)
        axes.margins(0.15)
        axes.set_title(heading, fontsize=STYLE["small"])
    if scale is None:
        handles = [_points(panels[0], np.empty((0, 2)), **_mark(i)) for i in range(len(classes))]
        figure.legend(
            handles, list(classes), loc="outside right upper", fontsize=STYLE["font"], frameon=False
        )
    else:
        figure.colorbar(scale, ax=list(panels[: len(folds)]), shrink=0.8, label="Measured")
    width = 30 * columns
    figure.supxlabel(wrap(f"{about} {caption}", width), fontsize=STYLE["small"], color=GREY)
    save(figure, path)


def _scale(values: Sequence[NDArray[Any]]) -> ScalarMappable:
    """Return colours from the lowest to the highest value."""
    together = np.concatenate(values)
    return ScalarMappable(Normalize(together.min(), together.max()), "viridis")


def _mark(number: int) -> dict[str, str]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _points(axes: Axes, points: NDArray[np.float64], **options: Any) -> PathCollection:
    return axes.scatter(
        points[:, 0], points[:, 1], s=46, edgecolor="white", linewidth=0.6, **options
    )


def tsne_map(embedding: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """Return a two-dimensional t-SNE map ``(n, 2)``; fewer than 4 points are shown as they are.

    Args:
        embedding: ``(n, d)``.
        seed: Of the optimisation.
    """
    points = np.asarray(embedding, dtype=np.float64)
    if len(points) < 4:
        centred = points - points.mean(axis=0)
        return np.pad(centred, ((0, 0), (0, max(0, 2 - centred.shape[1]))))[:, :2]
    perplexity = min(30.0, (len(points) - 1) / 3)
    mapped = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    return np.asarray(mapped, dtype=np.float64)


def compare(
    methods: Mapping[str, Sequence[float]],
    path: Path,
    *,
    metric: str,
    chance: float,
    caption: str = "",
) -> None:
    """Draw a metric in every fold, method beside method; a line joins the values of one fold.

    Args:
        methods: For each method one value per fold, NaN where it is not defined.
        path: The ``.png`` to write.
        metric: Name of the value axis.
        chance: What a random score would reach.
        caption: Below the axes. The value axis runs from 0 to 1, or from the lowest value if that
            is below 0.
    """
    figure, axes = new_figure(
        f"{metric} in every fold", caption, width=max(7.0, 1.7 * len(methods) + 2.6)
    )
    values = np.array([list(row) for row in methods.values()], dtype=float)  # (methods, folds)
    x = np.arange(len(methods))
    for k in range(values.shape[1]):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        shifted = x + 0.04 * (k - (values.shape[1] - 1) / 2)  # equal values stay apart
        axes.plot(
            shifted,
            values[:, k],
            color=colour,
            marker=marker,
            ms=7,
            lw=1,
            alpha=0.9,
            label=f"fold {k + 1}",
        )
    for i, row in enumerate(values):
        known = row[~np.isnan(row)]
        if len(known):
            ends, mean = [i - 0.22, i + 0.22], known.mean()
            label = "mean" if i == 0 else "_mean"  # an underscore keeps it out of the legend
            axes.plot(ends, [mean, mean], color="#000000", lw=3, label=label)
    axes.axhline(chance, color=GREY, lw=1.2, ls=":", label=f"chance {chance:.2f}")
    axes.set_xticks(x, list(methods))
    axes.set_xlim(-0.5, len(methods) - 0.5)
    lowest = min(0.0, float(np.nanmin(values, initial=0.0)))
    axes.set_ylim(lowest - 0.03, 1.03)
    axes.set_ylabel(metric)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=STYLE["small"], frameon=False
    )
    save(figure, path)


def new_figure(title: str, caption: str, width: float = 7.8) -> tuple[Figure, Axes]:
    """Return a figure with one set of axes, a title above and a caption below."""
    figure = Figure(figsize=(width, 5.6 + (0.4 if caption else 0.0)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=STYLE["font"] + 2)
    axes.tick_params(labelsize=STYLE["font"])
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    if caption:
        figure.supxlabel(wrap(caption, round(13 * width)), fontsize=STYLE["small"], color=GREY)
    return figure, axes


def legend_beside(figure: Figure) -> None:
    """Explain the lines beside the axes, where no curve runs."""
    figure.legend(loc="outside right center", fontsize=STYLE["small"], frameon=False)


def thin_line(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    fold: int,
    label: str,
    *,
    steps: bool = False,
) -> None:
    """Draw the line of one fold in its colour and style."""
    axes.plot(
        x,
        y,
        color=COLOURS[fold % len(COLOURS)],
        ls=LINES[fold % len(LINES)],
        lw=1.4,
        alpha=0.9,
        label=label,
        drawstyle="steps-post" if steps else "default",
    )


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel(x, fontsize=STYLE["font"])
    axes.set_ylabel(y, fontsize=STYLE["font"])


def wrap(text: str, width: int) -> str:
    """Break a caption into lines."""
    return "\n".join(textwrap.wrap(text, width))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as png, whole or not at all."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI)
    write_bytes(path, buffer.getvalue())
