"""What is true of every gradient strategy that may prefer some tasks to others."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._gramians import TENSORS
from mtbalance.gradient import MGDA, ConFIG, DualProj, UPGrad
from mtbalance.gradient._base import PreferringStrategy
from mtbalance.weighting import Equal
from tests._device import on_device
from tests._samplers import gradients, matrix, random_gradients

KINDS = pytest.mark.parametrize("kind", [ConFIG, DualProj, MGDA, UPGrad])
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
Kind = type[PreferringStrategy]


def some_preferences(m: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(0.2, 5, m).tolist()


@KINDS
@given(rows=gradients(), factor=st.floats(1e-3, 1e3))
@settings(max_examples=40)
def test_equal_preferences_are_none(kind: Kind, rows: Tensor, factor: float) -> None:
    equal = kind(preference=[factor] * len(rows))
    atol = 1e-6 * float(rows.norm(dim=1).sum())
    assert_close(equal(rows), kind()(rows), rtol=0, atol=atol)
    assert equal.largest_preference == pytest.approx(1)


@KINDS
@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("factor", [1e-3, 4.0, 1e6])
def test_only_ratios_count(kind: Kind, m: int, factor: float) -> None:
    rows = random_gradients(m, 2 * m)
    p = some_preferences(m)
    scaled = kind(preference=[factor * number for number in p])
    assert_close(scaled(rows), kind(preference=p)(rows))
    assert scaled.growth == pytest.approx(kind(preference=p).growth)


@KINDS
@pytest.mark.parametrize("m", [2, 3, 5])
def test_preferences_change_something_and_belong_to_their_tasks(kind: Kind, m: int) -> None:
    """Preferences move with the rows: d(PJ; Pp) = d(J; p)."""
    rows = matrix("conflicting", m, 2 * m, seed=2)
    p = some_preferences(m)
    direction = kind(preference=p)(rows)
    assert_close(kind(preference=p[::-1])(rows.flip(0)), direction)
    assert (kind(preference=p[::-1])(rows) - direction).norm() > 1e-3 * direction.norm()


@KINDS
@pytest.mark.parametrize("m", [2, 3, 20])
def test_equal_rows_keep_the_scale_of_the_sum(kind: Kind, m: int) -> None:
    """No choice of preferences changes the learning rate."""
    g = random_gradients(1, 7)
    assert_close(kind(preference=some_preferences(m))(g.expand(m, 7)), m * g[0])


@KINDS
@pytest.mark.parametrize("m", [2, 3, 20])
@pytest.mark.parametrize("task", [0, 1])
def test_the_more_a_task_is_preferred_the_more_it_gains(kind: Kind, m: int, task: int) -> None:
    """Orthogonal rows of equal length gain as they are preferred."""
    rows = on_device(np.eye(m))
    before = 0.0
    for preference in (0.1, 0.5, 1.0, 2.0, 10.0):
        p = [1.0] * m
        p[task] = preference
        gains = rows @ kind(preference=p)(rows)
        share = float(gains[task] / gains.sum())
        assert share > before
        assert share == pytest.approx(preference / sum(p))
        before = share


@KINDS
@pytest.mark.parametrize("absent", [0, 1, 4])
def test_absent_tasks_leave_the_others_theirs(kind: Kind, absent: int) -> None:
    """The ratios of those that are there stay, and the number of an absent one is not taken."""
    p = some_preferences(5)
    rows = random_gradients(4, 9)
    strategy = kind(preference=p).bind(NAMES[:5])
    active = torch.tensor([i for i in range(5) if i != absent])
    with strategy.only(active):
        direction = strategy(rows)
        found = strategy.preferences(rows @ rows.T)
    assert_close(found, on_device(np.array(p)[array_of(active)] / np.mean(p)))
    rest = [p[i] for i in active.tolist()]
    expected = kind(preference=rest)(rows)
    assert_close(direction / direction.norm(), expected / expected.norm())


def array_of(active: Tensor) -> np.ndarray:
    return active.cpu().numpy()


@KINDS
def test_a_balancer_knows_tasks_by_name(kind: Kind) -> None:
    """By name, in another order, and by number; with one of three tasks absent, too."""
    x = random_gradients(3, 6)

    def step(preference: object, tasks: tuple[str, ...]) -> Tensor:
        shared = nn.Parameter(on_device(np.ones(6)))
        strategy = kind(preference=preference)  # type: ignore[arg-type]
        balancer = Balancer(Equal(), strategy, tasks=("a", "b", "c"), shared=[shared])
        balancer.backward({name: x["abc".index(name)] @ shared for name in tasks})
        assert shared.grad is not None
        return shared.grad

    for tasks in (("a", "b", "c"), ("a", "c"), ("c", "b")):
        named = step({"c": 5.0, "a": 1.0, "b": 2.0}, tasks)
        assert torch.equal(named, step([1.0, 2.0, 5.0], tasks))
        assert not torch.allclose(named, step([5.0, 2.0, 1.0], tasks))


@KINDS
@pytest.mark.parametrize("m", [2, 3])
def test_refuses_preferences_of_other_tasks(kind: Kind, m: int) -> None:
    rows = random_gradients(m, 5)
    with pytest.raises(ValueError, match=f"`preference` must have one number for each of {m} task"):
        kind(preference=[1.0] * (m + 1))(rows)
    with pytest.raises(ValueError, match="`preference` must have one number for each task"):
        kind(preference={"a": 1.0, "x": 2.0}).bind(("a", "b"))
    with pytest.raises(RuntimeError, match="must belong to one set of tasks"):
        kind(preference=[1.0, 1.0]).bind(("a", "b")).bind(("a", "c"))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=re.escape("`preference[1]` must be")):
            kind(preference=[1.0, bad])


# --- two tasks, in a formula that takes preferences -----------------------------------------------

FORMULAS = pytest.mark.parametrize("kind", [DualProj, UPGrad])


@FORMULAS
@given(rows=gradients(m=(2, 2)), p=st.floats(0.05, 20))
@settings(max_examples=150)
def test_two_tasks_on_a_device_get_the_same_weights(kind: Kind, rows: Tensor, p: float) -> None:
    """The formula carried by tensors, as on a GPU, and by Python's floats, as on the CPU."""
    strategy = kind(preference=[p, 1.0])
    gramian = rows @ rows.T
    a, h, _, b = gramian.flatten().unbind()
    of_tensors = torch.stack(strategy._weights_of_pair(a, h, b, TENSORS))  # type: ignore[attr-defined]
    assert_close(of_tensors, strategy.weights(gramian), rtol=1e-14, atol=0)


@FORMULAS
@pytest.mark.parametrize("preference", [None, [1.0, 2.0]])
def test_two_tasks_on_a_device_wait_for_nothing(kind: Kind, preference) -> None:
    """On the meta device, reading a number or copying it to the host raises."""
    gramian = torch.empty(2, 2, dtype=torch.float64, device="meta")
    weights = kind(preference=preference).weights(gramian)
    assert (weights.device.type, weights.shape) == ("meta", (2,))
    with pytest.raises(NotImplementedError):  # so the test can fail
        kind().weights(torch.empty(3, 3, dtype=torch.float64, device="meta"))


# --- what they say --------------------------------------------------------------------------------


@KINDS
def test_repr_names_the_preferences(kind: Kind) -> None:
    assert repr(kind(preference=[1, 2])).startswith(f"{kind.__name__}(preference=[1.0, 2.0]")
    assert "preference" not in repr(kind())
