import re

from PIL import Image

from examples.pathology.common.files import table_csv
from examples.pathology.report import pages


def test_figures_are_shown_on_one_scale_so_that_their_letters_are_of_one_size(tmp_path):
    files = []
    for width in (600, 2400):
        files.append((f"<{width}>", tmp_path / f"{width}.png"))
        Image.new("RGB", (width, 9)).save(files[-1][1])
    text = pages.figures_html(files)
    narrow, broad = (int(width) for width in re.findall(r"width='(\d+)'", text))
    assert broad == 4 * narrow
    assert "alt='&lt;600&gt;'" in text
    assert pages.figures_html(files, wide=True).count("class='wide'") == 2


def test_a_number_its_spread_and_its_interval_are_not_torn_apart():
    text = pages.table_html(["", "r, a b"], [["a b", "0.5 ± 0.1 [0.3, 0.7] (4 of 5 folds)"]])
    assert "0.5\xa0±\xa00.1 [0.3,\xa00.7] (4 of 5 folds)" in text
    assert "a b</th>" in text


def test_tables_escape_what_their_format_would_read():
    headings, rows = ("a|b", "c"), [("<x> & y", None), ("1|2", 0.5)]
    assert pages.table_markdown(headings, rows).splitlines() == [
        "| a\\|b | c |",
        "| --- | --- |",
        "| <x> & y | None |",
        "| 1\\|2 | 0.5 |",
    ]
    assert table_csv(headings, rows) == "a|b,c\n<x> & y,\n1|2,0.5\n"
    assert "<tr><th>&lt;x&gt; &amp; y</th><td>None</td></tr>" in pages.table_html(headings, rows)


def test_what_rows_have_in_common_is_said_once():
    rows = [("LF", "naive", 1), ("LF", "dwa", 2), ("ITH", "naive", 3)]
    text = pages.table_html(("Target", "Method", "n"), rows, names=2)
    assert text.partition("<tbody>")[2].startswith(
        "<tr><th rowspan='2'>LF</th><th>naive</th><td>1</td></tr>"
        "<tr><th>dwa</th><td>2</td></tr>"
        "<tr><th>ITH</th><th>naive</th><td>3</td></tr>"
    )
    alone = pages.table_html(("Target", "n"), [("LF", 1), ("LF", 2)])
    assert alone.count("<th>LF</th>") == 2


def test_an_equation_is_not_torn_apart_in_a_dense_table():
    text = pages.table_html(("a",), [("p = 0.04, so so",)], names=0, dense=True)
    assert "<td>p\xa0=\xa00.04, so so</td>" in text
    assert "<div class='scroll dense'>" in text


def test_a_figure_in_words():
    value = {
        "mean": 0.75, "sd": 0.1, "ci95_over_patients": [0.6, 0.9], "ci95_over_folds": [0.5, 1.0],
        "folds": [0.7, None, 0.8], "folds_with_value": 2, "undefined": {"2": "one class only"},
    }  # fmt: skip
    assert pages.metric_cell(value) == "0.750 ± 0.100 [0.600, 0.900] (2 of 3 folds)"
    assert pages.metric_cell(value, sd=False) == "0.750 [0.600, 0.900] (2 of 3 folds)"
    assert pages.metric_numbers(value) == [0.75, 0.1, 0.6, 0.9, 0.5, 1.0, 2, "0.7  0.8"]
    assert len(pages.METRIC_COLUMNS) == len(pages.metric_numbers(value))
    assert pages.metric_cell({**value, "mean": None}) == "undefined: one class only"
    assert pages.metric_cell(None) == "–"
