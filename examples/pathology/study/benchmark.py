"""Every balancer on every auxiliary target, fold by fold, as jobs that can run anywhere.

All methods get the same splits, and in each fold the same initial weights; with several seeds, all
of it again from others. A job is one fold of one method, the summary of its folds, or its
deployment on an external cohort; each keeps its result on disk, so that a benchmark that was
stopped goes on where it stopped. `folder` says where everything is, `report` what came out.
"""

import functools
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from examples.pathology.common.devices import resolve_device
from examples.pathology.common.errors import RunError, UserError
from examples.pathology.common.files import writable
from examples.pathology.common.folders import DEPLOYED, sole_writer
from examples.pathology.common.toml import read_toml, write_toml
from examples.pathology.jobs.cluster import cluster
from examples.pathology.jobs.engine import Job, Outcome, run_jobs
from examples.pathology.runs.crossval import (
    Plan,
    finish,
    load_cohort_of,
    log_fold,
    make_plan,
    run_fold,
)
from examples.pathology.runs.deploy import deploy_settings, run_deploy
from examples.pathology.settings.benchmark import BenchmarkConfig
from examples.pathology.settings.cohort import Sources
from examples.pathology.settings.crossval import BASELINE, CrossvalConfig
from examples.pathology.settings.runs import DeployConfig
from examples.pathology.study.folder import (
    EXTERNAL,
    LEDGER,
    RUNS,
    SETTINGS,
    numbered,
    read_study,
    run_folder,
)
from examples.pathology.study.report import write_study_report
from examples.pathology.tables.writing import write_table
from examples.pathology.training.bags import BagStore
from examples.pathology.training.learner import needs_lookahead

logger = logging.getLogger(__name__)

SPLITS = "splits.json"
Located = TypeVar("Located", CrossvalConfig, Sources)


def run_benchmark(config: BenchmarkConfig) -> tuple[Path, int]:
    """Run what is not finished yet, and write the report.

    Returns:
        The report's page, and the number of jobs that are not done.

    Raises:
        UserError: Tables, features, settings or names are wrong, or the folder is another's.
        RunError: No run could be finished.
    """
    for device in config.devices:
        resolve_device(device)
    out = config.crossval.out
    for method in config.methods:  # a wrong name is told before tables are read
        needs_lookahead(method, [config.crossval.target, *config.auxiliary[:1]])
    if config.external is not None:
        for path in (config.external.clini, config.external.slide_table, config.external.features):
            if not path.exists():
                raise UserError(f"The external cohort must be there, but {path} does not exist.")
    with sole_writer(out):
        plans = make_plans(config)
        _write_settings(config, next(iter(plans.values())))
        rows = _carry_out(config, make_jobs(config, plans))
        missing = [row for row in rows if row.status != "done"]
        if missing and not any(out.glob(f"{RUNS}*/**/metrics.json")):
            first = next((row for row in missing if row.status == "failed"), missing[0])
            raise RunError(
                f"At least one run must be finished, but none is: {first.key}: {first.error}"
            )
        page = write_study_report(read_study(out), config=config.page)
    done = len(rows) - len(missing)
    logger.info("%d of %d jobs are done; the report is %s", done, len(rows), page)
    return page, len(missing)


def _carry_out(config: BenchmarkConfig, jobs: Sequence[Job]) -> list[Outcome]:
    """Run what is not done, and return and write what became of every job, in their order."""
    rows = {job.key: Outcome(job.key, "done", attempts=0) for job in jobs if is_done(job)}
    left = [
        replace(job, needs=tuple(key for key in job.needs if key not in rows))
        for job in jobs
        if job.key not in rows
    ]

    def note(outcome: Outcome) -> None:
        rows[outcome.key] = outcome

    try:
        if left:
            with cluster(
                workers=config.workers,
                scheduler=config.scheduler,
                threads_per_worker=config.threads,
                devices=config.devices,
            ) as client:
                most = config.max_failures
                run_jobs(left, client, on_outcome=note, title="benchmark", max_failures=most)
    finally:  # after Ctrl-C as well
        ended = [rows[job.key] for job in jobs if job.key in rows]
        cells = [(o.key, o.status, o.error, f"{o.seconds:.3f}", o.attempts) for o in ended]
        table = pd.DataFrame(cells, columns=["job", "status", "error", "seconds", "attempts"])
        write_table(config.crossval.out / LEDGER, table)
    return ended


@dataclass(frozen=True)
class Place:
    """Where a run of a benchmark is.

    Args:
        run: Relative to ``runs/``.
        repeat: Which seed it is from, counted from 0.
    """

    run: Path
    repeat: int = 0

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return self.under(RUNS).as_posix().removeprefix(f"{RUNS}/")

    def under(self, folder: str) -> Path:
        """Return its folder in ``runs`` or ``external``, relative to that of the benchmark."""
        return numbered(folder, self.repeat) / self.run


