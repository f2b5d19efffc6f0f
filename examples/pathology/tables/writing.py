"""Writing tables as CSV, and reading them back."""

import io
from pathlib import Path

import pandas as pd

from examples.pathology.common.files import whole, write_text


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index, atomically; what is missing is an empty field."""
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def read_table_of_ours(
    path: Path, remedy: str, *, rows: int | None = None, text: bool = True
) -> pd.DataFrame:
    """Read back what `write_table` wrote.

    Args:
        path: The file.
        remedy: A sentence for the error.
        rows: How many it must have, where that is known.
        text: Whether to leave all of it as text; else numbers become numbers.

    Raises:
        UserError: It is not there, or was cut off.
    """
    with whole(path, remedy):
        written = path.read_bytes().decode("utf-8")
        dtype = str if text else None
        table = pd.read_csv(io.StringIO(written), dtype=dtype, keep_default_na=not text)
        if not written.endswith("\n"):
            raise ValueError("it ends in the middle of a line")
        if rows is not None and len(table) != rows:
            raise ValueError(f"it has {len(table)} rows instead of {rows}")
    return table
