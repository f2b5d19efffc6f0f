"""Slide files that OpenSlide does not open, behind the part of its interface that is used here.

OpenSlide comes first. What it does not read of TIFF (strips, newer compressions), tifffile does,
and Pillow reads PNG, JPEG and BMP. The pixels are those that OpenSlide would give.
"""

import itertools
import threading
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image

from examples.pathology.slides.units import SlideError, SlideExcludedError
from examples.pathology.tables.matching import FLAT_SUFFIXES, TIFF_SUFFIXES

MAX_FLAT_PIXELS = 1 << 30
"""Most pixels of a flat picture, or strip: decoded at once, with up to 4 bytes of memory each."""

KEPT_ROWS = 4096
"""Rows of a TIFF whose strips stay decoded: two rows of blocks, read from left to right."""

Image.MAX_IMAGE_PIXELS = None  # a limit for strangers' files, below the size of many slides


class FlatPicture(openslide.ImageSlide):
    """A PNG, JPEG or BMP, decoded as a whole on opening; see `open_handle`."""

    reader = "Pillow"
    properties: dict[str, str] = {}  # noqa: RUF012 - each picture has its own

    def __init__(self, path: Path, name: str) -> None:
        try:
            with path.open("rb") as file:
                image: Image.Image = Image.open(file, formats=("PNG", "JPEG", "BMP"))
                dpi = image.info.get("dpi", ())
                if str(image.info.get("Software", "")).startswith("Matplotlib"):
                    raise SlideExcludedError(f"{name} must be a slide, but is a drawn figure.")
                if image.mode not in ("RGB", "RGBA", "P"):
                    raise SlideExcludedError(
                        f"A flat picture must be in RGB of 8 bits, but {name} has Pillow's mode "
                        f"{image.mode}. Convert it if it shows stained tissue."
                    )
                _refuse_size(*image.size, name)
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise SlideError(
                f"{name} must be a picture that Pillow reads, but it is damaged, incomplete or of "
                f"another format ({error}). Copy it again or convert it to a pyramidal TIFF."
            ) from error
        super().__init__(image.convert("RGBA") if image.mode == "P" else image)
        self.properties = {
            f"dpi-{axis}": str(float(count)) for axis, count in zip("xy", dpi, strict=False)
        }


