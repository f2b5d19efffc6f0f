"""Options of timm's networks: what reaches them, what is refused, what goes into the name."""

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models import VisionTransformer
from torchvision.transforms import functional as vision

from examples.pathology.common.errors import UserError
from examples.pathology.extractors.checkpoints import CheckpointError
from examples.pathology.extractors.choose import make_extractor

NAME = "timm:vit_tiny_patch16_224"
SMALL = ("img_size=32", "depth=2", "embed_dim=24", "num_heads=2")
VIRCHOW2 = (
    *SMALL, "reg_tokens=4", "init_values=1e-5", "mlp_ratio=5.3375", "mlp_layer=SwiGLUPacked",
    "act_layer=SiLU",
)  # fmt: skip
"""The shape of Virchow2, but small."""


def vision_transformer(**options):
    """What timm's own class gives, with every entry drawn: those of a new one may be all alike."""
    generator = torch.Generator().manual_seed(3)
    shape = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**shape, **options).eval()
    state = {
        k: torch.randn(v.shape, generator=generator) / 3 for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def virchow2():
    layers = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    more = {"reg_tokens": 4, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": ""}
    return vision_transformer(**layers, **more)


def tiles(px=32, count=2):
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (count, px, px, 3), dtype=np.uint8))


def features(extractor, pixels):
    with torch.inference_mode():
        return extractor.model(extractor.transform(pixels))


def named(*options):
    return make_extractor(NAME, None, 0, (*SMALL, *options)).identifier


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_class_token_and_mean_of_patches_leave_registers_out(file, virchow2, tmp_path):
    state = virchow2.state_dict()
    assert {"reg_token", "pos_embed", "blocks.0.ls1.gamma"} <= state.keys()
    assert state["pos_embed"].shape == (1, 1 + 4 + 4, 24)  # class, registers, 2 x 2 patches
    save = save_file if file.endswith("safetensors") else torch.save
    save(state, tmp_path / file)
    extractor = make_extractor(NAME, tmp_path / file, 0, (*VIRCHOW2, "pool=cls_mean"))
    pixels = tiles()
    scaled = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5  # as timm describes this name
    with torch.inference_mode():
        tokens = virchow2(scaled)  # class, 4 registers, 4 patches
    expected = [[*row[0], *(sum(row[5:]) / 4)] for row in tokens]
    found = features(extractor, pixels)
    assert found.shape == (2, 48)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    alone = make_extractor(NAME, tmp_path / file, 0, VIRCHOW2)
    torch.testing.assert_close(features(alone, pixels), tokens[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("reg_token"), r"lacks 1 \(reg_token\)\. Nothing was loaded"),
        (lambda s: s.update(more=torch.zeros(1)), r"has other ones: 1 \(more\)\. Nothing"),
        (
            lambda s: s.update(pos_embed=s["pos_embed"][:, 4:]),
            r"`pos_embed` must have the shape \(1, 9, 24\), but .* it has \(1, 5, 24\)",
        ),
        (
            lambda s: s.update(reg_token=s["reg_token"] * torch.nan),
            r"`reg_token` must be finite",
        ),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(change, words, virchow2, tmp_path):
    state = dict(virchow2.state_dict())
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        make_extractor(NAME, tmp_path / "pytorch_model.bin", 0, VIRCHOW2)


@pytest.mark.parametrize(
    "left_out", ["reg_tokens=4", "init_values=1e-5", "mlp_ratio=5.3375", "mlp_layer=SwiGLUPacked"]
)
def test_options_of_the_shape_are_needed_to_load(left_out, virchow2, tmp_path):
    torch.save(virchow2.state_dict(), tmp_path / "a.bin")
    options = [option for option in VIRCHOW2 if option != left_out]
    with pytest.raises(CheckpointError, match="Nothing was loaded"):
        make_extractor(NAME, tmp_path / "a.bin", 0, options)


def test_the_name_tells_options_apart_and_not_how_they_were_given():
    options = ("mlp_ratio=4.0", "init_values=0.00001", "dynamic_img_size=TRUE", "std=1,0.5,1")
    names = {named(*order) for order in itertools.permutations(options)}
    names.add(named("init_values=1e-05", "mlp_ratio = 4", "dynamic_img_size=true", "std=(1,.5,1)"))
    expected = (
        f"{NAME} depth=2 dynamic_img_size=True embed_dim=24 img_size=32 init_values=1e-05 "
        "mlp_ratio=4 num_heads=2 std=(1, 0.5, 1)-random-seed0"
    )
    assert names == {expected}
    others = [
        (), ("reg_tokens=1",), ("reg_tokens=2",), ("pool=cls_mean",), ("global_pool=avg",),
        ("mean=0,0,0",), ("std=1,1,1",), ("interpolation=bilinear",), ("act_layer=SiLU",),
    ]  # fmt: skip
    assert len({named(*each) for each in others}) == len(others)
    assert make_extractor("timm:mobilevitv2_050", None).identifier == (
        "timm:mobilevitv2_050-random-seed0"
    )


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_colours_and_interpolation_are_those_of_the_options(mode):
    options = ("mean=0.7,0.6,0.5", "std=0.2,0.25,0.5", f"interpolation={mode}")
    extractor = make_extractor(NAME, None, 0, (*SMALL, *options))
    (pixels,) = tiles(224, 1)
    picture = Image.fromarray(pixels.numpy()).resize((32, 32), getattr(Image, mode.upper()))
    expected = vision.normalize(
        vision.to_tensor(picture), (0.7, 0.6, 0.5), (0.2, 0.25, 0.5)
    )  # Pillow rounds to 8 bits
    found = extractor.transform(pixels[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255 / 0.2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["depth"], "must be depth=VALUE, a number, true, false or a word, but got 'depth'"),
        (["=3"], "must be KEY=VALUE"),
        (["depth="], "must be depth=VALUE, a number, true, false or a word, but got"),
        (["depth=2*2"], r"must be depth=VALUE, a number, .* but got 'depth=2\*2'"),
        (["depth=__import__('os')"], "must be depth=VALUE, a number"),
        (["depth=2", "depth=3"], "each key once .*, but got 'depth=3'"),
        (["pretrained=true"], "none that is set already, but got 'pretrained=true'"),
        (["checkpoint_path=w"], "none that is set already"),
        (["features_only=true"], "none that is set already"),
        (["num_classes=3"], "none that is set already"),
        (["mlp_layer=SwiGLUPaked"], "mlp_layer=VALUE, one of GELU, .* Did you mean `SwiGLUPacked`"),
        (["act_layer=eval"], "act_layer=VALUE, one of GELU"),
        (
            ["pool=mean"],
            "pool=VALUE, one of cls_mean, but got 'pool=mean'. Did you mean `cls_mean`",
        ),
        (["interpolation=cubic"], "interpolation=VALUE, one of bicubic, .* Did you mean `bicubic`"),
        (["mean=0.5"], "mean=VALUE, three numbers, but got 'mean=0.5'"),
        (["std=1,1,0"], "std=VALUE, three numbers"),
        (["reg_token=4"], "takes for vit_tiny.*, but it says: .* argument 'reg_token'"),
        (["num_heads=7"], "takes for vit_tiny.*, but it says: .*divisible by num_heads"),
        (["depth=two"], "takes for vit_tiny.*, but it says: "),
        (["pool=cls_mean", "global_pool=avg"], "multiple values .* 'global_pool'"),
        (["pool=cls_mean", "class_token=false"], "has no class token for pool=cls_mean"),
        (["pool=cls_mean", "pool=cls_mean"], "each key once"),
        (["global_pool=token", "class_token=false"], "but it says: "),
    ],
)
def test_wrong_options_are_one_clear_error(options, words):
    with pytest.raises(UserError, match=words) as caught:
        make_extractor(NAME, None, 0, ("img_size=32", "embed_dim=24", *options))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


