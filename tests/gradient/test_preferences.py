"""Preferences reach the rows of their tasks, whoever is absent."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import PreferringStrategy
from mtbalance.weighting import DWA, Equal
from tests._device import on_device

TASKS = ("a", "b", "c")


class Preferred(PreferringStrategy):
    """Add the rows up, each times its preference."""

    def weights(self, gramian: Tensor) -> Tensor:
        return self.preferences(gramian)


def parameter() -> nn.Parameter:
    return nn.Parameter(on_device(torch.ones(3, dtype=torch.float64)))


def losses_of(x: nn.Parameter, tasks: str) -> dict[str, Tensor]:
    """Task i has the gradient of one in coordinate i."""
    return {task: x[TASKS.index(task)] for task in tasks}


@pytest.mark.parametrize("preference", [{"c": 2, "a": 1, "b": 3}, [1, 3, 2], (10, 30, 20)])
@pytest.mark.parametrize("tasks", ["abc", "ac", "b", "cb"])
def test_each_row_gets_its_own(preference, tasks: str) -> None:
    x = parameter()
    Balancer(DWA(), Preferred(preference), tasks=TASKS, shared=[x]).backward(losses_of(x, tasks))
    expected = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
    expected *= torch.tensor([float(task in tasks) for task in TASKS])
    assert_close(x.grad.cpu(), expected)


def test_equal_ones_change_nothing() -> None:
    x = parameter()
    for preference in (None, [7, 7, 7]):
        x.grad = None
        Balancer(Equal(), Preferred(preference), tasks=TASKS, shared=[x]).backward(
            losses_of(x, "abc")
        )
        assert_close(x.grad, torch.ones_like(x))


def test_groups_and_copies() -> None:
    x, y = parameter(), parameter()
    balancer = Balancer(
        Equal(), Preferred([1, 3, 2]), tasks=TASKS, shared={"first": [x], "second": [y]}
    )
    (other_x, other_y), other = copy.deepcopy(((x, y), balancer))
    for first, second, each in ((x, y, balancer), (other_x, other_y, other)):
        each.backward({task: first[i] + 2 * second[i] for i, task in ((0, "a"), (1, "b"))})
        assert first.grad.tolist() == [0.5, 1.5, 0]
        assert second.grad.tolist() == [1, 3, 0]


def test_alone_the_first_call_binds() -> None:
    strategy = Preferred([1, 3])
    assert strategy(on_device(torch.eye(2))).tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match="one row for each of the 2 tasks that this Preferred is"):
        strategy(on_device(torch.eye(3)))
    named = Preferred({"a": 1, "b": 3}).bind(("b", "a"))
    assert named(on_device(torch.eye(2))).tolist() == [1.5, 0.5]


def test_a_strategy_without_preferences_belongs_to_nobody() -> None:
    strategy = Preferred()
    for tasks in (("a", "b"), ("x", "y", "z")):
        Balancer(Equal(), strategy, tasks=tasks)


@pytest.mark.parametrize(
    ("preference", "kind", "words"),
    [
        ([1, 2], ValueError, r"one number for each of 3 tasks, but has 2"),
        (
            {"a": 1, "b": 1, "d": 1},
            ValueError,
            r"each task \('a', 'b', 'c'\), but has 'a', 'b', 'd'",
        ),
        ([1, 0, 1], ValueError, r"`preference\[1\]` must be positive, but got 0"),
        ({"a": 1, "b": -1, "c": 1}, ValueError, r"`preference\['b'\]` must be positive"),
        ([1, float("nan"), 1], ValueError, r"`preference\[1\]` must be positive"),
        (3.0, TypeError, r"`preference` must map task names to numbers, or be a sequence"),
    ],
)
def test_bad_preferences(preference, kind, words: str) -> None:
    with pytest.raises(kind, match=words):
        Balancer(Equal(), Preferred(preference), tasks=TASKS)


def test_one_set_of_tasks() -> None:
    strategy = Preferred([1, 2])
    Balancer(Equal(), strategy, tasks=("a", "b"))
    Balancer(Equal(), strategy, tasks=("a", "b"))
    with pytest.raises(RuntimeError, match="one set of tasks, as it prefers some of them, but it"):
        Balancer(Equal(), strategy, tasks=("x", "y"))
