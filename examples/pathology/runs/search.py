"""Candidates of a fold: learning rates, and weights of the auxiliary targets, of which one is kept.

All of them start from the same initial weights. What decides is the mean loss of the primary target
on the fold's validation part, at the epoch that is kept: early stopping looks at the same. It is a
proper score of every patient there, where an AUROC of a few positive ones is full of ties; and no
task weight is in it, so that it means the same for every candidate. The test part is not seen.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from examples.pathology.common.errors import DivergedError
from examples.pathology.results.folds import SEARCH, best_of, candidate_in_words, read_search
from examples.pathology.settings.crossval import FIXED, CrossvalConfig
from examples.pathology.tables.writing import write_table
from examples.pathology.training.checkpoint import CHECKPOINT
from examples.pathology.training.prediction import Fitted

logger = logging.getLogger(__name__)


def candidates(config: CrossvalConfig) -> list[CrossvalConfig]:
    """Return the settings of every candidate: every rate with every weight."""
    rates = config.search_rate or (config.learning_rate,)
    weights = config.search_weight if config.balancer == FIXED else (1.0,)
    return [
        replace(config, learning_rate=rate, search_rate=(), search_weight=(weight,))
        for rate in rates
        for weight in weights
    ]


def search(
    config: CrossvalConfig, folder: Path, fit: Callable[..., Fitted], name: str
) -> tuple[Fitted, float]:
    """Train what is not trained yet, and return the best candidate and the seconds of all.

    After each, ``search.csv`` of the fold's folder says how it did. Only the best one's checkpoint
    stays beside that of the candidate in training.

    Args:
        config: How, with the seed of this fold alone and the device resolved.
        folder: Of the fold.
        fit: Trains one: takes its settings, its ``name`` and the file of its ``checkpoint``.
        name: What to call the fold in errors and progress.

    Raises:
        DivergedError: No candidate has a finite loss.
    """
    tried, found = candidates(config), read_search(folder)
    files = [folder / f"{Path(CHECKPOINT).stem}-{n}.pt" for n in range(1, len(tried) + 1)]
    for how, file in list(zip(tried, files, strict=True))[len(found) :]:
        row = {"learning_rate": how.learning_rate}
        if how.balancer == FIXED:
            row["weight"] = how.search_weight[0]
        called, started = f"{name}, {candidate_in_words(row)}", time.perf_counter()
        try:
            fitted = fit(how, name=called, checkpoint=file)
        except DivergedError as error:
            logger.warning("%s It is not kept.", error)
            loss, best_epoch, epochs, seconds = math.inf, 0, 0, time.perf_counter() - started
        else:
            loss, best_epoch = fitted.validation_loss, fitted.best_epoch
            epochs, seconds = len(fitted.history), fitted.seconds
        logger.info("%s: validation loss %.4f", called, loss)
        counts = {"best_epoch": best_epoch, "epochs": epochs, "seconds": seconds}
        found.append({**row, "validation_loss": loss, **counts})
        write_table(folder / SEARCH, pd.DataFrame(found))
        for other in set(files) - {files[best_of(found)]}:
            other.unlink(missing_ok=True)
    best = best_of(found)
    if math.isinf(found[best]["validation_loss"]):
        raise DivergedError(
            f"{name}: a candidate must have finite losses, but none has. Lower rates may help."
        )
    # It is finished: nothing is trained, but what its checkpoint holds is taken.
    kept = fit(tried[best], name=name, checkpoint=files[best])
    return kept, sum(row["seconds"] for row in found)
