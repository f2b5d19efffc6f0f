"""What is true of constant weights alone; what holds for every weighting is in test_contract.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import Balancer, make_balancer
from mtbalance.gradient import Sum
from mtbalance.weighting import Constant
from tests.weighting._helpers import double

TASKS = ("a", "b", "c")
NUMBERS = st.lists(st.floats(1e-8, 1e4), min_size=3, max_size=3)


def weights_of(weighting: Constant, losses: Tensor) -> Tensor:
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(weighting(losses).sum(), losses)[0]


@given(weights=NUMBERS, losses=NUMBERS)
def test_weights_are_those_given(weights, losses) -> None:
    """To the last bit of float64, and by no factor: each weight times its loss."""
    weighting = Constant(weights)
    assert weighting(double(*losses)).tolist() == [
        w * loss for w, loss in zip(weights, losses, strict=True)
    ]
    assert weights_of(weighting, double(*losses)).tolist() == weights


def test_by_name_whatever_the_order() -> None:
    weighting = Constant({"c": 3, "a": 1, "b": 0}).bind(TASKS)
    assert weighting(double(1, 1, 1)).tolist() == [1, 0, 3]


def test_absent_tasks_take_their_weights_away() -> None:
    weighting = Constant([1.0, 10.0, 100.0]).bind(TASKS)
    with weighting.only(torch.tensor([2, 0])):
        assert weighting(double(1, 1)).tolist() == [100, 1]


def test_casting_the_model_keeps_the_weights() -> None:
    weighting = Constant([0.1, 1 / 3]).bind(("a", "b")).to(torch.bfloat16)
    assert weighting(double(1, 1)).tolist() == [0.1, 1 / 3]
    assert weighting(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_step_by_hand() -> None:
    """2 * 3x + 0.5 * x^2 at x = 4: 6 + 4, and a task of weight 0 is in the record alone."""
    x = nn.Parameter(torch.tensor(4.0))
    balancer = Balancer(Constant({"a": 2, "b": 0.5, "c": 0}), Sum(), tasks=TASKS, shared=[x])
    record = balancer.backward({"a": 3 * x, "b": x.square(), "c": x.exp()})
    assert x.grad == 10
    assert {task: float(weight) for task, weight in record.weights.items()} == {
        "a": 2,
        "b": 0.5,
        "c": 0,
    }
    assert_close(record.losses["c"], torch.tensor(4.0).exp())


def test_a_saved_run_may_go_on_with_other_weights() -> None:
    trained, other = Constant([1.0, 2.0]), Constant([3.0, 4.0])
    trained(double(1, 1))
    other(double(1, 1))
    other.load_state_dict(trained.state_dict())
    assert other(double(1, 1)).tolist() == [3, 4]


def test_later_changes_of_the_mapping_do_not_matter() -> None:
    given_weights = {"a": 1.0, "b": 2.0}
    weighting = Constant(given_weights)
    given_weights["a"] = 7.0
    assert weighting.bind(("a", "b"))(double(1, 1)).tolist() == [1, 2]


def test_by_its_short_name() -> None:
    balancer = make_balancer("constant+cagrad", tasks=("a", "b"), weights={"a": 1, "b": 3})
    assert repr(balancer.weighting) == "Constant(weights={'a': 1.0, 'b': 3.0})"


@pytest.mark.parametrize(
    ("weights", "kind", "words"),
    [
        ([1.0, -0.1], ValueError, r"`weights\[1\]` must be at least 0, but got -0\.1\."),
        ({"a": float("nan")}, ValueError, r"`weights\['a'\]` must be at least 0, but got nan\."),
        ([float("inf")], ValueError, r"`weights\[0\]` must be at least 0, but got inf\."),
        ([0.0, 0.0], ValueError, r"`weights` must have at least one number above 0, but got"),
        ([], ValueError, r"`weights` must have at least one number above 0, but got"),
        (2.0, TypeError, r"`weights` must map task names to numbers, or be a sequence"),
    ],
)
def test_refuses_what_are_no_weights(weights: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Constant(weights)  # type: ignore[arg-type]


def test_every_task_needs_one() -> None:
    with pytest.raises(ValueError, match=r"`weights` must have one number for each task \('a', "):
        Constant({"a": 1.0, "d": 1.0}).bind(TASKS)
    with pytest.raises(ValueError, match=r"must have one number for each of 3 tasks, but has 2\."):
        Constant([1.0, 1.0]).bind(TASKS)
