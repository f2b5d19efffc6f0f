import time

import numpy as np
import pytest
import torch
from torch import nn

from examples.pathology.extractors.extractor import Extractor
from examples.pathology.features.inference import Clock, batches, infer, place
from examples.pathology.features.ledger import FEATURES, TILING
from examples.pathology.slides.tiling import TileBlock


class Affine(nn.Module):
    """A linear map of the mean colours; notes how it is called."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.calls = []

    def forward(self, tiles):
        autocast = torch.is_autocast_enabled("cpu")
        self.calls.append((len(tiles), autocast, torch.is_inference_mode_enabled()))
        return nn.functional.linear(tiles.mean(dim=(1, 2)), self.weight)


def scale(tiles):
    return tiles.float() / 255


def make(precision="float32", batch_size=4):
    model = Affine()
    return place(
        Extractor(model, scale, "affine", None), torch.device("cpu"), precision, batch_size
    ), model


def blocks(seed=0):
    """Three blocks of a 4 x 5 grid, in the order of squares, not of rows."""
    rng = np.random.default_rng(seed)
    for places in ([[0, 0], [0, 1], [1, 0]], [[0, 3], [1, 2], [1, 4]], [[3, 1]]):
        pixels = rng.integers(0, 256, (len(places), 6, 6, 3), dtype=np.uint8)
        yield TileBlock(np.array(places), pixels, np.ones(len(places)))


def test_features_belong_to_their_tiles_and_come_row_by_row():
    network, model = make()
    feats, positions = infer(blocks(), network, Clock())
    order = [[0, 0], [0, 1], [0, 3], [1, 0], [1, 2], [1, 4], [3, 1]]
    assert positions.tolist() == order
    weight = model.weight.detach().double().numpy()
    expected = {
        tuple(place): weight @ (tile / 255).mean(axis=(0, 1))
        for block in blocks()
        for place, tile in zip(block.positions, block.pixels, strict=True)
    }
    assert feats.dtype == np.float16
    np.testing.assert_allclose(feats, [expected[tuple(p)] for p in order], atol=2e-3)
    assert model.calls == [(4, False, True), (3, False, True)]


def test_bfloat16_is_autocast_and_close():
    exact, _ = infer(blocks(), make()[0], Clock())
    network, model = make("bfloat16")
    rough, _ = infer(blocks(), network, Clock())
    assert model.calls == [(4, True, True), (3, True, True)]
    assert model.weight.dtype == torch.float32
    assert 0 < np.abs(exact.astype(float) - rough).max() < 0.03  # 8 bits of 1 to 2


def test_a_slide_without_tissue_has_no_features():
    feats, positions = infer(iter(()), make()[0], Clock())
    assert (len(feats), positions.shape) == (0, (0, 2))


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_blocks_are_regrouped_and_nothing_is_lost(size, sizes):
    found = list(batches(blocks(), size))
    assert [len(pixels) for pixels, _ in found] == sizes
    np.testing.assert_array_equal(
        np.concatenate([pixels for pixels, _ in found]),
        np.concatenate([block.pixels for block in blocks()]),
    )
    np.testing.assert_array_equal(
        np.concatenate([places for _, places in found]),
        np.concatenate([block.positions for block in blocks()]),
    )


def test_a_cpu_gets_small_batches():
    assert make(batch_size=64)[0].batch_size == 8
    assert make(batch_size=2)[0].batch_size == 2


def test_the_clock_tells_waiting_from_working():
    class Slow(Affine):
        def forward(self, tiles):
            time.sleep(0.05)
            return super().forward(tiles)

    def late():
        time.sleep(0.1)
        yield from blocks()

    network = place(Extractor(Slow(), scale, "slow", None), torch.device("cpu"), "float32", 4)
    clock = Clock()
    advanced = []
    infer(late(), network, clock, advanced.append)
    clock.enter(clock.stage)
    assert clock.seconds[TILING] >= 0.1
    assert clock.seconds[FEATURES] >= 0.1  # two batches
    assert advanced == [4, 3]
    with clock.stopped():
        before = dict(clock.seconds)
        time.sleep(0.05)
    clock.enter(TILING)
    clock.enter(FEATURES)
    assert clock.seconds[FEATURES] - before[FEATURES] < 0.05
    assert clock.seconds[TILING] - before[TILING] < 0.05
