import csv
import hashlib
import random
import re
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from examples.pathology.cohort import cohort as module
from examples.pathology.cohort.cohort import load_external
from examples.pathology.cohort.patients import known_values
from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import UserError
from examples.pathology.features.files import read_features, write_features
from examples.pathology.settings.cohort import Sources
from examples.pathology.tables.matching import match_files, slide_key
from examples.pathology.tables.reading import read_clinical_table, read_table, sites_of
from examples.pathology.training.bags import BagStore
from tests.pathology.holding import held
from tests.pathology.tiny import Tables, make_tables, write_bag, write_table, write_trident_bag

SHARED = Path(__file__).parents[3] / "../shared/data"


def reasons(cohort, item):
    return {row.name: row.reason for row in cohort.ledger if row.item == item and row.reason}


def rewrite(path, change):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    write_table(path, rows[0], change(rows[1:]))


@pytest.fixture
def tables(tmp_path):
    return make_tables(tmp_path)


def test_a_plain_cohort_is_joined(tables):
    cohort = tables.load()
    assert [p.name for p in cohort.patients] == [f"P{i:02d}" for i in range(12)]
    assert cohort.target.classes == ("MSIH", "MSS")
    assert cohort.targets[1].kind == "regression"
    assert (cohort.kind.extractor, cohort.kind.random_weights, cohort.kind.in_features) == (
        "tiny",
        False,
        768,
    )
    assert [count for _, count in cohort.funnel] == [12, 12, 12, 12]
    assert all(patient.tiles == 4 for patient in cohort.patients)


def test_a_missing_auxiliary_value_is_absent_and_the_patient_is_used(tables):
    patient = tables.load().patients[3]
    assert patient.name == "P03"
    assert patient.known == {}


@pytest.mark.parametrize("mark", ["", "NA", "nan", "None", "N/A", "[Not Available]"])
def test_a_missing_label_is_no_class(tables, mark):
    rewrite(tables.clini, lambda rows: [[rows[0][0], mark, mark], *rows[1:]])
    cohort = tables.load()
    assert cohort.target.classes == ("MSIH", "MSS")
    assert reasons(cohort, "patient") == {"P00": "no isMSIH label"}
    assert reasons(cohort, "slide") == {"P00-1": "its patient is left out"}
    assert [count for _, count in cohort.funnel] == [12, 11, 11, 11]


UNKNOWN = (
    "Not Reported", "not reported", "Unknown", "[Unknown]", "[Not Applicable]", "[Not Evaluated]",
    "'--", "--", "[Discrepancy]", "?", "n.d.", "N.A.", "#DIV/0!", "#VALUE!", "#REF!", "#NUM!",
)  # fmt: skip


@pytest.mark.parametrize("word", UNKNOWN)
def test_words_of_other_portals_for_not_known_are_no_class_and_no_number(tables, word):
    def change(rows):
        return [[rows[0][0], word, rows[0][2]], [*rows[1][:2], word], *rows[2:]]

    rewrite(tables.clini, change)
    cohort = tables.load()
    assert cohort.target.classes == ("MSIH", "MSS")
    assert [p.name for p in cohort.training_only] == ["P00"]
    assert cohort.targets[1] == Target("LF", "regression")
    assert "LF" not in cohort.patients[0].known


def test_words_taken_for_not_known_are_told_with_their_counts(tables, caplog):
    grades = ["None", "Focal", "Diffuse", "none"] * 3
    rewrite(
        tables.clini, lambda rows: [[row[0], g, ""] for row, g in zip(rows, grades, strict=True)]
    )
    cohort = tables.load(auxiliary=())
    module.log_cohort(cohort)
    assert "isMSIH: taken for not known: 'None' (3), 'none' (3)." in caplog.text
    caplog.clear()
    sources = Sources(tables.clini, tables.slides, tables.features)
    module.log_unknown(module.load_external(sources, cohort.targets))
    assert "'None' (3), 'none' (3)" in caplog.text


def test_empty_cells_are_no_words(tables, caplog):
    cohort = tables.load()
    module.log_cohort(cohort)
    assert cohort.unknown == {}
    assert not caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_encodings_of_a_table_are_found(tables, encoding, separator):
    whole = tables.load()
    text = tables.clini.read_text(encoding="utf-8").replace(",", separator)
    tables.clini.write_text(text, encoding=encoding)
    assert tables.load().digest == whole.digest


def test_decimal_commas_are_read_where_all_values_agree(tables):
    whole = tables.load()
    text = tables.clini.read_text(encoding="utf-8")
    tables.clini.write_text(text.replace(",", ";").replace(".", ","), encoding="utf-8")
    cohort = tables.load()
    assert cohort.targets[1] == Target("LF", "regression")
    assert cohort.digest == whole.digest
    sources = Sources(tables.clini, tables.slides, tables.features)
    assert module.load_external(sources, whole.targets).patients == whole.patients


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (('"0,45"', "0.5"), "`LF` must write its numbers in one way, but has '0,45' and '0.5'"),
        (('"1,234"', "17"), "must have decimal points, but has '1,234', whose comma may separate"),
    ],
)
def test_commas_that_may_mean_two_things_are_refused(tables, values, words):
    lines = [f"P{i:02d},{('MSS', 'MSIH')[i % 2]},{values[i % 2]}" for i in range(12)]
    tables.clini.write_text("\n".join(["PATIENT,isMSIH,LF", *lines]), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        tables.load()


def test_rows_without_any_value_are_passed_by(tables, tmp_path):
    whole = tables.load()
    head, *rows = tables.clini.read_text(encoding="utf-8").splitlines()
    lines = ["", ",,", head, "", *rows[:4], ",,,,,", "  ", *[f"{row},," for row in rows[4:]], ",,"]
    tables.clini.write_text("\n".join(lines), encoding="utf-8")
    assert tables.load().digest == whole.digest
    book = tmp_path / "clini.xlsx"
    cells = [[*line.split(","), "", ""][:3] for line in lines]
    pd.DataFrame(cells).to_excel(book, index=False, header=False)
    assert replace(tables, clini=book).load().digest == whole.digest


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["PATIENT,x", "", "P0,1", ",2"], "`PATIENT` must be filled in, but is empty in row 4"),
        (["PATIENT,x", "P0,1", "", "P1,2,3"], "has 2 names and 3 cells in row 4"),
        (["", ",,"], "must be a table, but it is empty"),
    ],
)
def test_rows_are_told_by_their_number(tmp_path, lines, words):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_clinical_table(path, ["x"])


