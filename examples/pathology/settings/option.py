"""Options: annotated fields of settings classes, each said once.

The command line (`command`), the section of a TOML file and the check all come from the fields of
one class: name, type, default, help, bounds and source. Nothing heavy is imported here, so that
``--help`` answers at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from examples.pathology.common.errors import UserError, listing, nearest
from examples.pathology.common.names import composed

_ABOUT = "option"  # the key under which a field tells what it says of itself
Made = TypeVar("Made", bound="Settings")
Value = TypeVar("Value")

Rule = Callable[[Any], str]
"""Returns what a value must be if it is not, such as ``above 0``, and otherwise nothing."""


@dataclass(frozen=True)
class Option:
    """What a field says of itself beside its name, type and default.

    Args:
        help: What it is, in the words of the command line.
        min: The least value.
        max: The largest value.
        rule: What the command line cannot say as a range.
        choices: The values that are allowed.
        flag: How it is typed, if not as its name.
        metavar: What stands for its value in the help, if not its type.
        source: Where the default comes from.
    """

    help: str
    min: float | None = None
    max: float | None = None
    rule: Rule | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    metavar: str | None = None
    source: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise a `UserError` unless the value of the option `name` is allowed."""
        must = self.rule(value) if self.rule is not None else ""
        if self.min is not None and self.max is not None:
            must = must or between(self.min, self.max)(value)
        elif self.min is not None:
            must = must or at_least(self.min)(value)
        if must:
            raise UserError(f"`{name}` must be {must}, but got {value}.")
        if self.choices and value not in self.choices:
            raise UserError(
                f"`{name}` must be one of {listing(self.choices)}, but got {value!r}."
                f"{nearest(value, self.choices)}"
            )


@dataclass(frozen=True)
class Nested:
    """Says of a field of another settings class that its options stand among those around it.

    Args:
        without: Options that are left at their defaults; those around it need not be named.
        help: Other words for some of its options.
    """

    without: tuple[str, ...] = ()
    help: Mapping[str, str] = field(default_factory=dict)


def option(default: Value, help: str, **about: Any) -> Value:  # noqa: A002  (as in `Option`)
    """Return a field that is an option with a default; more of it as in `Option`."""
    made: Value = field(default=default, metadata={_ABOUT: Option(help, **about)})
    return made


def needed(help: str, **about: Any) -> Any:  # noqa: A002
    """Return a field that is an option without a default; more of it as in `Option`."""
    return field(metadata={_ABOUT: Option(help, **about)})


def nested(default_factory: Any = MISSING, **about: Any) -> Any:
    """Return a field of another settings class whose options stand here; more as in `Nested`."""
    return field(default_factory=default_factory, metadata={_ABOUT: Nested(**about)})


def finite(value: float) -> str:
    """Be the rule that a number is finite."""
    return "" if math.isfinite(value) else "a finite number"


def at_least(low: float) -> Rule:
    """Return the rule that a number is at least ``low``, and finite."""
    return lambda value: "" if low <= value < math.inf else f"at least {low:g}"


def above(low: float) -> Rule:
    """Return the rule that a number is above ``low``, and finite."""
    return lambda value: (
        "" if low < value < math.inf else f"above {low:g}" + " and finite" * (value == math.inf)
    )


def each_once(rule: Rule) -> Rule:
    """Return the rule that several numbers each keep to a rule, and no two are equal."""

    def broken(values: Sequence[float]) -> str:
        for must in filter(None, map(rule, values)):
            return f"{must} each"
        return "" if len(set(values)) == len(values) else "different numbers"

    return broken


def between(low: float, high: float) -> Rule:
    """Return the rule that a number is between two others, or one of them."""
    return lambda value: "" if low <= value <= high else f"between {low:g} and {high:g}"


def inside(low: float, high: float) -> Rule:
    """Return the rule that a number is between two others, and none of them."""
    return lambda value: "" if low < value < high else f"between {low:g} and {high:g}"


@dataclass(frozen=True)
class OptionField:
    """A field that is an option.

    Args:
        name: Of the field.
        type: Its type, without ``| None``; of several values that of one.
        several: Whether it takes several values, as a tuple.
        about: What it says of itself.
        default: Its default; `MISSING` where there is none.
    """

    name: str
    type: Any
    about: Option
    default: Any
    several: bool = False

    @property
    def typed(self) -> str:
        """The option as a user types it, without the dashes before it."""
        return self.about.flag.lstrip("-") or self.name.replace("_", "-")


class Settings:
    """A settings class: a frozen dataclass whose annotated fields are options, checked when made.

    Text is composed as the cells of tables are, since it names columns and classes.

    Raises:
        UserError: A value is not allowed.
    """

    def __post_init__(self) -> None:
        for each in _own(type(self))[0]:
            if (value := getattr(self, each.name)) is not None:
                if each.type is str:
                    value = tuple(map(composed, value)) if each.several else composed(value)
                    object.__setattr__(self, each.name, value)  # the dataclass is frozen
                each.about.check(each.typed, value)


def options_of(settings: type[Settings]) -> list[OptionField]:
    """Return the options of a settings class and of those nested in it, each name once."""
    options, nested = _own(settings)
    own = {each.name: each for each in options}
    flat: list[OptionField] = []
    for each in fields(settings):  # type: ignore[arg-type]  # every settings class is a dataclass
        if each.name in own:
            flat.append(own[each.name])
        elif each.name in nested:
            inner, about = nested[each.name]
            for found in options_of(inner):
                if found.name not in own and found.name not in about.without:
                    words = about.help.get(found.name, found.about.help)
                    flat.append(replace(found, about=replace(found.about, help=words)))
    return flat


def settings_from(settings: type[Made], values: Mapping[str, Any]) -> Made:
    """Return the settings that the values of options stand for.

    Args:
        settings: The class.
        values: By name; of options that take several values a list, and none for the default.
    """
    options, nested = _own(settings)
    arguments: dict[str, Any] = {}
    for each in options:
        if each.name in values and not (each.several and not values[each.name]):
            value = values[each.name]
            arguments[each.name] = tuple(value) if each.several else value
    for name, (inner, about) in nested.items():
        own = {each.name for each in options}.union(about.without)
        arguments[name] = settings_from(inner, {k: v for k, v in values.items() if k not in own})
    return settings(**arguments)


def _own(
    settings: type[Settings],
) -> tuple[list[OptionField], dict[str, tuple[type[Settings], Nested]]]:
    """Return the options that are fields of a class itself, and the classes nested in it."""
    hints = get_type_hints(settings)
    options, nested = [], {}
    for each in fields(settings):  # type: ignore[arg-type]  # every settings class is a dataclass
        kind, about = hints[each.name], each.metadata.get(_ABOUT)
        if isinstance(about, Nested):
            nested[each.name] = kind, about
        elif isinstance(about, Option):
            several = get_origin(kind) is tuple
            plain = get_args(kind)[0] if several or isinstance(kind, UnionType) else kind
            options.append(OptionField(each.name, plain, about, each.default, several))
    return options, nested
