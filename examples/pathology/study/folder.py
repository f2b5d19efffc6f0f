"""A benchmark on disk: which run is where, and all of it read back.

Every method on every auxiliary target is an ordinary run folder of `crossval`, and every deployed
one an ordinary folder of `deploy`, so that `report`, `deploy` and `heatmap` work on them alone. The
baseline knows the primary target only and is the same for every auxiliary target, unless complete
cases are asked for: then each auxiliary target has patients, splits and a baseline of its own.

With several seeds, the runs of the first are in ``runs/``, those of the second in ``runs-2/``, and
so on, with the same folds: to ask for more seeds repeats nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from examples.pathology.common.errors import UserError
from examples.pathology.common.files import whole
from examples.pathology.common.toml import read_toml
from examples.pathology.jobs.engine import Outcome
from examples.pathology.results.repeats import over_seeds
from examples.pathology.results.runs import Deployed, Run, read_deployed, read_run
from examples.pathology.results.summary import Metrics
from examples.pathology.settings.benchmark import folder_name
from examples.pathology.settings.cohort import Kind
from examples.pathology.settings.crossval import BASELINE
from examples.pathology.tables.writing import read_table_of_ours

SETTINGS = "study.toml"  # a folder that has it belongs to a benchmark
LEDGER = "jobs.csv"
RUNS, EXTERNAL, REPORT = "runs", "external", "report"
Found = TypeVar("Found")
REMEDY = "Run `benchmark` again: what is finished stays."


@dataclass(frozen=True)
class Repeat:
    """All methods with one auxiliary target, from one seed.

    Args:
        seed: Of their initial weights.
        runs: Finished runs by method, the baseline first; a method that failed is not in it.
        deployed: Those of them that were deployed, by method.
    """

    seed: int
    runs: Mapping[str, Run]
    deployed: Mapping[str, Deployed]


@dataclass(frozen=True)
class Panel:
    """One auxiliary target with every method.

    Args:
        auxiliary: Its name.
        repeats: What each seed gave; at least one.
    """

    auxiliary: str
    repeats: tuple[Repeat, ...]

    @property
    def runs(self) -> dict[str, Run]:
        """By method, its run of the first seed that has one: for what can show one run only."""
        return _first([repeat.runs for repeat in self.repeats])

    @property
    def deployed(self) -> dict[str, Deployed]:
        """Likewise, what was deployed."""
        return _first([repeat.deployed for repeat in self.repeats])

    def of(self, cohort: str) -> dict[str, dict[int, Run]]:
        """Return by method and seed its run.

        Of the ``external`` cohort it is the ensemble, and its ``models`` in a run of their own.
        """
        found: dict[str, dict[int, Run]] = {}
        for repeat in self.repeats:
            runs: Mapping[str, Run] = repeat.runs
            if cohort != "internal":
                part = {"external": "ensemble", "models": "models"}[cohort]
                runs = {name: getattr(each, part) for name, each in repeat.deployed.items()}
            for method, run in runs.items():
                found.setdefault(method, {})[repeat.seed] = run
        return found

    @cached_property
    def metrics(self) -> dict[str, dict[str, Metrics]]:
        """All figures over all seeds, by cohort, as `of` names it, and method."""
        return {
            cohort: {
                method: over_seeds([*runs.values()]) for method, runs in self.of(cohort).items()
            }
            for cohort in ("internal", "external", "models")
        }

    def first(self, cohort: str) -> dict[str, Run]:
        """Return by method its run, or ensemble, of the first seed that has one."""
        return {method: next(iter(runs.values())) for method, runs in self.of(cohort).items()}


def _first(by_repeat: Sequence[Mapping[str, Found]]) -> dict[str, Found]:
    names = dict.fromkeys(name for found in by_repeat for name in found)
    return {name: next(found[name] for found in by_repeat if name in found) for name in names}


@dataclass(frozen=True)
class Study:
    """A benchmark, read back; runs that failed are missing and stand in `jobs`.

    Args:
        settings: What ``study.toml`` holds under ``[benchmark]``: all settings.
        provenance: What it holds under ``[provenance]``: versions, machine, features, data.
        methods: All methods asked for, in order of the tables.
        panels: One per auxiliary target.
        jobs: What became of every job of the last invocation, without what it returned.
    """

    folder: Path
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    methods: tuple[str, ...]
    panels: tuple[Panel, ...]
    jobs: tuple[Outcome, ...]

    @property
    def kind(self) -> Kind:
        """What the primary target is."""
        return next(run.summary.kind for panel in self.panels for run in panel.runs.values())

    @property
    def seeds(self) -> int:
        """How many were asked for."""
        return len(self.panels[0].repeats)

    @property
    def deployed(self) -> bool:
        """Whether there is an external cohort."""
        return any(panel.deployed for panel in self.panels)


def numbered(folder: str, repeat: int) -> Path:
    """Return ``runs`` or ``external`` of a repeat, counted from 0."""
    return Path(folder if repeat == 0 else f"{folder}-{repeat + 1}")


def run_folder(auxiliary: str, method: str, *, own_baseline: bool) -> Path:
    """Return where a run is, relative to ``runs/`` or ``external/``."""
    if method == BASELINE and not own_baseline:
        return Path(BASELINE)
    return Path(folder_name(auxiliary)) / method


def read_study(folder: Path) -> Study:
    """Read a benchmark's folder.

    Raises:
        UserError: It is none, or no run in it is finished.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(f"`run` must be the folder of a benchmark, but {folder} has no {SETTINGS}.")
    with whole(path, REMEDY):
        stored = read_toml(path)
        settings = stored["benchmark"]
        methods, auxiliaries = tuple(settings["methods"]), tuple(settings["auxiliary"])
        own_baseline = bool(settings["complete_cases"])
        first, repeats = int(settings["seed"]), int(settings.get("seeds", 1))
    panels = []
    for name in auxiliaries:
        places = {m: run_folder(name, m, own_baseline=own_baseline) for m in methods}
        found = [_read_repeat(folder, places, repeat, first + repeat) for repeat in range(repeats)]
        panels.append(Panel(name, tuple(found)))
    if not any(panel.runs for panel in panels):
        raise UserError(f"`run` must hold a finished run, but none of {folder} is finished.")
    made, jobs = stored.get("provenance", {}), read_jobs(folder / LEDGER)
    return Study(folder, settings, made, methods, tuple(panels), jobs)


def _read_repeat(folder: Path, places: Mapping[str, Path], repeat: int, seed: int) -> Repeat:
    runs, deployed = {}, {}
    inside, outside = folder / numbered(RUNS, repeat), folder / numbered(EXTERNAL, repeat)
    for method, place in places.items():
        if (inside / place / "metrics.json").exists():
            runs[method] = read_run(inside / place)
            if (outside / place / "metrics.json").exists():
                deployed[method] = read_deployed(outside / place, runs[method].folder)
    return Repeat(seed, runs, deployed)


def read_jobs(path: Path) -> tuple[Outcome, ...]:
    """Read what became of the jobs; a benchmark that was stopped early does not say."""
    if not path.exists():
        return ()
    with whole(path, REMEDY):
        rows = read_table_of_ours(path, REMEDY).to_numpy().tolist()
        return tuple(
            Outcome(key, status, error, seconds=float(seconds), attempts=int(attempts))
            for key, status, error, seconds, attempts in rows
        )
