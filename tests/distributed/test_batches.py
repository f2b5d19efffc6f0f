"""Further batches of several ranks: each has a part of each, and all go on or stop together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtbalance import Balancer
from mtbalance.gradient import MoDo
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, has_fsdp2
from tests.distributed.runs import Losses, Outcome, assert_equal, ddp, same_everywhere, train
from tests.distributed.test_errors import message_of, spoiled
from tests.distributed.test_sharded import Sharding
from tests.distributed.test_whole_batch import WRAPPERS

COUNTS = pytest.mark.parametrize("count", [1, 2])


def setting(count: int, **options: Any) -> tuple[Network, Callable[..., Any], Balancer]:
    """Return a network, what takes a step with so many further batches, and the Balancer."""
    torch.manual_seed(0)
    network = Network()
    strategy = MoDo(gamma=0.01)
    shared = {"first": network.trunk[0], "second": network.trunk[3]}
    balancer = Balancer(Equal(), strategy, tasks=TASKS, shared=shared, **options)

    def step(here: Here, change: Callable[[int, Losses], Any] = lambda _, losses: losses) -> Any:
        def losses(number: int) -> Any:
            return change(number, network.losses(here.part(batch(seed=number))))

        batches = [lambda n=n: losses(n) for n in range(1, count + 1)]
        return balancer.backward(losses(0), batches=batches)

    return network, step, balancer


def take(here: Here, count: int) -> tuple[Outcome, Tensor]:
    """Take steps in which a task is absent on all ranks, or on one of them in some batch."""
    network, step, balancer = setting(count)
    outcome = Outcome()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)

    def without_b(number: int, losses: Losses) -> Losses:
        return {task: losses[task] for task in ("a", "c")}

    for change in (lambda _, losses: losses, without_b, lambda _, losses: losses):
        optimizer.zero_grad()
        outcome.records.append(step(here, change).as_dict())
        optimizer.step()
    return outcome.add(network, balancer), balancer.gradient.shares.values


@COUNTS
def test_two_processes_do_what_one_does(two: Pool, count: int) -> None:
    ranks = two.run(take, count)
    same_everywhere([outcome for outcome, _ in ranks])
    assert torch.equal(ranks[0][1], ranks[1][1])  # to the last bit
    alone, shares = take(ALONE, count)
    assert_equal([outcome for outcome, _ in ranks], alone, 1e-11)
    torch.testing.assert_close(ranks[0][1], shares, rtol=1e-11, atol=1e-12)


def train_wrapped(here: Here, options: dict[str, Any], ddp_options: dict[str, bool]) -> Outcome:
    return train(here, "modo", wrap=ddp(**ddp_options), gamma=0.01, **options)


@pytest.mark.parametrize("options", [{"further": 1}, {"further": 2}, {"further": 2, "micro": 2}])
@pytest.mark.parametrize("name", ["DDP", "DDP, finding unused parameters", "DDP, static graph"])
def test_models_that_go_forward_several_times_in_a_step(
    two: Pool, name: str, options: dict[str, Any]
) -> None:
    """The graph of the losses is there while others are made and gone back through."""
    wrapper = WRAPPERS[name] or {}
    ranks = two.run(train_wrapped, options, wrapper)
    same_everywhere(ranks)
    assert_equal(ranks, train_wrapped(ALONE, options, wrapper), 1e-11)


def take_absent(here: Here, count: int) -> Outcome:
    """Rank 0 lacks a task in each further batch, rank 1 another one in the losses."""
    network, step, balancer = setting(count)

    def change(number: int, losses: Losses) -> Losses:
        gone = {(0, True): "b", (1, False): "c"}.get((here.rank, number > 0))
        return {task: loss for task, loss in losses.items() if task != gone}

    step(here, change)
    return Outcome().add(network, balancer)


@COUNTS
def test_tasks_that_some_rank_lacks_in_some_batch(two: Pool, count: int) -> None:
    """Each is a mean over the ranks that have it, batch by batch."""
    ranks = two.run(take_absent, count)
    same_everywhere(ranks)
    network, _, balancer = setting(count)
    halves = [Here(rank, 2) for rank in range(2)]

    def losses(number: int) -> Losses:
        first, second = (network.losses(here.part(batch(seed=number))) for here in halves)
        found = {task: (first[task] + second[task]) / 2 for task in TASKS}
        if number:
            found["b"] = second["b"]
        else:
            found["c"] = first["c"]
        return found

    balancer.backward(losses(0), batches=[lambda n=n: losses(n) for n in range(1, count + 1)])
    assert_equal(ranks, Outcome().add(network, balancer), 1e-12)


def take_from_one(here: Here, count: int) -> Outcome:
    """Rank 1 has no part of the further batches."""
    network, step, balancer = setting(count)
    step(here, lambda number, losses: {} if number and here.rank else losses)
    return Outcome().add(network, balancer)


@COUNTS
def test_a_rank_without_any_loss_of_a_batch(two: Pool, count: int) -> None:
    ranks = two.run(take_from_one, count)
    same_everywhere(ranks)
    network, _, balancer = setting(count)

    def losses(number: int) -> Losses:
        rows = batch(seed=number)
        return network.losses(Here(0, 2).part(rows) if number else rows)

    balancer.backward(losses(0), batches=[lambda n=n: losses(n) for n in range(1, count + 1)])
    assert_equal(ranks, Outcome().add(network, balancer), 1e-12)


def broken(here: Here, count: int, what: str) -> tuple[str, str, bool]:
    network, step, _ = setting(count)

    def change(number: int, losses: Losses) -> Any:
        if number != count or (here.rank == 0 and what != "missing everywhere"):
            return losses
        if what == "error":
            raise OSError("the disk is full")
        if what == "no mapping":
            return list(losses.values())
        if what == "no graph":
            return {task: loss.detach() for task, loss in losses.items()}
        return {"a": losses["a"], "b": losses["b"]}

    message = message_of(lambda: step(here, change))
    written = any(p.grad is not None for p in network.parameters())
    return message, message_of(lambda: step(here)), written


@COUNTS
@pytest.mark.parametrize(
    ("what", "own"),
    [
        ("error", "OSError: the disk is full"),
        ("no mapping", "must return a mapping from task name to loss, but got list"),
        ("no graph", "the loss of task 'a' must have a graph"),
    ],
)
def test_an_error_of_one_rank_is_told_by_all(two: Pool, count: int, what: str, own: str) -> None:
    first, second = two.run(broken, count, what)
    assert first[0].startswith("RuntimeError: rank 1 stopped with an error in this step")
    assert own in second[0]
    for _, after, written in (first, second):
        assert not written
        assert after == "no error"


@COUNTS
def test_a_task_that_no_rank_has_in_a_batch(two: Pool, count: int) -> None:
    for message, after, written in two.run(broken, count, "missing everywhere"):
        assert f"`batches[{count - 1}]` must return the loss of every task of the step" in message
        assert "but 'c' is missing" in message
        assert not written
        assert after == "no error"


def no_functions(here: Here) -> tuple[str, str]:
    network, step, balancer = setting(1)

    def call() -> None:
        batches = [] if here.rank else [lambda: network.losses(here.part(batch(seed=1)))]
        balancer.backward(network.losses(here.part(batch())), batches=batches)

    return message_of(call), message_of(lambda: step(here))


def test_functions_missing_on_one_rank(two: Pool) -> None:
    first, second = two.run(no_functions)
    assert first[0].startswith("RuntimeError: rank 1 stopped with an error")
    assert second[0].startswith("ValueError: `batches` must be 1 or 2 functions with MoDo")
    assert first[1] == second[1] == "no error"


def not_finite(
    here: Here, count: int, policy: str, what: str, where: str = "last"
) -> tuple[str, Outcome]:
    network, step, balancer = setting(count, nonfinite=policy)
    outcome = Outcome()

    def change(number: int, losses: Losses) -> Losses:
        here_too = where == "everywhere" or here.rank == here.size - 1
        return spoiled(losses, network, what) if number == count and here_too else losses

    message = message_of(lambda: outcome.records.append(step(here, change).as_dict()))
    return message, outcome.add(network, balancer)


@COUNTS
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("policy", ["raise", "drop", "skip"])
@pytest.mark.parametrize("where", ["last", "everywhere"])
def test_ranks_agree_on_what_is_not_finite(
    two: Pool, count: int, policy: str, what: str, where: str
) -> None:
    ranks = two.run(not_finite, count, policy, what, where)
    alone = not_finite(ALONE, count, policy, what)
    assert_equal([outcome for _, outcome in ranks], alone[1], 1e-12)
    for message, _ in ranks:
        assert message == alone[0]
        assert ("FloatingPointError" in message) == (policy == "raise")


# --- sharded parameters ---------------------------------------------------------------------------

needs_fsdp2 = pytest.mark.skipif(
    not has_fsdp2, reason="this torch has no torch.distributed.fsdp.fully_shard"
)


def train_sharded(here: Here, options: dict[str, Any], heads: str = "with the rest") -> Outcome:
    return train(here, "modo", wrap=Sharding(heads), gamma=0.01, **options)


@needs_fsdp2
@pytest.mark.parametrize("heads", ["with the rest", "each on its own", "not at all"])
@pytest.mark.parametrize("options", [{"further": 1}, {"further": 2}, {"further": 2, "micro": 2}])
def test_sharded_parameters(two: Pool, heads: str, options: dict[str, int]) -> None:
    """Products are those of whole rows, wherever the graph of the losses is when they are made."""
    ranks = two.run(train_sharded, options, heads)
    same_everywhere(ranks)
    assert_equal(ranks, train_sharded(ALONE, options), 1e-11)
