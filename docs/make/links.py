"""Links that hold in the repository, where a page is read as a file, and on the site."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = "https://github.com/mtbalance/mtbalance/blob/main/"
"""Where the files of the repository are that are no pages."""

MIRRORED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "pathology.md": "examples/pathology/README.md",
}
"""Pages of the site whose text is a file elsewhere in the repository."""

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_CODE_OR_LINK = re.compile(
    r"(?P<ticks>`+).+?(?<!`)(?P=ticks)(?!`)"
    r"|(?P<mark>!?)(?P<words>\[(?:[^\[\]`]|`[^`]*`|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)",
    re.DOTALL,
)


def text_of(page: str) -> str:
    """Return what the site shows on a page: its own text, or that of the file it stands for.

    Args:
        page: Its path below ``docs``.
    """
    home = MIRRORED.get(page, f"docs/{page}")
    return rewritten((ROOT / home).read_text(encoding="utf-8"), home, page)


def rewritten(text: str, home: str, page: str) -> str:
    """Return Markdown of a file of the repository with its links as a page needs them.

    Args:
        text: Markdown.
        home: The path of its file in the repository.
        page: The path below ``docs`` of the page that shows it.
    """
    pieces = [
        piece if fenced else _CODE_OR_LINK.sub(lambda found: _linked(found, home, page), piece)
        for fenced, piece in pieces_of(text)
    ]
    return "".join(pieces)


def pieces_of(text: str) -> list[tuple[bool, str]]:
    """Return the pieces of Markdown in order, each with whether it is fenced code.

    Args:
        text: Markdown.
    """
    pieces: list[tuple[bool, str]] = []
    fence, lines = "", [""]
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if found and not fence:
            pieces.append((False, "".join(lines)))
            fence, lines = found[1], [line]
        elif fence and line.strip() == fence:
            pieces.append((True, "".join([*lines, line])))
            fence, lines = "", []
        else:
            lines.append(line)
    return [*pieces, (bool(fence), "".join(lines))]


def links(text: str) -> list[str]:
    """Return what the links and pictures of Markdown point to, code left out.

    Args:
        text: Markdown.
    """
    found = [
        each
        for fenced, piece in pieces_of(text)
        if not fenced
        for each in _CODE_OR_LINK.finditer(piece)
    ]
    return [each["target"] for each in found if each["target"]]


def _linked(match: re.Match[str], home: str, page: str) -> str:
    if match["ticks"]:
        return match[0]
    mark, words, target = match["mark"], match["words"], match["target"]
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
    shown = {there: here for here, there in MIRRORED.items()} | {"README.md": "index.md"}
    if place in shown:
        place = f"docs/{shown[place]}"
    elif not place.startswith("docs/") or place.endswith(("/", ".py")):
        return match[0] if mark else f"{words}({SOURCE}{place}{hash_}{anchor})"
    here = posixpath.dirname(f"docs/{page}")
    return f"{mark}{words}({posixpath.relpath(place, here)}{hash_}{anchor})"
