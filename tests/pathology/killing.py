"""Cross-validations in processes of their own that are killed with SIGKILL, and taken up again.

`try_all` runs in a process of its own: it forks a child for every attempt, which is killed at a
chosen step, at a chosen write, or from outside at some moment. The file that it writes tells, for
every case, how often it was killed and which results differ from those of a run that was left
alone. PyTorch computes in the children only: its threads do not survive a fork.
"""

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch._dynamo  # optimizers import it when they are first used, in every child

import examples.pathology.features.files  # noqa: F401  (so do feature files)
from examples.pathology.common import files
from examples.pathology.common.files import write_bytes
from examples.pathology.runs import crossval
from examples.pathology.settings.crossval import CrossvalConfig
from examples.pathology.training import checkpoint as resume
from examples.pathology.training import model
from examples.pathology.training.learner import Learner
from examples.pathology.training.model import JointTransformer
from tests.pathology.tiny import Tables, make_tables

METHODS = ("uncert+graddrop", "autol+cagrad")


@contextmanager
def small_models() -> Iterator[None]:
    """Train small networks, and draw no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "JointTransformer", small)
        patch.setattr(crossval, "draw_figures", lambda *_, **__: [])
        yield


def small(outputs, in_features, **_):
    return JointTransformer(
        outputs, in_features=in_features, layers=1, d_model=16, heads=2, feedforward=16
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(tables: Tables, out: Path, method: str, *, step: int = 0, write: int = 0) -> None:
    """Run in this process; die at the given step, or when the given write is half done."""
    steps, writes = 0, 0
    original_backward, original_publish = Learner._backward, files.publish

    def backward(*arguments):
        nonlocal steps
        steps += 1
        if steps == step:
            die()
        return original_backward(*arguments)

    def publish(temporary, path):
        nonlocal writes
        writes += 1
        if writes == write:
            temporary.write_bytes(temporary.read_bytes()[:50])  # what a full cache would lose
            die()
        original_publish(temporary, path)

    def figures(folder, *_, **__):
        return [write_bytes(folder / f"{name}.png", b"a figure") for name in ("roc", "pr")]

    Learner._backward, files.publish = backward, publish
    model.JointTransformer, crossval.draw_figures = small, figures
    resume.COST_SHARE = float("inf")  # a checkpoint after every epoch, whatever it costs
    torch.set_num_threads(1)
    crossval.run_crossval(
        CrossvalConfig(
            tables.clini,
            tables.slides,
            tables.features,
            "isMSIH",
            out,
            auxiliary=("LF",),
            balancer=method,
            folds=2,
            epochs=2,
            patience=2,
            learning_rate=3e-3,
            schedule="cosine",
            max_tiles=3,
            device="cpu",
        )
    )


def attempt(work: Callable[[], None], *, until: Path | None = None) -> int:
    """Do the work in a child and return its exit code, -9 if it was killed.

    Args:
        work: What the child does.
        until: The file whose appearance is the moment to kill it from outside.
    """
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with Path(os.devnull).open("w", encoding="utf-8") as sys.stderr:
                work()
            code = 0
        finally:
            os._exit(code)
    while until is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until.exists():
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(out: Path) -> dict[str, object]:
    """Return everything that must not depend on kills: all but times."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        name = path.relative_to(out).as_posix()
        if path.name == "history.csv":
            with path.open(encoding="utf-8", newline="") as file:
                rows = [
                    [value for key, value in row.items() if not key.startswith("seconds")]
                    for row in csv.DictReader(file)
                ]
            found[name] = rows
        elif path.suffix == ".json":
            value = json.loads(path.read_text(encoding="utf-8"))
            for key in ("seconds", "share_waiting_for_data"):
                value.pop(key, None)
            found[name] = value
        elif path.name == "model.pt":
            saved = torch.load(path, weights_only=True)
            found[name] = {k: v.numpy().tobytes() for k, v in saved.pop("state_dict").items()}
        elif path.name != "config.toml":  # names the folder
            found[name] = path.read_bytes()
    return found


def differing(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    return sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))


def try_all(folder: Path) -> None:
    """Write ``told.json``."""
    tables = make_tables(folder / "cohort", patients=10, tiles=5)
    whole = {}
    for method in METHODS:
        out = folder / "whole" / method
        assert attempt(lambda out=out, method=method: run(tables, out, method)) == 0, method
        whole[method] = results(out)

    told: dict[str, object] = {"files": sorted(whole[METHODS[0]])}

    def case(name: str, method: str, kills: list[dict[str, int]], *moments: str) -> None:
        out = folder / "killed" / name.replace(" ", "-")
        codes = [attempt(lambda kill=kill: run(tables, out, method, **kill)) for kill in kills]
        codes += [attempt(lambda: run(tables, out, method), until=out / m) for m in moments]
        last = attempt(lambda: run(tables, out, method))
        told[name] = {
            "killed": codes.count(-9),
            "kills": len(codes),
            "last": last,
            "differing": differing(results(out), whole[method]),
        }

    for method in METHODS:  # in the first epoch, the second, the next fold; then all the rest
        case(f"steps of {method}", method, [{"step": 2}, {"step": 5}, {"step": 6}])
    # Every attempt writes the ledger, two more files, and half of the next, until all are there.
    case("writes", METHODS[0], [{"write": 1}, {"write": 2}, *[{"write": 4}] * 10])
    moments = ("splits.json", "fold-1/checkpoint.pt", "fold-1/fold.json")
    case("from outside", METHODS[1], [], *moments)
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
