"""What each picture of the pages was made from, so that one that is older is found.

``docs/figures.json`` holds, for each picture, a hash of its inputs and one of its file. Code counts
without comments, docstrings and layout, as these change no picture.
"""

import ast
import hashlib
import inspect
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docs.make.bowls import STARTS, call_of, walk
from docs.make.links import DOCS, ROOT
from mtbalance import gradient, weighting

STORED = DOCS / "figures.json"
PROBED = 2
"""Steps that are taken again to see whether a strategy still does what its picture shows."""


class Picture(NamedTuple):
    """A picture and what it is made from.

    Args:
        path: Below ``docs``.
        command: That makes it, run from the root of the repository.
        inputs: Files from there, or ``file.py:name`` for a function of one.
        strategy: The class that it shows, if it shows one.
    """

    path: str
    command: str
    inputs: tuple[str, ...]
    strategy: str = ""

    @property
    def stamp(self) -> dict[str, object]:
        """What is stored of it."""
        stamp: dict[str, object] = {
            "inputs": self._hash(),
            "picture": _sha((DOCS / self.path).read_bytes()),
        }
        return {**stamp, "probe": probe_of(self.strategy)} if self.strategy else stamp

    def _hash(self) -> str:
        parts = [call_of(self.strategy) if self.strategy else self.command]
        return _sha("\n".join([*parts, *map(_content, self.inputs)]).encode())


_TOY = tuple(f"examples/toy/{name}.py" for name in ("problem", "trails", "figure"))
_PATHOLOGY = "examples/pathology"
_RESULTS = "the commands of docs/results.md"
OTHERS = (
    Picture(
        "toy.png",
        "python -m examples.toy --out docs/toy.png",
        _TOY,
    ),
    Picture(
        "landing.png",
        "python -m examples.toy --strategies sum,pcgrad,cagrad --out docs/landing.png",
        _TOY,
    ),
    Picture(
        "tutorial/overview.png",
        "python -m docs.make tutorial",
        ("docs/tutorial.md", "mtbalance/plot.py:overview"),
    ),
    Picture(
        "digits/digits.png",
        "python -m examples.digits --out docs/digits --page docs/digits.md",
        ("examples/digits/figure.py", "docs/digits/table.csv"),
    ),
    Picture(
        "results/sites.png",
        _RESULTS,
        (f"{_PATHOLOGY}/figures/study.py:dots", f"{_PATHOLOGY}/report/sections.py:show_sites"),
    ),
    Picture(
        "grid/grid.png",
        "python -m docs.make grid",
        (
            f"{_PATHOLOGY}/figures/grid.py",
            f"{_PATHOLOGY}/study/grid_report.py:blocks_of",
            "docs/make/grid.py",
            "docs/grid/cells.csv",
        ),
    ),
    Picture("results/heatmap.jpg", _RESULTS, (f"{_PATHOLOGY}/figures/heatmap.py:heatmap",)),
    Picture("results/areas.jpg", _RESULTS, (f"{_PATHOLOGY}/runs/geojson.py",)),
    Picture(
        "decisions/calibration.png",
        _RESULTS,
        (f"{_PATHOLOGY}/figures/scores.py:draw_calibration",),
    ),
    Picture(
        "decisions/worst.jpg",
        _RESULTS,
        tuple(f"{_PATHOLOGY}/report/patients.py:{name}" for name in ("_card", "_small")),
    ),
)
"""Pictures that examples and pages draw."""

DIAGRAMS = (
    *(
        f"concepts/{name}.svg"
        for name in ("absent", "accumulation", "devices", "order", "scale", "shared")
    ),
    "which-strategy/path.svg",
)
"""Written by hand: they are their own source."""


def strategies() -> Iterator[type]:
    """Yield the classes that have a page: those that can be made, weightings first."""
    for family, base in ((weighting, weighting.Weighting), (gradient, gradient.GradientStrategy)):
        kinds = (getattr(family, name) for name in sorted(family.__all__, key=str.lower))
        for kind in kinds:
            if issubclass(kind, base) and not inspect.isabstract(kind):
                yield kind


def pictures() -> list[Picture]:
    """Return the pictures of all pages."""
    shared = ("docs/make/bowls.py", "docs/make/pictures.py", "mtbalance/plot.py:contours")
    shown = [
        Picture(
            f"strategies/{kind.__name__.lower()}.svg",
            f"python -m docs.make figures {kind.__name__}",
            (*shared, f"{kind.__module__.replace('.', '/')}.py"),
            kind.__name__,
        )
        for kind in strategies()
    ]
    return [*shown, *OTHERS]


def stored() -> dict[str, dict[str, object]]:
    """Return the stamps of the pictures as they lie there."""
    found: dict[str, dict[str, object]] = json.loads(STORED.read_text()) if STORED.exists() else {}
    return found


def store(stamps: dict[str, dict[str, object]]) -> None:
    """Write the stamps of pictures.

    Args:
        stamps: By the path of each below ``docs``.
    """
    known = [picture.path for picture in pictures()]
    kept = {path: stamps[path] for path in known if path in stamps}
    STORED.write_text(json.dumps(kept, indent=1) + "\n")


def probe_of(strategy: str) -> list[float]:
    """Return where the first steps of the first path lead, and the weights there.

    Args:
        strategy: The name of its class.
    """
    walked = walk(strategy, STARTS[0], PROBED)
    return [round(x, 9) for x in (*walked.points[-1].tolist(), *walked.weights[-1].tolist())]


def code_of(source: str) -> str:
    """Return what of a module's source can change a result.

    Args:
        source: Python.
    """
    lines = source.splitlines()
    gaps = [
        (token.start, token.end)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            row = node.end_lineno or node.lineno
            column = len(lines[row - 1].encode()[: node.end_col_offset].decode())  # it counts bytes
            gaps.append(((node.lineno, node.col_offset), (row, column)))
    for (first, start), (last, end) in sorted(gaps, reverse=True):
        before, after = lines[first - 1][:start], lines[last - 1][end:]
        lines[first - 1 : last] = [before + after]
    return "".join("".join(lines).split())


def blocks_of(page: Path) -> list[str]:
    """Return the Python blocks of a page.

    Args:
        page: Its file.
    """
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def _content(place: str) -> str:
    path, _, name = place.partition(":")
    if path.endswith(".md"):  # whose code runs in the tests, and draws
        return code_of("".join(blocks_of(ROOT / path)))
    if not path.endswith(".py"):
        return _sha((ROOT / path).read_bytes())
    source = (ROOT / path).read_text(encoding="utf-8")
    if name:
        parts = ast.parse(source).body
        (part,) = (each for each in parts if getattr(each, "name", None) == name)
        source = ast.get_source_segment(source, part) or ""
    return code_of(source)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
