import itertools
import json
import math
import os
import sys

import pytest
import torch

from examples.pathology.common.errors import UserError
from examples.pathology.common.folders import clean, sole_writer
from examples.pathology.training import checkpoint as resume
from examples.pathology.training import model
from examples.pathology.training.checkpoint import Checkpoint
from examples.pathology.training.fold import fit_fold
from examples.pathology.training.learner import Learner
from tests._forks import forking
from tests.pathology import killing
from tests.pathology.tiny import make_tables, training

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    process = forking().Process(target=killing.try_all, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0, "what it raised is on the standard error"
    return json.loads((folder / "told.json").read_text(encoding="utf-8"))


@needs_fork
@pytest.mark.parametrize(
    "case", [*(f"steps of {method}" for method in killing.METHODS), "writes", "from outside"]
)
def test_a_run_killed_at_any_moment_gives_the_same_bit_for_bit(killed, case):
    """During a step of either fold, during every write of a run, and at moments of no choosing."""
    told = killed[case]
    if case == "from outside":  # where a fast child may be done before it is killed
        assert told["killed"] > 0
    else:
        assert told["killed"] == told["kills"] > 2
    assert told["last"] == 0
    assert told["differing"] == []
    assert {"fold-2/predictions.csv", "fold-2/model.pt", "metrics.json"} <= set(killed["files"])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("cohort")).load()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(model, "JointTransformer", killing.small)


def fit(cohort, checkpoint=None, **changes):
    config = training(**{"balancer": "pcgrad", "epochs": 3, **changes})
    people = cohort.patients
    return fit_fold(cohort, people[:6], people[6:9], config, checkpoint=checkpoint)


def test_a_damaged_checkpoint_is_told_and_the_fold_starts_anew(cohort, small, tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"half of a file")
    ours, theirs = fit(cohort, path), fit(cohort)
    assert "cannot be read" in caplog.text
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[key])


def test_a_fold_that_had_stopped_early_takes_no_step(cohort, small, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "COST_SHARE", math.inf)
    path = tmp_path / "checkpoint.pt"
    whole = fit(cohort, path, epochs=2)
    monkeypatch.setattr(Learner, "train_epoch", None)
    again = fit(cohort, path, epochs=2)
    assert again.history == whole.history
    assert again.best_epoch == whole.best_epoch


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """With a clock worked by hand: writing takes 1 s, so that 20 s must lie between two writes."""
    clock = [0.0]
    written = []

    def write(path, data):
        written.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(resume, "write_bytes", write)
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    for _ in range(12):
        clock[0] += 5.0
        checkpoint.save({})
    assert written[0] == 5.0
    assert len(written) == 3
    assert min(b - a for a, b in itertools.pairwise(written)) >= 20.0


def test_leftovers_of_killed_writers_go(tmp_path):
    for name in (".model.pt.x1.tmp", "model.pt", "checkpoint.pt"):
        (tmp_path / name).touch()
    clean(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt", "checkpoint.pt"}


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_two_processes_do_not_share_a_run_folder(tmp_path):
    with (
        sole_writer(tmp_path / "run"),
        pytest.raises(UserError, match=r"that no other process works in, but .* is in use"),
        sole_writer(tmp_path / "run"),
    ):
        pass
    with sole_writer(tmp_path / "run"):
        pass


@pytest.mark.parametrize("schedule", ["cosine", "cosine-per-step"])
def test_a_schedule_goes_on_where_it_was(cohort, small, tmp_path, monkeypatch, schedule):
    monkeypatch.setattr(resume, "COST_SHARE", math.inf)
    whole = fit(cohort, epochs=5, schedule=schedule, patience=9)
    original = Learner.validate

    def stop(learner, patients, epoch):
        if epoch == 4:
            raise KeyboardInterrupt
        return original(learner, patients, epoch)

    monkeypatch.setattr(Learner, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(cohort, tmp_path / "a.pt", epochs=5, schedule=schedule, patience=9)
    monkeypatch.setattr(Learner, "validate", original)
    again = fit(cohort, tmp_path / "a.pt", epochs=5, schedule=schedule, patience=9)
    for ours, theirs in zip(again.history, whole.history, strict=True):
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["validation/isMSIH"] == theirs["validation/isMSIH"]
