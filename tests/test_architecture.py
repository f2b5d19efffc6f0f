"""Who may import whom, what is public, and that importing the library costs nothing but torch."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mtbalance"
HELPERS = {
    "mtbalance._active_set",
    "mtbalance._blocks",
    "mtbalance._buffers",
    "mtbalance._optimizers",
    "mtbalance._checks",
    "mtbalance._gramians",
    "mtbalance._names",
    "mtbalance._newton",
    "mtbalance._pivoting",
    "mtbalance._projections",
    "mtbalance._random",
    "mtbalance._remembered",
    "mtbalance._remembering",
    "mtbalance._row_means",
    "mtbalance._row_state",
    "mtbalance._products",
    "mtbalance._rows",
    "mtbalance._shards",
    "mtbalance._simplex",
}
THIRD_PARTY = {"torch", "typing_extensions"}  # the second is a dependency of the first
EXTRAS = {
    "plot.py": {"matplotlib"},
    "integrations/accelerate.py": {"accelerate"},
    "integrations/lightning.py": {"lightning", "pytorch_lightning"},
    "integrations/torchjd.py": {"torchjd"},
    "integrations/transformers.py": {"transformers"},
}
"""What files may import that `import mtbalance` does not read."""


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
    extra = EXTRAS.get(path.relative_to(PACKAGE).as_posix(), set())
    assert outside <= THIRD_PARTY | extra | set(sys.stdlib_module_names)


def test_helpers_do_not_import_strategies() -> None:
    for name in HELPERS:
        path = ROOT / f"{name.replace('.', '/')}.py"
        own = {other for other in imports(path) if other.startswith("mtbalance")}
        assert own <= HELPERS


def test_only_the_kit_knows_the_kit() -> None:
    """It needs the public names, and is never imported by ``import mtbalance``."""
    kit = PACKAGE / "testing"
    for path in PACKAGE.rglob("*.py"):
        own = {name for name in imports(path) if name.startswith("mtbalance")}
        if kit in path.parents:
            private = {name for name in own if "._" in name and ".testing" not in name}
            assert private <= {"mtbalance._checks", "mtbalance._optimizers"}, path
        else:
            assert not any(name.startswith("mtbalance.testing") for name in own), path


def test_nobody_knows_the_integrations() -> None:
    """They are read when asked for; each other, they may know."""
    rooms = PACKAGE / "integrations"
    for path in PACKAGE.rglob("*.py"):
        if rooms not in path.parents:
            assert not any(name.startswith("mtbalance.integrations") for name in imports(path)), (
                path
            )


MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_THE_BALANCER = 400
MOST_LINES_OF_A_FUNCTION = 45
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    most = MOST_LINES_OF_THE_BALANCER if path.name == "_balancer.py" else MOST_LINES_OF_A_FILE
    assert len(text.splitlines()) <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


EXAMPLE = ROOT / "examples" / "pathology"
FLOORS = (
    ("cli",),
    ("demo",),
    ("study",),
    ("runs", "report"),
    ("figures",),
    ("results",),
    ("training", "simulation"),
    ("cohort",),
    ("features",),
    ("slides",),
    ("tables",),
    ("settings", "extractors", "jobs"),
    ("common",),
)
"""The packages of the example: each may import from floors below its own, and none above."""

TOY = ROOT / "examples" / "toy"
TOY_FLOORS = (("cli",), ("figure",), ("trails",), ("problem",))
"""The modules of the toy, as the packages of the example above."""

DIGITS = ROOT / "examples" / "digits"
DIGITS_FLOORS = (
    ("cli",),
    ("figure",),
    ("page",),
    ("results",),
    ("study", "costs"),
    ("training",),
    ("methods", "data"),
    ("setting",),
)
"""Likewise, of the digits."""

ROOMS = {
    "matplotlib": {"figures"},
    "typer": {"cli", "settings"},
    "dask": {"jobs"},
    "distributed": {"jobs"},
    "jinja2": {"report"},
}
"""Packages of others that only some rooms of the example may import."""


def imported_files(path: Path) -> set[Path]:
    """Return the files of the same package that a file imports, wherever in it.

    The packages that a module is in are left out, as every module's import runs them first.
    """
    package = next(each for each in (EXAMPLE, TOY, DIGITS, PACKAGE) if each in path.parents)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.parents[node.level - 1].relative_to(ROOT).parts if node.level else ()
            source = ".".join(part for part in (*above, node.module) if part)
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            places = [ROOT.joinpath(*parts[:count]) for count in (len(parts), len(parts) - 1)]
            files = [place.with_suffix(".py") for place in places]
            packages = [place / "__init__.py" for place in places]
            known = [each for each in (*files, *packages) if each.is_file()]
            found |= {each for each in known[:1] if package in each.parents}
    return found


def room_of(path: Path, example: Path = EXAMPLE) -> str:
    """Return the package of the example that a file belongs to, or its own name at the top."""
    return path.relative_to(example).with_suffix("").parts[0]


def test_the_example_uses_public_names_only() -> None:
    for path in (ROOT / "examples").rglob("*.py"):
        for name in imports(path):
            assert not (name.startswith("mtbalance") and "._" in name), path


def test_every_room_of_the_example_has_a_floor() -> None:
    rooms = {room_of(path) for path in EXAMPLE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == {room for floor in FLOORS for room in floor}
    for room in rooms:
        assert len(list((EXAMPLE / room).glob("*.py"))) <= 13, room  # a dozen, and __init__


@pytest.mark.parametrize(
    ("example", "floors"),
    [(EXAMPLE, FLOORS), (TOY, TOY_FLOORS), (DIGITS, DIGITS_FLOORS)],
    ids=["pathology", "toy", "digits"],
)
def test_imports_of_the_example_never_rise(
    example: Path, floors: tuple[tuple[str, ...], ...]
) -> None:
    floor_of = {room: number for number, floor in enumerate(floors) for room in floor}
    for path in example.rglob("*.py"):
        if (room := room_of(path, example)) in floor_of:
            for other in imported_files(path):
                same = room_of(other, example) == room
                assert same or floor_of[room_of(other, example)] > floor_of[room], (path, other)


@pytest.mark.parametrize(
    ("example", "floors"), [(TOY, TOY_FLOORS), (DIGITS, DIGITS_FLOORS)], ids=["toy", "digits"]
)
def test_a_small_example_stands_alone(example: Path, floors: tuple[tuple[str, ...], ...]) -> None:
    files = {path.stem: imports(path) for path in example.rglob("*.py")}
    assert files.keys() == {"__init__", "__main__"} | {name for floor in floors for name in floor}
    for name, modules in files.items():
        examples = {module for module in modules if module.startswith("examples.")}
        assert all(module.startswith(f"examples.{example.name}") for module in examples), name
        outside = {module.partition(".")[0] for module in modules}
        assert ("matplotlib" in outside) == (name == "figure")
        assert ("typer" in outside) == (name == "cli")


@pytest.mark.parametrize(
    "folder", [PACKAGE, EXAMPLE, TOY, DIGITS], ids=["library", "pathology", "toy", "digits"]
)
def test_files_import_each_other_in_no_circle(folder: Path) -> None:
    graph = {path: imported_files(path) for path in folder.rglob("*.py")}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", ROOMS)
def test_what_only_some_rooms_may_import(package: str) -> None:
    for path in EXAMPLE.rglob("*.py"):
        if any(name.partition(".")[0] == package for name in imports(path)):
            assert room_of(path) in ROOMS[package], path


@pytest.mark.parametrize(
    "name", ["mtbalance", "mtbalance.weighting", "mtbalance.gradient", "mtbalance.testing"]
)
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
