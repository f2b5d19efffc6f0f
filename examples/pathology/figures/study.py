"""The figures of a benchmark: all methods in all metrics, task weights and gradient conflict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.pathology.figures.plots import COLOURS, GREY, LINES, MARKERS, STYLE, save, wrap


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN where there is none.

    Args:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Column:
    """One metric of all methods.

    Args:
        name: The metric.
        estimates: One for each method.
        reference: The baseline's.
        chance: What chance would reach; ``None`` if there is no such value.
    """

    name: str
    estimates: Sequence[Estimate]
    reference: Estimate
    chance: float | None


def dots(
    methods: Sequence[str], columns: Sequence[Column], path: Path, *, title: str, caption: str = ""
) -> None:
    """Draw a row per method and a panel per metric: a dot with its interval.

    The baseline is a line with a band through all rows, so that each method is seen against it.

    Args:
        methods: Names of the rows.
        columns: The panels.
        path: The ``.png`` to write.
        title: Above the panels.
        caption: Below them.
    """
    width = 2.9 * len(columns) + 3.6
    figure = Figure(figsize=(width, 0.31 * len(methods) + 2.3), layout="constrained")
    figure.suptitle(title, fontsize=STYLE["font"] + 2)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False).ravel()
    y = np.arange(len(methods))
    for axes, column in zip(panels, columns, strict=True):
        _plain(axes)
        reference = column.reference
        if not math.isnan(reference.value):
            axes.axvspan(reference.low, reference.high, color=COLOURS[0], alpha=0.13, lw=0)
            axes.axvline(reference.value, color=COLOURS[0], lw=1.4)
        if column.chance is not None:
            axes.axvline(column.chance, color=GREY, lw=1.4, ls=":")
        for row, estimate in zip(y, column.estimates, strict=True):
            axes.plot([estimate.low, estimate.high], [row, row], color="#000000", lw=1.6)
            axes.plot(estimate.value, row, color="#000000", marker="o", ms=6)
        axes.set_title(column.name, fontsize=STYLE["font"])
    panels[0].set_yticks(y, list(methods), fontsize=STYLE["font"])
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    handles = [
        panels[0].plot([], [], color="#000000", marker="o", lw=1.6)[0],
        panels[0].plot([], [], color=COLOURS[0], lw=1.4)[0],
        panels[0].fill_between([], [], color=COLOURS[0], alpha=0.13, lw=0),
        panels[0].plot([], [], color=GREY, ls=":", lw=1.4)[0],
    ]
    names = ["method, 95 % interval\nover patients", "baseline", "its 95 % interval", "chance"]
    _legend(figure, handles, names)
    _caption(figure, caption, width)
    save(figure, path)


def mean_over_folds(histories: Sequence[pd.DataFrame], column: str) -> pd.Series[float]:
    """Return a column's mean by epoch over the folds that ran that long; empty if none has it."""
    import pandas as pd

    rows = [history.set_index("epoch")[column] for history in histories if column in history]
    if not rows:
        return pd.Series(dtype=float)
    mean: pd.Series[float] = pd.concat(rows, axis=1).mean(axis=1).sort_index()
    return mean


def weights_over_time(
    methods: Mapping[str, Sequence[pd.DataFrame]],
    tasks: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> bool:
    """Draw the weights that each method gave to the tasks, epoch by epoch, a panel per method.

    Args:
        methods: History of every fold; methods whose weights never change are left out.
        tasks: Whose ``weight/<task>`` to draw.
        path: The ``.png`` to write.
        title: Above the panels.
        caption: Below them.

    Returns:
        Whether there was a method to draw.
    """
    curves = {
        method: [mean_over_folds(histories, f"weight/{task}") for task in tasks]
        for method, histories in methods.items()
    }
    curves = {
        method: lines
        for method, lines in curves.items()
        if any(len(line) and np.ptp(line.to_numpy()) > 1e-9 for line in lines)
    }
    if not curves:
        return False
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    width = 2.9 * columns + 2.2
    figure = Figure(figsize=(width, 2.2 * rows + 1.5), layout="constrained")
    figure.suptitle(title, fontsize=STYLE["font"] + 2)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes, (method, lines) in zip(panels, curves.items(), strict=False):
        _plain(axes)
        for number, line in enumerate(lines):
            axes.plot(
                line.index,
                line,
                color=COLOURS[number % len(COLOURS)],
                ls=LINES[number % len(LINES)],
                lw=1.8,
                marker=".",  # a single epoch would be no line
            )
        axes.set_title(method, fontsize=STYLE["font"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for row in range(rows):
        panels[row * columns].set_ylabel("Mean weight", fontsize=STYLE["small"])
    handles = [
        panels[0].plot([], [], color=COLOURS[i % len(COLOURS)], ls=LINES[i % len(LINES)], lw=1.8)[0]
        for i in range(len(tasks))
    ]
    _legend(figure, handles, tasks)
    text = (
        "By epoch: means over the steps of an epoch and over the folds that ran it. Scales differ "
        "between panels; methods whose weights are constant are left out."
    )
    _caption(figure, f"{text} {caption}", width)
    save(figure, path)
    return True


def conflicts(
    methods: Sequence[str],
    rates: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Draw how often the gradients of the two tasks point apart: every fold, and their mean.

    Args:
        methods: The rows.
        rates: By auxiliary target and method, the share of steps in every fold.
        path: The ``.png`` to write.
        title: Above the axes.
        caption: Below them.
    """
    width = 10.5
    step = 0.8 / len(rates)
    figure = Figure(
        figsize=(width, (0.22 + 0.14 * len(rates)) * len(methods) + 2.1), layout="constrained"
    )
    axes = figure.subplots()
    _plain(axes)
    axes.set_title(title, fontsize=STYLE["font"] + 2)
    handles = []
    for number, of_methods in enumerate(rates.values()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for row, method in enumerate(methods):
            folds = np.asarray(of_methods.get(method, ()), dtype=float)
            if not len(folds):
                continue
            place = row - 0.4 + step * (number + 0.5)
            axes.plot(
                folds,
                np.full(len(folds), place),
                ls="",
                color=colour,
                marker=marker,
                ms=4,
                alpha=0.45,
            )
            axes.plot(folds.mean(), place, color=colour, marker=marker, ms=8)
        handles += axes.plot([], [], ls="", color=colour, marker=marker, ms=8)
    axes.set_yticks(np.arange(len(methods)), list(methods), fontsize=STYLE["font"])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("Share of steps whose two gradients have a negative inner product")
    _legend(figure, handles, list(rates))
    text = (
        "Small: each fold, over all epochs; large: their mean. Methods that need no gradient per "
        "task do not know it and are left out."
    )
    _caption(figure, f"{text} {caption}", width)
    save(figure, path)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=STYLE["small"])
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Explain lines and marks beside the panels; below, the caption would run into it."""
    figure.legend(handles, names, loc="outside right upper", fontsize=STYLE["small"], frameon=False)


def _caption(figure: Figure, caption: str, width: float) -> None:
    figure.supxlabel(wrap(caption, round(13 * width)), fontsize=STYLE["small"], color=GREY)
