"""The course of training to figures: losses, and how the balancer weighed the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.pathology.plots import COLOURS, GREY, LINES, STYLE, save, wrap


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
    _fold_legend(figure, len(folds), [("training", ":", ""), ("validation", "-", "")], "kept")
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
    figure, panels = _panels(1 + bool(pairs), title)
    for k, history in enumerate(folds):
        for number, task in enumerate(weights):
            _line(panels[0], history, f"weight/{task}", k, number)
        for number, (a, b) in enumerate(pairs):
            _line(panels[1], history, f"cosine/{a}/{b}", k, number)
    _label(panels[0], "Task weights", "Mean weight")
    _line_legend(panels[0], weights)
    if pairs:
        panels[1].axhline(0, color=GREY, lw=1)
        panels[1].set_ylim(-1.05, 1.05)
        _label(panels[1], "Gradient conflict: below 0", "Mean cosine of gradients")
        _line_legend(panels[1], [f"{a} and {b}" for a, b in pairs])
    _fold_legend(figure, len(folds), [], "")
    _finish(figure, path, "Means over the steps of an epoch. " + caption, len(panels))
    return True


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.8 * columns + 1.8, 3.6 * rows + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=STYLE["font"] + 2)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _line(axes: Axes, history: pd.DataFrame, column: str, fold: int, number: int) -> None:
    if column in history:
        axes.plot(
            history["epoch"],
            history[column],
            color=COLOURS[fold % len(COLOURS)],
            ls=LINES[number % len(LINES)],
            lw=1.4,
            marker=".",  # a single epoch would be no line
        )


def _label(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, fontsize=STYLE["font"])
    axes.set_xlabel("Epoch", fontsize=STYLE["font"])
    axes.set_ylabel(y, fontsize=STYLE["font"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", lw=0.6)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)


def _line_legend(axes: Axes, names: Sequence[str]) -> None:
    """Explain line styles where colours stand for folds."""
    for number, name in enumerate(names):
        axes.plot([], [], color="#000000", ls=LINES[number % len(LINES)], lw=1.4, label=name)
    axes.legend(fontsize=STYLE["small"], frameon=False)


def _fold_legend(
    figure: Figure, folds: int, lines: Sequence[tuple[str, str, str]], marker: str
) -> None:
    axes = figure.axes[0]
    handles, names = [], []
    for k in range(folds):
        handles += axes.plot([], [], color=COLOURS[k % len(COLOURS)], lw=3)
        names.append(f"fold {k + 1}")
    for name, line, _ in lines:
        handles += axes.plot([], [], color="#000000", ls=line, lw=1.4)
        names.append(name)
    if marker:
        handles += axes.plot([], [], color="#000000", marker="o", ls="")
        names.append(marker)
    figure.legend(handles, names, loc="outside right upper", fontsize=STYLE["small"], frameon=False)


def _finish(figure: Figure, path: Path, caption: str, panels: int) -> None:
    figure.supxlabel(wrap(caption, 60 * min(panels, 3)), fontsize=STYLE["small"], color=GREY)
    save(figure, path)
