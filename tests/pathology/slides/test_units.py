import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.pathology.slides.units import MAX_MPP, MIN_MPP, Mpp, SlideError, find_mpp

CM = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40000", "tiff.YResolution": "40000"}
INCH = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "101600"}
OME = {
    "tiff.ImageDescription": '<?xml version="1.0" encoding="UTF-8"?>'
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.26"/></Image></OME>'
}
PHILIPS = {"openslide.comment": "<a><PixelSizeMicrons>0.25</PixelSizeMicrons></a>"}
MIRAX = {
    "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.23",
    "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y": "0.24",
}
HAMAMATSU = {  # 22 mm over 100000 pixels
    "hamamatsu.PhysicalWidth": "22000000",
    "hamamatsu.PhysicalHeight": "11000000",
    "openslide.level[0].width": "100000",
    "openslide.level[0].height": "50000",
}
OPENSLIDE = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.51"}


@pytest.mark.parametrize(
    ("properties", "x", "y", "source"),
    [
        (OPENSLIDE, 0.5, 0.51, "openslide.mpp-x"),
        ({"aperio.MPP": "0.4990"}, 0.499, 0.499, "aperio.MPP"),
        (MIRAX, 0.23, 0.24, "MICROMETER_PER_PIXEL_X"),
        (HAMAMATSU, 0.22, 0.22, "hamamatsu.PhysicalWidth"),
        (CM, 0.25, 0.25, "tiff.XResolution"),
        (INCH, 0.25, 0.25, "tiff.XResolution"),
        (OME, 0.25, 0.26, "PhysicalSizeX"),
        (PHILIPS, 0.25, 0.25, "PixelSizeMicrons"),
    ],
)
def test_every_source_is_read_in_its_unit(properties, x, y, source):
    mpp = find_mpp(properties, slide="a.svs")
    assert mpp.x == pytest.approx(x, rel=1e-9)
    assert mpp.y == pytest.approx(y, rel=1e-9)
    assert source in mpp.source


