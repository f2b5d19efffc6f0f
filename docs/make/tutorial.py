"""The picture of the tutorial, which its own blocks draw."""

import os
import shutil
import tempfile
from pathlib import Path

from docs.make.links import DOCS
from docs.make.stamps import blocks_of

PAGE = DOCS / "tutorial.md"
PICTURE = "tutorial/overview.png"


def draw() -> None:
    """Run the blocks of the page in an empty folder, and keep the picture that they leave."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile("".join(blocks_of(PAGE)), str(PAGE), "exec"), {"__name__": "tutorial"})  # noqa: S102
        finally:
            os.chdir(home)
        shutil.copy(Path(folder, "overview.png"), DOCS / PICTURE)
