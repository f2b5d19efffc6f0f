"""Feature files: one ``.h5`` per slide, readable by STAMP and by us.

Layout (all but the prefix ``mtbalance_`` is as in STAMP, so that its readers accept the file):

- ``feats`` float16 ``(n, 768)``, ``coords`` float32 ``(n, 2)``: x and y of each tile's top-left
  corner in um, ``augmented`` bool ``(n,)``, all False;
- attributes ``extractor``, ``unit="um"``, ``tile_size=256.0``, ``tile_size_um=256.0``,
  ``tile_size_px=224``, ``feat_type="tile"``, ``stamp_version="2.0.0"``;
- with ``layout="stamp-v1"`` instead ``coords`` int64 in pixels of which a tile has 224, 256 um
  each; of these attributes only ``extractor`` and ``tile_size=224.0``;
- our provenance: ``mtbalance_version``, ``mtbalance_weights_sha256``, ``mtbalance_random_weights``,
  ``mtbalance_parameters`` (JSON) and more; ``mtbalance_simulated``, a sentence, where no network
  made the features but a program.
"""

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from examples.pathology.common.errors import UserError, one_line
from examples.pathology.common.files import DAMAGED, write_bytes
from examples.pathology.features.kind import FeatureKind
from examples.pathology.settings.extract import LAYOUTS, TILE_PX, TILE_UM

FEATURE_NAMES = ("feats", "features", "patch_embeddings")
"""Names under which STAMP, TRIDENT/CLAM and others store the features."""


class UnavailableError(UserError):
    """A feature file may be sound, but cannot be read now; nobody is left out because of it."""


@dataclass(frozen=True)
class OfSlide:
    """What a feature file of ours says of its slide; those of other tools do not tell.

    Attributes:
        name: Its path in the folder of slides; empty if the file does not tell.
        size_px: Its width and height in pixels.
        mpp: Microns per pixel along x, and along y, which earlier releases leave out.
        mpp_source: Where they came from, as in `Mpp`.
    """

    name: str = ""
    size_px: tuple[int, int] | None = None
    mpp: tuple[float, ...] = ()
    mpp_source: str = ""


@dataclass(frozen=True)
class Bag:
    """The features of one slide.

    Attributes:
        feats: Tile features, ``(n, d)`` float32; d is 768 for CTransPath.
        coords_um: x and y of each tile's top-left corner in um, ``(n, 2)`` float32. NaN where the
            file gives pixels of an unknown size (TRIDENT and CLAM store no microns per pixel).
        kind: What made them.
        slide: What the file says of the slide.
    """

    feats: npt.NDArray[np.float32]
    coords_um: npt.NDArray[np.float32]
    kind: FeatureKind
    slide: OfSlide = OfSlide()


def read_features(path: Path, *, mpp: float | tuple[float, float] | None = None) -> Bag:
    """Read a feature file of ours, of STAMP (v1 and v2), of TRIDENT or of CLAM.

    Args:
        path: The ``.h5`` file.
        mpp: Microns per pixel of the slide, where they are known from elsewhere, along x and y, or
            one number for both: TRIDENT and CLAM count coordinates in the slide's pixels and do not
            store how large these are.

    Returns:
        The slide's features with coordinates in um.

    Raises:
        UserError: If the file is missing, not HDF5 or holds no usable features; it is named.
        UnavailableError: If another process writes it, or the system does not let us read it.
    """
    path = Path(path)
    try:
        with open_features(path) as file:
            return _read_open(file, path, (mpp, mpp) if isinstance(mpp, (int, float)) else mpp)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"The feature file must hold numbers as features, coordinates and sizes, but {path} "
            f"does not ({one_line(error)}). Extract the slide again."
        ) from error
    except OSError as error:
        raise UserError(
            f"The feature file must be a complete HDF5 file, but {path} is not ({error}). "
            "If it is not being written or copied, extract the slide again."
        ) from error


@contextmanager
def open_features(path: Path) -> Iterator[h5py.File]:
    """Open a feature file for reading; an `OSError` within means that it is damaged.

    Raises:
        UserError: The file does not exist.
        UnavailableError: Another process writes it, or the system does not let us read it.
    """
    try:
        if not path.is_file():
            raise UserError(
                f"The feature file must exist, but {path} does not. Run `extract` first."
            )
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        if isinstance(error, BlockingIOError) or "already open for" in str(error):
            raise UnavailableError(
                f"The feature file must not be open for writing, but {path} is in use by another "
                "process. Wait for it and run the command again; where none is at work, "
                "`h5clear --status` makes the file readable."
            ) from error
        if error.errno is not None:  # what is wrong with the content of a file has no number
            raise UnavailableError(
                f"The feature file must be readable, but for {path} the system says: "
                f"{os.strerror(error.errno)}."
            ) from error
        raise


def _read_open(file: h5py.File, path: Path, mpp: tuple[float, float] | None) -> Bag:
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
    um_per_unit, tile_um, tile_px = _geometry(file, name, coords, attributes, extractor, mpp)
    return Bag(
        feats=feats,
        coords_um=(coords * np.array(um_per_unit)).astype(np.float32),
        kind=FeatureKind(
            in_features=feats.shape[1],
            extractor=extractor,
            weights_sha256=_text(attributes.get("mtbalance_weights_sha256", "")) or None,
            tile_size_um=tile_um,
            random_weights=bool(attributes.get("mtbalance_random_weights", False)),
            simulated=_text(attributes.get("mtbalance_simulated", "")),
            tile_size_px=None if tile_px is None else int(tile_px),
            magnification=_magnification(file["coords"].attrs),
        ),
        slide=_of_slide({name: attributes.get(f"mtbalance_slide{name}") for name in _OF_SLIDE}),
    )


