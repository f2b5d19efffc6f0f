"""Parameters that are sharded over the ranks (``fully_shard``): rows stay shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from mtbalance import PAPER_COMBINATIONS, Balancer, GradientStrategy, make_balancer
from mtbalance.gradient import CAGrad, GradDrop, Normalized, Sum
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, RankError, has_fsdp2
from tests.distributed.runs import (
    CATALOGUE,
    CHOICES,
    Outcome,
    Whole,
    assert_equal,
    same_everywhere,
    train,
)
from tests.distributed.test_errors import message_of
from tests.test_state import assert_equal_states

pytestmark = pytest.mark.skipif(
    not has_fsdp2, reason="this torch has no torch.distributed.fsdp.fully_shard"
)


class Sharding:
    """A wrapper that shards a model where there is more than one process.

    Args:
        heads: How the heads are sharded: with the rest, each on its own, or not at all.
        reshard: Whether whole parameters are let go between forward and backward pass.
        mesh: Shape of the mesh of processes: of one number, or copies times shards.
    """

    def __init__(
        self,
        heads: str = "with the rest",
        *,
        reshard: bool = True,
        mesh: tuple[int, ...] | None = None,
    ) -> None:
        self.heads = heads
        self.reshard = reshard
        self.mesh = mesh

    def __call__(self, model: nn.Module) -> nn.Module:
        if not dist.is_initialized():
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = self.mesh or (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": self.reshard}
        network = model.network
        for layer in (network.trunk[0], network.trunk[3]):
            fully_shard(layer, **options)
        if self.heads == "each on its own":
            for head in network.heads.values():
                fully_shard(head, **options)
        if self.heads == "not at all":
            fully_shard(network.trunk, **options)
        else:
            fully_shard(model, **options)
        return model


def train_sharded(
    here: Here, names: tuple[str, ...], sharding: Sharding, options: dict[str, Any]
) -> dict[str, Outcome]:
    return {name: train(here, name, wrap=sharding, **options) for name in names}


def assert_all_equal(
    pool: Pool,
    sharding: Sharding,
    names: tuple[str, ...] = PAPER_COMBINATIONS,
    tolerance: float = 1e-12,
    **options: Any,
) -> None:
    ranks = pool.run(train_sharded, names, sharding, options)
    alone = train_sharded(ALONE, names, sharding, options)
    for name in names:
        outcomes = [outcomes[name] for outcomes in ranks]
        assert_equal(outcomes, alone[name], tolerance, name)
        same_everywhere(outcomes)


HEADS = ["with the rest", "each on its own", "not at all"]
FEW = ("naive", "uncert+graddrop", "dwa+cagrad", "autol+pcgrad")


@pytest.mark.parametrize("heads", HEADS)
def test_every_pair_trains_as_one_process_would(two: Pool, heads: str) -> None:
    """The trunk has an odd number of rows, and a head one: shards are uneven, or empty."""
    assert_all_equal(two, Sharding(heads))


def test_the_rest_of_the_catalogue(two: Pool) -> None:
    assert_all_equal(two, Sharding(), CATALOGUE, 1e-11, **CHOICES)


@pytest.mark.parametrize("heads", HEADS)
def test_whole_parameters_kept_between_the_passes(two: Pool, heads: str) -> None:
    assert_all_equal(two, Sharding(heads, reshard=False), FEW)


@pytest.mark.parametrize("heads", HEADS)
def test_micro_batches(two: Pool, heads: str) -> None:
    assert_all_equal(two, Sharding(heads), FEW, micro=2)


@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["four shards", "two copies of two shards"])
def test_four_ranks(four: Pool, mesh: tuple[int, ...]) -> None:
    """6 and 5 rows over four ranks: 2, 2, 2 and none; 2, 2, 1 and none."""
    assert_all_equal(four, Sharding(mesh=mesh), FEW)


# --- what is held, and where ---------------------------------------------------------------------


def sharded(
    strategy: GradientStrategy, *, sharding: Sharding | None = None, **options: Any
) -> tuple[nn.Module, Balancer]:
    torch.manual_seed(0)
    model = (sharding or Sharding())(Whole(Network()))
    options.setdefault("shared", model.network.trunk)
    return model, Balancer(Equal(), strategy, tasks=TASKS, **options)


def directions(here: Here, make: Callable[[], GradientStrategy]) -> list[Tensor]:
    model, balancer = sharded(Normalized(make()))
    balancer.backward(model(here.part(batch())))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


@pytest.mark.parametrize("make", [Sum, CAGrad, GradDrop])
def test_lengths_are_those_of_whole_rows(two: Pool, make: type[GradientStrategy]) -> None:
    alone = directions(ALONE, make)
    for rank in two.run(directions, make):
        for found, expected in zip(rank, alone, strict=True):
            assert_close(found, expected, rtol=1e-4, atol=1e-6)


def rows_held(here: Here, strategy: type[GradientStrategy]) -> tuple[list[int], list[int]]:
    """Return the number of entries of each task's row, and of this rank's parameters."""
    model, balancer = sharded(strategy())
    balancer.accumulate(model(here.part(batch())))
    pending = balancer._pending
    leaves = list(pending.leaves.values())
    rows = pending.rows(TASKS, leaves)
    assert all(not hasattr(t, "full_tensor") for row in rows for t in row if t is not None)
    held = [sum(p.to_local().numel() for p in model.network.trunk.parameters())] * len(TASKS)
    for number, head in enumerate(model.network.heads.values()):
        held[number] += sum(p.to_local().numel() for p in head.parameters())
    balancer.apply()
    for parameter in model.parameters():
        assert type(parameter.grad) is type(parameter), "a shard on every rank, empty ones too"
        assert parameter.grad.placements == parameter.placements
        assert parameter.grad.to_local().shape == parameter.to_local().shape
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # collective
    assert float(norm.full_tensor()) > 0
    return [sum(t.numel() for t in row if t is not None) for row in rows], held


@pytest.mark.parametrize("strategy", [GradDrop, CAGrad])
def test_rows_hold_shards_only(four: Pool, strategy: type[GradientStrategy]) -> None:
    """Each rank holds its share of every row; together they hold the rows."""
    ranks = four.run(rows_held, strategy)
    for rows, held in ranks:
        assert rows == held
    whole = sum(p.numel() for p in Network().trunk.parameters()) + 5 + 1
    assert [sum(rows[task] for rows, _ in ranks) for task in range(3)] == [whole] * 3


def micro_batch_given_up(here: Here, what: str) -> tuple[str, int]:
    """Return the error of a micro-batch that is spoiled on the last rank, and what is pending."""
    model, balancer = sharded(CAGrad())
    balancer.accumulate(model(here.part(batch())))
    losses = model(here.part(batch()))
    if here.rank == here.size - 1:
        losses["b"] = losses["b"].detach() if what == "graph" else losses["b"] * torch.nan
    try:
        balancer.accumulate(losses)
    except (FloatingPointError, RuntimeError, ValueError) as error:
        return str(error), len(balancer._pending.losses)
    raise AssertionError("no error")


def test_an_error_in_a_micro_batch(two: Pool) -> None:
    """Here the ranks meet in each: all know of it, and end the step or keep what they had."""
    for message, pending in two.run(micro_batch_given_up, "loss"):
        assert "the loss of task 'b' must be finite" in message
        assert message.endswith("discarded, as the step is over.")
        assert pending == 0
    for message, pending in two.run(micro_batch_given_up, "graph"):
        assert message.endswith("is kept; balancer.discard() drops it.")
        assert pending == len(TASKS)


# --- tasks that are absent -----------------------------------------------------------------------


def with_absent(here: Here, name: str, schedule: list[tuple[str, ...]]) -> Outcome:
    torch.manual_seed(0)
    model = Sharding()(Whole(Network()))
    balancer = make_balancer(name, tasks=TASKS, shared=model.network.trunk)
    outcome = Outcome()
    for step, present in enumerate(schedule):
        model.zero_grad()
        losses = model(here.part(batch(seed=step)))
        record = balancer.backward({task: losses[task] for task in present})
        outcome.records.append(record.as_dict())
        outcome.add(model, balancer, f"step {step}: ")
    return outcome


@pytest.mark.parametrize("name", FEW[:3])
def test_a_task_that_is_absent_on_all_ranks(two: Pool, name: str) -> None:
    schedule = [("a", "c"), ("b",), TASKS]
    assert_equal(two.run(with_absent, name, schedule), with_absent(ALONE, name, schedule), 1e-12)


def absent_here(here: Here, name: str) -> tuple[str, str]:
    model, _ = sharded(CAGrad())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = make_balancer(name, tasks=TASKS, shared=model.network.trunk, optimizer=optimizer)

    def step(without: tuple[str, ...]) -> None:
        losses = model(here.part(batch()))
        balancer.backward(
            {task: loss for task, loss in losses.items() if task not in without},
            validation=lambda: model(here.part(batch(seed=1))),
        )

    return message_of(lambda: step(("b",) if here.rank else ())), message_of(lambda: step(()))


@pytest.mark.parametrize("name", FEW)
def test_a_task_that_is_absent_on_one_rank_is_refused_by_all(two: Pool, name: str) -> None:
    for message, after in two.run(absent_here, name):
        assert message.startswith("ValueError: all ranks must have a loss of task 'b' where")
        assert "1 of 2 have" in message
        assert after == "no error"


def bad_loss_here(here: Here, policy: str) -> tuple[str, Outcome]:
    torch.manual_seed(0)
    model = Sharding()(Whole(Network()))
    balancer = make_balancer(
        "uncert+pcgrad", tasks=TASKS, shared=model.network.trunk, nonfinite=policy
    )

    def step() -> None:
        losses = model(here.part(batch()))
        if here.rank == here.size - 1:
            losses["b"] = losses["b"] * float("nan")
        balancer.backward(losses)

    message = message_of(step)
    outcome = Outcome().add(model, balancer)
    balancer.backward(model(here.part(batch())))
    return message, outcome.add(model, balancer, "after: ")


@pytest.mark.parametrize("policy", ["raise", "drop", "skip"])
def test_a_loss_that_is_not_finite_on_one_rank(two: Pool, policy: str) -> None:
    expected, alone = bad_loss_here(ALONE, policy)
    for message, outcome in two.run(bad_loss_here, policy):
        assert message == expected
        assert_equal([outcome], alone, 1e-12)


def bad_gradient_here(here: Here, policy: str, strategy: str) -> tuple[str, Outcome]:
    torch.manual_seed(0)
    model = Sharding()(Whole(Network()))
    balancer = make_balancer(strategy, tasks=TASKS, shared=model.network.trunk, nonfinite=policy)

    def step() -> None:
        losses = model(here.part(batch()))
        if here.rank == here.size - 1:
            losses["b"] = losses["b"] + (losses["b"] - losses["b"].detach()).abs().sqrt()
        balancer.backward(losses)

    return message_of(step), Outcome().add(model, balancer)


@pytest.mark.parametrize("policy", ["raise", "drop", "skip"])
def test_a_gradient_that_is_not_finite_on_one_rank(two: Pool, policy: str) -> None:
    for strategy in ("naive", "graddrop", "cagrad"):
        expected, alone = bad_gradient_here(ALONE, policy, strategy)
        for message, outcome in two.run(bad_gradient_here, policy, strategy):
            assert message == expected
            assert_equal([outcome], alone, 1e-12)


# --- what does not go with sharding --------------------------------------------------------------


class WholeRows(GradientStrategy):
    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0)


def with_every(here: Here) -> None:
    sharded(CAGrad(), every=2)


def with_features(here: Here) -> None:
    model, balancer = sharded(CAGrad())
    losses = model(here.part(batch()))
    balancer.backward(losses, features=torch.ones(2, requires_grad=True) * 2)


def with_whole_rows(here: Here) -> None:
    model, balancer = sharded(WholeRows())
    balancer.backward(model(here.part(batch())))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_every, "`every` must be 1 with sharded parameters, but got 2"),
        (with_features, "`features` must be None with sharded parameters"),
        (with_whole_rows, "must be coordinatewise or a GramianStrategy for sharded parameters"),
    ],
)
def test_options_that_do_not_go_with_sharding(
    two: Pool, function: Callable[[Here], None], message: str
) -> None:
    with pytest.raises(RankError) as caught:
        two.run(function)
    assert str(caught.value).count(message) == 2


# --- saving --------------------------------------------------------------------------------------


def resume(here: Here, names: tuple[str, ...]) -> None:
    for name in names:
        straight = _Run(name)
        straight.train(here, 0, 6)
        first = _Run(name)
        first.train(here, 0, 3)
        second = _Run(name)
        second.load(first.state())
        second.train(here, 3, 6)
        assert_equal_states(second.state(), straight.state())


class _Run:
    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = Sharding()(Whole(Network()))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.balancer = make_balancer(
            name, tasks=TASKS, shared=self.model.network.trunk, optimizer=self.optimizer
        )
        if learned := list(self.balancer.parameters()):
            self.optimizer.add_param_group({"params": learned, "lr": 0.01})

    def train(self, here: Here, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.optimizer.zero_grad()
            rows = here.part(batch(seed=100 + step))
            self.balancer.backward(
                self.model(here.part(batch(seed=step))), validation=lambda r=rows: self.model(r)
            )
            self.optimizer.step()
            if step % 2:
                self.balancer.end_epoch()

    def state(self) -> dict[str, Any]:
        """Return this rank's shards as ordinary tensors, and what the balancer holds."""
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]
        return {
            "model": [p.detach().to_local().clone() for p in self.model.parameters()],
            "momentum": [m.to_local().clone() for m in momentum],
            "balancer": {k: v.clone() for k, v in self.balancer.state_dict().items()},
            "learned": [
                self.optimizer.state[p]["momentum_buffer"].clone()
                for p in self.balancer.parameters()
            ],
        }

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), state["model"], strict=True):
                parameter.to_local().copy_(value)
                buffer = torch.zeros_like(parameter)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
            for parameter, value in zip(self.model.parameters(), state["momentum"], strict=True):
                self.optimizer.state[parameter]["momentum_buffer"].to_local().copy_(value)
        self.balancer.load_state_dict(state["balancer"])
        for parameter, value in zip(self.balancer.parameters(), state["learned"], strict=True):
            self.optimizer.state[parameter]["momentum_buffer"] = value.clone()


