import csv
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import jinja2
import pytest
from PIL import Image

from examples.pathology.report import pages
from examples.pathology.report.pages import table
from examples.pathology.results.summary import MetricSummary
from examples.pathology.tables.writing import write_table

PARTS = pages.ENVIRONMENT.get_template("parts.html.j2").module


def html_of(frame, **options):
    return str(PARTS.table(frame, **options)).replace("\n", "")


def test_figures_are_shown_on_one_scale_so_that_their_letters_are_of_one_size(tmp_path):
    files = []
    for width in (600, 2400):
        files.append((f"<{width}>", tmp_path / f"{width}.png"))
        Image.new("RGB", (width, 9)).save(files[-1][1])
    text = PARTS.figures(files)
    narrow, broad = (int(width) for width in re.findall(r"width='(\d+)'", text))
    assert broad == 4 * narrow
    assert "alt='&lt;600&gt;'" in text
    assert PARTS.figures(files, wide=True).count("class='wide'") == 2


def test_a_number_its_spread_and_its_interval_are_not_torn_apart():
    text = html_of(table(["", "r, a b"], [["a b", "0.5 ± 0.1 [0.3, 0.7] (4 of 5 folds)"]]))
    assert "0.5\xa0±\xa00.1 [0.3,\xa00.7] (4 of 5 folds)" in text
    assert "a b</th>" in text


def test_tables_escape_what_their_format_would_read(tmp_path):
    frame = table(("a|b", "c"), [("<x> & y", None), ("1|2", 0.5)])
    pages.write_markdown(tmp_path / "t.md", frame, ["a | remark", ""])
    assert (tmp_path / "t.md").read_text(encoding="utf-8").splitlines() == [
        "| a\\|b | c |",
        "| --- | --- |",
        "| <x> & y | None |",
        "| 1\\|2 | 0.5 |",
        "",
        "a | remark",
    ]
    write_table(tmp_path / "t.csv", frame)
    assert (tmp_path / "t.csv").read_bytes() == b"a|b,c\n<x> & y,\n1|2,0.5\n"
    assert "<tr><th>&lt;x&gt; &amp; y</th><td>None</td></tr>" in html_of(frame)


def test_a_csv_gives_numbers_back_as_they_are(tmp_path):
    """A whole number beside a missing one stays whole, and no digit is lost."""
    numbers = [1 / 3, 0.1 + 0.2, 1e-17, 5e22, -0.0, 7, 10**18]
    rows = [("x", number, 'say "a, b"\nc') for number in numbers]
    write_table(tmp_path / "t.csv", table("abc", [*rows, ("", None, math.nan)]))
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.reader(file))
    assert read[1:-1] == [["x", repr(number), 'say "a, b"\nc'] for number in numbers]
    assert read[-1] == ["", "", ""]


def test_what_rows_have_in_common_is_said_once():
    rows = [("LF", "naive", 1), ("LF", "dwa", 2), ("ITH", "naive", 3), ("LF", "naive", 4)]
    text = html_of(table(("Target", "Method", "n"), rows), names=2)
    assert text.partition("<tbody>")[2].startswith(
        "<tr><th rowspan='2'>LF</th><th>naive</th><td>1</td></tr>"
        "<tr><th>dwa</th><td>2</td></tr>"
        "<tr><th>ITH</th><th>naive</th><td>3</td></tr>"
        "<tr><th>LF</th><th>naive</th><td>4</td></tr>"
    )
    alone = html_of(table(("Target", "n"), [("LF", 1), ("LF", 2)]))
    assert alone.count("<th>LF</th>") == 2


def test_an_equation_is_not_torn_apart_in_a_dense_table():
    text = html_of(table(("a",), [("p = 0.04, so so",)]), names=0, dense=True)
    assert "<td>p\xa0=\xa00.04, so so</td>" in text
    assert "<div class='scroll dense'>" in text


def test_a_page_escapes_what_it_is_told_and_knows_all_that_it_names(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        pages.write_page(tmp_path / "page.html", "base.html.j2")
    pages.write_page(
        tmp_path / "page.html", "base.html.j2", title="<a>", preface="", warnings=["b & c"]
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>&lt;a&gt;</h1>" in text
    assert "<p class='warning'>b &amp; c</p>" in text
    assert text.count("<p") == 1  # no preface, no paragraph


def test_a_funnel_counts_who_was_left_out_by_reason(tmp_path):
    rows = ["patient,a,used,", "slide,b,failed,why", "slide,c,failed,why", "slide,d,failed,other"]
    head = "item,name,status,reason"
    (tmp_path / "ledger.csv").write_text("\n".join([head, *rows, ""]), encoding="utf-8")
    summary = SimpleNamespace(funnel=[("seen", 1)])
    assert pages.funnel_of(tmp_path, summary) == (
        ("1 seen",),
        0,
        ("2 × slide: why", "1 × slide: other"),
    )


def test_a_figure_in_words():
    value = MetricSummary(
        mean=0.75, sd=0.1, ci95_over_patients=[0.6, 0.9], ci95_over_folds=[0.5, 1.0],
        folds=[0.7, None, 0.8], folds_with_value=2, undefined={"2": "one class only"},
    )  # fmt: skip
    assert pages.metric_cell(value) == "0.750 ± 0.100 [0.600, 0.900] (2 of 3 folds)"
    assert pages.metric_cell(value, sd=False) == "0.750 [0.600, 0.900] (2 of 3 folds)"
    assert pages.metric_numbers(value) == [0.75, 0.1, 0.6, 0.9, 0.5, 1.0, 2, "0.7  0.8"]
    assert len(pages.METRIC_COLUMNS) == len(pages.metric_numbers(value))
    assert pages.metric_cell(replace(value, mean=None)) == "undefined: one class only"
    assert pages.metric_cell(None) == "–"
