"""Options are said once: the command, its check and its values all come from a settings class."""

import math
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from examples.pathology.common.errors import UserError
from examples.pathology.settings.benchmark import BenchmarkConfig
from examples.pathology.settings.cohort import CheckConfig
from examples.pathology.settings.command import command
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.extract import ExtractConfig, VerifyWeightsConfig
from examples.pathology.settings.option import (
    Option,
    Settings,
    above,
    inside,
    needed,
    nested,
    option,
    options_of,
    settings_from,
)
from examples.pathology.settings.runs import DemoConfig, DeployConfig, HeatmapConfig, ReportConfig
from examples.pathology.settings.simulate import SimulateConfig

ALL = (
    ExtractConfig, VerifyWeightsConfig, CheckConfig, CrossvalConfig, BenchmarkConfig, DeployConfig,
    HeatmapConfig, ReportConfig, DemoConfig, SimulateConfig,
)  # fmt: skip


@dataclass(frozen=True)
class Oven(Settings):
    heat: float = option(180.0, "Of the oven.", rule=above(0))
    mode: str = option("fan", "fan or grill.", choices=("fan", "grill"))
    door: str = option("left", "Where it opens.")


@dataclass(frozen=True)
class Cake(Settings):
    name: str = needed("What it is called.")
    _: KW_ONLY
    layers: int = option(1, "How many.", min=1, max=9)
    fillings: tuple[str, ...] = option(("jam",), "Between them; several.", flag="--filling")
    glazed: bool = option(False, "With sugar.")
    weight_kg: float | None = option(None, "Of the whole.", rule=inside(0, 5))
    door: str = option("none", "Of the box.")
    oven: Oven = nested(Oven, without=("mode",), help={"heat": "Of its oven."})
    out: Path = needed("Where it goes.")


@pytest.mark.parametrize("settings", ALL)
def test_every_option_says_what_it_is_and_allows_its_default(settings):
    options = options_of(settings)
    assert len({each.name for each in options}) == len(options) > 0
    for each in options:
        assert each.about.help.endswith((".", "...")), each.name
        if each.default is not MISSING and each.default is not None:
            each.about.check(each.typed, each.default)


@pytest.mark.parametrize("settings", ALL)
def test_every_field_is_an_option_or_known_not_to_be_one(settings):
    others = {"show_tiles", "command"}
    options = {each.name for each in options_of(settings)}
    names = set(settings.__dataclass_fields__) - others - {"rules", "crossval", "page"}
    assert names <= options


def test_nested_options_stand_where_their_settings_do_and_each_name_once():
    options = {each.name: each for each in options_of(Cake)}
    assert list(options) == [
        "name", "layers", "fillings", "glazed", "weight_kg", "door", "heat", "out",
    ]  # fmt: skip
    assert options["heat"].about.help == "Of its oven."
    assert options["door"].about.help == "Of the box."
    assert (options["fillings"].typed, options["weight_kg"].typed) == ("filling", "weight-kg")
    assert (options["fillings"].type, options["fillings"].several) == (str, True)
    assert (options["weight_kg"].type, options["out"].default) == (float, MISSING)


def test_values_become_settings():
    made = settings_from(Cake, {"name": "a", "out": Path("o"), "fillings": [], "heat": 200.0})
    assert made == Cake("a", out=Path("o"), oven=Oven(heat=200.0))
    made = settings_from(Cake, {"name": "a", "out": Path("o"), "fillings": ["x"], "door": "top"})
    assert made == Cake("a", out=Path("o"), fillings=("x",), door="top")


@given(st.integers(-100, 100))
def test_bounds_are_kept(layers):
    if 1 <= layers <= 9:
        assert Cake("a", out=Path("o"), layers=layers).layers == layers
    else:
        words = rf"`layers` must be between 1 and 9, but got {layers}\."
        with pytest.raises(UserError, match=words):
            Cake("a", out=Path("o"), layers=layers)


@pytest.mark.parametrize("weight", [0.0, 5.0, -1.0, math.nan, math.inf])
def test_rules_are_kept(weight):
    with pytest.raises(UserError, match="`weight-kg` must be between 0 and 5, but got"):
        Cake("a", out=Path("o"), weight_kg=weight)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_least_value_is_kept_and_must_be_finite(value):
    with pytest.raises(UserError, match=r"`x` must be at least 1, but got"):
        Option("", min=1).check("x", value)


def test_choices_are_kept():
    with pytest.raises(UserError, match=r"`mode` must be one of fan, grill, .* mean `grill`"):
        Oven(mode="gril")


@pytest.fixture
def bake():
    asked = []
    app = typer.Typer(rich_markup_mode=None)

    @command(app, Cake, "bake-it")
    def bake(config):
        """Bake."""
        asked.append(config)

    return asked, lambda *words: CliRunner().invoke(app, list(words))


def test_a_command_takes_the_options_of_its_settings(bake):
    asked, run = bake
    words = ["--name", "a", "--out", "o", "--layers", "3", "--filling", "x", "--filling", "y"]
    assert run(*words, "--glazed", "--heat", "99", "--weight-kg", "2").exit_code == 0
    assert run("--name", "b", "--out", "o").exit_code == 0
    assert asked == [
        Cake(
            "a", layers=3, fillings=("x", "y"), glazed=True, weight_kg=2.0, oven=Oven(heat=99.0),
            out=Path("o"),
        ),
        Cake("b", out=Path("o")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ['fillings = ["a=1", "b=true", "c=[1, 0.5]"]', "fillings = {a = 1, b = true, c = [1, 0.5]}"],
)
def test_several_values_may_stand_in_a_table(bake, tmp_path, text):
    asked, run = bake
    (tmp_path / "a.toml").write_text(f"[bake-it]\n{text}\n")
    found = run("--name", "a", "--out", "o", "--config", str(tmp_path / "a.toml"))
    assert found.exit_code == 0
    assert [word.lower() for word in asked[0].fillings] == ["a=1", "b=true", "c=[1, 0.5]"]


def test_a_command_refuses_what_its_settings_do_not_take(bake):
    asked, run = bake
    needed = ["--name", "a", "--out", "o"]
    assert run("--name", "a").exit_code == 2
    for words in (["--layers", "0"], ["--mode", "fan"], ["--no-glazed"], ["--fillings", "x"]):
        assert run(*needed, *words).exit_code == 2
    assert isinstance(run(*needed, "--heat", "0").exception, UserError)
    assert asked == []


def test_the_help_has_what_is_needed_first_and_what_all_have_last(bake):
    shown = bake[1]("--help").output
    order = ["--name", "--out", "--layers", "--filling", "--glazed", "--heat", "--seed", "--device"]
    places = [shown.index(f"{name} ") for name in [*order, "--config", "--verbose"]]
    assert places == sorted(places)
    assert "1<=x<=9" in shown