def test_convolutions_have_no_class_token():
    with pytest.raises(UserError, match="has no class token for pool=cls_mean"):
        make_extractor("timm:mobilevitv2_050", None, 0, ("pool=cls_mean",))


def test_ctranspath_takes_no_options_and_tiles_of_224_px_only():
    with pytest.raises(UserError, match=r"224 px and no options, .* `extractor-option` depth=2"):
        make_extractor("ctranspath", None, 0, ("depth=2",))
    with pytest.raises(UserError, match=r"takes tiles of 224 px .* `tile-px` 256"):
        make_extractor("ctranspath", None, 0, (), 256)


@pytest.mark.parametrize(
    ("name", "options", "px", "size"),
    [
        (NAME, SMALL, 224, 32),  # the default is resampled to what the network takes
        (NAME, SMALL, 32, 32),
        (NAME, (*SMALL, "dynamic_img_size=true"), 64, 64),
        (NAME, (*SMALL[1:], "patch_size=14", "dynamic_img_size=true"), 224, 224),
        ("timm:vit_tiny_patch16_384", SMALL[1:], 224, 384),
        ("timm:mobilevitv2_050", (), 224, 256),
        ("timm:mobilevitv2_050", (), 320, 320),
    ],
)
def test_tiles_go_in_as_they_are_cut_unless_they_have_the_default_size(
    name, options, px, size, caplog
):
    caplog.set_level(logging.WARNING)
    extractor = make_extractor(name, None, 0, options, px)
    scaled = extractor.transform(tiles(px, 1))
    assert scaled.shape == (1, 3, size, size)
    said = f"Tiles of {px} px are resampled to {size} px; --tile-px {size} cuts them so"
    assert (said in caplog.text) == (px != size)
    assert features(extractor, tiles(px, 1)).shape[0] == 1


@pytest.mark.parametrize(("options", "px"), [(SMALL, 64), ((*SMALL, "dynamic_img_size=true"), 40)])
def test_a_size_that_the_network_does_not_take_is_refused(options, px):
    with pytest.raises(UserError, match=rf"`tile-px` \({px}\) must be what timm .*, but it says: "):
        make_extractor(NAME, None, 0, options, px)
