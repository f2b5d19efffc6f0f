"""What report pages are made of: tables as HTML, Markdown and CSV, figures inside the page."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MISSING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
METRIC_COLUMNS = (
    "mean",
    "sd",
    "ci95_low_over_patients",
    "ci95_high_over_patients",
    "ci95_low_over_folds",
    "ci95_high_over_folds",
    "folds_with_value",
    "folds",
)

Row = Sequence[object]


def page_html(title: str, parts: Sequence[str]) -> str:
    """Return a whole page that needs no other file.

    Args:
        title: Of the page.
        parts: Its body, as HTML; empty ones are left out.
    """
    head = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*head, *(part for part in parts if part)]) + "\n</body></html>\n"


def warning_html(text: str) -> str:
    """Return a paragraph that stands out."""
    return f"<p class='warning'>{html.escape(text)}</p>"


def paragraph_html(text: str) -> str:
    """Return a paragraph; no text, no paragraph."""
    return f"<p>{html.escape(text)}</p>" if text else ""


def list_html(items: Sequence[str], *, ordered: bool = False) -> str:
    """Return a list; no items, no list."""
    tag = "ol" if ordered else "ul"
    lines = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<{tag}>{lines}</{tag}>" if items else ""


def table_html(
    headings: Sequence[str], rows: Sequence[Row], *, names: int = 1, dense: bool = False
) -> str:
    """Return a table.

    Args:
        headings: Of the columns.
        rows: The cells.
        names: How many of the first columns say what a row is; of several, the first one says it
            once for all rows that follow each other and have it in common.
        dense: Whether to set it small, for many columns.
    """
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = []
    # Without a common name every row is a group of its own.
    for _, group in itertools.groupby(rows, key=lambda row: row[0] if names > 1 else object()):
        together = list(group)
        for number, row in enumerate(together):
            cells = [html.escape(_keep_together(str(cell))) for cell in row]
            named = [f"<th>{cell}</th>" for cell in cells[:names]]
            if number:
                del named[0]
            elif len(together) > 1:
                named[0] = f"<th rowspan='{len(together)}'>{cells[0]}</th>"
            lines.append(
                f"<tr>{''.join(named)}{''.join(f'<td>{cell}</td>' for cell in cells[names:])}</tr>"
            )
    return (
        f"<div class='scroll{' dense' * dense}'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def table_markdown(headings: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def figures_html(figures: Sequence[tuple[str, Path]], *, wide: bool = False) -> str:
    """Return figures side by side, within the page, all on the same scale.

    Args:
        figures: What each shows, and its ``.png`` file.
        wide: Whether each is as wide as the page instead.
    """
    parts = []
    for text, path in figures:
        picture = path.read_bytes()
        data = base64.b64encode(picture).decode("ascii")
        pixels = int.from_bytes(picture[_PNG_WIDTH], "big")
        size = "class='wide'" if wide else f"width='{round(pixels * _SCALE)}'"
        parts.append(f"<img {size} alt='{html.escape(text)}' src='data:image/png;base64,{data}'>")
    return f"<div class='figures'>{''.join(parts)}</div>"


def metric_cell(value: Mapping[str, Any] | None, *, sd: bool = True) -> str:
    """Return a figure of a run in words: mean ± sd [95 % interval over patients].

    Args:
        value: What ``metrics.json`` holds of it; ``None`` if the run has none.
        sd: Whether to give the standard deviation over folds.
    """
    if value is None:
        return MISSING
    if value["mean"] is None:
        return "undefined: " + "; ".join(sorted(set(value["undefined"].values())))
    folds = len(value["folds"])
    known = value["folds_with_value"]
    spread = f" ± {value['sd']:.3f}" if sd and value["sd"] is not None else ""
    low, high = value["ci95_over_patients"]
    if low is not None:
        spread += f" [{low:.3f}, {high:.3f}]"
    return f"{value['mean']:.3f}{spread}" + (
        "" if known == folds else f" ({known} of {folds} folds)"
    )


def metric_numbers(value: Mapping[str, Any]) -> list[object]:
    """Return all numbers of a figure, in the order of `METRIC_COLUMNS`."""
    return [
        value["mean"],
        value["sd"],
        *value["ci95_over_patients"],
        *value["ci95_over_folds"],
        value["folds_with_value"],
        " ".join("" if v is None else f"{v:.6g}" for v in value["folds"]),
    ]


def _keep_together(text: str) -> str:
    """Keep an interval, a number with its spread, and an equation on one line."""
    return re.sub(r"\[[^\[\]]+\]| ± | = ", lambda found: found[0].replace(" ", NO_BREAK), text)


_PNG_WIDTH = slice(16, 20)  # of every PNG file: the first number of its first chunk
_SCALE = 0.46  # two plain figures of 150 dpi stand side by side
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 "
    "1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{border-bottom:1px solid #ccc;padding:.4rem "
    ".9rem;"
    "text-align:left}thead th{border-bottom:2px solid #222}.scroll{overflow-x:auto}"
    ".dense{font-size:.85rem}.dense th,.dense td{padding:.2rem .5rem}"
    "th[rowspan]{vertical-align:top;max-width:9rem}"
    ".warning{background:#fff3cd;border-left:4px solid #e69f00;padding:.6rem 1rem}"
    ".figures{display:flex;flex-wrap:wrap;gap:1rem}img{max-width:100%;height:auto}"
    "img.wide{width:100%}"
)
