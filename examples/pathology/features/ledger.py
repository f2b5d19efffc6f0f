"""The ledger of an extraction: what became of every slide in every stage, and the funnel."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from examples.pathology.common.errors import RunError
from examples.pathology.tables.writing import write_table

TILING, FEATURES = "tiling", "features"
"""The stages: from a slide file to tiles of tissue, and from these to a feature file."""

LEDGER_PERIOD_S = 10.0
"""The ledger on disk is at most this old, so that a killed run leaves one too."""


@dataclass(frozen=True)
class SlideRow:
    """What became of one slide in one stage.

    Attributes:
        slide: Its path relative to the folder of slides.
        stage: ``tiling`` or ``features``; a slide that ends in the first has no second row.
        status: ``ok``, ``empty`` (no tissue), ``failed`` or ``excluded`` (not a usable kind).
        reason: Why, unless it is simply ok.
        tiles_total: Whole tiles that fit on the slide; None if it did not get that far.
        tiles_kept: Tiles of tissue, or tiles with features.
        mpp: Microns per pixel of level 0 along x.
        mpp_source: Where that came from.
        seconds: Time spent on the stage; for a finished slide, when it was made. Tiling and
            network overlap: of reading tiles only the time counts that the network waited for.
        skipped: Whether an earlier run had finished it.
        reader: What read its pixels; empty if it was not opened.
        tiles_damaged: Tiles left out since some of their pixels cannot be read; the ledger has
            them among the reasons.
    """

    slide: str
    stage: str
    status: str
    reason: str = ""
    tiles_total: int | None = None
    tiles_kept: int | None = None
    mpp: float | None = None
    mpp_source: str = ""
    seconds: float = 0.0
    reader: str = ""
    skipped: bool = False
    tiles_damaged: int = 0


LEDGER_COLUMNS = tuple(
    field.name for field in fields(SlideRow) if field.name not in ("skipped", "tiles_damaged")
)

Rows = tuple[SlideRow, ...]
"""What became of one slide, stage by stage."""


@dataclass(frozen=True)
class ExtractSummary:
    """What became of all slides.

    Attributes:
        rows: One row per slide and stage.
        ledger: The file with the same rows.
        found: Slides and pictures in the folder.
        seconds: How long the run took.
        stopped: Why the run ended before the last slide; empty if it did not.
    """

    rows: tuple[SlideRow, ...]
    ledger: Path
    found: int
    seconds: float
    stopped: str = ""

    def count(self, status: str, stage: str | None = None) -> int:
        """Return the number of slides with this status, in this stage or in any."""
        return sum(row.status == status and stage in (None, row.stage) for row in self.rows)

    @property
    def slides(self) -> int:
        """Slides and pictures that were looked at."""
        return len({row.slide for row in self.rows})

    @property
    def tiled(self) -> int:
        """Slides with tiles of tissue."""
        return self.count("ok", TILING)

    @property
    def done(self) -> int:
        """Slides with features, those that an earlier run had finished included."""
        return self.count("ok", FEATURES)

    @property
    def empty(self) -> int:
        """Slides without tissue."""
        return self.count("empty")

    @property
    def excluded(self) -> int:
        """Pictures and slides that the protocol does not cover."""
        return self.count("excluded")

    @property
    def failed(self) -> int:
        """Slides that could not be used."""
        return self.count("failed")

    @property
    def skipped(self) -> int:
        """Slides that an earlier run had finished; they count as done too."""
        return sum(row.skipped for row in self.rows if row.stage == FEATURES)

    @property
    def exit_code(self) -> int:
        """0 if every slide was looked at and none failed, otherwise 1."""
        return int(self.failed > 0 or bool(self.stopped))

    @property
    def funnel(self) -> str:
        """How many slides were left after each stage."""
        return f"{self.found} slides -> {self.tiled} tiled -> {self.done} with features"

    def __str__(self) -> str:
        tiles = sum(row.tiles_kept or 0 for row in self.rows if row.stage == FEATURES)
        seconds = {
            stage: sum(row.seconds for row in self.rows if row.stage == stage and not row.skipped)
            for stage in (TILING, FEATURES)
        }
        left = self.found - self.slides
        stopped = f" Stopped early, {left} not looked at: {self.stopped}" if self.stopped else ""
        return (
            f"{self.funnel} ({self.skipped} finished before, {tiles} tiles in all); "
            f"{self.empty} empty, {self.excluded} excluded, {self.failed} failed; "
            f"tiling {seconds[TILING]:.1f} s, features {seconds[FEATURES]:.1f} s in "
            f"{self.seconds:.1f} s. "
            f"Each slide is in {self.ledger}.{stopped}"
        )


def write_ledger(path: Path, rows: Iterable[SlideRow]) -> None:
    """Write one line per slide and stage; the file on disk is always whole.

    Args:
        path: Where to.
        rows: The rows; their order is kept.
    """
    cells = [[getattr(row, name) for name in LEDGER_COLUMNS] for row in rows]
    write_table(path, pd.DataFrame(cells, columns=list(LEDGER_COLUMNS), dtype=object))


class LedgerKeeper:
    """Takes down what became of each slide, on disk and in a bar; close it whatever happens.

    Args:
        path: Where the ledger is.
        slides: The names of all slides, in the order of the ledger.
        max_failures: How many of them may fail; None: all.
    """

    def __init__(self, path: Path, slides: Sequence[str], max_failures: int | None) -> None:
        self._path, self._slides, self._max_failures = path, slides, max_failures
        self._rows: dict[str, Rows] = {}
        self._failed = 0
        self._written = time.monotonic()
        self._bar = tqdm(total=len(slides), desc="extracting", unit="slide")

    @property
    def rows(self) -> Rows:
        """The rows of all slides that were looked at."""
        return tuple(row for slide in self._slides for row in self._rows.get(slide, ()))

    def take_down(self, rows: Rows) -> None:
        """Take down what became of a slide; of one that is taken down already, nothing changes.

        Raises:
            RunError: More slides than may have failed.
        """
        if rows[0].slide in self._rows:  # Ctrl-C came before this was known to be done
            return
        self._rows[rows[0].slide] = rows
        self._failed += rows[-1].status == "failed"
        self._bar.update()
        self._bar.set_postfix_str(rows[0].slide, refresh=False)
        if time.monotonic() - self._written > LEDGER_PERIOD_S:
            self._write()
        if self._max_failures is not None and self._failed > self._max_failures:
            raise RunError(f"more than {self._max_failures} slides failed.")

    def _write(self) -> None:
        write_ledger(self._path, self.rows)
        self._written = time.monotonic()

    def close(self) -> None:
        """Write the ledger and leave the bar as it is."""
        self._bar.close()
        self._write()