class TiffPicture:
    """A TIFF in strips or tiles, OME-TIFF included: the first picture in it, with its pyramid.

    Threads may read at once. As with OpenSlide, pixels that the file does not have are transparent.
    See `open_handle`.
    """

    reader = "tifffile"

    def __init__(self, path: Path, name: str) -> None:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(tifffile.TiffFile(path))
                self._pages = [level.keyframe for level in file.series[0].levels]
                self.properties = _properties(self._pages[0], file.pages.first.description)
            except Exception as error:  # what a damaged file raises depends on where it is damaged
                raise openslide.OpenSlideUnsupportedFormatError(f"tifffile: {error}") from error
            _refuse_other_kinds(file.series[0], self._pages[0], name)
            _refuse_size(self._pages[0].chunks[1], self._pages[0].chunks[0], name)
            self._file = stack.pop_all()
        self.level_dimensions = [(page.imagewidth, page.imagelength) for page in self._pages]
        self.dimensions = width, height = self.level_dimensions[0]
        self.level_downsamples = [(width / w + height / h) / 2 for w, h in self.level_dimensions]
        # Strips are as wide as the slide: the next block, and another thread, need the same ones.
        strips = 0 if self._pages[0].is_tiled else len(self._pages[0].dataoffsets)
        self._part = lru_cache(-(-strips * KEPT_ROWS // height))(self._decoded)
        self._turn = threading.Lock()

    def close(self) -> None:
        """Release the file and what is kept of it."""
        self._part.cache_clear()
        self._file.close()

    def read_region(
        self, corner: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Read a rectangle as RGBA; arguments and errors are those of `Source.read`."""
        page, scale = self._pages[level], self.level_downsamples[level]
        left, top = (round(edge / scale) for edge in corner)
        rows, columns = page.chunks[:2]
        down, across = -(-page.imagelength // rows), -(-page.imagewidth // columns)
        pixels = np.zeros((size[1], size[0], 4), np.uint8)
        for plane, row, column in itertools.product(
            range(page.samplesperpixel if page.planarconfig == 2 else 1),
            range(top // rows, min(-(-(top + size[1]) // rows), down)),
            range(left // columns, min(-(-(left + size[0]) // columns), across)),
        ):
            try:
                with self._turn:
                    part = self._part(level, (plane * down + row) * across + column)
            except Exception as error:  # each codec has its own
                raise openslide.OpenSlideError(f"{type(error).__name__}: {error}") from error
            y, x = row * rows - top, column * columns - left
            part = part[max(0, -y) : size[1] - y, max(0, -x) : size[0] - x]
            here = pixels[max(0, y) :, max(0, x) :][: len(part), : part.shape[1]]
            here[..., plane : plane + part.shape[2]] = part
            if page.samplesperpixel == 3 and part.size:
                here[..., 3] = 255
        if page.samplesperpixel == 4 and tifffile.EXTRASAMPLE.UNASSALPHA not in page.extrasamples:
            return Image.frombuffer("RGBa", size, pixels, "raw", "RGBa", 0, 1).convert("RGBA")
        return Image.fromarray(pixels)

    def _decoded(self, level: int, index: int) -> npt.NDArray[np.uint8]:
        """Read a strip or tile, ``(h, w, samples)``; of one that the file leaves out, nothing."""
        page = self._pages[level]
        file, count = page.parent.filehandle, page.databytecounts[index]
        if count == 0:
            return np.empty((0, 0, 1), np.uint8)
        file.seek(page.dataoffsets[index])
        data = file.read(count)
        if len(data) < count:
            raise EOFError(f"the file ends {count - len(data)} bytes too early")
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        part: npt.NDArray[np.uint8] = page.decode(data, index, **tables)[0][0]
        # libtiff, and by it OpenSlide, makes 8 bits of 16 in this way.
        return part if part.dtype == np.uint8 else ((part + np.uint32(128)) // 257).astype(np.uint8)


def _refuse_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_FLAT_PIXELS:
        raise SlideError(
            f"What is decoded at once must have at most {MAX_FLAT_PIXELS:,} pixels, but of {name} "
            f"it has {width:,} x {height:,}. Convert it to a pyramidal TIFF."
        )


def _properties(page: tifffile.TiffPage, description: str) -> dict[str, str]:
    """Return what the first page of a TIFF says, under OpenSlide's names."""
    unit = page.tags.valueof("ResolutionUnit", default=2)
    said = {
        "tiff.ImageDescription": description,
        "tiff.ResolutionUnit": {2: "inch", 3: "centimeter"}.get(unit, "none"),
        "openslide.level[0].tile-height": str(page.chunks[0]),
        "openslide.level[0].tile-width": str(page.chunks[1]),
    }
    for key in ("XResolution", "YResolution"):
        dots, length = page.tags.valueof(key, default=(0, 1))
        said[f"tiff.{key}"] = str(dots / length) if length else ""
    return said


def _refuse_other_kinds(
    series: tifffile.TiffPageSeries, page: tifffile.TiffPage, name: str
) -> None:
    """Raise if a TIFF does not begin with one picture in RGB: by channels, stacks, floats."""
    in_rgb = page.photometric == 2 or (page.photometric == 6 and page.compression in (6, 7))
    colours = page.samplesperpixel if series.axes in ("YXS", "SYX") and in_rgb else 0
    if colours not in (3, 4) or page.dtype not in (np.uint8, np.uint16):
        raise SlideExcludedError(
            f"A slide must be one picture in RGB of 8 or 16 bits, but {name} has axes "
            f"{series.axes} of {' x '.join(map(str, series.shape))}, {page.dtype}, "
            f"{tifffile.PHOTOMETRIC(page.photometric).name}: channels (as of fluorescence), "
            "stacks and grey are not covered. Convert it to RGB if it shows stained tissue."
        )


Handle = openslide.OpenSlide | FlatPicture | TiffPicture


def open_handle(path: Path, name: str) -> Handle:
    """Open a slide file with the first reader that can.

    Args:
        path: The file; for DICOM, any file of the series.
        name: Name of the slide, for messages.

    Raises:
        OpenSlideError: If it cannot be opened, is no picture of its suffix, or damaged.
        SlideError: If a picture cannot be decoded, or what is decoded at once is too large.
        SlideExcludedError: If it is a figure, or not one picture in RGB.
    """
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        unsupported = isinstance(error, openslide.OpenSlideUnsupportedFormatError)
        if unsupported and path.suffix.lower() in FLAT_SUFFIXES:
            return FlatPicture(path, name)
        unsupported |= "Unsupported TIFF compression" in str(error)
        if unsupported and path.suffix.lower() in TIFF_SUFFIXES:
            return TiffPicture(path, name)
        raise
