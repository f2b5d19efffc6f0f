"""What metrics.json says of a cross-validation."""

from collections.abc import Sequence

from examples.pathology.cohort.cohort import Cohort
from examples.pathology.cohort.splits import Fold, splits_sha256
from examples.pathology.results.folds import FoldResult, best_of
from examples.pathology.results.measuring import (
    describe_auxiliary,
    describe_primary,
    summarise_metrics,
    thresholds_of,
)
from examples.pathology.results.summary import RunSummary
from examples.pathology.settings.crossval import BASELINE, CrossvalConfig


def summarise(
    config: CrossvalConfig, cohort: Cohort, folds: Sequence[Fold], results: Sequence[FoldResult]
) -> RunSummary:
    """Turn the predictions of all folds into what ``metrics.json`` says."""
    alone = config.balancer == BASELINE  # it knows the primary target only
    targets = cohort.targets[:1] if alone else cohort.targets
    return RunSummary(
        method=config.balancer,
        **describe_primary(cohort.target, [patient.label for patient in cohort.patients]),
        auxiliary=describe_auxiliary(targets),
        patients=len(cohort.patients),
        training_only=0 if alone else len(cohort.training_only),
        complete_cases=config.complete_cases,
        max_tiles=config.max_tiles,
        width=config.width,
        layers=config.layers,
        precision=config.precision,
        tiles=sum(patient.tiles for patient in cohort.patients),
        funnel=cohort.funnel,
        extractor=cohort.kind.extractor,
        random_weights=cohort.kind.random_weights,
        simulated=cohort.kind.simulated,
        note=config.note,
        seed=config.seed,
        splits_sha256=splits_sha256(folds),
        best_epochs=[result.best_epoch for result in results],
        epochs=[result.epochs for result in results],
        seconds=[result.seconds for result in results],
        search=tuple(_kept(result) for result in results if result.search),
        **thresholds_of(cohort.target, results),
        share_waiting_for_data=_share_waiting(results),
        metrics=summarise_metrics(results, targets, config.seed),
    )


def _kept(result: FoldResult) -> dict[str, float]:
    """Return the candidate that a fold kept, and how many there were."""
    best = result.search[best_of(result.search)]
    told = ("learning_rate", "weight", "validation_loss")
    return {name: best[name] for name in told if name in best} | {"candidates": len(result.search)}


def _share_waiting(results: Sequence[FoldResult]) -> float | None:
    """Return the share of training time spent waiting for tiles, all folds together."""
    histories = [r.history for r in results if "seconds_waiting_for_data" in r.history]
    spent = sum(float(history["seconds"].sum()) for history in histories)
    waited = sum(float(history["seconds_waiting_for_data"].sum()) for history in histories)
    return round(waited / spent, 4) if spent else None
