"""Tiny cohorts on disk: real feature files and tables, with a signal a small model can find."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from examples.pathology.cohort.cohort import Cohort, load_cohort
from examples.pathology.features.files import write_features
from examples.pathology.settings.cohort import CohortConfig
from examples.pathology.settings.crossval import CrossvalConfig


@dataclass(frozen=True)
class Tables:
    """Where a tiny cohort lies."""

    clini: Path
    slides: Path
    features: Path

    def load(
        self, target: str = "isMSIH", auxiliary: tuple[str, ...] = ("LF",), **options: Any
    ) -> Cohort:
        return load_cohort(
            CohortConfig(
                self.clini, self.slides, self.features, target, auxiliary=auxiliary, **options
            )
        )

    def options(self) -> list[str]:
        """Return the options of the command line that name them."""
        paths = {"clini": self.clini, "slide-table": self.slides, "features": self.features}
        return [text for name, path in paths.items() for text in (f"--{name}", str(path))]


def training(**changes: Any) -> CrossvalConfig:
    """Return settings of a fold that is trained by itself, of which the tables do not matter."""
    nowhere = Path("nowhere")
    options = {"device": "cpu", **changes}
    return CrossvalConfig(nowhere, nowhere, nowhere, "isMSIH", nowhere, **options)


def write_bag(path: Path, feats: np.ndarray, *, extractor: str = "tiny", sha: str = "ab") -> None:
    coords = np.stack([np.arange(len(feats)) * 256.0, np.zeros(len(feats))], axis=1)
    write_features(
        path, feats, coords, extractor=extractor, weights_sha256=sha, random_weights=False
    )


def write_trident_bag(path: Path, feats: np.ndarray, magnification: int) -> None:
    """Write a feature file as TRIDENT does, of tiles of 256 px on a slide scanned at 40x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 256 * 40 // magnification
    sizes = {"patch_size": 256, "patch_size_level0": size, "level0_magnification": 40}
    with h5py.File(path, "w") as file:
        file["features"] = feats.astype(np.float32)
        file["coords"] = np.stack([np.arange(len(feats)) * size, np.zeros(len(feats), int)], axis=1)
        file["features"].attrs["encoder"] = "tiny"
        file["coords"].attrs.update({**sizes, "target_magnification": magnification})


def write_table(path: Path, columns: list[str], rows: list[list[object]]) -> Path:
    lines = [",".join(map(str, row)) for row in [columns, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_tables(
    folder: Path,
    *,
    patients: int = 12,
    tiles: int = 4,
    missing: tuple[int, ...] = (3,),
    extra: Mapping[str, list[object]] | None = None,
    seed: int = 0,
) -> Tables:
    """Write patients P00, P01, ... of alternating label; LF is missing for some of them."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    clinical: list[list[object]] = []
    for i in range(patients):
        positive = i % 2 == 0
        fraction = round(float(positive + random.normal()), 3)
        feats = random.normal(size=(tiles, 768)) * 0.5
        feats[:, :16] += 2.0 * positive
        feats[:, 16:32] += fraction
        write_bag(folder / "features" / f"P{i:02d}-1.h5", feats)
        row = [f"P{i:02d}", "MSIH" if positive else "MSS", "" if i in missing else fraction]
        clinical.append([*row, *(column[i] for column in (extra or {}).values())])
    return Tables(
        write_table(folder / "clini.csv", ["PATIENT", "isMSIH", "LF", *(extra or {})], clinical),
        write_table(
            folder / "slides.csv",
            ["PATIENT", "FILENAME"],
            [[f"P{i:02d}", f"P{i:02d}-1"] for i in range(patients)],
        ),
        folder / "features",
    )
