import csv
import json
import re

import h5py
import numpy as np
import pytest
import tifffile
import torch

from examples.pathology.common.errors import UserError
from examples.pathology.features.files import write_features
from examples.pathology.figures.heatmap import Layer, heatmap
from examples.pathology.figures.sheet import Sheet
from examples.pathology.results.folds import read_model
from examples.pathology.runs import heatmap as heatmap_run
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.runs.heatmap import run_heatmap
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.runs import HeatmapConfig
from examples.pathology.simulation.slides import MPP, write_pyramid
from examples.pathology.slides import slide as slides
from examples.pathology.training import tile_values as tile_values_module
from examples.pathology.training.tile_values import tile_values
from tests.pathology.killing import small_models
from tests.pathology.slide_helpers import SHARED, FakeHandle, plain
from tests.pathology.tiny import make_tables, write_table

ROWS, COLUMNS, EDGE = 3, 4, 512  # tiles of 256 um at 0.5 um per pixel
PLANTED = 6  # row 1, column 2


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with small_models():
        yield


def trained(folder, target, **changes):
    tables = make_tables(folder, patients=24, tiles=6)
    config = CrossvalConfig(
        tables.clini,
        tables.slides,
        tables.features,
        target,
        folder / "run",
        folds=2,
        learning_rate=3e-3,
        note="PLANTED signal",
        device="cpu",
        **changes,
    )
    run_crossval(config)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return trained(folder, "isMSIH", auxiliary=("LF",), positive="MSIH", epochs=8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide with one dark tile, and features with the sign of the class in that tile alone."""
    folder = tmp_path_factory.mktemp("slide")
    pixels = np.full((ROWS * EDGE, COLUMNS * EDGE, 3), 220, dtype=np.uint8)
    row, column = divmod(PLANTED, COLUMNS)
    pixels[row * EDGE : (row + 1) * EDGE, column * EDGE : (column + 1) * EDGE] = (120, 40, 130)
    write_pyramid(folder / "a.tif", pixels, mpp=MPP)
    write_tiles(folder / "a.h5")
    return folder


def write_tiles(path, **changes):
    random = np.random.default_rng(0)
    feats = random.normal(size=(ROWS * COLUMNS, 768)) * 0.5
    feats[PLANTED, :16] += 2.0
    grid = np.stack([np.arange(12) % COLUMNS, np.arange(12) // COLUMNS], axis=1)
    values = {"extractor": "tiny", "weights_sha256": "ab", "random_weights": False, **changes}
    coords = values.pop("coords", grid * 256.0)
    write_features(path, feats, coords, **values)


def draw(run, folder, out, **changes):
    values = {"slide": folder / "a.tif", "features": folder / "a.h5", "device": "cpu", **changes}
    return run_heatmap(HeatmapConfig(run=run, out=out, **values))


def test_pixels_of_trident_are_placed_by_the_size_along_each_axis(run, tmp_path):
    pixels = np.full((1024, 1024, 3), (220, 200, 210), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        size = {"resolution": (1e4 / 0.5, 1e4 / 0.54), "resolutionunit": "CENTIMETER"}
        file.write(pixels, photometric="rgb", tile=(256, 256), metadata=None, **size)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=np.ones((2, 768), "f4")).attrs["encoder"] = "tiny"
        coords = file.create_dataset("coords", data=np.array([(0, 0), (512, 512)]))
        coords.attrs["patch_size_level0"] = 512
    draw(run, tmp_path, tmp_path / "out")
    second = np.loadtxt(tmp_path / "out" / "tiles.csv", delimiter=",", skiprows=1)[1]
    np.testing.assert_allclose(second[:2], (512 * 0.5, 512 * 0.54), rtol=1e-4)


def test_the_planted_tile_is_found_where_it_is(run, slide, tmp_path, monkeypatch):
    shown = []
    original = heatmap_run.top_tiles
    monkeypatch.setattr(
        heatmap_run,
        "top_tiles",
        lambda rows, *a, **k: (shown.append(rows), original(rows, *a, **k)),
    )
    value = draw(run, slide, tmp_path, top=3)
    with (tmp_path / "tiles.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    best = max(rows, key=lambda row: row["score"])
    assert (best["x_um"], best["y_um"]) == (2 * 256.0, 1 * 256.0)
    assert best["score"] > 0.5
    assert np.mean([row["attention"] for row in rows]) == pytest.approx(1.0)
    (attention, score) = shown[0]
    assert (attention[0], score[0]) == ("attention", "score")
    assert len(score[1]) == 3
    np.testing.assert_allclose(score[1][0].mean(axis=(0, 1)), (120, 40, 130), atol=3)  # the tile
    np.testing.assert_allclose(score[1][1].mean(axis=(0, 1)), (220, 220, 220), atol=3)
    assert value["tiles"] == 12
    assert value["seconds"] > 0
    assert json.loads((tmp_path / "heatmap.json").read_text(encoding="utf-8")) == value
    for name in ("heatmap", "top-tiles"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def layers(attention, score, name="class score", **options):
    first = Layer("attention", "Attention", np.array(attention), "magma")
    return [first, Layer(name, "Score", np.array(score), **options)]


def test_squares_lie_where_tiles_lie_and_carry_their_values(tmp_path, drawn):
    corners = np.array([[0, 0], [256, 0], [0, 512]], dtype=np.float32)
    heatmap(
        np.zeros((30, 20, 3), dtype=np.uint8), 25.6, corners, 256.0,
        layers([1.0, 2.0, 0.0], [0.1, 0.2, 0.3]),
        Sheet(tmp_path / "x.png", "t"),
    )  # fmt: skip
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    (squares,) = panels[1].collections
    for path, (x, y) in zip(squares.get_paths(), corners / 1000, strict=True):
        np.testing.assert_allclose(path.vertices.min(axis=0), (x, y), atol=1e-6)
        np.testing.assert_allclose(path.vertices.max(axis=0), (x + 0.256, y + 0.256), atol=1e-6)
    np.testing.assert_array_equal(squares.get_array(), [1.0, 2.0, 0.0])
    np.testing.assert_array_equal(panels[2].collections[0].get_array(), [0.1, 0.2, 0.3])
    assert (squares.norm.vmin, squares.norm.vmax) == pytest.approx((0.02, 1.98))
    scores = panels[2].collections[0]
    assert scores.norm.vmax - scores.norm.vmin == pytest.approx(0.196)
    assert panels[0].images[0].get_extent() == [0, 0.512, 0.768, 0]


def test_tiles_that_hardly_differ_do_not_get_all_colours(tmp_path, drawn):
    heatmap(
        np.zeros((30, 20, 3), dtype=np.uint8), 25.6, np.zeros((2, 2), dtype=np.float32), 256.0,
        layers([1.0, 1.0], [0.5, 0.502]),
        Sheet(tmp_path / "x.png", "t"),
    )  # fmt: skip
    for axes, centre in zip(drawn[0].axes[1:3], (1.0, 0.501), strict=True):
        norm = axes.collections[0].norm
        assert (norm.vmin, norm.vmax) == pytest.approx((centre - 0.05, centre + 0.05), abs=1e-3)
    heatmap(
        np.zeros((30, 20, 3), dtype=np.uint8), 25.6, np.zeros((2, 2), dtype=np.float32), 256.0,
        layers([1.0, 1.0], [50.0, 50.2], name="predicted value", least_span=8.0),
        Sheet(tmp_path / "x.png", "t"),
    )  # fmt: skip
    norm = drawn[1].axes[2].collections[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((46.1, 54.1), abs=0.01)
    assert "0.1 (predicted value: 8)." in drawn[1].get_supxlabel().replace("\n", " ")


def test_a_regression_has_values_in_its_unit(slide, tmp_path, monkeypatch):
    figures = []
    for name in ("heatmap", "top_tiles"):
        monkeypatch.setattr(heatmap_run, name, lambda *a, **k: figures.append((a, k)))
    run = trained(tmp_path, "LF", epochs=1)
    value = draw(run, slide, tmp_path / "out", top=2)
    with (tmp_path / "out/tiles.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["x_um", "y_um", "attention", "value", "LF_pred"]
    assert not {"positive", "score_of_the_slide"} & set(value)
    ((*_, shown, sheet), _), ((tiles, *_), _) = figures  # and no more, of one number
    assert f"LF, value of the slide {value['value_of_the_slide']:.3g}" in sheet.title
    assert shown[1].title == "Predicted value of each tile alone"
    assert shown[1].name == "predicted value"
    scalers = [read_model(run / f"fold-{k}/model.pt", "cpu")[0].scalers["LF"] for k in (1, 2)]
    assert shown[1].least_span == pytest.approx(np.mean([s.high - s.low for s in scalers]) / 10)
    assert [name for name, _, _ in tiles] == ["attention", "value"]


@pytest.mark.parametrize("tiles_per_pass", [1, 2, 4096])
def test_values_are_means_over_the_folds_models(run, monkeypatch, tiles_per_pass):
    monkeypatch.setattr(tile_values_module, "TILES_PER_PASS", tiles_per_pass)
    models = [read_model(run / f"fold-{k}/model.pt", "cpu")[0] for k in (1, 2)]
    feats = np.random.default_rng(1).normal(size=(5, 768)).astype(np.float32)
    values = tile_values(models, feats, "cpu")
    with torch.inference_mode():
        for i in range(5):  # one by one
            alone = [m.model(torch.from_numpy(feats[i : i + 1])).outputs[0] for m in models]
            expected = np.mean([float(output.softmax(1)[0, 0]) for output in alone])
            assert values.scores["isMSIH_MSIH"][i] == pytest.approx(expected, abs=1e-6)
        whole = [
            float(m.model(torch.from_numpy(feats)).outputs[0].softmax(1)[0, 0]) for m in models
        ]
        looks = [m.model.attention(torch.from_numpy(feats)).numpy() for m in models]
    assert values.of_slide["isMSIH_MSIH"] == pytest.approx(np.mean(whole), abs=1e-6)
    np.testing.assert_allclose(values.attention, 5 * np.mean(looks, axis=0), rtol=1e-5)


def test_the_slide_table_gives_the_pixel_size_of_a_slide_that_does_not(run, slide, tmp_path):
    pixels = np.full((ROWS * EDGE, COLUMNS * EDGE, 3), 220, dtype=np.uint8)
    (tmp_path / "sub").mkdir()
    write_pyramid(tmp_path / "sub" / "b.tif", pixels, mpp=100.0)  # a placeholder
    table = write_table(tmp_path / "t.csv", ["FILENAME", "MPP"], [["a", 1], ["sub/b.h5", MPP]])
    asked = {"slide": tmp_path / "sub" / "b.tif", "default_mpp": 1.0}
    with pytest.raises(UserError, match=r"has 100 .*in the MPP column of the slide table"):
        draw(run, slide, tmp_path / "out", **asked)
    value = draw(run, slide, tmp_path / "out", slide_table=table, **asked)
    assert value["tiles"] == 12


WIDTH_PX, HEIGHT_PX = COLUMNS * EDGE, ROWS * EDGE


def of_slide(**changes):
    """Return what a feature file of ours says of the slide of these tests."""
    said = {
        "slide": "sub/a.tif",
        "slide_mpp": MPP,
        "slide_mpp_y": MPP,
        "slide_mpp_source": "tiff.XResolution",
        "slide_width_px": WIDTH_PX,
        "slide_height_px": HEIGHT_PX,
    }
    return {"provenance": {**said, **changes}}


def test_features_of_a_slide_of_another_size_are_refused(run, slide, tmp_path):
    write_tiles(tmp_path / "b.h5", **of_slide(slide="b.tif", slide_width_px=WIDTH_PX + 1))
    words = rf"b\.h5 is of b\.tif, a slide of {WIDTH_PX + 1} x {HEIGHT_PX} pixels, and a\.tif has "
    with pytest.raises(UserError, match=words + f"{WIDTH_PX} x {HEIGHT_PX}"):
        draw(run, slide, tmp_path / "out", features=tmp_path / "b.h5")
    assert not (tmp_path / "out" / "heatmap.png").exists()


@pytest.mark.parametrize(
    ("said", "table", "words"),
    [
        ({"slide_mpp": 0.25, "slide_mpp_source": "slide table"}, None, "with 0.25 (from slide tab"),
        ({"slide_mpp": 0.25}, None, "Give a --slide-table that has 0.25 in its MPP column for"),
        ({"slide_mpp": 0.25, "slide_mpp_source": "slide table"}, 0.3, "Write 0.25 in the MPP col"),
        ({"slide_mpp_y": 0.52}, None, "with 0.52 (from tiff.XResolution) and a.tif has 0.5 (from "),
        ({}, 0.3, "Leave its MPP in --slide-table empty, or extract the slide again"),
    ],
)
def test_features_made_with_another_resolution_are_refused(
    run, slide, tmp_path, said, table, words
):
    write_tiles(tmp_path / "a.h5", **of_slide(**said))
    changes = {}
    if table is not None:
        path = write_table(tmp_path / "t.csv", ["FILENAME", "MPP"], [["a", table]])
        changes = {"slide_table": path}
    with pytest.raises(UserError, match=re.escape(words)):
        draw(run, slide, tmp_path / "out", features=tmp_path / "a.h5", **changes)


def test_a_default_that_differs_from_that_of_the_features_is_refused(run, tmp_path, monkeypatch):
    for name in ("heatmap", "top_tiles"):
        monkeypatch.setattr(heatmap_run, name, lambda *_, **__: None)
    pixels = np.full((HEIGHT_PX, WIDTH_PX, 3), 220, dtype=np.uint8)
    write_pyramid(tmp_path / "a.tif", pixels, mpp=25_400 / 72)  # a placeholder
    write_tiles(tmp_path / "a.h5", **of_slide(slide_mpp_source="default"))
    with pytest.raises(UserError, match=r"has 1 \(from default\)\. Give --default-mpp 0\.5, or "):
        draw(run, tmp_path, tmp_path / "out", default_mpp=1.0)
    assert draw(run, tmp_path, tmp_path / "out", default_mpp=0.5)["tiles"] == 12


def test_a_slide_of_another_name_is_drawn_and_told(run, slide, tmp_path, caplog, monkeypatch):
    for name in ("heatmap", "top_tiles"):
        monkeypatch.setattr(heatmap_run, name, lambda *_, **__: None)
    write_tiles(tmp_path / "a.h5", **of_slide())
    draw(run, slide, tmp_path / "out", features=tmp_path / "a.h5")
    assert "drawn over" not in caplog.text  # though it has moved
    write_tiles(tmp_path / "b.h5", **of_slide(slide="b.svs"))
    assert draw(run, slide, tmp_path / "out", features=tmp_path / "b.h5")["tiles"] == 12
    assert "b.h5 is of b.svs; it is drawn over a.tif." in caplog.text


@pytest.mark.parametrize("broken", [(1,), (0, 1)])
def test_a_broken_level_is_replaced_by_a_finer_one(run, slide, tmp_path, monkeypatch, broken):
    size = (COLUMNS * EDGE, ROWS * EDGE)

    def opened(path):
        return FakeHandle(size, plain((200, 150, 180)), (1.0, 4.0), broken=broken)

    monkeypatch.setattr(slides.openslide, "OpenSlide", opened)
    if 0 in broken:
        with pytest.raises(UserError, match=r"`slide` must be readable: .*bad tile"):
            draw(run, slide, tmp_path)
    else:
        assert draw(run, slide, tmp_path)["tiles"] == 12


@pytest.mark.parametrize(("left_out", "origin"), [((), (64, 32)), (("width",), (0, 0))])
def test_qupath_counts_pixels_from_the_bounds(run, slide, tmp_path, monkeypatch, left_out, origin):
    """It crops a slide to them if all four are told."""
    bounds = {"x": "64", "y": "32", "width": "1900", "height": "1400"}
    told = {f"openslide.bounds-{k}": v for k, v in bounds.items() if k not in left_out}
    size = COLUMNS * EDGE, ROWS * EDGE

    def opened(path):
        return FakeHandle(size, plain((200, 150, 180)), properties=told)

    monkeypatch.setattr(slides.openslide, "OpenSlide", opened)
    draw(run, slide, tmp_path, top=1)
    table = np.genfromtxt(tmp_path / "tiles.csv", delimiter=",", names=True, deletechars="")
    text = (tmp_path / "tiles.geojson").read_text(encoding="utf-8")
    features = {f["properties"]["classification"]["name"]: f for f in json.loads(text)["features"]}
    assert list(features) == ["isMSIH = MSIH", "isMSIH = MSS", "LF"]
    for column, feature in zip(
        ("isMSIH_MSIH", "isMSIH_MSS", "LF_pred"), features.values(), strict=True
    ):
        best = table[np.argmax(table[column])]
        assert feature["properties"]["measurements"]["score"] == best[column]
        corners = np.array(feature["geometry"]["coordinates"][0])
        corner_px = np.array([best["x_um"], best["y_um"]]) / 0.5
        np.testing.assert_array_equal(corners.min(axis=0), corner_px - origin)
        np.testing.assert_array_equal(corners.max(axis=0), corner_px + EDGE - origin)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_a_dicom_slide_is_called_after_its_folder_and_drawn_past_its_broken_level(run, tmp_path):
    write_tiles(tmp_path / "a.h5", coords=np.full((12, 2), 256.0))
    path = SHARED / "wsi" / "derived_dicom" / "label_387.dcm"
    value = draw(run, tmp_path, tmp_path / "out", slide=path)
    assert value["slide"] == "derived_dicom"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extractor": "other"}, "the extractor that the model was trained on"),
        ({"coords": np.arange(24.0).reshape(12, 2) * 256}, "must be those of `slide`"),
        ({"coords": np.full((12, 2), np.nan)}, "where its tiles are in um"),
    ],
)
def test_features_that_do_not_fit_are_refused(run, slide, tmp_path, changes, words):
    write_tiles(tmp_path / "b.h5", **changes)
    with pytest.raises(UserError, match=words):
        draw(run, slide, tmp_path / "out", features=tmp_path / "b.h5")


def test_a_slide_that_is_none_is_refused(run, slide, tmp_path):
    (tmp_path / "b.svs").write_bytes(b"no slide")
    for name in ("b.svs", "none.svs", "none.dcm"):
        with pytest.raises(UserError, match="`slide` must be readable"):
            draw(run, slide, tmp_path / "out", slide=tmp_path / name)
