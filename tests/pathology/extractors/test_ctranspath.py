import logging
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.pathology.extractors import ctranspath as module
from examples.pathology.extractors.checkpoints import CheckpointError, file_sha256
from examples.pathology.extractors.ctranspath import (
    IMAGENET,
    ctranspath,
    ctranspath_extractor,
    verify_weights,
)

DATA = Path(__file__).parents[1] / "data"


def entry(name, shape):
    """Return the seeded value of one entry of the checkpoint, as its recipe says."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith("relative_position_index"):
        # Offset between two cells of the 7 x 7 window, -6 to 6 on each axis, counted in base 13.
        row, column = np.divmod(np.arange(49), 7)
        offset = 13 * (row[:, None] - row + 6) + (column[:, None] - column + 6)
        return torch.from_numpy(offset.astype(np.int64))
    if name.endswith("attn_mask"):
        return attention_mask({64: 56, 16: 28, 4: 14}[shape[0]])
    random = np.random.RandomState((zlib.crc32(name.encode()) + 1337) % 2**32)
    normal = random.standard_normal(shape)
    if name.endswith("running_var"):
        value = 0.5 + random.random_sample(shape)
    elif name.endswith("running_mean"):
        value = 0.2 * normal
    elif name.endswith("relative_position_bias_table"):
        value = 0.5 * normal
    elif len(shape) > 1:
        value = normal / np.sqrt(np.prod(shape[1:]))
    else:
        value = 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def attention_mask(edge):
    """Return -100 where two cells of a window, shifted by 3, were not neighbours before."""
    zone = np.digitize(np.arange(edge), [edge - 7, edge - 3])
    region = 3 * zone[:, None] + zone
    windows = [
        region[y : y + 7, x : x + 7].reshape(-1)
        for y in range(0, edge, 7)
        for x in range(0, edge, 7)
    ]
    masks = [np.where(window[:, None] == window, 0.0, -100.0) for window in windows]
    return torch.from_numpy(np.stack(masks).astype(np.float32))


def tiles():
    """Return six tiles (6, 224, 224, 3) uint8: coarse squares with noise; the last one is white."""
    random = np.random.RandomState(2024)
    squares = random.randint(0, 256, (6, 14, 14, 3)).repeat(16, axis=1).repeat(16, axis=2)
    noisy = np.clip(squares + random.randint(-40, 41, (6, 224, 224, 3)), 0, 255)
    noisy[5] = 255
    return torch.from_numpy(noisy.astype(np.uint8))


@pytest.fixture(scope="module")
def state():
    lines = (DATA / "keys.txt").read_text(encoding="utf-8").splitlines()
    entries = (line.split("\t") for line in lines)
    return {
        name: entry(name, tuple(int(n) for n in shape.strip("()").split(",") if n.strip()))
        for name, _, shape in entries
    }


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ctranspath.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return ctranspath(checkpoint)


def test_features_equal_those_of_the_authors_network(model, state):
    golden = np.load(DATA / "golden_feats.npz")["feats"]
    assert len(state) == 200
    with torch.inference_mode():
        feats = model(IMAGENET(tiles()[:3])).numpy()
    assert feats.shape == golden.shape == (3, 768)
    np.testing.assert_allclose(feats, golden, rtol=0, atol=1e-5)


def test_the_model_is_ready_to_use(model):
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == 27_520_038
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 29  # 2 in each of 12 blocks, 3 mergings, the stem's and the last
    assert {norm.eps for norm in norms} == {1e-5}  # timm's own default is 1e-6


def test_the_transform_is_that_of_imagenet():
    tile = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    done = IMAGENET(torch.from_numpy(tile)).numpy()
    assert done.shape == (1, 3, 224, 224)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        done[0, :, 1, 2], (tile[0, 1, 2] / 255 - mean) / std, rtol=1e-5, atol=1e-6
    )


def test_features_do_not_depend_on_the_batch(model):
    batch = IMAGENET(tiles()[:2])
    with torch.inference_mode():
        torch.testing.assert_close(model(batch)[1:], model(batch[1:]), rtol=0, atol=1e-6)


def test_a_checkpoint_without_wrapper_head_and_masks_loads_too(state, checkpoint, model, tmp_path):
    bare = {name: value for name, value in state.items() if not name.endswith("attn_mask")}
    bare |= {"head.weight": torch.zeros(2, 768), "head.bias": torch.zeros(2)}
    torch.save(bare, tmp_path / "bare.pth")
    other = ctranspath(tmp_path / "bare.pth").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def renamed(state):
    value = state.pop("layers.1.downsample.reduction.weight")
    state["layers.1.downsample.shrink.weight"] = value


def transposed(state):
    state["layers.0.blocks.0.attn.qkv.weight"] = state["layers.0.blocks.0.attn.qkv.weight"].T


def stock_swin(state):  # an ordinary Swin-T: one convolution as patch embedding
    for name in [name for name in state if name.startswith("patch_embed.proj")]:
        del state[name]
    state["patch_embed.proj.weight"] = torch.zeros(96, 3, 4, 4)
    state["patch_embed.proj.bias"] = torch.zeros(96)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("norm.bias"), r"wrong\.pth lacks 1 \(norm\.bias\)\."),
        (
            renamed,
            r"lacks 1 \(layers\.1\.downsample\.reduction\.weight\) and has other ones: 1",
        ),
        (transposed, r"`layers\.0\.blocks\.0\.attn\.qkv\.weight` must have the shape \(288, 96\)"),
        (
            stock_swin,
            r"lacks 14 .*has other ones: 2 \(patch_embed\.proj\.bias, patch_embed\.proj\.weight\)",
        ),
        (
            lambda s: s.update({"norm.bias": torch.full((768,), float("nan"))}),
            r"`norm\.bias` must be finite",
        ),
        (
            lambda s: s.update(
                {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49).long()}
            ),
            "must be that of a 7 x 7 window",
        ),
    ],
)
def test_checkpoints_of_another_layout_are_refused(change, words, state, tmp_path):
    wrong = dict(state)
    change(wrong)
    path = tmp_path / "wrong.pth"
    torch.save({"model": wrong}, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        ctranspath(path)
    assert str(path) in str(caught.value)
    assert "Nothing was loaded" in str(caught.value)


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_checkpoint_is_named_and_not_run(protocol, tmp_path):
    trap = {"norm.bias": torch.zeros(768), "z": Trap(tmp_path / "ran")}
    torch.save({"model": trap}, tmp_path / "zip.pth", pickle_protocol=protocol)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(trap["z"], protocol=protocol))
    for name in ("zip.pth", "plain.pth"):
        words = rf"tensors only, but .*{name} would run code when opened \(`\w+\.mkdir`\)"
        with pytest.raises(CheckpointError, match=words):
            ctranspath(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # the trap does work
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_truncated_checkpoints_are_refused(share, checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.pth is truncated") as caught:
        ctranspath(tmp_path / "cut.pth")
    assert str(caught.value).endswith("Download it again.")
    assert str(caught.value).count(". ") == 1


def test_files_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must exist"):
        ctranspath(tmp_path / "none.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"holds\s+list"):
        ctranspath(tmp_path / "list.pth")
    torch.save({"model": {"norm.bias": 3}}, tmp_path / "number.pth")
    with pytest.raises(CheckpointError, match=r"in .*number\.pth `norm\.bias` is int"):
        ctranspath(tmp_path / "number.pth")
    (tmp_path / "page.pth").write_text("<html>Google Drive: quota exceeded</html>")
    with pytest.raises(
        CheckpointError, match=r"page\.pth is not a checkpoint: it begins with b'<h'"
    ):
        ctranspath(tmp_path / "page.pth")


def test_random_weights_are_seeded_and_leave_the_callers_generator_alone(caplog):
    caplog.set_level(logging.WARNING)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = ctranspath(None, seed=5)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    second, third = ctranspath(None, seed=5), ctranspath(None, seed=6)
    x = IMAGENET(tiles()[:1])
    with torch.inference_mode():
        torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
        assert (first(x) - third(x)).abs().max() > 0.1
    assert "RANDOM weights (seed 5)" in caplog.text


def test_random_weights_can_not_be_mistaken_for_the_released_ones(checkpoint, caplog):
    random = ctranspath_extractor(None, seed=2)
    assert random.identifier == "ctranspath-random-seed2"
    assert random.weights_sha256 is None
    caplog.set_level(logging.WARNING)
    loaded = ctranspath_extractor(checkpoint)
    assert loaded.identifier == "ctranspath"
    assert loaded.weights_sha256 == file_sha256(checkpoint)
    assert "is not the released checkpoint" in caplog.text


def test_the_verdict_tells_the_released_checkpoint_from_others(checkpoint, monkeypatch):
    # The released file cannot lie here: the checkpoint of the same layout takes its place.
    verdict = verify_weights(checkpoint)
    assert not verdict.released
    assert "can be used, but is not the released checkpoint" in verdict.sentence
    assert file_sha256(checkpoint) in verdict.sentence
    monkeypatch.setattr(module, "CHIEF_SHA256", file_sha256(checkpoint))
    assert "the copy that comes with CHIEF" in verify_weights(checkpoint).sentence
    monkeypatch.setattr(module, "RELEASED_SHA256", file_sha256(checkpoint))
    verdict = verify_weights(checkpoint)
    assert verdict.released
    assert "is the released CTransPath checkpoint" in verdict.sentence


def test_no_verdict_on_what_cannot_be_loaded(state, tmp_path, monkeypatch):
    wrong = dict(state)
    del wrong["norm.bias"]
    torch.save(wrong, tmp_path / "wrong.pth")
    # Not even the right checksum makes an unusable file a good one.
    monkeypatch.setattr(module, "RELEASED_SHA256", file_sha256(tmp_path / "wrong.pth"))
    with pytest.raises(CheckpointError, match=r"lacks 1 \(norm\.bias\)"):
        verify_weights(tmp_path / "wrong.pth")


def test_the_checksum_is_the_one_of_the_system(tmp_path):
    # FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == expected
