import numpy as np
import pandas as pd
import pytest

from examples.pathology.figures.history import balance, training
from examples.pathology.figures.sheet import Sheet
from tests.pathology.drawing import words


def history(epochs=3, **columns):
    values = {"epoch": range(1, epochs + 1), **columns}
    return pd.DataFrame(values)


def lines_of(axes):
    return [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if len(line.get_xdata())
    ]


def test_training_shows_both_losses_of_every_task_and_the_epoch_kept(tmp_path, drawn):
    columns = {
        "loss/a": [3.0, 2.0, 1.0],
        "validation/a": [0.9, 0.5, 0.7],
        "loss/b": [6.0, 5.0, 4.0],
        "validation/b": [0.3, 0.2, 0.1],
    }
    training([history(**columns)], [2], ["a", "b"], Sheet(tmp_path / "x.png", "m"))
    left, right = drawn[0].axes
    assert ([1, 2, 3], [3.0, 2.0, 1.0]) in lines_of(left)
    assert ([1, 2, 3], [0.9, 0.5, 0.7]) in lines_of(left)
    assert ([2], [0.5]) in lines_of(left)  # kept
    assert ([2], [0.2]) in lines_of(right)
    for expected in ("fold 1", "training", "validation", "kept"):
        assert expected in words(drawn[0])


def test_balance_shows_weights_and_cosines(tmp_path, drawn):
    columns = {"weight/a": [1.0, 2.0, 3.0], "weight/b": [0.5] * 3, "cosine/a/b": [0.1, -0.2, 0.0]}
    assert balance([history(**columns)] * 2, ["a", "b"], Sheet(tmp_path / "x.png", "m"))
    first, second, third = drawn[0].axes
    assert lines_of(first).count(([1, 2, 3], [1.0, 2.0, 3.0])) == 2
    assert lines_of(second).count(([1, 2, 3], [0.5] * 3)) == 2
    assert lines_of(third).count(([1, 2, 3], [0.1, -0.2, 0.0])) == 2
    assert first.get_ylim() == second.get_ylim()  # to be compared
    assert third.get_title() == "Gradients of a and b"
    assert "below 0 are in conflict" in words(drawn[0])


@pytest.mark.parametrize(
    ("cosine", "low", "high"), [(0.01, 0.2, 0.2), (-0.5, 0.5, 0.6), (0.999, 1.05, 1.05)]
)
def test_the_axis_of_cosines_is_centred_and_neither_too_fine_nor_too_wide(
    cosine, low, high, tmp_path, drawn
):
    columns = {"weight/a": [1.0], "weight/b": [1.0], "cosine/a/b": [cosine]}
    balance([history(1, **columns)], ["a", "b"], Sheet(tmp_path / "x.png", "m"))
    bottom, top = drawn[0].axes[2].get_ylim()
    assert bottom == -top
    assert low <= top <= high


def test_four_tasks_have_a_panel_for_each_weight_and_each_pair(tmp_path, drawn):
    pairs = ["a/b", "a/c", "a/d", "b/c", "b/d", "c/d"]
    columns = {f"weight/{task}": [1.0] * 3 for task in "abcd"}
    columns |= {f"cosine/{pair}": [0.1] * 3 for pair in pairs}
    balance([history(**columns)], list("abcd"), Sheet(tmp_path / "x.png", "m"))
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert titles[:4] == [f"Weight of {task}" for task in "abcd"]
    assert titles[4:] == [f"Gradients of {pair.replace('/', ' and ')}" for pair in pairs]


def test_without_weights_there_is_nothing_to_draw(tmp_path, drawn):
    assert not balance([history(**{"loss/a": [1.0] * 3})], ["a"], Sheet(tmp_path, ""))
    assert drawn == []


def test_weights_alone_have_no_panel_of_conflict(tmp_path, drawn):
    columns = {"weight/a": [1.0] * 3, "weight/b": [1.0] * 3}
    assert balance([history(**columns)], ["a", "b"], Sheet(tmp_path / "x.png", "m"))
    assert [axes.get_title() for axes in drawn[0].axes] == ["Weight of a", "Weight of b"]
    assert "conflict" not in words(drawn[0])


def test_a_fold_that_stopped_early_is_shorter(tmp_path, drawn):
    folds = [history(5, **{"validation/a": np.arange(5.0)}), history(2, **{"validation/a": [1, 2]})]
    training(folds, [1, 1], ["a"], Sheet(tmp_path / "x.png", "m"))
    assert {len(x) for x, _ in lines_of(drawn[0].axes[0])} == {5, 2, 1}
