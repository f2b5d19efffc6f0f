"""The course of training to figures: losses, and how the balancer weighed the tasks."""

import textwrap
from collections.abc import Sequence
from itertools import combinations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from examples.pathology.figures.sheet import (
    BLACK,
    GREY,
    Sheet,
    Style,
    colour,
    coloured_line,
    coloured_marker,
)

LAYOUT = (4.8, 3.6), (1.8, 1.0)
LEAST_COSINE = 0.2
"""Of the axis of cosines: directions that hardly agree or conflict must not look as if they did."""


def training(
    folds: Sequence[pd.DataFrame], best_epochs: Sequence[int], tasks: Sequence[str], sheet: Sheet
) -> None:
    """Draw the loss of every task by epoch, on the training and on the validation part.

    A fold is its history, one row per epoch; the best epoch is the one that it kept.
    """
    remark = "Training losses are means over steps with dropout, validation losses without."
    with sheet.open(*LAYOUT, len(tasks), columns=3, remark=remark, letters=60) as (_, panels):
        for task, axes in zip(tasks, panels, strict=True):
            validation = f"validation/{task}"
            for k, (history, best) in enumerate(zip(folds, best_epochs, strict=True)):
                for column, line in ((f"loss/{task}", ":"), (validation, "-")):
                    if column in history:
                        axes.plot(
                            history["epoch"], history[column], color=colour(k), ls=line, lw=1.4
                        )
                kept = history[history["epoch"] == best]
                if len(kept) and validation in kept:
                    axes.plot(kept["epoch"], kept[validation], color=colour(k), marker="o", ms=7)
            _label(axes, task, "Loss")
        # Colours are folds; black lines and a marker are what they are in every colour.
        known: dict[str, Style] = {
            f"fold {k + 1}": {"color": colour(k), "lw": 3} for k in range(len(folds))
        }
        known["training"] = {"color": BLACK, "ls": ":", "lw": 1.4}
        known["validation"] = {"color": BLACK, "lw": 1.4}
        known["kept"] = {"color": BLACK, "marker": "o", "ls": ""}
        for name, style in known.items():
            panels[0].plot([], [], **style, label=name)


def balance(folds: Sequence[pd.DataFrame], tasks: Sequence[str], sheet: Sheet) -> bool:
    """Draw the weight of every task and the cosine of every two gradients, by epoch.

    They are the columns ``weight/<task>`` and ``cosine/<task>/<task>`` of the histories, tasks in
    the balancer's order.

    Returns:
        Whether there was anything to draw: the baseline has no weights.
    """
    present = {str(column) for history in folds for column in history}
    weights = {f"weight/{task}": f"Weight of {task}" for task in tasks}
    cosines = {f"cosine/{a}/{b}": f"Gradients of {a} and {b}" for a, b in combinations(tasks, 2)}
    weights = {column: name for column, name in weights.items() if column in present}
    cosines = {column: name for column, name in cosines.items() if column in present}
    if not weights:
        return False
    remark = "Means over the steps of an epoch."
    if cosines:
        remark += " Gradients with a cosine below 0 are in conflict."
    shown = weights | cosines
    with sheet.open(*LAYOUT, len(shown), columns=3, remark=remark, letters=60) as (_, panels):
        for axes, (column, name) in zip(panels, shown.items(), strict=True):
            for k, history in enumerate(folds):
                if column in history:
                    style = {**coloured_line(k), **coloured_marker(k), "lw": 1.4, "ms": 3}
                    axes.plot(history["epoch"], history[column], **style, label=f"fold {k + 1}")
            _label(axes, name, "Mean weight" if column in weights else "Mean cosine of gradients")
        _share_limits(panels[: len(weights)])
        if cosines:
            _centre_limits(panels[len(weights) :])
    return True


def _share_limits(panels: Sequence[Axes]) -> None:
    """Give panels of the same quantity the same axis, so that they can be compared."""
    lows, highs = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(lows), max(highs))


def _centre_limits(panels: Sequence[Axes]) -> None:
    """Draw 0 in the middle of an axis that the panels share."""
    furthest = max(abs(limit) for axes in panels for limit in axes.get_ylim())
    span = min(max(furthest, LEAST_COSINE), 1.05)
    for axes in panels:
        axes.axhline(0, color=GREY, lw=1)
        axes.set_ylim(-span, span)


def _label(axes: Axes, title: str, y: str) -> None:
    axes.set(title=textwrap.fill(title, 46), xlabel="Epoch", ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
