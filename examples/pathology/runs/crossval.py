"""Cross-validation by patient, in one run folder that can be stopped and taken up again.

The splits are drawn once, saved with a hash of patients and labels, and used by every method that
is compared. A fold's test part is looked at once: after its model has been chosen on the validation
part.
"""

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from examples.pathology.cohort.cohort import Cohort, load_cohort, log_cohort
from examples.pathology.cohort.splits import Fold, check_sizes, fold_seed, load_or_make_splits
from examples.pathology.cohort.targets import prediction_columns
from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import UserError, listing
from examples.pathology.common.files import write_json
from examples.pathology.common.folders import RUN, clean, refuse_other_results, sole_writer
from examples.pathology.common.toml import read_toml, write_toml
from examples.pathology.figures.run import draw_figures
from examples.pathology.results.folds import DONE, read_fold, write_all_predictions, write_fold
from examples.pathology.results.summary import RunSummary
from examples.pathology.runs.search import search
from examples.pathology.runs.summary import summarise
from examples.pathology.settings.crossval import (
    BASELINE,
    CrossvalConfig,
    refuse_unused_weights,
    settings_that_differ,
    with_reference_protocol,
)
from examples.pathology.training.bags import BagStore
from examples.pathology.training.checkpoint import CHECKPOINT
from examples.pathology.training.fold import fit_fold
from examples.pathology.training.learner import needs_lookahead
from examples.pathology.training.memory import refuse_bags_too_large
from examples.pathology.training.prediction import predict
from mtbalance import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A cross-validation whose folder is claimed and whose folds are drawn: small enough to send.

    Args:
        config: All settings.
        cohort: Whom to train and test on.
        folds: The splits.
        lookahead: Whether the method needs a second batch at every step.
    """

    config: CrossvalConfig
    cohort: Cohort
    folds: tuple[Fold, ...]
    lookahead: bool

    def folder(self, k: int) -> Path:
        """Return the folder of fold ``k``, counted from 1."""
        return self.config.out / f"fold-{k}"


def run_crossval(config: CrossvalConfig) -> RunSummary:
    """Cross-validate one method, write its run folder, and return what ``metrics.json`` says.

    Raises:
        UserError: Tables, features or settings are wrong, or the run folder belongs to another run.
        RunError: A loss is not finite.
    """
    refuse_other_results(config.out, RUN)
    resolve_device(config.device)  # a wrong one is told before tables are read
    needs_lookahead(config.balancer, [config.target, *config.auxiliary])  # a wrong name as well
    refuse_unused_weights(config, [config.balancer])
    cohort = load_cohort_of(config)
    with sole_writer(config.out):
        plan = make_plan(config, cohort)
        bags = BagStore(round(config.cache_gb * 2**30))
        for k, fold in enumerate(plan.folds, start=1):
            log_fold(k, fold)
            run_fold(plan, k, bags)
        return finish(plan)


def load_cohort_of(config: CrossvalConfig) -> Cohort:
    """Join the tables and files that the settings name, and say who is left.

    Raises:
        UserError: They do not fit together, or a class is too small.
    """
    cohort = load_cohort(with_reference_protocol(config))
    log_cohort(cohort)
    check_sizes(cohort, config.folds)
    prediction_columns(cohort.targets)  # a clash is told before the first fold, not after
    return cohort


def make_plan(config: CrossvalConfig, cohort: Cohort) -> Plan:
    """Claim the run folder and draw the folds, or take up those that are there.

    Nobody else may work in the folder.

    Raises:
        UserError: The folder belongs to another run or to a deployment, or the splits to another
            cohort.
    """
    config = with_reference_protocol(config)
    refuse_other_results(config.out, RUN)
    clean(config.out)
    clean(config.out / "figures")
    _claim_run_folder(config, cohort)
    cohort.write_ledger(config.out / "ledger.csv")
    folds = tuple(load_or_make_splits(config, cohort))
    lookahead = needs_lookahead(config.balancer, [target.name for target in cohort.targets])
    none = [k for k, fold in enumerate(folds, start=1) if not fold.lookahead]
    if lookahead and config.lookahead_data == "heldout" and none:
        raise UserError(
            f"`{config.balancer}` must look ahead on sites that it does not step on, but the "
            f"training part of fold {none[0]} has too few. Use --lookahead-data train."
        )
    return Plan(config, cohort, folds, lookahead)


def run_fold(plan: Plan, k: int, bags: BagStore) -> None:
    """Train and test fold ``k`` (from 1), or go on where it stopped; finished, it stays as it is.

    Raises:
        RunError: A loss is not finite.
    """
    folder = plan.folder(k)
    if (folder / DONE).exists():
        logger.info("Fold %d is finished already", k)
    else:
        _train_and_test(plan, k, bags, resolve_device(plan.config.device))
    clean(folder)
    for left in folder.glob(f"{Path(CHECKPOINT).stem}*"):
        left.unlink()


def finish(plan: Plan, *, figures: bool = True) -> RunSummary:
    """Sum up a run all of whose folds are finished, and return what ``metrics.json`` says.

    That is written last: a run that has it is finished. `report` draws the `figures` as well.
    """
    config = plan.config
    results = [read_fold(plan.folder(k)) for k in range(1, len(plan.folds) + 1)]
    summary = summarise(config, plan.cohort, plan.folds, results)
    if figures:
        draw_figures(config.out / "figures", summary, results, seed=config.seed)
    write_all_predictions(config.out / "predictions.csv", plan.cohort.target, results)
    write_json(config.out / "metrics.json", summary.to_json())
    _log_summary(summary)
    return summary


def _train_and_test(plan: Plan, k: int, bags: BagStore, device: str) -> None:
    started = time.perf_counter()
    config, cohort, fold, folder = plan.config, plan.cohort, plan.folds[k - 1], plan.folder(k)
    # All patients: whoever is in no training part of this fold is in that of another.
    trained = [*cohort.patients, *(() if config.balancer == BASELINE else cohort.training_only)]
    refuse_bags_too_large(trained, config, device)
    by_name = {patient.name: patient for patient in cohort.patients}
    train, lookahead, validation, test = (
        [by_name[name] for name in names]
        for names in (*_steps_and_lookahead(plan, fold), fold.validation, fold.test)
    )
    if config.balancer != BASELINE:  # it knows the primary target alone
        stepped_on = {patient.name for patient in train}
        held_out = {p.site for p in cohort.patients if p.site and p.name not in stepped_on}
        train += [patient for patient in cohort.training_only if patient.site not in held_out]
    fit = functools.partial(fit_fold, cohort, train, validation, lookahead=lookahead, bags=bags)
    how, name = replace(config, seed=fold_seed(config.seed, k), device=device), f"fold {k}"
    if config.searches:
        fitted, seconds = search(how, folder, fit, name)
    else:
        fitted = fit(how, name=name, checkpoint=folder / CHECKPOINT)
        seconds = fitted.seconds
    validated, tested = (
        predict(fitted, patients, bags=bags, device=device) for patients in (validation, test)
    )
    write_fold(folder, fitted, tested, validated, cohort.kind, seconds)
    waited = sum(row["seconds_waiting_for_data"] for row in fitted.history)
    share = 100 * waited / max(fitted.seconds, 1e-9)
    text = (
        "Fold %d: %d epochs, the best was %d; %.0f s, %.1f %% of training spent waiting for tiles"
    )
    spent = time.perf_counter() - started
    logger.info(text, k, len(fitted.history), fitted.best_epoch, spent, share)


def log_fold(k: int, fold: Fold) -> None:
    """Log the sizes of a fold's parts, whose disjointness `check_splits` has made sure of."""
    text = "Fold %d: %d patients to train, %d to validate, %d to test; no patient in two parts"
    logger.info(text, k, len(fold.train), len(fold.validation), len(fold.test))


