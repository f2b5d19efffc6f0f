"""Figures of a training hold the numbers of its records."""

import math
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from mtbalance import RecordWriter, make_balancer, plot
from mtbalance._log import log_of
from tests._device import randn

TASKS = ("a", "b", "c")


def train(steps, name="pcgrad", path=None):
    """Return the records of a training in which task c is there in every other step."""
    generator = torch.Generator().manual_seed(0)
    x, y = (nn.Parameter(randn(4, generator=generator)) for _ in range(2))
    balancer = make_balancer(name, tasks=TASKS, shared={"low": x, "high": y})
    balancer.history = deque(maxlen=steps)
    writer = RecordWriter(path) if path else None
    for step in range(steps):
        rows = randn(3, 2, 4, generator=generator)
        losses = {t: (a @ x + b @ y).square() for t, (a, b) in zip(TASKS, rows, strict=True)}
        if step % 2:
            losses.pop("c")
        record = balancer.backward(losses)
        if writer:
            writer.write(record)
    if writer:
        writer.close()
    return balancer.history


def lines(figure):
    """Return the lines with a label by it."""
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines if line.get_label()[:1] != "_"}


@pytest.mark.parametrize(
    ("draw", "kind"),
    [
        (plot.weights, "weight"),
        (plot.losses, "loss"),
        (plot.gradient_norms, "gradient_norm"),
        (plot.shares, "share"),
    ],
)
def test_a_line_per_task_holds_means_of_windows(draw, kind):
    history = train(10)
    drawn = lines(draw(history, window=4))
    assert set(drawn) == set(TASKS)
    rows = [record.as_dict() for record in history]
    for task, line in drawn.items():
        values = np.array([row[f"{kind}/{task}"] for row in rows])
        expected = [np.nanmean(values[start : start + 4]) for start in (0, 4, 8)]
        np.testing.assert_allclose(line.get_ydata(), expected)
        np.testing.assert_allclose(line.get_xdata(), [1.5, 5.5, 8.5])


@pytest.mark.parametrize(
    ("draw", "kind"), [(plot.losses, "loss"), (plot.gradient_norms, "gradient_norm")]
)
def test_lines_are_logarithmic_where_all_are_positive(draw, kind):
    history = train(4)
    assert draw(history).axes[0].get_yscale() == "log"
    rows = [{**record.as_dict(), f"{kind}/a": 0.0} for record in history]
    assert draw(rows).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    "draw", [plot.gradient_norms, plot.shares, plot.conflicts, plot.cosines, plot.overview]
)
def test_a_group_is_drawn_as_if_its_figures_were_all_there_is(draw):
    history = train(9)
    rows = [record.as_dict() for record in history]
    for group in ("low", "high"):
        start = f"{group}/"
        alone = [
            row | {name[len(start) :]: row[name] for name in row if name.startswith(start)}
            for row in rows
        ]
        figure, others = draw(history, group=group), draw(alone)
        for values, expected in zip(drawn(figure), drawn(others), strict=True):
            np.testing.assert_array_equal(values, expected)
        titles = [axes.get_title() for axes in figure.axes]
        expected = [axes.get_title() for axes in others.axes]
        assert sum(title.endswith(f" ({group})") for title in titles) == (
            2 if draw is plot.overview else 1
        )
        assert [title.removesuffix(f" ({group})") for title in titles] == expected
    differ = zip(drawn(draw(history, group="low")), drawn(figure), strict=True)
    assert any(values.shape != other.shape or (values != other).any() for values, other in differ)


def test_an_unknown_group_is_an_error_that_names_those_there_are():
    known = r"`group` must be one of 'low', 'high', but got 'hihg'\. Did you mean 'high'\?"
    with pytest.raises(ValueError, match=known):
        plot.shares(train(2), group="hihg")
    with pytest.raises(ValueError, match=r"`group` must be None where no step .*got 'low'.*names"):
        plot.cosines([{"loss/a": 1.0, "cosine/a/b": 0.5}], group="low")


def test_conflicts_are_a_rate_of_the_pairs_that_were_there():
    history = train(40)
    (line,) = plot.conflicts(history, window=1).axes[0].lines
    pairs = [3, 1] * 20
    expected = [record.conflicts / m for record, m in zip(history, pairs, strict=True)]
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert 0 < sum(expected) < 40


