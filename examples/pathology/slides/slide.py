"""Finding slides in a folder, opening them, and reading them in microns instead of pixels."""

import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image, ImageColor

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import walk
from examples.pathology.slides.pictures import Handle, open_handle
from examples.pathology.slides.reading import Source
from examples.pathology.slides.units import Mpp, SlideError, SlideExcludedError, find_mpp
from examples.pathology.tables.matching import FLAT_SUFFIXES, SLIDE_SUFFIXES

logger = logging.getLogger(__name__)

OTHER_SUFFIXES = frozenset(
    (".isyntax", ".j2k", ".jp2", ".jpx", ".lif", ".nd2", ".vsi", ".webp", ".zarr")
)
"""Formats that slides come in and that are not read here."""

WRAPPERS = frozenset(
    (".bz2", ".crdownload", ".filepart", ".gz", ".part", ".partial", ".xz", ".zip")
)
"""What follows the suffix of a slide that is compressed or not yet copied."""

THUMBNAILS = "thumbnails"
"""Where `extract` puts its pictures of slides, which are none."""

LEVEL_TOLERANCE = 0.01
"""A level this little coarser than asked for still counts as fine enough."""


@dataclass(frozen=True)
class SlideFile:
    """A slide in the input folder; a DICOM series of many files is one slide.

    Attributes:
        path: The file to open.
        name: Its path relative to the input folder, for messages and the ledger.
        stem: Path of its outputs relative to the output folder, without suffix.
        problem: Why it cannot be a slide; None if it may be one.
        table_mpp: Its microns per pixel according to the slide table, if any.
    """

    path: Path
    name: str
    stem: str
    problem: str | None = None
    table_mpp: float | None = None


def find_slides(folder: Path, *, skip: Path | None = None) -> list[SlideFile]:
    """List the slides below a folder in alphabetical order.

    Suffixes count in upper and lower case. Formats that are not read, and slides that are
    compressed or half copied, are left out, and one warning counts them by suffix. Two slides that
    would share an output name, such as ``a.svs`` and ``a.tif``, get outputs with the full file
    name, and a warning. Flat pictures are slides, but not beside others of the same name, nor where
    `extract` puts its own.

    Args:
        folder: Where to look, sub-folders included.
        skip: A folder below it to leave out, such as the output folder.

    Returns:
        The slides, and pictures that look like slides but cannot be used, with the reason.

    Raises:
        UserError: If the folder does not exist or holds no slide.
    """
    if not folder.is_dir():
        raise UserError(f"The folder of slides must exist, but {folder} does not.")
    found: list[SlideFile] = []
    unread: Counter[str] = Counter()
    for directory, names in walk(folder, skip):
        inside = directory.relative_to(folder).parts
        if any(part.lower().endswith(".zarr") for part in inside):
            # A folder that is a picture; of those in it, none is a slide.
            unread[".zarr"] += not any(part.lower().endswith(".zarr") for part in inside[:-1])
            continue
        unread.update(filter(None, map(_unread_suffix, names)))
        suffixes = {Path(name).suffix.lower() for name in names}
        # Hamamatsu's .vms slides keep their pixels in .jpg files next to them.
        part_of_others = suffixes & {".vms", ".vmu"} or THUMBNAILS in inside
        dicom = [directory / name for name in names if name.lower().endswith(".dcm")]
        found += _dicom_slides(folder, directory, dicom)
        for name in names:
            path = directory / name
            suffix = path.suffix.lower()
            relative = path.relative_to(folder)
            stem = relative.with_suffix("").as_posix()
            # DICOM files are series, see above.
            if suffix in SLIDE_SUFFIXES - {".dcm"} - (FLAT_SUFFIXES if part_of_others else set()):
                found.append(SlideFile(path, relative.as_posix(), stem))
    if not any(slide.problem is None for slide in found):
        known = " ".join(sorted(SLIDE_SUFFIXES))
        others = f" It holds {_counted(unread)}, which cannot be read." if unread else ""
        raise UserError(f"{folder} must hold slides ({known}), but there are none.{others}")
    if unread:
        logger.warning(
            "%s: %s are left out, since they cannot be read. Unpack them, copy them in "
            "full or convert them to pyramidal TIFFs.",
            folder,
            _counted(unread),
        )
    return sorted(_without_collisions(found), key=lambda slide: slide.name)


def _unread_suffix(name: str) -> str | None:
    """Return the suffix of what looks like a slide but cannot be read; None for all else."""
    *_, inner, suffix = "", "", *(end.lower() for end in Path(name).suffixes)
    if suffix in WRAPPERS and inner in SLIDE_SUFFIXES | OTHER_SUFFIXES:
        return inner + suffix
    return suffix if suffix in OTHER_SUFFIXES else None


