from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pathology.settings.simulate import SimulateConfig
from examples.pathology.simulation.composition import TISSUES, Tissue
from examples.pathology.simulation.feature_space import FEATURES_PER_TILE, FeatureSpace

NONE = SimulateConfig(
    Path("nowhere"), tumour_shift=0.0, signature_shift=0.0, batch_effect=0.0, domain_shift=0.0
)
MIXED = Tissue(np.array([0.5, 0.2, 0.1, 0.05, 0.1, 0.05, 0, 0]), altered=0.3, clone=0.2, growth=1.0)
SPACE = FeatureSpace(0)


def tiles(tissue=MIXED, count=300, shifts=NONE, seed=0, *, external=False):
    generator = np.random.default_rng(seed)
    return SPACE.tiles(tissue, count, shifts, generator, external=external)


def nearest(feats):
    """Return the tissue whose centroid is nearest to each tile."""
    centroids = SPACE.offset + SPACE.centroids
    return ((centroids**2).sum(1) - 2 * feats @ centroids.T).argmin(1)  # less each |tile|^2


@given(count=st.integers(1, 200), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_every_tile_has_a_place_of_its_own_on_the_grid_row_by_row(count, seed):
    feats, coords = tiles(count=count, seed=seed)
    assert feats.shape == (count, FEATURES_PER_TILE)
    assert coords.shape == (count, 2)
    assert (coords % 256 == 0).all()
    assert (coords >= 0).all()
    places = [(y, x) for x, y in coords]
    assert len(set(places)) == count
    assert places == sorted(places)


def test_a_seed_gives_one_network_and_another_seed_another():
    np.testing.assert_array_equal(FeatureSpace(3).factors, FeatureSpace(3).factors)
    assert not np.allclose(FeatureSpace(3).factors, FeatureSpace(4).factors)
    for a, b in zip(tiles(seed=5), tiles(seed=5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_features_are_as_large_as_those_of_ctranspath():
    mean = np.mean([np.abs(tiles(seed=s)[0]).mean() for s in range(5)])
    assert 0.7 < mean < 0.9


def test_tissues_have_their_shares_and_lie_together():
    kinds, near, far = [], [], []
    for seed in range(20):
        feats, coords = tiles(count=200, seed=seed)
        kind = nearest(feats)
        kinds.append(kind)
        distance = np.abs(coords[:, None] - coords).sum(-1)
        same = kind[:, None] == kind
        near.append(same[distance == 256].mean())
        far.append(same[distance > 0].mean())
    shares = np.bincount(np.concatenate(kinds), minlength=len(TISSUES)) / 4000
    np.testing.assert_allclose(shares, MIXED.shares, atol=0.025)
    assert np.mean(near) > np.mean(far) + 0.25


@pytest.mark.parametrize("name", ["biomarker", "clone", "growth"])
def test_tumour_tiles_move_along_their_directions_by_the_shift_in_sd(name):
    shift = {"tumour_shift": 6.0} if name == "biomarker" else {"signature_shift": 0.5}
    share = {"biomarker": 0.5 * 0.3, "clone": 0.5 * 0.2, "growth": 0.5}[name]
    tissue = replace(MIXED, growth=1.0 if name == "growth" else 0.0)
    tissue = replace(tissue, clone=0.0) if name == "growth" else tissue
    by = {"biomarker": 6.0, "clone": 4 * 0.5, "growth": 0.5}[name]
    before = tiles(tissue, 800)[0]
    moved = tiles(tissue, 800, replace(NONE, **shift))[0] - before
    is_moved = np.abs(moved).max(1) > 1e-9
    assert is_moved.mean() == pytest.approx(share, abs=0.04)
    direction = getattr(SPACE, name) @ SPACE.factors[TISSUES.index("TUM")]
    np.testing.assert_allclose(
        moved[is_moved], np.tile(by * direction, (is_moved.sum(), 1)), atol=1e-9
    )
    # In units of what tumour tiles vary by along it: least squares gives each tile's score.
    tumour = before[nearest(before) == 0] - SPACE.offset - SPACE.centroids[0]
    scores = np.linalg.lstsq(SPACE.factors[0].T, tumour.T, rcond=None)[0]
    assert np.std(getattr(SPACE, name) @ scores) == pytest.approx(1, abs=0.12)


def test_tiles_of_a_slide_share_its_batch_effect_and_slides_differ():
    shifts = replace(NONE, batch_effect=0.5)
    moved = [tiles(shifts=shifts, seed=s)[0] - tiles(seed=s)[0] for s in range(12)]
    for one in moved:
        np.testing.assert_allclose(one, np.broadcast_to(one[0], one.shape), atol=1e-9)
    assert np.std([one[0] for one in moved]) == pytest.approx(0.5, rel=0.2)
    assert np.linalg.matrix_rank([one[0] for one in moved], tol=1e-6) == 8


def test_another_site_scales_and_moves_every_feature():
    here = tiles()[0]
    there = tiles(shifts=replace(NONE, domain_shift=0.5), external=True)[0]
    slope, intercept = 1 + 0.2 * 0.5 * SPACE.domain_gain, 0.5 * SPACE.domain
    np.testing.assert_allclose(there, here * slope + intercept, atol=1e-9)
    np.testing.assert_array_equal(tiles(shifts=replace(NONE, domain_shift=0.5))[0], here)
