"""Writing tables as CSV."""

from pathlib import Path

import pandas as pd

from examples.pathology.common.files import write_text


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index, atomically; what is missing is an empty field."""
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