def make_plans(config: BenchmarkConfig) -> dict[Place, Plan]:
    """Claim the folder of every run and give all of them the same folds, seed after seed.

    Returns:
        The plans, in the order in which they are begun.

    Raises:
        UserError: Tables, features, settings or names are wrong, or a folder is another's.
    """
    plans: dict[Place, Plan] = {}
    common = absolute(config.crossval)
    shared = common.splits  # of all runs; without complete cases, the first run's
    for auxiliary in config.auxiliary:
        cohort, splits = None, shared
        for method in config.methods:
            place = Place(run_folder(auxiliary, method, own_baseline=config.own_baseline))
            if place in plans:
                continue
            alone = method == BASELINE and not config.own_baseline
            targets = () if alone else (auxiliary,)
            run = replace(
                common,
                auxiliary=targets,
                kind=config.kind_of(common.target, *targets),
                balancer=method,
                out=common.out / place.under(RUNS),
                splits=splits,
                device=config.job_device,
            )
            if alone:
                members = load_cohort_of(run)
            else:
                members = cohort = cohort or load_cohort_of(run)
            plans[place] = make_plan(run, members)
            splits = splits or run.out / SPLITS
        if not config.own_baseline:
            shared = splits
    for k, fold in enumerate(next(iter(plans.values())).folds, start=1):
        log_fold(k, fold)
    return {**plans, **_repeated(config, plans)}


def _repeated(config: BenchmarkConfig, plans: Mapping[Place, Plan]) -> dict[Place, Plan]:
    """Claim the folders of all further seeds: the same runs on the same folds."""
    again: dict[Place, Plan] = {}
    out = config.crossval.out.resolve()
    for repeat in range(1, config.seeds):
        for place, plan in plans.items():
            other = replace(place, repeat=repeat)
            run = replace(
                plan.config,
                out=out / other.under(RUNS),
                splits=plan.config.out / SPLITS,
                seed=plan.config.seed + repeat,
            )
            again[other] = make_plan(run, plan.cohort)
    return again


def absolute(settings: Located) -> Located:
    """Return settings whose paths mean the same in a process that works in another folder."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    paths: dict[str, Any] = {k: v.resolve() for k, v in values.items() if isinstance(v, Path)}
    return replace(settings, **paths)


def make_jobs(config: BenchmarkConfig, plans: Mapping[Place, Plan]) -> list[Job]:
    """Return the jobs: folds, then their summary, then its deployment, run after run."""
    jobs = []
    out = config.crossval.out.resolve()
    logs = out / "logs"
    external = None if config.external is None else absolute(config.external)
    for place, plan in plans.items():
        key = place.key
        folds = [f"{key}/fold-{k}" for k in range(1, len(plan.folds) + 1)]
        for k, name in enumerate(folds, start=1):
            jobs.append(Job(name, fold_job, (plan, k, _log_file(logs, name))))
        results = f"{key}/results"
        jobs.append(Job(results, results_job, (plan, _log_file(logs, results)), needs=tuple(folds)))
        if external is not None:
            run, name = plan.config, f"{key}/deploy"
            how: dict[str, Any] = {"seed": run.seed, "device": run.device, **vars(external)}
            deploy = DeployConfig(run=run.out, out=out / place.under(EXTERNAL), **how)
            job = Job(name, deploy_job, (deploy, _log_file(logs, name)), needs=(results,))
            jobs.append(job)
    return jobs


def is_done(job: Job) -> bool:
    """Return whether a job was finished by an earlier invocation."""
    about: Plan | DeployConfig = job.arguments[0]
    if isinstance(about, DeployConfig):
        return _is_deployed(about)
    return (about.config.out / "metrics.json").exists()  # of a run, once all folds are finished


def fold_job(plan: Plan, k: int, log: Path) -> None:
    """Train and test one fold, unless that is done; runs in a worker."""
    with _logged(log), sole_writer(plan.folder(k)):
        run_fold(plan, k, _bags_of(plan.cohort.digest, round(plan.config.cache_gb * 2**30)))


def results_job(plan: Plan, log: Path) -> None:
    """Sum up a run, unless that is done; runs in a worker. `report` draws its figures."""
    with _logged(log), sole_writer(plan.config.out):
        if not (plan.config.out / "metrics.json").exists():
            finish(plan, figures=False)


def deploy_job(config: DeployConfig, log: Path) -> None:
    """Deploy a run on the external cohort, unless that is done; runs in a worker."""
    with _logged(log):
        if not _is_deployed(config):
            (config.out / "metrics.json").unlink(missing_ok=True)
            run_deploy(config)


def _is_deployed(config: DeployConfig) -> bool:
    settings, there = config.out / DEPLOYED, (config.out / "metrics.json").exists()
    return there and settings.exists() and bool(read_toml(settings) == deploy_settings(config))


@functools.lru_cache(maxsize=1)
def _bags_of(_digest: str, cache_bytes: int) -> BagStore:
    """Keep the tiles of one cohort in a worker from job to job.

    The cohort is known by its content: a worker of a scheduler outlives a benchmark, and files of
    the same name may hold other features by the next.
    """
    return BagStore(cache_bytes)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write what a job logs to a file of its own, behind what an earlier attempt has left."""
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("examples")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    except Exception:
        ours.exception("The job failed")
        raise
    finally:
        ours.setLevel(level)
        ours.removeHandler(handler)
        handler.close()


def _log_file(folder: Path, key: str) -> Path:
    return folder / f"{key.replace('/', '.')}.log"


def _write_settings(config: BenchmarkConfig, plan: Plan) -> None:
    """Write all settings, and what the results were made with."""
    made = read_toml(plan.config.out / "config.toml")["provenance"]
    del made["data_sha256"]  # of one run only; each has its own
    write_toml(
        config.crossval.out / SETTINGS,
        {
            "benchmark": config.resolved(),
            "provenance": {
                **made,
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
                "processors": os.cpu_count() or 0,
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
                "workers": config.scheduler or config.workers or "one per GPU, or per core",
                "command": config.command or Path(sys.argv[0]).name,
            },
        },
    )
