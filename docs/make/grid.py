"""The figure of the grid of simulated cohorts, from the differences that lie beside it."""

import io

import pandas as pd
from PIL import Image

from docs.make.links import DOCS
from examples.pathology.figures.grid import draw_grid
from examples.pathology.figures.sheet import Sheet
from examples.pathology.study.grid_report import SIMULATED, blocks_of

CELLS, PICTURE = "grid/cells.csv", "grid/grid.png"


def draw() -> None:
    """Draw the picture, with 256 colours: a third of the file."""
    path = DOCS / PICTURE
    draw_grid(blocks_of(pd.read_csv(DOCS / CELLS)), Sheet(path, "", SIMULATED))
    full = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    few = full.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