def test_an_empty_first_sheet_is_said_to_be_empty(tmp_path):
    path = tmp_path / "a.xlsx"
    with pd.ExcelWriter(path) as book:
        pd.DataFrame().to_excel(book, sheet_name="cover")
        pd.DataFrame({"PATIENT": ["P0"]}).to_excel(book, sheet_name="data")
    with pytest.raises(UserError, match="but it is empty, or its first sheet is"):
        read_table(path, ["PATIENT"])


def labels_of(tables, labels):
    rewrite(
        tables.clini, lambda rows: [[row[0], x, ""] for row, x in zip(rows, labels, strict=True)]
    )


def test_equal_numbers_are_one_class(tables):
    labels_of(tables, ["0", "1.0", "0.0", "1"] * 3)
    cohort = tables.load(auxiliary=())
    assert cohort.target.classes == ("0", "1")
    assert [p.label for p in cohort.patients] == ["0", "1"] * 6


def test_numbers_that_are_spelled_alike_stay_as_they_are(tables):
    labels_of(tables, ["0.0", "1.0"] * 6)
    assert tables.load(auxiliary=()).target.classes == ("0.0", "1.0")
    labels_of(tables, [f"{i}.50" for i in range(12)])
    cohort = tables.load(auxiliary=(), kind=("isMSIH=regression",))
    assert cohort.patients[0].label == "0.50"


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("MSI-H", "MSI\u2011H", r"MSI\u2011H"),  # Word's hyphen that does not break
        ("MSI-H", "MSI\u2212H", r"MSI\u2212H"),
        ("MSI-H", "MSI-H\u200b", r"MSI-H\u200b"),
        ("MSI-H", "\uff2dSI-H", "\uff2dSI-H"),
        ("Größe", "grö\u00adße", r"grö\xadße"),
    ],
)
def test_what_nobody_sees_makes_no_other_class(tables, one, other, shown):
    labels_of(tables, [one, "No", other] * 4)
    with pytest.raises(UserError, match=re.escape(f"but has '{one}' and '{shown}'. Write both")):
        tables.load(auxiliary=())


@pytest.mark.parametrize(("one", "other"), [("Yes", "yes"), ("MSI H", "MSI  H")])
def test_classes_that_look_alike_are_refused_with_both_named(tables, one, other):
    labels_of(tables, [one, "No", other] * 4)
    first, second = sorted([one, other])
    words = f"`isMSIH` must spell each class in one way, but has {first!r} and {second!r}"
    with pytest.raises(UserError, match=words):
        tables.load(auxiliary=())


def test_a_run_on_0_and_1_takes_0_0_and_1_0(tables):
    labels_of(tables, ["0.0", "1.0", "1", ""] * 3)
    sources = Sources(tables.clini, tables.slides, tables.features)
    target = Target("isMSIH", "classification", ("0", "1"), "1")
    cohort = module.load_external(sources, [target])
    assert [p.label for p in cohort.patients[:4]] == ["0", "1", "1", ""]


def test_minus_next_to_plus_is_a_class(tables):
    rewrite(tables.clini, lambda rows: [[row[0], "+-"[i % 2], ""] for i, row in enumerate(rows)])
    assert tables.load(auxiliary=()).target.classes == ("+", "-")


def test_words_among_numbers_are_warned_about(tables, caplog):
    rewrite(tables.clini, lambda rows: [[*rows[0][:2], "lost"], *rows[1:]])
    assert tables.load().targets[1].kind == "classification"
    assert "`LF` is taken for classes, as among its numbers stands 'lost' (1)." in caplog.text
    caplog.clear()
    tables.load(kind=("LF=classification",))
    tables.load(auxiliary=())
    assert not caplog.text


def test_a_class_of_a_run_stays_one_whatever_it_means_elsewhere(tables):
    rewrite(tables.clini, lambda rows: [[rows[0][0], "Unknown", ""], ["P01", "NA", ""], *rows[2:]])
    target = Target("isMSIH", "classification", ("MSIH", "MSS", "Unknown"), "Unknown")
    sources = Sources(tables.clini, tables.slides, tables.features)
    cohort = module.load_external(sources, [target])
    assert [p.label for p in cohort.patients[:3]] == ["Unknown", "", "MSIH"]


def test_a_patient_with_an_auxiliary_value_alone_is_for_training_only(tables):
    rewrite(tables.clini, lambda rows: [[rows[0][0], "", "0.5"], *rows[1:]])
    cohort = tables.load()
    assert [p.name for p in cohort.patients] == [f"P{i:02d}" for i in range(1, 12)]
    (patient,) = cohort.training_only
    assert (patient.name, patient.label, patient.known) == ("P00", "", {"LF": 0.5})
    assert reasons(cohort, "patient") == {"P00": "no isMSIH label: trained on for LF, never tested"}
    assert {row.name for row in cohort.ledger if row.status == "training only"} == {"P00"}
    assert [count for _, count in cohort.funnel] == [12, 11, 11, 11, 1]
    without = replace(cohort, training_only=())
    assert without.labels_sha256() == cohort.labels_sha256()  # the same splits fit


