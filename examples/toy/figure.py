"""Trails to a picture: the only module that imports matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image

from examples.toy.problem import losses_at, minimum_of_mean, pareto_set
from examples.toy.trails import Trail
from mtbalance.plot import contours

EDGE = 11.0
"""The plane is drawn from -EDGE to EDGE, as in the papers."""

COLUMNS = 3
PALETTE = 256
"""Colours of a .png, which has few."""

COLOURS = LinearSegmentedColormap.from_list("fade", ["#ffd9a0", "#f4793b", "#b5123f", "#3f0a3c"])
FRONT, STAR = "#0072b2", "#f0e442"
STYLE: dict[Any, Any] = {
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 7.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "toy",  # the same picture is the same file
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def draw(trails: Mapping[str, Sequence[Trail]], out: Path, *, steps: int) -> None:
    """Draw one panel per strategy.

    Args:
        trails: Of each strategy, by the heading of its panel.
        out: The file to write; its ending says which format.
        steps: Taken in every trail.
    """
    columns = min(COLUMNS, len(trails))
    rows = -(-len(trails) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns + 0.8, 2.85 * rows + 0.7))
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (heading, several) in zip(panels, trails.items(), strict=False):
            _plane(axes, several[0].scale)
            for trail in several:
                _trail(axes, trail, steps)
            axes.set_title(heading, pad=14, fontweight="bold")
            axes.text(0.5, 1.03, _endings(several), ha="center", transform=axes.transAxes)
        for axes in panels[len(trails) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel(r"$\theta_2$", labelpad=0)
        for axes in panels[max(0, len(trails) - columns) : len(trails)]:
            axes.set_xlabel(r"$\theta_1$", labelpad=1)
            axes.xaxis.set_tick_params(labelbottom=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        shown = list(panels[: len(trails)])
        bar = figure.colorbar(
            ScalarMappable(Normalize(0, steps), COLOURS), ax=shown, aspect=40, pad=0.01
        )
        bar.set_label("step")
        buffer = io.BytesIO()
        if out.suffix == ".png":
            figure.savefig(buffer, format="png")
            picture = (
                Image.open(buffer)
                .convert("RGB")
                .quantize(PALETTE, kmeans=1, dither=Image.Dither.NONE)
            )
            picture.save(out, optimize=True)  # a third of the bytes
        else:
            figure.savefig(out, metadata={"Date": None})


def _plane(axes: Axes, scale: float) -> None:
    """Draw the mean loss, the Pareto set and the minimum."""
    contours(axes, lambda points: losses_at(points, scale), (-EDGE, EDGE, -EDGE, EDGE))
    x, y = pareto_set().T
    axes.plot(x, y, color=FRONT, lw=4, alpha=0.6, solid_capstyle="round", label="Pareto set")
    star = minimum_of_mean(scale)
    style: dict[str, Any] = {
        "marker": "*",
        "ls": "",
        "ms": 15,
        "mec": "black",
        "mew": 0.7,
        "zorder": 6,
    }
    axes.plot(*star.unsqueeze(1), color=STAR, label="minimum of the mean", **style)
    axes.set(aspect="equal", xticks=(-10, 0, 10), yticks=(-10, 0, 10))


def _trail(axes: Axes, trail: Trail, steps: int) -> None:
    points = trail.points.numpy()
    pieces = np.stack([points[:-1], points[1:]], axis=1)
    ages = trail.steps[1:].numpy()
    lines = LineCollection(list(pieces), cmap=COLOURS, norm=Normalize(0, steps), lw=2, zorder=4)
    lines.set_array(ages)
    lines.set_capstyle("round")
    axes.add_collection(lines)
    named = axes.get_legend_handles_labels()[1]
    ends: dict[str, tuple[int, str, str]] = {
        "start": (0, "white", "black"),
        "end": (-1, "#3f0a3c", "white"),
    }
    for name, (place, face, edge) in ends.items():
        axes.plot(
            *points[place, :, None],
            color=face,
            label=name if name not in named else None,
            ls="",
            marker="o",
            mec=edge,
            mew=0.8,
            ms=5.5,
            zorder=7,
        )


def _endings(trails: Sequence[Trail]) -> str:
    """Return how many trails have reached what."""
    endings = [trail.ending for trail in trails]
    words = {"minimum": "at the minimum", "pareto": "Pareto", "elsewhere": "elsewhere"}
    found = [f"{endings.count(key)} {word}" for key, word in words.items() if key in endings]
    return ", ".join(found)
