"""Who may import whom, what is public, and that importing the library costs nothing but torch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mtbalance"
HELPERS = {
    "mtbalance._checks",
    "mtbalance._linalg",
    "mtbalance._random",
    "mtbalance._rows",
    "mtbalance._shards",
}
THIRD_PARTY = {"torch", "typing_extensions"}  # the second is a dependency of the first


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, absolute."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            found.add(".".join(part for part in (base, node.module) if part))
    return found


STRATEGIES = [
    path
    for family in ("weighting", "gradient")
    for path in sorted((PACKAGE / family).glob("_*.py"))
    if path.name not in ("__init__.py", "_base.py")
]


@pytest.mark.parametrize("path", STRATEGIES, ids=module_name)
def test_a_strategy_imports_its_base_and_helpers_only(path: Path) -> None:
    own = {name for name in imports(path) if name.startswith("mtbalance")}
    assert own <= HELPERS | {f"mtbalance.{path.parent.name}._base"}


@pytest.mark.parametrize("family", ["weighting", "gradient"])
def test_weighting_and_gradient_do_not_know_each_other(family: str) -> None:
    other = {"weighting": "gradient", "gradient": "weighting"}[family]
    for path in (PACKAGE / family).glob("*.py"):
        assert not any(name.startswith(f"mtbalance.{other}") for name in imports(path)), path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_the_library_imports_torch_and_nothing_heavier(path: Path) -> None:
    outside = {name.partition(".")[0] for name in imports(path)} - {"mtbalance"}
    assert outside <= THIRD_PARTY | set(sys.stdlib_module_names)


def test_helpers_do_not_import_strategies() -> None:
    for name in HELPERS:
        path = ROOT / f"{name.replace('.', '/')}.py"
        own = {other for other in imports(path) if other.startswith("mtbalance")}
        assert own <= HELPERS


def test_the_example_uses_public_names_only() -> None:
    for path in (ROOT / "examples").rglob("*.py"):
        for name in imports(path):
            assert not (name.startswith("mtbalance") and "._" in name), path


@pytest.mark.parametrize("name", ["mtbalance", "mtbalance.weighting", "mtbalance.gradient"])
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public).__doc__, public


def test_import_leaves_scientific_packages_alone() -> None:
    heavy = ("scipy", "pandas", "sklearn", "timm", "openslide")
    code = f"import sys, mtbalance; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_versions_agree() -> None:
    import mtbalance

    assert f'version = "{mtbalance.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{mtbalance.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
