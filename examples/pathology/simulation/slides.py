"""Synthetic H&E-like slides with a known truth, for the demo and the tests.

Each patient has a latent inflammation and a label; both are planted in the tissue: MSI-high
patients tend to have more lymphocytes (small, dark, round nuclei), more mucin and paler glands.
Every effect overlaps between the classes, and stain and anatomy vary from slide to slide, so that
the label can be learned but not read off. Nothing here comes from a patient.
"""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import tifffile
from tqdm import tqdm

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import write_bytes, write_text
from examples.pathology.tables.reading import FILENAME, PATIENT
from examples.pathology.tables.writing import write_table

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

MPP = 0.5
"""Microns per pixel of the synthetic slides, as a 20x scanner gives."""

TARGET, AUXILIARY = "isMSIH", "Leukocyte Fraction"
TIFF_TILE_PX = 256
PYRAMID_LEVELS = 3
GLASS = (247, 246, 247)
"""Colour of the empty slide."""

NOTICE = (
    "Everything in this folder is SYNTHETIC. The slides are drawn by a program, the patients do\n"
    "not exist, and the label and the auxiliary target were planted in the drawing. Results on\n"
    "them say whether the pipeline works; they say nothing about biology.\n"
)


@dataclass(frozen=True)
class SlideCohort:
    """Where a synthetic cohort lies and what is in it.

    Attributes:
        slides: The folder with the slide files.
        clini: Clinical table with columns PATIENT, `target`, `auxiliary` and Source.
        slide_table: Slide table with columns PATIENT and FILENAME (stem of the slide file).
        target: Name of the label column, with values MSIH and nonMSIH.
        auxiliary: Name of the continuous column; some values are missing.
        n_slides: Some patients have two.
    """

    folder: Path
    slides: Path
    clini: Path
    slide_table: Path
    target: str
    auxiliary: str
    n_patients: int
    n_slides: int


@dataclass(frozen=True)
class TissueTraits:
    """What the tissue of one patient looks like.

    Attributes:
        lymphocytes_per_mm2: Density of small, dark, round nuclei in the stroma.
        mucin_share: Share of the glands that are pools of pale mucin instead.
        gland_pallor: 0 for dark purple gland walls, 1 for pale ones.
    """

    lymphocytes_per_mm2: float
    mucin_share: float
    gland_pallor: float


def make_slide_cohort(out: Path, *, patients: int, seed: int) -> SlideCohort:
    """Draw a cohort of small synthetic slides with the tables that belong to it.

    Two calls with the same arguments write the same bytes.

    Args:
        out: Folder to write to; made if missing.
        patients: Number of patients, at least 2; about 40 % of them are MSI-high.
        seed: Seed of everything random.

    Raises:
        UserError: If there are fewer than 2 patients.
    """
    if patients < 2:
        raise UserError(f"`patients` must be at least 2 (one per class), but got {patients}.")
    clinical, traits, counts = _sample_patients(patients, np.random.default_rng([seed, 0]))
    folder = out / "slides"
    slides = []
    for index, name in enumerate(tqdm(clinical[PATIENT], desc="drawing slides", unit="patient")):
        for number in range(counts[index]):
            stem = f"{name}-{number + 1}"
            pixels = draw_slide(traits[index], np.random.default_rng([seed, 1, index, number]))
            write_pyramid(folder / f"{stem}.tif", pixels, mpp=MPP)
            slides.append((name, stem))
    write_table(out / "clini.csv", clinical)
    write_table(out / "slides.csv", pd.DataFrame(slides, columns=[PATIENT, FILENAME]))
    write_text(out / "README.txt", NOTICE)
    logger.info("%d synthetic patients with %d slides are in %s.", patients, len(slides), out)
    return SlideCohort(
        folder=out,
        slides=folder,
        clini=out / "clini.csv",
        slide_table=out / "slides.csv",
        target=TARGET,
        auxiliary=AUXILIARY,
        n_patients=patients,
        n_slides=len(slides),
    )


