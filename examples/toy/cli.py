"""The command line: reads the arguments, trains, draws.

0: all well; 2: wrong use. What is slow to import is imported when it is needed, so that ``--help``
answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

STRATEGIES = "sum,pcgrad,mgda,cagrad,nash,aligned"
FORMATS = (".png", ".svg")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class UserError(ValueError):
    """What was asked for is wrong; the command line exits with 2."""


@app.command()
def draw(
    strategies: Annotated[
        str, typer.Option(help="Names for make_balancer, separated by commas: a panel each.")
    ] = STRATEGIES,
    steps: Annotated[int, typer.Option(help="Steps from each start, at most.", min=1)] = 40_000,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.", min=1e-9)] = 0.0025,
    scale: Annotated[
        float, typer.Option(help="Factor of the first loss; Navon et al. take 0.1.", min=1e-9)
    ] = 1.0,
    processes: Annotated[int, typer.Option(help="That train side by side.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="The .png or .svg to write.")] = Path("toy.png"),
) -> None:
    """Draw where each strategy ends on the two-task toy of the CAGrad paper, from five starts."""
    if out.suffix not in FORMATS:
        raise UserError(f"`out` must end in {' or '.join(FORMATS)}, but got {str(out)!r}.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"`out` must be in a folder that exists, but got {str(out)!r}.")
    from examples.toy.figure import draw as draw_figure
    from examples.toy.trails import Setting, follow_all, title

    names = [name.strip() for name in strategies.split(",")]
    try:
        headings = [title(name) for name in names]
        trails = follow_all(names, Setting(steps, lr, scale), processes)
    except (TypeError, ValueError, FloatingPointError) as error:  # the last: of negative losses
        raise UserError(str(error)) from error
    draw_figure(dict(zip(headings, trails, strict=True)), out, steps=steps)
    for heading, several in zip(headings, trails, strict=True):
        ends = "  ".join("({:6.2f}, {:6.2f})".format(*trail.end.tolist()) for trail in several)
        typer.echo(f"{heading:<12} {ends}")
    typer.echo(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: What follows the program's name; ``None``: ``sys.argv``.
    """
    how: dict[str, Any] = {"prog_name": "python -m examples.toy"}
    try:
        app(list(arguments) if arguments is not None else None, **how)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
