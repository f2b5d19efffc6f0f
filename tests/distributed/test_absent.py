"""Tasks, and parameters in use, that differ between ranks.

A task's loss and gradient are the means over the ranks that have it: what one process would get
that holds all parts of the batch, some of them without labels for the task.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtbalance import PAPER_COMBINATIONS, Balancer, make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, RankError
from tests.distributed.runs import CATALOGUE, CHOICES, Outcome, assert_equal, same_everywhere

Has = tuple[tuple[str, ...], ...]
"""The tasks that each rank has in a step."""

SCHEDULES: dict[str, list[Has]] = {
    "absent on the second rank, from the first step": [(TASKS, ("a", "c"))] * 2,
    "absent on the first rank, from the first step": [(("b",), TASKS)] * 2,
    "ranks with nothing in common": [(("a",), ("b", "c"))] * 2,
    "alternating": [(TASKS, ("a",)), (("b", "c"), TASKS), (("c",), ("a", "b"))],
    "absent on all ranks, then on one": [(("a", "b"), ("a", "b")), (("c",), TASKS)],
    "a rank without any loss": [((), TASKS), (("a", "b"), ()), (TASKS, TASKS)],
}


class Adapted(Network):
    """Part of the batch decides which of two adapters its rows go through."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList([nn.Linear(5, 5).double() for _ in range(2)])
        self.never = nn.Linear(5, 5).double()

    def losses_of_part(self, rows: Tensor, part: int) -> dict[str, Tensor]:
        hidden = self.adapters[part](self.trunk(rows)).tanh()
        return {t: (head(hidden) - 1).square().mean() for t, head in self.heads.items()}


