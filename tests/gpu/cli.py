"""The command line: the whole run, or (as the run itself calls it) one part."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks.reporting import describe, header
from tests.gpu.conduct import command_of, conduct, table
from tests.gpu.parts import PARTS
from tests.gpu.rows import Setting, write_rows

MINUTES = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write JSON, or say what would be done. Return the exit status.

    It is 0 whatever was found: the table tells.
    """
    options = _parser().parse_args(arguments)
    if options.part is not None:
        (part,) = (each for each in PARTS if each.name == options.part)
        setting = Setting(torch.device(options.device), options.quick, options.seconds)
        write_rows(part.measure(setting), options.rows)
        return 0
    parts = [each for each in PARTS if each.name in options.parts]
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write(plan([part.name for part in parts]))
        return 0
    environment = describe(torch.device(options.device))
    sys.stdout.write(header(environment))
    outcomes = conduct(
        parts,
        command_of(options.device, quick=options.quick),
        60 * options.minutes,
        lambda line: sys.stderr.write(f"{line}\n"),
    )
    everything = {"environment": environment, "parts": [each.as_dict() for each in outcomes]}
    options.to.write_text(json.dumps(everything, indent=2) + "\n")
    sys.stdout.write(table(outcomes))
    return 0


def plan(names: Sequence[str]) -> str:
    """Return what would be done on a GPU, part by part."""
    parts = [part for part in PARTS if part.name in names]
    most = sum(part.seconds for part in parts) / 60
    lines = [
        f"torch {torch.__version__} finds no GPU here, so nothing was measured.",
        f"On a machine with one, this would take at most {most:.1f} minutes, and do:",
        "",
    ]
    lines += [f"- {part.name} (at most {part.seconds:.0f} s): {part.plan}" for part in parts]
    lines += ["", "`--device cpu --quick` runs every part in its smallest form."]
    return "\n".join([*lines, ""])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests/gpu/run",
        description=sys.modules["tests.gpu"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)}; by default all",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest size of everything")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"how long all may take together, by default {MINUTES:.0f}",
    )
    parser.add_argument("--to", type=Path, default=Path("gpu.json"), help="where JSON goes")
    inner = parser.add_argument_group("one part, in this process")
    inner.add_argument("--part", choices=names)
    inner.add_argument("--rows", type=Path, help="the file that its rows are added to")
    inner.add_argument("--seconds", type=float, help="how long it may take")
    return parser
