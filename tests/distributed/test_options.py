"""What else a Balancer can do, by several processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtbalance import Balancer, GradientStrategy, make_balancer
from mtbalance.gradient import CAGrad
from mtbalance.weighting import Equal
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool, RankError
from tests.distributed.runs import Outcome, assert_equal, ddp, plain, same_everywhere, train
from tests.distributed.test_absent import Has, Parts

NAMES = ["naive", "uncert+graddrop", "dwa+pcgrad", "autol+cagrad"]


# --- groups of parameters and of processes -------------------------------------------------------


def in_groups(here: Here, name: str, wrapped: bool) -> Outcome:
    """Each half of the trunk is balanced on its own."""
    torch.manual_seed(0)
    network = Network()
    model = Parts(network)
    wrap = ddp() if wrapped else plain
    call = wrap(model)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    groups = {"first": network.trunk[0], "second": network.trunk[3]}
    balancer = make_balancer(name, tasks=TASKS, shared=groups, optimizer=optimizer)
    has: Has = (TASKS, TASKS)
    record = balancer.backward(
        call(here, batch(), has), validation=lambda: call(here, batch(seed=1), has)
    )
    return Outcome(records=[record.as_dict()]).add(network, balancer)


@pytest.mark.parametrize("wrapped", [False, True])
def test_groups_of_shared_parameters(two: Pool, wrapped: bool) -> None:
    for name in NAMES:
        ranks = two.run(in_groups, name, wrapped)
        assert_equal(ranks, in_groups(ALONE, name, False), 1e-12, name)


def changing(here: Here, name: str, wrapped: bool) -> Outcome:
    """The trunk gets new layers, in other order of names, between steps."""
    torch.manual_seed(0)
    network = Network()
    wrap = ddp() if wrapped else plain
    has: Has = (TASKS, TASKS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    balancer = make_balancer(name, tasks=TASKS, shared=network.trunk, optimizer=optimizer)
    records = []
    for step in range(2):
        network.zero_grad()
        network.trunk.append(nn.Linear(5, 5).double())
        network.trunk[0] = nn.Linear(4, 6).double()
        call = wrap(Parts(network))
        record = balancer.backward(
            call(here, batch(seed=step), has),
            validation=lambda call=call: call(here, batch(seed=9), has),
        )
        records.append(record.as_dict())
    return Outcome(records=records).add(network, balancer)


@pytest.mark.parametrize("wrapped", [False, True])
def test_shared_modules_may_change_between_steps(two: Pool, wrapped: bool) -> None:
    for name in NAMES:
        ranks = two.run(changing, name, wrapped)
        assert_equal(ranks, changing(ALONE, name, False), 1e-12, name)
        same_everywhere(ranks)


def in_subgroups(here: Here, members: list[list[int]]) -> dict[str, Outcome]:
    """Train as a member of one of several groups of processes, or outside all of them."""
    groups = [dist.new_group(ranks) for ranks in members]
    found: dict[str, Outcome] = {}
    for ranks, group in zip(members, groups, strict=True):
        if here.rank in ranks:
            mine = Here(ranks.index(here.rank), len(ranks))
            found = {name: train(mine, name, process_group=group) for name in NAMES}
    dist.barrier()
    return found


@pytest.mark.parametrize("members", [[[0, 2], [1, 3]], [[1, 2, 3]]])
def test_a_process_group_of_some_of_the_processes(four: Pool, members: list[list[int]]) -> None:
    """Two groups side by side, or one that leaves a process out; names of ranks are the group's."""
    for rank, outcomes in enumerate(four.run(in_subgroups, members)):
        if not any(rank in ranks for ranks in members):
            assert outcomes == {}
            continue
        for name in NAMES:
            size = next(len(ranks) for ranks in members if rank in ranks)
            if size == 2:
                assert_equal([outcomes[name]], train(ALONE, name), 1e-12, name)
            else:  # parts of 3, 3 and 2 rows: no mean over the batch, but the same for all
                assert outcomes[name].gradients.keys() == train(ALONE, name).gradients.keys()


