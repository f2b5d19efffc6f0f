"""``after_step`` in several processes: the losses are those of the whole batch, or all stop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtbalance import make_balancer
from tests._networks import TASKS, Network, batch
from tests.distributed.harness import ALONE, Here, Pool
from tests.distributed.test_errors import message_of


def setting(**options: Any) -> tuple[Network, Any]:
    torch.manual_seed(0)
    network = Network()
    return network, make_balancer("famo", tasks=TASKS, shared=network.trunk, **options)


def present(here: Here, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a rank has: b is missing in the first of several, c in the last."""
    gone = {0: "b", here.size - 1: "c"}[here.rank] if here.size > 1 else ""
    return {task: loss for task, loss in losses.items() if task != gone}


def logits_with_absent_tasks(here: Here) -> tuple[list[float], list[float]]:
    network, balancer = setting(lr=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    whole = []
    for seed in range(4):
        optimizer.zero_grad()
        balancer.backward(present(here, network.losses(here.part(batch(seed=seed)))))
        optimizer.step()
        part = here.part(batch(seed=seed))
        balancer.after_step(lambda part=part: present(here, network.losses(part)))
        whole += [float(loss) for loss in balancer.weighting.before]
    return balancer.weighting.logits.tolist(), whole


def by_hand() -> list[float]:
    """One process with the whole batch, whose b and c are of one half each."""
    network, balancer = setting(lr=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)

    def losses(rows: Tensor) -> dict[str, Tensor]:
        first, second = (network.losses(part) for part in rows.chunk(2))
        return {"a": (first["a"] + second["a"]) / 2, "b": second["b"], "c": first["c"]}

    for seed in range(4):
        optimizer.zero_grad()
        balancer.backward(losses(batch(seed=seed)))
        optimizer.step()
        balancer.after_step(lambda seed=seed: losses(batch(seed=seed)))
    found: list[float] = balancer.weighting.logits.tolist()
    return found


def test_losses_are_means_over_those_that_have_the_task(two: Pool) -> None:
    expected = by_hand()
    (first, left), (second, _) = two.run(logits_with_absent_tasks)
    assert first == second
    assert first == pytest.approx(expected, rel=1e-9)
    assert left == [0.0] * 12
    assert max(map(abs, expected)) > 0.5


def one_rank_errs(here: Here, kind: str) -> tuple[list[str], list[float]]:
    network, balancer = setting()
    rows = here.part(batch())
    messages = []

    def after() -> dict[str, Tensor]:
        if here.rank == here.size - 1:
            if kind == "raises":
                raise ZeroDivisionError("by zero")
            return {"d": torch.ones(())}
        return network.losses(rows)

    def nothing() -> dict[str, Tensor]:
        losses = network.losses(rows)
        del losses["b"]
        return losses

    balancer.backward(network.losses(rows))
    messages.append(message_of(lambda: balancer.after_step(after)))
    messages.append(message_of(lambda: balancer.after_step(nothing)))
    messages.append(message_of(lambda: balancer.after_step(lambda: network.losses(rows))))
    messages.append(message_of(lambda: balancer.backward(network.losses(rows))))
    return messages, balancer.weighting.steps.tolist()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("raises", "ZeroDivisionError: by zero"), ("task", "ValueError: `losses` must name tasks")],
)
def test_an_error_on_one_rank_is_told_by_all(two: Pool, kind: str, message: str) -> None:
    """And the call may be repeated by all."""
    (other, steps), (own, same) = two.run(one_rank_errs, kind)
    assert own[0].startswith(message)
    assert other[0].startswith("RuntimeError: rank 1 stopped with an error in this step")
    for messages in (other, own):
        assert "but 'b' is missing" in messages[1]
        assert messages[2:] == ["no error", "no error"]
    assert steps == same == [1, 1, 1]
    alone, _ = one_rank_errs(ALONE, kind)
    assert alone[0].startswith(message)


def one_rank_forgets(here: Here) -> list[str]:
    """The others are in after_step when it comes to the next step."""
    network, balancer = setting()
    rows = here.part(batch())
    balancer.backward(network.losses(rows))
    if here.rank == 0:
        return [message_of(lambda: balancer.after_step(lambda: network.losses(rows)))]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [message_of(lambda: balancer.backward(network.losses(rows)))]


def test_a_rank_that_forgets_it_is_told_of(two: Pool) -> None:
    messages = two.run(one_rank_forgets)
    for (message,) in messages:
        assert message.startswith("ValueError: all ranks must call `after_step` equally often")


def skipped_step(here: Here) -> tuple[str, list[int]]:
    network, balancer = setting(nonfinite="skip")
    losses = network.losses(here.part(batch()))
    if here.rank == here.size - 1:
        losses["a"] = losses["a"] * float("nan")
    balancer.backward(losses)
    message = message_of(lambda: balancer.after_step(lambda: 1 / 0))  # type: ignore[arg-type]
    return message, balancer.weighting.steps.tolist()


def test_after_a_step_that_one_rank_spoils_nobody_is_called(two: Pool) -> None:
    assert two.run(skipped_step) == [("no error", [0, 0, 0])] * 2