class Parts(nn.Module):
    """Losses of this process's part of the batch, of which each rank has some.

    One process has all parts, and of each loss the mean over the parts that have it.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, here: Here, rows: Tensor, has: Has) -> dict[str, Tensor]:
        parts = rows.chunk(len(has))
        mine = range(len(has)) if here.size == 1 else [here.rank]
        losses = {part: self._losses(parts[part], part) for part in mine}
        return {
            task: torch.stack([losses[part][task] for part in mine if task in has[part]]).mean()
            for task in TASKS
            if any(task in has[part] for part in mine)
        }

    def _losses(self, rows: Tensor, part: int) -> dict[str, Tensor]:
        if isinstance(self.network, Adapted):
            return self.network.losses_of_part(rows, part)
        return self.network.losses(rows)


def take_part(
    here: Here,
    name: str,
    schedule: list[Has],
    make: Callable[[], Network] = Network,
    *,
    wrapped: bool = False,
    inferred: bool = False,
    **options: Any,
) -> Outcome:
    torch.manual_seed(0)
    network = make()
    model: nn.Module = Parts(network)
    if wrapped and here.size > 1:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    shared = [network.trunk, *getattr(network, "adapters", ())]
    balancer = make_balancer(
        name, tasks=TASKS, shared=None if inferred else shared, optimizer=optimizer, **options
    )
    if learned := list(balancer.parameters()):
        optimizer.add_param_group({"params": learned, "lr": 0.01})
    further = max(balancer.gradient.further_batches, default=0)
    outcome = Outcome()
    for step, has in enumerate(schedule):
        optimizer.zero_grad()

        def losses_of(seed: int, has: Has = has) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = model(here, batch(8, seed=seed), has)
            return losses

        record = balancer.backward(
            losses_of(step),
            validation=partial(losses_of, 100 + step),
            batches=[partial(losses_of, 200 + 3 * step + n) for n in range(further)],
        )
        outcome.records.append(record.as_dict())
        optimizer.step()
        balancer.after_step(partial(losses_of, step))
        outcome.add(network, balancer, f"step {step}: ")  # heads of absent tasks, too
    return outcome


def take_part_in_all(
    here: Here, names: Sequence[str], schedule: list[Has], options: dict[str, Any]
) -> dict[str, Outcome]:
    with warnings.catch_warnings():  # two tasks are too few for Krum, which says so
        warnings.filterwarnings("ignore", "Krum fell back", RuntimeWarning)
        return {name: take_part(here, name, schedule, **options) for name in names}


def assert_all_equal(
    two: Pool,
    schedule: list[Has],
    names: Sequence[str] = PAPER_COMBINATIONS,
    tolerance: float = 1e-12,
    **options: Any,
) -> dict[str, Outcome]:
    ranks = two.run(take_part_in_all, names, schedule, options)
    alone = take_part_in_all(ALONE, names, schedule, options)
    for name in names:
        outcomes = [outcomes[name] for outcomes in ranks]
        assert_equal(outcomes, alone[name], tolerance, name)
        same_everywhere(outcomes)
    return alone


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_absent_tasks(two: Pool, schedule: list[Has]) -> None:
    """Every gradient, heads that a rank has never seen included, on every rank."""
    assert_all_equal(two, schedule)


@pytest.mark.parametrize("schedule", ["alternating", "a rank without any loss"])
def test_absent_tasks_of_the_rest_of_the_catalogue(two: Pool, schedule: str) -> None:
    assert_all_equal(two, SCHEDULES[schedule], CATALOGUE, 1e-11, lr=0.01, **CHOICES)


def test_absent_tasks_inside_ddp(two: Pool) -> None:
    assert_all_equal(two, SCHEDULES["alternating"], wrapped=True)


def test_absent_tasks_with_inferred_sharing(two: Pool) -> None:
    """Each rank alone would infer something else in the first step."""
    schedule = [(("a", "b"), ("a", "c")), (("a",), ("b", "c"))]
    assert_all_equal(two, schedule, inferred=True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameters_in_use_differ(two: Pool, wrapped: bool) -> None:
    """One adapter per rank; what nobody reaches, ever or in a step, has no gradient."""
    schedule = [(TASKS, TASKS), (("a",), ("b", "c")), (TASKS, ())]
    alone = assert_all_equal(two, schedule, make=Adapted, wrapped=wrapped)
    for outcome in alone.values():
        assert outcome.gradients["step 1: never.weight"] is None
        assert outcome.gradients["step 0: adapters.1.weight"] is not None
        assert outcome.gradients["step 2: adapters.1.weight"] is None


def test_dropped_tasks_are_absent_everywhere_when_sharing_is_inferred(two: Pool) -> None:
    """A loss that is not finite on one rank tells no rank what is shared."""
    outcomes = two.run(drop_in_the_first_step)
    alone = drop_in_the_first_step(ALONE)
    assert_equal(outcomes, alone, 1e-12)


def drop_in_the_first_step(here: Here) -> Outcome:
    """One task is left, which reaches parameters that nobody shares with it: its own row."""
    torch.manual_seed(0)
    network = Network()
    balancer = make_balancer("cagrad", tasks=TASKS, nonfinite="drop")
    losses = Parts(network)(here, batch(), (("a", "b"), ("a",)))
    if "b" in losses:
        losses["b"] = losses["b"] * float("nan")
    balancer.backward(losses)
    return Outcome().add(network, balancer)


# --- models in pieces ----------------------------------------------------------------------------


def in_pieces(here: Here, schedule: list[Has], shared: bool) -> Outcome:
    """Trunk and heads are in no common module, and the heads look alike."""
    torch.manual_seed(0)
    network = Network()
    trunk, heads = network.trunk, dict(network.heads.items())
    del network
    balancer = make_balancer("cagrad", tasks=TASKS, shared=trunk if shared else None)
    for step, has in enumerate(schedule):
        parts = batch(8, seed=step).chunk(2)
        mine = range(2) if here.size == 1 else [here.rank]
        losses = {
            task: torch.stack(
                [
                    (head(trunk(parts[part])) - number).square().mean()
                    for part in mine
                    if task in has[part]
                ]
            ).mean()
            for number, (task, head) in enumerate(heads.items())
            if any(task in has[part] for part in mine)
        }
        balancer.backward(losses)
    outcome = Outcome()
    for name, module in {"trunk": trunk, **heads}.items():
        outcome.add(module, balancer, name)
    return outcome


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_in_pieces_works_once_every_rank_has_seen_its_tasks(
    two: Pool, shared: bool
) -> None:
    schedule = [(TASKS, TASKS), (("a",), ("b", "c")), (("b",), ())]
    assert_equal(two.run(in_pieces, schedule, shared), in_pieces(ALONE, schedule, shared), 1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_in_pieces_that_ranks_cannot_tell_apart_is_refused(two: Pool, shared: bool) -> None:
    """Heads have equal names and shapes: adding up those of different tasks would be silent."""
    with pytest.raises(RankError, match="as one module that holds the shared parameters") as caught:
        two.run(in_pieces, [(("a",), ("b",))], shared)
    assert str(caught.value).count("all ranks must hold the same parameters") == 2


class OfOneTask(nn.Module):
    """The shared trunk and a head."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(5, 1).double()

    def forward(self, rows: Tensor) -> Tensor:
        loss: Tensor = self.head(self.trunk(rows)).square().mean()
        return loss


