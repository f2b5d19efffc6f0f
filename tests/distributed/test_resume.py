"""A run of several processes that is saved and resumed equals one that was never interrupted."""

import io
from typing import Any

import pytest
import torch

from mtbalance import PAPER_COMBINATIONS, make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import Here, Pool
from tests.test_state import STEPS, Run, assert_equal_states, saved


class RunOfRank(Run):
    """The run, with dropout and an absent task, on this process's part of the batches."""

    def __init__(self, here: Here, name: str) -> None:
        super().__init__(name)
        self.here = here
        torch.manual_seed(here.rank)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.optimizer.zero_grad()
            losses = self.model.losses(self.here.part(batch(seed=step)))
            if (step + self.here.rank) % 3 == 1:
                del losses["b"]  # on one rank, the other, or none
            rows = self.here.part(batch(seed=100 + step))
            self.balancer.backward(losses, validation=lambda rows=rows: self.model.losses(rows))
            self.optimizer.step()
            if step % 2:  # so that saving falls into the middle of an epoch
                self.balancer.end_epoch()


def resume(here: Here, names: tuple[str, ...], whose: str) -> None:
    """From each rank's own state, or all from the first one's (and their own of dropout)."""
    for name in names:
        straight = RunOfRank(here, name)
        straight.train(0, 2 * STEPS)

        first = RunOfRank(here, name)
        first.train(0, STEPS)
        state = saved(first.state())
        if whose == "the first rank's":
            state = {**received(state), "torch": state["torch"]}
        second = RunOfRank(here, name)
        second.load(state)
        second.train(STEPS, 2 * STEPS)
        assert_equal_states(second.state(), straight.state())


def received(state: dict[str, Any]) -> dict[str, Any]:
    """Return the first rank's state, as from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    held = [file.getvalue()]
    torch.distributed.broadcast_object_list(held, src=0)
    found: dict[str, Any] = torch.load(io.BytesIO(held[0]), weights_only=True)
    return found


@pytest.mark.parametrize("whose", ["each rank's own", "the first rank's"])
def test_resume_is_bit_for_bit(two: Pool, whose: str) -> None:
    two.run(resume, PAPER_COMBINATIONS, whose)


def resume_inferred(here: Here) -> None:
    """Task b is on one rank only before the state is saved, and on none afterwards."""
    gradients = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = Network()
        balancer = make_balancer("cagrad", tasks=TASKS)
        losses = model.losses(here.part(batch()))
        balancer.backward({t: losses[t] for t in TASKS if t != "b" or here.rank})
        if interrupted:
            state = received({"balancer": balancer.state_dict()})
            balancer = make_balancer("cagrad", tasks=TASKS)
            balancer.load_state_dict(state["balancer"])
        model.zero_grad()
        losses = model.losses(here.part(batch(seed=1)))
        balancer.backward({"a": losses["a"]})
        gradients.append({n: p.grad for n, p in model.trunk.named_parameters()})
    assert_equal_states(*gradients)


def test_an_inferred_split_is_resumed(two: Pool) -> None:
    two.run(resume_inferred)


def states(here: Here, name: str) -> dict[str, Any]:
    run = RunOfRank(here, name)
    run.train(0, STEPS)
    return dict(run.balancer.state_dict())


@pytest.mark.parametrize("name", ["dwa+graddrop", "autol+pcgrad"])
def test_all_ranks_have_one_state(two: Pool, name: str) -> None:
    """So it does not matter whose is saved."""
    first, second = two.run(states, name)
    assert_equal_states(first, second)
    assert len(first) > len(TASKS)
