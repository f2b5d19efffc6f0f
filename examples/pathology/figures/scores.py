"""Scores and predictions of folds to figures: how well they rank, measure, and compare."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from examples.pathology.figures.sheet import (
    BLACK,
    COLOURS,
    GREY,
    MEDIUM,
    SMALL,
    TEXT,
    Sheet,
    Style,
    coloured_line,
    coloured_marker,
)
from examples.pathology.results import decisions, metrics

BARS = ("#bbbbbb", COLOURS[1])
NUMBERS = {"xtick.labelsize": TEXT, "ytick.labelsize": TEXT}

Floats = NDArray[np.float64]
Scored = Sequence[tuple[NDArray[np.bool_], Floats]]


def roc(folds: Scored, sheet: Sheet) -> None:
    """Draw the ROC curve of every fold, their mean, and one standard deviation around it.

    A fold is ``(n,)`` truth and ``(n,)`` score; one with one class only is named, not drawn.
    """
    areas = [metrics.auroc(*fold) for fold in folds]
    with sheet.open(_size(sheet), legend="center", style=NUMBERS) as (_, (axes,)):
        curves = _curves(axes, folds, areas, lambda *fold: roc_curve(*fold)[:2])
        if curves:
            grid = np.linspace(0.0, 1.0, 201)
            mean, spread = metrics.mean_curve(curves, grid)
            ends = np.clip(mean - spread, 0, 1), np.clip(mean + spread, 0, 1)
            axes.fill_between(grid, *ends, color=BLACK, alpha=0.12, lw=0)
            axes.plot(grid, mean, color=BLACK, lw=2.4, label=_mean("AUROC", areas))
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="chance")
        _unit_square(axes, "False positive rate", "True positive rate")


def precision_recall(folds: Scored, sheet: Sheet) -> None:
    """Draw the precision-recall curve of every fold, and the prevalence that chance would reach."""
    areas = [metrics.auprc(*fold) for fold in folds]
    share = float(np.concatenate([truth for truth, _ in folds]).mean())
    with sheet.open(_size(sheet), legend="center", style=NUMBERS) as (_, (axes,)):
        # Precision between two thresholds is not on the line between them: draw steps.
        _curves(axes, folds, areas, _recall_precision, drawstyle="steps-post")
        if mean := _mean("AUPRC", areas):
            axes.plot([], [], " ", label=mean)
        axes.axhline(share, color=GREY, lw=1.4, ls=":", label=f"prevalence {share:.2f} = chance")
        _unit_square(axes, "Recall", "Precision")


def draw_calibration(curves: Mapping[str, tuple[NDArray[np.bool_], Floats]], sheet: Sheet) -> None:
    """Draw how many are positive among patients of about the same probability, a panel each.

    A curve is truth ``(n,)`` and probability ``(n,)``, by the heading of its panel.
    """
    remark = "Bars: how many patients have that probability, the largest with its number."
    of_curve: Style = {"color": COLOURS[0], "marker": "o", "ms": 5, "lw": 1.4}
    with sheet.open((3.9, 4.1), (2.6, 1.0), len(curves), columns=3, remark=remark) as (_, panels):
        for axes, (heading, (truth, score)) in zip(panels, curves.items(), strict=True):
            x, share, *ends = decisions.calibration(truth, score).to_numpy(dtype=float).T[:4]
            words = "patients of about one\nprobability, 95 % interval"
            axes.errorbar(x, share, np.abs(ends - share), **of_curve, label=words)
            axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="calibrated")
            parts = [np.histogram(score[t], 25, (0, 1))[0] for t in (~truth, truth)]
            together, middles, floor = np.add(*parts), np.arange(0.02, 1, 0.04), -0.32
            unit, bottom = 0.2 / together.max(), np.full(25, floor)
            for part, name, colour in zip(parts, ("negative", "positive"), BARS, strict=True):
                axes.bar(middles, part * unit, 0.035, bottom, color=colour, label=name)
                bottom += part * unit
            where, words = middles[together.argmax()], str(together.max())
            axes.text(where, floor + 0.21, words, ha="center", fontsize=SMALL)
            axes.set(xlim=(-0.02, 1.02), ylim=(floor, 1.05), yticks=np.arange(0, 1.1, 0.2))
            axes.set(xlabel="Predicted probability", ylabel="Share of positives")
            if len(curves) > 1:
                axes.set_title(heading)


def regression(folds: Sequence[tuple[Floats, Floats]], sheet: Sheet) -> None:
    """Draw predicted over measured values, a colour and a marker per fold.

    A fold is measured ``(n,)`` and predicted ``(n,)`` values, in the target's unit.
    """
    scores = [metrics.pearson(*fold) for fold in folds]
    every = np.concatenate([measured for measured, _ in folds])
    with sheet.open(_size(sheet), legend="center", style=NUMBERS) as (_, (axes,)):
        for k, ((measured, predicted), score) in enumerate(zip(folds, scores, strict=True)):
            style = {"s": 30, "alpha": 0.75, "edgecolor": "white", **coloured_marker(k)}
            label = f"fold {k + 1}: " + (score.reason or f"r = {score.value:.2f}")
            axes.scatter(measured, predicted, **style, linewidth=0.5, label=label)
        if mean := _mean("r =", scores):
            axes.plot([], [], " ", label=mean)
        if len(every):
            ends = [every.min(), every.max()]
            axes.plot(ends, ends, color=GREY, lw=1, ls=":", label="equal")
        axes.set(xlabel="Measured", ylabel="Predicted")


def compare(
    methods: Mapping[str, Sequence[float]], sheet: Sheet, *, metric: str, chance: float
) -> None:
    """Draw a metric in every fold, method beside method; a line joins the values of one fold.

    The value axis, named by the metric, runs from 0 to 1, or from the lowest value if that is
    below 0. A value that is not defined is NaN.
    """
    values = np.array([list(row) for row in methods.values()], dtype=float)  # (methods, folds)
    x = np.arange(len(methods))
    size = _size(sheet, max(7.0, 1.7 * len(methods) + 2.6))
    with sheet.open(size, style=NUMBERS) as (_, (axes,)):
        for k, fold in enumerate(values.T):
            shifted = x + 0.04 * (k - (values.shape[1] - 1) / 2)  # equal values stay apart
            style = {"ms": 7, "lw": 1, "alpha": 0.9, **coloured_marker(k)}
            axes.plot(shifted, fold, **style, label=f"fold {k + 1}")
        for i, row in enumerate(values):
            known = row[~np.isnan(row)]
            if len(known):
                ends, mean = [i - 0.22, i + 0.22], known.mean()
                label = "mean" if i == 0 else "_mean"  # an underscore keeps it out of the legend
                axes.plot(ends, [mean, mean], color=BLACK, lw=3, label=label)
        axes.axhline(chance, color=GREY, lw=1.2, ls=":", label=f"chance {chance:.2f}")
        axes.set_xticks(x, list(methods))
        lowest = min(0.0, float(np.nanmin(values, initial=0.0)))
        axes.set(xlim=(-0.5, len(methods) - 0.5), ylim=(lowest - 0.03, 1.03))
        axes.set_ylabel(metric, fontsize=MEDIUM)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _size(sheet: Sheet, width: float = 7.8) -> tuple[float, float]:
    """Return the size of the only panel: a little higher where a caption stands below it."""
    return width, 5.6 + (0.4 if sheet.caption else 0.0)


def _recall_precision(truth: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    precision, recall, _ = precision_recall_curve(truth, score)
    return recall, precision


def _curves(
    axes: Axes,
    folds: Scored,
    areas: Sequence[metrics.Score],
    curve: Callable[..., tuple[Floats, Floats]],
    **style: Any,
) -> list[tuple[Floats, Floats]]:
    """Draw and return the curve of each fold that has one, and name its area or why it has none."""
    curves = []
    for k, (fold, area) in enumerate(zip(folds, areas, strict=True)):
        if area.reason:
            axes.plot([], [], " ", label=f"fold {k + 1}: {area.reason}")
            continue
        curves.append(curve(*fold))
        label = f"fold {k + 1}: {area.value:.2f}"
        axes.plot(*curves[-1], **coloured_line(k), lw=1.4, alpha=0.9, label=label, **style)
    return curves


def _mean(name: str, scores: Sequence[metrics.Score]) -> str:
    """Return the words on the mean over folds; none if no fold has a value."""
    summary = metrics.over_folds(scores)
    if not summary.folds:
        return ""
    spread = f" ± {summary.sd:.2f} (sd)" if summary.folds > 1 else ""
    return f"mean {name} {summary.mean:.2f}{spread}"


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05), xlabel=x, ylabel=y)