def test_resume_is_bit_for_bit(two: Pool) -> None:
    two.run(resume, PAPER_COMBINATIONS)


# --- models in pieces, and one process -----------------------------------------------------------


def heads_elsewhere(here: Here, name: str, shard_heads: bool) -> Outcome:
    """Trunk and heads are in no common module."""
    torch.manual_seed(0)
    network = Network()
    trunk, heads = network.trunk, dict(network.heads.items())
    del network
    if here.size > 1:
        from torch.distributed.fsdp import fully_shard

        for module in [trunk, *(heads.values() if shard_heads else ())]:
            fully_shard(module)
    balancer = make_balancer(name, tasks=TASKS, shared=trunk)
    for step in range(2):
        hidden = trunk(here.part(batch(seed=step)))
        losses = {
            task: (head(hidden) - number).square().mean() * (-2.0) ** number
            for number, (task, head) in enumerate(heads.items())
        }
        balancer.backward(losses)
    outcome = Outcome()
    for name_of, module in {"trunk": trunk, **heads}.items():
        outcome.add(module, balancer, name_of)
    return outcome


@pytest.mark.parametrize("shard_heads", [False, True])
@pytest.mark.parametrize("name", ["naive", "uncert", "uncert+pcgrad"])
def test_heads_in_no_common_module(two: Pool, name: str, shard_heads: bool) -> None:
    alone = heads_elsewhere(ALONE, name, shard_heads)
    assert_equal(two.run(heads_elsewhere, name, shard_heads), alone, 1e-12)


def one_shard(here: Here) -> dict[str, Outcome]:
    """Each rank is alone in a mesh, and in a group, of its own."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    groups = [dist.new_group([rank]) for rank in range(here.size)]
    mesh = DeviceMesh.from_group(groups[here.rank], "cpu")

    def wrap(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=mesh)
        return model

    return {name: train(ALONE, name, wrap=wrap, process_group=groups[here.rank]) for name in FEW}


def test_one_shard_is_the_whole(two: Pool) -> None:
    for outcomes in two.run(one_shard):
        for name in FEW:
            assert_equal([outcomes[name]], train(ALONE, name), 1e-12, name)


def sharded_too_late(here: Here) -> str:
    torch.manual_seed(0)
    model = Whole(Network())
    balancer = make_balancer("cagrad", tasks=TASKS, shared=model.network.trunk)
    Sharding()(model)
    with pytest.raises(RuntimeError) as caught:
        balancer.backward(model(here.part(batch())))
    return str(caught.value)


def test_sharded_after_the_balancer_was_made(two: Pool) -> None:
    """Between forward and backward pass the modules hold whole parameters, which get no shards."""
    for message in two.run(sharded_too_late):
        assert "have been sharded since the Balancer was made. Make it after fully_shard" in message
