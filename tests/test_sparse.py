"""Embeddings with sparse gradients that other losses use densely, as a tied output layer does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import make_balancer
from tests._networks import TASKS

NAMES = ("naive", "uncert", "equal+pcgrad", "dwa+cagrad", "equal+graddrop", "autol+pcgrad")


class Words(nn.Module):
    """Three losses of one table: of some rows, of others, and of all of them."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=sparse)
        with torch.no_grad():
            self.table.weight.copy_(torch.linspace(-1, 1, 18).reshape(6, 3))
        self.double()

    def losses(self, order: str) -> dict[str, Tensor]:
        """Return the losses, one kind for each letter: s, t (both sparse) or d (dense)."""
        kinds = {
            "s": lambda: self.table(torch.tensor([0, 2, 2])).square().sum(),
            "t": lambda: (self.table(torch.tensor([2, 5])) - 2).sin().sum(),
            "d": lambda: (self.table.weight - 1).square().mean(),
        }
        return {task: kinds[kind]() for task, kind in zip(TASKS, order, strict=True)}


def gradient_after(name: str, order: str, way: str, *, sparse: bool) -> Tensor:
    words = Words(sparse=sparse)
    weight = words.table.weight
    options: dict[str, Any] = {"nonfinite": "drop"} if way == "drop" else {}
    options["shared"] = words if way != "added up" else nn.Parameter(torch.zeros(()))
    balancer = make_balancer(
        name, tasks=TASKS, optimizer=torch.optim.SGD([weight], lr=0.1), **options
    )
    losses = words.losses(order)
    if way == "added up":  # by the coefficients of the tasks, none of which is balanced there
        losses = {task: loss + options["shared"] for task, loss in losses.items()}
    if way == "sparse .grad":
        words.table(torch.tensor([1, 1])).sum().backward()
    if way == "dense .grad":
        weight.square().sum().backward()

    def validation() -> dict[str, Tensor]:
        return words.losses(order)

    if way == "accumulate":
        balancer.accumulate(losses)
        balancer.accumulate(words.losses(order))
        balancer.accumulate(words.losses(order[::-1]))
        balancer.apply(validation=validation)
    else:
        balancer.backward(losses, validation=validation)
    gradient = weight.grad
    assert gradient is not None
    return gradient


@pytest.mark.filterwarnings("ignore:several tasks reach:UserWarning")  # "added up" says so
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["sdt", "dst", "std", "sts"])
@pytest.mark.parametrize(
    "way", ["plain", "drop", "accumulate", "added up", "sparse .grad", "dense .grad"]
)
def test_as_with_dense_gradients(name: str, order: str, way: str) -> None:
    actual = gradient_after(name, order, way, sparse=True)
    assert_close(actual.to_dense(), gradient_after(name, order, way, sparse=False))
    dense = "d" in order or way == "dense .grad" or ("graddrop" in name and way != "added up")
    assert actual.is_sparse != dense


def test_micro_batches_in_low_precision() -> None:
    """What is kept in bfloat16 adds up in float32, in whichever layout it comes."""
    words = Words(sparse=True).float()
    balancer = make_balancer("equal+cagrad", tasks=TASKS, shared=words, dtype=torch.bfloat16)
    expected = copy.deepcopy(words)
    reference = make_balancer("equal+cagrad", tasks=TASKS, shared=expected)
    for order in ("sst", "dsd", "tdd"):
        balancer.accumulate(words.losses(order))
        reference.accumulate(expected.losses(order))
    balancer.apply()
    reference.apply()
    gradient = expected.table.weight.grad
    assert gradient is not None
    assert_close(words.table.weight.grad, gradient, rtol=0.02, atol=0.01)
