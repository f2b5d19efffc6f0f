"""The whole pipeline on slides that a program has drawn: no input, no download, only a CPU."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from examples.pathology.common.errors import RunError
from examples.pathology.common.files import whole
from examples.pathology.common.folders import claim_folder
from examples.pathology.common.toml import read_toml, write_toml
from examples.pathology.features.extract import run_extract
from examples.pathology.report.report import write_report
from examples.pathology.runs.crossval import run_crossval
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.settings.runs import DemoConfig
from examples.pathology.simulation.slides import SlideCohort, make_slide_cohort

logger = logging.getLogger(__name__)

COMPARED = ("baseline", "naive", "autol+cagrad")
NOTE = "SYNTHETIC slides and labels, drawn by a program."
PREFACE = (
    "This page comes from slides that a program has drawn: no patient, no tissue, no biology. The "
    "label and the auxiliary value decided how each slide was drawn, so there is something to "
    "find. It shows that the pipeline runs from slide to figure; it shows nothing about which "
    "method is better on real data. Tile features are scaled by the mean and standard deviation of "
    "the training part, because those of a random network hardly vary."
)


def run_demo(config: DemoConfig) -> Path:
    """Draw slides, extract features, compare three methods on the same splits, write a report.

    Run again with the same settings, it takes up what is there.

    Returns:
        The report's page.

    Raises:
        UserError: ``out`` holds something else.
        RunError: A slide gave no features.
    """
    out, seed, device = config.out, config.seed, config.device
    settings = {"patients": config.patients, "epochs": config.epochs, "seed": seed}
    claim_folder(out, "demo", settings)
    logger.info("Everything here is synthetic: %s", NOTE)
    seconds: dict[str, float] = {}
    with _timed("draw slides", seconds):
        cohort = _cohort(out / "cohort", patients=config.patients, seed=seed)
    with _timed("extract", seconds):
        wanted = ExtractConfig(
            cohort.slides, out / "features", workers=2, batch_size=32, seed=seed, device=device
        )
        extracted = run_extract(wanted)
        if extracted.exit_code:
            raise RunError(f"All slides must give features, but some did not. {extracted}")
    runs: list[Path] = []
    for method in COMPARED:
        run = out / "runs" / method
        with _timed(f"crossval {method}", seconds), _one_thread():
            run_crossval(
                CrossvalConfig(
                    clini=cohort.clini,
                    slide_table=cohort.slide_table,
                    features=out / "features",
                    target=cohort.target,
                    out=run,
                    auxiliary=(cohort.auxiliary,),
                    balancer=method,
                    epochs=config.epochs,
                    standardize=True,  # random features hardly vary around a large mean
                    splits=runs[0] / "splits.json" if runs else None,
                    note=NOTE,
                    seed=seed,
                    device=device,
                )
            )
        runs.append(run)
    with _timed("report", seconds):
        page = write_report(runs, out / "report", seed=seed, preface=PREFACE)
    for stage, spent in seconds.items():
        logger.info("%-22s %6.1f s", stage, spent)
    logger.info("%-22s %6.1f s", "all", sum(seconds.values()))
    return page


def _cohort(folder: Path, *, patients: int, seed: int) -> SlideCohort:
    """Draw the slides, or take those that are there: redrawn, they would be extracted anew."""
    path = folder / "cohort.toml"  # written last
    if path.exists():
        with whole(path, f"Delete {path} and run `demo` again."):
            stored = read_toml(path)["cohort"]
            names = ("folder", "slides", "clini", "slide_table")
            paths = {name: Path(stored[name]) for name in names}
            return SlideCohort(**{**stored, **paths})
    cohort = make_slide_cohort(folder, patients=patients, seed=seed)
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(cohort).items()}
    write_toml(path, {"cohort": values})
    return cohort


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one core: on bags of a dozen tiles a second one costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
