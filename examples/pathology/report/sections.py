"""The sections that the page of runs and the page of a deployment have in common."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from examples.pathology.results.runs import Run
from examples.pathology.settings.runs import PageConfig


class Section(NamedTuple):
    """A part of a page.

    Args:
        heading: Above it.
        paragraphs: What it says first.
        tables: Below them; the first column of each names the row.
        figures: Below those, a title and the file of each.
        remarks: What it says last.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[pd.DataFrame] = ()
    figures: Sequence[tuple[str, Path]] = ()
    remarks: Sequence[str] = ()


SECTIONS: tuple[Callable[[Sequence[Run], Path, PageConfig], Section | None], ...] = ()
"""Makes a section of runs, in order of the page; None where they have nothing for it.

Of a deployment, the ensemble comes first, and then each fold's model, as runs of one fold that
tested all patients; some of these may have no label. The path is the page's folder.
"""
