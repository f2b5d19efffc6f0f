"""The pictures are what they say, and no handwritten digit is in two parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from examples.digits.data import Pictures, data_of, overlay, stream
from examples.digits.setting import Setting

SETTING = Setting(pictures=300, held_out=200)
IMAGES, TARGETS = load_digits(return_X_y=True)


@pytest.fixture(scope="module")
def data():
    return data_of(3, SETTING)


def parts(data):
    return [data.train, data.validation, data.test]


def test_no_handwritten_digit_is_in_two_parts(data):
    sources = [set(part.sources.flatten().tolist()) for part in parts(data)]
    assert not sources[0] & sources[1]
    assert not sources[0] & sources[2]
    assert not sources[1] & sources[2]
    assert [len(part) for part in parts(data)] == [300, 200, 200]


def test_all_handwritten_digits_are_used():
    data = data_of(0, replace(SETTING, pictures=20_000, held_out=20_000))
    counts = [part.sources.unique().numel() for part in parts(data)]
    assert counts == [1078, 360, 359]  # 60, 20 and 20 % of 1797


@pytest.mark.parametrize("shift", [0, 2, 5])
def test_pictures_are_made_pixel_by_pixel(shift):
    data = data_of(1, replace(SETTING, shift=shift))
    for part in parts(data):
        for number in range(0, len(part), 60):
            a, b = (IMAGES[i].reshape(8, 8) for i in part.sources[number])
            expected = np.zeros((8 + shift, 8 + shift))
            for y in range(8 + shift):
                for x in range(8 + shift):
                    above = a[y, x] if y < 8 and x < 8 else 0
                    below = b[y - shift, x - shift] if y >= shift and x >= shift else 0
                    expected[y, x] = max(above, below) / 16
            np.testing.assert_allclose(part.pixels[number], expected)


def test_what_is_to_be_told_is_true(data):
    for part in parts(data):
        first, second = part.sources.T.numpy()
        np.testing.assert_array_equal(part.upper_left, TARGETS[first])
        np.testing.assert_array_equal(part.lower_right, TARGETS[second])
        ink = [
            (IMAGES[a].sum() + IMAGES[b].sum()) / 128 for a, b in zip(first, second, strict=True)
        ]
        np.testing.assert_allclose(part.ink, ink, rtol=1e-6)


def test_ink_counts_what_is_hidden():
    full, half = torch.full((1, 8, 8), 16.0), torch.full((1, 8, 8), 8.0)
    picture = overlay(full, half, 0)
    assert picture.mean() == 16
    assert (full.mean() + half.mean()) / 2 == 12


def test_inputs_stay_as_they_are():
    first, second = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    overlay(first, second, 2)
    assert not first.any()


def test_the_scale_of_ink_is_that_of_the_training_part(data):
    mean, deviation = data.ink_scale
    assert mean == pytest.approx(np.mean(data.train.ink.numpy()), rel=1e-5)
    assert deviation == pytest.approx(np.std(data.train.ink.numpy(), ddof=1), rel=1e-5)


def test_a_seed_is_always_the_same_and_no_other(data):
    data_of.cache_clear()
    again, other = data_of(3, SETTING), data_of(4, SETTING)
    assert torch.equal(again.train.pixels, data.train.pixels)
    assert not torch.equal(other.train.sources, data.train.sources)
    assert set(other.test.sources.flatten().tolist()) != set(data.test.sources.flatten().tolist())


def test_streams_differ_by_seed_and_purpose():
    purposes = ("split", "pairs", "weights", "batches", "further")
    seeds = {stream(seed, purpose).initial_seed() for seed in range(20) for purpose in purposes}
    assert len(seeds) == 100


def test_some_pictures_are_pictures(data):
    some = data.train[torch.tensor([5, 7])]
    assert isinstance(some, Pictures)
    assert len(some) == 2
    for name in ("pixels", "upper_left", "lower_right", "ink", "sources"):
        assert torch.equal(getattr(some, name)[1], getattr(data.train, name)[7])
