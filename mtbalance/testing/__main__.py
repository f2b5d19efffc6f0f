"""Print the properties of every strategy: ``python -m mtbalance.testing``."""

import argparse
import sys
from collections.abc import Sequence

from ._table import gradient_table, weighting_table


def main(arguments: Sequence[str] | None = None) -> str:
    """Return what the command prints."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbalance.testing",
        description="Try every strategy of mtbalance on matrices and losses, and print what held.",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="matrices of each family (default: 3)"
    )
    seeds = range(parser.parse_args(arguments).seeds)
    if not seeds:
        parser.error("`--seeds` must be at least 1: without trials, nothing speaks against a yes")
    return f"{gradient_table(seeds)}\n\n{weighting_table(seeds)}\n"


if __name__ == "__main__":
    sys.stdout.write(main())