def test_complete_cases_leave_out_whoever_lacks_a_value(tables):
    rewrite(tables.clini, lambda rows: [[rows[0][0], "", "0.5"], *rows[1:]])
    cohort = tables.load(complete_cases=True)
    assert reasons(cohort, "patient") == {
        "P00": "no isMSIH value, and only complete cases are used",
        "P03": "no LF value, and only complete cases are used",
    }
    assert cohort.training_only == ()
    assert [count for _, count in cohort.funnel] == [12, 10, 10, 10]


def test_columns_may_have_other_names(tables):
    for path, old, new in ((tables.clini, "PATIENT", "case"), (tables.slides, "FILENAME", "slide")):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    tables.slides.write_text(
        tables.slides.read_text(encoding="utf-8").replace("PATIENT", "case"), encoding="utf-8"
    )
    names = {"patient_column": "case", "filename_column": "slide"}
    cohort = tables.load(auxiliary=(), **names)
    assert len(cohort.patients) == 12
    with pytest.raises(UserError, match=r"must have a column `PATIENT`, but has 'case'"):
        tables.load()


def test_composed_and_decomposed_names_are_the_same(tables):
    """Patients, columns, classes and files; each file is opened under the name that it has."""
    clini = tables.clini.read_text().replace("P0", "Pe\u0301").replace("isMSIH", "isMSIe\u0301")
    clini = clini.replace("PATIENT", "N\u00e9").replace(",MSS,", ",MS\u00e9,", 2)
    tables.clini.write_text(clini.replace(",MSS,", ",MSe\u0301,"))
    slides = tables.slides.read_text().replace("P0", "P\u00e9").replace("PATIENT", "Ne\u0301")
    tables.slides.write_text(slides)
    for path in sorted(tables.features.glob("P0*.h5")):
        path.rename(path.with_name(path.name.replace("P0", "Pe\u0301")))
    cohort = tables.load(target="isMSI\u00e9", positive="MSe\u0301", patient_column="Ne\u0301")
    assert [p.name for p in cohort.patients] == ["P10", "P11"] + [f"P\u00e9{i}" for i in range(10)]
    assert all(path.exists() for patient in cohort.patients for path in patient.files)
    assert (cohort.target.classes, cohort.target.positive) == (("MSIH", "MS\u00e9"), "MS\u00e9")


def test_the_ledger_names_everyone_left_out(tables):
    rewrite(
        tables.slides,
        lambda rows: [
            *[row for row in rows if row[0] != "P01"],
            ["P05", "P05-2"],
            ["P06", "P06-1"],
            ["STRANGER", "P00-9"],
        ],
    )
    (tables.features / "P02-1.h5").unlink()
    (tables.features / "P04-1.h5").write_bytes(b"no HDF5 at all")
    write_bag(tables.features / "P07-1.h5", np.zeros((0, 768)))
    write_bag(tables.features / "nobody.h5", np.zeros((1, 768)))
    cohort = tables.load()
    assert {row.name for row in cohort.ledger if row.status == "unclaimed"} == {
        "P01-1.h5",
        "nobody.h5",
    }
    patients = reasons(cohort, "patient")
    assert patients == {
        "P01": "no slide in the slide table",
        "P02": "none of its slides has usable features",
        "P04": "none of its slides has usable features",
        "P07": "none of its slides has usable features",
    }
    slides = {(r.name, r.status): r.reason for r in cohort.ledger if r.item == "slide"}
    assert slides["P02-1", "excluded"] == slides["P05-2", "excluded"] == "no feature file"
    assert slides["P04-1", "excluded"].startswith("unreadable: ")
    assert slides["P07-1", "excluded"] == "no tiles"
    assert slides["P06-1", "excluded"] == "listed more than once (P06-1.h5)"
    assert slides["P06-1", "used"] == ""
    assert slides["P00-9", "excluded"] == "its patient is not in the clinical table"
    assert [count for _, count in cohort.funnel] == [12, 12, 11, 8]


def test_a_feature_file_in_use_leaves_nobody_out_but_stops(tables):
    with held(tables.features / "P02-1.h5"), pytest.raises(UserError, match=r"P02-1\.h5 is in use"):
        tables.load()


def test_the_ledger_is_a_table_that_accounts_for_all(tables, tmp_path):
    (tables.features / "P02-1.h5").unlink()
    tables.load().write_ledger(tmp_path / "ledger.csv")
    table = pd.read_csv(tmp_path / "ledger.csv", keep_default_na=False)
    assert table.columns.tolist() == ["item", "name", "patient", "status", "reason"]
    assert (table["item"] == "patient").sum() == 12
    assert (table["item"] == "slide").sum() == 12
    assert (table["reason"] == "").equals(table["status"] == "used")


def test_slides_of_a_patient_are_joined_whatever_the_order_of_rows(tables):
    for name in ("P00-3", "P00-2"):
        write_bag(tables.features / f"{name}.h5", np.full((2, 768), float(name[-1])))
    rewrite(tables.slides, lambda rows: [*rows, ["P00", "P00-3"], ["P00", "P00-2"]])
    first = tables.load()
    for seed in range(3):
        rewrite(tables.slides, lambda rows, seed=seed: random.Random(seed).sample(rows, len(rows)))
        again = tables.load()
        assert again.patients == first.patients
        assert again.digest == first.digest
    bag = BagStore().load(first.patients[0])
    expected = [read_features(tables.features / f"P00-{i}.h5").feats for i in (1, 2, 3)]
    np.testing.assert_array_equal(bag, np.concatenate(expected))


