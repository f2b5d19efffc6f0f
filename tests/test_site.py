"""The documentation site: navigation, names, commands, links and pictures; and it builds."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer

from docs.make.links import DOCS, MIRRORED, ROOT, links, pieces_of, rewritten, text_of
from docs.make.stamps import DIAGRAMS, Picture, code_of, pictures, probe_of, stored
from docs.make.strategies import pages as strategy_pages

NO_PAGES = {"digits/table.md"}
"""Files that are part of a page."""

PAGES = sorted(
    name
    for path in DOCS.rglob("*.md")
    if (name := path.relative_to(DOCS).as_posix()) not in NO_PAGES
)
FILES = sorted({f"docs/{page}" for page in PAGES} | {*MIRRORED.values(), "README.md"})
"""What is read in the repository: pages, and the files that some of them stand for."""

MODULES = (
    "mtbalance",
    *(f"mtbalance.{name}" for name in ("gradient", "plot", "testing", "weighting")),
)
INTEGRATIONS = ("accelerate", "lightning", "torchjd", "transformers")
MOST_BYTES = 200_000


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


# Navigation


def entries(page: str) -> Iterator[str]:
    """Yield the pages that the tables of contents of a page name."""
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", read(f"docs/{page}"), re.M | re.S):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        for name in (line for line in lines if not line.startswith(":")):
            target = name.rpartition("<")[2].rstrip(">")  # of "title <name>", or the name
            place = (DOCS / page).parent / f"{target}.md"
            found = sorted(place.parent.glob(place.name)) if ":glob:" in lines else [place]
            yield from (each.relative_to(DOCS).as_posix() for each in found)


def test_every_page_is_in_the_navigation() -> None:
    reached, next_ = set(), ["index.md"]
    while next_:
        page = next_.pop()
        if page not in reached:
            reached.add(page)
            next_.extend(entries(page))
    assert reached == set(PAGES)


# Names


def documented() -> set[int]:
    """Return the identities of what the pages show the docstrings of."""
    text = "\n".join(read(f"docs/{page}") for page in PAGES)
    names = re.findall(r"^\.\. (?:auto|py:)(?:class|function|data|exception):: (\S+)$", text, re.M)
    found = set()
    for name in names:
        module, _, attribute = name.rpartition(".")
        found.add(id(getattr(importlib.import_module(module), attribute)))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_a_page(module: str) -> None:
    shown, public = documented(), importlib.import_module(module)
    assert [name for name in public.__all__ if id(getattr(public, name)) not in shown] == []


def test_every_integration_is_on_a_page() -> None:
    """With all its members, so that no framework need be there."""
    files = {path.stem for path in (ROOT / "mtbalance" / "integrations").glob("[a-z]*.py")}
    assert files == set(INTEGRATIONS)
    page = read("docs/api/integrations.md")
    for name in INTEGRATIONS:
        assert f".. automodule:: mtbalance.integrations.{name}\n   :members:\n" in page


def test_pages_of_strategies_say_what_is_known() -> None:
    """``python -m docs.make pages`` writes them."""
    made = strategy_pages()
    assert {path.name for path in (DOCS / "strategies").glob("*.md")} == set(made)
    for name, text in made.items():
        assert read(f"docs/strategies/{name}") == text, f"{name}: run `python -m docs.make pages`"


# Links


@cache
def anchors(file: str) -> set[str]:
    """Return what links may point to in a Markdown file: its headings, as GitHub calls them."""
    found: set[str] = set()
    prose = "".join(piece for fenced, piece in pieces_of(read(file)) if not fenced)
    for heading in re.findall(r"^#{1,6} (.*)$", prose, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(
            each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None
            for each in found
        )
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere_in_the_repository(file: str) -> None:
    for target in links(read(file)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = ((ROOT / file).parent / path).resolve() if path else ROOT / file
        assert place.exists(), f"{file}: {target}"
        if anchor:
            there = place.relative_to(ROOT).as_posix()
            assert anchor in anchors(there), f"{file}: {target}; there are {sorted(anchors(there))}"


@pytest.mark.parametrize("file", FILES)
def test_links_to_other_sites_are_well_formed(file: str) -> None:
    for target in links(read(file)):
        if re.match(r"[a-z]+:", target):
            parts = urlsplit(target)
            assert parts.scheme in ("https", "mailto"), f"{file}: {target}"
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), f"{file}: {target}"


def test_links_hold_on_the_site() -> None:
    for page in PAGES:
        for target in links(text_of(page)):
            path = target.partition("#")[0]
            if path and not re.match(r"[a-z]+:", path):
                assert ((DOCS / page).parent / path).resolve().is_relative_to(DOCS), (
                    f"{page}: {target}"
                )


def test_links_are_rewritten() -> None:
    text = (
        "[a](docs/toy.md#x) ![b](docs/toy.png) [c](CHANGELOG.md) [`d`](mtbalance/plot.py)\n"
        "[e](https://e.org/a.md) `[f](docs/toy.md)` [two\nlines](README.md) [g](#here)\n"
        "```\n[h](docs/toy.md)\n```\n"
    )
    source = "https://github.com/mtbalance/mtbalance/blob/main/mtbalance/plot.py"
    assert rewritten(text, "CONTRIBUTING.md", "contributing.md") == (
        f"[a](toy.md#x) ![b](toy.png) [c](changelog.md) [`d`]({source})\n"
        "[e](https://e.org/a.md) `[f](docs/toy.md)` [two\nlines](index.md) [g](#here)\n"
        "```\n[h](docs/toy.md)\n```\n"
    )
    below = rewritten("[a](../../CHANGELOG.md)", "docs/strategies/sum.md", "strategies/sum.md")
    assert below == "[a](../changelog.md)"


# Commands


def commands(file: str) -> Iterator[list[str]]:
    """Yield the commands of a file, word by word: of shell blocks, and ``python -m`` in prose."""
    text = read(file)
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = "".join(piece for fenced, piece in pieces_of(text) if not fenced)
    lines += [" ".join(code.split()) for code in re.findall(r"`(python -m [^`]+)`", prose)]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


@cache
def app_of(package: str) -> Any:
    return typer.main.get_command(importlib.import_module(f"{package}.cli").app)


@cache
def options_of(module: str) -> set[str]:
    """Return the options that a module's argparse knows, or those that it imports beside it."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    path = path if path.exists() else ROOT.joinpath(*module.split("."), "__main__.py")
    tree, found = ast.parse(path.read_text()), {"--help"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            words = [each.value for each in node.args if isinstance(each, ast.Constant)]
            found |= {word for word in words if str(word).startswith("--")}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(path.parent.relative_to(ROOT).parts)
            names = [f"{node.module or base}.{each.name}" for each in node.names]
            for name in (node.module or base, *names):
                inside = name.startswith(f"{base}.") and name != module
                if inside and ROOT.joinpath(*name.split(".")).with_suffix(".py").exists():
                    found |= options_of(name)
    return found


def problem(words: list[str]) -> str:
    """Return what is wrong with a command of the project: that it, or an option, does not exist."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words and words[0].startswith(("tests/", ".ci/")):
        if not (ROOT / words[0]).is_file():
            return "there is no such file"
        words = ["python", "-m", words[0].rpartition("/")[0].replace("/", "."), *words[1:]]
    if len(words) < 3 or not words[0].endswith("python") or words[1] != "-m":
        return ""
    module, rest = words[2], words[3:]
    if module.split(".")[0] not in ("docs", "examples", "mtbalance", "tests"):
        return ""
    if module.startswith("examples."):
        command = app_of(module)
        if subcommands := getattr(command, "commands", {}):
            name = next((word for word in rest if not word.startswith("-")), "--help")
            if name not in subcommands and name != "--help":
                return f"there is no {name}"
            command = subcommands.get(name, command)
        known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    else:
        known = options_of(module)
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    unknown = given - known - {"--help"}
    return f"there is no {sorted(unknown)}" if unknown else ""


@pytest.mark.parametrize("file", FILES)
def test_commands_exist(file: str) -> None:
    for words in commands(file):
        assert not problem(words), " ".join(words)


@pytest.mark.parametrize("file", FILES)
def test_extras_exist(file: str) -> None:
    extras = set(re.findall(r"^([a-z]+) = \[$", read("pyproject.toml"), re.M))
    for found in re.findall(r"\"(?:mtbalance|\.)\[([a-z,]+)\]\"", read(file)):
        assert set(found.split(",")) <= extras, found


@pytest.mark.parametrize(
    "command",
    [
        "python -m examples.pathology crosval",
        "python -m examples.pathology benchmark --work 4",
        "python -m examples.toy --speed 3",
        "X=1 python -m mtbalance.testing --seed 3",
        "tests/gpu/run --device cpu --quicker",
        "tests/gpu/ran",
        "python -m docs.make figures --keeps",
    ],
)
def test_commands_that_do_not_exist_are_found(command: str) -> None:
    assert problem(command.split())


@pytest.mark.parametrize(
    "command",
    [
        "python -m examples.pathology benchmark --workers 4",
        "python -m examples.pathology --help",
        ".venv/bin/python -m examples.toy --steps 3",
        "python -m tests.benchmarks.step_cost --device cuda",
        "tests/gpu/run --device cpu --quick",
        "python -m docs.make figures CAGrad --keep",
    ],
)
def test_commands_that_exist_are_not(command: str) -> None:
    assert not problem(command.split())


# Pictures


def test_every_picture_is_known_and_small() -> None:
    kinds = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
    files = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in kinds}
    assert {picture.path for picture in pictures()} == set(stored())
    assert files == {*stored(), *DIAGRAMS}
    for path in files:
        assert (DOCS / path).stat().st_size <= MOST_BYTES, path


@pytest.mark.parametrize("picture", pictures(), ids=lambda picture: picture.path)
def test_no_picture_is_older_than_what_it_shows(picture: Picture) -> None:
    kept = stored()[picture.path]
    remedy = (
        f"docs/{picture.path} may show what is no more: draw it (`{picture.command}`), look at it, "
        f"and note that it is new (`python -m docs.make figures --keep {picture.path}`)."
    )
    assert {key: picture.stamp[key] for key in ("inputs", "picture")} == {
        key: kept[key] for key in ("inputs", "picture")
    }, remedy
    if picture.strategy:
        assert probe_of(picture.strategy) == pytest.approx(kept["probe"], abs=1e-6), remedy


def test_code_counts_without_words_and_layout() -> None:
    plain = "def f(x):\n    y = '# é'\n    return x + 1\n"
    worded = (
        '"""É, a module."""\n\n# why\ndef f( x ):\n    """É."""  # é\n'
        "    y = '# é'  # é\n    return (x\n    + 1)\n"
    )
    assert code_of(worded) == code_of(plain.replace("x + 1", "(x + 1)"))
    assert code_of(plain) != code_of(plain.replace("1", "2"))
    assert code_of(plain) != code_of(plain.replace("# é", "# e"))


# The build


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "latex2mathml", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package, reason='needs `pip install "mtbalance[docs]"`')
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        html = (tmp_path / page).with_suffix(".html").read_text(encoding="utf-8")
        assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', html), page
