"""What is true of every gradient strategy that may favour one task, the primary."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance.gradient import PCD, GradientCosine, PCGrad, PrimaryStrategy
from mtbalance.weighting import DWA, Equal
from tests._device import on_device
from tests._samplers import matrix

TASKS = ("liver", "lung", "skin")


class Favoured(PrimaryStrategy):
    """Add the rows up, the primary one ten times."""

    def weights(self, gramian: Tensor) -> Tensor:
        return 1.0 + 9.0 * self.is_primary(gramian).double()


KINDS = pytest.mark.parametrize("kind", [Favoured, PCGrad])
Kind = type[PrimaryStrategy]


def parameter() -> nn.Parameter:
    return nn.Parameter(on_device(torch.ones(3, dtype=torch.float64)))


@pytest.mark.parametrize("primary", ["lung", 1])
@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((0, 1, 2), [1.0, 10.0, 1.0]),
        ((2, 1), [0.0, 10.0, 1.0]),
        ((1,), [0.0, 10.0, 0.0]),
        ((0, 2), [1.0, 0.0, 1.0]),  # it is absent
        ((2,), [0.0, 0.0, 1.0]),
    ],
)
def test_the_row_of_the_primary_task_is_found(primary, present, expected: list[float]) -> None:
    """By name or by number, whoever is absent. Task i has the gradient of one in coordinate i."""
    for weighting in (Equal(), DWA()):
        x = parameter()
        balancer = Balancer(weighting, Favoured(primary), tasks=TASKS, shared=[x])
        balancer.backward({TASKS[i]: x[i] for i in present})
        assert_close(x.grad.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_groups_and_copies() -> None:
    x, y = parameter(), parameter()
    balancer = Balancer(
        Equal(), Favoured("lung"), tasks=TASKS, shared={"first": [x], "second": [y]}
    )
    (other_x, other_y), other = copy.deepcopy(((x, y), balancer))
    for first, second, each in ((x, y, balancer), (other_x, other_y, other)):
        each.backward({TASKS[i]: first[i] + 2 * second[i] for i in (0, 1)})
        assert first.grad.tolist() == [1, 10, 0]
        assert second.grad.tolist() == [2, 20, 0]


@KINDS
@pytest.mark.parametrize(("m", "primary"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (6, 0), (6, 5)])
def test_the_primary_belongs_to_its_task(kind: Kind, m: int, primary: int) -> None:
    """With the rows turned round, the task has another number and the same direction."""
    rows = matrix("conflicting", max(m, 2), 12, seed=4)[:m]
    options = {"expectation": True} if kind is PCGrad else {}
    direction = kind(primary=primary, **options)(rows)
    turned = kind(primary=m - 1 - primary, **options)(rows.flip(0))
    assert_close(turned, direction)
    if m > 1:
        assert (kind(**options)(rows) - direction).norm() > 1e-3 * direction.norm()


@KINDS
@pytest.mark.parametrize("absent", [0, 2, 3])
def test_without_the_primary_task_there_is_none(kind: Kind, absent: int) -> None:
    """The rows of others, bit for bit as from a strategy that favours nobody."""
    rows = matrix("conflicting", 3, 9, seed=1)
    active = torch.tensor([i for i in range(4) if i != absent])
    names = ("a", "b", "c", "d")
    strategy = kind(primary=names[absent]).bind(names)
    with strategy.only(active):
        assert torch.equal(strategy(rows), kind()(rows))
    with pytest.raises(ValueError, match="one row for each of the 4 tasks"):
        strategy(rows)  # for a while only
    other = kind(primary=1).bind(names)
    with other.only(active):
        assert not torch.equal(other(rows), kind()(rows))
        assert other.is_primary(rows @ rows.T).tolist() == [i == 1 for i in active.tolist()]


def test_alone_the_first_call_binds() -> None:
    strategy = Favoured(1)
    assert strategy(on_device(torch.eye(2))).tolist() == [1, 10]
    with pytest.raises(ValueError, match="one row for each of the 2 tasks that this Favoured is"):
        strategy(on_device(torch.eye(3)))
    named = Favoured("a").bind(("b", "a"))
    assert named(on_device(torch.eye(2))).tolist() == [1, 10]
    with pytest.raises(ValueError, match="`primary` must be a number while the strategy does not"):
        Favoured("a")(on_device(torch.eye(2)))


def test_a_strategy_that_favours_nobody_belongs_to_nobody() -> None:
    strategy = Favoured()
    for tasks in (("a", "b"), ("x", "y", "z")):
        Balancer(Equal(), strategy, tasks=tasks)
    assert strategy.tasks is None


@pytest.mark.parametrize("kind", [Favoured, GradientCosine, PCD, PCGrad])
@pytest.mark.parametrize(
    ("primary", "error", "words"),
    [
        (
            "lug",
            ValueError,
            "'liver', 'lung', 'skin', but got 'lug'. Did you mean 'lung'?",
        ),
        ("xyzzy", ValueError, "`primary` must be one of the tasks 'liver', 'lung', 'skin', but"),
        (3, ValueError, "`primary` must be below the number of tasks, 3, but got 3."),
        (-1, ValueError, "`primary` must be at least 0, but got -1."),
        (True, TypeError, "`primary` must be one task's name, or its number in the order of"),
        (1.0, TypeError, "`primary` must be one task's name, or its number in the order of"),
        ("", TypeError, "`primary` must be one task's name, or its number in the order of"),
        (["lung"], TypeError, "in the order of the tasks, but got ['lung']."),
    ],
)
def test_bad_primaries(kind: Kind, primary, error, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        Balancer(Equal(), kind(primary=primary), tasks=TASKS)


def test_one_set_of_tasks() -> None:
    strategy = Favoured("a")
    Balancer(Equal(), strategy, tasks=("a", "b"))
    Balancer(Equal(), strategy, tasks=("a", "b"))
    with pytest.raises(RuntimeError, match="one set of tasks, as it favours one of them, but it"):
        Balancer(Equal(), strategy, tasks=("a", "c"))


@KINDS
def test_repr_names_the_primary_task(kind: Kind) -> None:
    assert "primary='a'" in repr(kind(primary="a"))
    assert "primary" not in repr(kind())