def test_four_ranks(four: Pool) -> None:
    for name in NAMES:
        outcomes = four.run(train, name)
        assert_equal(outcomes, train(ALONE, name), 1e-12, name)
        same_everywhere(outcomes)


def alone_in_a_group(here: Here) -> Outcome:
    """A group of one process is one process: nothing is averaged."""
    groups = [dist.new_group([rank]) for rank in range(here.size)]
    return train(ALONE, "dwa+cagrad", process_group=groups[here.rank])


def test_a_group_of_one(two: Pool) -> None:
    for outcome in two.run(alone_in_a_group):
        assert_equal([outcome], train(ALONE, "dwa+cagrad"), 0.0)


# --- features ------------------------------------------------------------------------------------


class Twofold(Network):
    """Features of the trunk, and for some parts of the batch those of a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 5).double()

    def features(self, rows: Tensor, part: int) -> list[Tensor]:
        return [self.trunk(rows)] if part else [self.trunk(rows), self.second(rows).tanh()]

    def losses_at(self, features: list[Tensor]) -> dict[str, Tensor]:
        hidden = torch.stack(features).sum(0)
        return {
            task: (head(hidden) - number).square().mean() * (-1.3) ** number
            for number, (task, head) in enumerate(self.heads.items())
        }


def at_features(here: Here, name: str, schedule: list[Has], twofold: bool) -> Outcome:
    torch.manual_seed(0)
    network = Twofold()
    shared = [network.trunk, network.second]
    balancer = make_balancer(name, tasks=TASKS, shared=shared)
    outcome = Outcome()
    for step, has in enumerate(schedule):
        parts = batch(8, seed=step).chunk(2)
        mine = range(2) if here.size == 1 else [here.rank]
        features = {part: network.features(parts[part], part * twofold) for part in mine}
        per_part = {part: network.losses_at(features[part]) for part in mine}
        losses = {
            task: torch.stack([per_part[p][task] for p in mine if task in has[p]]).mean()
            for task in TASKS
            if any(task in has[p] for p in mine)
        }
        flat = [feature for part in mine for feature in features[part]]
        record = balancer.backward(losses, features=flat)
        outcome.records.append(record.as_dict())
    return outcome.add(network, balancer)


@pytest.mark.parametrize("twofold", [False, True])
@pytest.mark.parametrize("name", ["naive", "dwa+pcgrad", "uncert+cagrad"])
def test_features_are_parts_of_the_whole_batchs(two: Pool, name: str, twofold: bool) -> None:
    """Also where a rank has no loss, and where its features come from other parameters."""
    schedule: list[Has] = [(TASKS, TASKS), (TASKS, ("b",)), ((), ("a", "c")), (TASKS, TASKS)]
    ranks = two.run(at_features, name, schedule, twofold)
    same_everywhere(ranks)
    assert_equal(ranks, at_features(ALONE, name, schedule, twofold), 1e-12)


def test_features_with_a_strategy_that_draws(two: Pool) -> None:
    """Draws go by the number of the coordinate among the features of the whole batch."""
    schedule: list[Has] = [(TASKS, TASKS)] * 2
    ranks = two.run(at_features, "graddrop", schedule, False)
    same_everywhere(ranks)
    assert_equal(ranks, at_features(ALONE, "graddrop", schedule, False), 1e-12)


# --- every, dtype, chunk -------------------------------------------------------------------------


def with_option(
    here: Here, name: str, steps: int, options: dict[str, Any], wrapped: bool
) -> Outcome:
    return train(here, name, steps=steps, wrap=ddp() if wrapped else plain, **options)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "options", [{"every": 2}, {"every": 3}, {"chunk": 2}, {"nonfinite": "drop"}], ids=str
)
def test_options_change_nothing_between_ranks(
    two: Pool, options: dict[str, Any], wrapped: bool
) -> None:
    for name in ("pcgrad", "uncert+cagrad"):
        ranks = two.run(with_option, name, 5, options, wrapped)
        same_everywhere(ranks)
        assert_equal(ranks, with_option(ALONE, name, 5, options, False), 1e-12, name)


@pytest.mark.parametrize("name", ["graddrop", "dwa+cagrad"])
def test_rows_in_bfloat16(two: Pool, name: str) -> None:
    """Rounded to 8 bits before they are averaged and after: the sum of few such errors."""
    options = {"dtype": torch.bfloat16}
    ranks = two.run(with_option, name, 1, options, False)
    same_everywhere(ranks)
    alone = with_option(ALONE, name, 1, {}, False)
    for outcome in ranks:
        assert_equal(
            [Outcome(gradients=outcome.gradients)], Outcome(gradients=alone.gradients), 0.05
        )


class SumOfRows(GradientStrategy):
    """Neither coordinatewise nor decided by a Gramian."""

    def forward(self, gradients: Tensor) -> Tensor:
        return gradients.sum(0) * gradients.shape[1]


def bad_below_features(here: Here, policy: str) -> str:
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    hidden = (x + here.rank).sqrt()  # an infinite slope, on the first rank only
    losses = {task: hidden.sum() * (1.0 + number) for number, task in enumerate("ab")}
    balancer = Balancer(Equal(), CAGrad(), tasks=("a", "b"), shared=[x], nonfinite=policy)
    try:
        skipped = balancer.backward(losses, features=hidden).skipped
    except FloatingPointError as error:
        return f"{x.grad} {error}"
    return f"{x.grad} skipped: {skipped}"


@pytest.mark.parametrize(
    ("policy", "words"),
    [("raise", "the gradient below `features` must be finite"), ("skip", "skipped: True")],
)
def test_all_ranks_find_what_is_not_finite_below_features(
    two: Pool, policy: str, words: str
) -> None:
    for found in two.run(bad_below_features, policy):
        assert found.startswith("None " + words)


def whole_rows(here: Here, features: bool) -> Outcome:
    torch.manual_seed(0)
    network = Network()
    balancer = Balancer(Equal(), SumOfRows(), tasks=TASKS, shared=network.trunk)
    hidden = network.trunk(here.part(batch()))
    losses = {task: head(hidden).square().mean() for task, head in network.heads.items()}
    balancer.backward(losses, features=hidden if features else None)
    return Outcome().add(network, balancer)


def test_a_strategy_that_needs_whole_rows(two: Pool) -> None:
    assert_equal(two.run(whole_rows, False), whole_rows(ALONE, False), 1e-12)


def test_a_strategy_that_needs_whole_rows_is_refused_at_features_of_several_ranks(
    two: Pool,
) -> None:
    with pytest.raises(RankError, match="needs whole rows") as caught:
        two.run(whole_rows, True)
    assert str(caught.value).count("needs whole rows") >= 2


# --- kinds of layers -----------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding, tied to the output layer, with sparse gradients, or both."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, sparse="sparse" in kind)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 6, bias=False)
        if "tied" in kind:
            self.output.weight = self.embedding.weight
        self.double()

    def losses(self, words: Tensor) -> dict[str, Tensor]:
        hidden = self.middle(self.embedding(words)).tanh()
        scores = self.output(hidden)
        return {
            "a": scores.square().mean(),
            "b": -hidden.sum(1).mean(),
            "c": nn.functional.cross_entropy(scores, words),
        }


def on_words(here: Here, name: str, kind: str, micro: int) -> Outcome:
    torch.manual_seed(0)
    model = Words(kind)
    balancer = make_balancer(name, tasks=TASKS, shared=model)
    model.embedding(torch.tensor([3])).sum().backward()
    losses = model.losses(here.part(torch.tensor([0, 1, 1, 2, 2, 4])))
    for _ in range(1, micro):
        balancer.accumulate({"b": losses["b"]})
        losses = model.losses(here.part(torch.tensor([0, 1, 1, 2, 2, 4])))
    record = balancer.backward(losses)
    outcome = Outcome(records=[record.as_dict()]).add(model, balancer)
    dense = {n: None if g is None else g.to_dense() for n, g in outcome.gradients.items()}
    return Outcome(outcome.values, dense, outcome.records)


@pytest.mark.parametrize("kind", ["tied", "sparse", "sparse and tied"])
@pytest.mark.parametrize("name", ["naive", "graddrop", "pcgrad"])
@pytest.mark.parametrize("micro", [1, 2])
def test_embeddings(two: Pool, name: str, kind: str, micro: int) -> None:
    """Ranks reach other rows of it."""
    arguments = name, kind, micro
    assert_equal(two.run(on_words, *arguments), on_words(ALONE, *arguments), 1e-12)


Make = Callable[[], nn.Module]


def batch_norm(here: Here, wrapped: bool) -> tuple[Outcome, Tensor]:
    """Means and variances are those of each rank's part; gradients are averaged all the same."""
    torch.manual_seed(0)
    network = Network()
    network.trunk[2] = nn.BatchNorm1d(6).double()
    model = Parts(network)
    call = ddp()(model) if wrapped and here.size > 1 else model
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    balancer = make_balancer("autol+pcgrad", tasks=TASKS, shared=network.trunk, optimizer=optimizer)
    has: Has = (TASKS, TASKS)
    record = balancer.backward(
        call(here, batch(), has), validation=lambda: call(here, batch(seed=1), has)
    )
    outcome = Outcome(records=[record.as_dict()]).add(network, balancer)
    return outcome, network.trunk[2].running_mean.clone()


