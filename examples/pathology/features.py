"""Feature files: one ``.h5`` per slide, readable by STAMP and by us, and the stage that makes them.

Layout (all but the prefix ``mtbalance_`` is as in STAMP, so that its readers accept the file):

- ``feats`` float16 ``(n, 768)``, ``coords`` float32 ``(n, 2)``: x and y of each tile's top-left
  corner in um, ``augmented`` bool ``(n,)``, all False;
- attributes ``extractor``, ``unit="um"``, ``tile_size=256.0``, ``tile_size_um=256.0``,
  ``tile_size_px=224``, ``feat_type="tile"``, ``stamp_version="2.0.0"``;
- our provenance: ``mtbalance_version``, ``mtbalance_weights_sha256``, ``mtbalance_random_weights``,
  ``mtbalance_parameters`` (JSON) and more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from examples.pathology.errors import UserError
from examples.pathology.files import publish

if TYPE_CHECKING:
    from examples.pathology.tiling import TileRules

logger = logging.getLogger(__name__)

FEATURE_NAMES = ("feats", "features", "patch_embeddings")
"""Names under which STAMP, TRIDENT/CLAM and others store the features."""

V1_TILE_PX = 224
"""STAMP v1 counts coordinates in pixels of which a tile of 256 um has 224."""

TILE_SIZE_UM = 256.0


@dataclass(frozen=True)
class Bag:
    """The features of one slide.

    Attributes:
        feats: Tile features, ``(n, d)`` float32; d is 768 for CTransPath.
        coords_um: x and y of each tile's top-left corner in um, ``(n, 2)`` float32. NaN where the
            file gives pixels of an unknown size (TRIDENT and CLAM store no microns per pixel).
        extractor: Name of the network that made the features; empty if the file does not say.
        weights_sha256: Checksum of its weights; None if unknown or random.
        random_weights: Whether the network had seeded random weights, so that the features carry
            no learned biology.
        path: The file they came from.
    """

    feats: npt.NDArray[np.float32]
    coords_um: npt.NDArray[np.float32]
    extractor: str
    weights_sha256: str | None
    random_weights: bool
    path: Path


def read_features(path: Path) -> Bag:
    """Read a feature file of ours, of STAMP (v1 and v2), of TRIDENT or of CLAM.

    Args:
        path: The ``.h5`` file.

    Returns:
        The slide's features with coordinates in um.

    Raises:
        UserError: If the file is missing, not HDF5 or holds no usable features; it is named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"The feature file must exist, but {path} does not. Run `extract` first.")
    try:
        with h5py.File(path, "r") as file:
            return _read_open(file, path)
    except OSError as error:
        raise UserError(
            f"The feature file must be a complete HDF5 file, but {path} is not ({error}). "
            "Delete it and extract the slide again."
        ) from error


def _read_open(file: h5py.File, path: Path) -> Bag:
    name = next((name for name in FEATURE_NAMES if name in file), None)
    if name is None or "coords" not in file:
        raise UserError(
            f"The feature file must hold `coords` and one of {', '.join(FEATURE_NAMES)}, "
            f"but {path} holds {', '.join(sorted(file)) or 'nothing'}."
        )
    feats = np.asarray(file[name], dtype=np.float32)
    coords = np.asarray(file["coords"])
    if feats.ndim != 2 or coords.shape != (len(feats), 2):
        raise UserError(
            f"`{name}` must be (n, d) and `coords` (n, 2), but {path} has {feats.shape} and "
            f"{coords.shape}."
        )
    if not np.isfinite(feats).all():
        raise UserError(f"`{name}` must be finite, but {path} holds NaN or infinite values.")
    attributes = dict(file.attrs)
    extractor = _text(attributes.get("extractor", file[name].attrs.get("encoder", "")))
    sha256 = _text(attributes.get("mtbalance_weights_sha256", "")) or None
    return Bag(
        feats=feats,
        coords_um=_coords_in_um(coords, name, attributes, extractor, path),
        extractor=extractor,
        weights_sha256=sha256,
        random_weights=bool(attributes.get("mtbalance_random_weights", False)),
        path=path,
    )


