"""What goes wrong on one rank is known to all of them, and nobody waits for ever.

After each error the same processes go on to take a step together: no collective is left half done.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtbalance import make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.runs import Outcome, assert_equal, same_everywhere

NAMES = ["naive", "uncert", "cagrad", "graddrop", "autol+pcgrad"]


def setting(name: str, **options: Any) -> tuple[Network, Any]:
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    options.setdefault("shared", network.trunk)
    return network, make_balancer(name, tasks=TASKS, optimizer=optimizer, **options)


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001  # the test looks at what it is
        return f"{type(error).__name__}: {error}"
    return "no error"


Break = Callable[[Network, dict[str, Tensor]], object]


def unknown_task(network: Network, losses: dict[str, Tensor]) -> object:
    return {**losses, "d": losses["a"]}


def no_scalar(network: Network, losses: dict[str, Tensor]) -> object:
    return {**losses, "b": torch.ones(3, requires_grad=True) * losses["b"]}


def no_mapping(network: Network, losses: dict[str, Tensor]) -> object:
    return list(losses.values())


def no_graph(network: Network, losses: dict[str, Tensor]) -> object:
    return {**losses, "c": losses["c"].detach()}


def nothing_shared(network: Network, losses: dict[str, Tensor]) -> object:
    return {**losses, "c": network.heads["c"].weight.sum()}


def one_rank_errs(here: Here, broken: Break, name: str) -> tuple[str, str, bool]:
    network, balancer = setting(name)

    def step(good: bool) -> None:
        losses: Any = network.losses(here.part(batch()))
        if not good and here.rank == 1:
            losses = broken(network, losses)
        balancer.backward(losses, validation=lambda: network.losses(here.part(batch())))

    message = message_of(lambda: step(good=False))
    written = any(p.grad is not None for p in network.parameters())
    return message, message_of(lambda: step(good=True)), written


@pytest.mark.parametrize("name", ["naive", "autol+pcgrad"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (unknown_task, "`losses` must name tasks among"),
        (no_scalar, "the loss of task 'b' must be a scalar"),
        (no_mapping, "`losses` must map task names"),
        (no_graph, "the loss of task 'c' must have a graph"),
        (nothing_shared, "the loss of task 'c' must reach a shared parameter"),
    ],
)
def test_an_error_on_one_rank_is_told_by_all(
    two: Pool, broken: Break, message: str, name: str
) -> None:
    other, own = two.run(one_rank_errs, broken, name)
    assert message in own[0]
    assert other[0].startswith("RuntimeError: rank 1 stopped with an error in this step")
    assert "rank 0 cannot go on" in other[0]
    for _, after, written in (other, own):
        assert not written
        assert after == "no error"


# --- not finite ----------------------------------------------------------------------------------


def spoiled(losses: dict[str, Tensor], network: Network, what: str) -> dict[str, Tensor]:
    """Break task b: its loss, its gradient everywhere, or its gradient in its head only."""
    if what == "loss":
        return {**losses, "b": losses["b"] * float("inf")}
    if what == "gradient":  # sqrt has an infinite slope at 0, where its value is finite
        return {**losses, "b": losses["b"] + (losses["b"] - losses["b"].detach()).abs().sqrt()}
    return {**losses, "b": losses["b"] + (network.heads["b"].weight.sum() * 0).abs().sqrt()}


def not_finite(here: Here, name: str, policy: str, what: str) -> tuple[str, Outcome]:
    """The first step is spoiled where the second half of the batch is; the second one is not."""
    network, balancer = setting(name, nonfinite=policy)
    outcome = Outcome()

    def step(spoil: bool) -> None:
        losses = network.losses(here.part(batch()))
        if spoil and here.rank == here.size - 1:
            losses = spoiled(losses, network, what)
        record = balancer.backward(
            losses, validation=lambda: network.losses(here.part(batch(seed=1)))
        )
        if not record.skipped:  # whose losses a skipped step lists is its own affair
            outcome.records.append(record.as_dict())

    message = message_of(lambda: step(spoil=True))
    outcome.add(network, balancer, "spoiled: ")
    step(spoil=False)
    return message, outcome.add(network, balancer, "after: ")


@pytest.mark.parametrize("what", ["loss", "gradient", "head"])
@pytest.mark.parametrize("policy", ["raise", "drop", "skip"])
def test_ranks_agree_on_what_is_not_finite(two: Pool, policy: str, what: str) -> None:
    """All raise the same, drop the same, or skip together, as one process would."""
    for name in NAMES:
        ranks = two.run(not_finite, name, policy, what)
        expected, alone = not_finite(ALONE, name, policy, what)
        assert [message for message, _ in ranks] == [expected] * 2
        assert ("FloatingPointError" in expected) == (policy == "raise")
        outcomes = [outcome for _, outcome in ranks]
        assert_equal(outcomes, alone, 1e-12, name)
        same_everywhere(outcomes)


def remembered(here: Here, name: str, policy: str, what: str) -> tuple[list[float], dict[str, Any]]:
    """Return what DWA remembers after a good and a spoiled step, and the last record."""
    nonfinite = "raise" if policy == "scaler" else policy
    network, balancer = setting(name, nonfinite=nonfinite)
    scaler = torch.amp.GradScaler("cpu") if policy == "scaler" else None

    def step(losses: dict[str, Tensor]) -> None:
        balancer.backward(losses, scaler=scaler)

    balancer.history = deque(maxlen=1)
    step(network.losses(here.part(batch())))
    losses = network.losses(here.part(batch()))
    message_of(lambda: step(spoiled(losses, network, what) if here.rank == 0 else losses))
    means = [*balancer.weighting.count.tolist(), *balancer.weighting.mean.tolist()]
    record = balancer.history[-1].as_dict()
    return means, {key: record[key] for key in ("skipped", "overflow")}


@pytest.mark.parametrize("what", ["gradient", "head"])
@pytest.mark.parametrize("policy", ["raise", "skip", "scaler"])
@pytest.mark.parametrize("name", ["dwa", "dwa+pcgrad"])
def test_no_rank_remembers_a_step_that_writes_nothing(
    two: Pool, name: str, policy: str, what: str
) -> None:
    alone, last = remembered(ALONE, name, policy, what)
    assert alone[:3] == [1, 1, 1]
    assert last == {"skipped": float(policy == "skip"), "overflow": float(policy == "scaler")}
    for means, record in two.run(remembered, name, policy, what):
        assert means == pytest.approx(alone, rel=1e-12)
        assert record == last


def bad_input(here: Here, name: str) -> tuple[str, Outcome]:
    network, balancer = setting(name)
    rows = here.part(batch())
    if here.rank == 1:
        rows.requires_grad_()
    losses = network.losses(rows)
    losses["a"] = losses["a"] + (0 * rows).abs().sqrt().sum()  # 0, with a slope of infinity by 0

    def step() -> None:
        balancer.backward(losses, validation=lambda: network.losses(here.part(batch(seed=1))))

    return message_of(step), Outcome().add(network, balancer)


@pytest.mark.parametrize("name", ["cagrad", "autol+graddrop"])
def test_inputs_of_one_rank_are_its_own_affair(two: Pool, name: str) -> None:
    """Their gradients are not looked at: the other ranks would have to take part in that."""
    ranks = two.run(bad_input, name)
    assert [message for message, _ in ranks] == ["no error"] * 2
    same_everywhere([outcome for _, outcome in ranks])


def spoiled_micro_batch(here: Here, policy: str) -> tuple[str, Outcome]:
    network, balancer = setting("cagrad", nonfinite=policy)

    def step() -> None:
        for number, rows in enumerate(here.part(batch()).chunk(2)):
            losses = network.losses(rows)
            if number == 1 and here.rank == here.size - 1:
                losses = spoiled(losses, network, "loss")
            balancer.accumulate({task: loss / 2 for task, loss in losses.items()})
        balancer.apply()

    message = message_of(step)
    return message, Outcome().add(network, balancer)


@pytest.mark.parametrize("policy", ["raise", "drop", "skip"])
def test_a_micro_batch_that_is_not_finite(two: Pool, policy: str) -> None:
    """It is told when the ranks meet, in apply(); alone, at once, in the same words."""
    expected, alone = spoiled_micro_batch(ALONE, policy)
    for message, outcome in two.run(spoiled_micro_batch, policy):
        assert expected.startswith(message)
        assert_equal([outcome], alone, 1e-12)


# --- models that differ --------------------------------------------------------------------------


def with_another_head(here: Here) -> str:
    network, balancer = setting("cagrad")
    if here.rank == 1:
        network.heads["b"] = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 1)).double()
    return message_of(lambda: balancer.backward(network.losses(here.part(batch()))))


def test_parameters_that_another_rank_does_not_have(two: Pool) -> None:
    messages = two.run(with_another_head)
    assert messages[0] == messages[1]
    assert "all ranks must hold the same parameters, but rank 0 does not know" in messages[0]
    assert "b.0." in messages[0]  # the new head's name


def apply_nothing(here: Here) -> tuple[str, Outcome]:
    """Nothing anywhere is an error; nothing on one rank alone is not."""
    network, balancer = setting("cagrad")
    message = message_of(balancer.apply)
    losses = network.losses(batch())
    if here.rank == 0:
        balancer.accumulate(losses)
    balancer.apply()
    return message, Outcome().add(network, balancer)


def test_apply_without_accumulate(two: Pool) -> None:
    expected, alone = apply_nothing(ALONE)
    for message, outcome in two.run(apply_nothing):
        assert message == expected
        assert "nothing has been accumulated" in message
        assert_equal([outcome], alone, 1e-12)


def without_validation(here: Here) -> str:
    network, balancer = setting("autol")
    validation = None if here.rank else lambda: network.losses(batch())
    return message_of(lambda: balancer.backward(network.losses(batch()), validation=validation))


def test_validation_missing_on_one_rank(two: Pool) -> None:
    other, own = two.run(without_validation)
    assert "`validation` must be a function without arguments" in own
    assert "rank 1 stopped with an error" in other


def wrong_validation(here: Here) -> str:
    network, balancer = setting("autol")
    known = "a" if here.rank == 0 else "typo"
    return message_of(
        lambda: balancer.backward(
            network.losses(batch()), validation=lambda: {known: network.losses(batch())["a"]}
        )
    )


def test_validation_that_names_an_unknown_task_on_one_rank(two: Pool) -> None:
    other, own = two.run(wrong_validation)
    assert "`validation` must name tasks among" in own
    assert "rank 1 stopped with an error" in other


def error_in_a_micro_batch(here: Here) -> str:
    network, balancer = setting("cagrad")

    def step() -> None:
        losses = network.losses(batch())
        balancer.accumulate(losses if here.rank == 0 else no_graph(network, losses))
        balancer.apply()

    return message_of(step)


def test_an_error_in_accumulate_is_told_in_apply(two: Pool) -> None:
    other, own = two.run(error_in_a_micro_batch)
    assert "the loss of task 'c' must have a graph" in own
    assert "rank 1 stopped with an error" in other


def step_given_up(here: Here, what: str) -> tuple[str, str, Outcome]:
    """The last rank gives the second micro-batch of a step up; then all take another step."""
    network, balancer = setting("autol+pcgrad" if what == "validation" else "cagrad")
    last = here.rank == here.size - 1

    def missing_or_not(*, good: bool) -> Any:
        return (lambda: network.losses(batch(seed=3))) if good else None

    def step() -> None:
        balancer.accumulate(network.losses(batch(seed=1)))
        losses = network.losses(batch(seed=2))
        if last and what == "graph":
            losses = no_graph(network, losses)
        elif last and what == "loss":
            losses = spoiled(losses, network, "loss")
        balancer.accumulate(losses)
        balancer.apply(validation=missing_or_not(good=not last))

    message = message_of(step)
    if what == "validation" and here.size == 1:
        balancer.discard()  # alone, nothing was lost
    nothing = message_of(lambda: balancer.apply(validation=missing_or_not(good=True)))
    for rows in (here.part(batch()), here.part(batch(seed=4))):
        balancer.accumulate(network.losses(rows))
    balancer.apply(validation=missing_or_not(good=True))
    return message, nothing, Outcome().add(network, balancer)


@pytest.mark.parametrize("what", ["graph", "loss", "validation"])
def test_no_rank_keeps_rows_of_a_step_that_is_over(two: Pool, what: str) -> None:
    """Else they would join the next step, on some ranks only."""
    other, own = two.run(step_given_up, what)
    expected = {
        "graph": "must have a graph, but .* discarded, as the step is over",
        "loss": "the loss of task 'b' must be finite",
        "validation": "`validation` must be a function",
    }
    assert re.search(expected[what], own[0])
    assert other[0] == own[0] if what == "loss" else "rank 1 stopped with an error" in other[0]
    _, _, alone = step_given_up(ALONE, "loss" if what == "graph" else what)
    for _, nothing, outcome in (other, own):
        assert "nothing has been accumulated" in nothing
        assert_equal([outcome], alone, 1e-12)


def other_names(here: Here, tasks: tuple[str, ...]) -> tuple[str, bool]:
    """Rank 0 names the tasks a, b, c; the others have names of their own."""
    network = Network()
    names = TASKS if here.rank == 0 else tasks
    balancer = make_balancer("pcgrad", tasks=names, shared=network.trunk)
    losses = dict(zip(names, network.losses(batch()).values(), strict=False))
    message = message_of(lambda: balancer.backward(losses))
    return message, any(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("tasks", [("b", "a", "c"), ("a", "b", "x"), ("a", "b")])
def test_names_of_tasks_are_compared_before_the_first_step(
    two: Pool, tasks: tuple[str, ...]
) -> None:
    for message, written in two.run(other_names, tasks):
        assert message.startswith("ValueError: `tasks` must have the same names in the same order")
        assert f"but got {TASKS} on rank 0 and {tasks} on rank 1" in message
        assert not written


def only_one_rank(here: Here, name: str, call: str, first: int, late: bool) -> list[str]:
    """Return what steps say after a call on one rank, and after all others have followed."""
    network, balancer = setting(name)

    def step() -> object:
        rows = here.part(batch())
        return balancer.backward(network.losses(rows), validation=lambda: network.losses(rows))

    def do() -> None:
        if call == "load_state_dict":
            balancer.load_state_dict(balancer.state_dict())
        elif call == "weighting":
            balancer.weighting.load_state_dict(balancer.weighting.state_dict())
        else:
            getattr(balancer, call)()

    if late:
        step()
    if here.rank == first:
        do()
    messages = [message_of(step)]
    if here.rank != first:
        do()
    return [*messages, message_of(step)]


LOADED = "`load_state_dict` or `reset`"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("name", "call", "named"),
    [
        ("dwa", "end_epoch", "`end_epoch`"),
        ("autol+cagrad", "load_state_dict", LOADED),
        ("pcgrad", "load_state_dict", LOADED),
        ("uncert", "weighting", LOADED),
        ("graddrop", "reset", LOADED),
    ],
)
def test_what_one_rank_alone_does_to_its_state(
    two: Pool, name: str, call: str, named: str, first: int
) -> None:
    """All are told in the next step, in the same words, and go on once all have done it."""
    ranks = two.run(only_one_rank, name, call, first, True)
    assert ranks[0] == ranks[1]
    counts = [int(first == rank) for rank in range(2)]
    words = (
        f"ValueError: all ranks must call {named} equally often, but since the first step rank 0 "
        f"has called it {counts[0]} times and rank 1 {counts[1]} times. Their weights would "
        "differ: call it in every process."
    )
    assert ranks[0] == [words, "no error"]


@pytest.mark.parametrize(
    ("name", "call", "late"),
    [
        ("cagrad", "load_state_dict", False),  # may reach the others with the model
        ("cagrad", "end_epoch", True),  # a summary for the log
    ],
)
def test_what_one_rank_alone_may_do(two: Pool, name: str, call: str, late: bool) -> None:
    assert two.run(only_one_rank, name, call, 0, late)[0][0] == "no error"
