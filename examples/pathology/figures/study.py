"""The figures of a benchmark: all methods in all metrics, task weights and gradient conflict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter

from examples.pathology.figures.sheet import (
    BLACK,
    COLOURS,
    GREY,
    MEDIUM,
    SMALL,
    TEXT,
    Sheet,
    Style,
    colour,
    coloured_line,
    coloured_marker,
)
from examples.pathology.results.power import FOUND

NUMBERS: Style = {"xtick.labelsize": SMALL, "ytick.labelsize": SMALL}


class Estimate(NamedTuple):
    """A figure with the ends of its 95 % interval; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Column:
    """One metric of all methods."""

    name: str
    estimates: Sequence[Estimate]
    reference: Estimate  # the baseline's
    chance: float | None  # the value of chance, if there is one


def dots(
    methods: Sequence[str],
    columns: Sequence[Column],
    sheet: Sheet,
    words: tuple[str, str] = ("method", "baseline"),
    over: str = "patients",
) -> None:
    """Draw a row per method and a panel per metric: a dot with its interval.

    The baseline is a line with a band through all rows, so that each method is seen against it;
    the words say what a row is, and what the line is. Intervals are `over` them.
    """
    of_interval: Style = {"color": BLACK, "lw": 1.6}
    of_method: Style = {**of_interval, "marker": "o", "ms": 6}
    of_baseline: Style = {"color": COLOURS[0], "lw": 1.4}
    of_band: Style = {"color": COLOURS[0], "alpha": 0.13, "lw": 0}
    of_chance: Style = {"color": GREY, "ls": ":", "lw": 1.4}
    size = 2.9, 0.31 * len(methods)
    with sheet.open(size, (3.6, 2.3), len(columns), share_y=True, style=NUMBERS) as (_, panels):
        for axes, column in zip(panels, columns, strict=True):
            reference = column.reference
            if not math.isnan(reference.value):
                axes.axvspan(reference.low, reference.high, **of_band)
                axes.axvline(reference.value, **of_baseline)
            if column.chance is not None:
                axes.axvline(column.chance, **of_chance)
            for row, estimate in enumerate(column.estimates):
                axes.plot([estimate.low, estimate.high], [row, row], **of_interval)
                axes.plot(estimate.value, row, **of_method)
            axes.set_title(column.name)
        first = panels[0]
        first.set_yticks(range(len(methods)), list(methods), fontsize=TEXT)
        first.set_ylim(len(methods) - 0.5, -0.5)
        first.plot([], [], **of_method, label=f"{words[0]}, 95 % interval\nover {over}")
        first.plot([], [], **of_baseline, label=words[1])
        first.fill_between([], [], **of_band, label="its 95 % interval")
        first.plot([], [], **of_chance, label="chance")


def mean_over_folds(histories: Sequence[pd.DataFrame], column: str) -> "pd.Series[float]":
    """Return a column's mean by epoch over the folds that ran that long; empty if none has it."""
    rows = [history.set_index("epoch")[column] for history in histories if column in history]
    if not rows:
        return pd.Series(dtype=float)
    mean: pd.Series[float] = pd.concat(rows, axis=1).mean(axis=1).sort_index()
    return mean


