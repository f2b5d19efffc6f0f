import csv

import h5py
import numpy as np
import pytest

from examples.pathology.cohort.check import run_check
from examples.pathology.common.errors import UserError
from examples.pathology.settings.cohort import CheckConfig
from examples.pathology.tables.matching import near_matches
from tests.pathology.tiny import make_tables, write_bag, write_table


@pytest.fixture
def tables(tmp_path):
    return make_tables(tmp_path, patients=20)


def check(tables, **changes):
    """Return the exit code and the lines that were said."""
    lines: list[str] = []
    values = {"auxiliary": ("LF",), "folds": 2, **changes}
    target = values.pop("target", "isMSIH")
    config = CheckConfig(tables.clini, tables.slides, tables.features, target, **values)
    return run_check(config, lines.append), lines


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def following(lines, title):
    """Return the indented lines below a title."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    found = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        found.append(line.strip())
    return found


def test_what_fits_is_said_to_fit(tables):
    code, lines = check(tables)
    assert code == 0
    assert lines[-1] == "Everything fits together."
    text = "\n".join(lines)
    assert "20 patients in" in text
    assert "isMSIH: MSIH (10), MSS (10); missing for 0" in text
    assert "missing for 1 of 20" in text  # LF of P03
    assert "Patients: 20 in the clinical table -> 20" in text
    assert "Tiles per patient: 4 to 4, median 4" in text


def test_names_without_a_partner_are_listed_in_both_directions_with_near_ones(tables):
    header, *rows = rows_of(tables.slides)
    rows[0][0] = "p-00"  # P00, as somebody typed it
    rows[1][1] = "P_01_1"  # the file is P01-1
    rows = [row for row in rows if row[0] != "P05"]
    write_table(tables.slides, header, [*rows, ["STRANGER", "nowhere"]])
    write_bag(tables.features / "spare.h5", np.ones((1, 768)))
    code, lines = check(tables)
    assert code == 1
    assert following(lines, "Patients of the clinical table without a slide: 2") == [
        "P00 (near: p-00)", "P05",
    ]  # fmt: skip
    assert following(lines, "Patients of the slide table without a clinical row: 2") == [
        "p-00 (near: P00)", "STRANGER",
    ]  # fmt: skip
    assert following(lines, "Slides of the slide table without a feature file: 2") == [
        "P_01_1 (near: P01-1)", "nowhere",
    ]  # fmt: skip
    assert following(lines, "Feature files without a row in the slide table: 3") == [
        "P01-1 (near: P_01_1)", "P05-1", "spare",
    ]  # fmt: skip
    assert lines[-1].startswith("9 names do not fit together")


def test_a_file_of_another_slide_does_not_fit(tables):
    header, *rows = rows_of(tables.slides)
    (tables.features / "P00-1.h5").rename(tables.features / "P00-1.svs.h5")
    write_table(tables.slides, header, [["P00", "P00-1.tif"], *rows[1:]])
    code, lines = check(tables)
    assert code == 1
    assert following(lines, "Slides of the slide table without") == [
        "P00-1.tif (near: P00-1.svs)",
    ]  # fmt: skip
    write_table(tables.slides, header, [["P00", "P00-1.svs"], ["P01", "P00-1.tif"], *rows[2:]])
    (tables.features / "P01-1.h5").rename(tables.features / "P00-1.tif.h5")
    assert check(tables)[1][-1] == "Everything fits together."


def test_files_that_cannot_be_used_are_listed(tables):
    (tables.features / "P02-1.h5").write_bytes(b"no HDF5")
    write_bag(tables.features / "P04-1.h5", np.zeros((0, 768)))
    with h5py.File(tables.features / "P05-1.h5", "a") as file:
        file.attrs["tile_size_px"] = [224, 224]
    code, lines = check(tables)
    assert code == 1
    broken, empty, odd = following(lines, "Feature files that cannot be used: 3")
    assert broken.startswith("P02-1: unreadable")
    assert odd.startswith("P05-1: unreadable: The feature file must hold numbers")
    assert empty == "P04-1: no tiles"


def test_several_slides_are_counted(tables):
    header, *rows = rows_of(tables.slides)
    write_bag(tables.features / "P00-2.h5", np.ones((3, 768)))
    write_table(tables.slides, header, [*rows, ["P00", "P00-2"]])
    code, lines = check(tables)
    assert code == 0
    assert "Patients with several slides, which are joined: 1 with 2" in lines
    assert following(lines, "Patients with several slides") == ["P00: 2 slides"]


def test_positives_per_task_and_fold_add_up(tables):
    _, lines = check(tables)
    cells = [line.split() for line in following(lines, "Folds: ")]
    assert len(cells) == 6
    for fold in ("1", "2"):
        mine = [row for row in cells if row[1] == fold]
        assert sum(int(row[3]) for row in mine) == 20
        assert sum(int(row[5]) for row in mine) == 10  # positives
        assert sum(int(row[9]) for row in mine) == 19  # P03 has no LF


def test_a_file_name_out_of_the_folder_is_refused(tables):
    header, *rows = rows_of(tables.slides)
    write_table(tables.slides, header, [*rows, ["P00", "../../etc/passwd"]])
    with pytest.raises(UserError, match="must be a path inside the folder of slides or features"):
        check(tables)


def test_lists_are_cut_to_their_limit(tables):
    header, *rows = rows_of(tables.slides)
    write_table(tables.slides, header, rows[:14])
    _, lines = check(tables, limit=2)
    shown = following(lines, "Patients of the clinical table without a slide: 6")
    assert shown == ["P14", "P15", "... and 4 more (--limit shows more)"]


def test_a_regression_is_checked_and_counted(tables):
    header, *rows = rows_of(tables.clini)
    write_table(tables.clini, header, [[name, label, i] for i, (name, label, _) in enumerate(rows)])
    code, lines = check(tables, target="LF", auxiliary=(), kind=("LF=regression",))
    assert code == 0
    assert "  LF: regression, 0 to 19, median 9.5; missing for 0 of 20" in lines
    assert "  fold 1 test          10   LF: 10" in lines


def test_words_taken_for_missing_are_said(tables):
    header, *rows = rows_of(tables.clini)
    rows[0][1] = rows[2][1] = "None"
    rows[4][2] = "#DIV/0!"
    write_table(tables.clini, header, rows)
    _, lines = check(tables)
    at = lines.index("    taken for missing: 'None' (2); rename what is a class")
    assert lines[at - 1] == "  isMSIH: MSS (10), MSIH (8); missing for 2"
    assert "    taken for missing: '#DIV/0!' (1); rename what is a class" in lines


def test_a_cut_off_is_checked_and_its_prevalence_shown(tables):
    header, *rows = rows_of(tables.clini)
    write_table(tables.clini, header, [[name, label, i] for i, (name, label, _) in enumerate(rows)])
    _, lines = check(tables, target="LF", auxiliary=(), cutoff=15.0)
    expected = "classification, <15 (15), >=15 (5); positive is >=15, prevalence 0.250"
    assert f"  LF: {expected}; missing for 0 of 20" in lines
    with pytest.raises(UserError, match="Every class of `LF` must have at least 5 patients"):
        check(tables, target="LF", auxiliary=(), cutoff=16.0)


def test_what_a_cross_validation_would_refuse_is_refused_after_the_lists(tables):
    header, *rows = rows_of(tables.clini)
    write_table(tables.clini, header, [[row[0], "MSS", row[2]] for row in rows])
    with pytest.raises(UserError, match="must have at least 2 values"):
        check(tables)


def test_a_slide_of_two_patients_is_told_after_the_lists(tables):
    for name in ("P04-1", "P07-1"):
        (tables.features / f"{name}.h5").write_bytes((tables.features / "P01-1.h5").read_bytes())
    words = "P01-1.h5 of P01 and P04-1.h5 of P04, P01-1.h5 of P01 and P07-1.h5 of P07"
    with pytest.raises(UserError, match=words):
        check(tables)


@pytest.mark.parametrize(
    ("names", "candidates", "near"),
    [
        (["TCGA-AA-0001"], ["tcga_aa_0001"], {"TCGA-AA-0001": "tcga_aa_0001"}),
        (["P1"], ["P01", "P-01"], {"P1": "P-01"}),
        (["TCGA-AA-0001"], ["TCGA-AA-0001-01Z"], {"TCGA-AA-0001": "TCGA-AA-0001-01Z"}),
        (["CASE-17-ABCD"], ["CASE-17-ABCE"], {"CASE-17-ABCD": "CASE-17-ABCE"}),
        (["P1"], ["Q7", "P10"], {}),
        (["P\u00e9-01"], ["Pe\u03011"], {"P\u00e9-01": "Pe\u03011"}),
        # the second's partner is no guess for the first
        (["TCGA-AA-3688-01Z-00", "TCGA-AA-3976-01Z-00"], ["tcga_aa_3976_01z_00"],
         {"TCGA-AA-3976-01Z-00": "tcga_aa_3976_01z_00"}),
    ],
)  # fmt: skip
def test_near_names(names, candidates, near):
    assert near_matches(names, candidates) == near


def test_sites_are_counted_and_shown_by_fold(tmp_path):
    sites = ["north", "south", "east"] * 8 + ["north"] * 2
    tables = make_tables(tmp_path, patients=26, extra={"SITE": sites})
    _, lines = check(tables, group_column="SITE", folds=3)
    assert [line.split() for line in following(lines, "Sites (SITE), ")] == [
        ["north", "10", "isMSIH:", "5", "/", "10", "LF:", "9"],
        ["south", "8", "isMSIH:", "4", "/", "8", "LF:", "8"],
        ["east", "8", "isMSIH:", "4", "/", "8", "LF:", "8"],
    ]
    folds = following(lines, "Folds: ")
    tested = [line for line in folds if line.split()[2] == "test"]
    assert sorted(line.split("   ")[-1] for line in tested) == [
        "1 sites: east (8)", "1 sites: north (10)", "1 sites: south (8)",
    ]  # fmt: skip


def test_sites_are_shown_before_folds_are_refused(tmp_path):
    tables = make_tables(tmp_path, patients=20, extra={"SITE": ["north", "south"] * 10})
    lines: list[str] = []
    config = CheckConfig(
        tables.clini, tables.slides, tables.features, "isMSIH", group_column="SITE", folds=2
    )
    with pytest.raises(UserError, match="they are of 1 sites"):
        run_check(config, lines.append)
    assert following(lines, "Sites (SITE), ") == [
        "north     10   isMSIH: 0 / 10", "south     10   isMSIH: 10 / 10",
    ]  # fmt: skip