@pytest.mark.parametrize("wrapped", [False, True])
def test_batch_norm(two: Pool, wrapped: bool) -> None:
    """One process takes the parts one after the other, so that its statistics are theirs.

    Validation leaves running statistics alone, on every rank.
    """
    expected, statistics = batch_norm(ALONE, False)
    ranks = two.run(batch_norm, wrapped)
    assert_equal([outcome for outcome, _ in ranks], expected, 1e-12)
    if not wrapped:  # DistributedDataParallel hands the first rank's round
        # Each moved a tenth of the way to the mean of its part; one process went both ways in turn.
        first, second = (mean for _, mean in ranks)
        torch.testing.assert_close(statistics, 0.9 * first + second, rtol=1e-12, atol=1e-14)


def dropout(here: Here) -> Outcome:
    """Masks are each rank's own, so no process alone compares; ranks must not drift apart."""
    torch.manual_seed(0)
    network = Network(dropout=0.4)
    torch.manual_seed(here.rank)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    balancer = make_balancer("autol+cagrad", tasks=TASKS, shared=network.trunk, optimizer=optimizer)
    outcome = Outcome()
    for step in range(3):
        optimizer.zero_grad()
        rows = here.part(batch(seed=step))
        record = balancer.backward(
            network.losses(rows), validation=lambda rows=rows: network.losses(rows)
        )
        outcome.records.append(record.as_dict())
        optimizer.step()
    return outcome.add(network, balancer)