def test_a_store_gives_the_same_with_and_without_memory(tables):
    patients = tables.load().patients[:3]
    small, large = BagStore(cache_bytes=0), BagStore()
    for patient in [*patients, *patients]:
        np.testing.assert_array_equal(small.load(patient), large.load(patient))


@pytest.mark.parametrize(
    ("key", "files", "found"),
    [
        ("a", ["a", "b"], ["a"]),
        ("sub/a", ["sub/a", "a"], ["sub/a"]),
        ("a", ["x/a"], ["x/a"]),
        ("a", ["x/a", "y/a"], ["x/a", "y/a"]),
        ("TCGA-1-DX1", ["TCGA-1-DX1.23748e80"], ["TCGA-1-DX1.23748e80"]),
        ("TCGA-1-DX1.23748e80", ["TCGA-1-DX1"], ["TCGA-1-DX1"]),
        ("TCGA-1-DX1", ["TCGA-1-DX10.23748e80"], []),
        ("TCGA-1-DX1", ["TCGA-1-DX1.aa", "TCGA-1-DX1.bb"], ["TCGA-1-DX1.aa", "TCGA-1-DX1.bb"]),
        ("TCGA-1-DX1.aa", ["TCGA-1-DX1.bb"], []),
        ("A1", ["A10", "A11"], []),
        ("P\u00e9/a\u00f1", ["Pe\u0301/an\u0303"], ["Pe\u0301/an\u0303"]),
        ("Pe\u0301", ["x/P\u00e9"], ["x/P\u00e9"]),
        ("P\u00e9", ["Pe\u0301.23748e80"], ["Pe\u0301.23748e80"]),
        ("Pe\u0301.23748e80", ["P\u00e9"], ["P\u00e9"]),
        ("P\u00e9", ["Pe\u0301", "P\u00e9"], ["Pe\u0301", "P\u00e9"]),
    ],
)
def test_files_are_matched(key, files, found):
    assert match_files([key], files) == {key: found}


UUID = "8923a151-a690-40b7-9e5a-fcbedfc2394f"


@pytest.mark.parametrize(
    ("key", "files", "found"),
    [
        ("a.svs", ["a"], ["a"]),
        ("a.SVS", ["a", "a.svs"], ["a.svs"]),
        ("a", ["a.svs", "a.tif"], ["a.svs", "a.tif"]),
        ("sub/a.svs", ["sub/a", "sub/a.svs"], ["sub/a.svs"]),
        ("a.tif", ["a.svs"], []),
        ("a.tif", ["a", "a.svs"], []),  # the first was made of either
        ("a.tif", ["x/a", "x/a.svs"], []),
        ("a.svs", ["a", "a.png"], ["a"]),  # a flat picture beside a slide
        ("a.mrxs.tif", ["a.mrxs"], ["a.mrxs"]),
        ("a", ["a.mrxs"], ["a.mrxs"]),
        ("S18-77.A2", ["S18-77"], []),
        ("S18-77.A2.svs", ["S18-77"], []),
        ("S18-77", ["S18-77.A2"], []),
        ("P1.v2", ["P1"], []),
        ("S18-77.20240131", ["S18-77"], []),
        (f"S18-77.{UUID}.svs", ["S18-77"], ["S18-77"]),
        ("S18-77", [f"x/S18-77.{UUID}"], [f"x/S18-77.{UUID}"]),
        (f"TCGA-1-DX1.{UUID.upper()}.svs", ["TCGA-1-DX1.tif"], []),
        ("S18-77.svs", ["S18-77.features", "S18-78.features"], ["S18-77.features"]),
        ("a", ["a.ome"], ["a.ome"]),
        ("a.ome.tif", ["a"], []),
        ("a/1", ["1"], ["1"]),
        ("a/1", ["x/a/1", "x/b/1"], ["x/a/1"]),
        ("x/a/1", ["a/1", "b/1"], ["a/1"]),
        ("old/1", ["new/1"], ["new/1"]),  # another tree
        ("a/1", ["b/1", "a/2"], []),
    ],
)  # fmt: skip
def test_a_file_of_another_slide_is_no_match(key, files, found):
    assert match_files([key], files) == {key: found}


@pytest.mark.parametrize(
    ("keys", "files", "found"),
    [
        (["a/1", "a/2"], ["a/1", "b/1", "b/2"], [["a/1"], []]),
        (["a/1", "b/1"], ["b/1"], [[], ["b/1"]]),
        (["P1/s", "P7/s"], ["P1/s", "P31/s"], [["P1/s"], []]),
        (["1", "b/1"], ["b/1"], [[], ["b/1"]]),
        (["a.svs", "a.tif"], ["a.svs", "a.tif"], [["a.svs"], ["a.tif"]]),
        (["a.svs", "a.tif"], ["a", "a.svs"], [["a.svs"], []]),
        (["a.svs", "a.tif"], ["a"], [[], []]),
        (["a.svs", "a.png"], ["a"], [["a"], []]),
        (["a.ome.tif", "a.tif"], ["a"], [[], ["a"]]),
        (["P\u00e9/1.svs", "x/1.svs"], ["Pe\u0301/1"], [["Pe\u0301/1"], []]),
        # The same slide, however it is called.
        (["TCGA-1", "TCGA-1.23748e80"], ["TCGA-1"], [["TCGA-1"], ["TCGA-1"]]),
    ],
)
def test_what_is_another_keys_is_no_match(keys, files, found):
    assert match_files(keys, files) == dict(zip(keys, found, strict=True))


