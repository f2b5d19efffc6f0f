"""A warm-up in several processes: what one process does with the whole batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtbalance import Balancer
from mtbalance.gradient import CAGrad, Sum
from mtbalance.weighting import DWA, FAMO, AutoLambda, Uncertainty, WarmUp, Weighting
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.runs import Outcome, assert_equal, same_everywhere
from tests.distributed.test_errors import message_of

WRAPPED: dict[str, Callable[[torch.optim.Optimizer], Weighting]] = {
    "DWA": lambda _: DWA(),
    "Uncertainty": lambda _: Uncertainty(),
    "AutoLambda": lambda optimizer: AutoLambda(optimizer, lr=0.1),
    "FAMO": lambda _: FAMO(lr=0.5),
}


def train(here: Here, name: str, gradient: type) -> Outcome:
    """Two epochs of two steps, the first with equal weights, and a step more."""
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    weighting = WarmUp(WRAPPED[name](optimizer), epochs=1)
    balancer = Balancer(weighting, gradient(), tasks=TASKS, shared=model.trunk)
    if learned := list(balancer.parameters()):
        optimizer.add_param_group({"params": learned})
    outcome = Outcome()

    def losses(seed: int) -> dict[str, Tensor]:
        return model.losses(here.part(batch(seed=seed)))

    for seed in range(5):
        optimizer.zero_grad()
        record = balancer.backward(losses(seed), validation=lambda seed=seed: losses(50 + seed))
        outcome.records.append(record.as_dict())
        optimizer.step()
        balancer.after_step(lambda seed=seed: losses(seed))
        if seed % 2:
            balancer.end_epoch()
    return outcome.add(model, balancer)


@pytest.mark.parametrize("gradient", [Sum, CAGrad])
@pytest.mark.parametrize("name", WRAPPED)
def test_trains_as_one_process_would(two: Pool, name: str, gradient: type) -> None:
    ranks, alone = two.run(train, name, gradient), train(ALONE, name, gradient)
    assert_equal(ranks, alone, 1e-11, name)
    same_everywhere(ranks)
    weights = [[record[f"weight/{task}"] for task in TASKS] for record in alone.records]
    assert weights[:2] == [[1, 1, 1]] * 2
    assert weights[4] != [1, 1, 1]


def one_rank_resets(here: Here, what: str) -> str:
    torch.manual_seed(0)
    model = Network()
    balancer = Balancer(WarmUp(DWA(), epochs=1), Sum(), tasks=TASKS, shared=model.trunk)
    rows = here.part(batch())
    balancer.backward(model.losses(rows))
    if here.rank == 1:
        weighting = balancer.weighting
        {"epoch": balancer.end_epoch, "wrapped": weighting.weighting.reset}[what]()
    return message_of(lambda: balancer.backward(model.losses(rows)))


@pytest.mark.parametrize("what", ["epoch", "wrapped"])
def test_what_one_rank_does_alone_is_told(two: Pool, what: str) -> None:
    for message in two.run(one_rank_resets, what):
        assert message.startswith("ValueError: all ranks must call")
