"""Settings classes to commands: options from their fields, defaults from a TOML file, one call."""

import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import require_writable
from examples.pathology.common.logs import set_up_logging
from examples.pathology.common.toml import read_section
from examples.pathology.settings.option import Made, Option, OptionField, options_of, settings_from

UNUSED = "Accepted as everywhere; not used."
EVERYWHERE = (
    OptionField("seed", int, Option(UNUSED, min=0), 0),
    OptionField("device", str, Option(UNUSED), "auto"),
)
"""What every command takes, whether it needs it or not."""


def command(app: typer.Typer, settings: type[Made], name: str | None = None) -> Callable[..., Any]:
    """Return a decorator that makes a command of a function of settings.

    Args:
        app: Where the command is added.
        settings: The class whose options the command takes, besides those of all commands.
        name: How it is called, if not as the function.
    """

    def decorate(run: Callable[[Made], None]) -> Callable[[Made], None]:
        def called(**values: Any) -> None:
            if isinstance(out := values.get("out"), Path):  # before any work is done
                require_writable(out)
            run(settings_from(settings, values))

        taken = {each.name: each for each in (*EVERYWHERE, *options_of(settings))}
        parameters = [_parameter(each) for each in sorted(taken.values(), key=_place)]
        called.__signature__ = inspect.Signature([*parameters, *_COMMON])  # type: ignore[attr-defined]
        called.__doc__ = run.__doc__
        app.command(name or run.__name__)(called)
        return run

    return decorate


def _place(each: OptionField) -> int:
    """Return where an option stands in the help: what is needed first, what all have last."""
    return 0 if each.default is MISSING else {"seed": 2, "device": 3}.get(each.name, 1)


def _parameter(each: OptionField) -> inspect.Parameter:
    """Return a field as the parameter of a function that typer reads."""
    about, several = each.about, each.several
    # Where typer would not guess how it is typed; a switch has no opposite.
    flags = [f"--{each.typed}"] if about.flag or each.type is bool else []
    ends: dict[str, Any] = {"min": about.min, "max": about.max} if each.type in (int, float) else {}
    option = typer.Option(*flags, help=about.help, metavar=about.metavar, **ends)
    kind: Any = list[each.type] if several else each.type  # type: ignore[name-defined]
    default = each.default
    if default is MISSING:
        default = inspect.Parameter.empty
    elif several or default is None:
        kind, default = kind | None, None
    return _keyword(each.name, default, Annotated[kind, option])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a section of a TOML file supply the defaults of this command's options."""
    if path is None:
        return None
    section = str(context.info_name)
    parents = context.parent.command if context.parent else context.command
    sections = [*getattr(parents, "commands", {section: None}), "provenance"]
    own = {"config", "help"}
    known = [str(p.name) for p in context.command.params if p.name not in own]
    values = read_section(path, section, known, sections)
    for param in context.command.params:
        value = values.get(str(param.name))
        if isinstance(value, dict) and getattr(param, "multiple", False):
            values[str(param.name)] = [f"{key}={value[key]}" for key in value]
        elif (
            value is not None and getattr(param, "multiple", False) and not isinstance(value, list)
        ):
            raise UserError(
                f"{path}: `{param.name}` of [{section}] must be a list of values, but got one. "
                f"Write [{json.dumps(value, ensure_ascii=False, default=str)}]."
            )
        if isinstance(value, bool) and not getattr(param, "is_flag", False):
            said = str(value).lower()  # would be read as the number 1
            name = f"`{param.name}` of [{section}]"
            raise UserError(f"{path}: {name} is no switch, but got {said}. Give its value.")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _quiet_or_not(verbose: bool) -> bool:
    set_up_logging(verbose=verbose)
    return verbose


_CONFIG = typer.Option(
    "--config",
    metavar="FILE.toml",
    help="Defaults for these options, from the section named like the command; the command line "
    "wins.",
    is_eager=True,
    callback=_use_config,
)
_VERBOSE = typer.Option("--verbose", help="Log more.", callback=_quiet_or_not)
_COMMON = [
    _keyword("config", None, Annotated[Path | None, _CONFIG]),
    _keyword("verbose", False, Annotated[bool, _VERBOSE]),
]
