"""The pages of the strategies, made from their docstrings and from what is known of each."""

import csv
import inspect
import re

from docs.make.bowls import call_of
from docs.make.links import DOCS
from docs.make.stamps import strategies
from mtbalance._factory import GRADIENTS, WEIGHTINGS
from mtbalance.weighting import Weighting

FOLDER = DOCS / "strategies"
PAGE = """# {name}

{summary}

{names}

![{alternative}]({page}.svg)

Made with `{call}`. [How to read it](index.md#the-pictures).

## Properties and costs

{properties}

Found by trial: [all strategies side by side](../strategies-properties.md). {time}

## Reference

```{{eval-rst}}
.. autoclass:: {module}.{name}
   :members:
```
"""


def pages() -> dict[str, str]:
    """Return the text of each page below ``docs/strategies``, by its name there.

    What is said of all of them stands in ``index.md``, around two tables that are made here.
    """
    kinds = list(strategies())
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    for family, told in (("weightings", True), ("gradient strategies", False)):
        table = _table([kind for kind in kinds if issubclass(kind, Weighting) == told])
        before, rest = index.split(f"<!-- {family} -->\n", 1)
        _, after = rest.split("<!-- end -->", 1)
        index = f"{before}<!-- {family} -->\n\n{table}\n\n<!-- end -->{after}"
    return {"index.md": index, **{f"{page_of(kind)}.md": _page(kind) for kind in kinds}}


def page_of(kind: type) -> str:
    """Return the name of a strategy's page.

    Args:
        kind: Its class.
    """
    return kind.__name__.lower()


def summary_of(kind: type) -> str:
    """Return the first sentence of a docstring, in Markdown.

    Args:
        kind: The class.
    """
    first, _, _ = (inspect.getdoc(kind) or "").partition("\n\n")
    words = re.sub(r":math:`([^`]*)`", r"$\1$", " ".join(first.split()))
    return words.replace("``", "`")


def _table(kinds: list[type]) -> str:
    rows = [f"| [{k.__name__}]({page_of(k)}.md) | {summary_of(k)} |" for k in kinds]
    return "\n".join(["| strategy | what it does |", "|---|---|", *rows])


def _page(kind: type) -> str:
    name = kind.__name__
    family = "weighting" if issubclass(kind, Weighting) else "gradient"
    return PAGE.format(
        name=name,
        summary=summary_of(kind),
        names=_names(kind, family),
        alternative=f"Paths from four starts with {name}, and what it does",
        page=page_of(kind),
        call=call_of(name),
        properties=_properties(name, family),
        time=_time(kind),
        module=f"mtbalance.{family}",
    )


def _short(kind: type) -> list[str]:
    known: dict[str, type] = {**WEIGHTINGS, **GRADIENTS}
    return [short for short, other in known.items() if other is kind]


def _names(kind: type, family: str) -> str:
    kinds = "weighting" if family == "weighting" else "gradient strategy"
    file = inspect.getfile(kind).rpartition("/")[2]
    short = " or ".join(f"`{each}`" for each in _short(kind))
    named = f"Its name for `make_balancer` is {short}." if short else "It goes by its class alone."
    return (
        f"`from mtbalance.{family} import {kind.__name__}` · a {kinds} · "
        f"[source](../../mtbalance/{family}/{file})\n\n{named}"
    )


def _properties(name: str, family: str) -> str:
    """Return the row of a strategy in the table of all, turned upright, with what columns mean."""
    lines = (DOCS / "strategies-properties.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == family)
    row = next(row for row in rows[start:] if row[0] == f"`{name}`")
    meanings = {row[0]: row[1] for row in rows if len(row) == 2}
    cells = zip(rows[start][1:], row[1:], strict=True)
    upright = [
        f"| {column} | {cell} | {meanings.get(column) or meanings[f'{column} ({family})']} |"
        for column, cell in cells
    ]
    return "\n".join(["| property | value | what it says |", "|---|---|---|", *upright])


def _time(kind: type) -> str:
    with (DOCS / "digits" / "costs.csv").open(encoding="utf-8", newline="") as file:
        ratios = {row["method"]: row["ratio"] for row in csv.DictReader(file) if row["ratio"]}
    found = [float(ratios[short]) for short in _short(kind) if short in ratios]
    if not found or kind.__name__ in ("Sum", "Equal"):
        return ""
    return (
        "In a small network on [two overlaid digits](../digits.md), a step takes "
        f"{found[0]:.2f} times as long as with the plain sum."
    )


def write() -> None:
    """Write the pages, and remove those of strategies that are no more."""
    made = pages()
    for stranger in {path.name for path in FOLDER.glob("*.md")} - set(made):
        (FOLDER / stranger).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
