"""Jobs in real worker processes: of our own, killed ones, and those of a scheduler elsewhere."""

import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
import torch
from tqdm import tqdm

from examples.pathology.common.errors import RunError, UserError
from examples.pathology.jobs import cluster as cluster_module
from examples.pathology.jobs import engine
from examples.pathology.jobs.cluster import cluster
from examples.pathology.jobs.engine import Job, run_jobs
from examples.pathology.jobs.progress import JobProgress, time_left

ROOT = Path(__file__).parents[3]


# What the jobs do; workers import it from here.


def square(number):
    return number * number


def append(path, word):
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{word}\n")


def linger(path, word):
    time.sleep(0.1)
    append(path, word)


def divide():
    raise ZeroDivisionError("not\nby zero")


def complain():
    raise UserError("`x` must be good, but got bad.")


def leave():
    sys.exit(3)


def warn(words):
    logging.getLogger("examples.pathology.some_job").warning(words)
    logging.getLogger("another.package").warning("noise")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def begin_and_die(path):
    append(path, "begun")
    die()


def train(path, *, steps=6):
    """Sum random products, a checkpoint after every step; killed in the middle, but only once."""
    mark = path.with_suffix(".killed")
    state = json.loads(path.read_text()) if path.exists() else {"step": 0, "sum": 0.0}
    first = state["step"]
    for step in range(first, steps):
        torch.manual_seed(step)
        state = {"step": step + 1, "sum": state["sum"] + product()}
        path.write_text(json.dumps(state))
        if step == steps // 2 and not mark.exists():
            mark.touch()
            die()
    return first, state["sum"]


def product():
    return float(torch.rand(300, 300).mm(torch.rand(300, 300)).tanh().sum())


def occupy(seed):
    """Seed the generator of the whole process and draw from it for a while."""
    torch.manual_seed(seed)
    begun = time.monotonic()
    sums = [product() for _ in range(3)]
    return sums, torch.get_num_threads(), (os.getpid(), begun, time.monotonic())


def process():
    names = (
        "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MALLOC_TRIM_THRESHOLD_",
    )  # fmt: skip
    return os.getpid(), torch.get_num_threads(), *map(os.environ.get, names)


def lock_of_bars():
    with tqdm(total=1):
        return type(tqdm.get_lock()).__module__


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def lock():
    return threading.Lock()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def two(forked_workers):
    with cluster(workers=2, devices=["cpu"]) as client:
        yield client


def statuses(outcomes):
    return {key: outcome.status for key, outcome in outcomes.items()}


def test_jobs_wait_for_those_they_need(two, tmp_path):
    path = tmp_path / "words"
    jobs = [
        Job("table", append, (path, "table"), needs=("fold/1", "fold/2")),
        Job("fold/2", append, (path, "fold"), needs=("splits",)),
        Job("fold/1", append, (path, "fold"), needs=("splits",)),
        Job("splits", append, (path, "splits")),
    ]
    seen = []
    outcomes = run_jobs(jobs, two, on_outcome=seen.append, title="")
    assert path.read_text().split() == ["splits", "fold", "fold", "table"]
    assert list(outcomes) == [job.key for job in jobs]
    assert set(statuses(outcomes).values()) == {"done"}
    assert sorted(seen, key=lambda o: o.key) == sorted(outcomes.values(), key=lambda o: o.key)
    assert (seen[0].key, seen[-1].key) == ("splits", "table")


def test_a_job_whose_needs_are_done_goes_before_those_that_stand_behind_it(two, tmp_path):
    path = tmp_path / "words"
    jobs = [
        Job("fold", append, (path, "fold")),
        Job("results", append, (path, "results"), needs=("fold",)),
        *(Job(f"later/{n}", linger, (path, "later")) for n in range(24)),
    ]
    run_jobs(jobs, two, title="")
    words = path.read_text().split()
    assert words.index("results") < 20  # without an order it would be the last


