"""When gradients go round, and how often ranks wait for each other."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtbalance import _buckets, make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.runs import Outcome, assert_equal, train


@contextmanager
def recorded(log: list[str]) -> Iterator[None]:
    """Note every collective, and when those that are not waited for at once are."""
    kept = {name: getattr(dist, name) for name in _COLLECTIVES}

    def noting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            log.append(f"{name} on its way" if options.get("async_op") else name)
            work = kept[name](*arguments, **options)
            return _Waited(work, log) if options.get("async_op") else work

        return call

    for name in kept:
        setattr(dist, name, noting(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


class _Waited:
    def __init__(self, work: Any, log: list[str]) -> None:
        self._work, self._log = work, log

    def wait(self) -> None:
        self._log.append("wait")
        self._work.wait()


_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")


def order_of_events(here: Here) -> list[str]:
    log: list[str] = []
    network = Network()
    balancer = make_balancer("cagrad", tasks=TASKS, shared=network.trunk)
    balancer.backward(network.losses(batch()))
    losses = network.losses(batch())
    for loss in losses.values():
        loss.grad_fn.register_prehook(lambda _: log.append("backward"))
    with recorded(log):
        balancer.backward(losses)
    return log


def test_gradients_travel_while_the_next_task_is_computed(two: Pool) -> None:
    """Each task's are sent before the next backward pass begins, and waited for after the last."""
    for log in two.run(order_of_events):
        sent = ["backward", "all_reduce on its way"] * len(TASKS)
        assert log == ["all_gather", *sent, *["wait"] * len(TASKS)]


def count_collectives(here: Here, name: str, options: dict[str, Any]) -> Counter[str]:
    """Count those of a step in the steady state: the first one has more to tell."""
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    balancer = make_balancer(
        name, tasks=TASKS, shared=network.trunk, optimizer=optimizer, **options
    )

    def step() -> None:
        balancer.backward(network.losses(batch()), validation=lambda: network.losses(batch()))

    log: list[str] = []
    step()
    step()
    with recorded(log):
        step()
    return Counter(log) - Counter(wait=len(log))


@pytest.mark.parametrize(
    ("name", "options", "small"),
    [
        ("cagrad", {}, {}),
        ("graddrop", {}, {}),
        ("dwa+pcgrad", {"nonfinite": "skip"}, {}),
        ("gradnorm+pcgrad", {}, {}),
        ("naive", {"nonfinite": "propagate"}, {}),
        ("naive", {}, {"all_reduce": 1}),  # whether the sum is finite
        # who has which validation loss, and the products with it
        ("autol+pcgrad", {}, {"all_gather": 1, "all_reduce": 1}),
    ],
)
def test_a_step_takes_one_small_gather_and_its_buckets(
    two: Pool, name: str, options: dict[str, Any], small: dict[str, int]
) -> None:
    passes = 1 if name == "naive" else len(TASKS)
    for counts in two.run(count_collectives, name, options):
        assert counts == Counter({"all_gather": 1, "all_reduce on its way": passes}) + Counter(
            small
        )


def train_with_small_buckets(here: Here, name: str, size: int) -> tuple[Outcome, int]:
    """Count the messages of one step, too."""
    log: list[str] = []
    before, _buckets._BUCKET_BYTES = _buckets._BUCKET_BYTES, size
    try:
        with recorded(log):
            outcome = train(here, name, steps=1)
    finally:
        _buckets._BUCKET_BYTES = before
    return outcome, log.count("all_reduce on its way")


@pytest.mark.parametrize("name", ["uncert", "graddrop", "dwa+cagrad"])
def test_parameters_larger_than_a_bucket_and_buckets_of_several(two: Pool, name: str) -> None:
    """A task reaches 6 x 4, 6, 5 x 6, 5, 1 x 5 and 1 numbers of 8 bytes."""
    alone = train(ALONE, name, steps=1)
    messages = []
    for size in (1, 100, 10**6):
        ranks = two.run(train_with_small_buckets, name, size)
        assert_equal([outcome for outcome, _ in ranks], alone, 1e-12, f"{size} bytes")
        assert ranks[0][1] == ranks[1][1]
        messages.append(ranks[0][1])
    if name == "uncert":  # one pass over all parameters: trunk, and three heads
        assert messages[0] == 4 + 3 * 2
    else:
        assert messages[0] == len(TASKS) * 6
    assert messages[0] > messages[1] > messages[2]


def dtypes_and_layouts(here: Here) -> Outcome:
    """Parameters of two dtypes, complex ones, and of another layout in memory."""
    torch.manual_seed(0)
    real = nn.Linear(4, 3).double()
    single = nn.Linear(4, 3)
    image = nn.Conv2d(2, 2, 2).double().to(memory_format=torch.channels_last)
    spectrum = nn.Parameter(torch.randn(4, dtype=torch.complex128))
    model = nn.ModuleList([real, single, image, nn.ParameterList([spectrum])])
    balancer = make_balancer("pcgrad", tasks=TASKS, shared=[real, single, image, spectrum])
    rows = here.part(batch())
    outputs = [
        real(rows).square().mean(1),
        single(rows.float()).double().mean(1),
        image(rows.reshape(-1, 1, 2, 2).expand(-1, 2, 2, 2)).square().mean((1, 2, 3)),
        (rows * spectrum).abs().square().mean(1),
    ]
    losses = {
        task: sum(((-1.5) ** (number * place)) * out.mean() for place, out in enumerate(outputs))
        for number, task in enumerate(TASKS)
    }
    outcome = Outcome(records=[balancer.backward(losses).as_dict()])
    assert image.weight.grad is not None
    return outcome.add(model, balancer)


def test_dtypes_and_layouts(two: Pool) -> None:
    assert_equal(two.run(dtypes_and_layouts), dtypes_and_layouts(ALONE), 1e-7)