def test_a_slide_without_its_file_gets_none_of_another_site(tables):
    for number, site in enumerate(("siteA", "siteB")):
        (tables.features / site).mkdir()
        for i in range(12):
            write_bag(tables.features / site / f"{i:03d}.h5", np.full((2, 768), 12 * number + i))
    (tables.features / "siteA" / "007.h5").unlink()
    one = [[f"P{i:02d}", f"siteA/{i:03d}.svs"] for i in range(12)]
    other = [[f"P{i:02d}", f"siteB/{i - 6:03d}.svs"] for i in range(6, 12)]
    rewrite(tables.slides, lambda rows: one)
    assert reasons(tables.load(), "slide") == {"siteA/007.svs": "no feature file"}
    rewrite(tables.slides, lambda rows: [*one, *other])
    cohort = tables.load()
    assert reasons(cohort, "slide") == {"siteA/007.svs": "no feature file"}
    assert [path.parent.name for path in cohort.patients[7].files] == ["siteB"]


def test_slides_of_one_name_are_told_apart_by_their_suffix(tables):
    for i, name in enumerate(("a", "a.svs", "a.tif")):  # the first of when one was alone
        write_bag(tables.features / f"{name}.h5", np.full((2, 768), i))
    rewrite(tables.slides, lambda rows: [["P00", "a.svs"], ["P01", "a.tif"], *rows[2:]])
    cohort = tables.load()
    assert [p.files[0].name for p in cohort.patients[:2]] == ["a.svs.h5", "a.tif.h5"]
    (tables.features / "a.tif.h5").unlink()
    assert reasons(tables.load(), "slide") == {"a.tif": "no feature file"}


def test_folders_of_another_tree_are_matched_by_name_with_a_warning(tables, caplog):
    (tables.features / "new").mkdir()
    (tables.features / "P00-1.h5").rename(tables.features / "new" / "P00-1.h5")
    rewrite(tables.slides, lambda rows: [["P00", "old/P00-1"], *rows[1:]])
    assert len(tables.load().patients) == 12
    assert "names alone are matched: old/P00-1 with new/P00-1. Write" in caplog.text


def test_an_ambiguous_name_is_left_out_with_both_files(tables):
    write_bag(tables.features / "P00.aaaaaaaa.h5", np.zeros((1, 768)))
    write_bag(tables.features / "P00.bbbbbbbb.h5", np.zeros((1, 768)))
    rewrite(tables.slides, lambda rows: [["P00", "P00"], *rows[1:]])
    reason = reasons(tables.load(), "slide")["P00"]
    assert reason == "ambiguous: P00.aaaaaaaa.h5, P00.bbbbbbbb.h5"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a", "a"),
        ("a.h5", "a"),
        ("sub/a.h5", "sub/a"),
        ("sub\\a.svs", "sub/a"),
        ("TCGA-1.23748e80", "TCGA-1.23748e80"),
        ("TCGA-1.23748e80.svs", "TCGA-1.23748e80"),
    ],
)
def test_names_become_keys(name, key):
    assert slide_key(name, Path("slides.csv")) == key


@pytest.mark.parametrize("name", ["../a.h5", "a/../../b", "/etc/a", "C:\\a", "..\\a"])
def test_paths_out_of_the_folder_are_refused(tables, name):
    rewrite(tables.slides, lambda rows: [*rows, ["P00", name]])
    with pytest.raises(UserError, match=r"slides.csv: `FILENAME` must be a path inside"):
        tables.load()


@pytest.mark.parametrize("name", ["P00-1", "P00-1.h5", "P00-1.23748e80"])
def test_a_file_of_two_patients_is_refused(tables, name):
    rewrite(tables.slides, lambda rows: [*rows, ["P01", name]])
    with pytest.raises(UserError, match=r"P00-1.h5 is claimed by P00 and P01"):
        tables.load()


def copied(source, path):
    path.write_bytes(source.read_bytes())


def linked(source, path):
    path.unlink()
    path.symlink_to(source)


def in_another_layout(source, path):
    bag = read_features(source)
    write_features(
        path, bag.feats, bag.coords_um + 512, extractor="tiny", weights_sha256="ab",
        random_weights=False, layout="stamp-v1",
    )  # fmt: skip


@pytest.mark.parametrize("copy", [copied, linked, in_another_layout])
def test_the_same_features_under_two_patients_are_refused(tables, copy):
    """They would train a model that is tested on them."""
    copy(tables.features / "P01-1.h5", tables.features / "P04-1.h5")
    words = r"one patient, but the same features are in P01-1.h5 of P01 and P04-1.h5 of P04\. Take"
    with pytest.raises(UserError, match=words):
        tables.load()
    sources = Sources(tables.clini, tables.slides, tables.features)
    with pytest.raises(UserError, match=words):
        load_external(sources, [Target("isMSIH", "classification", ("MSIH", "MSS"), "MSIH")])
    rewrite(tables.slides, lambda rows: [row for row in rows if row[0] != "P04"])
    assert "P04" not in [patient.name for patient in tables.load().patients]


def test_a_patient_without_a_label_is_no_reason_to_refuse_a_copy(tables):
    copied(tables.features / "P01-1.h5", tables.features / "P04-1.h5")
    rewrite(tables.clini, lambda rows: [[r[0], "", ""] if r[0] == "P04" else r for r in rows])
    assert len(tables.load().patients) == 11


def test_equal_checksums_alone_are_no_copies(tables, monkeypatch):
    monkeypatch.setattr(zlib, "crc32", lambda _: 7)
    assert len(tables.load().patients) == 12


def test_a_patient_in_two_rows_is_refused(tables):
    rewrite(tables.clini, lambda rows: [*rows, rows[4]])
    with pytest.raises(UserError, match="one row per patient, but has several for P04"):
        tables.load()


