"""What is added up and not balanced: heads, whose number grows with that of the tasks."""

import random
import types
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import distributed
from torch.testing import assert_close

from mtbalance import Balancer
from mtbalance._added import Added
from mtbalance._graphs import leaves_of_each, reach_of
from mtbalance.gradient import CAGrad, DualProj
from mtbalance.weighting import Constant, Equal
from tests._device import on_device
from tests._samplers import DTYPES

MANY = 40


def gradients(dtype: torch.dtype) -> Added:
    """Return three rows: what one, two, and no task reaches, and an embedding's sparse ones."""
    draws = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return on_device(torch.randn(2, 3, generator=draws)).to(dtype)

    leaves = [on_device(torch.zeros(2, 3, dtype=dtype)) for _ in range(4)]
    rows = [{0: normal(), 1: normal(), 3: normal().to_sparse()}, {1: normal(), 3: normal()}, {}]
    return Added(leaves, rows)


def dense(added: Added) -> Tensor:
    """Return the rows in float64, shape (m, leaves, 2, 3), zeros where there is nothing."""
    found = torch.zeros(len(added.rows), len(added.leaves), 2, 3, dtype=torch.float64)
    for number, row in enumerate(added.rows):
        for leaf, gradient in row.items():
            found[number, leaf] = gradient.to_dense().double()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_that_of_the_dense_rows(dtype: torch.dtype) -> None:
    added = gradients(dtype)
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    expected = torch.einsum("m,mlij->lij", weights, dense(added))
    total = added.sum(weights)
    assert total[2] is None
    for leaf in (0, 1, 3):
        assert total[leaf].dtype == dtype
        eps = max(torch.finfo(dtype).eps, 1e-15)
        atol = 16 * torch.finfo(torch.float32).eps
        assert_close(total[leaf].cpu().double(), expected[leaf], rtol=eps, atol=atol)
    assert [len(row) for row in added.rows] == [3, 2, 0]


def test_rows_that_reach_everything_are_added_up_alike() -> None:
    added = gradients(torch.float64)
    whole = Added(added.leaves[:2], [added.rows[0], {0: added.rows[1][1], 1: added.rows[1][3]}])
    del whole.rows[0][3]
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    expected = torch.einsum("m,mlij->lij", weights, dense(whole))
    alive = [weakref.ref(gradient) for row in whole.rows for gradient in row.values()]
    del added
    assert_close(torch.stack(whole.sum(weights, release=True)), expected)  # type: ignore[arg-type]
    assert not any(row for row in whole.rows)
    assert all(gradient() is None for gradient in alive)


def test_rows_are_released_one_by_one() -> None:
    added = gradients(torch.float32)
    alive = [weakref.ref(gradient) for row in added.rows for gradient in row.values()]
    expected = gradients(torch.float32).sum(torch.ones(3))
    for one, other in zip(added.sum(torch.ones(3), release=True), expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert all(gradient() is None for gradient in alive)


def test_without_a_task_its_own_leaves_are_gone() -> None:
    added = gradients(torch.float64)
    left = added.without([0])
    assert [id(leaf) for leaf in left.leaves] == [id(added.leaves[1]), id(added.leaves[3])]
    assert torch.equal(dense(left), dense(added)[1:][:, [1, 3]])
    assert added.without([0, 1]) == Added([], [{}])


def test_weights_on_a_device_are_not_read() -> None:
    """On the meta device reading any value raises."""
    leaf = torch.ones(2, device="meta")
    total, nothing = Added([leaf, leaf], [{0: leaf}, {0: leaf}]).sum(torch.ones(2, device="meta"))
    assert total is not None
    assert (total.shape, nothing) == ((2,), None)


# --- many tasks -----------------------------------------------------------------------------------


class Heads(nn.Module):
    """A trunk, a head per task, one that tasks 3 and 7 have in common, and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
        self.heads = nn.ModuleList([nn.Linear(6, 1).double() for _ in range(MANY)])
        self.common = nn.Linear(6, 1).double()
        self.unused = nn.Linear(6, 1).double()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))  # the last task's alone

    def losses(self, rows: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(rows)
        found = {}
        for number, head in enumerate(self.heads):
            out = head(hidden)
            if number in (3, 7):
                out = out + self.common(hidden)
            found[f"t{number}"] = (out - number / MANY).square().mean()
        found[f"t{MANY - 1}"] = found[f"t{MANY - 1}"] * self.scale
        return found


@pytest.mark.parametrize("shared", ["given", "inferred"])
@pytest.mark.parametrize("gradient", [CAGrad, DualProj])
def test_many_tasks_get_what_their_gradients_say(gradient: type, shared: str) -> None:
    """The direction of rows by autograd, one by one, and their weighted sums for all else."""
    model, tasks = Heads(), [f"t{number}" for number in range(MANY)]
    rows = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = [1 + number / 7 for number in range(MANY)]
    trunk = model.trunk if shared == "given" else None
    Balancer(Constant(weights), gradient(), tasks=tasks, shared=trunk).backward(model.losses(rows))

    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = [w * loss for w, loss in zip(weights, model.losses(rows).values(), strict=True)]
    table = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    for name, parameter, column in zip(names, parameters, zip(*table, strict=True), strict=True):
        found = [g for g in column if g is not None]
        assert (parameter.grad is None) == (not found), name
        if len(found) == 1 or (found and shared == "given" and not name.startswith("trunk")):
            assert_close(parameter.grad, sum(found), msg=name)
    together = [n for n, column in enumerate(zip(*table, strict=True)) if _balances(column, shared)]
    matrix = torch.stack(
        [_joined([row[n] for n in together], parameters, together) for row in table]
    )
    expected = gradient()(matrix)
    got = _joined([parameters[n].grad for n in together], parameters, together)
    assert_close(got, expected)


def _balances(column: Sequence[Tensor | None], shared: str) -> bool:
    """Whether a parameter is balanced: in the trunk, which all tasks reach, or shared by any."""
    return sum(g is not None for g in column) >= (MANY if shared == "given" else 2)


def _joined(
    found: Sequence[Tensor | None], parameters: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    """Return gradients of these parameters end to end, zeros where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(parameters[n]) if g is None else g).flatten()
            for n, g in zip(numbers, found, strict=True)
        ]
    )