def test_what_fails_is_told_and_ends_nothing(two, caplog):
    jobs = [
        Job("divide", divide, ()),
        Job("complain", complain, ()),
        Job("leave", leave, ()),
        Job("lock", lock, ()),
        Job("after", square, (2,), needs=("four", "complain")),
        Job("after that", square, (2,), needs=("after",)),
        Job("four", square, (2,)),
        Job("warn", warn, ("mind the gap",)),
    ]
    outcomes = run_jobs(jobs, two, title="")
    assert (outcomes["four"].status, outcomes["four"].value) == ("done", 4)
    assert {key: o.error for key, o in outcomes.items() if o.status == "failed"} == {
        "divide": "ZeroDivisionError: not",
        "complain": "`x` must be good, but got bad.",
        "leave": "SystemExit: 3",
        "lock": "TypeError: cannot pickle '_thread.lock' object",
    }
    assert {key: o.error for key, o in outcomes.items() if o.status == "skipped"} == {
        "after": "it needs complain, which is not done",
        "after that": "it needs after, which is not done",
    }
    lines = [record.getMessage() for record in caplog.records]
    assert "warn: mind the gap" in lines
    assert "complain failed: `x` must be good, but got bad." in lines
    traces = [line for line in lines if "Traceback" in line]
    assert any(line.startswith("divide failed: ") and "in divide" in line for line in traces)
    assert not any("complain" in line or "noise" in line for line in traces)


def test_a_job_whose_worker_is_killed_goes_on_from_its_checkpoint(two, tmp_path, caplog):
    (tmp_path / "whole.killed").touch()
    jobs = [Job(name, train, (tmp_path / f"{name}.json",)) for name in ("whole", "killed")]
    whole, killed = run_jobs(jobs, two, title="").values()
    assert (whole.status, whole.attempts, killed.status, killed.attempts) == ("done", 1, "done", 2)
    assert (whole.value[0], killed.value[0]) == (0, 4)
    assert killed.value[1] == whole.value[1]
    assert "killed was begun 2 times, since its worker died" in caplog.text


def test_a_job_that_kills_its_workers_fails_and_takes_no_other_with_it(two, tmp_path):
    jobs = [
        Job("deadly", begin_and_die, (tmp_path / "times",)),
        *(Job(f"{n}", square, (n,)) for n in range(8)),
    ]
    outcomes = run_jobs(jobs, two, title="", deaths=2)
    deadly = outcomes.pop("deadly")
    assert (deadly.status, deadly.attempts) == ("failed", 2)
    assert deadly.error == "its worker died 2 times while at it"
    assert (tmp_path / "times").read_text().split() == ["begun"] * 2
    assert [outcome.value for outcome in outcomes.values()] == [n * n for n in range(8)]
    assert {outcome.attempts for outcome in outcomes.values()} == {1}


def test_a_job_begun_again_because_its_reply_was_lost_has_killed_nobody(two):
    job = Job("square", square, (3,))
    for _ in range(2):  # the scheduler's way when the worker that held the reply dies
        reply = two.submit(engine._work, job, "lost", threads=1, deaths=1, pure=False)
        outcome = pickle.loads(reply.result()).outcome
        assert (outcome.status, outcome.value, outcome.attempts) == ("done", 9, 1)


def test_too_many_failures_end_the_run(two):
    bad = [Job(f"bad/{n}", divide, ()) for n in range(3)]
    outcomes = run_jobs(
        [*bad, Job("last", square, (2,), needs=("bad/0",))], two, title="", max_failures=0
    )
    assert outcomes["last"].status == "skipped"
    assert 1 <= sum(o.status == "failed" for o in outcomes.values()) < 4
    many = run_jobs([Job(f"{n}", divide, ()) for n in range(50)], two, title="", max_failures=1)
    assert len(many) == 50
    assert {o.error for o in many.values() if o.status == "skipped"} == {"more than 1 jobs failed"}