def test_empty_cells_are_refused_by_row(tables):
    rewrite(tables.slides, lambda rows: [rows[0], ["", "x"], *rows[1:]])
    with pytest.raises(UserError, match="`PATIENT` must be filled in, but is empty in row 3"):
        tables.load()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extractor": "other"}, "P03-1.h5 of other"),
        ({"sha": "cd"}, "P03-1.h5 of tiny .768-d, weights cd"),
        ({"width": 512}, "P03-1.h5 of tiny .512-d"),
    ],
)
def test_mixed_extractors_are_refused(tables, change, words):
    width = change.pop("width", 768)
    write_bag(tables.features / "P03-1.h5", np.ones((2, width)), **change)
    with pytest.raises(UserError, match=f"one extractor with the same weights.* but .* {words}"):
        tables.load()


def test_magnifications_do_not_mix(tables):
    random = np.random.default_rng(0)
    for i in range(12):
        path = tables.features / f"P{i:02d}-1.h5"
        write_trident_bag(path, random.normal(size=(2, 8)), 5 if i == 3 else 20)
    words = r"P00-1.h5 is of tiny .*at 20x\) and P03-1.h5 of tiny .*at 5x\)"
    with pytest.raises(UserError, match=words):
        tables.load()
    write_trident_bag(tables.features / "P03-1.h5", random.normal(size=(2, 8)), 20)
    assert tables.load().kind.tiles == ", tiles in 256 px at 20x"


def test_a_file_that_does_not_know_its_weights_is_no_mixture(tables):
    with h5py.File(tables.features / "P00-1.h5", "r+") as file:  # the others tell it
        file.attrs["mtbalance_weights_sha256"] = ""
    cohort = tables.load()
    assert len(cohort.patients) == 12
    assert cohort.kind.weights_sha256 == "ab"


def test_features_that_nobody_uses_may_be_of_another_extractor(tables):
    rewrite(tables.clini, lambda rows: [[rows[0][0], "", ""], *rows[1:]])
    write_bag(tables.features / "P00-1.h5", np.ones((2, 5)), extractor="other")
    assert tables.load().kind.extractor == "tiny"


def test_a_target_needs_two_values(tables):
    rewrite(tables.clini, lambda rows: [[row[0], "MSS", row[2]] for row in rows])
    with pytest.raises(UserError, match=r"`isMSIH` must have at least 2 values .* but has MSS"):
        tables.load()


def test_an_auxiliary_target_needs_two_values(tables):
    rewrite(tables.clini, lambda rows: [[*row[:2], "0.5"] for row in rows])
    with pytest.raises(UserError, match=r"`LF` must have at least 2 values .* but has"):
        tables.load()


def test_a_measurement_is_a_regression_unless_it_is_cut_or_called_a_class(tmp_path):
    tables = make_tables(tmp_path, patients=30, missing=(3,), extra={"grade": [1, 2, 3] * 10})
    cohort = tables.load("LF", ("isMSIH", "grade"))
    assert [t.kind for t in cohort.targets] == ["regression", "classification", "regression"]
    assert [p.name for p in cohort.training_only] == ["P03"]
    with tables.clini.open(encoding="utf-8", newline="") as file:
        cells = {row["PATIENT"]: row["LF"] for row in csv.DictReader(file)}
    assert {p.name: p.label for p in cohort.patients} == {n: c for n, c in cells.items() if c}
    again = tables.load("LF", ("grade",), kind=("grade=classification",), cutoff=0.5)
    assert again.target == Target("LF", "classification", ("<0.5", ">=0.5"), ">=0.5", 0.5)
    assert again.targets[1:] == (Target("grade", "classification", ("1", "2", "3"), "3"),)
    assert {p.name for p in again.patients if p.label == ">=0.5"} == {
        name for name, cell in cells.items() if cell and float(cell) >= 0.5
    }
    with pytest.raises(UserError, match=r"at most 20 classes, but has .*--kind LF=regression"):
        tables.load("LF", (), kind=("LF=classification",))


def test_few_numbers_are_classes_unless_called_a_regression(tmp_path):
    tables = make_tables(tmp_path, extra={"grade": [1, 2, 3] * 4})
    assert tables.load("grade", ()).target.classes == ("1", "2", "3")
    assert tables.load("grade", (), kind=("grade=regression",)).target.kind == "regression"
    with pytest.raises(UserError, match="`isMSIH` must hold numbers, but has 'MSIH', 'MSS'"):
        tables.load("isMSIH", (), kind=("isMSIH=regression",))
    with pytest.raises(UserError, match="`isMSIH` must hold numbers, but has"):
        tables.load(cutoff=1.0)


def test_known_values_are_classes_and_numbers(tables):
    one = tables.load("LF", ("isMSIH",), kind=("LF=regression",))
    values = known_values(one.patients[0], one.targets)
    assert values == {"LF": float(one.patients[0].label), "isMSIH": "MSIH"}
    (alone,) = one.training_only
    assert known_values(alone, one.targets) == {"isMSIH": "MSS"}


def test_a_missing_column_is_refused_with_the_nearest(tables):
    with pytest.raises(UserError, match=r"must have a column `isMSI`, but has .*`isMSIH`"):
        tables.load("isMSI")


def test_nobody_left_is_told_with_the_reasons(tables):
    rewrite(tables.slides, lambda rows: [[row[0], f"x{row[1]}"] for row in rows])
    with pytest.raises(
        UserError, match=r"but nobody has: 12 in the clinical table.* no feature fil"
    ):
        tables.load()


def test_a_folder_without_features_is_refused(tables, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "holds none"), (tmp_path / "no", "is no folder")):
        with pytest.raises(UserError, match=f"must be a folder of .h5 files, but .* {words}"):
            replace(tables, features=folder).load()


