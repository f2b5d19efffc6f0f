import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from examples.pathology.common.errors import UserError
from examples.pathology.common.toml import read_section, read_toml, write_toml

KEYS = st.text("abcdefghij_", min_size=1)
SCALARS = st.text() | st.integers(-(2**53), 2**53) | st.booleans()
VALUES = SCALARS | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.text())


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
@example({"a": {"b": "\x7f", "c": "\U0001f600", "d": '"\\', "e": 1e-05}})
def test_what_is_written_as_toml_is_read_back(tmp_path_factory, tables):
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    write_toml(path, tables)
    assert read_toml(path) == tables


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[crossval]\nepoch = 3",
            "the key `epoch` of .crossval. is unknown. Did you mean `epochs`",
        ),
        ("[crosval]\nepochs = 3", "the section .crosval. is unknown; .* Did you mean `crossval`"),
        ("epochs = 3", "`epochs` must stand in a section such as .crossval."),
        ("[crossval", "must be valid TOML"),
        (
            "[crossval]\nslide-table = 's'\nslide_table = 't'",
            "`slide_table` of .crossval. must be given once, but is twice",
        ),
    ],
)
def test_what_nobody_would_read_is_refused(tmp_path, text, words):
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_section(path, "crossval", ["epochs", "slide-table"], ["crossval", "demo"])


def test_dashes_and_underscores_are_one(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[crossval]\nslide-table = "s"\nlearning_rate = 1.0', encoding="utf-8")
    values = read_section(path, "crossval", ["slide-table", "learning_rate"], ["crossval"])
    assert values == {"slide_table": "s", "learning_rate": 1.0}