def test_cosines_are_a_row_per_pair_over_the_steps():
    history = train(6)
    figure = plot.cosines(history)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a, b", "a, c", "b, c"]
    (image,) = axes.images
    shown = image.get_array().filled(math.nan)
    for row, (a, b) in enumerate((("a", "b"), ("a", "c"), ("b", "c"))):
        expected = [float(record.cosines.get((a, b), math.nan)) for record in history]
        np.testing.assert_allclose(shown[row], expected)
    assert list(image.get_extent()) == [-0.5, 5.5, 2.5, -0.5]


@pytest.mark.parametrize(
    "name", ["weights", "losses", "gradient_norms", "shares", "conflicts", "cosines", "overview"]
)
@pytest.mark.parametrize("kind", ["pcgrad", "equal"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_log_file_gives_the_same_picture_as_its_records(name, kind, ending, tmp_path):
    path = tmp_path / f"log{ending}"
    history = train(7, kind, path)
    draw = getattr(plot, name)
    expected = drawn(draw(history))
    assert expected
    for source in (path, str(path), log_of(history)):
        for values, others in zip(drawn(draw(source)), expected, strict=True):
            np.testing.assert_array_equal(values, others)


def drawn(figure):
    """Return the numbers and words of a figure."""
    return [
        *(line.get_xydata() for axes in figure.axes for line in axes.lines),
        *(image.get_array() for axes in figure.axes for image in axes.images),
        *(np.array(text.get_text()) for axes in figure.axes for text in axes.texts),
    ]


def test_figures_are_written_as_pictures(tmp_path):
    for draw in (plot.overview, plot.cosines):
        draw(train(7)).savefig(tmp_path / f"{draw.__name__}.png", dpi=50)
        assert (tmp_path / f"{draw.__name__}.png").stat().st_size > 2000


def test_without_gradients_the_figure_says_so():
    for draw in (plot.conflicts, plot.cosines):
        (text,) = draw(train(3, "equal")).axes[0].texts
        assert text.get_text() == "no step had gradients of two tasks"
    assert plot.shares(train(3, "equal")).axes[0].texts[0].get_text() == "no step knows a share"


def test_many_steps_become_a_hundred_points():
    rows = [{"step": step, "loss/a": 1.0 + step} for step in range(12_345)]
    line = lines(plot.losses(rows))["a"]
    assert len(line.get_xdata()) == 100
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata() + 1)


@pytest.mark.parametrize("source", [[], deque()])
def test_a_source_without_steps_names_the_remedy(source):
    with pytest.raises(ValueError, match=r"`source` must hold steps.*history = deque"):
        plot.weights(source)


def test_a_landscape_holds_the_mean_and_the_paths():
    def losses(points):
        return torch.stack([points.square().sum(-1), (points - 2).square().sum(-1)], -1)

    path = torch.stack([torch.linspace(3, 1, 5), torch.linspace(-1, 1, 5)], 1)
    figure = plot.landscape(losses, {"plain": path, "other": path + 0.5})
    axes = figure.axes[0]
    named = {line.get_label(): line for line in axes.lines if line.get_label()[:1] != "_"}
    np.testing.assert_allclose(named["plain"].get_xydata(), path.numpy())
    assert set(named) == {"plain", "other"}
    np.testing.assert_allclose(axes.get_xlim(), (0.75, 3.75), atol=1e-6)
    np.testing.assert_allclose(axes.get_ylim(), (-1.25, 1.75), atol=1e-6)
    assert plot.landscape(losses, {"a": path}, extent=(0, 1, 2, 3)).axes[0].get_ylim() == (2, 3)
    for wrong in ({}, {"a": path[0]}, {"a": path[:0]}, {"a": torch.zeros(3, 3)}):
        with pytest.raises(ValueError, match=r"must (hold a path|have shape \(steps, 2\))"):
            plot.landscape(losses, wrong)


def test_contours_are_those_of_the_mean_of_the_losses():
    """Of x + y and x - y, whose mean is x: upright lines, from low and dark to high."""
    axes = Figure().subplots()
    plot.contours(
        axes,
        lambda points: points @ torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
        (-2, 2, 0, 1),
    )
    filled, lines = axes.collections
    assert (axes.get_xlim(), axes.get_ylim()) == ((-2, 2), (0, 1))
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        if abs(level) < 2:
            np.testing.assert_allclose(path.vertices[:, 0], level, atol=1e-6)
            assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == (0, 1)
    shades = filled.get_facecolor()[:, 0]
    assert (np.diff(shades) > 0).all()
    assert all(dashes is None for _, dashes in lines.get_linestyles())


def test_without_matplotlib_its_command_is_named():
    code = "import sys; sys.modules['matplotlib'] = None\nimport mtbalance\nimport mtbalance.plot"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.rstrip().endswith('Run `pip install "mtbalance[plot]"`.')