def test_an_error_in_the_caller_takes_the_jobs_back(two):
    def stop(outcome):
        raise UserError(f"Enough after {outcome.key}.")

    with pytest.raises(UserError, match="Enough after 0"):
        run_jobs([Job("0", square, (0,))], two, on_outcome=stop, title="")
    assert run_jobs([Job("0", square, (3,))], two, title="")["0"].value == 9


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([Job("a", square, (1,)), Job("a", square, (2,))], "unique among jobs, but several have a"),
        ([Job("fold-1", square, (1,), ("fold",)), Job("fold-2", square, (1,))], "needs fold. Did"),
        (
            [Job("a", square, (1,), ("b",)), Job("b", square, (1,), ("a",))],
            "must not go in a circle",
        ),
    ],
)
def test_wrong_jobs_are_told_before_any_runs(two, jobs, words):
    with pytest.raises(UserError, match=words):
        run_jobs(jobs, two, title="")


def test_workers_have_their_threads_and_leave_this_process_alone(two):
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONHASHSEED")}
    jobs = [Job(str(n), process, ()) for n in range(4)]
    for _, *seen in [outcome.value for outcome in run_jobs(jobs, two, title="").values()]:
        assert seen == [1, "", "1", "PASSIVE", None]  # None: freed memory is kept
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),  # as users' do
        cluster(workers=1, threads_per_worker=2) as client,
    ):
        pid, threads, _, *rest = run_jobs(jobs[:1], client, title="")["0"].value
        assert (threads, *rest) == (2, "2", "PASSIVE", None)
    assert {name: os.environ.get(name) for name in before} == before
    assert not is_running(pid)


def test_a_worker_that_is_killed_leaves_no_lock_behind(two):
    used = run_jobs([Job("bar", lock_of_bars, ())], two, title="")["bar"].value
    assert used == "_thread"  # and not of multiprocessing, which lives in the system


def test_each_worker_sees_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster_module._visible_devices([]) == ["0", "1"]
    assert cluster_module._visible_devices(["cuda:1", "cpu", "cuda"]) == ["1", "", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert cluster_module._visible_devices([]) == ["3", "GPU-5"]
    assert cluster_module._visible_devices(["cuda:1"]) == ["GPU-5"]
    with pytest.raises(UserError, match="`device` must be"):
        cluster_module._visible_devices(["cuda:2"])


# ---------------------------------------------------------------------------- elsewhere


@contextlib.contextmanager
def started(*arguments, **options):
    """Run one of Dask's programs while the block runs."""
    command = [sys.executable, "-m", "dask", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def scheduler_in(folder):
    """Run a scheduler that has no worker yet; gives its file and its process."""
    file = folder / "scheduler.json"
    with started("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard",
                 "--scheduler-file", file) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield file, process


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    with scheduler_in(tmp_path_factory.mktemp("scheduler")) as (file, _):
        yield file


def worker_of(scheduler, **options):
    return started("worker", "--scheduler-file", scheduler, "--nworkers", 1, "--nthreads", 4,
                   "--no-dashboard", **options)  # fmt: skip


def test_a_scheduler_elsewhere_gives_the_same_with_any_number_of_workers(two, scheduler):
    address = json.loads(scheduler.read_text())["address"]
    with pytest.raises(UserError, match=r"at least one worker, but .* none for 0.2 s"):
        cluster(scheduler=address, wait_s=0.2).__enter__()
    jobs = [Job(f"{seed}", occupy, (seed,)) for seed in range(6)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with (
        worker_of(scheduler, cwd=ROOT, env=environment),
        cluster(scheduler=str(scheduler)) as client,
    ):
        (threads,) = client.nthreads().values()
        assert threads == 4
        one = run_jobs(jobs, client, title="")
    ours = run_jobs(jobs, two, title="")
    assert [one[key].value[:2] for key in one] == [ours[key].value[:2] for key in ours]
    spans = sorted(o.value[2][1:] for o in one.values())
    assert len({o.value[2][0] for o in one.values()}) == 1
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin, "two jobs ran in one process at the same time"


def test_a_scheduler_that_is_lost_ends_the_run(tmp_path):
    with (
        scheduler_in(tmp_path) as (file, process),
        worker_of(file, cwd=ROOT),
        cluster(scheduler=str(file)) as client,
        pytest.raises(RunError, match="must stay reachable until all jobs are done, but"),
    ):
        run_jobs([Job("kill", kill, (process.pid,)), Job("a", square, (2,), ("kill",))], client)


def test_workers_without_the_package_are_told(scheduler, tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "__init__.py").touch()  # in front of those of an editable install
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (
        worker_of(scheduler, cwd=tmp_path, env=environment),
        pytest.raises(UserError, match=r"import `examples.pathology`, but .*No module named"),
    ):
        cluster(scheduler=str(scheduler)).__enter__()


def test_other_packages_in_the_workers_are_told(two, monkeypatch):
    monkeypatch.setattr(cluster_module.metadata, "version", lambda name: "1.0+cpu")
    with pytest.raises(
        UserError, match=r"must have mtbalance 1.0 as this process has, but the one"
    ):
        cluster_module._check_workers(two)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "no such file"])
def test_a_scheduler_that_is_not_there_is_wrong_use(address, monkeypatch):
    monkeypatch.setattr(cluster_module, "CONNECT_S", 0.5)
    with pytest.raises(UserError, match=f"running Dask scheduler, but got {address}"):
        cluster(scheduler=address).__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "`workers` must be at least 1, but got 0"),
        ({"threads_per_worker": 0}, "`threads_per_worker` must be at least 1, but got 0"),
        ({"scheduler": "tcp://a:1", "workers": 2}, "must be left out where `scheduler` is given"),
    ],
)
def test_wrong_use_of_a_cluster(options, words):
    with pytest.raises(UserError, match=words):
        cluster(**options).__enter__()


