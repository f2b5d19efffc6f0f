"""The command line: reads the arguments, trains, measures, writes.

0: all well; 1: a process died; 2: wrong use; 130: interrupted. What is slow to import is imported
when it is needed, so that ``--help`` answers at once.
"""

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.digits.setting import QUICK, Setting

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


FIGURE = "digits.png"


class UserError(ValueError):
    """What was asked for is wrong; the command line exits with 2."""


@app.command()
def compare(
    methods: Annotated[
        str, typer.Option(help="Names for make_balancer, separated by commas; all: the catalogue.")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="Repetitions of everything.", min=1)] = 5,
    processes: Annotated[int, typer.Option(help="That train side by side.", min=1)] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short trainings, to see that all works.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for table, figure and trainings; a rest is done.")
    ] = Path("digits"),
    page: Annotated[
        Path | None, typer.Option(help="A Markdown page whose marked parts are written anew.")
    ] = None,
) -> None:
    """Compare all ways of balancing on two overlaid handwritten digits and their ink."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"`out` must be in a folder that exists, but got {str(out)!r}.")
    from examples.digits import costs, study
    from examples.digits.methods import catalogue
    from examples.digits.page import BLOCKS, filled

    if page is not None:
        try:
            filled(page.read_text(encoding="utf-8"), dict.fromkeys(BLOCKS, ""))
        except (OSError, ValueError) as error:
            raise UserError(f"`page` must be a page with marks, but: {error}") from error
    names = _names(methods)
    setting = QUICK if quick else Setting()
    missing = tuple(name for name in catalogue() if name not in names)
    plan = study.Plan(tuple(names), seeds, setting, missing)
    out.mkdir(exist_ok=True)
    try:
        study.run(plan, out, processes)
    except study.OtherSettingError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on from here.", err=True)
        raise SystemExit(130) from None
    except BrokenProcessPool:
        typer.echo("Error: a process died; the same command goes on from here.", err=True)
        raise SystemExit(1) from None
    typer.echo("Measuring the time of steps ...", err=True)
    costs.measured(names, setting, out, costs.QUICK_ROUNDS if quick else costs.ROUNDS)
    for path in write(out, page):
        typer.echo(path)


def _names(methods: str) -> list[str]:
    """Return the methods, the baseline first, each once."""
    from examples.digits.methods import BASELINE, catalogue, check

    if methods == "all":
        return catalogue()
    names = [name.strip().lower() for name in methods.split(",")]
    try:
        for name in names:
            check(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    return list(dict.fromkeys([BASELINE, *names]))


def write(out: Path, page: Path | None) -> list[Path]:
    """Write what follows from the trainings of a folder; return the files.

    Args:
        out: The folder.
        page: A page to fill in; None for none.
    """
    from examples.digits import costs, study
    from examples.digits.figure import draw
    from examples.digits.page import blocks, comma_separated, filled
    from examples.digits.results import tabulate

    table = tabulate(*study.read(out), costs.read(out))
    parts = blocks(table)
    texts = {out / "table.csv": comma_separated(table), out / "table.md": parts["table"]}
    if page is not None:
        texts[page] = filled(page.read_text(encoding="utf-8"), parts)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    draw(table, out / FIGURE)
    return [*texts, out / FIGURE]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: What follows the program's name; ``None``: ``sys.argv``.
    """
    how: dict[str, Any] = {"prog_name": "python -m examples.digits"}
    try:
        app(list(arguments) if arguments is not None else None, **how)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
