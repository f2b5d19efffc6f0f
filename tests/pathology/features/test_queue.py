"""The queue of slides, with slides that only note which of their steps is done where."""

import threading
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pathology.common.errors import RunError
from examples.pathology.features.extraction import SlideQueue

PLACES = ("opener", "caller", "writer")


class Line:
    """Slides that stop some number of times before they end, and what happens to them."""

    def __init__(self, before=lambda name, step: None):
        self.before = before  # is called in each step
        self.steps, self.open, self.told = [], set(), []
        self.caller = threading.current_thread()

    def place(self):
        here = threading.current_thread()
        return "caller" if here is self.caller else here.name.partition("_")[0]

    def slide(self, name, stops=2):
        self.open.add(name)
        try:
            for step in range(stops + 1):
                self.steps.append((name, step, self.place()))
                self.before(name, step)
                if step < stops:
                    yield
        finally:
            self.open.discard(name)
        return (name,)

    def tell(self, rows):
        self.told += rows

    def run(self, stops):
        SlideQueue(self.tell).run(self.slide(*each) for each in enumerate(stops))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=7))
def test_every_slide_is_told_in_order_and_each_step_has_its_thread(stops):
    line = Line()
    line.run(stops)
    assert line.told == list(range(len(stops)))
    done = {(name, step): place for name, step, place in line.steps}
    assert done == {(n, s): PLACES[s] for n, stop in enumerate(stops) for s in range(stop + 1)}
    assert not line.open


def test_steps_of_neighbours_overlap():
    """With a meeting in each pair of steps, which ends in an error where they do not overlap."""
    opening = {name: threading.Barrier(2, timeout=20) for name in range(1, 4)}
    writing = {name: threading.Barrier(2, timeout=20) for name in range(3)}

    def meet(name, step):
        if step == 0 and name in opening:
            opening[name].wait()
        elif step == 1:  # the next one is being opened; the one before is being written
            if name + 1 in opening:
                opening[name + 1].wait()
            if name - 1 in writing:
                writing[name - 1].wait()
        elif step == 2 and name in writing:
            writing[name].wait()

    line = Line(meet)
    line.run([2] * 4)
    assert line.told == [0, 1, 2, 3]


def test_no_slide_is_opened_before_the_one_ahead_has_its_turn():
    most = []
    line = Line(lambda name, step: most.append(len(line.open)))
    line.run([2] * 6)
    assert max(most) <= 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_written_is_told_and_nothing_stays_open_after(error):
    def fail(name, step):
        if (name, step) == (2, 1):
            raise error

    line = Line(fail)
    with pytest.raises(error) as caught:
        line.run([2] * 6)
    # While the error lives, so do all variables: nothing is closed by being forgotten.
    assert (line.told, line.open, caught.type) == ([0, 1], set(), error)


@pytest.mark.parametrize("moment", ["while it waits for the writer", "before rows are taken down"])
def test_ctrl_c_loses_no_rows_of_what_is_written(moment, monkeypatch):
    asked = []
    original = Future.result

    def result(future, timeout=None):
        if future is queue._last and moment == "while it waits for the writer" and not asked:
            asked.append(future)
            raise KeyboardInterrupt
        return original(future, timeout)

    def tell(rows):
        if moment == "before rows are taken down" and not asked:
            asked.append(rows)
            raise KeyboardInterrupt
        line.tell(rows)

    line = Line()
    queue = SlideQueue(tell)
    monkeypatch.setattr(Future, "result", result)
    with pytest.raises(KeyboardInterrupt):
        queue.run(line.slide(name) for name in range(6))
    written = [name for name, step, _ in line.steps if step == 2]
    assert asked
    assert line.told == written == [0]


def test_ctrl_c_loses_no_rows_of_what_an_earlier_run_has_finished():
    opened = threading.Event()

    def interrupt(name, step):
        if (name, step) == (1, 0):
            opened.set()
        if (name, step) == (0, 1):
            opened.wait(20)
            raise KeyboardInterrupt

    line = Line(interrupt)
    with pytest.raises(KeyboardInterrupt):
        line.run([2, 0, 2])
    assert line.told == [1]


@pytest.mark.parametrize("stops", [0, 2])
def test_an_error_of_the_one_who_is_told_ends_it(stops):
    line = Line()

    def enough(rows):
        line.told += rows
        if rows == (1,):
            raise RunError("enough")

    with pytest.raises(RunError, match="enough") as caught:
        SlideQueue(enough).run(line.slide(name, stops) for name in range(9))
    line.open -= {2}  # the network has seen it, and it is forgotten
    assert (line.told, line.open, caught.type) == ([0, 1], set(), RunError)
    assert max(name for name, *_ in line.steps) <= 3
