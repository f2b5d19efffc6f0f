"""``python -m docs.make``: pictures that are older than what they show, and pages of strategies."""

import argparse

from docs.make import strategies, tutorial
from docs.make.links import DOCS
from docs.make.pictures import draw
from docs.make.stamps import Picture, pictures, store, stored


def figures(names: list[str], *, keep: bool) -> None:
    """Draw the pictures of strategies whose inputs have changed.

    Args:
        names: Of pictures or classes to draw whatever has changed; by default what is old.
        keep: Note that the pictures still show what their inputs make, without drawing.
    """
    stamps = stored()
    for picture in pictures():
        named = {picture.path, picture.strategy} & set(names)
        if not (named if names else _is_old(picture, stamps)):
            continue
        if picture.strategy and not keep:
            (DOCS / picture.path).write_text(draw(picture.strategy), encoding="utf-8")
        elif not keep or not (DOCS / picture.path).exists():
            print(f"{picture.path} is old or missing: {picture.command}")  # noqa: T201
            continue
        stamps[picture.path] = picture.stamp
        store(stamps)
        print(picture.path, flush=True)  # noqa: T201


def _is_old(picture: Picture, stamps: dict[str, dict[str, object]]) -> bool:
    there = (DOCS / picture.path).exists()
    return not there or stamps.get(picture.path) != picture.stamp


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.make", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("figures", help="draw what is older than its inputs")
    drawing.add_argument("names", nargs="*", help="draw these: classes, or pictures' paths")
    drawing.add_argument(
        "--keep", action="store_true", help="note that they are as they shall be, without drawing"
    )
    commands.add_parser("pages", help="write the pages of strategies")
    commands.add_parser("tutorial", help="run the tutorial, and keep its picture")
    commands.add_parser("grid", help="draw the figure of the grid of simulated cohorts")
    given = parser.parse_args()
    if given.command == "pages":
        strategies.write()
    elif given.command == "tutorial":
        tutorial.draw()
        figures([tutorial.PICTURE], keep=True)
    elif given.command == "grid":
        from docs.make import grid  # it needs the packages of the pathology example

        grid.draw()
        figures([grid.PICTURE], keep=True)
    else:
        figures(given.names, keep=given.keep)


if __name__ == "__main__":
    main()
