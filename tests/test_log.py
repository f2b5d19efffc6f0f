"""Records in files: what is written is read, in whatever state the last process left the file."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from mtbalance import RecordWriter, make_balancer, read_log
from tests._device import randn

TASKS = ("a", "b,1", "c")


def records(count=6, name="pcgrad"):
    """Return records of which every other one lacks a task."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(randn(4, generator=generator))
    balancer = make_balancer(name, tasks=TASKS, shared=[x])
    found = []
    for step in range(count):
        losses = {task: (randn(4, generator=generator) * x).sum() for task in TASKS}
        if step % 2:
            losses.pop("c")
        found.append(balancer.backward(losses))
    return found


def same(one, other):
    return one == other or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize("name", ["pcgrad", "equal"])
def test_every_figure_comes_back_as_it_was(ending, name, tmp_path):
    written = records(name=name)
    with RecordWriter(tmp_path / f"new/log{ending}") as writer:
        for record in written:
            writer.write(record, lr=1 / 3)
    log = read_log(tmp_path / f"new/log{ending}")
    assert log.steps == list(range(6))
    assert log.tasks == TASKS
    for step, record in enumerate(written):
        for figure, value in {**record.as_dict(), "lr": 1 / 3}.items():
            column = log.columns.get(figure, [math.nan] * 6)  # JSON has no column of NaN alone
            assert same(column[step], value), figure
    assert set(log.columns) <= {*written[0].as_dict(), "lr"}


def test_columns_are_in_the_order_of_steps(tmp_path):
    with RecordWriter(tmp_path / "log.csv") as writer:
        for step in (4, 2, 3):
            writer.write(records(1)[0], step=step, twice=2.0 * step)
    log = read_log(tmp_path / "log.csv")
    assert (log.steps, log.columns["twice"]) == ([2, 3, 4], [4.0, 6.0, 8.0])


def test_infinity_is_written_as_json_and_comes_back(tmp_path):
    with RecordWriter(tmp_path / "log.jsonl") as writer:
        writer.write(records(1)[0], largest=math.inf, least=-math.inf)
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["largest"] == "inf"
    assert read_log(tmp_path / "log.jsonl").columns["least"] == [-math.inf]


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_no_record_is_refused(every, tmp_path):
    """Also in steps that are not written, so that the first step tells."""
    (record,) = records(1)
    with RecordWriter(tmp_path / "log.csv", every=every) as writer:
        for other, name in ((record.as_dict(), "dict"), (None, "NoneType")):
            with pytest.raises(
                TypeError, match=f"`record` must be .* but got {name}. Give the Rec"
            ):
                writer.write(other, step=1)


def test_further_figures_are_numbers_of_other_names(tmp_path):
    (record,) = records(1)
    with RecordWriter(tmp_path / "log.csv") as writer:
        for value in ("train", None, [1.0]):
            with pytest.raises(TypeError, match=r"`phase` must be a number, as figures are, but g"):
                writer.write(record, phase=value)
        with pytest.raises(ValueError, match=r"'active' is one of them. Give it another name"):
            writer.write(record, active=77)
        writer.write(record, lr=torch.tensor(0.5), step=3)
    assert read_log(tmp_path / "log.csv").columns["lr"] == [0.5]


def test_what_is_not_written_is_not_looked_at(tmp_path):
    """To read a number waits for the device that it is on."""

    class Unread:
        def __float__(self):
            raise AssertionError

    (record,) = records(1)
    with RecordWriter(tmp_path / "log.csv", every=2) as writer:
        writer.write(record, step=1, lr=Unread())
    assert not (tmp_path / "log.csv").read_text()


def test_a_closed_writer_loses_no_row_without_a_word(tmp_path):
    (record,) = records(1)
    with RecordWriter(tmp_path / "log.csv") as writer:
        writer.write(record)
    with pytest.raises(ValueError, match=r"log.csv must be open, but has been closed. Write insi"):
        writer.write(record)
    writer.close()
    assert read_log(tmp_path / "log.csv").steps == [0]


def test_rows_are_on_disk_at_once_and_every_nth_step_is_written(tmp_path):
    writer = RecordWriter(tmp_path / "log.csv", every=3)
    for record in records(5):
        writer.write(record)
    assert read_log(tmp_path / "log.csv").steps == [0, 3]
    writer.close()
    writer.close()


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_run_goes_on_where_its_checkpoint_was(ending, tmp_path):
    path = tmp_path / f"log{ending}"
    one, two, three, four, *_ = records()
    with RecordWriter(path) as writer:
        for record in (one, two, three):
            writer.write(record)
    text = path.read_text()
    path.write_text(text[: text.rindex("loss" if ending == ".jsonl" else ",")])  # killed
    assert read_log(path).steps == [0, 1]
    with RecordWriter(path) as writer:  # from a checkpoint after step 0
        writer.write(four, step=1)
        writer.write(three)
    log = read_log(path)
    assert log.steps == [0, 1, 2]
    expected = [float(record.losses["a"]) for record in (one, four, three)]
    assert log.columns["loss/a"] == expected
    assert path.read_text().count("step") == (1 if ending == ".csv" else 4)


def test_a_csv_with_other_columns_is_not_continued(tmp_path):
    record = records(1)[0]
    with RecordWriter(tmp_path / "log.csv") as writer:
        writer.write(record)
        with pytest.raises(ValueError, match=r"log\.csv must have the columns .* differs in lr"):
            writer.write(record, lr=0.1)
        writer.write(record)
    assert read_log(tmp_path / "log.csv").steps == [0, 2]


@pytest.mark.parametrize("path", ["log.txt", "log.json", "log.csv.gz"])
def test_other_endings_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in \.csv or \.jsonl"):
        RecordWriter(tmp_path / path)
    with pytest.raises(ValueError, match=r"`path` must end in \.csv or \.jsonl"):
        read_log(tmp_path / path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("log.csv", ""), ("log.csv", "step,x\n1\n"), ("log.csv", "a\nb\n"), ("log.jsonl", "[1]\n")],
)
def test_files_of_others_are_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} must hold rows of a RecordWriter"):
        read_log(tmp_path / name)


def test_tensorboard_gets_each_figure_by_step(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = records()
    with RecordWriter(tmp_path / "lr0.1") as writer:  # a number is no ending
        for record in written:
            writer.write(record)
    events = EventAccumulator(str(tmp_path / "lr0.1")).Reload()
    for task in TASKS:
        found = {event.step: event.value for event in events.Scalars(f"loss/{task}")}
        expected = {
            step: pytest.approx(float(record.losses[task]))
            for step, record in enumerate(written)
            if task in record.losses
        }
        assert found == expected


def test_without_tensorboard_its_command_is_named(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from mtbalance import RecordWriter\n"
        f"RecordWriter({str(tmp_path / 'runs')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError" in done.stderr
    assert "pip install tensorboard" in done.stderr
