"""Pictures of a training: each function takes records or a log file and returns a figure.

Needs matplotlib (``pip install "mtbalance[plot]"``). The functions take what
:class:`mtbalance.RecordWriter` wrote, or records themselves, such as ``balancer.history``. Figures
are :class:`matplotlib.figure.Figure`: a notebook shows them, ``figure.savefig("weights.png")``
writes them, and they are in no window's way.

>>> import torch
>>> from collections import deque
>>> from mtbalance import make_balancer, plot
>>> x = torch.nn.Parameter(torch.ones(2))
>>> balancer = make_balancer("pcgrad", tasks=("a", "b"), shared=[x])
>>> balancer.history = deque(maxlen=1000)
>>> for _ in range(3):
...     _ = balancer.backward({"a": x.sum(), "b": -x[0]})
>>> figure = plot.conflicts(balancer.history)
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtbalance._checks import check_choice, check_count
from mtbalance._log import Log, log_of, read_log
from mtbalance._record import Record

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        'mtbalance.plot needs matplotlib. Run `pip install "mtbalance[plot]"`.'
    ) from error

__all__ = [
    "conflicts",
    "contours",
    "cosines",
    "gradient_norms",
    "landscape",
    "losses",
    "overview",
    "shares",
    "weights",
]

Source = Log | str | os.PathLike[str] | Iterable[Record | Mapping[str, float]]
"""Records, rows of figures, what `read_log` returns, or the path of a log file."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#7f7f7f")
"""Told apart by people who do not see all colours (Okabe and Ito), and two more."""

POINTS = 100
"""Along the steps, at most: single steps are noise."""

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def weights(source: Source, *, window: int | None = None) -> Figure:
    """Draw the weight of each task over the steps.

    Args:
        source: Records, or a log file.
        window: Over how many steps to average; by default so many that 100 points remain. Steps
            without a figure (the task is absent) do not count.

    Raises:
        ValueError: If the source holds no steps.
    """
    return _single(_weights, source, window)


def losses(source: Source, *, window: int | None = None) -> Figure:
    """Draw the raw loss of each task over the steps, on a logarithmic scale where all are positive.

    Args and errors as in :func:`weights`.
    """
    return _single(_losses, source, window)


def gradient_norms(
    source: Source, *, window: int | None = None, group: str | None = None
) -> Figure:
    """Draw the length of each task's raw gradient, on a logarithmic scale where all are positive.

    Args:
        source: Records, or a log file.
        window: As in :func:`weights`.
        group: Of which group of shared parameters, by its name in the Balancer's ``shared``; by
            default of all of them together.

    Raises:
        ValueError: If the source holds no steps, or no figures of that group.
    """
    return _single(_gradient_norms, source, window, group)


def shares(source: Source, *, window: int | None = None, group: str | None = None) -> Figure:
    """Draw what each task contributes to the squared length of the update.

    In each step, shares sum to 1. A task with a negative share pulls against what the others agree
    on. Args and errors as in :func:`gradient_norms`.
    """
    return _single(_shares, source, window, group)


def conflicts(source: Source, *, window: int | None = None, group: str | None = None) -> Figure:
    """Draw the part of the pairs of tasks whose gradients conflict, over the steps.

    Args and errors as in :func:`gradient_norms`.
    """
    return _single(_conflicts, source, window, group)


def cosines(source: Source, *, window: int | None = None, group: str | None = None) -> Figure:
    """Draw the cosine between the gradients of each pair of tasks over training, as a heat map.

    Args and errors as in :func:`gradient_norms`.
    """
    view = _view(source, window, group)
    height = 1.3 + 0.28 * len(view.pairs)
    with rc_context(STYLE):
        figure = Figure(figsize=(7, min(height, 12)))
        _cosines(figure.subplots(), view)
    return figure


def overview(source: Source, *, window: int | None = None, group: str | None = None) -> Figure:
    """Draw losses, weights, shares of the update and conflicts on one page.

    Shares and conflicts are those of the group, if one is given. Args and errors as in
    :func:`gradient_norms`.
    """
    view = _view(source, window, group)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6))
        drawings = (_losses, _weights, _shares, _conflicts)
        for axes, draw in zip(figure.subplots(2, 2).flat, drawings, strict=True):
            draw(axes, view)
    return figure