def _counted(suffixes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {suffix}" for suffix, count in sorted(suffixes.items()))


def slide_file(path: Path) -> SlideFile:
    """Return a single slide as `find_slides` would list it in the root of the file system.

    Args:
        path: The slide, absolute; of a DICOM series, any file.
    """
    root = Path(path.anchor)
    if path.suffix.lower() == ".dcm":
        uid = _dicom_series(path) or path.stem
        series = sorted(file for file in path.parent.iterdir() if file.suffix.lower() == ".dcm")
        found = list(_dicom_slides(root, path.parent, series))
        return next((slide for slide in found if Path(slide.name).name == uid), found[0])
    relative = path.relative_to(root)
    return SlideFile(path, relative.as_posix(), relative.with_suffix("").as_posix())


def _dicom_slides(root: Path, directory: Path, files: list[Path]) -> Iterator[SlideFile]:
    """Group the DICOM files of one folder by series; each series is one slide."""
    series: dict[str, list[Path]] = defaultdict(list)
    lost = [path for path in files if not os.access(path, os.R_OK)]  # links to nothing, say
    for path in sorted({*files}.difference(lost)):
        series[_dicom_series(path) or path.stem].append(path)
    relative = directory.relative_to(root)
    for uid, members in series.items():
        # Any member opens the series; the largest is sure to be one with pixels.
        path = max(members, key=lambda member: (member.stat().st_size, member.name))
        folder = relative.as_posix() if relative.parts else root.resolve().name
        name = folder if len(series) == 1 else (relative / uid).as_posix()
        yield SlideFile(path, name, name)
    for path in lost:  # each a slide of its own: opening it says why it is none
        name = path.relative_to(root).as_posix()
        yield SlideFile(path, name, name)


def _dicom_series(path: Path) -> str | None:
    """Return the SeriesInstanceUID (0020,000E) of a DICOM file, or None if it has none."""
    # It follows the StudyInstanceUID (0020,000D) at once; that of nested sequences does not.
    with path.open("rb") as file:
        head = file.read(1 << 18)
    uid = rb"[0-9.]{1,64}\x00?"
    explicit = rb"\x20\x00\x0d\x00UI.." + uid + rb"\x20\x00\x0e\x00UI..(" + uid + rb")"
    implicit = rb"\x20\x00\x0d\x00.\x00\x00\x00" + uid + rb"\x20\x00\x0e\x00.\x00\x00\x00("
    found = re.search(explicit, head, re.DOTALL) or re.search(implicit + uid + rb")", head, re.S)
    return found.group(1).rstrip(b"\0").decode() if found else None


def _without_collisions(found: Iterable[SlideFile]) -> Iterator[SlideFile]:
    by_stem: dict[str, list[SlideFile]] = defaultdict(list)
    for slide in found:
        by_stem[slide.stem].append(slide)
    for stem, same in by_stem.items():
        slides = [slide for slide in same if slide.path.suffix.lower() not in FLAT_SUFFIXES] or same
        for picture in (slide for slide in same if slide not in slides):
            problem = f"{picture.name} must be a slide, but is a flat picture beside "
            problem += f"{slides[0].name}, as thumbnails are. Rename it if it is a slide."
            yield replace(picture, stem=picture.name, problem=problem)
        if len(slides) == 1:
            yield slides[0]
            continue
        names = ", ".join(slide.name for slide in slides)
        logger.warning(
            "%s would share the output name %s.h5; theirs keep the full file name instead. "
            "Use it in the slide table.",
            names,
            stem,
        )
        for slide in slides:
            suffix = slide.path.suffix.lower()
            full = slide.name if slide.name.lower().endswith(suffix) else slide.name + suffix
            yield replace(slide, stem=full)


class LevelError(SlideError):
    """A level of the pyramid cannot be decoded.

    Args:
        level: The level.
        message: What happened.
    """

    def __init__(self, level: int, message: str) -> None:
        super().__init__(message)
        self.level = level


@dataclass(frozen=True)
class Picture:
    """A rectangle of a slide, resampled.

    Attributes:
        pixels: RGB, ``(h, w, 3)``.
        lost: Pixels in whose place some of the file's cannot be read, ``(h, w)``; None: all can.
        blurred: Pixels that would look otherwise if those could be read, ``(h, w)``: the lost ones
            and those around them; None: there are none.
    """

    pixels: npt.NDArray[np.uint8]
    lost: npt.NDArray[np.bool_] | None = None
    blurred: npt.NDArray[np.bool_] | None = None


class Slide:
    """An open slide that is read in microns; close it after use.

    Args:
        handle: The open slide, of whatever reader.
        name: Name of the slide, for messages.
        mpp: Size of its level-0 pixels.
        broken_levels: Levels that are known to be unreadable and are passed by.
        path: The file, where there is one.
    """

    def __init__(
        self,
        handle: Handle,
        name: str,
        mpp: Mpp,
        broken_levels: frozenset[int] = frozenset(),
        path: Path | None = None,
    ) -> None:
        self._source = Source(handle, path)
        self._path = path
        self.damage = ""  # where the first damaged pixels were found
        self.broken_levels = broken_levels
        self.name = name
        self.reader: str = getattr(handle, "reader", "OpenSlide")
        self.mpp = mpp
        # After a failed read a handle does not even tell these.
        self._downsamples = tuple(handle.level_downsamples)
        self._dimensions = tuple(handle.level_dimensions)
        self.width_px, self.height_px = self._dimensions[0]
        self.width_um = self.width_px * mpp.x
        self.height_um = self.height_px * mpp.y
        # A checksum of a part of the pixels and of the metadata; OpenSlide makes it on opening.
        self.quickhash = handle.properties.get(openslide.PROPERTY_NAME_QUICKHASH1, "")
        # Where the scanned part begins, in pixels of level 0; QuPath counts them from there.
        sides = (f"openslide.bounds-{side}" for side in ("x", "y", "width", "height"))
        x, y, *size = (int(handle.properties.get(side, -1)) for side in sides)
        self.bounds_px = (x, y) if min(x, y, *size) >= 0 else (0, 0)
        hexcode = handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "FFFFFF")
        self.background: tuple[int, ...] = ImageColor.getrgb(f"#{hexcode.lstrip('#')}")[:3]

    def close(self) -> None:
        """Release the file."""
        self._source.close()

    def bits_per_sample(self) -> int:
        """Return how many bits a file has for each colour, of which we get the upper 8; or 8."""
        if self._path is None:
            return 8
        if self.reader == "Pillow":
            with self._path.open("rb") as file:
                head = file.read(25)
            return head[24] if head.startswith(b"\x89PNG") else 8
        try:
            with tifffile.TiffFile(self._path) as file:
                return int(file.pages.first.bitspersample)
        except Exception:  # noqa: BLE001 - OpenSlide opened it: what is no TIFF is read all the same
            return 8

    def level_for(self, mpp: float) -> int:
        """Return the coarsest level that is at least as fine as `mpp` um/px, or level 0."""
        own = max(self.mpp.x, self.mpp.y)
        fine_enough = [
            level
            for level, downsample in enumerate(self._downsamples)
            if own * downsample <= mpp * (1 + LEVEL_TOLERANCE) and level not in self.broken_levels
        ]
        return max(fine_enough, key=lambda level: self._downsamples[level], default=0)

    def level_mpp(self, level: int) -> float:
        """Return the pixel size of a level in um."""
        return float(max(self.mpp.x, self.mpp.y) * self._downsamples[level])

    def read(
        self, x_um: float, y_um: float, width_um: float, height_um: float, size_px: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """Read a rectangle of the slide, resampled with antialiasing.

        The rectangle need not fall on pixel borders, and pixels around it take part in the
        resampling, so that a tile looks the same alone and as a part of a larger read.

        Args:
            x_um: Left edge in um.
            y_um: Top edge in um.
            width_um: Width in um.
            height_um: Height in um.
            size_px: Width and height of the result in pixels.

        Returns:
            RGB, ``(height, width, 3)``, on the slide's background colour where it is transparent.

        Raises:
            LevelError: If some of the pixels cannot be decoded.
        """
        picture = self.read_around(x_um, y_um, width_um, height_um, size_px)
        if picture.blurred is not None:
            raise LevelError(0, f"The pixels of {self.name} must be readable, but {self.damage}")
        return picture.pixels

    def read_around(
        self, x_um: float, y_um: float, width_um: float, height_um: float, size_px: tuple[int, int]
    ) -> Picture:
        """Read a rectangle as `read` does, and say which pixels of level 0 cannot be read.

        All others are as if those could be. Where a coarser level is damaged, a finer one has the
        same pixels: that is for the caller to do. The arguments are those of `read`.

        Raises:
            LevelError: If a level other than 0 cannot be decoded, or the file not opened anew.
        """
        level = self.level_for(min(width_um / size_px[0], height_um / size_px[1]))
        scale = float(self._downsamples[level])
        limit_x, limit_y = self._dimensions[level]
        x0, x1, box_x = _span(x_um, width_um, self.mpp.x * scale, limit_x, size_px[0])
        y0, y1, box_y = _span(y_um, height_um, self.mpp.y * scale, limit_y, size_px[1])
        try:
            corner, size = (round(x0 * scale), round(y0 * scale)), (x1 - x0, y1 - y0)
            if level == 0:
                region, lost, problem = self._source.read_around(corner, size)
            else:
                region, lost, problem = self._source.read(corner, level, size), None, None
        except openslide.OpenSlideError as error:
            raise LevelError(
                level,
                f"The pixels of {self.name} must be readable, but at ({x_um:.0f}, {y_um:.0f}) um "
                f"of level {level} {self.reader} says: {error}.",
            ) from error
        if np.asarray(region.getchannel("A")).min() < 255:  # few slides have transparent pixels
            canvas = Image.new("RGBA", region.size, (*self.background, 255))
            region = Image.alpha_composite(canvas, region)
        flat = region.convert("RGB")
        box = (box_x[0], box_y[0], box_x[1], box_y[1])
        pixels = np.asarray(flat.resize(size_px, Image.Resampling.BICUBIC, box=box))
        if lost is None or problem is None:
            return Picture(pixels)
        x, y = problem[0] * self.mpp.x, problem[1] * self.mpp.y
        self.damage = self.damage or f"at ({x:.0f}, {y:.0f}) um {self.reader} says: {problem[2]}."
        return Picture(pixels, *_lost_pixels(lost, size_px, box))


def _lost_pixels(
    lost: npt.NDArray[np.bool_], size_px: tuple[int, int], box: tuple[float, float, float, float]
) -> tuple[npt.NDArray[np.bool_] | None, npt.NDArray[np.bool_] | None]:
    """Return what `Picture` has of lost pixels of the file, ``(h, w)``, a box of which is shown."""
    shrunk = max((box[2] - box[0]) / size_px[0], (box[3] - box[1]) / size_px[1], 1.0)
    reach = 2 * math.ceil(2 * shrunk) + 1  # the bicubic kernel looks two pixels far on either side
    spread = cv2.dilate(lost.astype(np.uint8), np.ones((reach, reach), np.uint8))
    masks = (
        np.asarray(
            Image.fromarray(mask.astype(np.float32)).resize(size_px, Image.Resampling.BOX, box=box)
        )
        > 0
        for mask in (lost, spread)
    )
    here, around = (mask if mask.any() else None for mask in masks)
    return here, around


def _span(
    start_um: float, length_um: float, um_per_px: float, limit_px: int, out_px: int
) -> tuple[int, int, tuple[float, float]]:
    """Return which pixels of an axis to read, and where in them the wanted stretch lies."""
    start, stop = start_um / um_per_px, (start_um + length_um) / um_per_px
    # Two output pixels on either side: as far as the bicubic kernel looks.
    margin = math.ceil(2 * max(1.0, (stop - start) / out_px)) + 1
    first = max(0, min(math.floor(start) - margin, limit_px - 1))
    last = max(first + 1, min(math.ceil(stop) + margin, limit_px))
    size = float(last - first)
    inner = min(max(start - first, 0.0), size - 1e-3)
    return first, last, (inner, min(max(stop - first, inner + 1e-3), size))


def open_slide(
    path: Path,
    name: str,
    *,
    table_mpp: float | None = None,
    default_mpp: float | None = None,
    broken_levels: frozenset[int] = frozenset(),
) -> Slide:
    """Open a slide file and find the size of its pixels.

    Args:
        path: The file; for DICOM, any file of the series.
        name: Name of the slide, for messages.
        table_mpp: Its microns per pixel according to the slide table, if any.
        default_mpp: Microns per pixel to assume if the file does not say.
        broken_levels: Levels of the pyramid to pass by.

    Returns:
        The open slide.

    Raises:
        SlideError: If it cannot be opened or its pixel size is unknown or implausible.
    """
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        link = f", and it is a link to {path.readlink()}" if path.is_symlink() else ""
        raise SlideError(
            f"{name} must be readable, but the system says: {error.strerror}{link}."
        ) from error
    if empty:
        raise SlideError(f"{name} must hold a slide, but the file is empty. Copy it again.")
    try:
        handle = open_handle(path, name)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"{name} must be a slide that OpenSlide reads, but it is damaged, incomplete or of "
            f"another format ({error}). Copy it again or convert it to a pyramidal TIFF."
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideError(f"{name} must be readable, but OpenSlide says: {error}.") from error
    try:
        mpp = find_mpp(handle.properties, slide=name, table_mpp=table_mpp, default_mpp=default_mpp)
    except SlideError as error:
        handle.close()
        if path.suffix.lower() in FLAT_SUFFIXES:  # beside slides, it need not be meant as one
            raise SlideExcludedError(str(error)) from error
        raise
    return Slide(handle, name, mpp, broken_levels, path)