def test_dropout(two: Pool) -> None:
    same_everywhere(two.run(dropout))


def scaled(here: Here, name: str) -> Outcome:
    """Losses in float32 under a gradient scaler, whose scale is a power of two."""
    torch.manual_seed(0)
    network = Network().float()
    balancer = make_balancer(name, tasks=TASKS, shared=network.trunk)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    record = balancer.backward(network.losses(here.part(batch().float())), scaler=scaler)
    return Outcome(records=[record.as_dict()]).add(network, balancer)


@pytest.mark.parametrize("name", ["naive", "graddrop", "uncert+cagrad"])
def test_a_gradient_scaler(two: Pool, name: str) -> None:
    assert_equal(two.run(scaled, name), scaled(ALONE, name), 1e-6)


def validated(here: Here, has: Has) -> Outcome:
    torch.manual_seed(0)
    network = Network()
    model = Parts(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    balancer = make_balancer("autol+pcgrad", tasks=TASKS, shared=network.trunk, optimizer=optimizer)
    for step in range(2):
        losses = model(here, batch(seed=step), (TASKS, TASKS))
        balancer.backward(losses, validation=lambda: model(here, batch(seed=9), has))
    outcome = Outcome().add(network, balancer)
    outcome.learned.append(balancer.weighting.lambdas)
    return outcome


@pytest.mark.parametrize("has", [(TASKS, ()), ((), ("b",)), (("a",), ("a", "c"))])
def test_validation_losses_that_not_every_rank_has(two: Pool, has: Has) -> None:
    """Each is the mean over the ranks that have it, as a training loss is."""
    assert_equal(two.run(validated, has), validated(ALONE, has), 1e-12)