def landscape(
    losses: Callable[[Tensor], Tensor],
    paths: Mapping[str, Tensor],
    *,
    extent: tuple[float, float, float, float] | None = None,
    levels: int = 24,
) -> Figure:
    """Draw the mean of the losses of a model of two parameters, and the paths that training took.

    Args:
        losses: Maps points, shape (..., 2), to the losses of m tasks, shape (..., m).
        paths: The points of each path, shape (steps, 2), by the name for the legend.
        extent: The plane's left, right, lower and upper edge; by default what holds the paths, with
            a margin.
        levels: How many contours.

    Raises:
        ValueError: If a path has another shape, or there is none.
    """
    points = {name: _path(name, path) for name, path in paths.items()}
    if not points:
        raise ValueError("`paths` must hold a path, but is empty.")
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(5.4, 5))
        axes = figure.subplots()
        contours(axes, losses, extent or _around(torch.cat(list(points.values()))), levels=levels)
        for (name, path), colour in zip(points.items(), itertools.cycle(COLOURS)):
            axes.plot(*path.T.numpy(), color=colour, lw=1.8, label=name)
            axes.plot(*path[0], "o", color="white", mec=colour, ms=6)
            axes.plot(*path[-1], "o", color=colour, mec="black", mew=0.6, ms=6)
        axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
        figure.legend(loc="outside lower center", ncols=min(len(points), 4))
    return figure


def contours(
    axes: Axes,
    losses: Callable[[Tensor], Tensor],
    extent: tuple[float, float, float, float],
    *,
    levels: int = 24,
) -> None:
    """Draw the mean of the losses of a model of two parameters below what else is in a plot.

    Args:
        axes: Where to draw; its limits are the plane's edges then.
        losses: Maps points, shape (..., 2), float64, to the losses of m tasks, shape (..., m).
        extent: The plane's left, right, lower and upper edge.
        levels: How many contours; the darker, the lower the mean.
    """
    left, right, low, high = extent
    across, along = (torch.linspace(*edges, 301).double() for edges in ((left, right), (low, high)))
    grid = torch.stack(torch.meshgrid(across, along, indexing="xy"), -1)
    with torch.no_grad():
        plane = across.numpy(), along.numpy(), losses(grid).mean(-1).numpy()
    axes.contourf(*plane, levels=levels, cmap="Greys_r", alpha=0.35, zorder=0)
    axes.contour(
        *plane,
        levels=levels,
        colors="#8a8a8a",
        linewidths=0.35,
        linestyles="solid",  # not dashed below zero
        zorder=1,
    )
    axes.set(xlim=(left, right), ylim=(low, high))


