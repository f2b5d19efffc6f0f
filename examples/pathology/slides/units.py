"""Microns per pixel: where a slide says how large its pixels are, and whether to believe it.

A network sees tissue at one scale only, so a wrong value here is worse than none: values are taken
in a fixed order, checked for plausibility and against each other, and reported with their source.
Places of one file that disagree are refused, not warned about: nothing in the file says which is
right, and the tiles of the wrong one look like tissue. The objective power
("20x") is never turned into microns: scanners disagree about it by a factor of two.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from examples.pathology.common.errors import listing
from examples.pathology.settings.extract import MAX_MPP, MIN_MPP

logger = logging.getLogger(__name__)

MAX_ANISOTROPY = 0.10
"""Largest accepted difference between x and y, as a share of the larger."""

MAX_DISAGREEMENT = 0.05
"""Largest accepted difference between two places of a file, as a share of the larger: more than
between nominal and calibrated sizes, far less than between inch and cm or between two levels."""

_UM_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}

PLACEHOLDERS = (
    *(25_400.0 / per_inch for per_inch in (1, 72, 96, 150, 300)),
    *(10_000.0 / per_cm for per_cm in (1, 10)),
)
"""Resolutions, in um per pixel, of screens and printers: writers put them where they know none.
A list, no bound: 250 um may be 250 nm whose unit was lost, and is refused."""

PLACEHOLDER_TOLERANCE = 0.015
"""72 dpi are also written as 28 px/cm."""

_UM_PER_LENGTH = dict.fromkeys(("um", "µm", "μm", "micron", "\\u00B5m"), 1.0)  # two of ImageJ
_UM_PER_LENGTH |= {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


class SlideError(Exception):
    """A slide cannot be used; the message names the slide and says why and what to do."""


class SlideExcludedError(SlideError):
    """A slide that is sound, but of a kind that the protocol does not cover."""


@dataclass(frozen=True)
class Mpp:
    """The size of a slide's level-0 pixels.

    Attributes:
        x: Microns per pixel along x.
        y: Microns per pixel along y.
        source: Where the values come from, for example ``openslide.mpp-x``.
    """

    x: float
    y: float
    source: str


def find_mpp(
    properties: Mapping[str, str],
    *,
    slide: str,
    table_mpp: float | None = None,
    default_mpp: float | None = None,
) -> Mpp:
    """Find the size of a slide's pixels.

    The order is: the slide table's MPP column, OpenSlide's own value, the keys of the vendors, the
    resolution of a TIFF (if it has a unit) or flat picture, XML in the image description, the
    default. Placeholders (72 dpi, 10 px/cm) are passed by, with a warning. What the file says
    further on must agree with what is found first, unless no scanner has such pixels. The slide
    table is believed whatever the file says.

    Args:
        properties: The slide's properties as OpenSlide gives them.
        slide: Name of the slide, for messages.
        table_mpp: The slide's value in the slide table in um, if any.
        default_mpp: What to assume in um if nothing else is found.

    Returns:
        The pixel size with its source.

    Raises:
        SlideError: If nothing is found, what is found first is implausible, or another place of
            the file says something else.
    """
    if table_mpp is not None:
        return _checked(table_mpp, table_mpp, "slide table", slide)
    all_said = [mpp for mpp in _said_by(properties) if mpp is not None]
    said = [mpp for mpp in all_said if not _is_placeholder(mpp)]
    passed_by = listing(f"{mpp.x:.6g} (from {mpp.source})" for mpp in all_said if mpp not in said)
    if passed_by and all_said[0] not in said and (said or default_mpp is not None):
        logger.warning(
            "%s: a placeholder for its microns per pixel is passed by: %s.", slide, passed_by
        )
    if said:
        mpp = _checked(said[0].x, said[0].y, said[0].source, slide)
        for other in said[1:]:
            _refuse_disagreement(mpp, other, slide)
        return mpp
    if default_mpp is not None:
        return _checked(default_mpp, default_mpp, "default", slide)
    power = properties.get("openslide.objective-power")
    hint = f" but a placeholder, {passed_by}" if passed_by else ""
    if power:
        hint += f" (its objective power is {power}x, which does not tell the pixel size)"
    raise SlideError(
        f"The slide must say how large its pixels are, but {slide} has no microns per pixel{hint}. "
        "Give them in the MPP column of the slide table, or with --default-mpp."
    )


def _said_by(properties: Mapping[str, str]) -> Iterator[Mpp | None]:
    """Yield what each place of a file says, the most trusted first."""
    mirax = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL"
    yield _pair(properties, "openslide.mpp-x", "openslide.mpp-y")
    yield _pair(properties, "aperio.MPP", "aperio.MPP")
    yield _pair(properties, f"{mirax}_X", f"{mirax}_Y")
    yield _from_hamamatsu(properties)
    yield from _from_tiff_resolution(properties)
    yield from _from_xml(properties)


def _is_placeholder(mpp: Mpp) -> bool:
    """Return whether a writer put this where it knew nothing."""
    return all(
        any(math.isclose(value, known, rel_tol=PLACEHOLDER_TOLERANCE) for known in PLACEHOLDERS)
        for value in (mpp.x, mpp.y)
    )


def _refuse_disagreement(mpp: Mpp, other: Mpp, slide: str) -> None:
    """Raise if a plausible value of another place is not that of the first."""
    for axis, one, two in (("x", mpp.x, other.x), ("y", mpp.y, other.y)):
        small, large = sorted((one, two))
        if not MIN_MPP <= two <= MAX_MPP or large - small <= MAX_DISAGREEMENT * large:
            continue
        ratio = large / small
        inch = abs(ratio - 2.54) < MAX_DISAGREEMENT * 2.54
        raise SlideError(
            f"All that a slide says of its microns per pixel must agree within "
            f"{MAX_DISAGREEMENT:.0%}, but along {axis} {slide} has {one:.6g} (from {mpp.source}) "
            f"and {two:.6g} (from {other.source}), a ratio of {ratio:.3g}"
            f"{', as of inch and cm' if inch else ''}. "
            "Give the true value in the MPP column of the slide table."
        )


def _checked(x: float, y: float, source: str, slide: str) -> Mpp:
    remedy = "Give the true value in the MPP column of the slide table."
    for value in (x, y):
        if not MIN_MPP <= value <= MAX_MPP:  # also catches NaN
            raise SlideError(
                f"The microns per pixel must be between {MIN_MPP} and {MAX_MPP}, but {slide} has "
                f"{value:.6g} (from {source}). {remedy}"
            )
    if abs(x - y) > MAX_ANISOTROPY * max(x, y):
        raise SlideError(
            f"The microns per pixel along x and y must differ by at most {MAX_ANISOTROPY:.0%}, but "
            f"{slide} has {x:.6g} and {y:.6g} (from {source}). {remedy}"
        )
    return Mpp(x, y, source)


def _number(text: str | None) -> float | None:
    """Return a positive finite number, or None for anything else (a missing or broken entry)."""
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _pair(
    properties: Mapping[str, str],
    key_x: str,
    key_y: str,
    convert: Callable[[float], float] = lambda value: value,
) -> Mpp | None:
    """Read two keys; where one is missing, pixels are taken to be square."""
    found = [(key, _number(properties.get(key))) for key in (key_x, key_y)]
    known = [(key, convert(value)) for key, value in found if value is not None]
    return Mpp(known[0][1], known[-1][1], known[0][0]) if known else None


def _from_hamamatsu(properties: Mapping[str, str]) -> Mpp | None:
    """Read .vms and .vmu slides, which give the size of the whole picture in nm."""
    # `hamamatsu.XResolution` is passed by: its unit differs from file to file.
    sizes = []
    for side in ("Width", "Height"):
        size_nm = _number(properties.get(f"hamamatsu.Physical{side}"))
        count = _number(properties.get(f"openslide.level[0].{side.lower()}"))
        if size_nm is None or count is None:
            return None
        sizes.append(size_nm / 1000 / count)
    return Mpp(sizes[0], sizes[1], "hamamatsu.PhysicalWidth")


def _from_tiff_resolution(properties: Mapping[str, str]) -> Iterator[Mpp | None]:
    um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
    text = properties.get("tiff.ImageDescription", "")
    if um is None and text.startswith("ImageJ="):  # which has a unit of its own
        unit = re.search(r"^unit=(.+?)\s*$", text, re.MULTILINE)
        um = _UM_PER_LENGTH.get(unit.group(1)) if unit else None
    if um is not None:  # "none": the numbers are an aspect ratio
        yield _pair(properties, "tiff.XResolution", "tiff.YResolution", lambda value: um / value)
    yield _pair(properties, "dpi-x", "dpi-y", lambda value: _UM_PER_UNIT["inch"] / value)


def _from_xml(properties: Mapping[str, str]) -> Iterator[Mpp | None]:
    for key in ("openslide.comment", "tiff.ImageDescription"):
        text = properties.get(key, "")
        philips = re.search(r"<PixelSizeMicrons>\s*([^<\s]+)\s*</PixelSizeMicrons>", text)
        value = _number(philips.group(1)) if philips else None
        yield None if value is None else Mpp(value, value, f"{key} PixelSizeMicrons")
        yield _from_ome(text, key)


def _from_ome(text: str, key: str) -> Mpp | None:
    """Read PhysicalSizeX and PhysicalSizeY of the first Pixels element of an OME-XML text."""
    start = text.find("<")
    if "PhysicalSize" not in text or start < 0 or "<!DOCTYPE" in text:
        return None  # a document type could define entities that expand without end
    try:
        root = ET.fromstring(text[start:].strip().encode())  # noqa: S314 - no entities
    except ET.ParseError:
        return None
    for element in root.iter():
        if element.tag.rpartition("}")[2] != "Pixels":
            continue
        sizes = []
        for axis in "XY":
            value = _number(element.get(f"PhysicalSize{axis}"))
            unit = _UM_PER_LENGTH.get(element.get(f"PhysicalSize{axis}Unit", "um"))
            sizes.append(None if value is None or unit is None else value * unit)
        x, y = sizes[0] or sizes[1], sizes[1] or sizes[0]
        if x is not None and y is not None:
            return Mpp(x, y, f"{key} PhysicalSizeX")
    return None
