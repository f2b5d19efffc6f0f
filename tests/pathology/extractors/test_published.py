"""The networks of docs/extractors.md: each block is a command that builds what the table says."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from examples.pathology.cli import main
from examples.pathology.extractors.checkpoints import CheckpointError
from examples.pathology.extractors.choose import make_extractor
from examples.pathology.features import extract

COMMAND = ("extract", "--slides", "s", "--out", "o")
PAGE = (Path(__file__).parents[3] / "docs" / "extractors.md").read_text(encoding="utf-8")
BLOCKS = dict(
    re.findall(r"^([^\n]+?)(?:,[^,\n]* as it is)?:\n\n```toml\n(.*?)```", PAGE, re.M | re.S)
)
ROWS = {
    cells[0]: cells
    for line in PAGE.splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 6
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = {
    "H-optimus-0": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "Kaiko S/16": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation, as their authors scale tiles."""

NETWORKS = {name: text for names, text in BLOCKS.items() for name in names.split(" and ")}


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Return what the command reads from a block."""
    asked = []

    def read(text):
        (tmp_path / "network.toml").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as caught:
            main([*COMMAND, "--config", str(tmp_path / "network.toml")])
        assert caught.value.code == 0
        return asked[-1]

    class Summary:
        exit_code = 0

    monkeypatch.setattr(extract, "run_extract", lambda config: (asked.append(config), Summary)[1])
    return read


def test_every_network_of_the_table_has_a_block():
    assert {"network", "---", "CTransPath", *NETWORKS} == ROWS.keys()


@pytest.mark.parametrize("names", BLOCKS)
def test_networks_have_the_size_that_the_table_says(names, settings):
    config = settings(BLOCKS[names])
    name = names.split(" and ")[0]
    _, tile, width, parameters, *_ = ROWS[name]
    with torch.device("meta"):  # shapes without numbers: the largest would fill 4.5 GB
        extractor = make_extractor(config.extractor, None, 0, config.extractor_option)
        features = extractor.model(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, int(width))
    assert sum(p.numel() for p in extractor.model.parameters()) == int(parameters.replace(",", ""))
    transform = extractor.transform
    assert transform.size_px == (224, 224)
    assert (transform.mean, transform.std) == COLOURS.get(name, IMAGENET)
    if tile != "not verified":
        um, px = re.match(r"(\d+) um, (\d+) px", tile).groups()
        assert (config.rules.tile_size_um, config.rules.tile_size_px) == (int(um), int(px))


def test_what_timm_saves_of_a_published_network_loads_and_gives_the_same(settings, tmp_path):
    config = settings(NETWORKS["Kaiko S/16"])
    torch.manual_seed(1)
    model = timm.create_model(config.extractor.removeprefix("timm:"), num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    extractor = make_extractor(config.extractor, tmp_path / "model.safetensors", 0, ())
    tiles = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model((tiles.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        torch.testing.assert_close(extractor.model(extractor.transform(tiles)), expected)
    theirs = {f"vit.{name}": value for name, value in model.state_dict().items()}
    save_file(theirs, tmp_path / "transformers.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 150 .*has other ones: 150 \(vit\.blocks"):
        make_extractor(config.extractor, tmp_path / "transformers.safetensors", 0, ())