class _View(NamedTuple):
    """What is drawn of a log: figures of all that is shared, or of one group."""

    log: Log
    window: int
    group: str | None

    def of_gradients(self, name: str) -> str:
        """Return the name of a column that groups have, too."""
        return name if self.group is None else f"{self.group}/{name}"

    def column(self, name: str) -> list[float]:
        """Return a column; one that is not there, as no step knows it, is all NaN."""
        return self.log.columns.get(name, [math.nan] * len(self.log.steps))

    def titled(self, text: str) -> str:
        """Return the title of a picture of gradients."""
        return text if self.group is None else f"{text} ({self.group})"

    @property
    def pairs(self) -> dict[str, str]:
        """The name of each pair's column by what to call the pair."""
        named = {
            f"{a}, {b}": self.of_gradients(f"cosine/{a}/{b}")
            for a, b in itertools.combinations(self.log.tasks, 2)
        }
        return {pair: name for pair, name in named.items() if name in self.log.columns}

    def averaged(self, values: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the middle and the mean of every window, NaN where it knows nothing."""
        return _averaged(self.log.steps, values, self.window)


def _view(source: Source, window: int | None, group: str | None = None) -> _View:
    log = _log(source)
    if window is None:
        window = math.ceil(len(log.steps) / POINTS)
    if group is not None and not log.groups:
        raise ValueError(
            f"`group` must be None where no step knows figures of a group, but got {group!r}. They "
            'are there if the Balancer gets names (shared={"trunk": ..., "neck": ...}) and makes '
            "per-task gradients."
        )
    if group is not None:
        check_choice("group", group, log.groups)
    return _View(log, check_count("window", window), group)


def _single(
    draw: Callable[[Axes, _View], None],
    source: Source,
    window: int | None,
    group: str | None = None,
) -> Figure:
    view = _view(source, window, group)
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4))
        draw(figure.subplots(), view)
    return figure


def _weights(axes: Axes, view: _View) -> None:
    _lines(axes, view, "weight")
    axes.set(title="Weight of each task", xlabel="step")


def _losses(axes: Axes, view: _View) -> None:
    _logarithmic_if_positive(axes, _lines(axes, view, "loss"))
    axes.set(title="Loss of each task", xlabel="step")


def _gradient_norms(axes: Axes, view: _View) -> None:
    _logarithmic_if_positive(axes, _lines(axes, view, view.of_gradients("gradient_norm")))
    axes.set(title=view.titled("Length of each task's gradient"), xlabel="step")


def _logarithmic_if_positive(axes: Axes, lines: Sequence[Sequence[float]]) -> None:
    known = [value for line in lines for value in line if math.isfinite(value)]
    if known and min(known) > 0:
        axes.set_yscale("log")


def _shares(axes: Axes, view: _View) -> None:
    axes.axhline(0, color="black", lw=0.7)
    _lines(axes, view, view.of_gradients("share"))
    axes.set(title=view.titled("Share of the update"), xlabel="step")


def _conflicts(axes: Axes, view: _View) -> None:
    title = view.titled("Pairs of tasks in conflict")
    axes.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
    found, active = view.column(view.of_gradients("conflicts")), view.column("active")
    rates = [_ratio(count, m * (m - 1) / 2) for count, m in zip(found, active, strict=True)]
    if _unknown(rates):
        _say(axes, "no step had gradients of two tasks")
        return
    axes.plot(*view.averaged(rates), color=COLOURS[0])
    axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:.0f} %")


def _cosines(axes: Axes, view: _View) -> None:
    axes.set(title=view.titled("Cosine between gradients"), xlabel="step")
    axes.grid(visible=False)
    pairs, steps = view.pairs, view.log.steps
    rows = [view.averaged(view.column(name))[1] for name in pairs.values()]
    if all(map(_unknown, rows)):
        _say(axes, "no step had gradients of two tasks")
        return
    edges = (steps[0] - 0.5, steps[-1] + 0.5, len(pairs) - 0.5, -0.5)
    picture = axes.imshow(
        rows, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", extent=edges, interpolation="nearest"
    )
    axes.set_facecolor("#dddddd")  # where no step knows it
    axes.set_yticks(range(len(pairs)), list(pairs))
    bar = axes.figure.colorbar(picture, ax=axes, ticks=(-1, 0, 1), pad=0.02)
    bar.ax.set_yticklabels(["−1: opposite", "0", "1: same"])


def _lines(axes: Axes, view: _View, kind: str) -> list[list[float]]:
    """Draw a line per task, and return its values."""
    drawn = []
    for task, colour in zip(view.log.tasks, itertools.cycle(COLOURS)):
        values = view.column(f"{kind}/{task}")
        if not _unknown(values):
            steps, line = view.averaged(values)
            axes.plot(steps, line, color=colour, lw=1.4, label=task)
            drawn.append(line)
    if drawn:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        _say(axes, f"no step knows a {kind.rpartition('/')[2].replace('_', ' ')}")
    return drawn


def _averaged(
    steps: Sequence[int], values: Sequence[float], window: int
) -> tuple[list[float], list[float]]:
    """Return the middle and the mean of every window, NaN where it knows nothing."""
    middles, means = [], []
    for start in range(0, len(steps), window):
        inside = steps[start : start + window]
        known = [v for v in values[start : start + window] if not math.isnan(v)]
        middles.append((inside[0] + inside[-1]) / 2)
        means.append(sum(known) / len(known) if known else math.nan)
    return middles, means


def _log(source: Source) -> Log:
    if isinstance(source, Log):
        log = source
    elif isinstance(source, str | os.PathLike):
        log = read_log(source)
    else:
        log = log_of(source)
    if not log.steps:
        raise ValueError(
            "`source` must hold steps, but has none. A Balancer keeps records where you let it: "
            "`balancer.history = deque(maxlen=1000)`."
        )
    return log


def _unknown(values: Sequence[float]) -> bool:
    return all(map(math.isnan, values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#555555")


def _path(name: str, path: Tensor) -> Tensor:
    points = torch.as_tensor(path).detach().cpu().double()
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(
            f"the path {name!r} must have shape (steps, 2), but has {tuple(points.shape)}."
        )
    return points


def _around(points: Tensor) -> tuple[float, float, float, float]:
    """Return the edges of what holds the points, with a margin of a tenth."""
    low, high = points.amin(0), points.amax(0)
    margin = 0.1 * (high - low).clamp_min(1e-6)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, bottom, top
