import logging
from pathlib import Path

import pytest

from examples.pathology.common.errors import UserError
from examples.pathology.slides.pixelsizes import mpp_of_slide, mpp_of_slides
from tests.pathology.slides.test_slide import dicom


def table(folder, *rows, header="FILENAME,MPP"):
    path = folder / "slides.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a", "a.h5", "a.svs", "sub/a", "sub/a.h5", "sub\\a.SVS", "old/a"])
def test_a_slide_is_found_by_any_name_that_the_feature_table_may_use(name, tmp_path):
    rows = table(tmp_path, f"{name},0.5", "b,", "c,0.25")
    assert mpp_of_slides(rows, ["sub/a", "b", "d"]) == {"sub/a": 0.5}
    assert mpp_of_slide(rows, tmp_path / "sub" / "a.svs") == 0.5
    assert mpp_of_slide(rows, tmp_path / "b.svs") is None
    assert mpp_of_slide(rows, tmp_path / "d.svs") is None


@pytest.mark.parametrize(
    ("name", "stem"), [("TCGA-1-DX1", "TCGA-1-DX1.23-1d"), ("TCGA-1-DX1.23-1d", "TCGA-1-DX1")]
)
def test_tcga_names_match_with_and_without_their_uuid(name, stem, tmp_path):
    rows = table(tmp_path, f"{name},0.5")
    assert mpp_of_slides(rows, [stem, "TCGA-1-DX10.77"]) == {stem: 0.5}
    assert mpp_of_slide(rows, Path(f"{stem}.svs")) == 0.5


@pytest.mark.parametrize(("one", "other"), [("P\u00e9", "Pe\u0301"), ("Pe\u0301", "P\u00e9")])
def test_composed_and_decomposed_names_are_the_same(one, other, tmp_path):
    rows = table(tmp_path, f"{one}/a,0.5", "a,0.25", header="F\u00e9,MPP")
    rows.write_text(rows.read_text().replace("F\u00e9", "Fe\u0301"))
    assert mpp_of_slides(rows, [f"{other}/a"], "F\u00e9") == {f"{other}/a": 0.5}
    assert mpp_of_slide(rows, tmp_path / other / "a.svs", "F\u00e9") == 0.5


def test_a_row_that_may_mean_two_slides_is_refused_and_the_remedy_works(tmp_path):
    rows = table(tmp_path, "a,0.5", "b,0.25")
    with pytest.raises(UserError, match=r"'a' may mean x/a, y/a\..*in full, as in 'x/a\.h5'"):
        mpp_of_slides(rows, ["x/a", "y/a", "b"])
    rows = table(tmp_path, "x/a.h5,0.5", "y/a.h5,0.25")
    assert mpp_of_slides(rows, ["x/a", "y/a"]) == {"x/a": 0.5, "y/a": 0.25}


def test_slides_that_differ_in_their_suffix_alone_have_their_own_rows(tmp_path):
    stems = ["a.svs", "a.tif"]  # what `find_slides` makes of them
    with pytest.raises(UserError, match=r"may mean a\.svs, a\.tif\..*as in 'a\.svs\.h5'"):
        mpp_of_slides(table(tmp_path, "a,0.5"), stems)
    assert mpp_of_slides(table(tmp_path, "a.SVS,0.5"), stems) == {"a.svs": 0.5}
    for end in (".h5", ""):
        rows = table(tmp_path, f"a.svs{end},0.5", f"a.tif{end},0.25")
        assert mpp_of_slides(rows, stems) == {"a.svs": 0.5, "a.tif": 0.25}
        assert mpp_of_slide(rows, Path("a.tif")) == 0.25
        # The other one is in the table, but not in the folder.
        assert mpp_of_slides(rows, ["a"], names={"a": "a.TIF"}) == {"a": 0.25}
    assert mpp_of_slides(table(tmp_path, "a.svs,", "a.tif,0.25"), ["a"]) == {}


@pytest.mark.parametrize(
    ("stem", "others"),
    [("siteB/001", "siteA/001.tif,0.25"), ("S18-77", "S18-77.A2.tif,0.25"), ("a", "b.tif,0.25")],
)
def test_a_slide_whose_row_has_no_value_gets_none_of_another(stem, others, tmp_path):
    for name in (stem, f"{stem}.tif"):
        rows = table(tmp_path, others, f"{name},")
        assert mpp_of_slides(rows, [stem, "c"]) == {}
        assert mpp_of_slide(rows, tmp_path / f"{stem}.tif") is None


