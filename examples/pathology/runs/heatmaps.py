"""Heat maps of all slides of a run, each drawn by a model that has not seen its patient."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from examples.pathology.cohort.joining import find_feature_files
from examples.pathology.common.errors import UserError, listing, one_line
from examples.pathology.common.files import whole
from examples.pathology.common.folders import clean_below, sole_writer
from examples.pathology.features.provenance import sample_sha256
from examples.pathology.results.folds import REMEDY
from examples.pathology.results.runs import run_settings, slides_of
from examples.pathology.runs.heatmap import Models, draw_slide, place_tiles, read_models
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.settings.runs import HeatmapConfig
from examples.pathology.slides.pixelsizes import mpp_of_slides
from examples.pathology.slides.slide import SlideFile, find_slides
from examples.pathology.tables.matching import match_files
from examples.pathology.tables.writing import read_table_of_ours, write_table

logger = logging.getLogger(__name__)

COLUMNS = ["slide", "patient", "drawn_by", "status", "reason", "tiles", "seconds"]


def run_heatmaps(config: HeatmapConfig, folder: Path) -> int:
    """Draw heat maps of all slides of a run, into ``<out>/<slide>/``, with ``ledger.csv``.

    The model of a fold draws the slides of those whom the fold tested. Patients whom all models
    were trained on, since they lack the primary label, are left out. What the same model has drawn
    from the same slide and features is left alone.

    Args:
        config: Of what; `features` is a folder.
        folder: Of the slides.

    Returns:
        The exit code: 1 if a slide failed.

    Raises:
        UserError: The run is not finished, or none of its slides has features there.
    """
    models = read_models(config)
    used = [(key, who) for who, keys in slides_of(config.run).items() for key in keys]
    files = find_feature_files(config.features)
    found = match_files((key for key, _ in used), files)
    if not any(found.values()):
        raise UserError(
            f"`features` must hold those of the run's slides, but {config.features} holds none of "
            f"them. `heatmap --slide` draws slides of others."
        )
    slides = {slide.stem: slide for slide in find_slides(folder, skip=config.out)}
    if config.slide_table is not None:
        names = {stem: slide.name for stem, slide in slides.items()}
        known = mpp_of_slides(config.slide_table, names, config.filename_column, names)
        slides = {stem: replace(x, table_mpp=known.get(stem)) for stem, x in slides.items()}
    pictures = match_files((name for names in found.values() for name in names), slides)
    tested = {
        patient: name
        for name in models
        for patient in read_table_of_ours(config.run / name / "predictions.csv", REMEDY)["PATIENT"]
    }
    # The baseline is trained on nobody who lacks the primary label.
    unseen = models if run_settings(config.run)["balancer"] == BASELINE else {}
    rows: list[dict[str, Any]] = []
    with sole_writer(config.out):
        clean_below(config.out)
        for key, patient in tqdm(used, desc="heatmaps", unit="slide"):
            fold = tested.get(patient, "")
            own = {fold: models[fold]} if fold else unseen
            row = {"slide": key, "patient": patient, "drawn_by": " ".join(own), "status": "ok"}
            try:
                name = _only(found[key], "feature file")
                slide = slides[_only(pictures[name], "slide")]
                row |= _drawn(config, own, slide, files[name], config.out / name)
            except (UserError, OSError) as error:
                row |= {"status": "failed", "reason": one_line(error)}
                logger.warning("%s: %s", key, row["reason"])
            rows.append(row)
            table = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
            write_table(config.out / "ledger.csv", table)
    failed = sum(row["status"] == "failed" for row in rows)
    logger.info("%d slides, %d failed; %s", len(rows), failed, config.out / "ledger.csv")
    return int(failed > 0)


def _only(candidates: list[str], what: str) -> str:
    if len(candidates) != 1:
        raise UserError(f"ambiguous: {listing(candidates)}" if candidates else f"no {what}")
    return candidates[0]


def _drawn(
    config: HeatmapConfig, models: Models, slide: SlideFile, features: Path, out: Path
) -> dict[str, Any]:
    """Draw a slide, unless that is done, and return what its row tells of it."""
    if not models:
        return {"status": "excluded", "reason": "all models were trained on its patient"}
    if slide.problem is not None:
        raise UserError(slide.problem)
    files = [config.run / name / "model.pt" for name in models]
    made_of = {
        "sha256": [sample_sha256(path) for path in (*files, features, slide.path)],
        "mpp": [slide.table_mpp, config.default_mpp],
        "show": [config.top, config.areas],
    }
    path, reason, drawn = out / "heatmap.json", "", {}
    if path.exists():
        with whole(path, f"Delete {out}."):
            drawn = dict(json.loads(path.read_text(encoding="utf-8")))
            reason = "drawn before"
    if drawn.get("made_of") == made_of:
        place_tiles(config, slide, features)  # an earlier release may have drawn it elsewhere
    else:
        drawn, reason = draw_slide(config, models, slide, features, out, made_of=made_of), ""
    return {"reason": reason, "tiles": drawn["tiles"], "seconds": drawn["seconds"]}
