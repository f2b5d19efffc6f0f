import math

import numpy as np
import pytest
from matplotlib.text import Text

from examples.pathology.figures import plots

RANDOM = np.random.default_rng(0)
NOTE = "SYNTHETIC slides. Features come from a network with RANDOM weights and carry no biology."


def fold(n=20):
    truth = np.arange(n) % 3 == 0
    return truth, truth + RANDOM.normal(size=n)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are written."""
    figures = []
    original = plots.save

    def save(figure, path):
        figures.append(figure)
        original(figure, path)

    monkeypatch.setattr(plots, "save", save)
    return figures


def words(figure):
    found = " ".join(text.get_text() for text in figure.findobj(Text))
    return " ".join(found.split())


def size(path):
    """Return width and height from the header of a png."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return tuple(int.from_bytes(data[i : i + 4], "big") for i in (16, 20))


def test_roc_names_folds_mean_and_caption(tmp_path, drawn):
    plots.roc([fold(), fold()], tmp_path / "a.png", title="naive: t = x", caption=NOTE)
    text = words(drawn[0])
    for expected in ("naive: t = x", "fold 2: 0.", "mean AUROC 0.", "± 0.", "chance", NOTE):
        assert expected in text
    assert min(size(tmp_path / "a.png")) > 700


def test_the_areas_in_the_legend_are_those_of_the_curves(tmp_path, drawn):
    truth, score = np.array([1, 0, 1, 0], dtype=bool), np.array([0.9, 0.8, 0.7, 0.1])
    plots.roc([(truth, score)], tmp_path / "a.png", title="")
    plots.precision_recall([(truth, score)], tmp_path / "b.png", title="")
    assert "fold 1: 0.75" in words(drawn[0])  # 3 of 4 pairs
    assert "fold 1: 0.83" in words(drawn[1])  # (1 + 2/3) / 2
    assert "mean AUPRC 0.83" in words(drawn[1])


def test_pr_has_a_line_at_the_prevalence(tmp_path, drawn):
    plots.precision_recall([fold(9), fold(9)], tmp_path / "a.png", title="t", caption=NOTE)
    assert "prevalence 0.33 = chance" in words(drawn[0])
    heights = [line.get_ydata()[0] for line in drawn[0].axes[0].lines if len(line.get_ydata())]
    assert 1 / 3 in heights
    assert NOTE in words(drawn[0])


@pytest.mark.parametrize("draw", [plots.roc, plots.precision_recall])
def test_a_fold_of_one_class_is_named_not_drawn(tmp_path, drawn, draw):
    only = (np.ones(4, dtype=bool), np.arange(4.0))
    draw([fold(), only], tmp_path / "a.png", title="")
    assert "fold 2: one class only" in words(drawn[0])
    draw([only], tmp_path / "b.png", title="")
    assert (tmp_path / "b.png").exists()


@pytest.mark.parametrize("sizes", [[8] * 5, [12], [3, 30], [8] * 7])
def test_tsne_has_a_panel_per_fold_and_a_colour_per_class(tmp_path, drawn, sizes):
    folds = [
        (
            RANDOM.normal(size=(n, 384)).astype(np.float32),
            np.array(["a", "b", "c"])[np.arange(n) % 3],
        )
        for n in sizes
    ]
    plots.tsne(folds, ["a", "b", "c"], tmp_path / "a.png", title="t", caption=NOTE)
    text = words(drawn[0])
    assert NOTE in text
    assert all(f"fold {k + 1}: n = {n}" in text for k, n in enumerate(sizes))
    assert sum(axes.get_visible() for axes in drawn[0].axes) == len(sizes)
    colours = {
        tuple(c.get_facecolor()[0]) for c in drawn[0].axes[0].collections if len(c.get_offsets())
    }
    assert len(colours) == 3


def test_values_share_one_scale_of_colours(tmp_path, drawn):
    folds = [(RANDOM.normal(size=(5, 8)), np.arange(5) + low) for low in (0.0, 10.0)]
    plots.tsne(folds, (), tmp_path / "a.png", title="naive: HRD", caption=NOTE)
    panels = [axes.collections[0] for axes in drawn[0].axes[:2]]
    for points, (_, values) in zip(panels, folds, strict=True):
        np.testing.assert_array_equal(points.get_array(), values)
        assert (points.norm.vmin, points.norm.vmax) == (0.0, 14.0)
    text = words(drawn[0])
    assert "Measured" in text
    assert "silhouette" not in text
    assert NOTE in text


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 40])
def test_a_map_has_a_point_per_patient_and_repeats_with_its_seed(n):
    embedding = RANDOM.normal(size=(n, 16)).astype(np.float32)
    mapped = plots.tsne_map(embedding, 1)
    assert mapped.shape == (n, 2)
    assert np.isfinite(mapped).all()
    np.testing.assert_array_equal(mapped, plots.tsne_map(embedding, 1))


def test_a_map_keeps_far_groups_apart():
    embedding = np.concatenate([RANDOM.normal(size=(10, 8)), 50 + RANDOM.normal(size=(10, 8))])
    mapped = plots.tsne_map(embedding, 0)
    centres = mapped[:10].mean(0), mapped[10:].mean(0)
    spread = max(np.linalg.norm(mapped[s] - c, axis=1).max() for s, c in zip(
        (slice(10), slice(10, 20)), centres, strict=True
    ))  # fmt: skip
    assert np.linalg.norm(centres[0] - centres[1]) > spread


def test_compare_shows_every_method_and_takes_gaps(tmp_path, drawn):
    values = {"baseline": [0.5, math.nan], "naive": [0.6, 0.7], "autol+cagrad": [math.nan] * 2}
    plots.compare(values, tmp_path / "a.png", metric="AUROC", chance=0.5, caption=NOTE)
    text = words(drawn[0])
    for expected in (*values, "AUROC in every fold", "chance 0.50", "mean", NOTE):
        assert expected in text


def test_compare_shows_values_below_zero(tmp_path, drawn):
    for values in ([0.1, 0.4], [-0.6, 0.4], [math.nan, math.nan]):
        plots.compare({"naive": values}, tmp_path / "a.png", metric="Pearson r", chance=0.0)
    ends = [figure.axes[0].get_ylim() for figure in drawn]
    assert ends == [pytest.approx((low, 1.03)) for low in (-0.03, -0.63, -0.03)]


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_neighbouring_colours_have_markers_that_differ():
    assert len(set(plots.COLOURS)) == len(plots.COLOURS)
    assert len(set(plots.MARKERS)) >= len(plots.COLOURS)
    # Text in the captions: at least 4.5 to 1 against white, as the web's rules ask for.
    assert 1.05 / (luminance(plots.GREY) + 0.05) > 4.5
