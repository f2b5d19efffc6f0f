import math

import numpy as np
import pytest

from examples.pathology.figures.scores import compare, precision_recall, regression, roc
from examples.pathology.figures.sheet import Sheet
from tests.pathology.drawing import words

RANDOM = np.random.default_rng(0)
NOTE = "SYNTHETIC slides. Features come from a network with RANDOM weights and carry no biology."


def fold(n=20):
    truth = np.arange(n) % 3 == 0
    return truth, truth + RANDOM.normal(size=n)


def size(path):
    """Return width and height from the header of a png."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return tuple(int.from_bytes(data[i : i + 4], "big") for i in (16, 20))


def test_roc_names_folds_mean_and_caption(tmp_path, drawn):
    roc([fold(), fold()], Sheet(tmp_path / "a.png", "naive: t = x", NOTE))
    text = words(drawn[0])
    for expected in ("naive: t = x", "fold 2: 0.", "mean AUROC 0.", "± 0.", "chance", NOTE):
        assert expected in text
    assert min(size(tmp_path / "a.png")) > 700


def test_the_areas_in_the_legend_are_those_of_the_curves(tmp_path, drawn):
    truth, score = np.array([1, 0, 1, 0], dtype=bool), np.array([0.9, 0.8, 0.7, 0.1])
    roc([(truth, score)], Sheet(tmp_path / "a.png", ""))
    precision_recall([(truth, score)], Sheet(tmp_path / "b.png", ""))
    assert "fold 1: 0.75" in words(drawn[0])  # 3 of 4 pairs
    assert "fold 1: 0.83" in words(drawn[1])  # (1 + 2/3) / 2
    assert "mean AUPRC 0.83" in words(drawn[1])


def test_pr_has_a_line_at_the_prevalence(tmp_path, drawn):
    precision_recall([fold(9), fold(9)], Sheet(tmp_path / "a.png", "t", NOTE))
    assert "prevalence 0.33 = chance" in words(drawn[0])
    heights = [line.get_ydata()[0] for line in drawn[0].axes[0].lines if len(line.get_ydata())]
    assert 1 / 3 in heights
    assert NOTE in words(drawn[0])


@pytest.mark.parametrize("draw", [roc, precision_recall])
def test_a_fold_of_one_class_is_named_not_drawn(tmp_path, drawn, draw):
    only = (np.ones(4, dtype=bool), np.arange(4.0))
    draw([fold(), only], Sheet(tmp_path / "a.png", ""))
    assert "fold 2: one class only" in words(drawn[0])
    draw([only], Sheet(tmp_path / "b.png", ""))
    assert (tmp_path / "b.png").exists()


def test_regression_names_the_correlation_of_every_fold(tmp_path, drawn):
    line = (np.arange(5.0), 2 * np.arange(5.0) + 1)
    few = (np.arange(2.0), np.arange(2.0))
    regression([line, few], Sheet(tmp_path / "x.png", "m"))
    text = words(drawn[0])
    assert "fold 1: r = 1.00" in text
    assert "fold 2: 2 patients with a value" in text
    points = drawn[0].axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(points, np.stack(line, axis=1))


def test_compare_shows_every_method_and_takes_gaps(tmp_path, drawn):
    values = {"baseline": [0.5, math.nan], "naive": [0.6, 0.7], "autol+cagrad": [math.nan] * 2}
    sheet = Sheet(tmp_path / "a.png", "AUROC in every fold", NOTE)
    compare(values, sheet, metric="AUROC", chance=0.5)
    text = words(drawn[0])
    for expected in (*values, "AUROC in every fold", "chance 0.50", "mean", NOTE):
        assert expected in text


def test_compare_shows_values_below_zero(tmp_path, drawn):
    for values in ([0.1, 0.4], [-0.6, 0.4], [math.nan, math.nan]):
        sheet = Sheet(tmp_path / "a.png", "t")
        compare({"naive": values}, sheet, metric="Pearson r", chance=0.0)
    ends = [figure.axes[0].get_ylim() for figure in drawn]
    assert ends == [pytest.approx((low, 1.03)) for low in (-0.03, -0.63, -0.03)]