def test_the_rarer_class_is_positive_unless_asked_otherwise(tables):
    rewrite(tables.clini, lambda rows: [["P00", "MSS", rows[0][2]], *rows[1:]])
    assert tables.load().target.positive == "MSIH"
    assert tables.load(positive="MSS").target.positive == "MSS"
    with pytest.raises(UserError, match=r"`positive` must be a value of `isMSIH`.*'MSI-H'"):
        tables.load(positive="MSI-H")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["0", "1"] * 6, "classification"),
        (["low", "high", "mid"] * 4, "classification"),
        ([str(i / 2) for i in range(12)], "regression"),
        (["", *[str(i) for i in range(11)]], "regression"),
    ],
)
def test_numbers_make_a_regression_and_words_a_classification(tmp_path, values, kind):
    tables = make_tables(tmp_path, extra={"other": values})
    assert tables.load(auxiliary=("other",)).targets[1].kind == kind


def test_tables_of_excel_are_read_as_they_look(tables, tmp_path):
    rows = pd.read_csv(tables.clini, dtype={"PATIENT": str})
    rows["PATIENT"] = " " + rows["PATIENT"] + " "
    path = tmp_path / "clini.xlsx"
    rows.to_excel(path, index=False)
    ours = replace(tables, clini=path).load()
    assert ours.patients == tables.load().patients


@pytest.mark.parametrize("hint", ["sep=;\r\n", "SEP=;\n", '"sep=;"\n'])
def test_the_separator_that_excel_tells_is_taken(tmp_path, hint):
    (tmp_path / "a.csv").write_text(f"{hint}PATIENT;isMSIH\nP0;1,5\n", encoding="utf-8-sig")
    table = read_table(tmp_path / "a.csv", ["PATIENT", "isMSIH"])
    assert table.to_numpy().tolist() == [["P0", "1,5"]]


