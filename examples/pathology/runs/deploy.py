"""A trained run on another cohort: every fold's model, and all of them together.

The external cohort needs no label: what is known of it is compared with the predictions, what is
not stays empty. Features must be of the extractor, weights, tile size and magnification that the
run was trained on; anything else is refused, since numbers would come out all the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.pathology.cohort.cohort import Cohort, load_external, log_exclusions
from examples.pathology.cohort.targets import Target
from examples.pathology.common.devices import resolve_device
from examples.pathology.common.files import json_or_none, write_json
from examples.pathology.common.folders import DEPLOYED, clean, refuse_other_results, sole_writer
from examples.pathology.common.toml import write_toml
from examples.pathology.features.kind import refuse_other_features
from examples.pathology.results.folds import (
    REMEDY,
    FoldResult,
    read_fold,
    read_model,
    write_embeddings,
    write_predictions,
)
from examples.pathology.results.measuring import (
    describe_auxiliary,
    describe_primary,
    summarise_metrics,
    thresholds_of,
)
from examples.pathology.results.metrics import Metric, Score, over_folds
from examples.pathology.results.runs import fold_folders, run_settings, trained_on
from examples.pathology.results.summary import metrics_json, warning_of_training
from examples.pathology.settings.runs import DeployConfig
from examples.pathology.tables.writing import read_table_of_ours
from examples.pathology.training.bags import BagStore
from examples.pathology.training.prediction import Fitted, PatientPrediction, predict

logger = logging.getLogger(__name__)


def run_deploy(config: DeployConfig) -> dict[str, Any]:
    """Predict for an external cohort with every fold of a run and with their mean.

    Writes ``predictions.csv`` (the ensemble: the mean over folds of probabilities, and of
    predicted values in the target's unit), ``fold-K/predictions.csv`` and ``embeddings.npy``,
    ``ledger.csv``, ``deploy.toml`` and ``metrics.json``, whose content is returned. `report` makes
    a page of them.

    Raises:
        UserError: The run is not finished, the features are of another kind, nobody is left, or
            ``out`` holds a run.
    """
    refuse_other_results(config.out, DEPLOYED)
    device = resolve_device(config.device)
    folders = fold_folders(config.run)
    models = [read_model(folder / "model.pt", device) for folder in folders]
    cohort = load_external(
        config.sources, models[0][0].targets, skip_unknown_labels=config.skip_unknown_labels
    )
    for folder, (_, kind) in zip(folders, models, strict=True):
        refuse_other_features(kind, cohort.kind, folder, config.features)
    log_exclusions(cohort)
    with sole_writer(config.out):
        refuse_other_results(config.out, DEPLOYED)  # begun there meanwhile
        clean(config.out)
        write_toml(config.out / DEPLOYED, deploy_settings(config))
        cohort.write_ledger(config.out / "ledger.csv")
        return _predict_all(config, cohort, folders, [fitted for fitted, _ in models], device)


def deploy_settings(config: DeployConfig) -> dict[str, dict[str, Any]]:
    """Return what ``deploy.toml`` holds; a switch that is off is left out, as it was before it.

    What the page shows is left out, too: it changes no prediction.
    """
    values = {name: value for name, value in vars(config).items() if name != "page"}
    settings = {name: str(value) for name, value in values.items() if value is not False}
    return {"deploy": {**settings, "seed": config.seed}}


def _predict_all(
    config: DeployConfig,
    cohort: Cohort,
    folders: Sequence[Path],
    models: Sequence[Fitted],
    device: str,
) -> dict[str, Any]:
    targets = models[0].targets
    bags = BagStore()
    by_fold, results = [], []
    for folder, fitted in zip(folders, models, strict=True):
        predictions = predict(fitted, cohort.patients, bags=bags, device=device)
        out = config.out / folder.name
        write_predictions(out / "predictions.csv", targets, predictions)
        write_embeddings(out / "embeddings.npy", predictions)
        by_fold.append(predictions)
        threshold = read_fold(folder).threshold
        results.append(_result(out / "predictions.csv", predictions, threshold))
    together = _mean_prediction(by_fold)
    path = config.out / "predictions.csv"
    write_predictions(path, targets, together)
    threshold = over_folds([Score(result.threshold) for result in results]).mean
    ensemble = _result(path, together, threshold)
    summary = _summary(config, cohort, targets, results, ensemble)
    write_json(config.out / "metrics.json", summary)
    if warning := warning_of_training(summary["trained_on"], len(cohort.patients)):
        logger.warning("%s", warning)
    logger.info(
        "%d patients, %d with a label; %s", len(cohort.patients), summary["labelled"], config.out
    )
    return summary


def _mean_prediction(by_fold: Sequence[Sequence[PatientPrediction]]) -> list[PatientPrediction]:
    """Return the mean probabilities and numbers of several models, of the same patients in order.

    Embeddings of different models have no common axes: those of the first model stand in.
    """
    means = []
    for each in zip(*by_fold, strict=True):
        shares = {
            k: np.mean([p.probabilities[k] for p in each], axis=0) for k in each[0].probabilities
        }
        numbers = {k: float(np.mean([p.numbers[k] for p in each])) for k in each[0].numbers}
        means.append(replace(each[0], probabilities=shares, numbers=numbers))
    return means


def _result(path: Path, predictions: Sequence[PatientPrediction], threshold: float) -> FoldResult:
    embeddings = np.stack([p.embedding for p in predictions])
    return FoldResult(read_table_of_ours(path, REMEDY), embeddings, 0, 0, 0.0, threshold)


def _summary(
    config: DeployConfig,
    cohort: Cohort,
    targets: Sequence[Target],
    results: Sequence[FoldResult],
    ensemble: FoldResult,
) -> dict[str, Any]:
    trained, known = run_settings(config.run), trained_on(config.run)
    labels = [patient.label for patient in cohort.patients if patient.label]
    if thresholds := thresholds_of(targets[0], results):
        thresholds["threshold_of_ensemble"] = json_or_none(ensemble.threshold)
    together = summarise_metrics([ensemble], targets, config.seed)
    together.pop(Metric("silhouette"), None)  # the mean of several models has no embedding
    return {
        "format": 1,
        "run": str(config.run.resolve()),
        "method": trained["balancer"],
        **describe_primary(targets[0], labels),
        "auxiliary": describe_auxiliary(targets),
        "patients": len(cohort.patients),
        "labelled": len(labels),
        "trained_on": [patient.name for patient in cohort.patients if patient.name in known],
        "funnel": [list(stage) for stage in cohort.funnel],
        **asdict(cohort.kind),
        "note": trained.get("note", ""),
        **thresholds,
        "metrics": metrics_json(summarise_metrics(results, targets, config.seed)),
        "metrics_of_ensemble": metrics_json(together),
    }