_OF_SLIDE = ("", "_width_px", "_height_px", "_mpp", "_mpp_y", "_mpp_source")


def _of_slide(said: Mapping[str, Any]) -> OfSlide:
    """Return what attributes say of the slide, `None` where they do not."""
    size_px = said["_width_px"], said["_height_px"]
    mpp = said["_mpp"], said["_mpp_y"]
    return OfSlide(
        name=_text(said[""] or ""),
        size_px=None if None in size_px else (int(size_px[0]), int(size_px[1])),
        mpp=tuple(float(value) for value in mpp if value is not None),
        mpp_source=_text(said["_mpp_source"] or ""),
    )


def _geometry(
    file: h5py.File,
    feature_name: str,
    coords: npt.NDArray[Any],
    attributes: Mapping[str, Any],
    extractor: str,
    mpp: tuple[float, float] | None,
) -> tuple[tuple[float, float], float | None, float | None]:
    """Return the um per unit along x and y (NaN: unknown), and a tile's edge in um and px."""
    stored = attributes.get("tile_size_um", attributes.get("tile_size"))
    if "tile_size_um" in attributes or _text(attributes.get("unit", "")) == "um":
        um = None if stored is None else float(stored)
        return (1.0, 1.0), um, attributes.get("tile_size_px")
    if feature_name == "feats" and _is_stamp_v1(coords, attributes, extractor):
        return (TILE_UM / TILE_PX,) * 2, TILE_UM, TILE_PX
    sizes = file["coords"].attrs  # TRIDENT's
    level0 = sizes.get("patch_size_level0")
    tile_um = None if level0 is None or mpp is None else float(level0) * mpp[0]  # edges are along x
    return mpp or (math.nan, math.nan), tile_um, sizes.get("patch_size")


def _magnification(sizes: Mapping[str, Any]) -> float | None:
    """Return at which magnification TRIDENT saw the tiles; None where that is not told."""
    if (target := _positive(sizes.get("target_magnification"))) is not None:
        return target
    names = ("level0_magnification", "patch_size", "patch_size_level0")
    level0, px, px_level0 = (_positive(sizes.get(name)) for name in names)
    if level0 is None or px is None or px_level0 is None:
        return None
    return float(f"{level0 * px / px_level0:.3g}")  # TRIDENT cuts fractions of a pixel off


def _positive(value: Any) -> float | None:
    """Return a number above 0; None for whatever stands there where it is not known."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _is_stamp_v1(coords: npt.NDArray[Any], attributes: Mapping[str, Any], extractor: str) -> bool:
    if round(float(attributes.get("tile_size", 0))) == TILE_PX:
        return True
    if extractor.startswith(("STAMP-extract", "marugoto", "xiyuewang-ctranspath")):
        return True  # also right for a bag of one tile, which has no stride to measure
    strides = [step for axis in coords.T for step in np.diff(np.unique(axis))]
    return bool(strides) and round(float(min(strides))) == TILE_PX


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
    tile_size_um: float = TILE_UM,
    tile_size_px: int = TILE_PX,
    layout: str = "stamp-v2",
    simulated: str = "",
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
        tile_size_um: Edge of a tile on the slide in um.
        tile_size_px: Edge of a tile in pixels.
        layout: ``stamp-v2``, which all readers but the strictest take, or ``stamp-v1``: whole
            pixels of which a tile has `tile_size_px`, and no word of microns.
        simulated: A sentence that says so, if the features are simulated.
        provenance: More attributes; their names get the prefix ``mtbalance_``.

    Raises:
        UserError: If the shapes do not belong together, or a feature is too large for float16.
        OutputError: Nothing can be written any more, since the disk is full, say.
    """
    if layout not in LAYOUTS:
        raise UserError(f"`layout` must be one of {', '.join(LAYOUTS)}, but got {layout!r}.")
    stored = np.asarray(feats).astype(np.float16)
    coords: npt.NDArray[Any] = np.asarray(coords_um, dtype=np.float32)
    if stored.ndim != 2 or coords.shape != (len(stored), 2):
        raise UserError(
            f"`feats` must be (n, d) and `coords_um` (n, 2), but got {stored.shape} and "
            f"{coords.shape}."
        )
    if not np.isfinite(stored).all():
        raise UserError(f"`feats` must be finite and below 65504, but those for {path} are not.")
    ours = {
        "weights_sha256": weights_sha256 or "",
        "random_weights": random_weights,
        **({"simulated": simulated} if simulated else {}),
        **(provenance or {}),
    }
    attributes = {"extractor": extractor, **{f"mtbalance_{k}": v for k, v in ours.items()}}
    if layout == "stamp-v1":
        coords = np.rint(coords * (tile_size_px / tile_size_um)).astype(np.int64)
        # STAMP v1 writes no size. With it, v2 and we know the unit of a single tile too.
        attributes["tile_size"] = float(tile_size_px)
    else:
        attributes |= {
            "unit": "um",
            "tile_size": tile_size_um,
            "tile_size_um": tile_size_um,
            "tile_size_px": tile_size_px,
            "feat_type": "tile",
            "stamp_version": "2.0.0",
        }
    # In memory first: HDF5 that cannot flush a file to a full disk takes the process with it.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["feats"] = stored
        file["coords"] = coords
        file["augmented"] = np.zeros(len(stored), dtype=bool)
        file.attrs.update(attributes)
    write_bytes(path, buffer.getbuffer())
