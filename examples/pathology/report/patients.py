"""Patients sorted by their loss: a table of all, and the worst errors with their slides."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from examples.pathology.common.files import walk, whole
from examples.pathology.report.pages import inlined
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.runs import Run, made_with, slides_of
from examples.pathology.tables.matching import match_files
from examples.pathology.tables.reading import PATIENT
from examples.pathology.tables.writing import write_table

LEAST = float(np.finfo(float).eps)  # of a probability, as in scikit-learn: 36 nats are the most
LOSS = {
    "classification": "The loss is the cross-entropy in nats: minus the logarithm of the "
    f"probability of the true class (counted as {LEAST:.1e} at least). It is 0.69 at a half and "
    "2.3 at a tenth. Of two classes, one is called at the threshold of F1; else the likeliest.",
    "regression": "The loss is the squared error, in the unit of the target squared.",
}
EDGES, MOST_BYTES = range(480, 100, -80), 30_000  # of a thumbnail; 40 kB in Base64
SHOWN = 3  # thumbnails of a patient


def worst_errors(
    groups: Mapping[str, Sequence[Run]], out: Path, count: int
) -> list[dict[str, Any]]:
    """Write ``patients.csv``, all by loss, and return the worst errors as a page shows them.

    Args:
        groups: By name a run or an ensemble, or several for the mean of their losses.
        out: The page's folder.
        count: How many patients of each to show; where nobody has a label, it is none.
    """
    found, tables = [], []
    for name, runs in groups.items():
        table = patients_of(runs)
        if table.empty:
            continue
        slides = {who: names for run in runs for who, names in slides_of(run.folder).items()}
        table["slides"] = [slides.get(who, []) for who in table[PATIENT]]
        features, loss = made_with(runs[0].folder, "features")["features"], table["loss"]
        thumbnails, n = _thumbnails(features), min(count, len(loss))
        cards = [_card(row, thumbnails) for row in table[:n].to_dict("records")]
        relation = (
            f"{len(loss)} patients: half have a loss below {loss.median():.3g}, nine of ten one "
            f"below {loss.quantile(0.9):.3g}. The {n} largest, from {loss[n - 1]:.3g} to "
            f"{loss[0]:.3g}, are {100 * loss[:n].sum() / (loss.sum() or 1):.0f} % of the sum."
        )
        if len(runs) > 1:
            relation += f" These are means over {len(runs)} runs"
            if "wrong" in table:
                every, nobody = (table["wrong"] == table["runs"]).sum(), (table["wrong"] == 0).sum()
                relation += f"; every run calls {every} patients wrongly, and none calls {nobody} "
                relation += "wrongly"
            relation += "."
        bare = not any(picture for card in cards for _, picture in card["pictures"])
        about = {"loss": LOSS[runs[0].summary.kind], "about": relation, "bare": bare and features}
        found.append({"name": name, "cards": cards, **about})
        tables.append(table.assign(run=name, slides=table["slides"].map("; ".join)))
    if tables:
        write_table(out / "patients.csv", pd.concat(tables))
    return found


def patients_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Return all tested patients who have a label, the largest loss first.

    Returns:
        ``PATIENT``, ``fold`` from 1 (not of an ensemble), ``truth``, ``predicted``, ``probability``
        of the true class (not of a regression), ``loss`` as in `LOSS`. Over several ``runs``, these
        are means; of classes, with how many are ``wrong`` in place of ``predicted``.
    """
    every: pd.DataFrame = pd.concat(
        _judged(run, result, str(k) if len(run.results) > 1 else "")
        for run in runs
        for k, result in enumerate(run.results, start=1)
    )
    if len(runs) > 1:
        groups = every.assign(wrong=every["truth"] != every["predicted"]).groupby(PATIENT)
        numbers = runs[0].summary.kind == "regression"
        about = {"predicted": "mean"} if numbers else {"wrong": "sum", "probability": "mean"}
        means: Any = {"truth": "first", **about, "loss": "mean"}
        means["fold"] = lambda folds: " ".join(sorted(set(folds)))
        every = groups.agg(means).assign(runs=groups.size()).reset_index()
    by_loss = every.sort_values(["loss", PATIENT], ascending=[False, True])
    table: pd.DataFrame = by_loss.reset_index(drop=True)
    return table


def _judged(run: Run, result: FoldResult, fold: str) -> pd.DataFrame:
    target = run.summary.targets[0]
    table = result.predictions[result.predictions[target.name] != ""]
    truth = table[target.name]
    patients: pd.DataFrame = pd.DataFrame({PATIENT: table[PATIENT], "fold": fold, "truth": truth})
    if target.kind == "regression":
        patients["predicted"] = table[f"{target.name}_pred"].astype(float)
        patients["loss"] = (patients["predicted"] - truth.astype(float)) ** 2
        return patients
    scores = table[[f"{target.name}_{label}" for label in target.classes]].to_numpy(dtype=float)
    called = scores.argmax(axis=1)
    if len(target.classes) == 2 and not np.isnan(result.threshold):
        positive = target.classes.index(target.positive)
        called = np.where(scores[:, positive] >= result.threshold, positive, 1 - positive)
    patients["predicted"] = np.array(target.classes)[called]
    patients["probability"] = scores[truth.to_numpy()[:, None] == np.array(target.classes)]
    patients["loss"] = -np.log(np.maximum(patients["probability"], LEAST))
    return patients


def _card(patient: dict[str, Any], thumbnails: Mapping[str, Path]) -> dict[str, Any]:
    """Add the picture of every slide; it is empty where there is none, or are enough already."""
    found = match_files(patient["slides"], thumbnails)
    clear = [slide for slide, names in found.items() if len(names) == 1][:SHOWN]
    pictures = {slide: _small(thumbnails[found[slide][0]]) for slide in clear}
    return {**patient, "pictures": [(slide, pictures.get(slide, "")) for slide in found]}


def _thumbnails(features: Path) -> dict[str, Path]:
    """Return what `extract` drew below a folder of features, by slide as these are named."""
    files = (folder / name for folder, names in walk(features) for name in names)
    drawn = {f"/{file.relative_to(features).as_posix()}": file for file in files}
    return {
        name.replace("/thumbnails/", "/", 1)[1:].removesuffix(".jpg"): file
        for name, file in drawn.items()
        if "/thumbnails/" in name and name.endswith(".jpg")
    }


def _small(picture: Path) -> str:
    """Return a thumbnail as a page holds it, of at most `MOST_BYTES`."""
    with whole(picture, "Delete it: the page can do without."), Image.open(picture) as image:
        for edge in EDGES:
            image.thumbnail((edge, edge))
            image.save(buffer := io.BytesIO(), "JPEG", quality=75)
            if buffer.tell() <= MOST_BYTES:
                break
    return inlined(buffer.getvalue(), "jpeg")