def a_model_per_task(here: Here) -> None:
    """Made in another order on each rank."""
    trunk = Network().trunk
    order = TASKS if here.rank else TASKS[::-1]
    models = {task: OfOneTask(trunk) for task in order}
    balancer = make_balancer("pcgrad", tasks=TASKS, shared=trunk)
    balancer.backward({order[-1]: models[order[-1]](batch())})


def test_models_of_one_class_are_not_taken_for_each_other(two: Pool) -> None:
    with pytest.raises(RankError, match="all ranks must hold the same parameters"):
        two.run(a_model_per_task)


def bare_parameters(here: Here, has: Has) -> Outcome:
    """Parameters in no module at all."""
    theta, *scales = (nn.Parameter(torch.ones(3).double() * n) for n in range(1, 5))
    balancer = Balancer(*_equal_and_cagrad(), tasks=TASKS, shared=[theta])
    mine = range(2) if here.size == 1 else [here.rank]
    rows = batch(6, seed=1)[:, :3].chunk(2)
    balancer.backward(
        {
            task: torch.stack(
                [
                    (scale * theta * rows[part]).square().sum() * (number - 1.5)
                    for part in mine
                    if task in has[part]
                ]
            ).mean()
            for number, (task, scale) in enumerate(zip(TASKS, scales, strict=True))
            if any(task in has[part] for part in mine)
        }
    )
    holder = nn.ParameterList([theta, *scales])
    return Outcome().add(holder, balancer)


def _equal_and_cagrad() -> tuple[Any, Any]:
    from mtbalance.gradient import CAGrad
    from mtbalance.weighting import Equal

    return Equal(), CAGrad()


def test_bare_parameters(two: Pool) -> None:
    has = (TASKS, TASKS)
    assert_equal(two.run(bare_parameters, has), bare_parameters(ALONE, has), 1e-12)


def test_bare_parameters_that_ranks_cannot_tell_apart_are_refused(two: Pool) -> None:
    with pytest.raises(RankError, match="all ranks must hold the same parameters"):
        two.run(bare_parameters, (("a",), ("b",)))


def wrapped_on_one_rank(here: Here) -> Outcome:
    """What one rank wraps around the model, to export it, say, changes no name."""
    torch.manual_seed(0)
    network = Network()
    exporter = nn.Sequential(network, nn.Linear(2, 2)) if here.rank == 1 else None
    balancer = make_balancer("pcgrad", tasks=TASKS, shared=network.trunk)
    balancer.backward(Parts(network)(here, batch(), (("a",), ("b",))))
    del exporter
    return Outcome().add(network, balancer)


def test_what_one_rank_wraps_around_the_model_changes_nothing(two: Pool) -> None:
    assert_equal(two.run(wrapped_on_one_rank), wrapped_on_one_rank(ALONE), 1e-12)


def nothing(here: Here, name: str) -> None:
    del here
    network = Network()
    balancer = make_balancer(name, tasks=TASKS, shared=network.trunk)
    record = balancer.backward({})
    assert record.tasks == ()
    assert record.absent == TASKS
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["naive", "uncert", "cagrad"])
def test_a_step_in_which_no_rank_has_a_loss(two: Pool, name: str) -> None:
    """One process and several do the same, so that one loop serves both."""
    two.run(nothing, name)
    nothing(ALONE, name)
