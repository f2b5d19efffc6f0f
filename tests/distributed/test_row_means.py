"""Means of rows over several processes, and over those that hold shards of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtbalance import Balancer
from mtbalance.gradient import (
    GradDrop,
    GradientStrategy,
    Normalized,
    RowMean,
    TrimmedMean,
    UPGrad,
)
from mtbalance.weighting import Constant
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, has_fsdp2
from tests.distributed.runs import Outcome, Whole, assert_equal, same_everywhere
from tests.distributed.test_resume import received
from tests.distributed.test_sharded import Sharding
from tests.test_state import assert_equal_states

MAKE: dict[str, Callable[[], GradientStrategy]] = {
    "upgrad": lambda: RowMean(UPGrad(), 0.8),
    "graddrop": lambda: RowMean(GradDrop(), 0.8, correct=False),
    "trimmed": lambda: RowMean(Normalized(TrimmedMean(1)), 0.8),
    "recall": lambda: RowMean(UPGrad(), 0.8, recall=True),
}
only_sharded = pytest.mark.skipif(
    not has_fsdp2, reason="this torch has no torch.distributed.fsdp.fully_shard"
)


class Training:
    """Some steps, some without a task."""

    def __init__(self, here: Here, name: str, *, sharded: bool, inferred: bool = False) -> None:
        torch.manual_seed(0)
        self.here = here
        self.model: nn.Module = Whole(Network())
        if sharded:
            self.model = Sharding()(self.model)
        self.inferred = inferred
        self.name = name
        self.balancer = self.fresh()
        self.outcome = Outcome()

    def fresh(self) -> Balancer:
        shared = None if self.inferred else self.model.network.trunk
        make = MAKE[self.name]
        return Balancer(Constant([1, 2, 0.5]), make(), tasks=TASKS, shared=shared)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.model.zero_grad()
            losses = self.model(self.here.part(batch(seed=step)))
            if self.name == "recall" and step:
                losses = {TASKS[step % 3]: losses[TASKS[step % 3]]}
            elif step % 3 == 1:
                del losses["b"]
            self.outcome.records.append(self.balancer.backward(losses).as_dict())
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.02)

    def ended(self) -> Outcome:
        return self.outcome.add(self.model, self.balancer)


def train(here: Here, names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Outcome]:
    outcomes = {}
    for name in names:
        run = Training(here, name, **options)
        run.train(0, 6)
        outcomes[name] = run.ended()
    return outcomes


def assert_as_one_process(pool: Pool, names: tuple[str, ...], **options: Any) -> None:
    ranks: list[Any] = pool.run(train, names, options)
    alone = train(ALONE, names, options)
    for name in names:
        outcomes = [outcomes[name] for outcomes in ranks]
        assert_equal(outcomes, alone[name], 1e-11, name)
        same_everywhere(outcomes)


@pytest.mark.parametrize("inferred", [True, False])
def test_two_processes(two: Pool, inferred: bool) -> None:
    assert_as_one_process(two, tuple(MAKE), sharded=False, inferred=inferred)


@only_sharded
def test_two_processes_with_shards(two: Pool) -> None:
    """Uneven ones: 6 and 5 rows."""
    assert_as_one_process(two, tuple(MAKE), sharded=True)


@only_sharded
def test_four_processes_with_shards(four: Pool) -> None:
    """Some of which hold nothing of a parameter."""
    assert_as_one_process(four, ("upgrad", "trimmed"), sharded=True)


def state_of(balancer: Balancer) -> dict[str, Tensor]:
    state = balancer.gradient.state_dict()
    return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in state.items()}


def resume(here: Here, name: str, sharded: bool) -> None:
    """From the first rank's state, or from each one's shards."""
    ends = []
    for interrupted in (False, True):
        run = Training(here, name, sharded=sharded)
        run.train(0, 4)
        if interrupted:
            state = dict(run.balancer.state_dict())
            run.balancer = run.fresh()
            run.balancer.load_state_dict(state if sharded else received(state))
        run.train(4, 8)
        values = {key: value.clone() for key, value in run.ended().values.items()}
        ends.append({"model": values, "gradient": state_of(run.balancer)})
    assert_equal_states(*ends)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=only_sharded)])
def test_resume_is_bit_for_bit(two: Pool, name: str, sharded: bool) -> None:
    two.run(resume, name, sharded)


def checkpointed(here: Here, folder: str, as_module: bool) -> None:
    """Through a distributed checkpoint, into a Balancer that has made no step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def held(balancer: Balancer) -> Any:
        if as_module:  # where a model holds its Balancer
            return get_model_state_dict(nn.ModuleDict({"balancer": balancer}))
        return dict(balancer.state_dict())

    ends = []
    for interrupted in (False, True):
        run = Training(here, "upgrad", sharded=True)
        run.train(0, 4)
        if interrupted:
            dcp.save(held(run.balancer), checkpoint_id=folder)
            run.balancer = run.fresh()
            state = held(run.balancer)
            dcp.load(state, checkpoint_id=folder)
            if as_module:
                set_model_state_dict(nn.ModuleDict({"balancer": run.balancer}), state)
            else:
                run.balancer.load_state_dict(state)
        run.train(4, 6)
        ends.append({"model": run.ended().values, "gradient": state_of(run.balancer)})
    assert_equal_states(*ends)


@only_sharded
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_module", [True, False])
def test_distributed_checkpoints(two: Pool, tmp_path: Path, as_module: bool) -> None:
    two.run(checkpointed, str(tmp_path), as_module)


def refused(here: Here) -> str:
    """The state of one process is none for shards."""
    run = Training(here, "upgrad", sharded=True)
    whole = Training(ALONE, "upgrad", sharded=False)
    whole.balancer.process_group = None
    state = dict(run.balancer.state_dict())
    state = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in state.items()
    }
    try:
        run.balancer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


@only_sharded
def test_whole_means_are_refused_where_parameters_are_sharded(two: Pool) -> None:
    for message in two.run(refused):
        assert "must be spread over processes as the parameters are" in message
