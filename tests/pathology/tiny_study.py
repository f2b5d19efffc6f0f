"""Benchmarks on disk whose truth is planted: how good each method is, what it cost, how it went."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from examples.pathology.cohort.targets import Target
from examples.pathology.common.toml import write_toml
from examples.pathology.results.folds import REMEDY, FoldResult, read_fold
from examples.pathology.results.measuring import describe_primary, summarise_metrics
from examples.pathology.results.summary import metrics_json
from examples.pathology.study.folder import EXTERNAL, LEDGER, RUNS, SETTINGS, numbered, run_folder
from examples.pathology.tables.writing import read_table_of_ours
from examples.pathology.training.fold import BASELINE

PRIMARY = Target("isMSIH", "classification", ("MSS", "MSIH"), "MSIH")
NUMBER = Target("HRD", "regression")
NOTE = "SIMULATED <features>"
FOLDS, PATIENTS = 2, 36


def write_study(
    folder: Path,
    *,
    methods: Sequence[str] = (BASELINE, "naive", "dwa"),
    auxiliary: Sequence[str] = ("LF", "Stroma/Fraction"),
    shifts: Mapping[str, float] | None = None,
    spreads: Mapping[str, float] | None = None,
    deployed: bool = True,
    own_baseline: bool = False,
    primary: Target = PRIMARY,
    repeat: int = 0,
) -> Path:
    """Write a benchmark as if it had been run.

    Args:
        folder: Where to.
        methods: Its methods.
        auxiliary: Its auxiliary targets.
        shifts: By method, how far the scores of positive patients are above the others' (1); of a
            regression, what its errors are divided by.
        spreads: By method, how far apart the classes are in the embedding (1).
        deployed: Whether there is an external cohort.
        own_baseline: Whether each auxiliary target has a baseline of its own.
        primary: What is predicted, `PRIMARY` or `NUMBER`.
        repeat: Which seed all this is from: write them one after the other, from 0.
    """
    for name in auxiliary:
        for method in methods:
            place = run_folder(name, method, own_baseline=own_baseline)
            run = folder / numbered(RUNS, repeat) / place
            if run.exists():
                continue
            seed = abs(hash_of(f"{name}/{method}")) + 1000 * repeat
            shift, spread = ((each or {}).get(method, 1.0) for each in (shifts, spreads))
            alone = method == BASELINE
            targets = [primary, *([] if alone else [Target(name, "regression")])]
            for k in range(1, FOLDS + 1):
                write_fold(run / f"fold-{k}", method, targets, k, seed + k, shift, spread)
            results = [read_fold(run / f"fold-{k}") for k in range(1, FOLDS + 1)]
            summary = {
                **about(method, results, primary),
                "auxiliary": [{"name": t.name, "kind": t.kind} for t in targets[1:]],
                "tiles": 1000,
                "seed": 0,
                "splits_sha256": "equal",
                "seconds": [r.seconds for r in results],
                "epochs": [r.epochs for r in results],
                "best_epochs": [r.best_epoch for r in results],
                "metrics": metrics_json(summarise_metrics(results, targets, 0)),
            }
            write_json(run / "metrics.json", summary)
            write_ledger(run, "crossval")
            if deployed:
                outside = folder / numbered(EXTERNAL, repeat) / place
                write_deployed(outside, method, primary, seed, shift)
    settings = {
        "target": primary.name,
        "auxiliary": list(auxiliary),
        "methods": list(methods),
        "complete_cases": own_baseline,
        "seed": 0,
        "seeds": repeat + 1,
    }
    made = {"version": "9.9", "command": "python -m examples.pathology benchmark --out <here>"}
    write_toml(folder / SETTINGS, {"benchmark": settings, "provenance": made})
    write_jobs(folder, [])
    return folder


def hash_of(text: str) -> int:
    """Return a number for a text, the same in every process."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text))


def about(method: str, results: Sequence[FoldResult], primary: Target) -> dict[str, Any]:
    labels = [label for each in results for label in each.predictions[primary.name]]
    patients = len(labels)
    return {
        "method": method,
        **describe_primary(primary, labels),
        "patients": patients,
        "funnel": [[patients + 1, "in the table"], [patients, "with features"]],
        "extractor": "tiny",
        "random_weights": False,
        "note": NOTE,
        "simulated": "",
    }


