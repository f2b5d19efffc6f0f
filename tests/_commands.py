"""Commands of the examples, run as users run them."""

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[1]


def help_of(package: str, heavy: Collection[str]) -> str:
    """Return what ``--help`` of an example prints, which must import none of the heavy packages."""
    code = (
        "import sys\n"
        f"from {package} import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print(sorted({set(heavy)!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *printed, found = done.stdout.splitlines()
    assert found == "[]"
    return "\n".join(printed)
