"""The demo of the example, from synthetic slides to the report, as a user starts it."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.gpu.conduct import ROOT
from tests.gpu.rows import Row, Setting

SIZE = {"patients": 14, "epochs": 2}
"""With fewer patients, a class has too few for five folds."""
QUICK = {"patients": 14, "epochs": 1}
_STAGE = re.compile(r"(draw slides|extract|crossval \S+|report|all)\W+([\d.]+) s\b")


def measure(setting: Setting) -> Iterator[Row]:
    """Run it, and tell how long its stages took."""
    size = QUICK if setting.quick else SIZE
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        out = Path(folder, "demo")
        start = time.monotonic()
        done = subprocess.run(
            command(out, setting.device.type, **size),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,  # looked at below
        )
        took = time.monotonic() - start
        page = out / "report" / "index.html"
        if done.returncode != 0 or not page.is_file():
            raise RuntimeError(
                f"the demo must end with its report, but its exit status is {done.returncode}: "
                f"{' '.join(done.stdout.split())[-400:]}"
            )
        stages = {name: float(seconds) for name, seconds in _STAGE.findall(done.stdout)}
        cells = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items())
        what = f"{size['patients']} patients, {size['epochs']} epochs"
        figures = {"seconds": took, "stages": stages, "bytes": page.stat().st_size}
        yield Row(what, f"a report after {took:.0f} s: {cells}", figures, good=True)


def command(out: Path, device: str, *, patients: int, epochs: int) -> list[str]:
    """Return the command line."""
    line = [sys.executable, "-m", "examples.pathology", "demo", "--out", str(out)]
    return [*line, "--device", device, "--patients", str(patients), "--epochs", str(epochs)]
