"""What Sphinx does differently for this site: links, pictures, signatures, formulas as MathML."""

import re
from typing import Any

from docutils import nodes
from latex2mathml import exceptions
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

from docs.make.links import MIRRORED, ROOT, text_of

_THIN = '<mspace width="0.1667em"/>'
_ERRORS: tuple[type[Exception], ...] = tuple(
    each for each in vars(exceptions).values() if isinstance(each, type)
)
_LINES = (
    # "a ± b" on one line
    (re.compile(" ± "), "\u00a0±\u00a0"),
    # headings between the words of a class, or behind the package
    (re.compile(r"<h1>(?:mtbalance\.|[A-Z][a-z]+(?=[A-Z][a-z]))"), r"\g<0><wbr>"),
    # signatures before the name
    (re.compile(r'(\.</span></span>)(<span class="sig-name)'), r"\1<wbr>\2"),
    # short code on one line, longer code behind the bracket of a call
    (re.compile(r'<span class="pre">(?=(?:[^<&]|&\w+;){1,20}</span>)'), '<span class="pre whole">'),
    (re.compile(r'(<span class="pre">\w+\()(?=[^<)])'), r"\1<wbr>"),
)
"""Where a page's lines may end, as a pattern of its HTML and what stands there instead."""
_MODULE = re.compile(r"~(?:\w+\.)+")
_MODULES = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])")
_DEFAULT = re.compile(r"<(?:[^<>]|<\w+>)*>")
LOGGER = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it with Sphinx.

    Args:
        app: The build.
    """
    app.connect("source-read", _read)
    app.connect("doctree-resolved", _show)
    app.connect("html-page-context", _break)
    app.connect("autodoc-process-signature", _sign)
    app.connect("autodoc-process-docstring", _type, priority=600)  # after napoleon
    # MathML is part of HTML and needs neither a script nor a network.
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    page = app.env.doc2path(name, base=False)
    if str(page).endswith(".md"):
        source[0] = text_of(str(page))
        if str(page) in MIRRORED:
            app.env.note_dependency(ROOT / MIRRORED[str(page)])


def _show(app: Sphinx, tree: nodes.document, _: str) -> None:
    """Tell plots from diagrams that know both grounds; a plot is a link to itself, large."""
    for image in tree.findall(nodes.image):
        file = app.srcdir / image["uri"]
        if file.suffix == ".svg" and "prefers-color-scheme" in file.read_text(encoding="utf-8"):
            continue
        image["classes"].append("on-white")
        image.setdefault("width", "100%")  # Sphinx links what has a width


def _break(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _: object) -> None:
    """Let lines end where one would end them: not inside of an option, or before a ±."""
    for pattern, better in _LINES if "body" in context else ():
        context["body"] = pattern.sub(better, context["body"])


def _sign(*event: Any) -> tuple[str, str | None] | None:
    """Write a signature so that Sphinx can read it, also with defaults that are no expressions."""
    signature, returned = event[-2:]
    if signature is None:
        return None
    return _DEFAULT.sub("...", _MODULE.sub("", signature)), returned


def _type(*event: Any) -> None:
    """Put the types of attributes behind their names, without modules, as in signatures."""
    lines: list[str] = event[-1]
    sorted_lines: list[str] = []
    place = 0
    for line in lines:
        if line.lstrip().startswith(".. attribute::"):
            place = len(sorted_lines) + 1
        if place and line.lstrip().startswith(":type:"):
            sorted_lines.insert(place, _MODULES.sub("", line))
        else:
            sorted_lines.append(line)
    lines[:] = sorted_lines


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_mathml(node, node.astext(), as_block=False))
    raise nodes.SkipNode


def _display(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="math"))
    parts = _parts(node.astext())
    writer.body.append("\n".join(_mathml(node, part, as_block=True) for part in parts))
    writer.body.append("</div>\n")
    raise nodes.SkipNode


def _parts(formula: str) -> list[str]:
    """Return the formulas of a line; on a narrow page, they stand below each other."""
    if r"\begin" in formula or r"\\" in formula:
        return [formula]
    return [part for part in formula.split(r"\qquad") if part.strip()]


def _mathml(node: nodes.Element, formula: str, *, as_block: bool) -> str:
    formula = re.sub(r"\\[Bb]ig[lr](?=\\[lr]angle)", "", formula)  # no brackets for it
    if r"\\" in formula and r"\begin" not in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    try:
        found = str(convert(formula, display="block" if as_block else "inline"))
    except _ERRORS as error:
        LOGGER.warning("%r in the formula %s", error, formula, location=node)
        return ""
    if unknown := re.search(r">(\\[a-zA-Z]+)", found):
        LOGGER.warning("unknown %s in the formula %s", unknown[1], formula, location=node)
    found = re.sub(
        r"<mo[^>]*>&#x0007C;</mo>", '<mo lspace="0" rspace="0" stretchy="false">|</mo>', found
    )  # of norms
    return re.sub(r"(?<!<m...>)(<mi>(?:log|exp|cos|tanh)</mi>)(?!<mo)", rf"\1{_THIN}", found)