def test_sources_are_asked_in_order():
    # Each step takes away the source that won; the values tell which one comes next.
    chain = [
        ("openslide.mpp", {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.25),
        ("aperio", {"aperio.MPP": "0.252"}, 0.252),
        ("tiff", {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40650"}, 0.2460025),
        ("openslide.comment", PHILIPS, 0.25),
    ]
    properties = {key: value for _, part, _ in chain for key, value in part.items()}
    assert find_mpp(properties, slide="a", table_mpp=0.3, default_mpp=1).source == "slide table"
    for prefix, part, value in chain:
        assert find_mpp(properties, slide="a", default_mpp=1).x == pytest.approx(value), prefix
        for key in part:
            del properties[key]
    assert find_mpp(properties, slide="a", default_mpp=1) == Mpp(1, 1, "default")


@pytest.mark.parametrize(
    ("properties", "one", "two", "ratio"),
    [
        # Pixels per cm that are called pixels per inch: OpenSlide takes the tag.
        (
            {"openslide.mpp-x": "0.635", "openslide.mpp-y": "0.635", **OME},
            r"0\.635 \(from openslide\.mpp-x\)",
            r"0\.25 \(from tiff\.ImageDescription PhysicalSizeX\)",
            r"2\.54, as of inch and cm\. Give the true value in the MPP column",
        ),
        (
            CM | {"tiff.XResolution": "80000", "tiff.YResolution": "80000"} | OME,
            r"0\.125",
            r"0\.25",
            r"2\.",
        ),
        ({"aperio.MPP": "0.25"} | CM | {"tiff.XResolution": "20000"}, r"0\.25", r"0\.5", r"2\."),
        ({"aperio.MPP": "0.25"} | CM | {"tiff.YResolution": "20000"}, r"0\.25", r"0\.5", r"2\."),
        (
            OPENSLIDE | PHILIPS,
            r"0\.5",
            r"0\.25 \(from openslide\.comment PixelSizeMicrons\)",
            r"2\.",
        ),
        (
            PHILIPS | {"tiff.ImageDescription": OME["tiff.ImageDescription"].replace("250", "500")},
            r"0\.25",
            r"0\.5",
            r"2\.",
        ),
    ],
)
def test_places_of_a_file_that_disagree_are_refused_with_both_named(properties, one, two, ratio):
    with pytest.raises(SlideError, match=rf"a\.tif has {one}.* and {two}.*a ratio of {ratio}"):
        find_mpp(properties, slide="a.tif", default_mpp=0.5)
    assert find_mpp(properties, slide="a.tif", table_mpp=0.4).x == 0.4  # the remedy works


def test_nominal_and_calibrated_sizes_and_placeholders_do_not_disagree():
    for more in (
        {"aperio.MPP": "0.24"},
        {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "72"},
        {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "10"},
    ):
        assert find_mpp({"openslide.mpp-x": "0.25"} | more | PHILIPS, slide="a").x == 0.25


def test_resolution_without_unit_is_an_aspect_ratio():
    properties = {"tiff.ResolutionUnit": "none", "tiff.XResolution": "20000"}
    with pytest.raises(SlideError, match=r"a\.tif has no microns per pixel.*MPP column"):
        find_mpp(properties, slide="a.tif")


def test_objective_power_is_never_used_only_mentioned():
    with pytest.raises(SlideError, match="objective power is 20x, which does not tell"):
        find_mpp({"openslide.objective-power": "20"}, slide="a.svs")


@pytest.mark.parametrize("text", ["", "nan", "inf", "-0.5", "0", "0,25", "many"])
def test_broken_entries_count_as_missing(text):
    assert find_mpp({"openslide.mpp-x": text}, slide="a", default_mpp=0.5).source == "default"


@pytest.mark.parametrize(
    "text",
    [
        "<OME><Image><Pixels PhysicalSizeX='0.5'/>",  # not closed
        "<Pixels PhysicalSizeX='0.5' PhysicalSizeXUnit='furlong'/>",
        "<!DOCTYPE a [<!ENTITY b '0.5'>]><Pixels PhysicalSizeX='&b;'/>",
        "PhysicalSizeX = 0.5 without any XML",
        "<PixelSizeMicrons>half</PixelSizeMicrons>",
    ],
)
def test_broken_xml_counts_as_missing(text):
    assert find_mpp({"openslide.comment": text}, slide="a", default_mpp=1).source == "default"


@pytest.mark.parametrize("mpp", ["0.025", "0.05"])
def test_a_size_ten_times_too_small_is_refused(mpp):
    with pytest.raises(SlideError, match=rf"between 0\.08 and 4\.0, but a\.tif has {mpp}"):
        find_mpp({"openslide.mpp-x": mpp}, slide="a.tif")
    assert find_mpp({"openslide.mpp-x": "0.09"}, slide="a.tif").x == 0.09  # oil, 60x


def test_pixels_that_are_not_square_are_refused():
    with pytest.raises(SlideError, match=r"at most 10%, but a\.tif has 0\.5 and 0\.56"):
        find_mpp({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.56"}, slide="a.tif")
    find_mpp({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.55"}, slide="a.tif")


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_whatever_the_table_says_is_used_as_it_is_or_refused(value):
    if MIN_MPP <= value <= MAX_MPP:
        mpp = find_mpp(OPENSLIDE, slide="a", table_mpp=value)
        assert mpp == Mpp(value, value, "slide table")
    else:
        with pytest.raises(SlideError, match="but a has"):
            find_mpp(OPENSLIDE, slide="a", table_mpp=value)


@given(st.floats(0.09, 3.6), st.floats(0.92, 1.08))
def test_tiff_resolution_is_the_inverse_of_mpp(mpp, ratio):
    properties = {
        "tiff.ResolutionUnit": "centimeter",
        "tiff.XResolution": repr(1e4 / mpp),
        "tiff.YResolution": repr(1e4 / (mpp * ratio)),
    }
    found = find_mpp(properties, slide="a")
    assert found.x == pytest.approx(mpp)
    assert found.y == pytest.approx(mpp * ratio)


@pytest.mark.parametrize(
    "resolution",
    [
        {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "10"},  # libvips
        {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "28"},  # 72 dpi, rounded
        {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "72"},
        {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "96", "tiff.YResolution": "72"},
        {"openslide.mpp-x": "1000", "openslide.mpp-y": "1000"},
    ],
)
def test_a_placeholder_is_no_information(resolution, caplog):
    found = find_mpp(resolution | PHILIPS, slide="a.tif", default_mpp=1)
    assert found == Mpp(0.25, 0.25, "openslide.comment PixelSizeMicrons")
    assert find_mpp(resolution, slide="a.tif", default_mpp=0.5) == Mpp(0.5, 0.5, "default")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("a.tif: a placeholder for its microns per pixel is passed by" in s for s in said)
    with pytest.raises(SlideError, match=r"a\.tif has no microns per pixel but a placeholder, \d+"):
        find_mpp(resolution, slide="a.tif")
    assert find_mpp(resolution, slide="a.tif", table_mpp=0.5).x == 0.5  # the remedy works


def test_a_lost_unit_is_no_placeholder():
    with pytest.raises(SlideError, match=r"must be between .* a\.tif has 250 \(from"):
        find_mpp({"openslide.mpp-x": "250"}, slide="a.tif", default_mpp=0.5)