def test_a_slide_that_may_be_of_either_row_is_refused_if_one_has_no_value(tmp_path):
    rows = table(tmp_path, "siteA/001.tif,0.25", "siteB/001.tif,")
    with pytest.raises(UserError, match=r"001 has several: 0\.25 for 'siteA/.*none for 'siteB/001"):
        mpp_of_slides(rows, ["001"])
    assert mpp_of_slides(table(tmp_path, "siteA/1,0.5", "1,"), ["1"]) == {}


def test_a_slide_gets_no_value_of_another_folder_that_the_table_tells_apart(tmp_path):
    rows = table(tmp_path, "siteA/001,0.25", "siteB/002,0.5")
    assert mpp_of_slides(rows, ["siteB/001", "siteB/002"]) == {"siteB/002": 0.5}
    assert mpp_of_slide(rows, tmp_path / "siteB" / "001.tif") is None


def test_a_slides_own_path_is_preferred_to_its_bare_name(tmp_path):
    rows = table(tmp_path, "x/a,0.5", "y/a,0.25")
    assert mpp_of_slides(rows, ["y/a"]) == {"y/a": 0.25}  # x/a may be elsewhere
    assert mpp_of_slide(rows, tmp_path / "y" / "a.svs") == 0.25
    with pytest.raises(UserError, match=r"z/a has several: 0\.5 for 'x/a', 0\.25 for 'y/a'"):
        mpp_of_slides(rows, ["z/a"])


def test_a_value_may_be_repeated_but_not_changed(tmp_path):
    assert mpp_of_slides(table(tmp_path, "a,0.5", "a.h5,0.50"), ["a"]) == {"a": 0.5}
    assert mpp_of_slides(table(tmp_path, "a,", "a.svs,0.50"), ["a"]) == {"a": 0.5}
    with pytest.raises(UserError, match=r"a has several: 0\.5 for 'a', 0\.25 for 'a\.svs'"):
        mpp_of_slides(table(tmp_path, "a,0.5", "a.svs,0.25"), ["a"])
    with pytest.raises(UserError, match=r"one MPP, but a\.h5 has 0\.5 and 0\.25"):
        mpp_of_slides(table(tmp_path, "a,0.5", "a.h5,0.25"), ["a"])


def test_a_table_without_the_column_is_told(tmp_path, caplog):
    rows = table(tmp_path, "a,0.5", header="FILENAME,Mpp")
    with caplog.at_level(logging.WARNING):
        assert mpp_of_slides(rows, ["a"]) == {}
    assert "has no column `MPP`. Did you mean `Mpp`?" in caplog.text


def test_how_many_slides_the_table_gives_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="examples"):
        mpp_of_slides(table(tmp_path, "a,0.5", "x,0.5"), ["a", "b"])
    assert "gives the MPP of 1 of 2 slides" in caplog.text


def test_a_dicom_series_is_found_by_its_folder_and_two_by_their_identifiers(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for name, series in (("x", "1.2"), ("y", "1.2")):
        (folder / f"{name}.dcm").write_bytes(dicom(series))
    rows = table(tmp_path, "one,0.5", "two/1.2.3,0.4", "two/11.2.3,0.3")
    assert mpp_of_slide(rows, folder / "y.dcm") == 0.5
    (tmp_path / "two").mkdir()
    for name, series in (("x", "11.2.3"), ("y", "1.2.3")):
        (tmp_path / "two" / f"{name}.dcm").write_bytes(dicom(series))
    assert mpp_of_slide(rows, tmp_path / "two" / "y.dcm") == 0.4


def test_the_column_of_the_file_name_may_have_another_name(tmp_path):
    rows = table(tmp_path, "a,0.5", "b,0.25", "x,0.3", header="slide,MPP")
    assert mpp_of_slides(rows, ["a", "b"], "slide") == {"a": 0.5, "b": 0.25}
    assert mpp_of_slide(rows, tmp_path / "b.svs", "slide") == 0.25
    with pytest.raises(UserError, match="FILENAME"):
        mpp_of_slides(rows, ["a"])
    with pytest.raises(UserError, match="Write `slide` in full"):
        mpp_of_slides(rows, ["1/x", "2/x"], "slide")
