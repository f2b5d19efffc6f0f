"""What report pages are made of: templates, tables in three forms, figures inside the page."""

import base64
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from examples.pathology.cohort.cohort import TRAINING_ONLY
from examples.pathology.common.files import write_text
from examples.pathology.results.summary import MetricSummary, RunSummary
from examples.pathology.slides.overlay import COLOURS
from examples.pathology.tables.writing import read_table_of_ours

logger = logging.getLogger(__name__)

DASH = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
METRIC_COLUMNS = (
    *("mean", "sd", "ci95_low_over_patients", "ci95_high_over_patients"),
    *("ci95_low_over_folds", "ci95_high_over_folds", "folds_with_value", "folds"),
)

_PNG_WIDTH = slice(16, 20)  # of every PNG file: the first number of its first chunk
_SCALE = 0.46  # two plain figures of 150 dpi stand side by side


def write_page(path: Path, template: str, **values: object) -> Path:
    """Write a page that needs no other file, with the values that its template names; return it."""
    write_text(path, ENVIRONMENT.get_template(template).render(values))
    logger.info("The report is %s", path)
    return path


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> pd.DataFrame:
    """Return a table whose cells stay as they are: whole numbers beside missing ones stay whole."""
    frame: pd.DataFrame = pd.DataFrame(rows, columns=list(headings), dtype=object)
    return frame


def settings_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """Return settings as a page shows them."""
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in values.items()
    ]
    return table(("Setting", "Value"), rows)


def write_markdown(path: Path, frame: pd.DataFrame, remarks: Sequence[str]) -> None:
    """Write a table in Markdown, and a paragraph below it for each remark that says something."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy()]
    rows = (" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines)
    text = "".join(f"| {row} |\n" for row in rows)
    write_text(path, text + "".join(f"\n{remark}\n" for remark in remarks if remark))


def metric_cell(value: MetricSummary | None, *, sd: bool = True) -> str:
    """Return a figure in words, or a dash: mean ± sd over folds [95 % interval over patients]."""
    if value is None:
        return DASH
    if value.mean is None:
        return "undefined: " + "; ".join(sorted(set(value.undefined.values())))
    known, folds = value.folds_with_value, len(value.folds)
    low, high = value.ci95_over_patients
    return (
        f"{value.mean:.3f}"
        + (f" ± {value.sd:.3f}" if sd and value.sd is not None else "")
        + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
        + (f" ({known} of {folds} folds)" if known < folds else "")
    )


def metric_numbers(value: MetricSummary) -> list[object]:
    """Return all numbers of a figure, in the order of `METRIC_COLUMNS`."""
    folds = " ".join("" if each is None else f"{each:.6g}" for each in value.folds)
    ends = (*value.ci95_over_patients, *value.ci95_over_folds)
    return [value.mean, value.sd, *ends, value.folds_with_value, folds]


def captions_of(summaries: Iterable[RunSummary]) -> list[str]:
    """Return the warnings that belong above figures of several runs, each once."""
    return list(dict.fromkeys(each.caption for each in summaries if each.caption))


class Funnel(NamedTuple):
    """Who was used, and who was not."""

    stages: tuple[str, ...]  # from the clinical table to those used, with their numbers
    training_only: int  # how many were trained on for other targets only
    left_out: tuple[str, ...]  # how many, of what, and why


def funnel_of(folder: Path, summary: RunSummary) -> Funnel:
    """Return who was used of a run or a deployment, and who was left out and why."""
    remedy = "Run the command that made it again, with metrics.json deleted."
    ledger = read_table_of_ours(folder / "ledger.csv", remedy)
    out = ledger[~ledger["status"].isin(("used", TRAINING_ONLY))]
    reasons = Counter(zip(out["item"], out["reason"], strict=True)).most_common()
    return Funnel(
        tuple(f"{count} {stage}" for stage, count in summary.funnel),
        int((ledger["status"] == TRAINING_ONLY).sum()),
        tuple(f"{n} × {item}: {why}" for (item, why), n in reasons),
    )


def _groups(frame: pd.DataFrame, names: int) -> list[list[tuple[object, ...]]]:
    """Group rows that follow each other and have the first cell in common, if more name them."""
    rows = frame.itertuples(index=False, name=None)
    key = (lambda row: row[0]) if names > 1 else (lambda _: object())
    return [list(group) for _, group in itertools.groupby(rows, key)]


def _unbroken(cell: object) -> str:
    """Keep an interval, a number with its spread, and an equation on one line."""
    return re.sub(r"\[[^\[\]]+\]| ± | = ", lambda found: found[0].replace(" ", NO_BREAK), str(cell))


def inlined(picture: bytes, kind: str = "png") -> str:
    """Return a picture as a page holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def _shown_width(picture: Path) -> int:
    return round(int.from_bytes(picture.read_bytes()[_PNG_WIDTH], "big") * _SCALE)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters.update(groups=_groups, unbroken=_unbroken, shown_width=_shown_width)
ENVIRONMENT.filters["inlined"] = lambda path: inlined(path.read_bytes())
ENVIRONMENT.filters["short"] = lambda cell: f"{cell:.3g}" if isinstance(cell, float) else cell
ENVIRONMENT.globals["tile_colours"] = COLOURS