def _sample_patients(
    patients: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, list[TissueTraits], list[int]]:
    """Sample the clinical table, what is planted in each patient, and how many slides there are."""
    positives = np.zeros(patients, dtype=bool)
    positives[: max(1, round(0.4 * patients))] = True
    rng.shuffle(positives)
    inflammation = 1.3 * positives + _spread(positives, rng)
    fraction = np.clip(_squash(inflammation - 1.2) * 0.6 + rng.normal(0, 0.02, patients), 0.01, 0.9)
    fraction[rng.permutation(patients)[: max(1, patients // 12)]] = np.nan
    two_slides = set(rng.permutation(patients)[: max(1, patients // 5)].tolist())
    mucin = np.clip(0.15 + 0.15 * positives + 0.10 * _spread(positives, rng), 0.0, 0.8)
    pallor = np.clip(0.30 + 0.25 * positives + 0.20 * _spread(positives, rng), 0.0, 1.0)
    columns = {
        PATIENT: [f"SYN-{i + 1:03d}" for i in range(patients)],
        TARGET: np.where(positives, "MSIH", "nonMSIH"),
        AUXILIARY: np.round(fraction, 4),
        "Source": "synthetic",
    }
    lymphocytes = [150 + 3000 * _squash(each - 0.8) for each in inflammation]
    traits = [TissueTraits(*map(float, t)) for t in zip(lymphocytes, mucin, pallor, strict=True)]
    return pd.DataFrame(columns), traits, [2 if i in two_slides else 1 for i in range(patients)]


def _spread(positives: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return standard normal quantiles, evenly spread within each class and shuffled.

    Independent draws would make the classes differ much in one small cohort and hardly in another.
    """
    spread = np.empty(len(positives))
    for members in (np.flatnonzero(positives), np.flatnonzero(~positives)):
        levels = (np.arange(len(members)) + 0.5) / len(members)
        spread[members] = rng.permutation([NormalDist().inv_cdf(level) for level in levels])
    return spread


def _squash(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def draw_slide(traits: TissueTraits, rng: np.random.Generator) -> Image:
    """Draw one piece of tissue on glass.

    Returns:
        RGB pixels at 0.5 um each, ``(h, w, 3)`` with edges of 1700 to 2400 px.
    """
    height, width = (4 * int(value) for value in rng.integers(425, 601, 2))
    # Stain differs from laboratory to laboratory; it must not tell the label.
    pink = np.array([226, 168, 196]) + rng.normal(0, 6, 3)
    purple = np.array([150, 100, 165]) + rng.normal(0, 6, 3)
    nucleus = np.array([78, 52, 112]) + rng.normal(0, 6, 3)

    tissue = _blob(height, width, rng)
    fibres = _fibres(height, width, rng)
    image = np.clip(pink + 16 * fibres[..., None], 0, 255).astype(np.uint8)
    stroma = tissue.copy()
    area_mm2 = float(np.count_nonzero(tissue)) * (MPP / 1000) ** 2

    for x, y in _points(tissue, round(45 * area_mm2), rng):
        if rng.random() < traits.mucin_share:
            _draw_mucin(image, stroma, x, y, rng)
        else:
            pale = purple + traits.gland_pallor * 0.45 * (pink - purple)
            _draw_gland(image, stroma, x, y, pale, nucleus, rng)
    for x, y in _points(stroma, round(500 * area_mm2), rng):  # fibroblasts: thin and long
        axes = (int(rng.integers(8, 13)), int(rng.integers(2, 4)))
        _draw_ellipse(image, x, y, axes, float(rng.uniform(0, 180)), nucleus + 25)
    lymphocytes = rng.poisson(traits.lymphocytes_per_mm2 * area_mm2)
    for x, y in _points(stroma, lymphocytes, rng):
        radius = int(rng.integers(5, 8))  # 5 to 7 um across
        _draw_ellipse(image, x, y, (radius, radius), 0.0, nucleus - 18 + rng.normal(0, 6))

    image[tissue == 0] = GLASS
    image[:] = cv2.GaussianBlur(image, (0, 0), 0.8)  # optics are never sharper than this
    # A repeated patch of noise looks the same as fresh noise and costs a tenth.
    patch = rng.normal(0, 2.0, (512, 512, 1))
    noise = np.tile(patch, (height // 512 + 1, width // 512 + 1, 1))[:height, :width]
    noise[tissue == 0] *= 0.3
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _blob(height: int, width: int, rng: np.random.Generator) -> Image:
    """Return a mask (h, w) of one piece of tissue with a ragged outline; 1 is tissue."""
    rows, columns = np.mgrid[-1:1:64j, -1:1:64j]
    bumps = cv2.GaussianBlur(rng.standard_normal((64, 64)), (0, 0), 6)
    radius = np.hypot(rows / 0.93, columns / 0.93) ** 1.5 + 0.12 * bumps / bumps.std()
    smooth = cv2.resize(radius, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth < 1.0, dtype=np.uint8)


def _fibres(height: int, width: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return a wavy texture (h, w) of standard deviation 1, like collagen."""
    noise = rng.standard_normal((height // 3, width // 3)).astype(np.float32)
    long = cv2.GaussianBlur(noise, (0, 0), sigmaX=9, sigmaY=1.2)
    coarse = cv2.resize(
        rng.standard_normal((height // 150 + 2, width // 150 + 2)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    texture = cv2.resize(long / long.std(), (width, height), interpolation=cv2.INTER_LINEAR)
    shift = np.float32(12) * coarse  # bends the fibres
    columns, rows = np.meshgrid(
        np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    )
    bent = cv2.remap(texture, columns, rows + shift, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)
    return np.asarray(0.9 * bent + 0.4 * coarse, dtype=np.float32)


def _points(mask: Image, count: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield up to `count` random positions (x, y) where the mask is set."""
    height, width = mask.shape
    share = max(float(mask.mean()), 0.01)
    tries = round(count / share)
    xs, ys = rng.integers(0, width, tries), rng.integers(0, height, tries)
    inside = np.flatnonzero(mask[ys, xs])[:count]
    yield from zip(xs[inside].tolist(), ys[inside].tolist(), strict=True)


def _draw_ellipse(
    image: Image,
    x: int,
    y: int,
    axes: tuple[int, int],
    angle: float,
    colour: npt.NDArray[np.float64],
) -> None:
    shade = tuple(float(value) for value in np.clip(colour, 0, 255))
    cv2.ellipse(image, (x, y), axes, angle, 0, 360, shade, -1, cv2.LINE_AA)


def _draw_gland(
    image: Image,
    stroma: Image,
    x: int,
    y: int,
    wall: npt.NDArray[np.float64],
    nucleus: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> None:
    """Draw a gland: a ring of cells with nuclei at its foot round an empty lumen."""
    a, b = (int(value) for value in rng.integers(60, 120, 2))
    angle = float(rng.uniform(0, 180))
    _draw_ellipse(image, x, y, (a, b), angle, wall)
    lumen = (round(a * 0.42), round(b * 0.42))
    _draw_ellipse(image, x, y, lumen, angle, np.array([238.0, 228.0, 238.0]))
    cv2.ellipse(stroma, (x, y), (a + 6, b + 6), angle, 0, 360, 0, -1)
    turn = np.deg2rad(angle)
    count = round((a + b) / 5)
    for t in np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.normal(0, 0.03, count):
        u, v = 0.8 * a * np.cos(t), 0.8 * b * np.sin(t)
        px = round(x + u * np.cos(turn) - v * np.sin(turn))
        py = round(y + u * np.sin(turn) + v * np.cos(turn))
        outwards = float(np.rad2deg(np.arctan2(py - y, px - x)))
        _draw_ellipse(image, px, py, (10, 5), outwards, nucleus + rng.normal(10, 6))


def _draw_mucin(image: Image, stroma: Image, x: int, y: int, rng: np.random.Generator) -> None:
    """Draw a pool of mucin: pale, bluish, with a few strands."""
    a, b = (int(value) for value in rng.integers(70, 140, 2))
    angle = float(rng.uniform(0, 180))
    _draw_ellipse(image, x, y, (a, b), angle, np.array([212.0, 208.0, 228.0]))
    cv2.ellipse(stroma, (x, y), (a, b), angle, 0, 360, 0, -1)
    for scale in rng.uniform(0.3, 0.9, 3):
        axes = (round(a * scale), round(b * scale))
        start = float(rng.uniform(0, 360))
        shade = (192.0, 188.0, 216.0)
        cv2.ellipse(image, (x, y), axes, angle, start, start + 120, shade, 2, cv2.LINE_AA)


def write_pyramid(path: Path, pixels: Image, *, mpp: float) -> None:
    """Write a tiled, losslessly compressed, three-level TIFF that OpenSlide opens.

    Args:
        path: Where to; an existing file is replaced.
        pixels: RGB, ``(h, w, 3)``.
        mpp: Microns per pixel of the largest level; stored as a resolution in centimetres.
    """
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for level in range(PYRAMID_LEVELS):
            if level:
                size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
            per_cm = 10_000 / (mpp * 2**level)
            file.write(
                pixels,
                photometric="rgb",
                compression="zlib",
                compressionargs={"level": 1},  # twice as fast as the default, a tenth larger
                tile=(TIFF_TILE_PX, TIFF_TILE_PX),
                subfiletype=int(level > 0),  # a smaller copy of the first image
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                description="SYNTHETIC slide, drawn by a program",
                software="mtbalance",
                metadata=None,
            )
    write_bytes(path, buffer.getbuffer())