def _steps_and_lookahead(plan: Plan, fold: Fold) -> tuple[Sequence[str], Sequence[str]]:
    """Return who of the training part is stepped on, and who is looked ahead on."""
    if not plan.lookahead:
        return fold.train, ()
    if plan.config.lookahead_data == "train":
        return fold.train, fold.train
    return [name for name in fold.train if name not in set(fold.lookahead)], fold.lookahead


def _claim_run_folder(config: CrossvalConfig, cohort: Cohort) -> None:
    """Write the resolved settings, or check that those in the folder are the same."""
    path = config.out / RUN
    if path.exists():
        stored = read_toml(path)
        differing = settings_that_differ(config, stored.get("crossval", {}))
        if stored.get("provenance", {}).get("data_sha256") != cohort.digest:
            differing.append("the content of tables or features")
        if differing:
            raise UserError(
                f"`out` must be a new folder or one of the same run, but {config.out} differs in "
                f"{listing(differing)}."
            )
        logger.info("Taking up the run in %s", config.out)
        return

    provenance = {
        "mtbalance": __version__,
        "torch": torch.__version__,
        **{name: value for name, value in asdict(cohort.kind).items() if value is not None},
        "data_sha256": cohort.digest,
    }
    write_toml(path, {"crossval": config.resolved(), "provenance": provenance})


def _log_summary(summary: RunSummary) -> None:
    for metric, value in summary.metrics.items():
        shown = "undefined" if value.mean is None else f"{value.mean:.3f}"
        folds = value.folds_with_value
        spread = "" if value.sd is None else f" +/- {value.sd:.3f} (sd over {folds} folds)"
        low, high = value.ci95_over_patients
        interval = "" if low is None else f", 95 % interval over patients {low:.3f} to {high:.3f}"
        logger.info("%s %s: %s%s%s", summary.method, metric, shown, spread, interval)
        for fold, reason in value.undefined.items():
            logger.warning("%s is not defined in fold %s: %s", metric, fold, reason)