def test_a_pass_asks_for_nothing_that_only_other_tasks_reach(monkeypatch) -> None:
    """What is asked for grows with the tasks, not with their square."""
    asked, grad = [], torch.autograd.grad

    def noting(outputs, inputs, *rest, **options):
        asked.append(len(inputs))
        return grad(outputs, inputs, *rest, **options)

    model, tasks = Heads(), [f"t{number}" for number in range(MANY)]
    balancer = Balancer(Equal(), CAGrad(), tasks=tasks, shared=model.trunk)
    rows = torch.ones(1, 4, dtype=torch.float64)
    monkeypatch.setattr(torch.autograd, "grad", noting)
    balancer.backward(model.losses(rows), retain_graph=True)
    # Weights and biases of the trunk, the common head, and a head of its own.
    assert asked == [6] * (MANY - 1) + [7]


def test_what_others_reach_too_may_be_reached_by_few() -> None:
    """Leaves of each loss, against a walk through the graph of each: on graphs of any shape."""
    for seed in range(200):
        draw = random.Random(seed)
        leaves = [torch.ones((), requires_grad=True) for _ in range(draw.randint(1, 6))]
        nodes = list(leaves)
        for _ in range(draw.randint(1, 15)):
            nodes.append(torch.stack(draw.sample(nodes, min(len(nodes), draw.randint(1, 3)))).sum())
        losses = [draw.choice(nodes) * 1 for _ in range(draw.randint(1, 5))]
        losses += draw.sample(leaves, draw.randint(0, 1))
        reached = [{id(leaf) for leaf in reach_of([loss]).leaves} for loss in losses]
        for number, found in enumerate(leaves_of_each(losses)):
            ids = [id(leaf) for leaf in found]
            assert len(ids) == len(set(ids))
            assert reached[number] <= set(ids)
            for extra in set(ids) - reached[number]:
                assert sum(extra in other for other in reached) > 1


def test_outputs_of_a_model_in_processes_stay_apart() -> None:
    """DistributedDataParallel leads all of them through one operation, each as it is."""
    leaves = [torch.ones((), requires_grad=True) for _ in range(3)]
    model = types.SimpleNamespace(_ddp_sink_clone=True)
    outputs = distributed._DDPSink.apply(
        lambda: model, leaves[0] * leaves[2], leaves[1] * leaves[2]
    )
    one, other = leaves_of_each([output * 2 for output in outputs])
    assert {id(leaf) for leaf in one} == {id(leaves[0]), id(leaves[2])}
    assert {id(leaf) for leaf in other} == {id(leaves[1]), id(leaves[2])}