def predictions_of(
    targets: Sequence[Target], name: str, fold: int, seed: int, shift: float
) -> pd.DataFrame:
    """Draw predictions; what is hard about a patient is so for all methods."""
    truth = np.arange(PATIENTS) % 3 == 0
    shared = np.random.default_rng(fold).normal(size=PATIENTS)
    random = np.random.default_rng(seed)
    error, primary = shared + random.normal(size=PATIENTS) * 0.7, targets[0]
    table: dict[str, Any] = {"PATIENT": [f"{name}{fold}-{i:02d}" for i in range(PATIENTS)]}
    if primary.kind == "regression":
        measured = np.random.default_rng(fold + 100).normal(size=PATIENTS)
        table[primary.name] = 40 + 10 * measured
        table[f"{primary.name}_pred"] = 40 + 10 * (measured + error / shift)
    else:
        score = 1 / (1 + np.exp(-(error + shift * truth)))
        table[primary.name] = np.where(truth, "MSIH", "MSS")
        table |= {f"{primary.name}_MSIH": score, f"{primary.name}_MSS": 1 - score}
    for target in targets[1:]:
        table[target.name] = shared
        table[f"{target.name}_pred"] = shared + random.normal(size=PATIENTS)
    return pd.DataFrame(table)


def write_fold(
    folder: Path,
    method: str,
    targets: Sequence[Target],
    k: int,
    seed: int,
    shift: float,
    spread: float,
) -> None:
    folder.mkdir(parents=True)
    table = predictions_of(targets, "P", k, seed, shift)
    table.to_csv(folder / "predictions.csv", index=False)
    validated = predictions_of(targets, "V", k + FOLDS, seed + 100, shift)
    validated.to_csv(folder / "validation.csv", index=False)
    embedding = np.random.default_rng(seed).normal(size=(PATIENTS, 4))
    embedding[:, 0] += spread * (table[targets[0].name] == "MSIH")
    np.save(folder / "embeddings.npy", embedding.astype(np.float32))
    history_of(method, [t.name for t in targets]).to_csv(folder / "history.csv", index=False)
    done = {"best_epoch": 2, "epochs": 3, "threshold": 0.5, "seconds": 9.0}
    write_json(folder / "fold.json", done)


def history_of(method: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Three epochs: dwa moves its weights and takes twice as long, pcgrad knows conflicts."""
    table: dict[str, Sequence[float]] = {
        "epoch": [1, 2, 3],
        "seconds": [8.0, 4.0, 4.0] if method == "dwa" else [5.0, 2.0, 2.0],
        "active": [1.5, 1.5, 1.5],  # every second step has both tasks
    }
    for number, task in enumerate(tasks):
        moved = 0.1 * number if method == "dwa" else 0.0
        table[f"weight/{task}"] = [1.0, 1.0 + moved, 1.0 - moved]
    if method.endswith("pcgrad"):
        table["conflicts"] = [0.1, 0.2, 0.3]
    return pd.DataFrame(table)


def write_deployed(folder: Path, method: str, primary: Target, seed: int, shift: float) -> None:
    for number, place in enumerate([*(folder / f"fold-{k + 1}" for k in range(FOLDS)), folder]):
        place.mkdir(parents=True, exist_ok=True)
        table = predictions_of([primary], "E", 0, seed + 10 + number, shift)
        table.to_csv(place / "predictions.csv", index=False)
        np.save(place / "embeddings.npy", np.zeros((PATIENTS, 4), dtype=np.float32))
    places = [*(folder / f"fold-{k + 1}" for k in range(FOLDS)), folder]
    results = [
        FoldResult(
            read_table_of_ours(place / "predictions.csv", REMEDY),
            np.load(place / "embeddings.npy"),
            0,
            0,
            0.0,
            0.5,
        )
        for place in places
    ]
    *by_fold, ensemble = results
    summary = {
        **about(method, [ensemble], primary),
        "labelled": PATIENTS,
        "metrics": metrics_json(summarise_metrics(by_fold, [primary], 0)),
        "metrics_of_ensemble": metrics_json(summarise_metrics([ensemble], [primary], 0)),
    }
    if primary.kind == "classification":
        summary |= {"thresholds": [0.5] * FOLDS, "threshold_of_ensemble": 0.5}
    write_json(folder / "metrics.json", summary)
    write_ledger(folder, "deploy")


def write_ledger(folder: Path, command: str) -> None:
    """Write the ledger, in which patient P1-00 has two slides, and where the features were."""
    settings = {"crossval": "config.toml", "deploy": "deploy.toml"}[command]
    write_toml(folder / settings, {command: {"features": "no/features"}})
    rows = [
        "item,name,patient,status,reason",
        "patient,P1-00,P1-00,used,",
        "patient,X,X,excluded,no <label>",
        "slide,A/<P1-00>,P1-00,used,",
        "slide,B,P1-00,used,",
        "slide,C,P1-00,excluded,no feature file",
    ]
    (folder / "ledger.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_jobs(folder: Path, rows: Sequence[Sequence[object]]) -> None:
    table = pd.DataFrame(rows, columns=["job", "status", "error", "seconds", "attempts"])
    table.to_csv(folder / LEDGER, index=False)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