def _coords_in_um(
    coords: npt.NDArray[Any],
    feature_name: str,
    attributes: Mapping[str, Any],
    extractor: str,
    path: Path,
) -> npt.NDArray[np.float32]:
    """Bring (n, 2) coordinates of any of the known layouts to um; NaN if that is impossible."""
    if "tile_size_um" in attributes or _text(attributes.get("unit", "")) == "um":
        return np.asarray(coords, dtype=np.float32)
    if feature_name == "feats" and _is_stamp_v1(coords, extractor):
        return (coords / V1_TILE_PX * TILE_SIZE_UM).astype(np.float32)
    logger.debug("%s gives coordinates in pixels of unknown size; they are left out.", path)
    return np.full(coords.shape, np.nan, dtype=np.float32)


def _is_stamp_v1(coords: npt.NDArray[Any], extractor: str) -> bool:
    if extractor.startswith(("STAMP-extract", "marugoto", "xiyuewang-ctranspath")):
        return True  # also right for a bag of one tile, which has no stride to measure
    strides = [step for axis in coords.T for step in np.diff(np.unique(axis))]
    return bool(strides) and round(float(min(strides))) == V1_TILE_PX


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def write_features(
    path: Path,
    feats: npt.NDArray[np.floating[Any]],
    coords_um: npt.NDArray[np.floating[Any]],
    *,
    extractor: str,
    weights_sha256: str | None,
    random_weights: bool,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a feature file; it appears under its name only when complete and on disk.

    Args:
        path: Where to; missing folders are made, an existing file is replaced.
        feats: Tile features, ``(n, d)``; stored as float16.
        coords_um: x and y of the top-left corners in um, ``(n, 2)``.
        extractor: Name of the network.
        weights_sha256: Checksum of its weights, None for random ones.
        random_weights: Whether the weights are random.
        provenance: More attributes; their names get the prefix ``mtbalance_``.

    Raises:
        UserError: If the shapes do not belong together, or a feature is too large for float16.
    """
    stored = np.asarray(feats).astype(np.float16)
    coords = np.asarray(coords_um, dtype=np.float32)
    if stored.ndim != 2 or coords.shape != (len(stored), 2):
        raise UserError(
            f"`feats` must be (n, d) and `coords_um` (n, 2), but got {stored.shape} and "
            f"{coords.shape}."
        )
    if not np.isfinite(stored).all():
        raise UserError(f"`feats` must be finite and below 65504, but those for {path} are not.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # no `.h5` at the end: readers pass it by
    try:
        with h5py.File(temporary, "w") as file:
            file["feats"] = stored
            file["coords"] = coords
            file["augmented"] = np.zeros(len(stored), dtype=bool)
            file.attrs["extractor"] = extractor
            file.attrs["unit"] = "um"
            file.attrs["tile_size"] = TILE_SIZE_UM
            file.attrs["tile_size_um"] = TILE_SIZE_UM
            file.attrs["tile_size_px"] = V1_TILE_PX
            file.attrs["feat_type"] = "tile"
            file.attrs["stamp_version"] = "2.0.0"
            file.attrs["mtbalance_weights_sha256"] = weights_sha256 or ""
            file.attrs["mtbalance_random_weights"] = random_weights
            for name, value in (provenance or {}).items():
                file.attrs[f"mtbalance_{name}"] = value
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class LedgerRow:
    """What became of one slide in one stage.

    Attributes:
        slide: Its path relative to the folder of slides.
        status: ``ok``, ``empty`` (no tissue), ``failed`` or ``excluded`` (not a usable kind).
        reason: Why, unless it is simply ok.
        stage: Name of the stage.
        tiles_total: Whole tiles that fit on the slide; None if it did not get that far.
        tiles_kept: Tiles with features.
        mpp: Microns per pixel of level 0 along x.
        mpp_source: Where that came from.
        seconds: Time spent on the slide; for a finished one, when it was made.
        skipped: Whether an earlier run had finished it.
    """

    slide: str
    status: str
    reason: str = ""
    stage: str = "extract"
    tiles_total: int | None = None
    tiles_kept: int | None = None
    mpp: float | None = None
    mpp_source: str = ""
    seconds: float = 0.0
    skipped: bool = False

    def with_seconds(self, seconds: float) -> LedgerRow:
        """Return the same row with the time rounded to milliseconds."""
        return replace(self, seconds=round(seconds, 3))


@dataclass(frozen=True)
class ExtractSummary:
    """What became of all slides.

    Attributes:
        rows: One row per slide.
        ledger: The file with the same rows.
    """

    rows: tuple[LedgerRow, ...]
    ledger: Path

    def count(self, status: str) -> int:
        """Return the number of slides with this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def slides(self) -> int:
        """Slides and pictures that were found."""
        return len(self.rows)

    @property
    def done(self) -> int:
        """Slides with features, those that an earlier run had finished included."""
        return self.count("ok")

    @property
    def empty(self) -> int:
        """Slides without tissue."""
        return self.count("empty")

    @property
    def excluded(self) -> int:
        """Pictures and slides that the protocol does not cover."""
        return self.count("excluded")

    @property
    def failed(self) -> int:
        """Slides that could not be used."""
        return self.count("failed")

    @property
    def skipped(self) -> int:
        """Slides that an earlier run had finished; they count as done too."""
        return sum(row.skipped for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0 if no slide failed, otherwise 1."""
        return int(self.failed > 0)

    def __str__(self) -> str:
        tiles = sum(row.tiles_kept or 0 for row in self.rows)
        return (
            f"{self.slides} slides: {self.done} with features ({self.skipped} finished before, "
            f"{tiles} tiles in all), {self.empty} empty, {self.excluded} excluded, "
            f"{self.failed} failed. "
            f"Each one is in {self.ledger}."
        )


def extract(
    slides: Path,
    out: Path,
    *,
    weights: Path | None,
    slide_table: Path | None = None,
    default_mpp: float | None = None,
    workers: int = 4,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    tile_rules: TileRules | None = None,
) -> ExtractSummary:
    """Turn a folder of slides into feature files, tile pictures and a ledger.

    Writes ``<out>/<stem>.h5`` (sub-folders kept), ``<out>/thumbnails/<stem>.jpg`` and
    ``<out>/ledger.csv``. Slides that an earlier run finished with the same parameters are left
    alone; with other parameters they are redone, and the log says which changed. A slide that
    cannot be used gets a row in the ledger and never stops the run.

    Args:
        slides: Folder of slides.
        out: Output folder; made if missing.
        weights: CTransPath's checkpoint; None for random weights, which is said in every file.
        slide_table: Table (.csv, .xlsx) whose columns FILENAME and MPP give pixel sizes in um.
        default_mpp: Microns per pixel of slides that do not say.
        workers: Threads that read while the network runs.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of the random weights.
        batch_size: Tiles per call of the network; at most 8 are used on a CPU.
        tile_rules: Tile size and tissue thresholds; None for the protocol's.

    Returns:
        What became of every slide; its `exit_code` is 1 if some failed.

    Raises:
        UserError: If the call is wrong: no slides, unusable weights, a broken table.
    """
    from examples.pathology import extraction, tiling  # reading features needs no torch

    return extraction.run(
        slides,
        out,
        weights=weights,
        slide_table=slide_table,
        default_mpp=default_mpp,
        workers=workers,
        device=device,
        seed=seed,
        batch_size=batch_size,
        rules=tile_rules if tile_rules is not None else tiling.TileRules(),
    )
