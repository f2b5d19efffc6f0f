import numpy as np
import pytest

from examples.pathology.figures.embedding import tsne, tsne_map
from examples.pathology.figures.sheet import Sheet
from tests.pathology.drawing import words

RANDOM = np.random.default_rng(0)
NOTE = "SYNTHETIC slides. Features come from a network with RANDOM weights and carry no biology."


@pytest.mark.parametrize("sizes", [[8] * 5, [12], [3, 30], [8] * 7])
def test_tsne_has_a_panel_per_fold_and_a_colour_per_class(tmp_path, drawn, sizes):
    folds = [
        (
            RANDOM.normal(size=(n, 384)).astype(np.float32),
            np.array(["a", "b", "c"])[np.arange(n) % 3],
        )
        for n in sizes
    ]
    tsne(folds, ["a", "b", "c"], Sheet(tmp_path / "a.png", "t", NOTE))
    text = words(drawn[0])
    assert NOTE in text
    assert all(f"fold {k + 1}: n = {n}" in text for k, n in enumerate(sizes))
    assert sum(axes.get_visible() for axes in drawn[0].axes) == len(sizes)
    colours = {
        tuple(c.get_facecolor()[0]) for c in drawn[0].axes[0].collections if len(c.get_offsets())
    }
    assert len(colours) == 3
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b", "c"]


def test_values_share_one_scale_of_colours(tmp_path, drawn):
    folds = [(RANDOM.normal(size=(5, 8)), np.arange(5) + low) for low in (0.0, 10.0)]
    tsne(folds, (), Sheet(tmp_path / "a.png", "naive: HRD", NOTE))
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
    mapped = tsne_map(embedding, 1)
    assert mapped.shape == (n, 2)
    assert np.isfinite(mapped).all()
    np.testing.assert_array_equal(mapped, tsne_map(embedding, 1))


def test_a_map_keeps_far_groups_apart():
    embedding = np.concatenate([RANDOM.normal(size=(10, 8)), 50 + RANDOM.normal(size=(10, 8))])
    mapped = tsne_map(embedding, 0)
    centres = mapped[:10].mean(0), mapped[10:].mean(0)
    spread = max(np.linalg.norm(mapped[s] - c, axis=1).max() for s, c in zip(
        (slice(10), slice(10, 20)), centres, strict=True
    ))  # fmt: skip
    assert np.linalg.norm(centres[0] - centres[1]) > spread
