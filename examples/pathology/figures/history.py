"""The course of training to figures: losses, and how the balancer weighed the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.pathology.figures.plots import COLOURS, GREY, LINES, MARKERS, STYLE, save, wrap

LEAST_COSINE = 0.2
"""Of the axis of cosines: directions that hardly agree or conflict must not look as if they did."""


def training(
    folds: Sequence[pd.DataFrame],
    best_epochs: Sequence[int],
    tasks: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Draw the loss of every task by epoch, on the training and on the validation part.

    Args:
        folds: History of each fold, one row per epoch.
        best_epochs: The epoch that each fold kept.
        tasks: A panel each; the first decides when to stop.
        path: The ``.png`` to write.
        title: Above the panels.
        caption: Below them.
    """
    figure, panels = _panels(len(tasks), title)
    for task, axes in zip(tasks, panels, strict=True):
        for k, (history, best) in enumerate(zip(folds, best_epochs, strict=True)):
            colour = COLOURS[k % len(COLOURS)]
            for column, line in ((f"loss/{task}", ":"), (f"validation/{task}", "-")):
                if column in history:
                    axes.plot(history["epoch"], history[column], color=colour, ls=line, lw=1.4)
            if (kept := history[history["epoch"] == best]).size and f"validation/{task}" in kept:
                axes.plot(kept["epoch"], kept[f"validation/{task}"], color=colour, marker="o", ms=7)
        _label(axes, task, "Loss")
    _fold_legend(figure, len(folds), [("training", ":"), ("validation", "-")], "kept")
    text = "Training losses are means over steps with dropout, validation losses without. "
    _finish(figure, path, text + caption, len(tasks))


def balance(
    folds: Sequence[pd.DataFrame],
    tasks: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> bool:
    """Draw the weight of every task and the cosine of every two gradients, by epoch.

    Args:
        folds: History of each fold; its columns ``weight/<task>`` and ``cosine/<task>/<task>``.
        tasks: In the balancer's order.
        path: The ``.png`` to write.
        title: Above the panels.
        caption: Below them.

    Returns:
        Whether there was anything to draw: the baseline has no weights.
    """
    weights = [task for task in tasks if any(f"weight/{task}" in history for history in folds)]
    pairs = [
        (a, b)
        for a, b in combinations(tasks, 2)
        if any(f"cosine/{a}/{b}" in history for history in folds)
    ]
    if not weights:
        return False
    columns = [f"weight/{task}" for task in weights]
    columns += [f"cosine/{a}/{b}" for a, b in pairs]
    names = [f"Weight of {task}" for task in weights]
    names += [f"Gradients of {a} and {b}" for a, b in pairs]
    figure, panels = _panels(len(columns), title)
    for axes, column, name in zip(panels, columns, names, strict=True):
        for k, history in enumerate(folds):
            if column in history:
                axes.plot(
                    history["epoch"],
                    history[column],
                    color=COLOURS[k % len(COLOURS)],
                    ls=LINES[k % len(LINES)],
                    lw=1.4,
                    marker=MARKERS[k % len(MARKERS)],
                    ms=3,
                    label=f"fold {k + 1}",
                )
        of_weight = column.startswith("weight/")
        _label(axes, name, "Mean weight" if of_weight else "Mean cosine of gradients")
    _share_limits(panels[: len(weights)])
    if pairs:
        _centre_limits(panels[len(weights) :])
    _legend(figure, *panels[0].get_legend_handles_labels())
    text = "Means over the steps of an epoch. "
    text += "Gradients with a cosine below 0 are in conflict. " if pairs else ""
    _finish(figure, path, text + caption, len(panels))
    return True


def _share_limits(panels: Sequence[Axes]) -> None:
    """Give panels of the same quantity the same axis, so that they can be compared."""
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _centre_limits(panels: Sequence[Axes]) -> None:
    """Draw 0 in the middle of an axis that the panels share."""
    furthest = max(abs(limit) for axes in panels for limit in axes.get_ylim())
    span = min(max(furthest, LEAST_COSINE), 1.05)
    for axes in panels:
        axes.axhline(0, color=GREY, lw=1)
        axes.set_ylim(-span, span)


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.8 * columns + 1.8, 3.6 * rows + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=STYLE["font"] + 2)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _label(axes: Axes, title: str, y: str) -> None:
    axes.set_title(wrap(title, 46), fontsize=STYLE["font"])
    axes.set_xlabel("Epoch", fontsize=STYLE["font"])
    axes.set_ylabel(y, fontsize=STYLE["font"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", lw=0.6)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)


def _fold_legend(figure: Figure, folds: int, lines: Sequence[tuple[str, str]], marker: str) -> None:
    """Explain colours as folds, and black lines and a marker as what they are in every colour."""
    axes = figure.axes[0]
    handles, names = [], []
    for k in range(folds):
        handles += axes.plot([], [], color=COLOURS[k % len(COLOURS)], lw=3)
        names.append(f"fold {k + 1}")
    for name, line in lines:
        handles += axes.plot([], [], color="#000000", ls=line, lw=1.4)
        names.append(name)
    handles += axes.plot([], [], color="#000000", marker="o", ls="")
    names.append(marker)
    _legend(figure, handles, names)


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    figure.legend(handles, names, loc="outside right upper", fontsize=STYLE["small"], frameon=False)


def _finish(figure: Figure, path: Path, caption: str, panels: int) -> None:
    figure.supxlabel(wrap(caption, 60 * min(panels, 3)), fontsize=STYLE["small"], color=GREY)
    save(figure, path)
