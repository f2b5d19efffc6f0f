"""Networks by name, with one of timm's smallest, which takes 256 px and gives 256 features."""

import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from examples.pathology.common.errors import UserError
from examples.pathology.extractors.checkpoints import CheckpointError, file_sha256
from examples.pathology.extractors.choose import make_extractor
from examples.pathology.extractors.extractor import Normalise

NAME = "mobilevitv2_050"


@pytest.fixture(scope="module")
def trained():
    """A network with a head, as people publish them."""
    torch.manual_seed(5)
    return timm.create_model(NAME, pretrained=False, num_classes=7).eval()


def tiles(count=2, px=224, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, px // 8, px // 8, 3), dtype=np.uint8)
    return np.repeat(np.repeat(small, 8, axis=1), 8, axis=2)


def features(extractor, pixels):
    with torch.inference_mode():
        return extractor.model(extractor.transform(torch.from_numpy(pixels)))


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_a_timm_model_gives_what_timm_gives(end, trained, tmp_path):
    path = tmp_path / f"weights.{end}"
    if end == "pth":
        torch.save({"state_dict": trained.state_dict()}, path)
    else:
        save_file(trained.state_dict(), path)
    extractor = make_extractor(f"timm:{NAME}", path)
    assert extractor.identifier == f"timm:{NAME}"
    assert extractor.weights_sha256 == file_sha256(path)
    config = timm.data.resolve_model_data_config(trained)
    # timm's own transform, but for its crop: tiles are whole, and no part of one is thrown away
    reference = timm.data.create_transform(**(config | {"crop_pct": 1.0}))
    pixels = tiles()
    images = torch.stack([reference(Image.fromarray(tile)) for tile in pixels])
    with torch.inference_mode():
        expected = trained.forward_head(trained.forward_features(images), pre_logits=True)
    ours = features(extractor, pixels)
    assert ours.shape == (2, trained.num_features)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)  # PIL rounds to 8 bits
    assert not extractor.model.training


def test_tiles_of_the_right_size_are_only_scaled():
    pixels = tiles(px=64)
    done = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (64, 64))(torch.from_numpy(pixels))
    reference = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))]
    )
    expected = torch.stack([reference(Image.fromarray(tile)) for tile in pixels])
    torch.testing.assert_close(done, expected)


def test_random_weights_are_seeded_said_and_leave_the_callers_generator_alone(caplog):
    caplog.set_level(logging.WARNING)
    before = torch.get_rng_state()
    first, second, third = (make_extractor(f"timm:{NAME}", None, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert (first.identifier, first.weights_sha256) == (f"timm:{NAME}-random-seed1", None)
    pixels = tiles()
    torch.testing.assert_close(features(first, pixels), features(second, pixels), rtol=0, atol=0)
    assert (features(first, pixels) - features(third, pixels)).abs().max() > 0.01
    assert f"{NAME} has RANDOM weights (seed 1)" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ctranspth", "Did you mean `ctranspath`"),
        ("timm:vit_smal_patch16_224", r"has no 'vit_smal_patch16_224'\. Did you mean `vit_small"),
        ("uni", "must be ctranspath or timm:NAME, but got 'uni'"),
    ],
)
def test_unknown_names_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        make_extractor(name, None)


def test_networks_without_one_vector_per_tile_are_refused(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, global_pool="", **k))
    with pytest.raises(
        UserError, match=r"one vector per tile, but mobilevitv2_050 gives \(256, 8, 8\)"
    ):
        make_extractor(f"timm:{NAME}", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("stem.bn.bias"),
            r"entries of mobilevitv2_050, but .* lacks 1 \(stem\.bn\.bias\)",
        ),
        (
            lambda s: s.update({"more": torch.zeros(2)}),
            r"has other ones: 1 \(more\)\. Nothing was loaded",
        ),
        (
            lambda s: s.update({"stem.bn.bias": torch.zeros(3)}),
            r"`stem\.bn\.bias` must have the shape \(16,\), but .* it has \(3,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, words, trained, tmp_path):
    state = dict(trained.state_dict())
    change(state)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=words):
        make_extractor(f"timm:{NAME}", tmp_path / "wrong.pth")


def test_a_truncated_safetensors_file_is_refused(trained, tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is truncated or damaged"):
        make_extractor(f"timm:{NAME}", path)
