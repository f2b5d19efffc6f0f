"""Modules of the process are found, and nobody else is disturbed by that."""

import threading

import torch
from torch import nn

from mtbalance._names import models_of, outermost_modules


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def test_outermost_modules() -> None:
    outer, alone = Outer(), nn.Linear(1, 1)
    found = outermost_modules()
    assert any(module is outer for module in found)
    assert any(module is alone for module in found)
    assert not any(module is outer.inner for module in found)
    assert [type(model) for model in models_of([outer.inner.weight])] == [Outer]


def test_classes_made_later_and_lazy_modules() -> None:
    late = type("Late", (Outer,), {})()
    lazy = nn.LazyLinear(2)
    found = outermost_modules()
    assert any(module is late for module in found)
    assert any(module is lazy for module in found)


def test_other_threads_go_on_while_modules_are_looked_for() -> None:
    """A tuple that is being built in another thread must not be held by anybody else."""
    keep = [torch.nn.Linear(1, 1) for _ in range(100)]
    over = threading.Event()
    errors: list[BaseException] = []

    def build() -> None:
        try:
            while not over.is_set():
                assert len(tuple(number for number in range(5000))) == 5000
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        assert len(outermost_modules()) >= len(keep)
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
