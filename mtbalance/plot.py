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
from typing import Any

import torch
from torch import Tensor

from mtbalance._checks import check_count
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

__all__ = ["conflicts", "cosines", "landscape", "losses", "overview", "shares", "weights"]

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
    return _single(source, window, _weights)


def losses(source: Source, *, window: int | None = None) -> Figure:
    """Draw the raw loss of each task over the steps, on a logarithmic scale where all are positive.

    Args and errors as in :func:`weights`.
    """
    return _single(source, window, _losses)


def shares(source: Source, *, window: int | None = None) -> Figure:
    """Draw what each task contributes to the squared length of the update.

    In each step, shares sum to 1. A task with a negative share pulls against what the others agree
    on. Args and errors as in :func:`weights`.
    """
    return _single(source, window, _shares)


def conflicts(source: Source, *, window: int | None = None) -> Figure:
    """Draw the part of the pairs of tasks whose gradients conflict, over the steps.

    Args and errors as in :func:`weights`.
    """
    return _single(source, window, _conflicts)


def cosines(source: Source, *, window: int | None = None) -> Figure:
    """Draw the cosine between the gradients of each pair of tasks over training, as a heat map.

    Args and errors as in :func:`weights`.
    """
    log = _log(source)
    pairs = _pairs(log)
    height = 1.3 + 0.28 * len(pairs)
    with rc_context(STYLE):
        figure = Figure(figsize=(7, min(height, 12)))
        _cosines(figure.subplots(), log, _window(log, window))
    return figure


def overview(source: Source, *, window: int | None = None) -> Figure:
    """Draw losses, weights, shares of the update and conflicts on one page.

    Args and errors as in :func:`weights`.
    """
    log = _log(source)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6))
        drawings = (_losses, _weights, _shares, _conflicts)
        for axes, draw in zip(figure.subplots(2, 2).flat, drawings, strict=True):
            draw(axes, log, _window(log, window))
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
    left, right, low, high = extent or _around(torch.cat(list(points.values())))
    across, along = torch.linspace(left, right, 241), torch.linspace(low, high, 241)
    grid = torch.stack(torch.meshgrid(across, along, indexing="xy"), -1).double()
    with torch.no_grad():
        mean = losses(grid).mean(-1)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(5.4, 5))
        axes = figure.subplots()
        plane = (across.numpy(), along.numpy(), mean.numpy())
        axes.contourf(*plane, levels=levels, cmap="Greys", alpha=0.35)
        axes.contour(*plane, levels=levels, colors="#8a8a8a", linewidths=0.35)
        for (name, path), colour in zip(points.items(), itertools.cycle(COLOURS)):
            axes.plot(*path.T.numpy(), color=colour, lw=1.8, label=name)
            axes.plot(*path[0], "o", color="white", mec=colour, ms=6)
            axes.plot(*path[-1], "o", color=colour, mec="black", mew=0.6, ms=6)
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
        figure.legend(loc="outside lower center", ncols=min(len(points), 4))
    return figure


def _single(source: Source, window: int | None, draw: Callable[[Axes, Log, int], None]) -> Figure:
    log = _log(source)
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4))
        draw(figure.subplots(), log, _window(log, window))
    return figure


def _weights(axes: Axes, log: Log, window: int) -> None:
    _lines(axes, log, window, "weight")
    axes.set(title="Weight of each task", xlabel="step")


def _losses(axes: Axes, log: Log, window: int) -> None:
    lines = _lines(axes, log, window, "loss")
    known = [value for line in lines for value in line if math.isfinite(value)]
    if known and min(known) > 0:
        axes.set_yscale("log")
    axes.set(title="Loss of each task", xlabel="step")


def _shares(axes: Axes, log: Log, window: int) -> None:
    axes.axhline(0, color="black", lw=0.7)
    _lines(axes, log, window, "share")
    axes.set(title="Share of the update", xlabel="step")


def _conflicts(axes: Axes, log: Log, window: int) -> None:
    axes.set(title="Pairs of tasks in conflict", xlabel="step", ylim=(-0.03, 1.03))
    found, active = log.columns.get("conflicts", []), log.columns.get("active", [])
    rates = [_ratio(count, m * (m - 1) / 2) for count, m in zip(found, active, strict=True)]
    if _unknown(rates):
        _say(axes, "no step had gradients of two tasks")
        return
    axes.plot(*_averaged(log.steps, rates, window), color=COLOURS[0])
    axes.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:.0f} %")


def _cosines(axes: Axes, log: Log, window: int) -> None:
    axes.set(title="Cosine between gradients", xlabel="step")
    axes.grid(visible=False)
    pairs = _pairs(log)
    rows = [_averaged(log.steps, log.columns[name], window)[1] for name in pairs.values()]
    if all(map(_unknown, rows)):
        _say(axes, "no step had gradients of two tasks")
        return
    edges = (log.steps[0] - 0.5, log.steps[-1] + 0.5, len(pairs) - 0.5, -0.5)
    picture = axes.imshow(
        rows, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", extent=edges, interpolation="nearest"
    )
    axes.set_facecolor("#dddddd")  # where no step knows it
    axes.set_yticks(range(len(pairs)), list(pairs))
    bar = axes.figure.colorbar(picture, ax=axes, ticks=(-1, 0, 1), pad=0.02)
    bar.ax.set_yticklabels(["−1: opposite", "0", "1: same"])


def _lines(axes: Axes, log: Log, window: int, kind: str) -> list[list[float]]:
    """Draw a line per task, and return its values."""
    drawn = []
    for task, colour in zip(log.tasks, itertools.cycle(COLOURS)):
        values = log.columns.get(f"{kind}/{task}", [])
        if not _unknown(values):
            steps, line = _averaged(log.steps, values, window)
            axes.plot(steps, line, color=colour, lw=1.4, label=task)
            drawn.append(line)
    if drawn:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        _say(axes, f"no step knows a {kind.replace('_', ' ')}")
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


def _window(log: Log, window: int | None) -> int:
    return math.ceil(len(log.steps) / POINTS) if window is None else check_count("window", window)


def _pairs(log: Log) -> dict[str, str]:
    """Return the name of each pair's column by what to call the pair."""
    named = {f"{a}, {b}": f"cosine/{a}/{b}" for a, b in itertools.combinations(log.tasks, 2)}
    return {pair: name for pair, name in named.items() if name in log.columns}


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
