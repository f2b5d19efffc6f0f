"""The picture of each strategy: where it leads, and what it does in a step or with the weights."""

import io
from functools import cache
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from docs.make.bowls import (
    CENTRES,
    EXTENT,
    SLOPES,
    Walk,
    losses_at,
    pareto_set,
    slopes_at,
    tasks_of,
    walk,
    walks,
)
from mtbalance import weighting as weightings
from mtbalance.plot import contours

TASKS = ("#0072b2", "#d55e00", "#009e73")
SUM, FRONT = "#8a8a8a", "#cc79a7"
STYLE: dict[Any, Any] = {
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "legend.frameon": False,
    "savefig.dpi": 110,
    "svg.fonttype": "none",
    "svg.hashsalt": "mtbalance",  # the same picture is the same file
}


def draw(name: str) -> str:
    """Return the picture of a strategy, an SVG.

    Args:
        name: Of its class.
    """
    walked = walks(name)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.3))
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        _paths(left, name, [each.points for each in walked])
        if name in weightings.__all__:
            _weights(right, walked[0])
        else:
            _step(right, name)
        handles = left.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=6, columnspacing=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


@cache
def _plain() -> list[Tensor]:
    return [each.points for each in walks("Sum")]


def _paths(axes: Axes, name: str, paths: list[Tensor]) -> None:
    """Draw where training leads, above the mean of the losses and the Pareto set."""
    tasks = tasks_of(name)
    contours(axes, lambda points: losses_at(points, tasks), EXTENT, levels=14)
    axes.set_rasterization_zorder(2)  # of the contours, which would be most of the file
    axes.plot(*pareto_set(tasks).T, color=FRONT, lw=4, alpha=0.6, label="Pareto set", zorder=3)
    if name != "Sum" and tasks == 2:
        _lines(axes, _plain(), SUM, "plain sum")
    _lines(axes, paths, "black", name)
    for path in paths:
        axes.plot(*path[0], "o", color="white", mec="black", ms=5, zorder=6)
    for i, (across, along) in enumerate(CENTRES[:tasks]):
        label = f"best for task {i + 1}"
        axes.plot(across, along, "P", color=TASKS[i], mec="white", ms=8, label=label, zorder=5)
    axes.set(aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2), title="Paths from four starts")


def _lines(axes: Axes, paths: list[Tensor], colour: str, label: str) -> None:
    for path in paths:
        axes.plot(*path.T, color=colour, lw=1.7, label=label, zorder=4)
        axes.plot(*path[-1], "o", color=colour, ms=4, zorder=5)
        label = "_"  # no entry of the legend


def _step(axes: Axes, name: str) -> None:
    """Draw which way each task would step, their sum and the strategy."""
    tasks = tasks_of(name)
    direction = -walk(name, (0.0, 0.0), 1, slopes_at).direction
    rows = -torch.tensor(SLOPES[:tasks], dtype=direction.dtype)
    arrows = [(direction, "black", name, 3.5)]
    if name != "Sum":
        arrows.append((rows.sum(0), SUM, "sum", 2.0))
    arrows += [(row, TASKS[i], f"task {i + 1}", 2.0) for i, row in enumerate(rows)]
    for arrow, colour, label, width in arrows:
        style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
        across, along = arrow.tolist()
        axes.annotate("", (across, along), (0, 0), arrowprops=style)
        axes.plot([], [], color=colour, lw=width, label=label)
    ends = torch.stack([torch.zeros_like(direction), *(arrow for arrow, *_ in arrows)])
    (left, low), (right, high) = ends.amin(0).tolist(), ends.amax(0).tolist()
    margin = 0.08 * (right - left)
    axes.set(xlim=(left - margin, right + margin), ylim=(low - margin, high + margin))
    axes.set(aspect="equal", xticks=(), yticks=(), title="One step, of gradients that conflict")
    narrow = {"columnspacing": 0.9, "handlelength": 1.2, "handletextpad": 0.4, "borderpad": 0.2}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=5, fontsize=8, **narrow)


def _weights(axes: Axes, walked: Walk) -> None:
    """Draw the weights on the first path: as points where lines would fill the panel."""
    points: dict[str, Any] = {"ls": "none", "marker": ".", "ms": 3}
    for i, weights in enumerate(walked.weights.T):
        style = points if _turns_often(weights) else {}
        axes.plot(weights, color=TASKS[i], label=f"task {i + 1}", **style)
    axes.set(title="Weights on the path from the upper left", xlabel="step")
    axes.legend(frameon=True, framealpha=0.8, edgecolor="none")


def _turns_often(weights: Tensor) -> bool:
    """Whether three of ten steps go back on the way of the one before."""
    changes = weights.diff()
    return bool((changes[1:] * changes[:-1] < 0).float().mean() > 0.3)
