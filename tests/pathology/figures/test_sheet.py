from itertools import pairwise

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from matplotlib.image import imread

from examples.pathology.figures.sheet import (
    COLOURS,
    GREY,
    MARKERS,
    Sheet,
    coloured_line,
    coloured_marker,
)
from tests.pathology.drawing import words


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_panels_stand_in_rows_and_none_is_seen_that_holds_nothing(tmp_path, drawn, count):
    sheet = Sheet(tmp_path / "a.png", "A title", "A caption.")
    with sheet.open((2.0, 1.5), (1.0, 0.5), count, columns=3, remark="A remark.") as (_, panels):
        for number, axes in enumerate(panels):
            axes.set_title(f"panel {number}")
    (figure,) = drawn
    columns, rows = min(count, 3), (count + 2) // 3
    assert tuple(figure.get_size_inches()) == (2.0 * columns + 1.0, 1.5 * rows + 0.5)
    assert [axes for axes in figure.axes if axes.get_visible()] == panels
    assert len({axes.get_subplotspec().get_geometry()[:2] for axes in figure.axes}) == 1
    assert figure.get_suptitle() == "A title"
    assert "A remark. A caption." in words(figure)


def test_axes_that_are_alone_have_the_title(tmp_path, drawn):
    with Sheet(tmp_path / "a.png", "A title").open((4.0, 3.0)) as (_, (axes,)):
        axes.plot([0, 1], [0, 1])
    assert axes.get_title() == "A title"
    assert drawn[0].get_suptitle() == drawn[0].get_supxlabel() == ""
    assert drawn[0].legends == []  # nothing has a name


@pytest.mark.parametrize("count", [1, 2])
def test_a_title_and_a_caption_too_long_for_a_line_are_not_cut_off(tmp_path, count):
    path = tmp_path / "a.png"
    sheet = Sheet(path, " ".join(["Leukocyte"] * 40), " ".join(["They carry no biology."] * 40))
    with sheet.open((5.0, 4.0), (1.0, 1.0), count) as (_, panels):
        panels[0].plot([0, 1], [0, 1], label="fold 1")
    ink = imread(path)[:, :, :3].min(axis=2) < 0.9
    for border in (ink[:2], ink[-2:], ink[:, :2], ink[:, -2:]):
        assert not border.any()


def test_a_drawing_that_fails_leaves_no_file_and_no_style(tmp_path, drawn):
    before = dict(mpl.rcParams)
    path = tmp_path / "figures/a.png"
    with Sheet(path, "t").open((4.0, 3.0)):
        assert mpl.rcParams["axes.grid"]
    assert dict(mpl.rcParams) == before
    written = path.read_bytes()
    assert written.startswith(b"\x89PNG")
    with pytest.raises(ZeroDivisionError), Sheet(path, "t").open((4.0, 3.0)) as (_, (axes,)):
        axes.plot([1 / 0])
    assert dict(mpl.rcParams) == before
    assert len(drawn) == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert path.read_bytes() == written
    assert plt.get_fignums() == []


def test_forty_folds_have_lines_that_differ():
    for look, different in ((coloured_line, 40), (coloured_marker, 8)):
        looks = [tuple(look(number).values()) for number in range(40)]
        assert len(set(looks)) == different
        assert all(a != b for a, b in pairwise(looks))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_neighbouring_colours_have_markers_that_differ():
    assert len(set(COLOURS)) == len(COLOURS)
    assert len(set(MARKERS)) >= len(COLOURS)
    # Text in the captions: at least 4.5 to 1 against white, as the web's rules ask for.
    assert 1.05 / (luminance(GREY) + 0.05) > 4.5
