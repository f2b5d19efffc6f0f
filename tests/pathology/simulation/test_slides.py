import filecmp

import cv2
import numpy as np
import openslide
import pandas as pd
import pytest

from examples.pathology.common.errors import UserError
from examples.pathology.simulation.slides import (
    TissueTraits,
    draw_slide,
    make_slide_cohort,
    write_pyramid,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_slide_cohort(tmp_path_factory.mktemp("cohort"), patients=5, seed=3)


def test_the_tables_fit_together_and_say_that_they_are_synthetic(cohort):
    clini = pd.read_csv(cohort.clini)
    slides = pd.read_csv(cohort.slide_table)
    assert list(clini) == ["PATIENT", cohort.target, cohort.auxiliary, "Source"]
    assert list(slides) == ["PATIENT", "FILENAME"]
    assert len(clini) == cohort.n_patients == 5
    assert clini["PATIENT"].is_unique
    assert set(clini[cohort.target]) == {"MSIH", "nonMSIH"}
    assert clini[cohort.auxiliary].isna().sum() == 1
    assert clini[cohort.auxiliary].dropna().between(0, 1).all()
    assert set(clini["Source"]) == {"synthetic"}
    assert "SYNTHETIC" in (cohort.folder / "README.txt").read_text()
    assert set(slides["PATIENT"]) == set(clini["PATIENT"])
    assert slides["PATIENT"].duplicated().sum() == 1  # one patient in five has two slides
    files = {path.stem for path in cohort.slides.iterdir()}
    assert files == set(slides["FILENAME"])
    assert len(slides) == cohort.n_slides == 6


def test_openslide_opens_the_slides(cohort):
    for path in cohort.slides.glob("*.tif"):
        slide = openslide.OpenSlide(path)
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        assert "SYNTHETIC" in slide.properties["openslide.comment"]
        corner = np.asarray(slide.read_region((0, 0), 2, (40, 40)).convert("RGB"))
        assert corner.mean() > 240  # glass
        slide.close()


def test_the_same_seed_gives_the_same_bytes(cohort, tmp_path):
    again = make_slide_cohort(tmp_path, patients=5, seed=3)
    names = [str(path.relative_to(cohort.folder)) for path in cohort.folder.rglob("*.*")]
    assert len(names) == 9
    same, *_ = filecmp.cmpfiles(cohort.folder, again.folder, names, shallow=False)
    assert sorted(same) == sorted(names)


def test_another_seed_gives_other_slides(cohort, tmp_path):
    other = make_slide_cohort(tmp_path, patients=2, seed=4)
    assert not filecmp.cmp(
        cohort.slides / "SYN-001-1.tif", other.slides / "SYN-001-1.tif", shallow=False
    )


def test_one_patient_is_not_a_cohort(tmp_path):
    with pytest.raises(UserError, match=r"`patients` must be at least 2 .* but got 1"):
        make_slide_cohort(tmp_path, patients=1, seed=0)


def round_dark_blobs(pixels):
    """Count dark, round spots of 5 to 8 um by connected components."""
    dark = (cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) < 62).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(dark)
    area, width, height = stats[1:, 4], stats[1:, 2], stats[1:, 3]
    return int(((area > 60) & (area < 200) & (np.abs(width - height) <= 3)).sum())


def test_lymphocytes_mucin_and_pallor_are_drawn_as_asked():
    def draw(**traits):
        plain = {"lymphocytes_per_mm2": 200.0, "mucin_share": 0.0, "gland_pallor": 0.0}
        return draw_slide(TissueTraits(**(plain | traits)), np.random.default_rng(1))

    base = draw()
    few, many = (round_dark_blobs(draw(lymphocytes_per_mm2=n)) for n in (200.0, 2000.0))
    assert many > 5 * few > 50
    bluish = [
        np.mean((image[..., 2] > image[..., 0] + 8) & (image.min(axis=2) > 180))
        for image in (base, draw(mucin_share=1.0))
    ]
    assert bluish[1] > bluish[0] + 0.1
    purple = [np.mean(image[..., 1] < 125) for image in (base, draw(gland_pallor=1.0))]
    assert purple[1] < 0.7 * purple[0]


@pytest.mark.parametrize("shape", [(700, 300, 3), (256, 512, 3), (41, 43, 3)])
def test_the_pyramid_holds_the_pixels(shape, tmp_path):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    pixels = np.stack([rows % 256, columns % 256, np.full_like(rows, 90)], axis=-1) // 2 + 60
    write_pyramid(tmp_path / "a.tif", pixels.astype(np.uint8), mpp=0.25)
    slide = openslide.OpenSlide(tmp_path / "a.tif")
    assert slide.dimensions == (shape[1], shape[0])
    assert slide.level_count == 3
    assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.25)
    read = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
    assert np.abs(read - pixels).mean() < 3
    half = np.asarray(slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB"))
    small = cv2.resize(pixels.astype(np.uint8), slide.level_dimensions[1])
    assert np.abs(half.astype(int) - small).mean() < 6
    slide.close()