@pytest.mark.parametrize("separator", ["|", "\t"])
def test_a_separator_that_is_none_of_ours_is_taken_if_told(tmp_path, separator):
    text = f"sep={separator}\nPATIENT{separator}isMSIH\nP0{separator}1\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert read_table(tmp_path / "a.csv", ["isMSIH"]).to_numpy().tolist() == [["P0", "1"]]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tables):
    tables.clini.write_text("\ufeff" + tables.clini.read_text(encoding="utf-8"), encoding="utf-8")
    assert len(tables.load().patients) == 12


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{}", "must be one of .csv, .tsv, .xlsx"),
        ("a.csv", b"PATIENT;MSI\nP0;MSS\n", "It seems to use semicolons"),
        ("a.csv", b"PATIENT,isMSIH,isMSIH\nP0,1,2\n", "one column `isMSIH`, but has 2"),
        ("a.csv", b"", "must be a table"),
        ("a.csv", b"sep=;\nPATIENT;isMSIH\nP0;1\nP1;2;3\n", "2 names and 3 cells in row 4"),
        ("a.csv", b"PATIENT,isMSIH\n\xff\xfe,1\n", "table in UTF-8, but byte 0xff in row 2"),
        ("a.csv", "PATIENT,isMSIH\nP0,1\n".encode("utf-16-le"), "UTF-8, but has bytes of 0. Save"),
        ("a.xlsx", b"no workbook", "must be a table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / name, ["PATIENT", "isMSIH"])


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be a readable file, but No such file"):
        read_table(tmp_path / "a.csv", [])


def test_the_digest_sees_features_and_labels(tables):
    before = tables.load()
    rewrite(tables.clini, lambda rows: [[*rows[0][:2], "9.5"], *rows[1:]])
    relabelled = tables.load()
    write_bag(tables.features / "P00-1.h5", np.ones((4, 768)))
    refeatured = tables.load()
    assert len({c.digest for c in (before, relabelled, refeatured)}) == 3
    assert len({c.labels_sha256() for c in (before, relabelled, refeatured)}) == 1


def test_the_log_tells_classes_and_exclusions(tables, caplog):
    (tables.features / "P02-1.h5").unlink()
    with caplog.at_level("INFO", logger=module.__name__):
        module.log_cohort(tables.load())
    assert "MSIH (5), MSS (6); positive is MSIH" in caplog.text
    assert re.search(r"LF: regression, -1\.\d+ to .*; known for 10 of 11 patients", caplog.text)
    assert "Left out: 1 x slide: no feature file" in caplog.text


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/ is not there")
def test_real_tables_are_joined(tmp_path):
    """All TCGA-CRC patients with a slide, half of the names with a UUID."""
    slides = read_table(SHARED / "tables/tcga_crc_slides.csv", ["PATIENT", "FILENAME"])
    for i, name in enumerate(slides["FILENAME"]):
        stem = f"{name}.23748e80-{i}" if i % 2 else name
        write_bag(tmp_path / f"{stem}.h5", np.full((1, 4), i))
    tables = Tables(
        SHARED / "tables/tcga_crc_labels.csv", SHARED / "tables/tcga_crc_slides.csv", tmp_path
    )
    cohort = tables.load(auxiliary=("Leukocyte Fraction",))
    clinical = pd.read_csv(SHARED / "tables/tcga_crc_labels.csv")
    expected = clinical[clinical["isMSIH"].notna() & clinical["PATIENT"].isin(slides["PATIENT"])]
    assert [p.name for p in cohort.patients] == sorted(expected["PATIENT"])
    assert sum("Leukocyte Fraction" in p.known for p in cohort.patients) == (
        expected["Leukocyte Fraction"].notna().sum()
    )
    assert not [row for row in cohort.ledger if row.status == "unclaimed"]


@pytest.mark.skipif(not SHARED.exists(), reason="the real tables are not here")
@pytest.mark.parametrize(("cutoff", "prevalence"), [(42.0, 15.8), (30.0, 37.1)])
def test_cut_offs_of_the_real_hrd_scores(tmp_path, cutoff, prevalence):
    slides = pd.read_csv(SHARED / "tables/tcga_luad_slides.csv")
    for i, name in enumerate(slides["FILENAME"]):
        write_bag(tmp_path / f"{name}.h5", np.full((1, 4), i))
    tables = Tables(
        SHARED / "tables/tcga_luad_labels.csv", SHARED / "tables/tcga_luad_slides.csv", tmp_path
    )
    cohort = tables.load("HRD_score", (), cutoff=cutoff)
    found = sum(p.label == cohort.target.positive for p in cohort.patients)
    clinical = pd.read_csv(tables.clini)
    scores = clinical["HRD_score"][clinical["PATIENT"].isin(slides["PATIENT"])]
    assert found == (scores >= cutoff).sum()
    assert round(100 * found / len(cohort.patients), 1) == prevalence


def test_links_to_folders_of_features_are_followed(tables, tmp_path):
    whole = tables.load().patients
    elsewhere = tmp_path / "elsewhere"
    tables.features.rename(elsewhere)
    tables.features.mkdir()
    (tables.features / "site").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(tables.features)
    found = tables.load().patients
    assert [patient.name for patient in found] == [patient.name for patient in whole]
    assert all(path.parent == tables.features / "site" for p in found for path in p.files)


@pytest.mark.parametrize("primary", [False, True])
def test_a_number_far_from_all_others_is_told_with_its_patient(primary, tmp_path, caplog):
    column = [0.1 * i for i in range(11)] + [1e9]
    tables = make_tables(tmp_path, extra={"X": column})
    target, auxiliary = ("X", ()) if primary else ("isMSIH", ("X",))
    tables.load(target, auxiliary, kind=("X=regression",))
    assert "`X` of patient P11 is 1e+09 and lies so far from all others" in caplog.text
    assert "differ by 1e-09 of the range" in caplog.text
    caplog.clear()
    tables.load(auxiliary=("LF",))
    assert "lies so far" not in caplog.text


def test_a_code_that_several_patients_share_is_told_with_them(tmp_path, caplog):
    column = [-999] * 3 + [0.1 * i for i in range(9)]
    tables = make_tables(tmp_path, extra={"X": column})
    tables.load(auxiliary=("X",))
    assert "`X` of patients P00, P01, P02 is -999 and lies so far from all others" in caplog.text


@pytest.mark.parametrize("value", ["4e301", "-3.4e38"])
def test_a_number_that_single_precision_cannot_hold_is_refused(value, tmp_path):
    column = [0.1 * i for i in range(11)] + [value]
    tables = make_tables(tmp_path, extra={"X": column})
    words = r"`X` must be numbers up to 1\.13e\+38, .* for patient P11\. Use a larger unit"
    with pytest.raises(UserError, match=words):
        tables.load(auxiliary=("X",))
    sources = Sources(tables.clini, tables.slides, tables.features)
    with pytest.raises(UserError, match=words):
        load_external(sources, [Target("X", "regression")])


# --- sites ----------------------------------------------------------------------------------------


def with_sites(tmp_path, sites, **options):
    made = make_tables(tmp_path, patients=len(sites), extra={"SITE": list(sites)})
    return made.load(group_column="SITE", **options)


def test_a_column_tells_the_site_of_every_patient(tmp_path):
    cohort = with_sites(tmp_path, ["north", "south", "7", "7.0"] * 3)
    assert [p.site for p in cohort.patients] == ["north", "south", "7", "7"] * 3
    assert cohort.by_site


def test_without_a_column_nothing_changes(tmp_path):
    made = make_tables(tmp_path, extra={"SITE": ["north"] * 12})
    plain, grouped = made.load(), made.load(group_column="SITE")
    assert not plain.by_site
    assert {p.site for p in plain.patients} == {""}
    assert plain.digest != grouped.digest
    assert plain.labels_sha256() != grouped.labels_sha256()
    lines = "\n".join(f"{p.name}\t{p.label}" for p in plain.patients)
    assert plain.labels_sha256() == hashlib.sha256(lines.encode()).hexdigest()


def test_a_patient_without_a_site_could_be_of_any(tmp_path):
    with pytest.raises(UserError, match="of every patient who is used, but SITE tells none of P02"):
        with_sites(tmp_path, ["north", "south", "Not Reported"] + ["north"] * 9)


def test_who_is_not_used_needs_no_site(tmp_path):
    made = make_tables(tmp_path, extra={"SITE": ["north", "south", ""] + ["north"] * 9})
    (made.features / "P02-1.h5").unlink()
    assert len(made.load(group_column="SITE").patients) == 11


@pytest.mark.parametrize(("one", "other"), [("north", "North"), ("A-1", "A\u20101")])
def test_sites_that_look_alike_are_refused(tmp_path, one, other):
    with pytest.raises(UserError, match="`SITE` must spell each class in one way"):
        with_sites(tmp_path, [one, other] * 6)


def test_names_that_are_no_barcodes_have_no_tissue_source_site(tmp_path):
    with pytest.raises(UserError, match="but tcga-site tells none of P00, P01"):
        make_tables(tmp_path).load(group_column="tcga-site")


def test_tissue_source_sites_are_those_of_real_barcodes():
    barcodes = ["TCGA-3L-AA1B", "tcga-aa-3489", "TCGA-A6-2671-01Z-00-DX1", "TCGA-A6", "TCGA-A6X-1"]
    assert list(sites_of(barcodes, "tcga-site", pd.DataFrame()).values()) == [
        "3L", "AA", "A6", "A6", "",
    ]  # fmt: skip


@pytest.mark.parametrize("column", ["isMSIH", "LF", "PATIENT", ""])
def test_a_group_must_be_a_column_of_its_own(tmp_path, column):
    with pytest.raises(UserError, match="must be neither a target's nor the patient's, but got"):
        make_tables(tmp_path).load(group_column=column)
