import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.pathology.common.errors import UserError
from examples.pathology.tables.reading import refuse_two_owners
from examples.pathology.tables.writing import write_table

CELLS = st.text(st.characters(codec="utf-8"), max_size=6) | st.floats(allow_nan=False) | st.none()


@given(st.lists(st.tuples(st.integers(0, 9), CELLS), min_size=1, max_size=8))
def test_tables_are_written_as_the_csv_module_writes_them(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "sub" / "a.csv"
    write_table(path, pd.DataFrame(rows, columns=["n", 'a, "cell"'], dtype=object))
    expected = io.StringIO()
    csv.writer(expected, lineterminator="\n").writerows([("n", 'a, "cell"'), *rows])
    assert path.read_bytes() == expected.getvalue().encode()


def test_nothing_belongs_to_two_patients():
    refuse_two_owners([("A", "1"), ("A", "1"), ("B", "2")], "slide", Path("t.csv"))
    with pytest.raises(UserError, match=r"t.csv: each slide must .* but 1 is claimed by A and B"):
        refuse_two_owners([("A", "1"), ("B", "2"), ("B", "1")], "slide", Path("t.csv"))
