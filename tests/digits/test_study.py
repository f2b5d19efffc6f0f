"""A study goes on where it was stopped, hides no failure, and is the same however it is made."""

from dataclasses import replace

import pytest

from examples.digits import study
from examples.digits.methods import SINGLE
from examples.digits.setting import TASKS
from examples.digits.study import (
    PLAN,
    TRAININGS,
    Job,
    Journal,
    OtherSettingError,
    Plan,
    attempt,
    read,
    run,
)
from examples.digits.training import Measured
from tests.digits._small import TINY, done, plan_of


def fake(method, seed, rate, setting):
    """A training that takes no time."""
    value = round((len(method) + seed) / 100 + rate, 6)
    return [Measured(value, value, value, value)] * 2


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(study, "train", fake)


def test_the_jobs_of_a_plan():
    jobs = plan_of("pcgrad").jobs
    names = [f"{SINGLE}:{task}" for task in TASKS] + ["sum", "pcgrad"]
    assert jobs == [Job(n, s, r) for s in (0, 1) for n in names for r in TINY.rates]


def test_all_trainings_are_made_and_read_again(fast, tmp_path):
    plan = replace(plan_of("pcgrad"), missing=("cagrad",))
    made = run(plan, tmp_path, 1)
    assert [each.job for each in made] == plan.jobs
    stored, trainings = read(tmp_path)
    assert stored == plan
    assert repr(trainings) == repr(made)  # NaN is equal to nothing


@pytest.mark.parametrize("after", [0, 1, 13])
def test_a_stopped_run_goes_on(fast, after, tmp_path, monkeypatch):
    plan = plan_of("pcgrad")
    (whole := tmp_path / "whole").mkdir()
    (stopped := tmp_path / "stopped").mkdir()
    run(plan, whole, 1)
    calls = []

    def interrupted(method, seed, rate, setting):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append((method, seed, rate))
        return fake(method, seed, rate, setting)

    monkeypatch.setattr(study, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(plan, stopped, 1)
    monkeypatch.setattr(study, "train", fake)
    attempts = []
    monkeypatch.setattr(
        study, "attempt", lambda job, setting: (attempts.append(job), attempt(job, setting))[1]
    )
    run(plan, stopped, 1)
    assert attempts == plan.jobs[after:]
    assert (stopped / TRAININGS).read_bytes() == (whole / TRAININGS).read_bytes()


def test_a_line_that_was_cut_off_is_made_anew(fast, tmp_path):
    plan = plan_of()
    run(plan, tmp_path, 1)
    path = tmp_path / TRAININGS
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(Journal(path).done) == len(plan.jobs) - 1
    run(plan, tmp_path, 1)
    assert path.read_bytes() == whole


def test_methods_and_seeds_may_be_added(fast, tmp_path, monkeypatch):
    run(plan_of("pcgrad", seeds=1), tmp_path, 1)
    made = []
    monkeypatch.setattr(
        study, "attempt", lambda job, setting: (made.append(job), attempt(job, setting))[1]
    )
    plan = plan_of("mgda", seeds=2)
    run(plan, tmp_path, 1)
    assert made == [job for job in plan.jobs if job.seed == 1 or job.method == "mgda"]
    assert Job("pcgrad", 0, 0.01) in Journal(tmp_path / TRAININGS).done  # kept, not shown
    assert {each.job.method for each in read(tmp_path)[1]} >= {"sum", "mgda"}


@pytest.mark.parametrize("change", [{"epochs": 3}, {"rates": (0.01,)}])
def test_another_setting_is_refused(fast, change, tmp_path):
    run(plan_of(), tmp_path, 1)
    before = (tmp_path / TRAININGS).read_bytes(), (tmp_path / PLAN).read_bytes()
    with pytest.raises(OtherSettingError, match="without trainings of another setting"):
        run(plan_of(setting=replace(TINY, **change)), tmp_path, 1)
    assert before == ((tmp_path / TRAININGS).read_bytes(), (tmp_path / PLAN).read_bytes())


def test_another_torch_is_refused(fast, tmp_path, monkeypatch):
    run(plan_of(), tmp_path, 1)
    monkeypatch.setattr(study.torch, "__version__", "1.0")
    with pytest.raises(OtherSettingError, match="another torch"):
        run(plan_of(), tmp_path, 1)


def test_a_failure_is_a_result(tmp_path, monkeypatch):
    def fails(method, seed, rate, setting):
        if method == "pcgrad":
            raise FloatingPointError("The loss,\nof ink, is not finite.")
        return fake(method, seed, rate, setting)

    monkeypatch.setattr(study, "train", fails)
    plan = plan_of("pcgrad")
    run(plan, tmp_path, 1)
    _, trainings = read(tmp_path)
    told = {each.job.method: each.error for each in trainings}
    assert told["pcgrad"] == "FloatingPointError: The loss, of ink, is not finite."
    assert told["sum"] == ""


def test_warnings_are_kept_and_not_raised(tmp_path, monkeypatch):
    import warnings

    def warns(*arguments):
        warnings.warn("Weights\nfell back.", stacklevel=2)
        return fake(*arguments)

    monkeypatch.setattr(study, "train", warns)
    told = attempt(Job("mgda", 0, 0.1), TINY)
    assert (told.error, told.warning) == ("", "Weights fell back.")
    journal = Journal(tmp_path / TRAININGS)
    journal.add(told)
    assert Journal(tmp_path / TRAININGS).done == {told.job: told}


def test_what_is_measured_is_written_whole(tmp_path):
    plain = done("sum", 0, 0.01, (0.123456, 0.5, 1.25, -0.3))
    alone = done(f"{SINGLE}:ink", 0, 0.01, (0, 0, 0.2, 0.75))
    journal = Journal(tmp_path / TRAININGS)
    for each in (plain, alone):
        journal.add(each)
    assert [*map(repr, Journal(tmp_path / TRAININGS).done.values())] == [repr(plain), repr(alone)]


def test_processes_do_what_one_does(tmp_path):
    plan = Plan(("sum", "graddrop", "autolambda"), 1, replace(TINY, rates=(0.01,)))
    for processes in (1, 2):
        (out := tmp_path / str(processes)).mkdir()
        run(plan, out, processes)
    files = [(tmp_path / name / TRAININGS).read_bytes() for name in ("1", "2")]
    assert files[0] == files[1]
    assert files[0].count(b"\n") == 7