# ---------------------------------------------------------------------------- Ctrl-C, progress

SCRIPT = """
import signal, sys
from pathlib import Path
from examples.pathology.jobs.cluster import cluster
from examples.pathology.jobs.engine import Job, run_jobs
from tests.pathology.jobs.test_jobs import forever

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background
    with cluster(workers=1) as client:
        run_jobs([Job(str(n), forever, (Path(sys.argv[1]),)) for n in range(3)], client)
"""


def forever(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def wait_until(holds, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left(end, tmp_path):
    """After Ctrl-C, which reaches all processes of a terminal; after kill -9 of the first one."""
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir()
    with subprocess.Popen(
        [sys.executable, script, pids],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: any(pids.iterdir()), process)
            workers = [int(path.name) for path in pids.iterdir()]
            if end == signal.SIGINT:
                os.killpg(process.pid, end)
            else:
                process.send_signal(end)
            _, told = process.communicate(timeout=120)
            assert process.returncode == -end
            wait_until(lambda: not any(map(is_running, workers)))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if end == signal.SIGINT:
        assert told.count("Traceback") == 1, told  # the script's own


@pytest.mark.parametrize(
    ("seconds", "left", "workers", "expected"),
    [
        ([10.0, 20.0], 6, 2, 45.0),
        ([10.0, 0.01, 0.01], 2, 2, 10.0),  # two were found finished
        ([10.0], 1, 4, 10.0),  # the last one is not done in a fourth of the time
        ([], 3, 2, None),
        ([10.0], 3, 0, None),
        ([10.0], 0, 2, None),
    ],
)
def test_the_time_left(seconds, left, workers, expected):
    assert time_left(seconds, left, workers) == expected


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = JobProgress("folds", 10)
    for ended in range(5):
        now[0] += 25.0
        progress.show([25.0] * ended, ended, 1, 8, 2)
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "folds: 2 of 10, 2 running, 1 failed, about 01:40 left"
    ]
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = JobProgress("folds", 4)
    progress.show([60.0], 1, 1, 3, 2)
    progress._bar.refresh()
    progress.close()
    assert "folds: 1 of 4" in screen.getvalue()
    assert "2 running, 1 failed, about 01:30 left" in screen.getvalue()