def weights_over_time(
    methods: Mapping[str, Sequence[pd.DataFrame]], tasks: Sequence[str], sheet: Sheet
) -> bool:
    """Draw the weights that each method gave to the tasks, epoch by epoch, a panel per method.

    They are the columns ``weight/<task>`` of every fold's history. Methods whose weights never
    change are left out.

    Returns:
        Whether there was a method to draw.
    """
    names = [f"weight/{task}" for task in tasks]
    curves = {  # where each fold has a constant of its own, their mean changes as folds end
        method: [mean_over_folds(histories, name) for name in names]
        for method, histories in methods.items()
        if any(_changes(h[name].dropna()) for h in histories for name in names if name in h)
    }
    if not curves:
        return False
    columns = min(4, len(curves))
    remark = (
        "By epoch: means over the steps of an epoch and over the folds that ran it. Scales differ "
        "between panels; methods whose weights are constant are left out."
    )
    with sheet.open(
        (2.9, 2.2), (2.2, 1.5), len(curves), columns=columns, remark=remark, style=NUMBERS
    ) as (_, panels):
        for axes, (method, lines) in zip(panels, curves.items(), strict=True):
            for number, line in enumerate(lines):  # with points: a single epoch would be no line
                axes.plot(line.index, line, **coloured_line(number), lw=1.8, marker=".")
            axes.set_title(method)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels[::columns]:
            axes.set_ylabel("Mean weight", fontsize=SMALL)
        for number, task in enumerate(tasks):
            panels[0].plot([], [], **coloured_line(number), lw=1.8, label=task)
    return True


def _changes(line: "pd.Series[float]") -> bool:
    return len(line) > 0 and bool(np.ptp(line.to_numpy()) > 1e-9)


def conflicts(
    methods: Sequence[str], rates: Mapping[str, Mapping[str, Sequence[float]]], sheet: Sheet
) -> None:
    """Draw how often the gradients of the two tasks point apart: every fold, and their mean.

    Rates are, by auxiliary target and method, the share of steps in every fold.
    """
    step = 0.8 / len(rates)
    size = 10.5, (0.22 + 0.14 * len(rates)) * len(methods) + 2.1
    remark = (
        "Small: each fold, over all epochs; large: their mean. Methods that need no gradient per "
        "task do not know it and are left out."
    )
    with sheet.open(size, remark=remark, style=NUMBERS) as (_, (axes,)):
        for number, (auxiliary, of_methods) in enumerate(rates.items()):
            style = {**coloured_marker(number), "ls": ""}
            for row, method in enumerate(methods):
                if folds := of_methods.get(method):
                    place = row - 0.4 + step * (number + 0.5)
                    axes.plot(folds, [place] * len(folds), **style, ms=4, alpha=0.45)
                    axes.plot(np.mean(folds), place, **style, ms=8)
            axes.plot([], [], **style, ms=8, label=auxiliary)
        axes.set_yticks(range(len(methods)), list(methods), fontsize=TEXT)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(methods) - 0.5, -0.5))
        words = "Share of steps whose two gradients have a negative inner product"
        axes.set_xlabel(words, fontsize=MEDIUM)


def power(
    curves: Mapping[str, Mapping[int, pd.DataFrame]], share: float, level: float, sheet: Sheet
) -> None:
    """Draw the share of studies that find a true difference: a panel per figure.

    Args:
        curves: Of `results.power.curve`, by figure and by how many times as many patients.
        share: To mark.
        level: Below which p counts.
        sheet: Where it goes.
    """
    of_share: Style = {"color": GREY, "ls": ":", "lw": 1.4}
    names = f"found with p < {level:g}", "found after correction"
    with sheet.open((4.3, 3.3), (2.6, 0.8), len(curves), style=NUMBERS) as (_, panels):
        for axes, (title, of_times) in zip(panels, curves.items(), strict=True):
            axes.axhline(share, **of_share)
            for number, curve in enumerate(of_times.values()):
                for column, line in zip(FOUND, ("-", "--"), strict=True):
                    x, y = curve["difference"], curve[column]
                    axes.plot(x, y, color=colour(number), ls=line, lw=1.8)
            axes.set(title=title, xlim=(0, None), ylim=(0, 1.02), xlabel="True difference")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        first = panels[0]
        first.set_ylabel("Studies that find it")
        for name, line in zip(names, ("-", "--"), strict=True):
            first.plot([], [], color=BLACK, ls=line, lw=1.8, label=name)
        for number, times in enumerate(next(iter(curves.values()))):
            words = f"{times} times as many" if times > 1 else "as many patients"
            first.plot([], [], color=colour(number), lw=1.8, label=words)
        first.plot([], [], **of_share, label=f"{100 * share:g} %")
